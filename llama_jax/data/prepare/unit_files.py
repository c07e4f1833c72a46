"""Files of the units of a grouping step: fixed-size records in sections that are read one by one.

The layout is little-endian: W and the number S of sections (int64), the S + 1 offsets of the
sections in records (int64), the records. A record is the W numbers of a key, the number of the
document in its file, and the number of the unit in its document.
"""

from collections.abc import Sequence

import numpy as np

from llama_jax.data.prepare.document import replace_any_file
from llama_jax.runtime.storage import AnyPath, open_file


def unit_records(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the records [n] of the units of all documents of a file.

    Args:
        keys: of each document, uint64 [units, W].
    """
    W = next((array.shape[1] for array in keys if len(array)), 1)
    lengths = np.array([len(array) for array in keys], np.int64)
    records = np.empty(int(lengths.sum()), _record_type(W))
    if len(records):
        records["key"] = np.concatenate([array for array in keys if len(array)])
    records["document"] = np.repeat(np.arange(len(keys)), lengths)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    records["unit"] = np.arange(len(records)) - starts
    return records


def partition_of(records: np.ndarray, n_partitions: int) -> np.ndarray:
    """Returns the partition of each record: equal keys are in one, and all are about equal."""
    return (records["key"][:, 0] >> np.uint64(32)) * np.uint64(n_partitions) >> np.uint64(32)


def write_sections(
    path: AnyPath, records: np.ndarray, section: np.ndarray, n_sections: int
) -> None:
    """Writes records by section, in their order within a section.

    Args:
        path: of the file, which appears complete.
        records: [n].
        section: of each record, [n].
        n_sections: number of sections.
    """
    order = np.argsort(section, kind="stable")
    offsets = np.searchsorted(section[order], np.arange(n_sections + 1))
    header = np.array([records.dtype["key"].shape[0], n_sections, *offsets], "<i8")
    with replace_any_file(path) as partial, open(partial, "wb") as file:
        file.write(header.tobytes())
        file.write(records[order].tobytes())


def read_section(path: AnyPath, section: int) -> np.ndarray:
    """Returns the records of one section [n]."""
    with open_file(path) as file:
        W, n_sections = np.frombuffer(file.read(16), "<i8")
        file.seek(8 * section, 1)
        start, end = np.frombuffer(file.read(16), "<i8")
        record = _record_type(int(W))
        file.seek(8 * (3 + int(n_sections)) + int(start) * record.itemsize)
        return np.frombuffer(file.read(int(end - start) * record.itemsize), record)


def concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the records of all arrays; an empty one may have another W."""
    filled = [array for array in arrays if len(array)]
    return np.concatenate(filled) if filled else np.empty(0, _record_type(1))


def _record_type(W: int) -> np.dtype:
    return np.dtype([("key", "<u8", (W,)), ("document", "<u4"), ("unit", "<u4")])
