"""Windows of training tokens at fixed positions of a token stream."""

from typing import Any, NamedTuple

import numpy as np

from llama_jax.config.run import DataConfig
from llama_jax.data.shards import Kind, TokenStream
from llama_jax.errors import InputError


class Batch(NamedTuple):
    """Rows of tokens and their targets, int32 [B, T]; micro-batches add a leading A.

    Built from NumPy arrays, for a step of one micro-batch of two rows, each row one text:

    >>> rows = np.array([[tokenizer.encode("to be or not to be, that is", bos=True)[:9]] * 2])
    >>> positions = np.broadcast_to(np.arange(8), (1, 2, 8))
    >>> batch = lj.Batch(rows[..., :-1], rows[..., 1:], positions, segments=None)
    >>> batch.targets.shape
    (1, 2, 8)
    """

    tokens: Any
    targets: Any  # the next token, or -1 at positions without a loss
    positions: Any  # within the document, counted from its first token in the window
    segments: Any  # number of the document in the window, from 1; None: all tokens are one text


class Windows:
    """Random access to the windows of T+1 tokens of a stream; adjacent windows share one token."""

    def __init__(self, tokens: TokenStream, config: DataConfig):
        self.tokens = tokens
        self.length = config.seq_len
        self.isolate = config.isolate_documents
        self.count = count_windows(tokens.kind, len(tokens), self.length)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Batch:
        """Returns window `index` as a Batch of int32 arrays [T]."""
        T = self.length
        start = int(index) * T
        tokens, starts = self.tokens.read(start, start + T + 1)
        positions = np.arange(T + 1, dtype=np.int32)
        segments = np.ones(T + 1, np.int32)
        if self.isolate:
            is_start = np.zeros(T + 1, np.int32)
            is_start[starts[(starts > 0) & (starts <= T)]] = 1
            segments += np.cumsum(is_start, dtype=np.int32)
            positions -= np.maximum.accumulate(positions * is_start)
        same_document = segments[1:] == segments[:-1]
        targets = np.where(same_document, tokens[1:], -1).astype(np.int32)
        return Batch(tokens[:-1], targets, positions[:-1], segments[:-1])


class PackedWindows:
    """Random access to the packed windows of T tokens of chats or preferences.

    Raises:
        InputError: the configuration asks for windows of another length, or for windows whose
            examples are not separated.
    """

    def __init__(self, tokens: TokenStream, config: DataConfig):
        T = tokens.meta["seq_len"]
        if config.seq_len != T:
            raise InputError(
                f"{tokens.folder} contains windows of {T:,} tokens, but data.seq_len is"
                f" {config.seq_len:,}: set it to {T}, or tokenize again with --seq-len"
                f" {config.seq_len}"
            )
        if not config.isolate_documents:
            raise InputError(
                f"{tokens.folder} contains several {tokens.kind} in a window:"
                " data.isolate_documents must be true"
            )
        self.tokens = tokens
        self.count = count_windows(tokens.kind, len(tokens), T)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Batch:
        """Returns window `index` as a Batch of int32 arrays [T].

        Each example (each side of a preference) is a segment; padding is the last segment. Targets
        are trained tokens, or -1.
        """
        tokens, starts, trained = self.tokens.read_window(int(index))
        T = len(tokens)
        segments = np.cumsum(starts, dtype=np.int32)
        positions = np.arange(T, dtype=np.int32)
        positions -= np.maximum.accumulate(positions * starts)
        targets = np.full(T, -1, np.int32)
        targets[:-1] = np.where(trained[1:] & ~starts[1:], tokens[1:], -1)
        return Batch(tokens, targets, positions, segments)


def open_windows(tokens: TokenStream, config: DataConfig) -> Windows | PackedWindows:
    """Returns the windows of a split.

    Raises:
        InputError: see `PackedWindows`.
    """
    return (Windows if tokens.kind == "text" else PackedWindows)(tokens, config)


def count_windows(kind: Kind, tokens: int, seq_len: int) -> int:
    """Returns the number of windows of T = `seq_len` of a split with this number of tokens."""
    return max(0, tokens - (kind == "text")) // seq_len
