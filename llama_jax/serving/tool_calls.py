"""Finds calls of tools in a generated text, piece by piece."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

# The beginning of a call, up to its arguments. Llama 3.1 may write a type before the name.
_HEAD = re.compile(
    r'\s*\{\s*(?:"(?:type|id)"\s*:\s*"[^"]*"\s*,\s*)*"name"\s*:\s*"([^"\\]+)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\s*\{\s*"([^"]*)"')
_NAME = re.compile(r'\s*\{[^{}]*"name"\s*:\s*"([^"\\]+)"')
_LONGEST_HEAD = 500  # characters


@dataclass(frozen=True)
class CallDelta:
    """The increment of one call.

    Attributes:
        index: number of the call in its text.
        name: of the tool; only in the first increment of a call.
        arguments: the next part of their JSON text.
    """

    index: int
    name: str | None
    arguments: str


class ToolCallParser:
    """Separates one generated text into content and calls of tools.

    A call is a JSON object with a name and arguments; its arguments are passed on as they arrive.
    A text that only looks like a call at its start, or calls an unknown tool, is content. Text
    after the first call that is no call is dropped.

    Args:
        marker: text before the first call, without special tokens and outer white space; without a
            marker, or if it is '[', only the start of the text can be a call.
        names: of the tools.
        several: whether a text may have more than one call.
    """

    def __init__(self, marker: str, names: Collection[str], *, several: bool):
        self._marker, self._names, self._several = marker, names, several
        self._anchored = marker in ("", "[")
        self._held_back = ""
        self._has_content = False
        self._scanner: _ObjectScanner | None = None  # of the arguments that arrive
        self.n_calls = 0

    def add(self, piece: str) -> tuple[str, list[CallDelta]]:
        """Returns the content and the calls that can be passed on after one more piece of text."""
        self._held_back += piece
        content, deltas = "", dict[int, CallDelta]()
        while self._held_back:
            before = self._held_back
            if self._scanner is not None:
                self._scan_arguments(deltas)
            elif self.n_calls:
                self._find_next_call(deltas)
            else:
                content += self._find_first_call(deltas)
            if self._held_back == before:
                break
        return content, [*deltas.values()]

    def finish(self) -> str:
        """Returns the content that was held back, when the text ends."""
        content, self._held_back = self._held_back, ""
        return content if self.n_calls == 0 else ""

    def _scan_arguments(self, deltas: dict[int, CallDelta]) -> None:
        assert self._scanner is not None
        index, end = self.n_calls - 1, self._scanner.scan(self._held_back)
        arguments, self._held_back = self._held_back[:end], self._held_back[end:]
        delta = deltas.get(index, CallDelta(index, None, ""))
        deltas[index] = replace(delta, arguments=delta.arguments + arguments)
        if self._scanner.ended:
            self._scanner = None

    def _find_first_call(self, deltas: dict[int, CallDelta]) -> str:
        """Starts the first call, if the text held back contains it; returns content before it."""
        text = self._held_back
        if self._anchored:
            stripped = text.lstrip()
            if self._has_content or not (self._marker + "{").startswith(stripped[:1]):
                return self._release(len(text))
            start = len(text) - len(stripped)
            if not stripped.startswith(self._marker):
                return ""
        else:
            start = text.find(self._marker)
            if start < 0:
                lengths = range(min(len(text), len(self._marker)), 0, -1)
                held = next((n for n in lengths if self._marker.startswith(text[-n:])), 0)
                return self._release(len(text) - held)
        after = start + len(self._marker)
        if self._start_call(text[after:], deltas):
            return text[:start] if self._has_content or text[:start].strip() else ""
        if self._may_be_call(text[after:]):
            return "" if self._anchored else self._release(start)
        return self._release(after if self._marker else len(text))

    def _find_next_call(self, deltas: dict[int, CallDelta]) -> None:
        """Starts the next call, or drops text that contains none."""
        start = self._held_back.find("{") if self._several else -1
        rest = self._held_back[start:] if start >= 0 else ""
        if rest and self._start_call(rest, deltas):
            return
        self._held_back = rest if self._may_be_call(rest) else rest[1:]

    def _start_call(self, text: str, deltas: dict[int, CallDelta]) -> bool:
        head = _HEAD.match(text)
        if head is None or head[1] not in self._names:
            return False
        deltas[self.n_calls] = CallDelta(self.n_calls, head[1], "")
        self.n_calls += 1
        self._held_back, self._scanner = text[head.end() :], _ObjectScanner()
        return True

    def _may_be_call(self, text: str) -> bool:
        """Returns whether more text can complete the beginning of a call."""
        if text.lstrip()[:1] not in ("", "{") or len(text) > _LONGEST_HEAD:
            return False
        key, name = _FIRST_KEY.match(text), _NAME.match(text)
        if (key and key[1] not in ("type", "id", "name")) or (name and name[1] not in self._names):
            return False
        try:
            json.JSONDecoder().raw_decode(text.lstrip())
        except ValueError:
            return True
        return False  # complete, and no call

    def _release(self, n: int) -> str:
        """Returns the next `n` characters as content; holds back white space at the start.

        White space before a call is no content.
        """
        if not self._has_content and self._held_back[:n].isspace() and n < _LONGEST_HEAD:
            return ""
        content, self._held_back = self._held_back[:n], self._held_back[n:]
        self._has_content = self._has_content or bool(content.strip())
        return content


class _ObjectScanner:
    """Finds the end of a JSON object that arrives in pieces."""

    def __init__(self):
        self._depth = 0
        self._in_string = self._is_escaped = self.ended = False

    def scan(self, text: str) -> int:
        """Returns how many characters of `text` belong to the object."""
        for i, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0:
                    self.ended = True
                    return i + 1
        return len(text)
