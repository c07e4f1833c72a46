"""Converts a pydantic ValidationError to one sentence."""

import re
from typing import Any, NamedTuple

from pydantic import ValidationError

_LONGEST = 100  # characters of a name or value in a message


class Problem(NamedTuple):
    """The first problem that pydantic reports."""

    path: tuple[str, ...]  # of the value: ('training', 'steps'); () for all values together
    kind: str  # pydantic's error type: 'missing', 'int_type', 'value_error' …
    message: str  # pydantic's message, or that of the ValueError that a validator raised
    value: Any  # the value that was given

    @property
    def key(self) -> str:
        """The path as one name: 'training.steps'."""
        return ".".join(self.path)

    @property
    def is_missing(self) -> bool:
        """Whether a required value is missing."""
        return self.kind == "missing"

    @property
    def is_unknown(self) -> bool:
        """Whether there is no such key."""
        return self.kind in ("unexpected_keyword_argument", "extra_forbidden")

    @property
    def is_rule(self) -> bool:
        """Whether a validator of ours raised `message`."""
        return self.kind == "value_error"

    def sentence(self, name: str | None = None) -> str:
        """Returns the problem as a sentence: 'training.steps must be a valid integer, not 1.5'.

        Args:
            name: the value's name; None for `key`.
        """
        name = _shorten(self.key) if name is None else name
        if self.is_missing:
            return f"{name} is missing"
        if self.is_unknown:
            return f"{name} is not a known key"
        if self.is_rule:
            return f"{name}: {self.message}" if name else self.message
        expected = self.message.removeprefix("Input should be ")
        if self.kind == "dataclass_type":
            expected = "a section of keys"
        elif expected == self.message:  # 'String should have at most 5 characters'
            return f"{name}: {self.message[:1].lower()}{self.message[1:]}"
        expected = re.sub(r", (unable to|got a) .*", "", expected)
        expected = expected.replace("a valid tuple", "a list")
        return f"{name} must be {expected}, not {_shorten(repr(self.value))}"


def first_problem(error: ValidationError) -> Problem:
    """Returns the first problem of a validation."""
    first = error.errors(include_url=False)[0]
    path = tuple(str(part) for part in first["loc"] if part != "[key]")
    return Problem(path, first["type"], first["msg"].removeprefix("Value error, "), first["input"])


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
