"""Batches as a pure function of the step.

A sample is a window of T+1 tokens at a fixed place of the token stream. Which windows make up the
global batch of a step follows from the seed and the step alone, so nothing but the step has to be
saved, and any number of hosts reads the very same batches.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter

from llama_jax.config import DataConfig
from llama_jax.errors import InputError
from llama_jax.regular_file import open_regular, read_regular

# JAX and Grain are imported by what uses them: `llama-jax info` reads shards without.


class Batch(NamedTuple):
    """Rows of tokens and what is to be predicted, int32 [B, T]; micro-batches add a leading A.

    From NumPy arrays, two rows of one text each, for a step of one micro-batch:

    >>> rows = np.array([[tokenizer.encode("to be or not to be, that is", bos=True)[:9]] * 2])
    >>> positions = np.broadcast_to(np.arange(8), (1, 2, 8))
    >>> batch = lj.Batch(rows[..., :-1], rows[..., 1:], positions, segments=None)
    >>> batch.targets.shape
    (1, 2, 8)
    """

    tokens: Any
    targets: Any  # the next token, or -1 where no loss is taken
    positions: Any  # place in the document, counted from where the window shows it
    segments: Any  # number of the document in the window, from 1; None: all is one text


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
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = "has a damaged meta.json"
    raise InputError(f"{folder} {problem}: make a folder of token shards with `llama-jax tokenize`")


class Windows:
    """Random access to the windows of T+1 tokens of a stream; each overlaps the next by one."""

    def __init__(self, tokens: Tokens, config: DataConfig):
        self.tokens = tokens
        self.length = config.seq_len
        self.isolate = config.isolate_documents
        self.count = max(0, len(tokens) - 1) // self.length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Batch:
        """Returns window `index` as a Batch whose arrays are [T]."""
        T = self.length
        start = int(index) * T
        tokens, starts = self.tokens.read(start, start + T + 1)
        positions = np.arange(T + 1, dtype=np.int32)
        segments = np.ones(T + 1, np.int32)
        if self.isolate:
            at = starts[(starts > 0) & (starts <= T)]
            begins = np.zeros(T + 1, np.int32)
            begins[at] = 1
            segments += np.cumsum(begins, dtype=np.int32)
            positions -= np.maximum.accumulate(positions * begins)
        same = segments[1:] == segments[:-1]
        targets = np.where(same, tokens[1:], -1).astype(np.int32)
        return Batch(tokens[:-1], targets, positions[:-1], segments[:-1])


class Batches:
    """The batches of a run: `train(step)` and `validation(i)`, placed on the current mesh."""

    def __init__(self, config: DataConfig, micro_batches: int = 1):
        import grain

        self.config = config
        self.micro_batches = micro_batches
        folders = list(config.mixture)
        self.splits = {
            split: [Tokens(folder, split) for folder in folders]
            for split in ("train", "validation")
        }
        windows = [Windows(tokens, config) for tokens in self.splits["train"]]
        for folder, source in zip(folders, windows, strict=True):
            if not len(source):
                raise InputError(
                    f"{folder} holds {len(source.tokens):,} training tokens, fewer than one window"
                    f" of data.seq_len + 1 = {config.seq_len + 1:,}: add text or shorten seq_len"
                )
        # Seeds differ, or equally long sources would be read in the same order.
        shuffled = [
            grain.MapDataset.source(source).seed(config.seed + i).shuffle().repeat()
            for i, source in enumerate(windows)
        ]
        self._train = (
            shuffled[0]
            if len(shuffled) == 1
            else grain.MapDataset.mix(shuffled, list(config.mixture.values()))
        )
        self._held_out = [Windows(tokens, config) for tokens in self.splits["validation"]]

    @property
    def fingerprint(self) -> list[str]:
        """What identifies the data: each folder's weight, tokenizer and shards, by their hashes."""
        return [
            f"{weight:g}:{tokens.meta['tokenizer_sha256'][:16]}:{tokens.content_hash()[:16]}"
            for weight, tokens in zip(
                self.config.mixture.values(), self.splits["train"], strict=True
            )
        ]

    @property
    def unigram_entropy(self) -> float | None:
        """That of the held-out text [nats per token], where there is any."""
        splits = [tokens.summary for tokens in self.splits["validation"] if len(tokens)]
        counted = sum(split["tokens"] for split in splits)
        weighted = sum(split["tokens"] * split["unigram_entropy"] for split in splits)
        return weighted / counted if counted else None

    def train(self, step: int) -> Batch:
        """Returns the batch of step `step` (0 is the first): arrays [A, B, T], B of a micro-batch.

        Row r of micro-batch a is sample a·B + r of the step, so micro-batches read in turn are
        the unsplit batch.
        """
        first = step * self.config.batch_size
        return self._place(lambda row: cast(Batch, self._train[first + row]))

    def validation(self, index: int, batches: int) -> Batch:
        """Returns held-out batch `index` of `batches`, shaped like a training batch.

        Together they hold windows evenly spread over the held-out text, each at most once. Rows
        past the last window count for nothing.
        """
        windows = sum(len(source) for source in self._held_out)
        rows = min(batches * self.config.batch_size, windows)
        first = index * self.config.batch_size

        def read(row: int) -> Batch:
            if first + row < rows:
                i = (first + row) * windows // rows
                for source in self._held_out:
                    if i < len(source):
                        return source[i]
                    i -= len(source)
            blank = np.zeros(self.config.seq_len, np.int32)
            return Batch(blank, blank - 1, blank, blank)

        return self._place(read)

    def validation_batches(self, most: int) -> int:
        """Returns how many held-out batches there are, at most `most`."""
        windows = sum(len(source) for source in self._held_out)
        return min(most, -(-windows // self.config.batch_size))

    def _place(self, read: Callable[[int], Batch]) -> Batch:
        """Builds global arrays of which this process reads the rows of its own devices."""
        import jax

        from llama_jax.sharding import act

        A = self.micro_batches
        B, T = self.config.batch_size // A, self.config.seq_len
        read = cache(read)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), act("ABT"))

        def field(number: int) -> Any:
            def part(index: Any) -> np.ndarray:
                a, b, t = (range(*i.indices(n)) for i, n in zip(index, (A, B, T), strict=True))
                rows = [[read(i * B + j)[number][t.start : t.stop] for j in b] for i in a]
                return np.array(rows)

            return jax.make_array_from_callback((A, B, T), sharding, part)

        placed = Batch(*(field(i) for i in range(len(Batch._fields))))
        # Attention that need not compare segments is faster.
        return placed if self.config.isolate_documents else placed._replace(segments=None)
