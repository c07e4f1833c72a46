"""Pages of CommonCrawl by the heuristics of C4 (Raffel et al., arXiv 1910.10683, section 2.2).

The rules on lines come first, so that the rules on pages see the lines that remain.
"""

import re
from collections.abc import Callable

import numpy as np

from llama_jax.config.prepare import C4Entry
from llama_jax.data.prepare.commoncrawl import check_html_packages, read
from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.grouping import Grouping, hash_texts
from llama_jax.data.prepare.language import keep_languages
from llama_jax.data.prepare.rules import Rule
from llama_jax.errors import InputError
from llama_jax.runtime.storage import parse_path, read_file

__all__ = ["read", "rules"]

C4 = "C4, arXiv 1910.10683, section 2.2"
_SPAN = 3  # sentences


def rules(settings: C4Entry) -> list[Rule | Grouping]:
    """Returns C4's steps.

    Raises:
        InputError: a package or the list of words is missing.
    """
    check_html_packages()
    n = settings.min_sentences
    steps: list[Rule | Grouping] = [
        Rule("citation marks", C4, remove_citation_marks),
        line_rule("lines end with punctuation", ends_with_punctuation),
        line_rule(
            f"lines of {settings.min_words} words", lambda s: len(s.split()) >= settings.min_words
        ),
        line_rule("lines about JavaScript", lambda line: "javascript" not in line.lower()),
        line_rule("lines of policies", lambda line: not _POLICY.search(line)),
        page_rule("lorem ipsum", lambda text: "lorem ipsum" not in text.lower()),
        page_rule("curly brackets", lambda text: "{" not in text),
        page_rule(f"{n} sentences", lambda text: count_sentences(text) >= n),
    ]
    if settings.bad_words is not None:
        pattern = bad_words_pattern(settings.bad_words)
        steps.append(page_rule("bad words", lambda text: not pattern.search(text)))
    return [
        *steps,
        keep_languages(settings.languages, settings.min_language, C4),
        Grouping("duplicate spans", C4, keys=_span_keys, remove=_remove_spans),
        page_rule(f"{n} sentences remain", lambda text: count_sentences(text) >= n),
    ]


def line_rule(name: str, remains: Callable[[str], bool]) -> Rule:
    """Returns the rule that removes lines, and a document without any that isn't blank."""

    def apply(document: Document) -> Document | None:
        lines = document.text.split("\n")
        left = [line for line in lines if not line.strip() or remains(line)]
        if len(left) == len(lines):
            return document
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(left)).strip()
        return document._replace(text=text) if text else None

    return Rule(name, C4, apply)


def page_rule(name: str, remains: Callable[[str], bool]) -> Rule:
    """Returns the rule that removes documents."""
    return Rule(name, C4, lambda document: document if remains(document.text) else None)


_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_END_MARK = re.compile(r"[.!?\"”]$")
_POLICY = re.compile(
    r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.I
)


def remove_citation_marks(document: Document) -> Document:
    """Removes the marks of citations in Wikipedia's pages: [1], [citation needed], [edit]."""
    text = _CITATION.sub("", document.text)
    return document if text == document.text else document._replace(text=text)


def ends_with_punctuation(line: str) -> bool:
    """Returns whether a line ends with a period, exclamation, question or end quotation mark.

    An ellipsis is no end of a sentence.
    """
    line = line.rstrip()
    return bool(_END_MARK.search(line)) and not line.endswith("...")


# A sentence ends with its marks and closing quotes before a space, or with its line.
_SENTENCE = re.compile(r"\S[^\n]*?(?:[.!?]+[\"”'’)\]]*(?=\s|$)|(?=\n|$))")


def find_sentences(text: str) -> list[tuple[int, int]]:
    """Returns first and last + 1 character of each sentence."""
    return [match.span() for match in _SENTENCE.finditer(text)]


def count_sentences(text: str) -> int:
    """Returns the number of sentences. (C4 counts them with NLTK, whose model is a download.)"""
    return len(find_sentences(text))


def bad_words_pattern(path: str) -> re.Pattern[str]:
    """Returns the pattern of the words and phrases in a file, one a line, as whole words.

    Raises:
        InputError: the file can't be read, or is empty.
    """
    try:
        lines = read_file(parse_path(path)).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"bad_words: can't read {path}: {reason}") from error
    words = sorted({line.strip() for line in lines} - {""}, key=lambda word: (-len(word), word))
    if not words:
        raise InputError(f"bad_words: {path} has no words: add one a line, or omit the key")
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)


def _span_keys(document: Document) -> np.ndarray:
    """Returns the keys of all spans of three consecutive sentences."""
    sentences = [document.text[start:end] for start, end in find_sentences(document.text)]
    spans = zip(*(sentences[i:] for i in range(_SPAN)), strict=False)
    return hash_texts(["\n".join(span) for span in spans])


def _remove_spans(document: Document, units: np.ndarray) -> Document | None:
    sentences, parts, position = find_sentences(document.text), list[str](), 0
    for number in sorted({unit + i for unit in units.tolist() for i in range(_SPAN)}):
        start, end = sentences[number]
        parts.append(document.text[position:start])
        position = end
    text = "".join([*parts, document.text[position:]])
    text = re.sub(r"[ \t]+(?=\n|$)|(?m:^)[ \t]+", "", re.sub(r"[ \t]{2,}", " ", text))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return document._replace(text=text) if text else None
