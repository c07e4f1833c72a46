"""Tokenizes a corpus into token shards, in parallel processes.

Each document is written between the begin and the end token. Neither a complete text nor a complete
file of the corpus is in memory at once: documents are split into spans, and the tokens of a span
are written as soon as it is encoded.
"""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.shard_writer import EncodedSpan, SplitWriter
from llama_jax.data.shards import write_meta
from llama_jax.data.text_files import SPLITS, Document, find_files, read_documents, split_lines
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import check_absent, new_folder
from llama_jax.runtime.console import byte_progress
from llama_jax.runtime.storage import AnyPath, file_size, write_file
from llama_jax.tokenizer.split_points import SafeSplit, split_text
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.train import MAX_LINE_BYTES, train_tokenizer

_TASK_CHARACTERS = 1 << 20  # text that a worker encodes in one task
# A tokenizer is trained on at most this much of the corpus, on lines at equal distances:
# SentencePiece needs four times the text in memory. The text of a compressed file is estimated as
# four times the file.
_TRAINING_BYTES = 1 << 26
_COMPRESSED = (".gz", ".zst")


class _TextSpan(NamedTuple):
    """A part of a document that one call of `encode` takes."""

    text: str
    split: str
    first: bool  # whether the document starts with this span
    last: bool  # whether the document ends with this span


@contextlib.contextmanager
def _worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool whose workers exit when this process exits, and at once after an error.

    Each worker watches a pipe. Only this process has the pipe's other end, which the system closes
    when this process exits.
    """
    # Not fork: forking a process in which JAX runs threads can deadlock.
    context = multiprocessing.get_context("spawn")
    worker_end, parent_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _exit_with_parent, (worker_end,))
    try:
        yield pool
        pool.shutdown()
    finally:
        parent_end.close()
        pool.shutdown(cancel_futures=True)
        worker_end.close()


def _exit_with_parent(pipe: Connection) -> None:
    """Makes this worker exit when the pipe's other end closes, also in the middle of a task."""
    # Ctrl-C sends SIGINT to all processes of a terminal: only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            pipe.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_load_tokenizer_once = functools.lru_cache(maxsize=1)(load_tokenizer)


def _encode_task(tokenizer: AnyPath, task: list[_TextSpan]) -> list[EncodedSpan]:
    encode = _load_tokenizer_once(tokenizer).encode
    return [
        EncodedSpan(
            np.array(encode(text, bos=first, eos=last, continued=not first), np.uint32),
            len(text.encode()),
            split,
            first,
            last,
        )
        for text, split, first, last in task
    ]


def _train_on_corpus(
    files: Sequence[AnyPath], validation_fraction: float, model: AnyPath, n_vocab: int
) -> None:
    documents = read_documents(files, validation_fraction)
    lines = split_lines(documents, "train", MAX_LINE_BYTES)
    compressed = (path.suffix in _COMPRESSED for path in files)
    size = sum(file_size(path) * 4**c for path, c in zip(files, compressed, strict=True))
    every = max(1, -(-size // _TRAINING_BYTES))
    train_tokenizer(itertools.islice(lines, 0, None, every), model, n_vocab)


def _text_spans(documents: Iterable[Document], safe_split: SafeSplit) -> Iterator[_TextSpan]:
    for parts, split in documents:
        texts = split_text(parts, safe_split)
        text, first = next(texts), True
        for following in texts:
            yield _TextSpan(text, split, first, last=False)
            text, first = following, False
        yield _TextSpan(text, split, first, last=True)


def _group_into_tasks(spans: Iterable[_TextSpan]) -> Iterator[list[_TextSpan]]:
    task: list[_TextSpan] = []
    size = 0
    for span in spans:
        task.append(span)
        size += len(span.text)
        if size >= _TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task


def _encode_in_order(
    tasks: Iterable[list[_TextSpan]], tokenizer: AnyPath, workers: int
) -> Generator[EncodedSpan, None, None]:
    """Yields the encoded spans in order, with a bounded number of tasks in memory."""
    if workers == 1:
        yield from itertools.chain.from_iterable(_encode_task(tokenizer, task) for task in tasks)
        return
    with _worker_pool(workers) as pool:
        running: collections.deque[Future[list[EncodedSpan]]] = collections.deque()
        for task in tasks:
            running.append(pool.submit(_encode_task, tokenizer, task))
            if len(running) > 3 * workers:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def tokenize_corpus(
    sources: Sequence[str],
    out: str | AnyPath,
    *,
    n_vocab: int | None = None,
    tokenizer: str | AnyPath | None = None,
    validation_fraction: float = 0.05,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes a corpus into the new folder `out` and returns the content of its `meta.json`.

    Args:
        sources: files, folders and globs, as `find_files` takes them.
        out: folder to create. It appears once it is complete; after an error it doesn't exist.
        n_vocab: number of tokens of a tokenizer to train on the corpus (on about 64 MiB of its
            lines), where `tokenizer` is None.
        tokenizer: file or folder of the tokenizer to use.
        validation_fraction: fraction of the documents that is held out.
        workers: number of processes; default: one per core.
        progress: whether to show the progress on standard error.

    Raises:
        InputError: `out` exists already, a source can't be read, or a split has no document.
        Fault: the system can't write `out`.
    """
    check_absent(out)
    files = find_files(sources)
    size = sum(file_size(file) for file in files)
    workers = workers or max(1, min(os.cpu_count() or 1, size // _TASK_CHARACTERS))
    with new_folder(out) as partial:
        model = partial / "tokenizer.model"
        if tokenizer is not None:
            for name, data in load_tokenizer(tokenizer).files.items():
                write_file(partial / name, data)
            model = load_tokenizer(partial).path
        elif n_vocab is not None:
            if progress:
                print(f"training a tokenizer of {n_vocab} tokens …", file=sys.stderr, flush=True)
            if workers == 1:
                _train_on_corpus(files, validation_fraction, model, n_vocab)
            else:  # in a worker, so that this process can still handle signals
                with _worker_pool(1) as pool:
                    pool.submit(
                        _train_on_corpus, files, validation_fraction, model, n_vocab
                    ).result()
        else:
            raise InputError("tokenize: give a tokenizer, or the vocabulary size of one to train")
        loaded = load_tokenizer(model)
        spans = _text_spans(read_documents(files, validation_fraction), loaded.safe_split)
        with contextlib.ExitStack() as stack:
            writers = {split: SplitWriter(partial / split, loaded.n_vocab) for split in SPLITS}
            # The amount of text in compressed files is unknown: the bar then has no total.
            plain = all(file.suffix not in _COMPRESSED for file in files)
            advance = stack.enter_context(
                byte_progress("tokenizing", size if plain else None, progress)
            )
            encoded_spans = stack.enter_context(
                contextlib.closing(_encode_in_order(_group_into_tasks(spans), model, workers))
            )
            for span in encoded_spans:
                writers[span.split].append(span)
                advance(span.n_bytes)
        for split, writer in writers.items():
            if not writer.documents and (split == "train" or validation_fraction):
                raise InputError(
                    f"corpus: no document for the {split} split in {len(files)} file(s): add text"
                    " or change validation_fraction"
                )
        return write_meta(
            partial, sources=sources, tokenizer=model, n_vocab=loaded.n_vocab, writers=writers
        )
