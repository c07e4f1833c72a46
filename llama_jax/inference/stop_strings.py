"""Ends a streamed text before its first stop string."""

from collections.abc import Iterable, Iterator


class StopStrings:
    """Passes a text on, piece by piece, up to the first stop string.

    Text that could be the start of a stop string is held back. The stop string that is complete
    first counts, however the text is cut into pieces; of two that end together, the longer.
    """

    def __init__(self, strings: Iterable[str] = ()):
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held_back = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """Returns the text that can be shown now; "" once `stopped` is True."""
        if self.stopped:
            return ""
        text = self._held_back + piece
        found = [(start + len(s), start) for s in self._strings if (start := text.find(s)) >= 0]
        if found:
            self.stopped, self._held_back = True, ""
            return text[: min(found)[1]]
        tail = text[max(0, len(text) - self._longest + 1) :]
        starts = (n for n in range(len(tail), 0, -1) if self._starts_a_stop(tail[-n:]))
        shown = len(text) - next(starts, 0)
        self._held_back = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Returns the text that was held back, when the text ends without a stop string."""
        text, self._held_back = self._held_back, ""
        return text

    def _starts_a_stop(self, text: str) -> bool:
        return any(string.startswith(text) for string in self._strings)


def cut_at_stop(stops: Iterable[str], pieces: Iterable[str]) -> Iterator[str]:
    """Yields the pieces of a text up to the first of the stop strings."""
    stop_strings = StopStrings(stops)
    for piece in pieces:
        yield stop_strings.add(piece)
        if stop_strings.stopped:
            return
    yield stop_strings.flush()
