"""Writes the arrays of token shards; `shards` describes the format.

The writer needs the memory of one shard, and knows neither the number of tokens nor that of
documents in advance.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.runtime import zarr_arrays
from llama_jax.runtime.manifest import hash_bytes
from llama_jax.runtime.storage import AnyPath, write_many
from llama_jax.runtime.zarr_arrays import array_metadata

SHARD_TOKENS = 1 << 25  # 64 MiB of uint16, in the memory of the writer; a multiple of 8
BY_SHARD = "shards:"  # before a hash of the hashes of the files of an array
CHUNK_TOKENS = 1 << 15  # 64 KiB of uint16; a window of 2,048 tokens is in one or two chunks


class EncodedSpan(NamedTuple):
    """The token ids of a span of a document."""

    ids: np.ndarray
    n_bytes: int  # of the span's UTF-8 text
    split: str
    first: bool  # whether the document starts with this span
    last: bool  # whether the document ends with this span


class PackedWindow(NamedTuple):
    """Examples that fill a window of T tokens."""

    tokens_T: np.ndarray
    starts_T: np.ndarray  # bool: first tokens of segments
    trained_T: np.ndarray  # bool: tokens that the model learns to predict
    n_examples: int
    n_tokens: int  # of the examples; padding follows
    n_bytes: int  # of the examples' UTF-8 text


def token_dtype(n_vocab: int) -> str:
    """Returns the dtype of stored token ids."""
    return "uint16" if n_vocab <= 1 << 16 else "uint32"


def split_metadata(
    length: int, dtype: str, shard_tokens: int, chunk_tokens: int, packed: bool = False
) -> dict[str, dict[str, Any]]:
    """Returns the metadata of the arrays of a split with `length` tokens, by name."""
    length_in_bytes = -(-length // 8)
    bits = array_metadata([length_in_bytes], "uint8", [chunk_tokens // 8], [shard_tokens // 8])
    tokens = array_metadata([length], dtype, [chunk_tokens], [shard_tokens])
    names = ["starts", "trained"] if packed else ["starts"]
    return {"tokens": tokens} | dict.fromkeys(names, bits)


def unigram_entropy(counts_V: np.ndarray) -> float:
    """Returns the entropy of the tokens [nats]: the best loss for a model without context."""
    share = counts_V[counts_V > 0] / max(1, counts_V.sum())
    return math.fsum(-share * np.log(share))


def hash_shards(hashes: Sequence[str]) -> str:
    """Returns the hash of an array from the SHA-256 of the content of each of its files.

    An array that one process wrote has the SHA-256 of its content instead, without a prefix.
    """
    return BY_SHARD + hash_bytes("".join(hashes).encode())


class SplitWriter:
    """Writes the tokens of one split, shard by shard.

    Args:
        folder: of the split.
        n_vocab: number of tokens of the tokenizer.
        seq_len: T of packed windows; None: the split contains documents.
        shard_tokens: tokens in a file; default: SHARD_TOKENS.
    """

    def __init__(
        self,
        folder: AnyPath,
        n_vocab: int,
        seq_len: int | None = None,
        shard_tokens: int | None = None,
    ):
        self.folder = folder
        self.seq_len = seq_len
        self.dtype = token_dtype(n_vocab)
        self._shard_tokens = shard_tokens or SHARD_TOKENS
        self.tokens = self.documents = self.bytes = 0
        self.example_tokens = self.trained_tokens = self.max_segments = 0  # of packed windows
        self.counts_V = np.zeros(n_vocab, np.int64)
        self._bit_arrays = ["starts"] if seq_len is None else ["starts", "trained"]
        self._hashes = [hashlib.sha256() for _ in ("tokens", *self._bit_arrays)]
        # Columns that no shard contains yet: tokens, and a bool for each token and bit array.
        self._pending = list[list[np.ndarray]]()
        self._pending_tokens = 0
        # The length is not known yet; `finish` writes it.
        opened = zarr_arrays.open_for_writing(folder, self._metadata(1 << 50))
        self._stores = [*opened.values()]
        self._writes = list[Any]()

    def _metadata(self, length: int) -> dict[str, dict[str, Any]]:
        chunk_tokens = min(CHUNK_TOKENS, self._shard_tokens)
        packed = self.seq_len is not None
        return split_metadata(length, self.dtype, self._shard_tokens, chunk_tokens, packed)

    def append(self, span: EncodedSpan) -> None:
        """Appends the tokens of a span; writes a shard after each `shard_tokens` tokens."""
        self.bytes += span.n_bytes
        self.documents += span.last
        starts = np.zeros(len(span.ids), bool)
        starts[:1] = span.first
        self._append(span.ids, starts)

    def append_window(self, window: PackedWindow) -> None:
        """Appends a window; writes a shard after each `shard_tokens` tokens."""
        self.bytes += window.n_bytes
        self.documents += window.n_examples
        self.example_tokens += window.n_tokens
        self.trained_tokens += int(window.trained_T.sum())
        self.max_segments = max(self.max_segments, int(window.starts_T.sum()))
        self._append(window.tokens_T, window.starts_T, window.trained_T)

    def _append(self, *columns: np.ndarray) -> None:
        self._pending.append([*columns])
        self._pending_tokens += len(columns[0])
        while self._pending_tokens >= self._shard_tokens:
            self._write(self._shard_tokens)

    def _write(self, n: int) -> None:
        """Writes `n` pending tokens; waits for the shard before, so that only one is in memory."""
        columns = [np.concatenate(parts) for parts in zip(*self._pending, strict=True)]
        tokens, *bits = (column[:n] for column in columns)
        # A begin token isn't counted: no position predicts it.
        predicted = ~bits[0] if self.seq_len is None else bits[1]
        self.counts_V += np.bincount(tokens[predicted], minlength=len(self.counts_V))
        arrays = [tokens.astype(self.dtype), *map(np.packbits, bits)]
        for content, array in zip(self._hashes, arrays, strict=True):
            content.update(array.data)
        for write in self._writes:
            write.result()
        first = self.tokens
        offsets = [first, *[first // 8] * len(bits)]
        self._writes = [
            store[offset : offset + len(array)].write(array)
            for store, offset, array in zip(self._stores, offsets, arrays, strict=True)
        ]
        self.tokens += n
        self._pending = [[column[n:] for column in columns]]
        self._pending_tokens -= n

    def finish(self) -> dict[str, Any]:
        """Writes the last shard and the metadata; returns the entry of the split in `meta.json`."""
        if self._pending_tokens:
            self._write(self._pending_tokens)
        for write in self._writes:
            write.result()
        metadata = zarr_arrays.metadata_files(self._metadata(self.tokens))
        write_many(self.folder, metadata)
        files = {f"{self.folder.name}/{n}": hash_bytes(data) for n, data in metadata.items()}
        packed = {"example_tokens": self.example_tokens, "trained_tokens": self.trained_tokens}
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "unigram_entropy": unigram_entropy(self.counts_V),
            "sha256": [content.hexdigest() for content in self._hashes],
            "files": files,
        } | (packed if self.seq_len else {})
