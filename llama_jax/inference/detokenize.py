"""From token ids to text as it is made: whole characters, and what stops a text."""

from collections.abc import Iterable, Iterator, Sequence

from llama_jax.tokenizer.tokenizer import Tokenizer

# How a character begins whose tokens are not all there: bytes decode to U+FFFD, and U+FDD0 opens an
# escape of our own tokenizers.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}\ufdd0"
# So many characters of the text so far can still become another one: three of four bytes.
_OPEN = 3
# After so many tokens that end no character, bytes are no text (an escape takes at most six).
_MANY = 32


class Detokenizer:
    """Gives the text of tokens as they come, never cutting a character in two.

    Each token is decoded behind a letter that is known, and behind the tokens of the character
    that is not finished yet: the text before is not decoded again.

    Args:
        tokenizer: of the model.
        prompt: the tokens before. Its text is not given, but for the beginning of a character that
            the first tokens finish.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._letter = tokenizer.encode("a")
        self._letter_text = tokenizer.decode(self._letter)
        self._open = list(prompt)  # what is decoded again with the next token
        text = tokenizer.decode(self._open)
        self._given = len(text.rstrip(_UNFINISHED))  # characters of it that were given
        self._settle(text)

    def add(self, token: int) -> str:
        """Returns the text that `token` finishes; end tokens have none."""
        if token in self._tokenizer.end_ids:
            return ""
        self._open.append(token)
        text = self._tokenizer.decode(self._open)
        finished = len(text.rstrip(_UNFINISHED))
        if len(self._open) > _MANY:
            finished = max(finished, len(text) - _OPEN)
        given = text[self._given : finished]
        self._given = max(self._given, finished)
        self._settle(text)
        return given

    def token_text(self, token: int) -> str:
        """Returns the text that `token` would add here, or its part of a character."""
        if self._begun:
            return self._tokenizer.decode([*self._letter, token])[len(self._letter_text) :]
        return self._tokenizer.decode([*self._open, token])  # the first drops its space

    def flush(self) -> str:
        """Returns the text of tokens that make no whole character. No token may follow."""
        return self._tokenizer.decode(self._open)[self._given :]

    def _settle(self, text: str) -> None:
        """Forgets the tokens whose text, all of `text`, can't change any more."""
        self._begun = bool(text)
        if text and not text.endswith(tuple(_UNFINISHED)):
            self._open, self._given = list(self._letter), len(self._letter_text)
        elif len(self._open) > _MANY:
            held = len(text) - self._given
            # Where there is no text yet, the next token begins it: no letter stands before.
            self._open = (self._letter if text else []) + self._open[-_MANY // 2 :]
            self._given = max(0, len(self._tokenizer.decode(self._open)) - held)


class StopStrings:
    """Lets a text through, piece by piece, up to the first of some strings.

    What could be the beginning of one is held back. The string that is whole first counts, in
    whatever pieces the text comes; of two that end together, the longer.
    """

    def __init__(self, strings: Iterable[str] = ()):
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """Returns what may be shown now; nothing more once `stopped` is True."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(s), at) for s in self._strings if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        last = text[max(0, len(text) - self._longest + 1) :]
        begun = (n for n in range(len(last), 0, -1) if self._begins(last[-n:]))
        shown = len(text) - next(begun, 0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Returns what was held back, when the text ends without a stop."""
        held, self._held = self._held, ""
        return held

    def _begins(self, text: str) -> bool:
        return any(string.startswith(text) for string in self._strings)


def cut_at_stop(stops: Iterable[str], pieces: Iterable[str]) -> Iterator[str]:
    """Yields the pieces of a text up to the first of the strings `stops`."""
    shown = StopStrings(stops)
    for piece in pieces:
        yield shown.add(piece)
        if shown.stopped:
            return
    yield shown.flush()


def stream_text(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]
) -> Iterator[str]:
    """Yields the text of prompt and tokens in pieces, none of which cuts a character in two."""
    made = Detokenizer(tokenizer, prompt)
    yield tokenizer.decode(prompt).rstrip(_UNFINISHED)
    for token in tokens:
        if piece := made.add(token):
            yield piece
    yield made.flush()
