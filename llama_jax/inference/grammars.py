"""Constraints by grammars: JSON schemas, choices, regular expressions. llguidance finds the masks.

Every grammar here is a text in llguidance's variant of Lark (its docs/syntax.md).
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from llama_jax.errors import InputError, check_package
from llama_jax.tokenizer.tokenizer import Tokenizer

# JSON documents have at most one space, after a comma or a colon, as Python writes them. Where any
# white space is allowed, small models generate nothing else.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_LONGEST_REASON = 300  # characters of an error


class GrammarConstraint:
    """The tokens that a grammar allows next in one text; a `Constraint` of the engine.

    Attributes:
        mask_W: uint32 [W], bit i of word w allows token 32 · w + i.
        error: why no token can follow; None if one can.
    """

    def __init__(self, matcher: Any):  # of llguidance.LLMatcher
        self._matcher = matcher
        self.error: str | None = None
        self._update()

    def copy(self) -> "GrammarConstraint":
        """Returns the constraint of another text that has the same tokens so far."""
        return GrammarConstraint(self._matcher.deep_copy())

    def advance(self, token: int) -> None:
        """Computes the mask after one more token."""
        self._matcher.consume_token(token)
        self._update()

    def _update(self) -> None:
        self.mask_W = np.zeros(0, np.uint32)
        if not self._matcher.is_error():
            self.mask_W = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error() or not self.mask_W.any():
            reason = _shorten(self._matcher.get_error()) or "no token of the model continues it"
            self.error = f"the text can't be continued within its grammar ({reason}): simplify it"


class Grammars:
    """Compiles grammars for the tokens of a tokenizer; several threads may use it.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def constraint(self, grammar: str) -> GrammarConstraint:
        """Returns the constraint of a new text.

        Raises:
            InputError: the grammar is invalid or too large; or llguidance is missing.
        """
        check_package("llguidance", "llguidance, which limits a text to a grammar", "structured")
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)  # errors must not contain the text
        source = LLMatcher.grammar_from_lark(grammar)
        matcher = LLMatcher(self._tokens, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise InputError(
                f"the grammar is invalid ({_shorten(matcher.get_error())}): correct it"
            )
        constraint = GrammarConstraint(matcher)
        if constraint.error is not None:
            raise InputError(constraint.error)
        return constraint

    @cached_property
    def _tokens(self) -> Any:  # llguidance.LLTokenizer
        from llguidance import LLTokenizer, TokenizerWrapper

        wrapper = TokenizerWrapper(_TokenTable(self._tokenizer))
        return LLTokenizer(wrapper, eos_token=sorted(self._tokenizer.end_ids))


class _TokenTable:
    """A tokenizer as llguidance reads it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        names = {token: name for name, token in tokenizer.special.items()}
        self.eos_token_id = tokenizer.eos_id
        pieces = tokenizer.token_bytes()
        self.special_token_ids = [i for i, piece in enumerate(pieces) if piece is None]
        # The byte 0xff, which no text contains, marks special tokens.
        self.tokens = [
            b"\xff" + names.get(i, f"<|token {i}|>").encode() if piece is None else piece
            for i, piece in enumerate(pieces)
        ]
        self._ids = {piece: i for i, piece in enumerate(self.tokens)}
        self._longest = max(map(len, self.tokens))

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns ids whose bytes are those of `text`."""
        data = text if isinstance(text, bytes) else text.encode()
        ids = self._tokenizer.encode(data.decode(errors="replace"), continued=True)
        if b"".join(self.tokens[i] for i in ids) == data:
            return ids
        # SentencePiece removes spaces at the end: take the longest token at each position instead.
        ids, start = [], 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), start + 1)
            if data[start:end] in self._ids:
                ids.append(self._ids[data[start:end]])
            start = end
        return ids


def json_grammar(schema: Mapping[str, Any] | bool) -> str:
    """Returns the grammar of the JSON documents that are valid by a schema."""
    return f"start: {json_rule(schema)}"


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """Returns the right side of a rule for the JSON documents of a schema."""
    if isinstance(schema, Mapping):
        schema = {"x-guidance": _JSON_OPTIONS, **_close_objects(schema)}
    return f"%json {json.dumps(schema)}"


def _close_objects(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Forbids properties that a schema doesn't list, in objects for which it doesn't decide this.

    Documents of the result are valid by `schema` too. With `schema` itself a model invents
    properties without end. A schema that combines objects is unchanged, because a property may be
    listed elsewhere.
    """

    def combines(part: Any) -> bool:
        if isinstance(part, Mapping):
            several = len({"anyOf", "oneOf", "$ref", "properties"} & part.keys()) > 1
            return several or "allOf" in part or any(map(combines, part.values()))
        return isinstance(part, list) and any(map(combines, part))

    def close(part: Any) -> Any:
        if isinstance(part, list):
            return [close(item) for item in part]
        if not isinstance(part, Mapping) or "enum" in part or "const" in part:
            return part
        closed = {key: close(value) for key, value in part.items()}
        listed = part.get("properties")
        if isinstance(listed, Mapping) and not part.keys() & {
            *("additionalProperties", "unevaluatedProperties", "minProperties")
        }:
            required = part.get("required")
            if not isinstance(required, list) or {*map(str, required)} <= listed.keys():
                closed["additionalProperties"] = False
        return closed

    return schema if combines(schema) else close(schema)


def choice_grammar(choices: Sequence[str]) -> str:
    """Returns the grammar of a text that is one of `choices`."""
    return "start: " + " | ".join(map(json.dumps, choices))


def regex_grammar(pattern: str) -> str:
    """Returns the grammar of the texts that match a regular expression completely."""
    pattern = pattern.replace("\n", "\\n").replace("\r", "\\r")
    escaped = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern)
    return f"start: /{escaped}/"


def parse_grammar(text: str) -> str:
    """Returns a grammar in Lark, or in the EBNF of llama.cpp (GBNF), as Lark.

    Raises:
        InputError: it is not valid EBNF, or llguidance is missing.
    """
    check_package("llguidance", "llguidance, which limits a text to a grammar", "structured")
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:  # the package defines no exception type
        raise InputError(f"the grammar is invalid ({_shorten(str(error))}): correct it") from error


def _shorten(message: str) -> str:
    """Returns an error of llguidance on one line, without the lines of source after it."""
    return " ".join(re.split(r"\n\s*\d+ \|", message)[0].split())[:_LONGEST_REASON]
