"""Divides a corpus into ranges of files, and these into parts, without reading the texts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from llama_jax.data import parquet_files
from llama_jax.data.bad_records import BadRecords
from llama_jax.data.corpus import (
    HASH_BYTES,
    HASH_RANGE,
    CorpusSettings,
    FileRange,
    hash_start,
    read_range,
)
from llama_jax.data.text_files import COMPRESSED, PARQUET, is_json_lines, open_plain
from llama_jax.runtime.storage import AnyPath, file_size
from llama_jax.tokenizer.split_points import never_split

MIN_PART_BYTES = 1 << 21  # of text; a smaller part costs more to write than to encode
MAX_PART_BYTES = 1 << 26
_PARTS = 64  # of a corpus whose parts are between these sizes
_RATIO = 4  # of the size of a text to its compressed file, estimated
# Below this number, the hash of each document would leave the number of held-out ones to chance.
_FEW_HELD_OUT = 32


def list_ranges(files: Iterable[AnyPath], settings: CorpusSettings) -> list[FileRange]:
    """Returns a range for each file: the complete file.

    Raises:
        InputError: a file can't be read, or a .json file has no JSON lines.
    """
    ranges = list[FileRange]()
    for path in files:
        size = file_size(path)
        if path.suffix == PARQUET:
            ranges.append(FileRange(path, "parquet", size))
        else:
            is_json = is_json_lines(path, settings.text_field)
            ranges.append(FileRange(path, "jsonl" if is_json else "text", size))
    return ranges


def text_size(part: FileRange) -> int:
    """Returns the size of the text of a complete file [bytes]; an estimate if it is compressed."""
    is_compressed = part.kind == "parquet" or part.path.suffix in COMPRESSED
    return part.size * (_RATIO if is_compressed else 1)


def divide(files: Sequence[FileRange], text_field: str) -> list[tuple[FileRange, ...]]:
    """Returns the ranges of each part: of one large file, or of several small ones.

    Args:
        files: a range for each complete file, from `list_ranges`.
        text_field: column of the texts of Parquet files.

    Raises:
        InputError: a Parquet file can't be read, or doesn't have the column.
    """
    total = sum(map(text_size, files))
    step = min(max(total // _PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
    parts = list[tuple[FileRange, ...]]()
    group, group_size = list[FileRange](), 0
    for part, size in _divide_files(files, step, text_field):
        if group and group_size + size > step:
            parts.append(tuple(group))
            group, group_size = [], 0
        group.append(part)
        group_size += size
    return [*parts, tuple(group)]


def _divide_files(
    files: Iterable[FileRange], step: int, text_field: str
) -> Iterator[tuple[FileRange, int]]:
    """Yields ranges of at most about `step` bytes of text, and their sizes."""
    for file in files:
        if file.kind == "parquet":
            yield from _divide_groups(file, parquet_files.group_sizes(file.path, text_field), step)
        elif file.path.suffix in COMPRESSED or file.size <= step:
            yield file, text_size(file)
        else:
            for start in range(0, file.size, step):
                stop = start + step if start + step < file.size else None
                part = FileRange(file.path, file.kind, file.size, start, stop, step)
                yield part, min(step, file.size - start)


def _divide_groups(
    file: FileRange, sizes: Sequence[int], step: int
) -> Iterator[tuple[FileRange, int]]:
    """Yields as `_divide_files` does, for a file whose row groups have texts of these sizes."""
    start, size = 0, 0
    for number, group_size in enumerate(sizes):
        if number > start and size + group_size > step:
            yield FileRange(file.path, file.kind, file.size, start, number), size
            start, size = number, 0
        size += group_size
    if sizes:
        yield FileRange(file.path, file.kind, file.size, start, len(sizes)), size


def hold_out(
    files: Sequence[FileRange], settings: CorpusSettings, fraction: float
) -> CorpusSettings:
    """Returns the settings by which about `fraction` of the documents are held out.

    A document is held out if the hash of its start is below a limit. In a large corpus the limit
    is `fraction` of all hashes. With few documents, chance would decide whether there is one below
    it: then the documents are counted, and the limit is such that the nearest number is held out.
    If that is none, because the corpus is a single book or a few, the end of each is held out.
    """
    limit = round(fraction * HASH_RANGE)
    if not fraction:
        return settings
    one_each = settings.documents == "file" and all(file.kind == "text" for file in files)
    is_small = sum(map(text_size, files)) <= MIN_PART_BYTES
    if one_each and len(files) * fraction < 1:
        return replace(settings, end_share=fraction)
    if one_each and len(files) * fraction < _FEW_HELD_OUT:
        hashes = [hash_start(start) for file in files if (start := _read_start(file.path))]
    elif is_small:
        hashes = [
            hash_start(next(text.parts)[:HASH_BYTES].encode())
            for file in files
            for text in read_range(file, settings, never_split, BadRecords())
        ]
    else:
        return replace(settings, hash_limit=limit)
    n = round(len(hashes) * fraction)
    return replace(settings, hash_limit=sorted(hashes)[n - 1] + 1 if n else 0)


def _read_start(path: AnyPath) -> bytes:
    with open_plain(path) as file:
        return file.read(HASH_BYTES)
