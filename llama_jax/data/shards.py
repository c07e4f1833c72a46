"""Token shards: the one module that writes and reads their format."""

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from llama_jax.config.validation import first_problem
from llama_jax.errors import InputError
from llama_jax.runtime.regular_file import open_regular, read_regular
from llama_jax.tokenizer.tokenizer import file_hash

# No JAX here: `llama-jax info` reads shards without.

SHARD_TOKENS = 1 << 27  # 256 MiB of uint16


class EncodedPiece(NamedTuple):
    """The token ids of a part of a document, and whether it is its first or its last part."""

    ids: np.ndarray
    n_bytes: int  # of the text
    split: str
    first: bool
    last: bool


class ArrayFile:
    """An .npy file of one dimension that is written bit by bit, as `np.save` would write it."""

    def __init__(self, path: Path, dtype: type[np.generic]):
        self.path = path
        self.length = 0
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")  # noqa: SIM115 (closed in close)
        self._write_header()

    def _write_header(self) -> None:
        # NumPy pads the header so that it has one size whatever the length.
        about = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        np.lib.format.write_array_header_1_0(self._file, about)

    def append(self, values: np.ndarray) -> None:
        """Writes more values."""
        self._file.write(values.astype(self._dtype).data)
        self.length += len(values)

    def close(self) -> None:
        """Writes the final length into the header and closes the file."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def drop(self) -> None:
        """Closes an unfinished file."""
        with contextlib.suppress(OSError):  # of a full disk, which was reported already
            self._file.close()


class SplitWriter:
    """Writes the tokens of a split, in files of SHARD_TOKENS."""

    def __init__(self, folder: Path, n_vocab: int):
        self.folder = folder
        self.dtype = np.uint16 if n_vocab <= 1 << 16 else np.uint32
        self.tokens = self.documents = self.bytes = 0
        self.counts = np.zeros(n_vocab, np.int64)
        self.shards: list[dict[str, Any]] = []
        folder.mkdir()
        self._open()

    def _open(self) -> None:
        number = len(self.shards)
        self._tokens = ArrayFile(self.folder / f"tokens-{number:05d}.npy", self.dtype)
        self._ends = ArrayFile(self.folder / f"ends-{number:05d}.npy", np.int64)

    def add(self, piece: EncodedPiece) -> None:
        """Appends the tokens of a piece, and begins a new file at SHARD_TOKENS."""
        ids = piece.ids
        self.counts += np.bincount(ids[piece.first :], minlength=len(self.counts))
        self.bytes += piece.n_bytes
        self.tokens += len(ids)
        while self._tokens.length + len(ids) >= SHARD_TOKENS:
            room = SHARD_TOKENS - self._tokens.length
            self._tokens.append(ids[:room])
            ids = ids[room:]
            self.finish()
            self._open()
        self._tokens.append(ids)
        if piece.last:
            self.documents += 1
            self._ends.append(np.array([self.tokens]))

    def finish(self) -> None:
        """Completes the files that are open."""
        files = (self._tokens, self._ends)
        for file in files:
            file.close()
        hashes = {file.path.name: file_hash(file.path) for file in files}
        tokens, documents = (file.length for file in files)
        self.shards.append({"tokens": tokens, "documents": documents, "sha256": hashes})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tokens.drop()
        self._ends.drop()

    def summary(self) -> dict[str, Any]:
        """Returns the entry of the split in `meta.json`."""
        share = self.counts[self.counts > 0] / max(1, self.counts.sum())
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            # Nats per token: the best that a model without any context could reach on this split.
            "unigram_entropy": math.fsum(-share * np.log(share)),
            "shards": self.shards,
        }


class Tokens:
    """One split of a folder of token shards, memory-mapped and read as one long stream."""

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.summary = self.meta["splits"][split]
        shards = self.summary["shards"]
        self._tokens = [
            self._open(split, f"tokens-{i:05d}.npy", shard["tokens"])
            for i, shard in enumerate(shards)
        ]
        self._ends = [
            self._open(split, f"ends-{i:05d}.npy", shard["documents"])
            for i, shard in enumerate(shards)
        ]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._tokens)])

    def _open(self, split: str, name: str, length: int) -> np.ndarray:
        path = self.folder / split / name
        try:
            open_regular(path).close()
            # An empty file can't be mapped.
            array = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, InputError):
                raise
            reason = "is missing" if not path.exists() else "is damaged or cut short"
            raise InputError(f"{path} {reason}: make the folder again with `tokenize`") from error
        if len(array) != length:
            raise InputError(
                f"{path} holds {len(array):,} entries, but meta.json says {length:,}: make the"
                " folder again with `tokenize`"
            )
        return array

    def __len__(self) -> int:
        return int(self._starts[-1])

    def content_hash(self) -> str:
        """Returns a SHA-256 over those of all shards, in hexadecimal."""
        hashes = [shard["sha256"] for shard in self.summary["shards"]]
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens [start, stop) as int32, and where documents start inside of them."""
        first, last = np.searchsorted(self._starts, (start, stop - 1), side="right") - 1
        tokens, ends = [], []
        for i in range(first, last + 1):
            base = self._starts[i]
            tokens.append(self._tokens[i][max(0, start - base) : stop - base])
            low, high = np.searchsorted(self._ends[i], (start, stop), side="left")
            ends.append(self._ends[i][low:high])
        return np.concatenate(tokens).astype(np.int32), np.concatenate(ends) - start


@dataclass
class _Shard:
    tokens: NonNegativeInt
    documents: NonNegativeInt
    sha256: dict[str, str]  # of each file


@dataclass
class _Split:
    tokens: NonNegativeInt
    documents: NonNegativeInt
    bytes: NonNegativeInt
    unigram_entropy: float
    shards: list[_Shard]


@dataclass
class _Splits:
    train: _Split
    validation: _Split


@dataclass
class _Meta:
    """What must be in a meta.json."""

    sources: list[str]
    tokenizer_sha256: str
    n_vocab: PositiveInt
    splits: _Splits


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns the `meta.json` of a folder of token shards.

    Raises:
        InputError: it is missing or not of this program.
    """
    try:
        meta = json.loads(read_regular(folder / "meta.json"))
        if meta["format"] == 1:
            TypeAdapter(_Meta).validate_python(meta)
            return meta
        problem = f"has the unknown format {str(meta['format'])[:80]!a}"
    except FileNotFoundError:
        problem = "has no meta.json"
    except ValidationError as error:
        problem = f"has a damaged meta.json ({first_problem(error).sentence()})"
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = "has a damaged meta.json"
    raise InputError(f"{folder} {problem}: make a folder of token shards with `llama-jax tokenize`")
