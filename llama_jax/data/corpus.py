"""Reads ranges of corpus files as documents. A document is in the range in which it starts.

The borders of a range depend only on the bytes around them. So tasks that know nothing of each
other read each document exactly once. A plain text that is one document may have several ranges;
they meet where the tokenizer can be interrupted without changing its tokens.
"""

import codecs
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple

from llama_jax.data import parquet_files
from llama_jax.data.bad_records import EMPTY, BadRecords
from llama_jax.data.text_files import COMPRESSED, SPLITS, find_field, name_read_errors, open_plain
from llama_jax.runtime.storage import AnyPath
from llama_jax.tokenizer.split_points import SafeSplit

MAX_RECORD_BYTES = 1 << 26  # a longer record (line, paragraph) is left out: it must fit in memory
HASH_BYTES = 1 << 16  # the start of a text, which decides whether the text is held out
HASH_RANGE = 1 << 64
_BLOCK = 1 << 20  # bytes that are read at once
_WINDOW = 1 << 16  # bytes after the nominal start of a range in which its border is searched
_BLANK = rb"\r?\n\r?\n[\r\n]*"  # between paragraphs

FileKind = Literal["text", "jsonl", "parquet"]


@dataclass(frozen=True)
class CorpusSettings:
    """What the documents of a corpus are, and which of them are held out."""

    documents: str = "file"  # of a plain text: file, paragraph, line, or the text between two
    text_field: str = "text"  # of JSON lines and Parquet; 'a.b' is the field b of the object a
    id_field: str = "id"  # named in the report of bad records, if a record has it
    hash_limit: int = 0  # a document is held out if the hash of its start is below this number
    end_share: float = 0.0  # instead, this share of each text is held out at its end


@dataclass(frozen=True)
class FileRange:
    """A range of a file: row groups of Parquet, or bytes; each end moves to the next border."""

    path: AnyPath
    kind: FileKind
    size: int  # of the file [bytes]
    start: int = 0
    stop: int | None = None  # None: to the end
    step: int = 0  # the next ranges of the file start at multiples of it


class SplitText(NamedTuple):
    """A text of the corpus in parts, and its split.

    The iterator reads the parts from the file: use them up before you take the next text.
    """

    parts: Iterator[str]
    split: str
    first: bool = True  # whether the document starts with this text
    last: bool = True  # whether the document ends with this text


def hash_start(start: bytes) -> int:
    """Returns a hash of the first bytes of a text, below HASH_RANGE."""
    digest = hashlib.blake2b(start[:HASH_BYTES], digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _split_of(start: bytes, settings: CorpusSettings) -> str:
    return SPLITS[hash_start(start) < settings.hash_limit]


def read_range(
    part: FileRange, settings: CorpusSettings, safe_split: SafeSplit, bad: BadRecords
) -> Iterator[SplitText]:
    """Yields the texts of a range in order.

    Args:
        part: the range.
        settings: of the corpus.
        safe_split: of the tokenizer.
        bad: counts the records that can't be used.

    Raises:
        InputError: the file can't be read or is damaged, or `bad` exceeds its limit.
    """
    if part.kind == "parquet":
        yield from _read_rows(part, settings, bad)
    elif part.kind == "jsonl" or settings.documents != "file":
        yield from _read_records(part, settings, bad)
    else:
        with open_plain(part.path) as file:
            yield from _read_text(file, part, settings, safe_split, bad)


def _read_text(
    file: IO[bytes],
    part: FileRange,
    settings: CorpusSettings,
    safe_split: SafeSplit,
    bad: BadRecords,
) -> Iterator[SplitText]:
    """Yields the texts of a range of a file that is one document, or one and its held-out end."""
    end = sys.maxsize if part.path.suffix in COMPRESSED else part.size
    head = file.read(HASH_BYTES)
    if not head:
        bad.add(EMPTY, "", lambda: str(part.path))
    start, stop = (_border(file, part, at, end, safe_split) for at in (part.start, part.stop))
    texts = [(0, end, _split_of(head, settings))]
    if settings.end_share and head:
        held_out = _held_out_start(file, end, settings.end_share)
        texts = [(0, held_out, "train"), (held_out, end, "validation")]
    for first, last, split in texts:
        if (start_of := max(first, start)) < (stop_of := min(last, stop)):
            parts = _decode(file, part.path, start_of, stop_of, bad)
            at_start, at_end = start_of == first, stop_of == last
            text = next(parts, "")
            if text or not (at_start and at_end):
                yield SplitText(itertools.chain([text], parts), split, at_start, at_end)


def _border(
    file: IO[bytes], part: FileRange, at: int | None, end: int, safe_split: SafeSplit
) -> int:
    """Returns the first byte at or after `at` where a text can be split safely."""
    if at == 0:
        return 0
    while at is not None and at < end:
        file.seek(at)
        window = file.read(_WINDOW)
        skipped = len(window) - len(window.lstrip(bytes(range(0x80, 0xC0))))  # inside a character
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        text = decoder.decode(window[skipped:])
        if n := safe_split(text):
            return at + skipped + len(text[:n].encode("utf-8", "surrogateescape"))
        at += part.step or end
    return end


def _held_out_start(file: IO[bytes], end: int, share: float) -> int:
    """Returns where the held-out end of a text begins: after a line end, if there is one near."""
    size = file.seek(0, 2) if end == sys.maxsize else end
    limit = round(size * (1 - share))
    first = max(0, limit - _WINDOW)
    file.seek(first)
    window = file.read(limit - first)
    if b"\n" in window:
        return first + window.rindex(b"\n") + 1
    file.seek(limit)
    after = file.read(4)
    return limit + len(after) - len(after.lstrip(bytes(range(0x80, 0xC0))))


def _decode(
    file: IO[bytes], path: AnyPath, start: int, stop: int, bad: BadRecords
) -> Iterator[str]:
    """Yields the text of a range of bytes. A block that is not UTF-8 is one bad record."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with name_read_errors(path):
        file.seek(start)
    position, damaged = start, False
    while position < stop:
        # The reader of the parts is outside the block in which `open_plain` names errors.
        with name_read_errors(path):
            block = file.read(min(_BLOCK, stop - position))
        if damaged:
            block = block.lstrip(bytes(range(0x80, 0xC0)))
        damaged = False
        is_last = not block or position + len(block) >= stop
        try:
            if text := decoder.decode(block, final=is_last):
                yield text
        except UnicodeDecodeError as error:
            decoder.reset()
            damaged = True
            at = file.tell() - len(error.object) + error.start
            bad.add(
                "invalid UTF-8",
                "not UTF-8 text: convert it or leave it out",
                lambda: f"{path}:{_line_of(path, at)}",  # noqa: B023 (called at once)
            )
        if not block:
            return
        position = file.tell()


def _line_of(path: AnyPath, position: int) -> int:
    """Returns the number of the line that contains a byte of a file."""
    line = 1
    with open_plain(path) as file:
        while position > 0 and (block := file.read(min(_BLOCK, position))):
            line += block.count(b"\n")
            position -= len(block)
    return line


class _Record(NamedTuple):
    """A record, and where it is in its file."""

    position: int  # of its first byte
    line: int  # of its first byte, relative to the range
    content: bytes | None  # None: it is longer than MAX_RECORD_BYTES


def _separator(part: FileRange, settings: CorpusSettings) -> tuple[re.Pattern[bytes], int]:
    """Returns the pattern between two records, and the length of its longest incomplete match."""
    if part.kind == "jsonl" or settings.documents == "line":
        return re.compile(rb"\n"), 0
    if settings.documents == "paragraph":
        return re.compile(_BLANK), 3
    literal = settings.documents.encode()
    return re.compile(re.escape(literal)), len(literal) - 1


def _split_records(
    file: IO[bytes], start: int, pattern: re.Pattern[bytes], overlap: int
) -> Iterator[_Record]:
    """Yields the records from byte `start` on; memory stays bounded if a record is endless."""
    file.seek(start)
    rest, searched = b"", 0  # no separator starts in rest[:searched]
    position, line, skipped = start, 1, 0
    while True:
        block = file.read(_BLOCK)
        buffer, first, unsearched = rest + block, 0, len(rest) + len(block) - overlap
        for match in pattern.finditer(buffer, searched):
            if match.end() == len(buffer) and block:  # it may continue in the next block
                unsearched = min(unsearched, match.start())
                break
            yield _Record(position, line, None if skipped else buffer[first : match.start()])
            line += buffer.count(b"\n", first, match.end())
            position += skipped + match.end() - first
            first, skipped = match.end(), 0
        rest, searched = buffer[first:], max(0, unsearched - first)
        if not block:
            if rest or skipped:
                yield _Record(position, line, None if skipped else rest)
            return
        if len(rest) > MAX_RECORD_BYTES or skipped:
            line += rest.count(b"\n", 0, searched)
            skipped += searched
            rest, searched = rest[searched:], 0


def _record_border(
    file: IO[bytes], at: int | None, pattern: re.Pattern[bytes], overlap: int
) -> int:
    """Returns the end of the first separator that starts at or after `at`."""
    if not at:
        return sys.maxsize if at is None else 0
    records = _split_records(file, at, pattern, overlap)
    next(records, None)
    following = next(records, None)
    return sys.maxsize if following is None else following.position


def _read_records(
    part: FileRange, settings: CorpusSettings, bad: BadRecords
) -> Iterator[SplitText]:
    """Yields the texts of lines of JSON, or of the parts of a plain text between separators."""
    separator = _separator(part, settings)
    is_json = part.kind == "jsonl"
    what = "line" if is_json else "document"
    with open_plain(part.path) as file:
        start, stop = (_record_border(file, at, *separator) for at in (part.start, part.stop))
        if start == sys.maxsize:
            return
        lines_before: int | None = None

        def locate() -> str:
            nonlocal lines_before
            if lines_before is None:
                lines_before = _line_of(part.path, start) - 1
            return f"{part.path}:{lines_before + record.line}"

        for record in _split_records(file, start, *separator):
            if record.position >= stop:
                return
            if record.content is None:
                size = f"{MAX_RECORD_BYTES >> 20} MiB"
                bad.add("over-long", f"this {what} has more than {size}: divide it", locate)
            elif is_json and not record.content.strip():
                pass
            elif text := _text_of(record.content, settings, bad, locate, is_json):
                split = _split_of(text[:HASH_BYTES].encode(), settings)
                yield SplitText(iter((text,)), split)


def _text_of(
    content: bytes, settings: CorpusSettings, bad: BadRecords, locate: Any, is_json: bool
) -> str:
    """Returns the text of a record; empty if the record is bad, which `bad` then counts."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        bad.add("invalid UTF-8", "not UTF-8 text: convert it or leave it out", locate)
        return ""
    if not is_json:
        if not text:
            bad.add(EMPTY, "", locate)
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        bad.add("not JSON", f"not valid JSON ({problem}): correct or remove it", locate)
        return ""
    return _field_of(record, settings, bad, locate)


def _field_of(record: Any, settings: CorpusSettings, bad: BadRecords, locate: Any) -> str:
    """Returns the text of a parsed record, as `_text_of`."""

    def locate_with_id() -> str:
        name = find_field(record, settings.id_field)
        return locate() if name is None else f"{locate()} ({str(name)[:200]})"

    text = find_field(record, settings.text_field)
    if not isinstance(text, str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        problem = f'a line needs a string "{settings.text_field}"; this one has: {found[:300]}'
        bad.add("without text", f"{problem} (--text-field names the field)", locate_with_id)
        return ""
    if not text:
        bad.add(EMPTY, "", locate_with_id)
    elif not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            problem = "the text contains half of a surrogate pair, which UTF-8 can't encode"
            bad.add("invalid UTF-8", f"{problem}: remove it", locate_with_id)
            return ""
    return text


def _read_rows(part: FileRange, settings: CorpusSettings, bad: BadRecords) -> Iterator[SplitText]:
    fields = settings.text_field, settings.id_field
    for number, row in parquet_files.read_rows(part.path, part.start, part.stop, *fields):
        text = _field_of(
            row, settings, bad,
            lambda: f"{part.path}: row {number}",  # noqa: B023 (called at once)
        )  # fmt: skip
        if text:
            yield SplitText(iter((text,)), _split_of(text[:HASH_BYTES].encode(), settings))
