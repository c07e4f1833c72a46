"""Finds points where a long text can be split without changing its tokens.

A tokenizer needs about 50 bytes of memory for each character of a call: a text of 200 MB would take
9 GB. The spans of a split text take little memory, and processes can encode them in parallel. A
split is safe if no token can cross it and the tokens on each side don't depend on the other side.
The functions here find such points for each kind of tokenizer and explain why they are safe.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama_jax.tokenizer.build import LLAMA3_PATTERN, sequence

SPAN_CHARACTERS = 1 << 18  # a text of at most this length is not split
# A text without a safe split for this many characters is split anywhere: memory stays bounded, and
# one token may differ. Prose and code have no such stretch; base64 or DNA on one line does.
MAX_SPAN_CHARACTERS = 1 << 20

# SentencePiece's character for a space, and the characters that our own tokenizers write for it
# where a text contains it.
ESCAPED = "▁\ufdd0\ufdd1\ufdd2"

# Returns the length of the longest prefix of a text after which a split is safe, whatever text
# follows; 0 if there is none. At least one character remains after the prefix.
SafeSplit = Callable[[str], int]


def split_text(parts: Iterable[str], safe_split: SafeSplit) -> Iterator[str]:
    """Yields the spans of the text that `parts` form; their ids, concatenated, are the text's.

    All spans but the first must be encoded with `continued=True`.
    """
    rest = ""
    for part in parts:
        for start in range(0, len(part), SPAN_CHARACTERS):  # a part may be long
            rest += part[start : start + SPAN_CHARACTERS]
            if len(rest) > SPAN_CHARACTERS and (end := safe_split(rest)):
                yield rest[:end]
                rest = rest[end:]
    yield rest


def never_split(text: str) -> int:
    """Returns 0: a tokenizer with unknown rules encodes each text in one call."""
    return 0


def safe_split_by_pattern(pattern: str) -> SafeSplit:
    """Returns the SafeSplit of tokenizers that split a text into words before they merge bytes.

    `pattern` has zero width. It matches only where a word always ends, and where the words on each
    side are the same without the text of the other side. Words are encoded one by one, so a split
    there is safe.
    """
    point = re.compile(pattern)
    return lambda text: _last_safe(text, lambda end: point.match(text, end) is not None)


def safe_split_by_pairs(vocabulary: Iterable[str], altered: str) -> SafeSplit:
    """Returns the SafeSplit of byte-pair encodings that don't split a text into words first.

    The result of every merge is a piece of the vocabulary. If no piece contains the character
    before the split followed by the character after it, no merge crosses the split. Merges run in
    the order of their rank and then from left to right, and each depends on its two parts only; so
    the merges of one side, and their order, don't depend on the other side.

    Args:
        vocabulary: all pieces that a merge can produce, with U+2581 for a space.
        altered: characters that are replaced or removed before pieces are merged; no split is next
            to one. Spaces don't count: they are already written as U+2581.
    """
    pairs = {piece[i : i + 2] for piece in vocabulary for i in range(len(piece) - 1)}

    def safe_split(text: str) -> int:
        escaped = text.replace(" ", "▁")
        return _last_safe(
            text,
            lambda end: (
                escaped[end - 1 : end + 1] not in pairs
                and text[end - 1] not in altered
                and text[end] not in altered
            ),
        )

    return safe_split


def _last_safe(text: str, is_safe: Callable[[int], bool]) -> int:
    last = next((end for end in range(len(text) - 1, 0, -1) if is_safe(end)), 0)
    return last or (len(text) - 1 if len(text) >= MAX_SPAN_CHARACTERS else 0)


# Neither pattern has a word that continues from a non-space character to a space or tab; GPT-2's
# has none that continues to a line break. A word of Llama 3's pattern can be punctuation and the
# line breaks after it, but never continues from a line break to a non-space character. Both
# patterns look ahead only within white space, at the character after it: never across these points.
_LLAMA3_SPLIT = r"(?<=\S)(?=[ \t])|(?<=\n)(?=\S)"
_GPT2_SPLIT = r"(?<=\S)(?=[ \t\n])"


def safe_split_of_json(content: Mapping[str, Any]) -> SafeSplit:
    """Returns the SafeSplit of the tokenizer whose parsed tokenizer.json is `content`."""
    model, normalizers = content["model"], _components(content, "normalizer")
    pre_tokenizers = _components(content, "pre_tokenizer")
    # `encode` treats the text of a special token as ordinary text (`encode_special_tokens`).
    added = [token for token in content.get("added_tokens", ()) if not token.get("special")]
    if model.get("type") != "BPE" or model.get("dropout"):
        return never_split
    types = [component["type"] for component in pre_tokenizers]
    if (
        not normalizers
        and types[-1:] == ["ByteLevel"]
        and not pre_tokenizers[-1].get("add_prefix_space", True)
    ):
        flags = ("lstrip", "rstrip", "single_word")
        if any(re.search(r"\s", token["content"]) or any(map(token.get, flags)) for token in added):
            return never_split
        if pre_tokenizers[-1].get("use_regex", True):
            known = set(types[:-1]) <= {"Digits"}
            return safe_split_by_pattern(_GPT2_SPLIT) if known else never_split
        isolated = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"}
        split = pre_tokenizers[0] | {"invert": bool(pre_tokenizers[0].get("invert"))}
        known = len(pre_tokenizers) == 2 and split == isolated | {"invert": False}
        return safe_split_by_pattern(_LLAMA3_SPLIT) if known else never_split
    return _safe_split_of_llama2(model, normalizers, pre_tokenizers) if not added else never_split


def _safe_split_of_llama2(
    model: Mapping[str, Any], normalizers: Sequence[Any], pre_tokenizers: Sequence[Any]
) -> SafeSplit:
    """Returns the SafeSplit of a tokenizer.json that treats a text as SentencePiece does."""
    altered, escapes_spaces = ESCAPED, False
    for component in (*normalizers, *pre_tokenizers):
        match component:
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                escapes_spaces = True
            case {"type": "Replace", "pattern": {"String": str(character)}} if len(character) == 1:
                altered += character
            case {"type": "Metaspace", "replacement": "▁"}:
                escapes_spaces = True
            case {"type": "Prepend", "prepend": "▁"}:
                pass
            case _:
                return never_split
    vocabulary = model["vocab"].keys()
    byte_pieces = {f"<0x{byte:02X}>" for byte in range(256)}
    merged = {part for merge in model["merges"] for part in _merge_pair(merge)}
    unsupported = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if (
        not escapes_spaces
        or any(map(model.get, unsupported))
        or not model.get("byte_fallback")  # without it, adjacent unknown characters are one token
        or not byte_pieces <= vocabulary
        or merged & byte_pieces
    ):
        return never_split
    return safe_split_by_pairs(vocabulary - byte_pieces, altered)


def remove_space_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a parsed tokenizer.json without the components that put a space before a text."""
    normalizers = [c for c in _components(content, "normalizer") if c["type"] != "Prepend"]
    pre_tokenizers = _components(content, "pre_tokenizer")
    for component in pre_tokenizers:
        if component["type"] == "Metaspace":
            component["prepend_scheme"] = "never"
            component.pop("add_prefix_space", None)  # older name of the setting
    return content | {
        "normalizer": sequence("normalizers", *normalizers) if normalizers else None,
        "pre_tokenizer": sequence("pretokenizers", *pre_tokenizers) if pre_tokenizers else None,
    }


def _components(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    component = content.get(name)
    if component is None:
        return []
    is_sequence = component["type"] == "Sequence"
    return component[f"{name.replace('_', '')}s"] if is_sequence else [component]


def _merge_pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else merge
