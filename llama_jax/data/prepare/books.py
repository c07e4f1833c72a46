"""Books (LLaMA's paper, arXiv 2302.13971, section 2.1): Project Gutenberg and others.

A raw input is a book (.txt, .epub, .html) or JSON lines with one book each.
"""

import contextlib
import posixpath
import re
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote
from xml.parsers import expat

from llama_jax.config.prepare import BooksEntry
from llama_jax.data.prepare.commoncrawl import extract_text
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.minhash import check_minhash_package, overlap
from llama_jax.data.prepare.near_duplicates import NearDuplicates
from llama_jax.data.prepare.rules import Rule
from llama_jax.data.prepare.text_inputs import HTML_SUFFIXES, inner_suffix, read_json_documents
from llama_jax.data.text_files import open_plain
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath

PAPER = "arXiv 2302.13971, section 2.1, Gutenberg and Books3"
_GUTENBERG = "https://www.gutenberg.org/policy/license.html"
_LARGEST_CHAPTER = 1 << 26  # bytes of one file in an EPUB


def read(path: AnyPath) -> Iterator[Document]:
    """Yields the book of a file, or the books of JSON lines; the metadata have `title` if known.

    Raises:
        InputError: the file can't be read, is damaged, is not text, or is of no known kind.
    """
    suffix = inner_suffix(path)
    if suffix == ".epub":
        try:
            with open_plain(path) as file, zipfile.ZipFile(file) as archive:
                title, text = _read_epub(archive, str(path))
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} is damaged or truncated ({error}): fetch it again") from error
        yield Document(str(path), text, {"title": title} if title else {})
    elif suffix == ".txt":
        yield Document(str(path), _read_text(path), {})
    elif suffix in HTML_SUFFIXES:
        yield Document(str(path), extract_text(_read(path), None), {})
    else:
        yield from read_json_documents(path, "title")


def _read(path: AnyPath) -> bytes:
    with open_plain(path) as file:
        return file.read()


def _read_text(path: AnyPath) -> str:
    """Returns the text of a file: UTF-8, or the encoding that Project Gutenberg's header states."""
    data = _read(path)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        stated = re.search(rb"(?im)^character set encoding:[ \t]*([\w-]+)", data[:20_000])
        encoding = stated[1].decode() if stated else "utf-8"
        with contextlib.suppress(LookupError, UnicodeDecodeError):
            return data.decode(encoding).replace("\r\n", "\n")
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it or leave it out"
        ) from error


def _read_epub(archive: zipfile.ZipFile, name: str) -> tuple[str, str]:
    """Returns the title and the text of an EPUB: its chapters in reading order.

    Source: EPUB 3.3, https://www.w3.org/TR/epub-33/ (container, package document, spine).
    """

    def member(inner: str) -> bytes:
        try:
            with archive.open(inner) as file:
                return file.read(_LARGEST_CHAPTER)
        except KeyError as error:
            raise InputError(f"{name} is no EPUB: it has no {inner}") from error

    container = _xml_elements(member("META-INF/container.xml"), name)
    package_path = next(
        (a["full-path"] for tag, a, _ in container if tag == "rootfile" and "full-path" in a), ""
    )
    package = _xml_elements(member(package_path), name)
    title = next((text.strip() for tag, _, text in package if tag == "title"), "")
    files = {a.get("id"): a.get("href", "") for tag, a, _ in package if tag == "item"}
    folder = posixpath.dirname(package_path)
    chapters = list[str]()
    for tag, attributes, _ in package:
        if tag == "itemref" and (href := files.get(attributes.get("idref"))):
            chapter = member(posixpath.normpath(posixpath.join(folder, unquote(href))))
            chapters.append(extract_text(chapter, None))
    return title, "\n\n".join(filter(None, chapters))


def _xml_elements(data: bytes, name: str) -> list[tuple[str, dict[str, str], str]]:
    """Returns the elements of a small XML file in order: name without prefix, attributes, text."""
    elements = list[tuple[str, dict[str, str], list[str]]]()
    parser = expat.ParserCreate()

    def refuse(entity: str, *_: Any) -> None:
        raise InputError(f"{name} declares the XML entity {entity}: remove the declaration")

    def start(tag: str, attributes: dict[str, str]) -> None:
        elements.append((tag.rpartition(":")[2], attributes, []))

    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = start
    parser.CharacterDataHandler = lambda text: elements[-1][2].append(text)
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise InputError(f"{name} is damaged ({error}): fetch it again") from error
    return [(tag, attributes, "".join(text)) for tag, attributes, text in elements]


def rules(settings: BooksEntry) -> list[Rule | NearDuplicates]:
    """Returns the steps for books, in the order in which they apply.

    Raises:
        InputError: the package that finds near-duplicates is not installed.
    """
    check_minhash_package()
    return [
        Rule("Gutenberg frame", _GUTENBERG, _without_frame),
        NearDuplicates("overlapping books", PAPER, overlap, settings.max_overlap),
    ]


def _without_frame(document: Document) -> Document | None:
    text = remove_gutenberg_frame(document.text).strip()
    return document._replace(text=text) if text else None


# Today's line (a long title continues on the next line), and the one of the 1990s.
_START = re.compile(
    r"(?im)^[ \t]*(?:\*{3}[ \t]*START OF (?:THE|THIS) PROJECT GUTENBERG[^*]*\*{3}.*"
    r"|\*END[* ]+THE SMALL PRINT!.*)$"
)
_END = re.compile(
    r"(?im)^[ \t]*(?:\*{3}[ \t]*END OF (?:THE|THIS) PROJECT GUTENBERG"
    r"|END OF (?:THE )?PROJECT GUTENBERG(?:'S)? |END OF (?:THIS|THE) PROJECT GUTENBERG )"
)
_CREDITS = re.compile(
    r"(?is)\s*(?:produced|transcribed|(?:this )?e-?(?:text|book)(?: was)? (?:prepared|produced)"
    r"|prepared) (?:by|from).{,2000}?\n[ \t]*\n"
)
_LONGEST_HEADER = 60_000  # characters; that of the 1990s had 12,000
_LONGEST_FOOTER = 60_000  # today's licence has 19,000


def remove_gutenberg_frame(text: str) -> str:
    """Returns a book of Project Gutenberg without its header, credits and licence.

    A text without Project Gutenberg's marks is returned unchanged.
    """
    starts = [*_START.finditer(text, 0, _LONGEST_HEADER)]
    begin = starts[-1].end() if starts else 0
    end = _END.search(text, max(begin, len(text) - _LONGEST_FOOTER))
    body = text[begin : end.start() if end else None]
    if starts and (credits := _CREDITS.match(body)):
        body = body[credits.end() :]
    return body
