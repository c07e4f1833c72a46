"""Reads the files of a corpus in parts: text or JSON lines, plain or compressed."""

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llama_jax.errors import InputError
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.storage import AnyPath, file_size, list_files, open_file, parse_path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SPLITS = ("train", "validation")
_PART_CHARACTERS = 1 << 18  # that are read from a file at once
PARQUET = ".parquet"
_TEXT = {".txt", ".md", ".py", ".rst"}
_JSON_LINES = {".jsonl", ".ndjson"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open, ".tgz": gzip.open,
    ".bz2": bz2.open, ".tbz2": bz2.open,
    ".xz": lzma.open, ".txz": lzma.open,
    ".zst": zstd.open,
}  # fmt: skip
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstd.ZstdError)


def find_files(sources: Sequence[str]) -> list[AnyPath]:
    """Returns the files of `sources`, sorted within each source.

    Args:
        sources: files, folders (searched for .txt .md .py .rst .jsonl .ndjson .parquet, and .json
            files that contain texts; also compressed: `COMPRESSED`), globs, or `python-stdlib` for
            the sources of Python's standard library without its tests.

    Raises:
        InputError: a source matches no file.
    """
    found: list[AnyPath] = []
    for source in sources:
        if source == "python-stdlib":
            files = _standard_library()
        elif inside := list_files(path := parse_path(source)):
            files = [file for file in inside if _is_corpus_file(file)]
        elif isinstance(path, BucketPath):
            files = path.matches()
        else:
            names = glob.glob(source, recursive=True)
            files = [Path(name) for name in names if os.path.isfile(name)]
        files = sorted(files)
        if not files:
            raise InputError(f"corpus: no text files at {source!r}: name files, folders or globs")
        found += files
    return list(dict.fromkeys(found))


def _standard_library() -> Iterator[AnyPath]:
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in root.rglob("*.py"):
        if excluded.isdisjoint(path.relative_to(root).parts) and _is_utf8(path):
            yield path


def _is_utf8(path: AnyPath) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_corpus_file(path: AnyPath) -> bool:
    """Returns whether a file in a folder is part of the corpus: by its name, or .json content."""
    suffix = _inner_suffix(path)
    if suffix != ".json":
        return suffix in _TEXT | _JSON_LINES or path.suffix == PARQUET
    start, record = _read_start(path)
    array = re.match(r"\s*\[\s*\{", start) and '"text"' in start
    return bool(array) or isinstance(record.get("text"), str)


def _inner_suffix(path: AnyPath) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_json_lines(path: AnyPath, text_field: str = "text") -> bool:
    """Returns True if each line of a file is a JSON object with a text, False if it is one text.

    Files named .jsonl or .ndjson are JSON lines; .txt, .md, .py and .rst are one text. For any
    other name (C4 and Dolma use .json.gz), the first line decides.

    Raises:
        InputError: the first line of a .json file is not a JSON object.
    """
    suffix = _inner_suffix(path)
    if suffix in _TEXT | _JSON_LINES:
        return suffix in _JSON_LINES
    start, record = _read_start(path)
    if suffix != ".json" or record:
        has_text = isinstance(find_field(record, text_field), str)
        return bool(record) and (suffix == ".json" or has_text)
    if not start.strip():
        return True
    is_array = start.lstrip().startswith("[")
    array, other = ("one JSON array", "jq -c '.[]'"), ("not JSON lines", "jq -c .")
    content, command = array if is_array else other
    raise InputError(
        f"{path} is {content}: write each row on its own line (`{command}`), or rename"
        " the file to .txt if the complete file is one text"
    )


def find_field(record: Any, name: str) -> Any:
    """Returns a field of a JSON object, or None; 'a.b' also names the field b of the object a.

    >>> find_field({"content": {"text": "once"}}, "content.text")
    'once'
    """
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    outer, _, inner = name.partition(".")
    return find_field(record.get(outer), inner) if inner else None


def _read_start(path: AnyPath) -> tuple[str, dict[str, Any]]:
    """Returns the first characters of a file, and the JSON object on its first line ({}: none)."""
    with _open_text(path) as file:
        start = file.read(_PART_CHARACTERS)
        line = start.lstrip()
        if not line.startswith("{"):
            return start, {}
        if "\n" not in line:
            line += file.readline()
    try:
        record = json.loads(line.split("\n", 1)[0])
    except (ValueError, RecursionError):
        return start, {}
    return start, record if isinstance(record, dict) else {}


@contextlib.contextmanager
def open_plain(path: AnyPath) -> Iterator[IO[bytes]]:
    """Opens a file, plain or compressed (.gz .bz2 .xz .zst), to read its bytes without compression.

    Raises:
        InputError: the file can't be read, or is truncated or damaged.
    """
    with name_read_errors(path), contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(open_file(path))
        if unpack := _UNPACK.get(path.suffix):
            file = stack.enter_context(unpack(file))
        yield file


@contextlib.contextmanager
def name_read_errors(path: AnyPath) -> Iterator[None]:
    """Names a file in the errors of reading and decompressing it.

    Raises:
        InputError: the file can't be read, or is truncated or damaged.
    """
    try:
        yield
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error
    except OSError as error:
        if error.errno is None:  # bz2 reports damage by such an error
            raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error
        raise InputError(f"can't read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _open_text(path: AnyPath) -> Iterator[IO[str]]:
    """Opens a UTF-8 file, plain or compressed, without translating line ends.

    Raises:
        InputError: the file can't be read, is truncated, or is not UTF-8.
    """
    try:
        with open_plain(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            yield text
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} of a block): convert it or leave it out"
        ) from error


def read_text(path: AnyPath) -> Iterator[str]:
    """Yields the parts of a text file.

    Raises:
        InputError: the file can't be read, is truncated, or is not UTF-8.
    """
    with _open_text(path) as file:
        while part := file.read(_PART_CHARACTERS):
            yield part


def read_lines(path: AnyPath) -> Iterator[tuple[str, str]]:
    """Yields the location (file and number) and the content of each line that is not blank.

    Raises:
        InputError: the file can't be read, is truncated, is not UTF-8, or is one JSON array.
    """
    if _inner_suffix(path) == ".json":
        is_json_lines(path)  # refuses an array
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line


def parse_json_line(line: str, location: str) -> Any:
    """Returns the JSON value of a line.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{location}: not valid JSON ({problem}): correct or remove it") from error


def plain_size(files: Sequence[AnyPath]) -> int | None:
    """Returns the size of the text in `files` [bytes]; None (unknown) if a file is compressed."""
    if any(file.suffix in COMPRESSED for file in files):
        return None
    return sum(map(file_size, files))


def split_lines(parts: Iterator[str], max_characters: int) -> Iterator[str]:
    """Yields the lines of a text, except those with more than `max_characters` characters."""
    line = ""
    for part in parts:
        *line_ends, rest = part.split("\n")
        for end in line_ends:
            if len(line) + len(end) <= max_characters:
                yield line + end
            line = ""
        # A line that is already too long doesn't have to grow: this bounds the memory.
        line = (line + rest)[: max_characters + 1]
    if len(line) <= max_characters:
        yield line
