"""Batches as a pure function of the step.

A sample is a window of T+1 tokens at a fixed position of the token stream. The seed and the step
alone determine the windows of a step's global batch. So the step is the only state to save, and any
number of hosts reads the same batches.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np

from llama_jax.config.run import DataConfig
from llama_jax.data.shards import TokenStream
from llama_jax.data.windows import Batch, Windows
from llama_jax.errors import InputError


class Batches:
    """The batches of a run: `train(step)` and `validation(i)`, sharded over the current mesh."""

    def __init__(self, config: DataConfig, micro_batches: int = 1):
        import grain

        self.config = config
        self.micro_batches = micro_batches
        folders = list(config.mixture)
        self.splits = {
            split: [TokenStream(folder, split) for folder in folders]
            for split in ("train", "validation")
        }
        windows = [Windows(tokens, config) for tokens in self.splits["train"]]
        for folder, source in zip(folders, windows, strict=True):
            if not len(source):
                raise InputError(
                    f"{folder} contains {len(source.tokens):,} training tokens, fewer than one"
                    f" window of data.seq_len + 1 = {config.seq_len + 1:,}: add text or"
                    " shorten seq_len"
                )
        # With the same seed, sources of equal length would be read in the same order.
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
        """Identifies the data: each folder's weight and the hashes of its tokenizer and shards."""
        return [
            f"{weight:g}:{tokens.meta['tokenizer_sha256'][:16]}:{tokens.content_hash()[:16]}"
            for weight, tokens in zip(
                self.config.mixture.values(), self.splits["train"], strict=True
            )
        ]

    @property
    def unigram_entropy(self) -> float | None:
        """The unigram entropy of the held-out text [nats per token]; None if there is no text."""
        summaries = [tokens.summary for tokens in self.splits["validation"] if len(tokens)]
        tokens = sum(summary["tokens"] for summary in summaries)
        total = sum(summary["tokens"] * summary["unigram_entropy"] for summary in summaries)
        return total / tokens if tokens else None

    def train(self, step: int) -> Batch:
        """Returns the batch of step `step` (0 is the first): arrays [A, B, T].

        A counts micro-batches, B the rows of one. Row r of micro-batch a is sample a·B + r of the
        step, so the micro-batches, concatenated in order, are the unsplit batch.
        """
        first = step * self.config.batch_size
        return self._shard_batch(lambda row: cast(Batch, self._train[first + row]))

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

        return self._shard_batch(read)

    def count_validation_batches(self, limit: int) -> int:
        """Returns the number of held-out batches, at most `limit`."""
        windows = sum(len(source) for source in self._held_out)
        return min(limit, -(-windows // self.config.batch_size))

    def _shard_batch(self, read: Callable[[int], Batch]) -> Batch:
        """Returns global arrays; this process reads only the rows of its own devices."""
        import jax

        from llama_jax.parallel.sharding import activation_spec

        A = self.micro_batches
        B, T = self.config.batch_size // A, self.config.seq_len
        read = cache(read)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), activation_spec("ABT"))

        def field(number: int) -> Any:
            def shard(index: Any) -> np.ndarray:
                a, b, t = (range(*i.indices(n)) for i, n in zip(index, (A, B, T), strict=True))
                rows = [[read(i * B + j)[number][t.start : t.stop] for j in b] for i in a]
                return np.array(rows)

            return jax.make_array_from_callback((A, B, T), sharding, shard)

        batch = Batch(*(field(i) for i in range(len(Batch._fields))))
        # Attention is faster if it doesn't have to compare segments.
        return batch if self.config.isolate_documents else batch._replace(segments=None)
