"""Token shards: the only module that writes or reads their format.

A folder of token shards contains `meta.json`, which is written last, the tokenizer and one folder
for each split. A split folder contains two zarr arrays: `tokens`, the documents one after another,
and `starts`, one bit per token, set where a document starts. Each is stored in shards, of which a
reader fetches chunks by byte ranges, from a disk or a bucket. Every chunk has a checksum (CRC-32C).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from llama_jax.config.validation import first_problem
from llama_jax.errors import InputError
from llama_jax.runtime import storage
from llama_jax.runtime.damage import Damaged, classify_errors
from llama_jax.runtime.manifest import check_files, hash_bytes, read_manifest, write_manifest
from llama_jax.runtime.storage import AnyPath, parse_path, write_file
from llama_jax.tokenizer.tokenizer import file_hash, load_tokenizer

# This module doesn't import JAX: `llama-jax info` reads shards without it.

SHARD_TOKENS = 1 << 25  # 64 MiB of uint16, in the memory of the writer
CHUNK_TOKENS = 1 << 15  # 64 KiB of uint16; a window of 2,048 tokens is in one or two chunks
_FORMAT = 2
_META = "meta.json"


class EncodedSpan(NamedTuple):
    """The token ids of a span of a document."""

    ids: np.ndarray
    n_bytes: int  # of the span's UTF-8 text
    split: str
    first: bool  # whether the document starts with this span
    last: bool  # whether the document ends with this span


def _zarr(length: int, shard: int, chunk: int, dtype: str) -> dict[str, Any]:
    """Returns the metadata of a one-dimensional array in zarr's version 3."""

    def grid(size: int) -> dict[str, Any]:
        return {"name": "regular", "configuration": {"chunk_shape": [size]}}

    checked = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": [chunk], "codecs": checked, "index_codecs": checked},
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [length],
        "data_type": dtype,
        "chunk_grid": grid(shard),
        "chunk_key_encoding": {"name": "default"},
        "codecs": [sharding],
        "fill_value": 0,
    }


def _array_metadata(length: int, dtype: str) -> dict[str, dict[str, Any]]:
    """Returns the metadata of both arrays of a split with `length` tokens."""
    return {
        "tokens": _zarr(length, SHARD_TOKENS, CHUNK_TOKENS, dtype),
        "starts": _zarr(-(-length // 8), SHARD_TOKENS // 8, CHUNK_TOKENS // 8, "uint8"),
    }


class SplitWriter:
    """Writes the tokens of one split, shard by shard."""

    def __init__(self, folder: AnyPath, n_vocab: int):
        import tensorstore as ts

        self.folder = folder
        self.dtype = "uint16" if n_vocab <= 1 << 16 else "uint32"
        self.tokens = self.documents = self.bytes = 0
        self.counts_V = np.zeros(n_vocab, np.int64)
        self._hashes = hashlib.sha256(), hashlib.sha256()  # of the tokens and the starts
        self._pending = list[EncodedSpan]()  # spans that no shard contains yet
        self._pending_tokens = 0
        # The length is not known yet; `finish` writes it.
        self._stores = {
            name: ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": storage.kvstore_spec(folder / name),
                    "metadata": metadata,
                    "store_data_equal_to_fill_value": True,
                },
                open=True,
                assume_metadata=True,
                context=storage.context(),
            ).result()
            for name, metadata in _array_metadata(1 << 50, self.dtype).items()
        }
        self._writes = list[Any]()

    def append(self, span: EncodedSpan) -> None:
        """Appends the tokens of a span; writes a shard after each SHARD_TOKENS tokens."""
        # The begin token isn't counted: no position predicts it.
        self.counts_V += np.bincount(span.ids[span.first :], minlength=len(self.counts_V))
        self.bytes += span.n_bytes
        self.documents += span.last
        self._pending.append(span)
        self._pending_tokens += len(span.ids)
        while self._pending_tokens >= SHARD_TOKENS:
            self._write(SHARD_TOKENS)

    def _write(self, n: int) -> None:
        """Writes `n` pending tokens; waits for the shard before, so that one is in memory."""
        ids = np.concatenate([span.ids for span in self._pending])
        lengths = [len(span.ids) for span in self._pending]
        at = np.cumsum([0, *lengths[:-1]])
        starts = np.zeros(len(ids), bool)
        starts[at[[bool(span.first and len(span.ids)) for span in self._pending]]] = True
        rest, rest_starts = ids[n:], starts[n:]
        tokens, bits = ids[:n].astype(self.dtype), np.packbits(starts[:n])
        for content, array in zip(self._hashes, (tokens, bits), strict=True):
            content.update(array.data)
        for write in self._writes:
            write.result()
        first = self.tokens
        self._writes = [
            self._stores["tokens"][first : first + n].write(tokens),
            self._stores["starts"][first // 8 : first // 8 + len(bits)].write(bits),
        ]
        self.tokens += n
        self._pending_tokens = len(rest)
        # A rest is part of one span: the shards end as soon as they are full.
        self._pending = [EncodedSpan(rest, 0, "", bool(rest_starts[:1].any()), False)]

    def finish(self) -> dict[str, Any]:
        """Writes the last shard and the metadata; returns the entry of the split in `meta.json`."""
        if self._pending_tokens:
            self._write(self._pending_tokens)
        for write in self._writes:
            write.result()
        files = dict[str, str]()
        for name, metadata in _array_metadata(self.tokens, self.dtype).items():
            data = json.dumps(metadata).encode()
            write_file(self.folder / name / "zarr.json", data)
            files[f"{self.folder.name}/{name}/zarr.json"] = hash_bytes(data)
        share = self.counts_V[self.counts_V > 0] / max(1, self.counts_V.sum())
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            # Nats per token: the best loss on this split for a model without context.
            "unigram_entropy": math.fsum(-share * np.log(share)),
            "sha256": [content.hexdigest() for content in self._hashes],
            "files": files,
        }


class TokenStream:
    """One split of a folder of token shards, read as one long stream."""

    def __init__(self, folder: str | AnyPath, split: str):
        import tensorstore as ts

        self.folder = parse_path(folder)
        self.split = split
        self.meta = read_meta(self.folder)
        self.summary = self.meta["splits"][split]
        with classify_errors(self.folder):
            check_files(self.folder, self.meta["files"] | self.summary["files"])
            self._check_shards()
            opening = [
                ts.open(
                    {
                        "driver": "zarr3",
                        "kvstore": storage.kvstore_spec(self.folder / split / name),
                        "fill_missing_data_reads": False,
                        "cache_pool": "cache_pool#tokens",  # for the index of each shard
                        "recheck_cached_data": False,
                        "recheck_cached_metadata": False,
                    },
                    read=True,
                    context=storage.context(),
                )
                for name in ("tokens", "starts")
            ]
            self._tokens, self._starts = (array.result() for array in opening)

    def _check_shards(self) -> None:
        """Checks that no shard is missing. Its content is checked when it is read."""
        for name in ("tokens", "starts"):
            folder = self.folder / self.split / name / "c"
            found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            for shard in range(-(-len(self) // self.meta["shard_tokens"])):
                if str(shard) not in found:
                    raise Damaged(self.folder, f"{self.split}/{name}/c/{shard} is missing")

    def __len__(self) -> int:
        return self.summary["tokens"]

    def content_hash(self) -> str:
        """Returns a SHA-256 over the tokens and the starts of documents, in hexadecimal."""
        return hash_bytes("".join(self.summary["sha256"]).encode())

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens [start, stop) and the starts of documents among them.

        Both are integer arrays; the tokens are int32, and the starts are relative to `start`.

        Raises:
            Damaged: a chunk is missing, or its checksum differs.
            Fault: the machine could not read it.
        """
        first = start // 8
        with classify_errors(self.folder):
            reads = (self._tokens[start:stop].read(), self._starts[first : -(-stop // 8)].read())
            tokens, bits = (read.result() for read in reads)
        starts = np.unpackbits(bits)[start - 8 * first :][: stop - start]
        return tokens.astype(np.int32), np.flatnonzero(starts)


@dataclass
class _SplitEntry:
    tokens: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt
    unigram_entropy: float
    sha256: list[str]  # of the tokens and the starts
    files: dict[str, str]  # SHA-256 by name


@dataclass
class _SplitEntries:
    train: _SplitEntry
    validation: _SplitEntry


@dataclass
class _Meta:
    """The required fields of a meta.json."""

    sources: list[str]
    tokenizer_sha256: str
    n_vocab: PositiveInt
    shard_tokens: PositiveInt
    files: dict[str, str]  # of the tokenizer; SHA-256 by name
    splits: _SplitEntries


def write_meta(
    folder: AnyPath,
    *,
    sources: Sequence[str],
    tokenizer: AnyPath,
    n_vocab: int,
    writers: Mapping[str, SplitWriter],
) -> dict[str, Any]:
    """Finishes all splits, writes the `meta.json` of their folder, and returns its content.

    Args:
        folder: contains the shards.
        sources: the corpus, as the user named it.
        tokenizer: file of the tokenizer that encoded the corpus.
        n_vocab: number of its tokens.
        writers: by split.
    """
    meta = {
        "format": _FORMAT,
        "sources": list(sources),
        "tokenizer_sha256": file_hash(tokenizer),
        "n_vocab": n_vocab,
        "dtype": writers["train"].dtype,
        "shard_tokens": SHARD_TOKENS,
        "files": {n: hash_bytes(data) for n, data in load_tokenizer(folder).files.items()},
        "splits": {split: writer.finish() for split, writer in writers.items()},
    }
    write_manifest(folder, meta, _META)
    return meta


def is_token_folder(folder: AnyPath) -> bool:
    """Returns whether a folder contains the `meta.json` of token shards."""
    return (folder / _META).exists()


def read_meta(folder: AnyPath) -> dict[str, Any]:
    """Returns the `meta.json` of a folder of token shards.

    Raises:
        InputError: the file is missing or damaged, or has another format.
    """
    with classify_errors(folder):
        meta = read_manifest(folder, _META)
    if meta is None:
        problem = "has no meta.json"
    elif meta.get("format") != _FORMAT:
        problem = f"has the unknown format {str(meta.get('format'))[:80]!a}"
    else:
        try:
            TypeAdapter(_Meta).validate_python(meta)
            return meta
        except ValidationError as error:
            problem = f"has a damaged meta.json ({first_problem(error).sentence()})"
    raise InputError(
        f"{folder} {problem}: create a folder of token shards with `llama-jax tokenize`"
    )
