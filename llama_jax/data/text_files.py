"""Reads the files of a corpus, text and JSON lines, plain or compressed, a part at a time."""

import contextlib
import glob
import gzip
import io
import itertools
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from llama_jax.errors import InputError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SPLITS = ("train", "validation")
_PART = 1 << 18  # characters that are read at a time
_TEXT = {".txt", ".md", ".py", ".rst"}
_JSON_LINES = {".jsonl", ".ndjson"}


class Document(NamedTuple):
    """One text of the corpus, in parts, and the split that it belongs to.

    The parts are read from the file when they are asked for: before the next document is.
    """

    parts: Iterator[str]
    split: str


def find_files(sources: Sequence[str]) -> list[Path]:
    """Returns the files that `sources` name, sorted within each source.

    Args:
        sources: files, folders (searched for .txt .md .py .rst .jsonl .ndjson, and .json that holds
            texts; also .gz and .zst), globs, or `python-stdlib` for the sources of Python's
            standard library, tests left out.

    Raises:
        InputError: a source names no file.
    """
    found: list[Path] = []
    for source in sources:
        if source == "python-stdlib":
            files = _standard_library()
        elif Path(source).is_dir():
            files = [path for path in Path(source).rglob("*") if _is_wanted(path)]
        else:
            files = [Path(name) for name in glob.glob(source, recursive=True)]
        files = sorted(file for file in files if file.is_file())
        if not files:
            raise InputError(f"corpus: no text files at {source!r}: name files, folders or globs")
        found += files
    return list(dict.fromkeys(found))


def _standard_library() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in root.rglob("*.py"):
        if left_out.isdisjoint(path.relative_to(root).parts) and _is_utf8(path):
            yield path


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_wanted(path: Path) -> bool:
    """Tells whether a file in a folder belongs to the corpus; of .json files their content does."""
    suffix = _inner_suffix(path)
    if suffix != ".json" or not path.is_file():
        return suffix in _TEXT | _JSON_LINES
    beginning, record = _beginning(path)
    array = re.match(r"\s*\[\s*\{", beginning) and '"text"' in beginning
    return bool(array) or isinstance(record.get("text"), str)


def _inner_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def is_json_lines(path: Path) -> bool:
    """Tells whether each line of a file is a JSON object with a text, or the file is one text.

    The names .jsonl and .ndjson say the one, .txt, .md, .py and .rst the other. Under any other
    name (C4 and Dolma have .json.gz) the first line decides.

    Raises:
        InputError: a .json file begins otherwise.
    """
    suffix = _inner_suffix(path)
    if suffix in _TEXT | _JSON_LINES:
        return suffix in _JSON_LINES
    beginning, record = _beginning(path)
    if suffix != ".json" or record:
        return bool(record) and (suffix == ".json" or isinstance(record.get("text"), str))
    if not beginning.strip():
        return True
    array = beginning.lstrip().startswith("[")
    found, command = ("one JSON array", "jq -c '.[]'") if array else ("no JSON lines", "jq -c .")
    raise InputError(
        f'{path} is {found}: write each {{"text": …}} on a line of its own (`{command}`), or name'
        " the file .txt if its very characters are the text"
    )


def _beginning(path: Path) -> tuple[str, dict[str, Any]]:
    """Returns the first characters of a file, and the JSON object on its first line ({}: none)."""
    with _reading(path) as file:
        beginning = file.read(_PART)
        line = beginning.lstrip()
        if not line.startswith("{"):
            return beginning, {}
        if "\n" not in line:
            line += file.readline()
    try:
        record = json.loads(line.split("\n", 1)[0])
    except (ValueError, RecursionError):
        return beginning, {}
    return beginning, record if isinstance(record, dict) else {}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[IO[str]]:
    """Opens a file of UTF-8, also a compressed one; line ends stay as they are.

    Raises:
        InputError: it can't be read, is cut short, or is not UTF-8.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open(path, "rb"))
            if path.suffix == ".gz":
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif path.suffix == ".zst":
                file = stack.enter_context(zstd.ZstdFile(file))
            yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline=""))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} of a block): convert or leave it out"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise InputError(f"{path} is damaged or cut short ({error}): fetch it again") from error
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}") from error


def read_text(path: Path, start: int = 0, end: int = sys.maxsize) -> Iterator[str]:
    """Yields the parts of a text file from character `start` to `end`.

    Raises:
        InputError: names a file that can't be read, is not UTF-8, or is cut short.
    """
    at = 0
    with _reading(path) as file:
        while at < end and (part := file.read(_PART)):
            if wanted := part[max(0, start - at) : end - at]:
                yield wanted
            at += len(part)


def read_json_lines(path: Path) -> Iterator[str]:
    """Yields the `text` of each line.

    Raises:
        InputError: names file and line of what is not JSON or has no `text`, and a file that can't
            be read, is not UTF-8, or is cut short.
    """
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text_of(line, f"{path}:{number}")


def _text_of(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{place}: not valid JSON ({problem}): mend or remove it") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f'{place}: a line needs a string "text"; this one has: {found}')
    return text


def read_documents(files: Sequence[Path], validation_fraction: float) -> Iterator[Document]:
    """Yields all non-empty documents in order, every 1/fraction-th of them held out.

    Where there are too few documents for that (a single book), the last part of each is held
    out instead, cut at a line break.
    """
    number = 0
    few = len(files) * validation_fraction < 1 and not any(map(is_json_lines, files))
    for path in files:
        if few and validation_fraction:
            cut = _validation_start(path, validation_fraction)
            for split, start, end in ((0, 0, cut), (1, cut, sys.maxsize)):
                if parts := _non_empty(read_text(path, start, end)):
                    yield Document(parts, SPLITS[split])
            continue
        lines = is_json_lines(path)
        texts = (iter([text]) for text in read_json_lines(path)) if lines else [read_text(path)]
        for text in texts:
            if parts := _non_empty(text):
                before, number = number, number + 1
                held_out = int(number * validation_fraction) > int(before * validation_fraction)
                yield Document(parts, SPLITS[held_out])


def _non_empty(parts: Iterator[str]) -> Iterator[str] | None:
    first = next(parts, "")
    return itertools.chain([first], parts) if first else None


def _validation_start(path: Path, fraction: float) -> int:
    """Returns after how many characters the part of a text begins that is held out."""
    limit = round(sum(map(len, read_text(path))) * (1 - fraction))
    cut = at = 0
    for part in read_text(path, 0, limit):
        cut = max(cut, at + part.rfind("\n") + 1) if "\n" in part else cut
        at += len(part)
    return cut


def split_lines(documents: Iterator[Document], split: str, longest: int) -> Iterator[str]:
    """Yields the lines of one split, without those of more than `longest` characters."""
    for parts, own in documents:
        line = ""
        for part in parts if own == split else ():
            *ended, rest = part.split("\n")
            for end in ended:
                if len(line) + len(end) <= longest:
                    yield line + end
                line = ""
            # What is already too long need not grow.
            line = (line + rest)[: longest + 1]
        if len(line) <= longest:
            yield line
