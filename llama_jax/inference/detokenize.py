"""From token ids to streamed text: complete characters, and stop strings."""

from collections.abc import Iterable, Iterator, Sequence

from llama_jax.tokenizer.tokenizer import Tokenizer

# An incomplete character at the end of a text decodes to these: its first bytes to U+FFFD, and
# U+FDD0 opens an escape of our own tokenizers.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}\ufdd0"
# At most this many characters at the end of the text can still change: three bytes of four, one
# U+FFFD each.
_MAX_INCOMPLETE_CHARACTERS = 3
# More tokens than this that complete no character are no text (an escape takes at most six).
_MAX_PENDING_TOKENS = 32


class Detokenizer:
    """Decodes tokens one at a time and returns only complete characters.

    Each token is decoded after a known letter and after the tokens of a character that is still
    incomplete, so the cost of a token doesn't grow with the text.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the earlier tokens. Their text is not returned, except for the first bytes of a
            character that the next tokens complete.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._letter = tokenizer.encode("a")
        self._letter_text = tokenizer.decode(self._letter)
        self._pending = list(prompt)  # tokens that are decoded again with the next token
        text = tokenizer.decode(self._pending)
        self._returned = len(text.rstrip(_INCOMPLETE))  # characters of `text` already returned
        self._drop_finished(text)

    def add(self, token: int) -> str:
        """Returns the text that `token` completes; end tokens have no text."""
        if token in self._tokenizer.end_ids:
            return ""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        complete = len(text.rstrip(_INCOMPLETE))
        if len(self._pending) > _MAX_PENDING_TOKENS:
            complete = max(complete, len(text) - _MAX_INCOMPLETE_CHARACTERS)
        new = text[self._returned : complete]
        self._returned = max(self._returned, complete)
        self._drop_finished(text)
        return new

    def token_text(self, token: int) -> str:
        """Returns the text that `token` would add here, U+FFFD for a part of a character."""
        if self._has_text:
            return self._tokenizer.decode([*self._letter, token])[len(self._letter_text) :]
        return self._tokenizer.decode([*self._pending, token])  # a text's first token has no space

    def flush(self) -> str:
        """Returns the text of an incomplete character. No token may follow."""
        return self._tokenizer.decode(self._pending)[self._returned :]

    def _drop_finished(self, text: str) -> None:
        """Drops pending tokens whose text can't change any more; `text` is the text of all."""
        self._has_text = bool(text)
        if text and not text.endswith(tuple(_INCOMPLETE)):
            self._pending, self._returned = list(self._letter), len(self._letter_text)
        elif len(self._pending) > _MAX_PENDING_TOKENS:
            held_back = len(text) - self._returned
            # If there is no text yet, the next token starts it: then no letter comes before.
            recent = self._pending[-_MAX_PENDING_TOKENS // 2 :]
            self._pending = (self._letter if text else []) + recent
            self._returned = max(0, len(self._tokenizer.decode(self._pending)) - held_back)


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


def stream_text(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]
) -> Iterator[str]:
    """Yields the text of the prompt, then of the tokens, in pieces of complete characters."""
    detokenizer = Detokenizer(tokenizer, prompt)
    yield tokenizer.decode(prompt).rstrip(_INCOMPLETE)
    for token in tokens:
        if piece := detokenizer.add(token):
            yield piece
    yield detokenizer.flush()
