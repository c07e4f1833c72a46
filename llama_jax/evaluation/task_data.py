"""Rows of data sets for evaluation: local files with the fields of the original data sets.

The task files in `task_files/` name `read_splits` as lm-eval's `custom_dataset`.
"""

import functools
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from llama_jax.data.text_files import read_text
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, open_file, parse_path

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_TYPES = {"str": str, "int": int, "list": list, "dict": dict}

Rows = list[dict[str, Any]]


def read_splits(
    *,
    files: Mapping[str, str],
    evaluated: str,
    fields: Mapping[str, str | list[Any]],
    hub: str,
    config: str | None = None,
    where: Mapping[str, Any] | None = None,
    data: str | None = None,
    **_: Any,
) -> Any:
    """Returns the splits of a data set, as lm-eval expects them: a `datasets.DatasetDict`.

    A missing file of few-shot examples gives an empty split; `tasks.load_tasks` refuses it if the
    task needs examples.

    Args:
        files: the name of the file of each split, without suffix.
        evaluated: the split whose rows are scored. Its file must exist.
        fields: what a row must have: the type of the value by field (`str`, `int`, `list` or
            `dict`), a list of the allowed values, or 'in FIELD.KEY' for an item of a list in the
            row.
        hub: where the data set comes from: its name on huggingface.co.
        config: its configuration there.
        where: the rows to use: value by one of the fields. None: all.
        data: the folder of the files, local or in a bucket. None: the rows come from the hub.
        _: lm-eval passes the metadata of the task too.

    Raises:
        InputError: the file is missing or a row has other fields.
    """
    import datasets

    if data is None:
        return datasets.load_dataset(hub, config)
    datasets.disable_progress_bars()
    source = f"huggingface.co/datasets/{hub}" + (f" ({config})" if config else "")
    splits = {}
    for split, name in files.items():
        path = find_file(parse_path(data), name)
        if path is None and split == evaluated:
            raise InputError(
                f"{data} has no {name}.jsonl (nor .json, .parquet or a .gz of them): save there the"
                f" split '{split}' of {source}"
            )
        rows = _checked_rows(path, _frozen(fields), source) if path else []
        rows = [row for row in rows if not where or where.items() <= row.items()]
        if path and not rows:
            raise InputError(f"{path} has no rows{_condition(where)}: get it from {source} again")
        splits[split] = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict(splits)


def find_file(folder: AnyPath, name: str) -> AnyPath | None:
    """Returns the file of this name with any of the supported suffixes, or None."""
    paths = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _condition(where: Mapping[str, Any] | None) -> str:
    return "".join(f" with {name} {value!r}" for name, value in (where or {}).items())


def _frozen(fields: Mapping[str, str | list[Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, tuple(f) if isinstance(f, list) else f) for name, f in fields.items())


@functools.lru_cache(maxsize=8)  # the 57 tasks of MMLU read the same two files
def _checked_rows(path: AnyPath, fields: tuple[tuple[str, Any], ...], source: str) -> Rows:
    """Returns the rows of a file, only with these fields: others may have no type in Arrow.

    Raises:
        InputError: a row lacks a field of the data set, or has a wrong value in it.
    """
    rows = []
    for number, row in enumerate(read_rows(path), 1):
        wrong = [name for name, allowed in fields if not _has(row, name, allowed)]
        if wrong:
            found = (
                f"{wrong[0]} {json.dumps(row[wrong[0]])[:60]}"
                if isinstance(row, dict) and wrong[0] in row
                else ", ".join(row) if isinstance(row, dict) else type(row).__name__
            )  # fmt: skip
            raise InputError(
                f"{path}: row {number} has {found}, but the task needs"
                f" {', '.join(f'{name} ({_describe(allowed)})' for name, allowed in fields)}: use"
                f" the rows of {source}"
            )
        rows.append({name: row[name] for name, _ in fields})
    return rows


def _has(row: Any, name: str, allowed: Any) -> bool:
    """Returns whether a row has an allowed value of a field."""
    if not isinstance(row, dict) or name not in row:
        return False
    value = row[name]
    if isinstance(allowed, tuple):
        return any(value == a for a in allowed)
    if allowed.startswith("in "):
        field, key = allowed.removeprefix("in ").split(".")
        options = row.get(field)
        return isinstance(options, dict) and value in options.get(key, ())
    return isinstance(value, _TYPES[allowed])


def _describe(allowed: Any) -> str:
    return allowed if isinstance(allowed, str) else " or ".join(map(json.dumps, allowed))


def read_rows(path: AnyPath) -> Iterator[Any]:
    """Yields the rows of a file: JSON lines, one JSON array, or Parquet.

    Raises:
        InputError: it can't be read, or is in another format.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    text = "".join(read_text(path))
    try:
        if text.lstrip().startswith("["):
            yield from json.loads(text)
        else:
            yield from map(json.loads, filter(str.strip, text.split("\n")))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({error}): write one row per line, or one array"
        ) from error


def _read_parquet(path: AnyPath) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as file:
            return pyarrow.parquet.read_table(io.BytesIO(file.read())).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"can't read {path} as Parquet ({error}): get it again") from error
