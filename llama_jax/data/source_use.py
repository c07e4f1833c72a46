"""How much of each source a run reads: the first table of LLaMA's paper, for any mixture.

This module doesn't import JAX: `llama-jax data` answers at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.config.data import DataConfig, Source
from llama_jax.data.mixture import open_schedule
from llama_jax.data.shards import Kind, read_meta
from llama_jax.data.windows import count_windows
from llama_jax.errors import InputError
from llama_jax.runtime.storage import parse_path


class SourceUse(NamedTuple):
    """What a run reads of one source. A sample is a window; an epoch has each window once."""

    folder: str
    is_planned: bool  # the folder doesn't exist yet: the configuration states its size
    tokens: int  # to train on
    n_bytes: int | None  # of its text in UTF-8; None: not stated
    windows: int
    drawn: int  # samples in all steps of the run
    drawn_so_far: int  # samples in the steps done
    max_epochs: float | None

    @property
    def epochs(self) -> float:
        """Epochs in the complete run."""
        return self.drawn / self.windows

    @property
    def exceeds_limit(self) -> bool:
        """Whether the run needs more epochs than its `max_epochs` allows."""
        return self.max_epochs is not None and self.epochs > self.max_epochs


class _Size(NamedTuple):
    kind: Kind
    tokens: int
    n_bytes: int | None


def count_use(config: DataConfig, steps: int, done: int = 0) -> list[SourceUse]:
    """Returns the use of each source in a run, in the order of `config.folders`.

    Args:
        config: the data.
        steps: of the complete run.
        done: steps done.

    Raises:
        InputError: a folder neither exists nor has `planned_tokens`, or has not one window.
    """
    schedule = open_schedule(config)
    counts = (schedule.drawn(n * config.batch_size) for n in (steps, done))
    uses = list[SourceUse]()
    for (folder, source), drawn, so_far in zip(config.sources.items(), *counts, strict=True):
        is_planned = not parse_path(folder).exists()
        size = _planned_size(folder, source) if is_planned else _stored_size(folder)
        windows = count_windows(size.kind, size.tokens, config.seq_len)
        if not windows:
            raise InputError(
                f"{folder} has {size.tokens:,} training tokens, fewer than one window of"
                f" data.seq_len ({config.seq_len:,}): add text or shorten seq_len"
            )
        tokens, n_bytes, limit = size.tokens, size.n_bytes, source.max_epochs
        uses.append(SourceUse(folder, is_planned, tokens, n_bytes, windows, drawn, so_far, limit))
    return uses


def _stored_size(folder: str) -> _Size:
    meta = read_meta(parse_path(folder))
    train = meta["splits"]["train"]
    return _Size(meta["kind"], train["tokens"], train["bytes"])


def _planned_size(folder: str, source: Source) -> _Size:
    if source.planned_tokens is None:
        raise InputError(
            f"there is no folder of token shards at {folder}: create it with `llama-jax tokenize`,"
            " or state its size in data.mixture (planned_tokens)"
        )
    n_bytes = None if source.planned_bytes is None else round(source.planned_bytes)
    return _Size("text", round(source.planned_tokens), n_bytes)


def check_epochs(uses: Sequence[SourceUse]) -> None:
    """Compares the epochs of each source with its limit.

    Raises:
        InputError: the run needs more.
    """
    if problems := [describe_excess(use) for use in uses if use.exceeds_limit]:
        raise InputError(
            f"{'; '.join(problems)}: add text, lower the weight, shorten the run, or"
            " raise max_epochs"
        )


def describe_excess(use: SourceUse) -> str:
    """Returns the sentence about a source that the run reads more often than allowed."""
    return (
        f"{use.folder} is read {use.epochs:.2f} times in this run, and its max_epochs is"
        f" {use.max_epochs:g}"
    )


def describe_phases(config: DataConfig) -> list[str]:
    """Returns a line about each later mixture."""
    return [
        f"after step {first:,} the mixture is "
        + ", ".join(f"{folder} {weight:g}" for folder, weight in mixture.items())
        for first, mixture in config.mixtures.items()
        if first
    ]
