"""Token shards: this module and `shard_writer` alone know their format.

A folder of token shards contains `meta.json`, which is written last, the tokenizer and one folder
for each split. A split folder contains two zarr arrays: `tokens`, the documents one after another,
and `starts`, one bit per token, set where a document starts. Each is stored in shards, of which a
reader fetches chunks by byte ranges, from a disk or a bucket. Every chunk has a checksum (CRC-32C).

The tokens of `chats` and `preferences` are windows of exactly `seq_len` tokens, packed when they
were written: `starts` marks the segments, and a third array, `trained`, the tokens that the model
learns to predict. A segment is an example, one side of a preference, or the padding of a window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from llama_jax.config.validation import first_problem
from llama_jax.data import shard_writer
from llama_jax.data.shard_writer import SplitWriter, token_dtype
from llama_jax.errors import InputError
from llama_jax.runtime import zarr_arrays
from llama_jax.runtime.bucket_path import await_request
from llama_jax.runtime.damage import Damaged, classify_errors
from llama_jax.runtime.manifest import check_files, hash_bytes, read_manifest, write_manifest
from llama_jax.runtime.storage import AnyPath, parse_path
from llama_jax.tokenizer.tokenizer import file_hash, load_tokenizer

# This module doesn't import JAX: `llama-jax info` reads shards without it.

Kind = Literal["text", "chats", "preferences"]

# A reader that knows only text would train on every token of chats: they have another format.
_FORMATS = {"text": 2, "chats": 3, "preferences": 3}
_META = "meta.json"


class TokenStream:
    """One split of a folder of token shards, read as one long stream."""

    def __init__(self, folder: str | AnyPath, split: str):
        self.folder = parse_path(folder)
        self.split = split
        self.meta = read_meta(self.folder)
        self.kind: Kind = self.meta["kind"]
        self.summary = self.meta["splits"][split]
        self._names = ["tokens", "starts", *(["trained"] if self.kind != "text" else [])]
        with classify_errors(self.folder):
            check_files(self.folder, self.meta["files"] | self.summary["files"])
            self._check_shards()
            folder = self.folder / split
            opened = zarr_arrays.open_for_reading(folder, self._names, cached=True)
            self._arrays = [*opened.values()]

    def _check_shards(self) -> None:
        """Checks that no shard is missing. Its content is checked when it is read."""
        for name in self._names:
            folder = self.folder / self.split / name / "c"
            found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            for shard in range(-(-len(self) // self.meta["shard_tokens"])):
                if str(shard) not in found:
                    raise Damaged(self.folder, f"{self.split}/{name}/c/{shard} is missing")

    def __len__(self) -> int:
        return self.summary["tokens"]

    def content_hash(self) -> str:
        """Returns a SHA-256 over the content of all arrays, in hexadecimal."""
        return hash_bytes("".join(self.summary["sha256"]).encode())

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens [start, stop) and the starts of documents among them.

        Both are integer arrays; the tokens are int32, and the starts are relative to `start`.

        Raises:
            Damaged: a chunk is missing, or its checksum differs.
            Fault: the machine could not read it.
        """
        tokens, starts = self._read(start, stop, 2)
        return tokens, np.flatnonzero(starts)

    def read_window(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns packed window `index`: tokens int32 [T], starts and trained bool [T].

        Raises:
            Damaged: a chunk is missing, or its checksum differs.
            Fault: the machine could not read it.
        """
        T = self.meta["seq_len"]
        tokens, starts, trained = self._read(index * T, (index + 1) * T, 3)
        return tokens, starts, trained

    def _read(self, start: int, stop: int, n_arrays: int) -> list[np.ndarray]:
        """Returns a range of the first arrays: tokens in int32, the others a bool per token."""
        first = start // 8
        tokens, *bits = self._arrays[:n_arrays]
        with classify_errors(self.folder):
            reads = [
                tokens[start:stop].read(),
                *(array[first : -(-stop // 8)].read() for array in bits),
            ]
            ids, *packed = (await_request(read, self.folder).result() for read in reads)
        bools = (np.unpackbits(array)[start - 8 * first :][: stop - start] for array in packed)
        return [ids.astype(np.int32), *(array.astype(bool) for array in bools)]


@dataclass
class _SplitEntry:
    tokens: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt
    unigram_entropy: float
    sha256: list[str]  # of the content of each array
    files: dict[str, str]  # SHA-256 by name


@dataclass
class _SplitEntries:
    train: _SplitEntry
    validation: _SplitEntry


@dataclass
class _SharedMeta:
    """The required fields of every meta.json."""

    kind: Kind
    sources: list[str]
    tokenizer_sha256: str
    n_vocab: PositiveInt
    shard_tokens: PositiveInt
    files: dict[str, str]  # of the tokenizer; SHA-256 by name


@dataclass
class _TextMeta(_SharedMeta):
    splits: _SplitEntries


@dataclass
class _PackedEntry(_SplitEntry):
    example_tokens: NonNegativeInt  # without padding
    trained_tokens: NonNegativeInt


@dataclass
class _PackedEntries:
    train: _PackedEntry
    validation: _PackedEntry


@dataclass
class _PackedMeta(_SharedMeta):
    """The required fields of a meta.json of chats or preferences."""

    seq_len: PositiveInt  # T of a window
    max_segments: PositiveInt  # in a window, with padding
    splits: _PackedEntries


def write_meta(
    folder: AnyPath,
    *,
    sources: Sequence[str],
    tokenizer: AnyPath,
    n_vocab: int,
    writers: Mapping[str, SplitWriter],
    kind: Kind = "text",
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Finishes all splits, writes the `meta.json` of their folder, and returns its content.

    Args:
        folder: contains the shards.
        sources: the corpus, as the user named it.
        tokenizer: file of the tokenizer that encoded the corpus.
        n_vocab: number of its tokens.
        writers: by split.
        kind: of the data.
        details: more fields of the `meta.json`.
    """
    splits = {split: writer.finish() for split, writer in writers.items()}
    more = dict(details or {})
    if kind != "text":
        more["seq_len"] = writers["train"].seq_len
        more["max_segments"] = max(writer.max_segments for writer in writers.values())
    return write_meta_of_splits(
        folder, sources=sources, tokenizer=tokenizer, n_vocab=n_vocab, splits=splits, kind=kind,
        shard_tokens=shard_writer.SHARD_TOKENS, details=more,
    )  # fmt: skip


def write_meta_of_splits(
    folder: AnyPath,
    *,
    sources: Sequence[str],
    tokenizer: AnyPath,
    n_vocab: int,
    splits: Mapping[str, Mapping[str, Any]],
    shard_tokens: int,
    kind: Kind = "text",
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the `meta.json` of a folder whose arrays are written, and returns its content.

    Args:
        splits: entries of the splits, by name.
        shard_tokens: tokens in a file.

    The other arguments are those of `write_meta`.
    """
    meta: dict[str, Any] = {
        "format": _FORMATS[kind],
        "kind": kind,
        "sources": list(sources),
        "tokenizer_sha256": file_hash(tokenizer),
        "n_vocab": n_vocab,
        "dtype": token_dtype(n_vocab),
        "shard_tokens": shard_tokens,
        "files": {n: hash_bytes(data) for n, data in load_tokenizer(folder).files.items()},
        "splits": dict(splits),
        **details,
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
    elif meta.get("format") != _FORMATS.get(str(meta.setdefault("kind", "text"))):
        problem = f"has the unknown format {str(meta.get('format'))[:80]!a}"
    else:
        try:
            required = _TextMeta if meta["kind"] == "text" else _PackedMeta
            TypeAdapter(required).validate_python(meta)
            return meta
        except ValidationError as error:
            problem = f"has a damaged meta.json ({first_problem(error).sentence()})"
    raise InputError(
        f"{folder} {problem}: create a folder of token shards with `llama-jax tokenize`"
    )
