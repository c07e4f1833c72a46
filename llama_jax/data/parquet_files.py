"""Reads the rows of Parquet files by row groups."""

import contextlib
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import InputError, missing_extra
from llama_jax.runtime.storage import AnyPath, open_file

_ROWS = 256  # that are decoded at once


@contextlib.contextmanager
def _open(path: AnyPath) -> Iterator[Any]:
    """Opens a file of Parquet.

    Raises:
        InputError: pyarrow is missing, or the file can't be read.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        problem = f"{path} is Parquet, and pyarrow is not installed"
        raise missing_extra(problem, "parquet") from error
    try:
        with open_file(path) as file:
            yield parquet.ParquetFile(file)
    except ArrowException as error:
        raise InputError(f"{path} is no Parquet file, or is damaged: {error}") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error


def group_sizes(path: AnyPath, text_field: str) -> list[int]:
    """Returns the size of the texts of each row group, without compression [bytes].

    Raises:
        InputError: the file can't be read, or has no column `text_field`.
    """
    with _open(path) as file:
        metadata = file.metadata
        columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        if text_field not in columns:
            raise InputError(
                f"{path} has no column {text_field!r} (it has: {', '.join(columns)[:300]}): name"
                " the column of the text with --text-field"
            )
        column = columns.index(text_field)
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        return [group.column(column).total_uncompressed_size for group in groups]


def read_rows(
    path: AnyPath, start: int, stop: int | None, *fields: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number of each row in the file, from 1, and its fields.

    Args:
        path: of the file.
        start: first row group.
        stop: row group after the last; None: to the end.
        fields: to read; those that the file doesn't have are absent.

    Raises:
        InputError: pyarrow is missing, or the file can't be read.
    """
    with _open(path) as file:
        metadata = file.metadata
        number = sum(metadata.row_group(i).num_rows for i in range(start))
        paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        columns = [name for name in fields if any(f"{p}.".startswith(f"{name}.") for p in paths)]
        groups = range(start, metadata.num_row_groups if stop is None else stop)
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
