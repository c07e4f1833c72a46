"""Batches as a pure function of the step.

The seed and the step alone determine the windows of a step's global batch. So the step is the only
state to save, and any number of hosts reads the same batches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llama_jax.config.run import DataConfig
from llama_jax.data.mixture import Mixture
from llama_jax.data.samples import READERS, Samples
from llama_jax.data.shards import TokenStream
from llama_jax.data.windows import Batch, open_windows
from llama_jax.errors import InputError

# Identifies the algorithms of `epoch_order` and `mixture` in a fingerprint. Change it whenever a
# seed gives other batches: a run resumes only with the batches with which it began.
ORDER = "order 2"
LEFT_OUT = "without batches"


class Batches:
    """The batches of a run: `train(step)` and `validation(i)`, sharded over the current mesh.

    Args:
        config: the data.
        micro_batches: number of micro-batches in a batch.
        steps: of the run; no later batch is read ahead. Default: no limit.
    """

    def __init__(self, config: DataConfig, micro_batches: int = 1, steps: int | None = None):
        self.config = config
        self.micro_batches = micro_batches
        self.samples = Samples(config, steps)
        held_out = [TokenStream(folder, "validation") for folder in config.folders]
        self.splits = {"train": self.samples.streams, "validation": held_out}
        self._held_out = [open_windows(tokens, config) for tokens in held_out]
        self._readers = ThreadPoolExecutor(READERS, "read")

    def fingerprint(self, steps: int | None = None) -> list[str]:
        """Identifies the data of the first `steps` steps, or of all.

        `ORDER`, then for each phase the number of steps before it, and for each folder its share
        and the hashes of its tokenizer and shards; then the batches that are left out.
        """
        batches = None if steps is None else self.samples.batches_until(steps)
        parts = [ORDER]
        streams = dict(zip(self.config.folders, self.splits["train"], strict=True))
        for first, mixture in self.config.mixtures.items():
            if first and batches is not None and first >= batches:
                break
            parts += [f"after step {first}"] if first else []
            for folder, share in zip(mixture, Mixture([*mixture.values()]).shares, strict=True):
                tokens, tokenizer = streams[folder], streams[folder].meta["tokenizer_sha256"]
                parts.append(f"{share}:{tokenizer[:16]}:{tokens.content_hash()[:16]}")
        for first, stop in self.samples.left_out:
            if batches is None or first < batches:
                parts.append(f"{LEFT_OUT} {first + 1}-{stop}")
        return parts

    def phase_start(self, step: int) -> int:
        """Returns the first step of the phase of a step (0 is the first)."""
        batch = self.samples.batch_number(step)
        first = max(first for first in self.config.mixtures if first <= batch)
        return first - sum(
            min(stop, first) - start for start, stop in self.samples.left_out if start < first
        )

    def shares(self, steps: int) -> dict[int, float]:
        """Returns the share of each source in the mixture of the last of `steps` steps.

        Sources of later phases are absent; those that only earlier phases have get 0.
        """
        samples = self.samples.batches_until(steps) * self.config.batch_size
        shares = self.samples.schedule.shares(max(samples - 1, 0))
        return {source: float(share) for source, share in shares.items()}

    def unigram_entropy(self, steps: int) -> float | None:
        """Returns the unigram entropy of the held-out tokens that are trained on [nats per token].

        It is the mean of the sources, weighted with `shares(steps)`. None if there are no held-out
        tokens, and for preferences, whose loss is no cross-entropy.
        """
        entropies = {
            source: tokens.summary["unigram_entropy"]
            for source, tokens in enumerate(self.splits["validation"])
            if len(tokens) and tokens.kind != "preferences"
        }
        return weighted_mean(entropies, self.shares(steps))

    def train(self, step: int) -> Batch:
        """Returns the batch of step `step` (0 is the first): arrays [A, B, T].

        A counts micro-batches, B the rows of one. Row r of micro-batch a is sample a·B + r of the
        step, so the micro-batches, concatenated in order, are the unsplit batch.
        """
        rows = self.samples.read_step(step, self._rows())
        return self._shard_batch(lambda row: rows[row].result())

    def _rows(self) -> list[int]:
        """Returns the rows of a batch that this host's devices need, in order."""
        shape, sharding = self._layout()
        indices = sharding.addressable_devices_indices_map(shape).values()
        rows = set[int]()
        for a, b, _ in indices:
            micro_batches, of_each = range(*a.indices(shape[0])), range(*b.indices(shape[1]))
            rows |= {i * shape[1] + j for i in micro_batches for j in of_each}
        return sorted(rows)

    def validation(self, source: int, index: int, batches: int) -> Batch:
        """Returns held-out batch `index` of `batches` of a source, shaped like a training batch.

        Together the batches contain windows at equal distances in the held-out text, each window at
        most once. Rows after the last window have no loss.
        """
        windows = self._held_out[source]
        count, first = len(windows), index * self.config.batch_size
        rows = min(batches * self.config.batch_size, count)

        def read(row: int) -> Batch:
            if first + row < rows:
                return windows[(first + row) * count // rows]
            blank = np.zeros(self.config.seq_len, np.int32)
            return Batch(blank, blank - 1, blank, blank)

        reads = {row: self._readers.submit(read, row) for row in self._rows()}
        return self._shard_batch(lambda row: reads[row].result())

    def count_validation_batches(self, source: int, limit: int) -> int:
        """Returns the number of held-out batches of a source, at most `limit`."""
        return min(limit, -(-len(self._held_out[source]) // self.config.batch_size))

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


def weighted_mean(values: Mapping[int, float], shares: Mapping[int, float]) -> float | None:
    """Returns the mean of the values of sources, weighted with their shares; None if all are 0."""
    weights = {source: shares[source] for source in values if shares.get(source)}
    if not weights:
        return None
    total = math.fsum(weight * values[source] for source, weight in weights.items())
    return total / math.fsum(weights.values())


def check_order(run: str, fingerprint: Sequence[str]) -> None:
    """Compares the order of a run's batches with that of this version.

    Args:
        run: its folder.
        fingerprint: of the data in one of its checkpoints.

    Raises:
        InputError: they differ.
    """
    if ORDER not in fingerprint:
        raise InputError(
            f"{run} was trained by an earlier version of llama_jax, which reads the same data in"
            " another order: continue it with that version, or start a new run from its weights"
            f" (training.init_from={run})"
        )
