"""Finds, splits around and encodes the texts of special tokens in other text."""

import functools
import re
from collections.abc import Callable, Collection, Mapping

from llama_jax.tokenizer.split_points import SafeSplit


def special_pattern(special: Collection[str]) -> re.Pattern[str] | None:
    """Returns the pattern of the texts of special tokens, as one group; None if there is none."""
    return _pattern(tuple(sorted(special, key=len, reverse=True)))


@functools.lru_cache(maxsize=4)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None


def encode_around_special(
    encode: Callable[[str], list[int]], special: Mapping[str, int], text: str
) -> list[int]:
    """Returns the ids of `text`; the text of a special token is encoded as that token.

    Args:
        encode: returns the ids of a part of the text before, between or after special tokens.
        special: ids of the special tokens, by their text.
        text: to encode.
    """
    pattern = special_pattern(special)
    ids = list[int]()
    for i, part in enumerate(pattern.split(text) if pattern else [text]):
        ids += [special[part]] if i % 2 else encode(part)
    return ids


def split_around_special(safe_split: SafeSplit, special: Collection[str]) -> SafeSplit:
    """Returns the SafeSplit of a tokenizer that encodes the texts of special tokens as the tokens.

    Args:
        safe_split: of the tokenizer for ordinary text.
        special: texts of the special tokens.
    """
    pattern = special_pattern(special)
    if pattern is None:
        return safe_split
    longest = max(map(len, special))

    def split(text: str) -> int:
        # The text of a special token may continue after the end of `text`.
        end = safe_split(text[:-longest]) if len(text) > longest else 0
        first = max(0, end - longest)
        for match in pattern.finditer(text, first, end + longest):
            if match.start() < end < match.end():
                return match.start()
        return end

    return split
