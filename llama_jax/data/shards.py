"""Token shards: the only module that writes or reads their format.

A folder of token shards contains `meta.json`, the tokenizer and one folder for each split. A split
folder contains, for each shard, `tokens-NNNNN.npy` (the documents one after another) and
`ends-NNNNN.npy` (the end of each document, as a position in the split).
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from llama_jax.config.validation import first_problem
from llama_jax.errors import InputError
from llama_jax.runtime.regular_file import open_regular, read_regular
from llama_jax.tokenizer.tokenizer import file_hash

# This module doesn't import JAX: `llama-jax info` reads shards without it.

SHARD_TOKENS = 1 << 27  # 256 MiB of uint16
_FORMAT = 1
_META = "meta.json"


def _tokens_name(shard: int) -> str:
    return f"tokens-{shard:05d}.npy"


def _ends_name(shard: int) -> str:
    return f"ends-{shard:05d}.npy"


class EncodedSpan(NamedTuple):
    """The token ids of a span of a document."""

    ids: np.ndarray
    n_bytes: int  # of the span's UTF-8 text
    split: str
    first: bool  # whether the document starts with this span
    last: bool  # whether the document ends with this span


class NpyWriter:
    """Writes a one-dimensional .npy file in several steps, byte for byte as `np.save` does."""

    def __init__(self, path: Path, dtype: type[np.generic]):
        self.path = path
        self.length = 0
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")  # noqa: SIM115 (closed in close)
        self._write_header()

    def _write_header(self) -> None:
        # NumPy pads the header, so its size doesn't depend on the length.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        """Writes more values."""
        self._file.write(values.astype(self._dtype).data)
        self.length += len(values)

    def close(self) -> None:
        """Writes the final length into the header and closes the file."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def discard(self) -> None:
        """Closes an unfinished file."""
        with contextlib.suppress(OSError):  # the error of a full disk was already reported
            self._file.close()


class SplitWriter:
    """Writes the tokens of one split, in shards of SHARD_TOKENS tokens."""

    def __init__(self, folder: Path, n_vocab: int):
        self.folder = folder
        self.dtype = np.uint16 if n_vocab <= 1 << 16 else np.uint32
        self.tokens = self.documents = self.bytes = 0
        self.counts_V = np.zeros(n_vocab, np.int64)
        self.shards: list[dict[str, Any]] = []
        folder.mkdir()
        self._open_shard()

    def _open_shard(self) -> None:
        shard = len(self.shards)
        self._tokens = NpyWriter(self.folder / _tokens_name(shard), self.dtype)
        self._ends = NpyWriter(self.folder / _ends_name(shard), np.int64)

    def append(self, span: EncodedSpan) -> None:
        """Appends the tokens of a span; opens a new shard after each SHARD_TOKENS tokens."""
        ids = span.ids
        # The begin token isn't counted: no position predicts it.
        self.counts_V += np.bincount(ids[span.first :], minlength=len(self.counts_V))
        self.bytes += span.n_bytes
        self.tokens += len(ids)
        while self._tokens.length + len(ids) >= SHARD_TOKENS:
            room = SHARD_TOKENS - self._tokens.length
            self._tokens.append(ids[:room])
            ids = ids[room:]
            self.finish_shard()
            self._open_shard()
        self._tokens.append(ids)
        if span.last:
            self.documents += 1
            self._ends.append(np.array([self.tokens]))

    def finish_shard(self) -> None:
        """Completes the files of the current shard."""
        files = (self._tokens, self._ends)
        for file in files:
            file.close()
        hashes = {file.path.name: file_hash(file.path) for file in files}
        tokens, documents = (file.length for file in files)
        self.shards.append({"tokens": tokens, "documents": documents, "sha256": hashes})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tokens.discard()
        self._ends.discard()

    def summary(self) -> dict[str, Any]:
        """Returns the entry of the split in `meta.json`."""
        share = self.counts_V[self.counts_V > 0] / max(1, self.counts_V.sum())
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            # Nats per token: the best loss on this split for a model without context.
            "unigram_entropy": math.fsum(-share * np.log(share)),
            "shards": self.shards,
        }


class TokenStream:
    """One split of a folder of token shards, memory-mapped and read as one long stream."""

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.summary = self.meta["splits"][split]
        shards = self.summary["shards"]
        self._tokens = [
            self._map(split, _tokens_name(i), shard["tokens"]) for i, shard in enumerate(shards)
        ]
        self._ends = [
            self._map(split, _ends_name(i), shard["documents"]) for i, shard in enumerate(shards)
        ]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._tokens)])

    def _map(self, split: str, name: str, length: int) -> np.ndarray:
        path = self.folder / split / name
        try:
            open_regular(path).close()
            # An empty file can't be memory-mapped.
            array = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, InputError):
                raise
            problem = "is missing" if not path.exists() else "is damaged or truncated"
            raise InputError(
                f"{path} {problem}: create the folder again with `tokenize`"
            ) from error
        if len(array) != length:
            raise InputError(
                f"{path} contains {len(array):,} entries, but meta.json lists {length:,}: create"
                " the folder again with `tokenize`"
            )
        return array

    def __len__(self) -> int:
        return int(self._starts[-1])

    def content_hash(self) -> str:
        """Returns a SHA-256 over the hashes of all shards, in hexadecimal."""
        hashes = [shard["sha256"] for shard in self.summary["shards"]]
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens [start, stop) and the starts of documents among them.

        Both are integer arrays; the tokens are int32, and the starts are relative to `start`.
        """
        first, last = np.searchsorted(self._starts, (start, stop - 1), side="right") - 1
        tokens, ends = [], []
        for i in range(first, last + 1):
            base = self._starts[i]
            tokens.append(self._tokens[i][max(0, start - base) : stop - base])
            low, high = np.searchsorted(self._ends[i], (start, stop), side="left")
            ends.append(self._ends[i][low:high])
        return np.concatenate(tokens).astype(np.int32), np.concatenate(ends) - start


@dataclass
class _ShardEntry:
    tokens: NonNegativeInt
    documents: NonNegativeInt
    sha256: dict[str, str]  # by file name


@dataclass
class _SplitEntry:
    tokens: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt
    unigram_entropy: float
    shards: list[_ShardEntry]


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
    splits: _SplitEntries


def write_meta(
    folder: Path,
    *,
    sources: Sequence[str],
    tokenizer: Path,
    n_vocab: int,
    writers: Mapping[str, SplitWriter],
) -> dict[str, Any]:
    """Writes the `meta.json` of a folder whose shards are complete, and returns its content.

    Args:
        folder: contains the shards.
        sources: the corpus, as the user named it.
        tokenizer: file of the tokenizer that encoded the corpus.
        n_vocab: number of its tokens.
        writers: by split; each has finished its last shard.
    """
    meta = {
        "format": _FORMAT,
        "sources": list(sources),
        "tokenizer_sha256": file_hash(tokenizer),
        "n_vocab": n_vocab,
        "dtype": np.dtype(writers["train"].dtype).name,
        "splits": {split: writer.summary() for split, writer in writers.items()},
    }
    (folder / _META).write_text(json.dumps(meta, indent=1))
    return meta


def is_token_folder(folder: Path) -> bool:
    """Returns whether a folder contains the `meta.json` of token shards."""
    return (folder / _META).exists()


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns the `meta.json` of a folder of token shards.

    Raises:
        InputError: the file is missing or damaged, or has another format.
    """
    try:
        meta = json.loads(read_regular(folder / _META))
        if meta["format"] == _FORMAT:
            TypeAdapter(_Meta).validate_python(meta)
            return meta
        problem = f"has the unknown format {str(meta['format'])[:80]!a}"
    except FileNotFoundError:
        problem = "has no meta.json"
    except ValidationError as error:
        problem = f"has a damaged meta.json ({first_problem(error).sentence()})"
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = "has a damaged meta.json"
    raise InputError(
        f"{folder} {problem}: create a folder of token shards with `llama-jax tokenize`"
    )
