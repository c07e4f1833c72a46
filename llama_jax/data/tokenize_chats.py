"""Tokenizes chats or preferences into packed windows, in parallel processes.

The model learns only the answers of the assistant. Which tokens these are is known from encoding
each chat turn by turn, never from searching in its text.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from llama_jax.data.chats import Chat, Preference, parse_row
from llama_jax.data.packing import Example, Packer
from llama_jax.data.shard_writer import SplitWriter
from llama_jax.data.shards import Kind, write_meta
from llama_jax.data.text_files import (
    SPLITS,
    find_files,
    parse_json_line,
    plain_size,
    read_lines,
)
from llama_jax.data.worker_pool import map_in_order
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import check_absent, new_folder
from llama_jax.runtime.console import byte_progress
from llama_jax.runtime.cpu import cpu_cores
from llama_jax.runtime.storage import AnyPath, file_size, write_many
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

TrainOn = Literal["last", "all", "everything"]

_TASK_CHARACTERS = 1 << 18  # rows that a worker encodes in one task
_LISTED = 1000  # rows that are listed in meta.json because they are too long


class _Row(NamedTuple):
    location: str
    line: str


class _EncodedRow(NamedTuple):
    location: str
    example: Example
    n_bytes: int  # of the row


def tokenize_chats(
    sources: Sequence[str],
    out: str | AnyPath,
    *,
    tokenizer: str | AnyPath,
    seq_len: int,
    train_on: TrainOn = "all",
    validation_fraction: float = 0.05,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes rows of chats into the new folder `out` and returns the content of its `meta.json`.

    The first row decides whether the folder contains `chats` or `preferences`. An example that is
    longer than a window is left out; `too_long` in `meta.json` has the number of these, and the
    locations of the first 1,000.

    Args:
        sources: files, folders and globs of JSON lines.
        out: folder to create. It appears once it is complete; after an error it doesn't exist.
        tokenizer: file or folder of the tokenizer, which defines the chat format.
        seq_len: T, length of the windows [tokens].
        train_on: the last answer of each chat, all answers, or everything.
        validation_fraction: fraction of the examples that is held out.
        workers: number of processes; default: one per core.
        progress: whether to show the progress on standard error.

    Raises:
        InputError: `out` exists already, a source can't be read, a row is no chat or differs in
            kind from the first, the model's chat format doesn't accept it, or a split is empty.
        Fault: the system can't write `out`.
    """
    check_absent(out)
    files = find_files(sources)
    size = sum(file_size(file) for file in files)
    workers = workers or max(1, min(cpu_cores(), size // _TASK_CHARACTERS))
    kind = _first_kind(files)
    if kind == "preferences" and train_on == "everything":
        raise InputError(
            "--train-on everything: of preferences, only answers are compared: use last or all"
        )
    with new_folder(out) as partial:
        write_many(partial, load_tokenizer(tokenizer).files)
        loaded = load_tokenizer(partial)
        writers = {s: SplitWriter(partial / s, loaded.n_vocab, seq_len) for s in SPLITS}
        packers = {split: Packer(writer, loaded.eos_id) for split, writer in writers.items()}
        encode = functools.partial(_encode_task, loaded.path, kind, train_on)
        n_examples, too_long = 0, list[str]()
        with contextlib.ExitStack() as stack:
            advance = stack.enter_context(byte_progress("tokenizing", plain_size(files), progress))
            tasks = map_in_order(encode, _group_into_tasks(files), workers)
            for encoded in stack.enter_context(contextlib.closing(tasks)):
                for row in encoded:
                    advance(row.n_bytes)
                    if len(row.example.ids) > seq_len:
                        too_long.append(row.location)
                        continue
                    n_examples += 1
                    before, after = (
                        int(n * validation_fraction) for n in (n_examples - 1, n_examples)
                    )
                    packers[SPLITS[after > before]].append(row.example)
        for split, packer in packers.items():
            packer.finish()
            if not writers[split].documents and (split == "train" or validation_fraction):
                raise InputError(
                    f"no example for the {split} split: {n_examples} of"
                    f" {n_examples + len(too_long)} {kind} have at most {seq_len:,} tokens: add"
                    " rows, or change --seq-len or --validation-fraction"
                )
        return write_meta(
            partial,
            sources=sources,
            tokenizer=loaded.path,
            n_vocab=loaded.n_vocab,
            writers=writers,
            kind=kind,
            details={
                "train_on": train_on,
                "too_long": {"rows": len(too_long), "first": too_long[:_LISTED]},
            },
        )


def _first_kind(files: Iterable[AnyPath]) -> Kind:
    for file in files:
        for location, line in read_lines(file):
            return _kind(parse_row(parse_json_line(line, location), location))
    raise InputError("the files contain no chats: give JSON lines, one chat in each")


def _kind(row: Chat | Preference) -> Kind:
    return "preferences" if isinstance(row, Preference) else "chats"


def _group_into_tasks(files: Iterable[AnyPath]) -> Iterator[list[_Row]]:
    task, size = list[_Row](), 0
    for file in files:
        for location, line in read_lines(file):
            task.append(_Row(location, line))
            size += len(line)
            if size >= _TASK_CHARACTERS:
                yield task
                task, size = [], 0
    if task:
        yield task


_load_tokenizer_once = functools.lru_cache(maxsize=1)(load_tokenizer)


def _encode_task(
    tokenizer: AnyPath, kind: Kind, train_on: TrainOn, task: list[_Row]
) -> list[_EncodedRow]:
    loaded, encoded = _load_tokenizer_once(tokenizer), []
    for location, line in task:
        row = parse_row(parse_json_line(line, location), location)
        if _kind(row) != kind:
            raise InputError(
                f"{location}: this row is one of {_kind(row)}, but the first is one of {kind}:"
                " tokenize them into two folders"
            )
        try:
            example = encode_example(loaded, row, train_on)
        except InputError as error:
            raise InputError(f"{location}: {error}") from error
        encoded.append(_EncodedRow(location, example, len(line.encode(errors="replace"))))
    return encoded


def encode_example(
    tokenizer: Tokenizer, row: Chat | Preference, train_on: TrainOn = "all"
) -> Example:
    """Returns the tokens of a chat or of a preference, and which of them the model learns.

    Raises:
        InputError: see `Tokenizer.encode_example`.
    """
    chats = [row] if isinstance(row, Chat) else [row.chosen, row.rejected]
    parts = [_encode_chat(tokenizer, chat, train_on) for chat in chats]
    ids, trained = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    starts = (0,) if len(parts) == 1 else (0, len(parts[0][0]))
    n_bytes = sum(len(m["content"].encode()) for chat in chats for m in chat.messages)
    return Example(ids, trained, starts, n_bytes)


def _encode_chat(
    tokenizer: Tokenizer, chat: Chat, train_on: TrainOn
) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer.encode_example(chat.messages, chat.tools)
    trained = np.full(len(encoded.ids), train_on == "everything")
    indices = (i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
    answers = [
        answer
        for i, answer in zip(indices, encoded.answers, strict=True)
        if i not in chat.untrained
    ]
    for start, stop in answers[-1:] if train_on == "last" else answers:
        trained[start:stop] = True
    trained[:1] = False  # no position predicts the first token
    return np.array(encoded.ids, np.uint32), trained
