"""Packs examples into windows of T tokens, in bounded memory.

An example is never cut. Examples are buffered, and packed from the longest to the shortest, each
into the open window with the least space that suffices (best fit, decreasing; Johnson 1973). Open
windows wait for the examples of the next buffer, until there are too many: then the fullest are
written. Padding fills the rest of a window.
"""

import bisect
from typing import NamedTuple

import numpy as np

from llama_jax.data.shard_writer import PackedWindow, SplitWriter

BUFFER_TOKENS = 1 << 22  # of examples that wait to be packed; open windows have a fourth of it


class Example(NamedTuple):
    """The tokens of a chat, or of a preference (chosen, then rejected)."""

    ids: np.ndarray
    trained: np.ndarray  # bool: tokens that the model learns to predict
    starts: tuple[int, ...]  # of the segments: (0,), or (0, length of chosen)
    n_bytes: int  # of the messages' UTF-8 text


class Packer:
    """Packs the examples of one split and writes the windows.

    Args:
        writer: of the split; its `seq_len` is T.
        padding: id of the tokens that fill a window; the model never learns them.
    """

    def __init__(self, writer: SplitWriter, padding: int):
        assert writer.seq_len is not None
        self._writer, self._padding = writer, padding
        self._T = writer.seq_len
        self._buffer = list[Example]()
        self._buffered_tokens = 0
        self._open = list[tuple[int, int]]()  # (space, number) of the open windows, sorted
        self._windows = dict[int, list[Example]]()  # their examples, by number
        self._n_windows = 0

    def append(self, example: Example) -> None:
        """Appends an example of at most T tokens; writes windows when the buffer is full."""
        self._buffer.append(example)
        self._buffered_tokens += len(example.ids)
        if self._buffered_tokens >= BUFFER_TOKENS:
            self._pack_buffer(max_open=max(1, BUFFER_TOKENS // 4 // self._T))

    def finish(self) -> None:
        """Writes the remaining examples. The writer isn't finished."""
        self._pack_buffer(max_open=0)

    def _pack_buffer(self, max_open: int) -> None:
        # Equal lengths remain in their order: the windows depend on the examples alone.
        for example in sorted(self._buffer, key=lambda example: len(example.ids), reverse=True):
            at = bisect.bisect_left(self._open, (len(example.ids), 0))
            if at < len(self._open):
                space, number = self._open.pop(at)
            else:
                space, number = self._T, self._n_windows
                self._n_windows += 1
                self._windows[number] = []
            self._windows[number].append(example)
            bisect.insort(self._open, (space - len(example.ids), number))
        self._buffer, self._buffered_tokens = [], 0
        full = max(len(self._open) - max_open, bisect.bisect_left(self._open, (1, 0)))
        for _, number in self._open[:full]:
            self._writer.append_window(self._join(self._windows.pop(number)))
        del self._open[:full]

    def _join(self, examples: list[Example]) -> PackedWindow:
        """Returns a window of some examples, and padding if they are shorter."""
        tokens_T = np.full(self._T, self._padding, np.uint32)
        starts_T, trained_T = np.zeros(self._T, bool), np.zeros(self._T, bool)
        n = 0
        for example in examples:
            end = n + len(example.ids)
            tokens_T[n:end], trained_T[n:end] = example.ids, example.trained
            starts_T[[n + start for start in example.starts]] = True
            n = end
        starts_T[n : n + 1] = True  # padding is a segment
        n_bytes = sum(example.n_bytes for example in examples)
        return PackedWindow(tokens_T, starts_T, trained_T, len(examples), n, n_bytes)
