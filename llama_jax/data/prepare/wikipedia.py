"""Encyclopedias in twenty languages (LLaMA's paper, arXiv 2302.13971, section 2.1).

A raw input is an XML dump of MediaWiki (.xml, .xml.bz2 …), or other text whose language is known:
JSON lines with `text` and `language`, or .txt and .html files whose path names the language.
"""

import re
from collections.abc import Iterator

from llama_jax.config.prepare import WIKIPEDIA_LANGUAGES, WikipediaEntry
from llama_jax.data.prepare.commoncrawl import extract_text
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.grouping import Grouping
from llama_jax.data.prepare.language import keep_paragraphs_of_stated_language
from llama_jax.data.prepare.mediawiki import Dump, check_wikitext_package, wikitext_to_text
from llama_jax.data.prepare.rules import Rule
from llama_jax.data.prepare.text_inputs import HTML_SUFFIXES, inner_suffix, read_json_documents
from llama_jax.data.text_files import open_plain
from llama_jax.runtime.storage import AnyPath

PAPER = "arXiv 2302.13971, section 2.1, Wikipedia"


def read(path: AnyPath) -> Iterator[Document]:
    """Yields the pages of a dump, or the texts of another file, each with its `language`.

    A page of a dump is wikitext, and has `namespace`, `redirect` ("yes" or "") and
    `excluded_prefixes` for the rules, which remove these metadata.

    Raises:
        InputError: the file can't be read, is damaged, or is of no known kind.
    """
    suffix = inner_suffix(path)
    if suffix == ".xml":
        yield from _read_dump(path)
    elif suffix == ".txt" or suffix in HTML_SUFFIXES:
        with open_plain(path) as file:
            body = file.read()
        text = body.decode(errors="replace") if suffix == ".txt" else extract_text(body, None)
        yield Document(str(path), text, {"language": language_of_path(str(path))})
    else:
        yield from read_json_documents(path, "language", "title")


def _read_dump(path: AnyPath) -> Iterator[Document]:
    dump = Dump(path)
    for page in dump.pages():
        metadata = {
            "language": dump.language,
            "title": page.title,
            "namespace": page.namespace,
            "redirect": "yes" if page.is_redirect else "",
            "excluded_prefixes": "|".join(sorted(dump.excluded_prefixes)),
        }
        yield Document(f"{dump.language}:{page.title}", page.wikitext, metadata)


_LANGUAGE = re.compile(r"([a-z]{2})(?:[-_@][a-zA-Z]+)*")  # de, pt_BR, sr@latin, ro-RO


def language_of_path(path: str) -> str:
    """Returns the language that a path names: the last of its parts that is a language's code.

    A part is a folder, or a piece of the file's name between two dots: `help/de/index.html`,
    `handbook/ro-RO/preface.html`, `preface.sv.html`. The code has two letters; "" if there is none.
    """
    *folders, name = path.split("/")
    for part in [*reversed(name.split(".")[1:-1]), *reversed(folders)]:
        if part == "C":  # the locale without translation
            return "en"
        if (found := _LANGUAGE.fullmatch(part)) and found[1] in WIKIPEDIA_LANGUAGES:
            return found[1]
    return ""


def rules(settings: WikipediaEntry) -> list[Rule | Grouping]:
    """Returns the steps for encyclopedias, in the order in which they apply.

    Raises:
        InputError: the classifier of languages, or the parser of wikitext, is not installed.
    """
    check_wikitext_package()

    def has_language(document: Document) -> Document | None:
        return document if document.metadata.get("language") in settings.languages else None

    return [
        Rule("language of the source", PAPER, has_language),
        Rule("articles", PAPER, keep_articles),
        Rule("formatting", PAPER, remove_formatting),
        keep_paragraphs_of_stated_language(settings.min_language_share, PAPER),
    ]


def keep_articles(document: Document) -> Document | None:
    """Returns a document unless it is a redirect, or a page of another namespace than articles."""
    metadata = document.metadata
    is_article = metadata.get("namespace", "0") == "0" and not metadata.get("redirect")
    return document if is_article else None


def remove_formatting(document: Document) -> Document | None:
    """Returns a page of a dump as text, None if nothing remains; other documents unchanged."""
    metadata = dict(document.metadata)
    if (prefixes := metadata.pop("excluded_prefixes", None)) is None:
        return document
    for key in ("namespace", "redirect"):
        metadata.pop(key)
    text = wikitext_to_text(document.text, frozenset(prefixes.split("|")))
    return document._replace(text=text, metadata=metadata) if text else None
