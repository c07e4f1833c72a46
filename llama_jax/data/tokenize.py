"""Tokenizes a corpus into token shards, in parallel processes.

Each document is written between the begin and the end token. Neither a complete text nor a complete
file of the corpus is in memory at once: documents are split into spans, and the tokens of a span
are written as soon as it is encoded.
"""

import contextlib
import functools
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.shard_writer import EncodedSpan, SplitWriter
from llama_jax.data.shards import write_meta
from llama_jax.data.text_files import (
    COMPRESSED,
    SPLITS,
    SplitText,
    find_files,
    plain_size,
    read_documents,
    split_lines,
)
from llama_jax.data.worker_pool import map_in_order, submit, worker_pool
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import check_absent, new_folder
from llama_jax.runtime.console import byte_progress, print_status
from llama_jax.runtime.storage import AnyPath, file_size, write_many
from llama_jax.tokenizer.special_text import (
    encode_around_special,
    special_pattern,
    split_around_special,
)
from llama_jax.tokenizer.split_points import SafeSplit, split_text
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.train import MAX_LINE_BYTES, train_tokenizer

_TASK_CHARACTERS = 1 << 20  # text that a worker encodes in one task
# A tokenizer is trained on at most this much of the corpus, on lines at equal distances:
# SentencePiece needs four times the text in memory. The text of a compressed file is estimated as
# four times the file.
_TRAINING_BYTES = 1 << 26


class _TextSpan(NamedTuple):
    """A part of a document that one call of `encode` takes."""

    text: str
    split: str
    first: bool  # whether the document starts with this span
    last: bool  # whether the document ends with this span


_load_tokenizer_once = functools.lru_cache(maxsize=1)(load_tokenizer)


def _encode_task(
    tokenizer: AnyPath, parse_special: bool, task: list[_TextSpan]
) -> tuple[list[EncodedSpan], Counter[str]]:
    """Returns the encoded spans, and how often each text of a special token occurs in them."""
    loaded = _load_tokenizer_once(tokenizer)
    encode = _encode_with_special if parse_special else _encode
    pattern, found, spans = special_pattern(loaded.special), Counter[str](), list[EncodedSpan]()
    for span in task:
        if pattern:
            found.update(match[0] for match in pattern.finditer(span.text))
        ids = np.array(encode(loaded, span), np.uint32)
        n_bytes = len(span.text.encode())
        spans.append(EncodedSpan(ids, n_bytes, span.split, span.first, span.last))
    return spans, found


def _encode(tokenizer: Tokenizer, span: _TextSpan) -> list[int]:
    return tokenizer.encode(span.text, bos=span.first, eos=span.last, continued=not span.first)


def _encode_with_special(tokenizer: Tokenizer, span: _TextSpan) -> list[int]:
    """Returns the ids of a span; a begin or end token that the text contains is not added twice."""
    continued = not span.first

    def encode_part(text: str) -> list[int]:
        nonlocal continued
        ids = tokenizer.encode(text, continued=continued)
        continued = False  # the rest of the span follows a special token
        return ids

    ids = encode_around_special(encode_part, tokenizer.special, span.text)
    bos = span.first and ids[:1] != [tokenizer.bos_id]
    eos = span.last and ids[-1:] != [tokenizer.eos_id]
    return [tokenizer.bos_id] * bos + ids + [tokenizer.eos_id] * eos


def _warn_of_special_texts(found: Counter[str]) -> None:
    texts = ", ".join(f"{text} ({count:,})" for text, count in found.most_common(3))
    print_status(
        f"warning: the corpus contains the text of special tokens {found.total():,} times"
        f" ({texts}). It is encoded as ordinary text, which the model never sees in a chat: use"
        " --chat for chats, or --parse-special for text with a chat format in it"
    )


def _train_on_corpus(
    files: Sequence[AnyPath], validation_fraction: float, model: AnyPath, n_vocab: int
) -> None:
    documents = read_documents(files, validation_fraction)
    lines = split_lines(documents, "train", MAX_LINE_BYTES)
    compressed = (path.suffix in COMPRESSED for path in files)
    size = sum(file_size(path) * 4**c for path, c in zip(files, compressed, strict=True))
    every = max(1, -(-size // _TRAINING_BYTES))
    train_tokenizer(itertools.islice(lines, 0, None, every), model, n_vocab)


def _text_spans(documents: Iterable[SplitText], safe_split: SafeSplit) -> Iterator[_TextSpan]:
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


def tokenize_corpus(
    sources: Sequence[str],
    out: str | AnyPath,
    *,
    n_vocab: int | None = None,
    tokenizer: str | AnyPath | None = None,
    validation_fraction: float = 0.05,
    parse_special: bool = False,
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
        parse_special: whether the text of a special token is encoded as that token; otherwise it is
            ordinary text, which the model never sees in a chat.
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
            write_many(partial, load_tokenizer(tokenizer).files)
            model = load_tokenizer(partial).path
        elif n_vocab is not None:
            if progress:
                print(f"training a tokenizer of {n_vocab} tokens …", file=sys.stderr, flush=True)
            if workers == 1:
                _train_on_corpus(files, validation_fraction, model, n_vocab)
            else:  # in a worker, so that this process can still handle signals
                with worker_pool(1) as pool:
                    train = _train_on_corpus, files, validation_fraction, model, n_vocab
                    submit(pool, *train).result()
        else:
            raise InputError("tokenize: give a tokenizer, or the vocabulary size of one to train")
        loaded = load_tokenizer(model)
        safe_split = loaded.safe_split
        if parse_special:
            safe_split = split_around_special(safe_split, loaded.special)
        spans = _text_spans(read_documents(files, validation_fraction), safe_split)
        special_texts = Counter[str]()
        with contextlib.ExitStack() as stack:
            writers = {split: SplitWriter(partial / split, loaded.n_vocab) for split in SPLITS}
            advance = stack.enter_context(byte_progress("tokenizing", plain_size(files), progress))
            encode = functools.partial(_encode_task, model, parse_special)
            tasks = map_in_order(encode, _group_into_tasks(spans), workers)
            for encoded, found in stack.enter_context(contextlib.closing(tasks)):
                special_texts += found
                for span in encoded:
                    writers[span.split].append(span)
                    advance(span.n_bytes)
        if special_texts and not parse_special:
            _warn_of_special_texts(special_texts)
        for split, writer in writers.items():
            if not writer.documents and (split == "train" or validation_fraction):
                raise InputError(
                    f"corpus: no document for the {split} split in {len(files)} file(s): add text"
                    " or change validation_fraction"
                )
        return write_meta(
            partial, sources=sources, tokenizer=model, n_vocab=loaded.n_vocab, writers=writers
        )
