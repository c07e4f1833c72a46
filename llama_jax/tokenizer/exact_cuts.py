"""Where a long text can be cut so that its pieces give the very tokens of the uncut text.

A tokenizer needs some 50 bytes of memory for each character that it is given at once, so a text of
200 MB would take 9 GB. Its pieces take little, and can be encoded side by side. A cut is exact if
no token can reach across it and the tokens on either side don't depend on the other; the functions
here find such places for each kind of tokenizer and say why they are exact.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llama_jax.tokenizer.build import LLAMA3_PATTERN, sequence

PIECE = 1 << 18  # characters; a text that is no longer is not cut
# After so many characters without an exact cut, the text is cut anywhere: memory stays bounded for
# one token that may differ. No prose or code has such a place, base64 or DNA in one line has.
LONGEST = 1 << 20

# SentencePiece's space, and what our tokenizers write in its place where it stands in a text.
ESCAPED = "▁\ufdd0\ufdd1\ufdd2"

# Returns the length of the longest beginning of a text after which a cut is exact, whatever follows
# the text; 0 where there is none. At least one character is left.
Cut = Callable[[str], int]


def pieces(parts: Iterable[str], exact_cut: Cut) -> Iterator[str]:
    """Yields the pieces of the text that `parts` make up; their ids, joined, are those of the text.

    All but the first are to be encoded as `continued`.
    """
    rest = ""
    for part in parts:
        for start in range(0, len(part), PIECE):  # a text may come in one part
            rest += part[start : start + PIECE]
            if len(rest) > PIECE and (end := exact_cut(rest)):
                yield rest[:end]
                rest = rest[end:]
    yield rest


def no_cut(text: str) -> int:
    """Returns 0: a tokenizer about which nothing is known gets its texts in one piece."""
    return 0


def by_pattern(pattern: str) -> Cut:
    """Returns the cut for tokenizers that split a text into words before they merge bytes.

    `pattern` has no width and matches where a word always ends, with the words before and after it
    as they would be without the other side. Words are encoded one by one, so such a place is exact.
    """
    place = re.compile(pattern)
    return lambda text: _last(text, lambda end: place.match(text, end) is not None)


def by_pairs(vocabulary: Iterable[str], changed: str) -> Cut:
    """Returns the cut for byte-pair encoding of a text that is not split into words before.

    Every merge makes a piece of the vocabulary. If none of them holds the two characters beside the
    cut, one after the other, no merge reaches across it. Merges are done in the order of their rank
    and then from left to right, and each looks at its two parts alone; so those of one side are
    the same, in the same order, whatever is done on the other.

    Args:
        vocabulary: all pieces that a merge can make, with U+2581 for a space.
        changed: characters that stand for something else before pieces are merged, or vanish;
            there is no cut beside them. Spaces are not meant, which are U+2581 by then.
    """
    pairs = {piece[i : i + 2] for piece in vocabulary for i in range(len(piece) - 1)}

    def cut(text: str) -> int:
        shown = text.replace(" ", "▁")
        return _last(
            text,
            lambda end: (
                shown[end - 1 : end + 1] not in pairs
                and text[end - 1] not in changed
                and text[end] not in changed
            ),
        )

    return cut


def _last(text: str, is_exact: Callable[[int], bool]) -> int:
    found = next((end for end in range(len(text) - 1, 0, -1) if is_exact(end)), 0)
    return found or (len(text) - 1 if len(text) >= LONGEST else 0)


# No word of these splittings goes from a character that is no white space to a space or tab, and of
# GPT-2's none to a line break. Llama 3's has words of punctuation and line breaks after it, but
# none that goes on behind a line break with something other than white space. Both look ahead only
# in white space, at what follows it: never across these places.
_LLAMA3_CUT = r"(?<=\S)(?=[ \t])|(?<=\n)(?=\S)"
_GPT2_CUT = r"(?<=\S)(?=[ \t\n])"


def cut_of_json(content: Mapping[str, Any]) -> Cut:
    """Returns the cut for a tokenizer.json, of which `content` was read."""
    model, normalizers = content["model"], _parts(content, "normalizer")
    before = _parts(content, "pre_tokenizer")
    # Special tokens are texts like any other here (`encode_special_tokens`).
    added = [token for token in content.get("added_tokens", ()) if not token.get("special")]
    if model.get("type") != "BPE" or model.get("dropout"):
        return no_cut
    kinds = [part["type"] for part in before]
    if (
        not normalizers
        and kinds[-1:] == ["ByteLevel"]
        and not before[-1].get("add_prefix_space", True)
    ):
        flags = ("lstrip", "rstrip", "single_word")
        if any(re.search(r"\s", token["content"]) or any(map(token.get, flags)) for token in added):
            return no_cut
        if before[-1].get("use_regex", True):
            return by_pattern(_GPT2_CUT) if set(kinds[:-1]) <= {"Digits"} else no_cut
        isolated = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"}
        split = before[0] | {"invert": bool(before[0].get("invert"))}
        known = len(before) == 2 and split == isolated | {"invert": False}
        return by_pattern(_LLAMA3_CUT) if known else no_cut
    return _cut_of_llama2(model, normalizers, before) if not added else no_cut


def _cut_of_llama2(
    model: Mapping[str, Any], normalizers: Sequence[Any], before: Sequence[Any]
) -> Cut:
    """Returns the cut for a tokenizer.json that treats a text as SentencePiece does."""
    changed, spaces = ESCAPED, False
    for part in (*normalizers, *before):
        match part:
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                spaces = True
            case {"type": "Replace", "pattern": {"String": str(one)}} if len(one) == 1:
                changed += one
            case {"type": "Metaspace", "replacement": "▁"}:
                spaces = True
            case {"type": "Prepend", "prepend": "▁"}:
                pass
            case _:
                return no_cut
    vocabulary = model["vocab"].keys()
    single = {f"<0x{byte:02X}>" for byte in range(256)}
    merged = {part for merge in model["merges"] for part in _pair(merge)}
    affixes = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if (
        not spaces
        or any(map(model.get, affixes))
        or not model.get("byte_fallback")  # else unknown characters that follow each other are one
        or not single <= vocabulary
        or merged & single
    ):
        return no_cut
    return by_pairs(vocabulary - single, changed)


def without_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a tokenizer.json what puts a space in front of a text."""
    normalizers = [p for p in _parts(content, "normalizer") if p["type"] != "Prepend"]
    before = _parts(content, "pre_tokenizer")
    for part in before:
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)  # its older name
    return content | {
        "normalizer": sequence("normalizers", *normalizers) if normalizers else None,
        "pre_tokenizer": sequence("pretokenizers", *before) if before else None,
    }


def _parts(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    part = content.get(name)
    if part is None:
        return []
    return part[f"{name.replace('_', '')}s"] if part["type"] == "Sequence" else [part]


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else merge
