"""Pages of CommonCrawl by the CCNet pipeline (LLaMA's paper, arXiv 2302.13971, section 2.1).

A raw file is a WARC file, of whose HTML pages the main text is extracted, or a WET file, which has
the text that CommonCrawl extracted (CCNet reads these).
"""

import functools
import re
import unicodedata
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np

from llama_jax.config.prepare import CommonCrawlEntry
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.grouping import Grouping, hash_texts
from llama_jax.data.prepare.language import keep_languages
from llama_jax.data.prepare.quality import annotate_perplexity, keep_buckets, keep_references
from llama_jax.data.prepare.rules import Rule
from llama_jax.data.text_files import open_plain
from llama_jax.errors import InputError, check_package
from llama_jax.runtime.storage import AnyPath

CCNET = "CCNet, arXiv 1911.00359"
_MAX_PAGE = 1 << 26  # bytes
_HTML = ("text/html", "application/xhtml+xml")


def read(path: AnyPath) -> Iterator[Document]:
    """Yields the pages of a WARC or WET file; the id of a page is its URL.

    Raises:
        InputError: the file can't be read, is truncated, or is no WARC file.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    kinds = WarcRecordType.response | WarcRecordType.conversion
    # fastwarc treats the end of a truncated gzip member as the end of the file, so Python unpacks.
    with open_plain(path) as file:
        try:
            records = ArchiveIterator(
                cast(BinaryIO, file),
                record_types=kinds,
                parse_http=True,
                auto_decode="none",  # a body that fastwarc can't decode would be cut short
                stream_detect=False,
            )
            for record in records:
                if text := _page_text(record, path):
                    date = record.headers.get("WARC-Date") or ""
                    url = record.headers.get("WARC-Target-URI") or ""
                    yield Document(url, text, {"date": date})
        except OSError as error:
            if error.errno is not None:
                raise
            raise InputError(f"{path} is not a WARC file, or damaged ({error})") from error


def check_html_packages() -> None:
    """Checks that the packages that read WARC files and HTML pages are installed.

    Raises:
        InputError: one is missing.
    """
    for module in ("fastwarc.warc", "resiliparse.extract.html2text"):
        check_package(module, "resiliparse, which reads web pages", "prepare")


def _page_text(record: Any, path: AnyPath) -> str:
    """Returns the text of a page; '' if the record is no page, or can't be decoded."""
    http, body = record.http_headers, record.reader.read()
    if len(body) < record.content_length:
        raise InputError(f"{path} is truncated: fetch it again")
    if http is None:  # of a WET file
        return body.decode(errors="replace")
    if http.status_code != 200 or record.http_content_type not in _HTML:
        return ""
    try:
        page = decode_body(body, http.get("Transfer-Encoding"), http.get("Content-Encoding"))
    except (ValueError, zlib.error):
        return ""
    return extract_text(page, record.http_charset)


def decode_body(body: bytes, transfer: str | None, content: str | None) -> bytes:
    """Returns the content of an HTTP response, up to 64 MiB of it.

    Args:
        body: as it was sent. (CommonCrawl stores it decoded, other crawlers don't.)
        transfer: the header Transfer-Encoding.
        content: the header Content-Encoding: gzip and deflate are supported.

    Raises:
        ValueError, zlib.error: it has another encoding than the headers state, or an unknown one.
    """
    if "chunked" in (transfer or "").lower():
        body = _join_chunks(body)
    for encoding in reversed((content or "").lower().replace(" ", "").split(",")):
        if encoding in ("gzip", "x-gzip"):
            body = zlib.decompressobj(31).decompress(body, _MAX_PAGE)
        elif encoding == "deflate":
            bits = 15 if body[:1] == b"\x78" else -15  # of zlib's format, or bare
            body = zlib.decompressobj(bits).decompress(body, _MAX_PAGE)
        elif encoding not in ("", "identity"):
            raise ValueError(f"the content encoding {encoding} is unknown")
    return body


def _join_chunks(body: bytes) -> bytes:
    chunks, position = list[bytes](), 0
    while True:
        end = body.index(b"\r\n", position)
        size = int(body[position:end].split(b";")[0], 16)
        if size <= 0:
            return b"".join(chunks)
        chunks.append(body[end + 2 : end + 2 + size])
        position = end + 2 + size + 2


def extract_text(body: bytes, charset: str | None) -> str:
    """Returns the main text of an HTML page, without navigation, headers and footers.

    If the blocks of a page are nested deeper than any browser allows, all text is returned.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    stated = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    encoding = stated or detect_encoding(body, from_html_meta=True) or "utf-8"
    html = bytes_to_str(body, encoding)
    # The time to find the main text grows with the square of this depth: 6 s at 10,000.
    main_content = _depth(html) <= _MAX_DEPTH
    return extract_plain_text(html, main_content=main_content, alt_texts=False)


_MAX_DEPTH = 512  # the limit of browsers
_NESTED = re.compile(r"<(/?)(?:div|article)\b", re.IGNORECASE)


def _depth(html: str) -> int:
    """Returns how deeply the blocks of a page are nested."""
    deepest = depth = 0
    for tag in _NESTED.finditer(html):
        depth = max(0, depth - 1) if tag[1] else depth + 1
        deepest = max(deepest, depth)
    return deepest


def rules(settings: CommonCrawlEntry) -> list[Rule | Grouping]:
    """Returns the steps of the CCNet pipeline, and the paper's classifier of references.

    Raises:
        InputError: a package or a model is missing.
    """
    check_html_packages()
    steps: list[Rule | Grouping] = [
        long_enough(settings.min_characters),
        duplicate_lines(settings.line_files),
        keep_languages(settings.languages, settings.min_language, f"{CCNET}, section 3.2"),
    ]
    if settings.quality_model is not None and settings.quality_tokenizer is not None:
        steps.append(annotate_perplexity(settings.quality_model, settings.quality_tokenizer))
        if settings.perplexity_limits is not None:
            steps.append(keep_buckets(settings.perplexity_limits, settings.buckets))
    if settings.reference_model is not None:
        label, least = settings.reference_label, settings.min_reference
        steps.append(keep_references(settings.reference_model, label, least))
    return steps


def long_enough(min_characters: int) -> Rule:
    """Returns the rule that removes short documents."""
    name = f"at least {min_characters} characters"
    return Rule(name, CCNET, lambda d: d if len(d.text) >= min_characters else None)


def duplicate_lines(n_files: int | None) -> Grouping:
    """Returns the step that removes each line that an earlier line equals, in the same page too.

    Lines are compared as `normalize_line` returns them. A page without lines is removed.

    Args:
        n_files: number of consecutive files whose lines are compared; None: all.
    """
    return Grouping(
        "duplicate lines",
        f"{CCNET}, section 3.1",
        keys=lambda document: hash_texts(
            [key for line in document.text.split("\n") if (key := normalize_line(line))]
        ),
        remove=_remove_lines,
        files=n_files,
    )


def _remove_lines(document: Document, units: np.ndarray) -> Document | None:
    removed, lines, unit = {*units.tolist()}, list[str](), -1
    for line in document.text.split("\n"):
        unit += bool(normalize_line(line))
        if unit not in removed or not normalize_line(line):
            lines.append(line)
    # Empty lines around removed ones would add up.
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return document._replace(text=text) if normalize_line(text) else None


_NUMBER = re.compile(r"\d")


@functools.cache
def _no_words() -> dict[int, None]:
    """Returns the translation that removes punctuation, symbols and control characters."""
    return dict.fromkeys(c for c in range(0x20000) if unicodedata.category(chr(c))[0] in "PSC")


def normalize_line(line: str) -> str:
    """Returns a line in lower case, digits as 0, without accents, punctuation and symbols.

    '' if nothing remains: such lines are not compared.
    """
    line = line.lower()
    if not line.isascii():
        line = "".join(
            c for c in unicodedata.normalize("NFD", line) if not unicodedata.combining(c)
        )
    return " ".join(_NUMBER.sub("0", line).translate(_no_words()).split())
