"""Text to token shards: tokenizes documents on all cores, writes memory-mapped files.

A folder of token shards holds the tokenizer, `meta.json` and, for each of the splits `train` and
`validation`, `tokens-NNNNN.npy` (the documents one after another, each between the begin and the
end token) and `ends-NNNNN.npy` (where in the whole split the documents of that file end). No text
and no file is in memory at once: texts come in pieces, and tokens are written as they are made.
"""

import collections
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.shards import EncodedPiece, SplitWriter
from llama_jax.data.text_files import SPLITS, Document, find_files, lines_of, read_documents
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import check_absent, new_folder
from llama_jax.runtime.console import byte_progress
from llama_jax.tokenizer.exact_cuts import Cut, pieces
from llama_jax.tokenizer.tokenizer import file_hash, load_tokenizer
from llama_jax.tokenizer.train import MAX_LINE, train_tokenizer

_TASK_BYTES = 1 << 20  # text that one worker gets at a time
# Of more text, a tokenizer is trained on lines at equal distances: SentencePiece needs four times
# the text in memory. Compressed text counts four times its file.
_TRAINING_BYTES = 1 << 26
_COMPRESSED = (".gz", ".zst")


class _Piece(NamedTuple):
    """A part of a document that is encoded at once, and whether it is its first or its last."""

    text: str
    split: str
    first: bool
    last: bool


@contextlib.contextmanager
def _processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool whose processes end when this one does, and at once after an error.

    Each watches a pipe whose other end is here alone: the system closes that with this process.
    """
    # Fresh processes: forking a process in which JAX runs threads can deadlock.
    fresh = multiprocessing.get_context("spawn")
    watched, ours = fresh.Pipe(duplex=False)
    pool = ProcessPoolExecutor(number, fresh, _end_with, (watched,))
    try:
        yield pool
        pool.shutdown()
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)
        watched.close()


def _end_with(parent: Connection) -> None:
    """Ends this process once the other end of the pipe is closed, also in the middle of a task."""
    # Ctrl-C reaches all processes of a terminal; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


def _encode(tokenizer: Path, task: list[_Piece]) -> list[EncodedPiece]:
    encode = _tokenizer(tokenizer).encode
    return [
        EncodedPiece(
            np.array(encode(text, bos=first, eos=last, continued=not first), np.uint32),
            len(text.encode()),
            split,
            first,
            last,
        )
        for text, split, first, last in task
    ]


def _train(files: Sequence[Path], validation_fraction: float, model: Path, n_vocab: int) -> None:
    lines = lines_of(read_documents(files, validation_fraction), "train", MAX_LINE)
    packed = (path.suffix in _COMPRESSED for path in files)
    size = sum(path.stat().st_size * 4**p for path, p in zip(files, packed, strict=True))
    every = max(1, -(-size // _TRAINING_BYTES))
    train_tokenizer(itertools.islice(lines, 0, None, every), model, n_vocab)


def _pieces(documents: Iterable[Document], exact_cut: Cut) -> Iterator[_Piece]:
    for parts, split in documents:
        texts = pieces(parts, exact_cut)
        text, first = next(texts), True
        for following in texts:
            yield _Piece(text, split, first, last=False)
            text, first = following, False
        yield _Piece(text, split, first, last=True)


def _tasks(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    task: list[_Piece] = []
    size = 0
    for piece in pieces:
        task.append(piece)
        size += len(piece.text)
        if size >= _TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


def _in_order(
    tasks: Iterable[list[_Piece]], tokenizer: Path, workers: int
) -> Generator[EncodedPiece, None, None]:
    """Yields the encoded pieces in order, with a bounded number of tasks in memory."""
    if workers == 1:
        yield from itertools.chain.from_iterable(_encode(tokenizer, task) for task in tasks)
        return
    with _processes(workers) as pool:
        running: collections.deque[Future[list[EncodedPiece]]] = collections.deque()
        for task in tasks:
            running.append(pool.submit(_encode, tokenizer, task))
            if len(running) > 3 * workers:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def build(
    sources: Sequence[str],
    out: str | Path,
    *,
    n_vocab: int | None = None,
    tokenizer: str | Path | None = None,
    validation_fraction: float = 0.05,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes a corpus into the new folder `out` and returns its `meta.json`.

    Args:
        sources: what `find_files` takes.
        out: the folder to make. It appears when it is complete, or not at all.
        n_vocab: tokens of a tokenizer to train on the corpus (on some 64 MiB of its lines), where
            `tokenizer` is None.
        tokenizer: file or folder of the tokenizer to use.
        validation_fraction: share of the documents that is held out.
        workers: processes; default: one a core.
        progress: show the progress on standard error.

    Raises:
        InputError: `out` is there already, a source can't be read, or a split stays empty.
        Fault: the system can't write `out`.
    """
    check_absent(out)
    files = find_files(sources)
    size = sum(file.stat().st_size for file in files)
    workers = workers or max(1, min(os.cpu_count() or 1, size // _TASK_BYTES))
    with new_folder(out) as partial:
        model = partial / "tokenizer.model"
        if tokenizer is not None:
            for name, data in load_tokenizer(tokenizer).files.items():
                (partial / name).write_bytes(data)
            model = load_tokenizer(partial).path
        elif n_vocab is not None:
            if progress:
                print(f"training a tokenizer of {n_vocab} tokens …", file=sys.stderr, flush=True)
            if workers == 1:
                _train(files, validation_fraction, model, n_vocab)
            else:  # this process stays free to answer a signal
                with _processes(1) as pool:
                    pool.submit(_train, files, validation_fraction, model, n_vocab).result()
        else:
            raise InputError("tokenize: give a tokenizer, or the size of a vocabulary to train")
        loaded = load_tokenizer(model)
        tasks = _tasks(_pieces(read_documents(files, validation_fraction), loaded.exact_cut))
        with contextlib.ExitStack() as opened:
            writers = {
                split: opened.enter_context(SplitWriter(partial / split, loaded.n_vocab))
                for split in SPLITS
            }
            # Compressed files have an unknown size of text: the bar then only counts.
            plain = all(file.suffix not in _COMPRESSED for file in files)
            advance = opened.enter_context(
                byte_progress("tokenizing", size if plain else None, progress)
            )
            encoded = opened.enter_context(contextlib.closing(_in_order(tasks, model, workers)))
            for piece in encoded:
                writers[piece.split].add(piece)
                advance(piece.n_bytes)
            for writer in writers.values():
                writer.finish()
        for split, writer in writers.items():
            if not writer.documents and (split == "train" or validation_fraction):
                raise InputError(
                    f"corpus: no document for the {split} split in {len(files)} file(s): add text"
                    " or change validation_fraction"
                )
        meta = {
            "format": 1,
            "sources": list(sources),
            "tokenizer_sha256": file_hash(model),
            "n_vocab": loaded.n_vocab,
            "dtype": np.dtype(writers["train"].dtype).name,
            "splits": {split: writer.summary() for split, writer in writers.items()},
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta
