"""Batches as a pure function of the step.

A sample is a window at a fixed position of the token stream of its source. The seed and the step
alone determine the windows of a step's global batch. So the step is the only state to save, and any
number of hosts reads the same batches.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config.run import DataConfig
from llama_jax.data.mixture import Draw, Mixture, open_schedule
from llama_jax.data.shards import TokenStream
from llama_jax.data.windows import Batch, open_windows, shuffle
from llama_jax.errors import InputError

AHEAD = 4  # batches that are being read: from this step's to the third after it
READERS = 64  # rows that are read at the same time; a bucket takes 50 ms for each


class Location(NamedTuple):
    """Where a sample is."""

    tokens: TokenStream
    epoch: int  # of its source, from 0
    window: int  # index in its source
    windows: int  # of its source


class Batches:
    """The batches of a run: `train(step)` and `validation(i)`, sharded over the current mesh.

    Args:
        config: the data.
        micro_batches: number of micro-batches in a batch.
        steps: of the run; no later batch is read ahead. Default: without end.
    """

    def __init__(self, config: DataConfig, micro_batches: int = 1, steps: int | None = None):
        self.config = config
        self.micro_batches = micro_batches
        self.steps = sys.maxsize if steps is None else steps
        folders = config.folders
        self.splits = {
            split: [TokenStream(folder, split) for folder in folders]
            for split in ("train", "validation")
        }
        windows = [open_windows(tokens, config) for tokens in self.splits["train"]]
        for folder, source in zip(folders, windows, strict=True):
            if not len(source):
                raise InputError(
                    f"{folder} contains {len(source.tokens):,} training tokens, fewer than one"
                    f" window of data.seq_len + 1 = {config.seq_len + 1:,}: add text or"
                    " shorten seq_len"
                )
        self.schedule = open_schedule(config)
        self._windows = windows
        # With the same seed, sources of equal length would be read in the same order.
        self._orders = [shuffle(len(source), config.seed + i) for i, source in enumerate(windows)]
        self._held_out = [open_windows(tokens, config) for tokens in self.splits["validation"]]
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._ahead = dict[int, dict[int, Future[Batch]]]()  # by step and row

    def fingerprint(self, steps: int | None = None) -> list[str]:
        """Identifies the data of the first `steps` steps, or of all.

        For each phase: the number of steps before it, then for each folder its share and the hashes
        of its tokenizer and shards.
        """
        parts = list[str]()
        streams = dict(zip(self.config.folders, self.splits["train"], strict=True))
        for first, mixture in self.config.mixtures.items():
            if first and steps is not None and first >= steps:
                break
            parts += [f"after step {first}"] if first else []
            for folder, share in zip(mixture, Mixture([*mixture.values()]).shares, strict=True):
                tokens, tokenizer = streams[folder], streams[folder].meta["tokenizer_sha256"]
                parts.append(f"{share}:{tokenizer[:16]}:{tokens.content_hash()[:16]}")
        return parts

    @property
    def unigram_entropy(self) -> float | None:
        """The unigram entropy of the held-out tokens that are trained on [nats per token].

        None if there are none, and for preferences, whose loss is no cross-entropy.
        """
        splits = [s for s in self.splits["validation"] if len(s) and s.kind != "preferences"]
        summaries = [tokens.summary for tokens in splits]
        predicted = [summary.get("trained_tokens", summary["tokens"]) for summary in summaries]
        total = sum(
            n * summary["unigram_entropy"] for n, summary in zip(predicted, summaries, strict=True)
        )
        return total / sum(predicted) if sum(predicted) else None

    def train(self, step: int) -> Batch:
        """Returns the batch of step `step` (0 is the first): arrays [A, B, T].

        A counts micro-batches, B the rows of one. Row r of micro-batch a is sample a·B + r of the
        step, so the micro-batches, concatenated in order, are the unsplit batch.
        """
        for later in range(step, max(step + 1, min(step + AHEAD, self.steps))):
            self._read_ahead(later)
        rows = self._ahead.pop(step)
        self._ahead = {s: reads for s, reads in self._ahead.items() if s > step}
        return self._shard_batch(lambda row: rows[row].result())

    def _read_ahead(self, step: int) -> None:
        """Starts to read the rows of this host's devices in the batch of a step."""
        if step not in self._ahead:
            draws = self.schedule.draw(step * self.config.batch_size, self.config.batch_size)
            self._ahead[step] = {
                row: self._readers.submit(self._read, draws[row]) for row in self._rows()
            }

    def sample(self, number: int) -> Batch:
        """Returns sample `number` of the run, a Batch of int32 arrays [T]."""
        return self._read(self.schedule.draw(number, 1)[0])

    def locate(self, number: int) -> Location:
        """Returns where sample `number` of the run is."""
        [draw] = self.schedule.draw(number, 1)
        windows = len(self._windows[draw.source])
        epoch, index = draw.number // windows, self._orders[draw.source][draw.number]
        return Location(self.splits["train"][draw.source], epoch, index, windows)

    def _read(self, draw: Draw) -> Batch:
        return self._windows[draw.source][self._orders[draw.source][draw.number]]

    def _rows(self) -> list[int]:
        """Returns the rows of a batch that this host's devices need, in order."""
        shape, sharding = self._layout()
        indices = sharding.addressable_devices_indices_map(shape).values()
        rows = set[int]()
        for a, b, _ in indices:
            micro_batches, of_each = range(*a.indices(shape[0])), range(*b.indices(shape[1]))
            rows |= {i * shape[1] + j for i in micro_batches for j in of_each}
        return sorted(rows)

    def validation(self, index: int, batches: int) -> Batch:
        """Returns held-out batch `index` of `batches`, shaped like a training batch.

        Together the batches contain windows at equal distances in the held-out text, each window at
        most once. Rows after the last window have no loss.
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

        reads = {row: self._readers.submit(read, row) for row in self._rows()}
        return self._shard_batch(lambda row: reads[row].result())

    def count_validation_batches(self, limit: int) -> int:
        """Returns the number of held-out batches, at most `limit`."""
        windows = sum(len(source) for source in self._held_out)
        return min(limit, -(-windows // self.config.batch_size))

    def _layout(self) -> tuple[tuple[int, int, int], Any]:
        """Returns the shape [A, B, T] of a batch's arrays, and their sharding."""
        import jax

        from llama_jax.parallel.sharding import activation_spec

        A = self.micro_batches
        shape = A, self.config.batch_size // A, self.config.seq_len
        return shape, jax.NamedSharding(jax.sharding.get_mesh(), activation_spec("ABT"))

    def _shard_batch(self, read: Callable[[int], Batch]) -> Batch:
        """Returns global arrays; this process reads only the rows of its own devices."""
        import jax

        (A, B, T), sharding = self._layout()

        def field(number: int) -> Any:
            def shard(index: Any) -> np.ndarray:
                a, b, t = (range(*i.indices(n)) for i, n in zip(index, (A, B, T), strict=True))
                rows = [[read(i * B + j)[number][t.start : t.stop] for j in b] for i in a]
                return np.array(rows)

            return jax.make_array_from_callback((A, B, T), sharding, shard)

        batch = Batch(*(field(i) for i in range(len(Batch._fields))))
        # Attention is faster if it doesn't have to compare segments.
        return batch if self.config.isolate_documents else batch._replace(segments=None)
