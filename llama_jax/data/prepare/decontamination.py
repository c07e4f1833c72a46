"""Removes text of evaluation sets from documents, by n-grams of words as in GPT-3's paper.

The method is that of Brown et al. (2020), appendix C: words are in lower case without punctuation;
n is 13 (the length of shorter texts, at least 8); each occurrence is cut out with 200 characters on
both sides; pieces below 200 characters and documents in more than 10 pieces are removed; an n-gram
in more than 10 documents counts as a common phrase. A 64-bit hash represents an n-gram: with 10^7
n-grams of evaluation sets, about 3 of the 6·10^12 n-grams of 10^12 words match by chance.
"""

import functools
import io
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.grouping import Grouping
from llama_jax.data.prepare.minhash import MULTIPLIER, hash_word
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, list_files, parse_path, read_file, write_file

MAX_WORDS, MIN_WORDS = 13, 8  # in an n-gram
MAX_DOCUMENTS = 10
_MARGIN = 200  # characters
_MIN_PIECE = 200  # characters
_MAX_PIECES = 10
_REFERENCE = "GPT-3 (arXiv 2005.14165), appendix C"
_WORD = re.compile(r"[^\W_]+")
_ROW = np.dtype([("hash", "<u8"), ("item", "<u4"), ("words", "u1")])


class NgramIndex(NamedTuple):
    """The n-grams of evaluation sets, sorted by hash.

    Attributes:
        names: of the evaluation sets.
        sizes: number of items, and of items without a text of 8 words, which can't be found.
        hashes: uint64 [n].
        sets: the evaluation set of each hash [n].
        items: its item, numbered within the set [n].
        lengths: the numbers of words that occur.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    hashes: np.ndarray
    sets: np.ndarray
    items: np.ndarray
    lengths: tuple[int, ...]


class Hits(NamedTuple):
    """Where a text contains n-grams of an index, each in one place at least.

    Attributes:
        hashes: uint64 [k].
        starts: first character [k].
        ends: character after the last [k].
    """

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


_hash_word = functools.lru_cache(maxsize=1 << 17)(hash_word)


def _hash_words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of a text's words [w] and their first and last + 1 character [w, 2]."""
    words = [(_hash_word(match[0].lower()), *match.span()) for match in _WORD.finditer(text)]
    table = np.array(words, np.uint64).reshape(-1, 3)
    return table[:, 0], table[:, 1:].astype(np.int64)


def _hash_ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Returns the hashes of all n-grams of words: uint64 [max(w - n + 1, 0)]."""
    count = max(len(words) - n + 1, 0)
    hashes = np.full(count, n, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(MULTIPLIER) + words[i : i + count]
    # Mixes high bits into low ones (the start of SplitMix64), so that any bits of it are uniform.
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ (hashes >> np.uint64(31))


def save_index(folder: AnyPath, sets: Mapping[str, Iterable[list[str]]]) -> None:
    """Writes the n-grams of evaluation sets, one .npy file per set.

    Args:
        folder: is created.
        sets: the texts of each item by the name of the evaluation set.
    """
    for name, items in sets.items():
        parts = [np.zeros(0, _ROW)]
        for number, texts in enumerate(items):
            hashed = [_hash_words(text)[0] for text in texts]
            usable = [words for words in hashed if len(words) >= MIN_WORDS]
            for words in usable:
                n = min(MAX_WORDS, len(words))
                hashes = np.unique(_hash_ngrams(words, n))
                rows = np.zeros(len(hashes), _ROW)
                rows["hash"], rows["item"], rows["words"] = hashes, number, n
                parts.append(rows)
            if not usable:
                parts.append(np.array([(0, number, 0)], _ROW))
        rows = np.unique(np.concatenate(parts))
        file = io.BytesIO()
        np.save(file, rows, allow_pickle=False)
        write_file(folder / f"{name}.npy", file.getvalue())


@functools.lru_cache(maxsize=2)
def load_index(folder: AnyPath) -> NgramIndex:
    """Returns the n-grams that `save_index` wrote.

    Raises:
        InputError: the folder has no such files.
    """
    tables = dict[str, np.ndarray]()
    for path in sorted(p for p in list_files(folder) if p.suffix == ".npy"):
        try:
            tables[path.stem] = np.load(io.BytesIO(read_file(path)), allow_pickle=False)
        except ValueError as error:
            raise InputError(f"{path} has no n-grams ({error}): remove it") from error
        if tables[path.stem].dtype != _ROW:
            raise InputError(f"{path} has no n-grams of evaluation sets: remove it")
    if not tables:
        raise InputError(f"{folder} has no n-grams of evaluation sets (.npy files)")
    sizes = [(len(np.unique(t["item"])), int((t["words"] == 0).sum())) for t in tables.values()]
    sets = np.repeat(np.arange(len(tables)), [len(table) for table in tables.values()])
    rows = np.concatenate([*tables.values()])
    order = np.argsort(rows["hash"], kind="stable")
    order = order[rows["words"][order] > 0]
    rows = rows[order]  # without those of items that can't be found
    lengths = tuple(int(n) for n in np.unique(rows["words"]))
    return NgramIndex(
        tuple(tables), tuple(sizes), rows["hash"].copy(), sets[order], rows["item"].copy(), lengths
    )


def find_ngrams(index: NgramIndex, text: str) -> Hits:
    """Returns the places of a text that have n-grams of the index, in their order."""
    words, spans = _hash_words(text)
    found = []
    for n in index.lengths:
        hashes = _hash_ngrams(words, n)
        places = np.minimum(np.searchsorted(index.hashes, hashes), len(index.hashes) - 1)
        (first,) = np.nonzero(index.hashes[places] == hashes)
        found.append(Hits(hashes[first], spans[first, 0], spans[first + n - 1, 1]))
    if not found:
        return Hits(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    hits = Hits(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
    order = np.lexsort((hits.ends, hits.starts))
    return Hits(hits.hashes[order], hits.starts[order], hits.ends[order])


def cut_out(text: str, starts: Iterable[int], ends: Iterable[int]) -> str | None:
    """Returns a text without the places from `starts` to `ends` and the characters around them.

    The pieces that remain are joined by a blank line. None: too little of the text remains, or too
    many pieces.
    """
    pieces, position = [], 0
    for start, end in sorted(zip(starts, ends, strict=True)):
        pieces.append(text[position : max(position, start - _MARGIN)])
        position = max(position, end + _MARGIN)
    pieces.append(text[position:])
    if len([piece for piece in pieces if piece]) > _MAX_PIECES:
        return None
    return "\n\n".join(p.strip() for p in pieces if len(p) >= _MIN_PIECE) or None


def decontamination(folder: str | AnyPath) -> Grouping:
    """Returns the step that removes the n-grams of evaluation sets, as `save_index` wrote them.

    A unit is an n-gram of an evaluation set that a document contains, however often.

    Raises:
        InputError: the folder has no n-grams.
    """
    index = load_index(parse_path(folder))

    def keys(document: Document) -> np.ndarray:
        return np.unique(find_ngrams(index, document.text).hashes)[:, np.newaxis]

    def remove(document: Document, units: np.ndarray) -> Document | None:
        hits = find_ngrams(index, document.text)
        removed = np.isin(hits.hashes, np.unique(hits.hashes)[units])
        text = cut_out(document.text, hits.starts[removed], hits.ends[removed])
        return document._replace(text=text) if text else None

    def report(keys: np.ndarray, documents: np.ndarray) -> list[dict[str, int | str]]:
        return count_items(index, keys[:, 0], documents)

    return Grouping("decontamination", _REFERENCE, keys, find_rare, remove, report=report)


def find_rare(keys: np.ndarray) -> np.ndarray:
    """Returns which n-grams of evaluation sets are no common phrases: bool [n].

    Args:
        keys: uint64 [n, 1], each once per document.
    """
    _, inverse, counts = np.unique(keys[:, 0], return_inverse=True, return_counts=True)
    return counts[inverse] <= MAX_DOCUMENTS


def count_items(
    index: NgramIndex, hashes: np.ndarray, documents: np.ndarray
) -> list[dict[str, int | str]]:
    """Returns how many items of each evaluation set occur, and in how many documents.

    Args:
        index: has the hashes.
        hashes: of n-grams that were found, uint64 [n].
        documents: the document of each, numbered in any way [n].
    """
    first = np.searchsorted(index.hashes, hashes, "left")
    counts = np.searchsorted(index.hashes, hashes, "right") - first
    # The rows of the index that each found hash has: several items may share an n-gram.
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.repeat(first, counts) + offsets
    documents = np.repeat(documents, counts)
    return [
        {
            "set": name,
            "items": size,
            "too_short": too_short,
            "found": len(np.unique(index.items[rows[index.sets[rows] == number]])),
            "documents": len(np.unique(documents[index.sets[rows] == number])),
        }
        for number, (name, (size, too_short)) in enumerate(
            zip(index.names, index.sizes, strict=True)
        )
    ]
