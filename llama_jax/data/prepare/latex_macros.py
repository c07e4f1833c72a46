r"""Expands the macros that the author of a LaTeX source has defined, and removes their definitions.

`\newcommand`, `\renewcommand`, `\providecommand`, `\DeclareMathOperator`, and `\def` whose
parameters have no delimiters. A call is expanded by the definition that precedes it. Everything
else (other definitions, calls that lack an argument, recursion) stays as it is.

Time is proportional to the length of the text: each piece is scanned once per level of nesting, of
which there are few, and a source that would grow beyond a limit is left unchanged.
"""

import io
import re
from collections.abc import Iterable
from typing import NamedTuple

from llama_jax.data.prepare.latex_verbatim import split_verbatim

_MAX_DEPTH = 12  # calls in arguments of calls, or bodies that call other macros
_MAX_BODY = 2_000  # characters of a definition
_MAX_GROWTH = 4
_NAME = r"(\\[A-Za-z@]+)"
_NEW = rf"\\(?:re)?(?:new|provide)command\*?\s{{0,9}}(?:\{{{_NAME}\}}|{_NAME})\s{{0,9}}"
_DEFINITION = re.compile(
    rf"{_NEW}(?:\[([1-9])\]\s{{0,9}})?(?:\[([^\[\]{{}}]{{0,200}})\]\s{{0,9}})?(?={{)"
    rf"|\\(?:long\s{{0,9}})?[eg]?def\s{{0,9}}{_NAME}((?:#[1-9])*)\s{{0,9}}(?={{)"
    rf"|\\DeclareMathOperator(\*?)\s{{0,9}}(?:\{{{_NAME}\}}|{_NAME})\s{{0,9}}(?={{)"
)
_COMMAND = re.compile(_NAME + r"|\\.", re.S)
_PARAMETER = re.compile(r"#([1-9])")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_COMMAND_AT_END = re.compile(r"\\[A-Za-z@]+\Z")
# The structure of a document stays visible, also where its author has redefined it.
_STRUCTURE = re.compile(
    r"\\(begin|end|item|part|chapter|(sub)*section|(sub)?paragraph|input|include|bibliography|title"
    r"|documentclass|documentstyle|usepackage|caption|label|ref|cite\w*|footnote|the\w*|@\w*)\Z"
)


class _Macro(NamedTuple):
    """The body of a macro, with #1 to #9 in place of its arguments."""

    body: str
    arguments: int
    default: str | None  # of the first argument, which is optional then


class _TooLong(Exception):
    """The expanded text is much longer than the source."""


def expand_macros(text: str) -> str:
    """Returns LaTeX with the author's macros expanded; unchanged if it would grow too much."""
    expander = _Expander(_MAX_GROWTH * len(text) + 100_000)
    try:
        return "".join(
            piece if is_verbatim else expander.expand(piece)
            for is_verbatim, piece in split_verbatim(text)
        )
    except _TooLong:
        return text


class _Expander:
    """The definitions that precede a place of the source."""

    def __init__(self, limit: int) -> None:
        self._macros = dict[str, _Macro]()
        self._remaining = limit  # characters

    def expand(self, text: str, depth: int = 0, active: frozenset[str] = frozenset()) -> str:
        """Returns a text with its macros expanded, except `active`: those in whose bodies it is."""
        output, position = list[str](), 0
        if "\\" not in text or depth > _MAX_DEPTH:
            return text
        self._count(len(text))
        ends = _group_ends(text)
        while match := _COMMAND.search(text, position):
            output.append(text[position : match.start()])
            if depth == 0 and (end := self._define(text, match.start(), ends)):
                position = end
                continue
            name, position = match[0], match.end()
            macro = None if name in active else self._macros.get(name)
            found = macro and _arguments(text, position, macro, ends)
            if macro is None or found is None:
                output.append(name)
                continue
            arguments, position = found
            arguments = [self.expand(argument, depth + 1, active) for argument in arguments]
            body = self.expand(macro.body, depth + 1, active | {name})
            expanded = _substitute(body, arguments)
            self._count(len(expanded))
            output.append(expanded)
        return _join([*output, text[position:]])

    def _count(self, characters: int) -> None:
        self._remaining -= characters
        if self._remaining < 0:
            raise _TooLong

    def _define(self, text: str, start: int, ends: dict[int, int]) -> int | None:
        """Stores a definition and returns its end; None: there is no definition that we expand."""
        match = _DEFINITION.match(text, start)
        if not match or (end := ends.get(match.end())) is None:
            return None
        braced, bare, count, default, defined, parameters, star, operator, bare_operator = (
            match.groups()
        )
        name = braced or bare or defined or operator or bare_operator
        body = text[match.end() + 1 : end]
        if operator or bare_operator:
            body = rf"\operatorname{star}{{{body}}}"
        arguments = int(count or 0) if not defined else len(parameters) // 2
        used = [int(number) for number in _PARAMETER.findall(body)]
        is_simple = not (
            _STRUCTURE.match(name)
            or len(body) > _MAX_BODY
            or "##" in body
            or _DEFINITION.search(body)
            or max(used, default=0) > arguments
        )
        if not is_simple:
            self._macros.pop(name, None)
            return None
        self._macros[name] = _Macro(body, arguments, default)
        has_own_line = text[end + 1 : end + 2] == "\n" and text[start - 1 : start] in ("\n", "")
        return end + 2 if has_own_line else end + 1


def _group_ends(text: str) -> dict[int, int]:
    """Returns the position of the closing brace by that of the opening one."""
    ends, opened = dict[int, int](), list[int]()
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            ends[opened.pop()] = match.start()
    return ends


def _arguments(
    text: str, position: int, macro: _Macro, ends: dict[int, int]
) -> tuple[list[str], int] | None:
    """Returns the arguments of a call and its end; None: an argument is missing."""
    arguments = list[str]()
    if macro.default is not None:
        arguments.append(macro.default)
        if text.startswith("[", position):
            end = text.find("]", position, position + 1_000)
            if end < 0:
                return None
            arguments[0], position = text[position + 1 : end], end + 1
    while len(arguments) < macro.arguments:
        start = position
        while text[start : start + 1].isspace() and start < position + 100:
            start += 1
        character = text[start : start + 1]
        if character == "{":
            if (end := ends.get(start)) is None:
                return None
            arguments.append(text[start + 1 : end])
            position = end + 1
        elif command := _COMMAND.match(text, start):
            arguments.append(command[0])
            position = command.end()
        elif character and not character.isspace() and character != "}":
            arguments.append(character)
            position = start + 1
        else:
            return None
    return arguments, position


def _substitute(body: str, arguments: list[str]) -> str:
    if not arguments:
        return body
    pieces = _PARAMETER.split(body)
    values = (arguments[int(number) - 1] for number in pieces[1::2])
    return _join([piece for pair in zip(pieces[::2], [*values, ""], strict=True) for piece in pair])


def _join(pieces: Iterable[str]) -> str:
    r"""Returns the joined text, with a space where a letter would become part of a command's name.

    `\cos` and `x` become `\cos x`.
    """
    joined, last = io.StringIO(), ""
    for piece in filter(None, pieces):
        if piece[0].isalpha() and _COMMAND_AT_END.search(last[-50:]):
            joined.write(" ")
        joined.write(piece)
        last = piece
    return joined.getvalue()
