"""Prints windows of token shards as the model sees them. Imports no JAX."""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np

from llama_jax.config.data import DataConfig
from llama_jax.data.samples import Samples
from llama_jax.data.shards import TokenStream
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

_TEXT_WINDOW = 512  # tokens of text that are shown; the shards don't define its windows


class Style(NamedTuple):
    """The marks around trained tokens, special tokens and borders."""

    trained: tuple[str, str]
    special: tuple[str, str]
    border: tuple[str, str]


COLORS = Style(("\x1b[32m", "\x1b[39m"), ("\x1b[1m", "\x1b[22m"), ("\x1b[2m", "\x1b[22m"))
MARKS = Style(("⟦", "⟧"), ("", ""), ("", ""))


def style_of(stream: IO[str]) -> Style:
    """Returns colors for a terminal, and plain marks for anything else (or if NO_COLOR is set)."""
    return COLORS if stream.isatty() and not os.environ.get("NO_COLOR") else MARKS


def show_windows(folder: AnyPath, n: int) -> str:
    """Returns the first `n` training windows of a folder, decoded, in the style of standard output.

    Trained tokens are colored (or between ⟦ and ⟧), the text of special tokens is visible, and a
    line marks the start of each document, example or side of a preference. The windows of text are
    its first tokens: all of them are trained.

    Raises:
        InputError: the folder contains no token shards, or is damaged.
    """
    stream, tokenizer = TokenStream(folder, "train"), load_tokenizer(folder)
    style = style_of(sys.stdout)
    lines = [f"{folder}: {_trained(style)} tokens are marked"]
    for number, (tokens, starts, trained_T) in enumerate(_read_windows(stream, n), 1):
        title = f"window {number}"
        lines += _show_window(title, stream.kind, tokenizer, tokens, starts, trained_T, style)
    return "\n".join(lines)


def show_step(config: DataConfig, step: int, rows: Iterable[int], batch: int | None = None) -> str:
    """Returns rows of the batch of a step, in the format of `show_windows`.

    Args:
        config: the data.
        step: of a run; 1 is the first.
        rows: of its batch; 0 is the first.
        batch: its number, if a rewind has left out batches before it; 1 is the first.

    Raises:
        InputError: a folder contains no token shards, or is damaged.
    """
    samples = Samples(config)
    tokenizer, style = load_tokenizer(config.folders[0]), style_of(sys.stdout)
    lines = [f"step {step:,}: {_trained(style)} tokens are marked"]
    for row in rows:
        number = ((batch or step) - 1) * config.batch_size + row
        at, window = samples.locate(number), samples[number]
        title = (
            f"row {row + 1} of {config.batch_size:,}: {at.tokens.folder}, window"
            f" {at.window + 1:,} of {at.windows:,} in epoch {at.epoch + 1:,}"
        )
        starts = np.diff(window.segments, prepend=0) != 0
        trained_T = np.concatenate([[False], window.targets[:-1] >= 0])
        lines += _show_window(
            title, at.tokens.kind, tokenizer, window.tokens, starts, trained_T, style
        )
    return "\n".join(lines)


def _trained(style: Style) -> str:
    return style.trained[0] + "trained" + style.trained[1]


def _show_window(
    title: str,
    kind: str,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    starts: np.ndarray,
    trained_T: np.ndarray,
    style: Style,
) -> list[str]:
    """Returns the lines of a window: its title, then a border and the text of each segment."""
    lines = [f"{style.border[0]}══ {title}: {len(tokens):,} tokens{style.border[1]}"]
    bounds = [*np.flatnonzero(starts), len(tokens)]
    if bounds[0]:  # a document of text continues from the window before
        bounds.insert(0, 0)
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        ids, mask = tokens[start:stop], trained_T[start:stop]
        segment = _title(kind, i, bool(mask.any()))
        count = f"{len(ids):,} tokens, {mask.sum():,} trained"
        lines.append(f"{style.border[0]}── {segment}: {count}{style.border[1]}")
        if mask.any():
            lines.append(decode_marked(tokenizer, ids, mask, style))
    return lines


def _title(kind: str, i: int, is_trained: bool) -> str:
    if kind == "text":
        return "document"
    if not is_trained:
        return "padding"
    if kind == "chats":
        return f"chat {i + 1}"
    return f"{('chosen', 'rejected')[i % 2]} {i // 2 + 1}"


def _read_windows(
    stream: TokenStream, n: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the tokens, starts and trained tokens of the first `n` windows."""
    if stream.kind != "text":
        for i in range(min(n, len(stream) // stream.meta["seq_len"])):
            yield stream.read_window(i)
        return
    for first in range(0, min(n * _TEXT_WINDOW, len(stream)), _TEXT_WINDOW):
        tokens, at = stream.read(first, min(first + _TEXT_WINDOW, len(stream)))
        starts = np.zeros(len(tokens), bool)
        starts[at] = True
        yield tokens, starts, ~starts


def decode_marked(tokenizer: Tokenizer, ids: np.ndarray, trained: np.ndarray, style: Style) -> str:
    """Returns the text of `ids`, with special tokens, and with marks around trained tokens."""
    names = {i: text for text, i in tokenizer.special.items()}
    changes = np.flatnonzero(trained[1:] != trained[:-1]) + 1
    text = ""
    for part, is_trained in zip(
        np.split(ids, changes), trained[[0, *changes]].tolist(), strict=True
    ):
        decoded = "".join(_decode(tokenizer, part.tolist(), names, style))
        text += style.trained[0] + decoded + style.trained[1] if is_trained else decoded
    return text


def _decode(
    tokenizer: Tokenizer, ids: list[int], names: dict[int, str], style: Style
) -> Iterator[str]:
    """Yields the text of `ids` in parts: special tokens, and the tokens between them."""
    # Some tokenizers remove a space at the start of a text: these tokens continue one.
    before = tokenizer.encode("a")
    cut = len(tokenizer.decode(before))
    run = list[int]()
    for i in [*ids, None]:
        if i is not None and i not in names:
            run.append(i)
            continue
        if run:
            yield tokenizer.decode(before + run)[cut:]
            run = []
        if i is not None:
            yield style.special[0] + names[i] + style.special[1]
