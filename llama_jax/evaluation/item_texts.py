"""The texts of evaluation sets, by which `llama-jax prepare` finds them in training data."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from llama_jax.config.prepare import SourceEntry
from llama_jax.data.prepare.decontamination import save_index
from llama_jax.errors import InputError
from llama_jax.evaluation.task_data import find_file, read_rows
from llama_jax.runtime.storage import AnyPath, parse_path

_FILES = Path(__file__).with_name("task_files")
# Passages come from books and Wikipedia, where a model may read them; it must not have seen the
# questions and answers. The other fields are categories and names.
_NOT_SEARCHED = {
    "passage", "article", "subject", "type", "activity_label", "entry_point", "pronoun",
    "occupation", "participant", "label", "answerKey",
}  # fmt: skip


class _TaskLoader(yaml.SafeLoader):
    """Reads task files without importing the functions that they name."""


_TaskLoader.add_constructor("!function", lambda loader, node: None)


def replace_evaluation_data(
    entries: Mapping[str, SourceEntry], out: AnyPath
) -> dict[str, SourceEntry]:
    """Returns the entries with n-grams in place of the evaluation sets in `decontaminate`.

    Args:
        entries: of the sources.
        out: as for `write_ngrams`.

    Raises:
        InputError: as `write_ngrams`.
    """
    folders = {entry.decontaminate for entry in entries.values() if entry.decontaminate}
    ngrams = {data: str(write_ngrams(parse_path(data), out)) for data in sorted(folders)}
    return {
        name: dataclasses.replace(entry, decontaminate=ngrams[entry.decontaminate])
        if entry.decontaminate
        else entry
        for name, entry in entries.items()
    }


def write_ngrams(data: AnyPath, out: AnyPath) -> AnyPath:
    """Writes the n-grams of the evaluation sets in a folder; returns the folder of their files.

    Args:
        data: as for `llama-jax eval --data`.
        out: folder of the new folder, whose name contains a hash of all texts: n-grams of other
            texts are other files.

    Raises:
        InputError: there is no evaluation set in `data`, or a file can't be read.
    """
    sets = find_evaluation_sets(data)
    texts = {name: [*read_item_texts(*sets[name])] for name in sorted(sets)}
    content = json.dumps(texts, sort_keys=True).encode()
    folder = out / f"evaluation-ngrams-{hashlib.sha256(content).hexdigest()[:8]}"
    save_index(folder, texts)
    return folder


def find_evaluation_sets(data: AnyPath) -> dict[str, tuple[AnyPath, tuple[str, ...]]]:
    """Returns the evaluated files of `llama-jax eval --data` in a folder, with their text fields.

    Examples for few-shot prompts and training splits are not among them.

    Raises:
        InputError: the folder has none.
    """
    found = dict[str, tuple[AnyPath, tuple[str, ...]]]()
    for task_file in sorted(_FILES.glob("*.yaml")):
        source = yaml.load(task_file.read_text(), _TaskLoader).get("dataset_kwargs")
        if not source:
            continue
        name = source["files"][source["evaluated"]]
        path = find_file(data, name)
        if path is not None:
            fields = (field for field in source["fields"] if field not in _NOT_SEARCHED)
            found[name] = path, tuple(fields)
    if not found:
        raise InputError(
            f"{data} has no evaluation set: save files there as for `llama-jax eval --data`"
            " (docs/evaluate.md)"
        )
    return found


def read_item_texts(path: AnyPath, fields: tuple[str, ...]) -> Iterator[list[str]]:
    """Yields the texts of each item of a file: of these fields, and of the lists in them.

    Raises:
        InputError: the file can't be read, or a row has none of the fields.
    """
    for number, row in enumerate(read_rows(path), 1):
        if not isinstance(row, Mapping) or not any(field in row for field in fields):
            raise InputError(f"{path}: row {number} has none of the fields {', '.join(fields)}")
        yield [text for field in fields for text in _strings(row.get(field))]


def _strings(value: Any) -> Iterator[str]:
    """Yields the strings in a JSON value, in their order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():  # in the order of the file, which the hash depends on
            if key not in _NOT_SEARCHED:
                yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
