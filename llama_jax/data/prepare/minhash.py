"""Similarity of texts: sets of word sequences, and MinHash signatures that find similar sets.

A set is exact, up to hashes of 64 bits; a signature says only which sets are worth a comparison.
"""

import hashlib
import re
from typing import Any

import numpy as np

from llama_jax.data.epoch_order import splitmix64
from llama_jax.errors import check_package

BANDS, ROWS = 20, 6
# A pair of sets with Jaccard similarity s shares a band with probability 1 - (1 - s^ROWS)^BANDS:
# 0.998 at 0.8, 0.70 at 0.6, 0.08 at 0.4, 0.001 at 0.2.
_SEED = 2302_13971
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio


def hash_shingles(text: str, n_words: int) -> np.ndarray:
    """Returns the set of sequences of `n_words` consecutive words: sorted uint64 [n].

    Words are runs of letters, digits and underscores, in lower case. A text with fewer words is
    one sequence; a text without words has none. The hashes are the same on all machines.
    """
    words = re.findall(r"\w+", text.lower())
    if not words:
        return np.empty(0, np.uint64)
    hashes = {word: hash_word(word) for word in set(words)}
    hashes_of_words = np.array([hashes[word] for word in words], np.uint64)
    n_words = min(n_words, len(words))
    n = len(words) - n_words + 1
    sequences = np.zeros(n, np.uint64)
    for i in range(n_words):
        sequences = sequences * np.uint64(MULTIPLIER) + hashes_of_words[i : i + n]
    return np.unique(splitmix64(sequences))


def hash_word(word: str) -> int:
    """Returns a hash of a word below 2^64, the same on all machines."""
    digest = hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def check_minhash_package() -> None:
    """Checks that the package of signatures is installed.

    Raises:
        InputError: it isn't.
    """
    check_package("rensa", "rensa, which finds near-duplicates", "prepare")


def hash_bands(shingles: list[np.ndarray]) -> np.ndarray:
    """Returns BANDS hashes of each set: uint64 [n, BANDS]. Similar sets probably share one."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

    # rensa is given hashes of ours: its own hash of strings depends on the machine's word size.
    ends = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    flat = np.concatenate([np.empty(0, np.uint64), *shingles])
    signatures: Any = RMinHash.digest_matrix_from_flat_token_hashes(
        flat, ends, BANDS * ROWS, _SEED
    ).to_rows()
    rows = np.array(signatures, np.uint64).reshape(len(shingles), BANDS, ROWS)
    bands = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), rows.shape[:2])
    for i in range(ROWS):
        bands = splitmix64(bands * np.uint64(MULTIPLIER) + rows[:, :, i])
    return bands


def jaccard(shared: int, first: int, second: int) -> float:
    """Returns the Jaccard similarity of two sets from the sizes of intersection and sets."""
    return shared / max(1, first + second - shared)


def overlap(shared: int, first: int, second: int) -> float:
    """Returns the shared part of the larger set.

    Above 0.9, the Jaccard similarity is above 0.81. The part of the *smaller* set would remove
    collected works as duplicates of one of them.
    """
    return shared / max(1, first, second)
