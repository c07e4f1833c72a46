"""MediaWiki: reads the pages of an XML dump as a stream, and converts wikitext to text."""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple
from xml.parsers import expat

from llama_jax.data.text_files import open_plain
from llama_jax.errors import InputError, check_package
from llama_jax.runtime.storage import AnyPath

_BLOCK = 1 << 20  # bytes that are parsed at once
LONGEST_PAGE = 1 << 26  # characters; MediaWiki's own limit is 2 MiB
_FILE, _CATEGORY = "6", "14"  # keys of namespaces
# English names work in all languages. The others are older or alternative names of 'File', which a
# dump doesn't list.
_ALWAYS_EXCLUDED = frozenset(
    {
        "file", "image", "category", "media", "bild", "fichier", "imagen", "imatge", "imagine",
        "imagem", "ficheiro", "afbeelding", "billede", "soubor", "grafika", "plik", "kép", "fájl",
        "immagine", "изображение", "картинка", "слика", "датотека", "slika", "datoteka",
    }
)  # fmt: skip


class Page(NamedTuple):
    """A page of a dump."""

    title: str
    namespace: str  # 0: article
    is_redirect: bool
    wikitext: str  # of its last revision


class Dump:
    """The pages of an XML dump, and what the dump says about itself before its first page.

    Attributes:
        language: the wiki's language: `de`.
        excluded_prefixes: the names, in this language, of the namespaces of files and categories:
            links to them are no text.
    """

    language: str = ""
    excluded_prefixes: frozenset[str] = _ALWAYS_EXCLUDED

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        self._parser = parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        parser.EntityDeclHandler = self._refuse_entity
        self._pages: list[Page] = []
        self._text: list[str] | None = None
        self._length = 0
        self._fields: dict[str, str] = {}
        self._namespace_key = ""
        self._elements = 0

    def pages(self) -> Iterator[Page]:
        """Yields the pages in order. Memory is bounded by the longest page.

        Raises:
            InputError: the file can't be read, is damaged or truncated, or is no dump.
        """
        with open_plain(self._path) as file:
            while block := file.read(_BLOCK):
                self._parse(block, False)
                yield from self._pages
                self._pages.clear()
            self._parse(b"", True)

    def _parse(self, block: bytes, is_last: bool) -> None:
        try:
            self._parser.Parse(block, is_last)
        except expat.ExpatError as error:
            raise InputError(
                f"{self._path} is not complete XML ({error}): fetch the dump again"
            ) from error

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        if self._elements == 1:
            if name != "mediawiki":
                raise InputError(
                    f"{self._path} is XML of <{name}>, no dump of MediaWiki: name a file such as"
                    " dewiki-latest-pages-articles-multistream.xml.bz2"
                )
            self.language = attributes.get("xml:lang", "")
        if name == "page":
            self._fields = {}
        elif name == "redirect":
            self._fields["redirect"] = "yes"
        elif name in ("title", "ns", "text", "namespace"):
            self._text, self._length = [], 0
            self._namespace_key = attributes.get("key", "")

    def _characters(self, text: str) -> None:
        if self._text is not None:
            self._length += len(text)
            if self._length > LONGEST_PAGE:
                raise InputError(f"{self._path} has a page above {LONGEST_PAGE} characters")
            self._text.append(text)

    def _end(self, name: str) -> None:
        if self._text is not None:
            text, self._text = "".join(self._text), None
            if name == "namespace" and self._namespace_key in (_FILE, _CATEGORY):
                self.excluded_prefixes |= {text.casefold()}
            self._fields[name] = text
        if name == "page":
            page = self._fields
            title, wikitext = page.get("title", ""), page.get("text", "")
            self._pages.append(Page(title, page.get("ns", "0"), "redirect" in page, wikitext))

    def _refuse_entity(self, name: str, *_: Any) -> None:
        # Entities that contain entities grow exponentially. No dump declares any.
        raise InputError(f"{self._path} declares the XML entity {name}: remove the declaration")


# Elements that are no running text.
_EXCLUDED_TAGS = {
    "table", "ref", "references", "gallery", "math", "chem", "ce", "hiero", "score", "timeline",
    "syntaxhighlight", "source", "imagemap", "graph", "mapframe", "maplink", "templatestyles",
    "templatedata", "categorytree", "inputbox", "section", "style", "indicator",
}  # fmt: skip
_INTERWIKI = re.compile(r"[a-z]{2,3}(-[a-z]+)*:")
_COMMENT = re.compile(r"(?s)<!--.*?(?:-->|\Z)")
_OPENED = re.compile(
    r"(?i)\{\{|<(?!br\b|hr\b|wbr\b|li\b|d[dt]\b|t[dhr]\b|p\b)[a-z]+(?:\s[^<>]*)?(?<!/)>"
)
_CLOSED = re.compile(r"\}\}|</")
# Elements that are opened and not closed. mwparserfromhell searches the end of each, in quadratic
# time or worse; an article has a few at most.
_MOST_UNCLOSED = 100
_SWITCH = re.compile(r"__[^\W\d_]+__")  # __NOTOC__
_NO_CONVERSION = re.compile(r"-\{(?:[^{}|]*\|)?([^{}|]*)\}-")  # Serbian: -{text}-
_EMPTY_PARENTHESES = re.compile(r" ?\([ ,;:–-]*\)")


def check_wikitext_package() -> None:
    """Checks that the parser of wikitext is installed.

    Raises:
        InputError: it isn't.
    """
    check_package("mwparserfromhell", "mwparserfromhell, which parses wikitext", "prepare")


def wikitext_to_text(wikitext: str, excluded_prefixes: Collection[str] = _ALWAYS_EXCLUDED) -> str:
    """Returns the text that a reader sees, without templates, tables, references and link targets.

    Paragraphs and headings are separated by an empty line; an item of a list is a line. A heading
    without text below it is left out. "" if the page can't be parsed.

    Args:
        excluded_prefixes: names, in lower case, of the namespaces to which a link is no text.
    """
    import mwparserfromhell
    from mwparserfromhell.nodes import Heading
    from mwparserfromhell.parser import ParserError

    code = _NO_CONVERSION.sub(r"\1", _COMMENT.sub("", wikitext))
    if len(_OPENED.findall(code)) - len(_CLOSED.findall(code)) > _MOST_UNCLOSED:
        return ""
    try:
        # Quotes of bold and italic type that are not balanced would stop the parsing of tags.
        nodes = mwparserfromhell.parse(code, skip_style_tags=True).nodes
    except ParserError:
        return ""
    parts = list[str]()
    headings = list[tuple[int, str]]()  # above the next text
    section = list[Any]()
    for node in [*nodes, None]:
        if node is not None and not isinstance(node, Heading):
            section.append(node)
            continue
        if text := _clean(_visible(section, excluded_prefixes)):
            parts += [*(title for _, title in headings), text]
            headings = []
        section = []
        if node is not None:
            title = _clean(_visible(node.title.nodes, excluded_prefixes))
            headings = [(n, t) for n, t in headings if n < node.level]
            headings += [(node.level, title)] if title else []
    return "\n\n".join(parts)


def _visible(nodes: Iterable[Any], excluded_prefixes: Collection[str]) -> str:
    """Returns the visible text of parsed nodes."""
    from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Tag, Text, Wikilink

    parts = list[str]()
    for node in nodes:
        inner: Any = None
        if isinstance(node, Text):
            parts.append(node.value)
        elif isinstance(node, HTMLEntity):
            parts.append(node.normalize())
        elif isinstance(node, Wikilink):
            target = str(node.title).strip()
            prefix = target.partition(":")[0].strip().casefold()
            if prefix in excluded_prefixes or _INTERWIKI.match(target):
                continue
            if node.text:
                inner = node.text
            else:
                parts.append(target.removeprefix(":"))
        elif isinstance(node, ExternalLink):
            inner = node.title if node.brackets else None
        elif isinstance(node, Tag):
            name = str(node.tag).strip().lower()
            if name in ("br", "hr"):
                parts.append("\n")
            elif name not in _EXCLUDED_TAGS:
                inner = node.contents
        if inner is not None:
            parts.append(_visible(inner.nodes, excluded_prefixes))
    return "".join(parts)


def _clean(text: str) -> str:
    """Removes what conversion leaves behind: empty parentheses, quotes of bold type, spaces."""
    text = _SWITCH.sub("", re.sub("'{2,}", "", text))
    # Spaces are joined first: a long run of them would cost quadratic time in the next pattern.
    text = _EMPTY_PARENTHESES.sub("", re.sub(r"[ \t\xa0]+", " ", text))
    lines = (line.strip() for line in text.split("\n"))
    # A table that is not closed stays in the text.
    lines = (line for line in lines if not line.startswith(("{|", "|")))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
