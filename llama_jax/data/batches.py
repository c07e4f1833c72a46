"""Batches as a pure function of the step.

A sample is a window of T+1 tokens at a fixed place of the token stream. Which windows make up the
global batch of a step follows from the seed and the step alone, so nothing but the step has to be
saved, and any number of hosts reads the very same batches.
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
    """The batches of a run: `train(step)` and `validation(i)`, placed on the current mesh."""

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

    def count_validation_batches(self, most: int) -> int:
        """Returns how many held-out batches there are, at most `most`."""
        windows = sum(len(source) for source in self._held_out)
        return min(most, -(-windows // self.config.batch_size))

    def _place(self, read: Callable[[int], Batch]) -> Batch:
        """Builds global arrays of which this process reads the rows of its own devices."""
        import jax

        from llama_jax.parallel.sharding import activation_spec

        A = self.micro_batches
        B, T = self.config.batch_size // A, self.config.seq_len
        read = cache(read)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), activation_spec("ABT"))

        def field(number: int) -> Any:
            def part(index: Any) -> np.ndarray:
                a, b, t = (range(*i.indices(n)) for i, n in zip(index, (A, B, T), strict=True))
                rows = [[read(i * B + j)[number][t.start : t.stop] for j in b] for i in a]
                return np.array(rows)

            return jax.make_array_from_callback((A, B, T), sharding, part)

        placed = Batch(*(field(i) for i in range(len(Batch._fields))))
        # Attention that need not compare segments is faster.
        return placed if self.config.isolate_documents else placed._replace(segments=None)
