"""From token ids to streamed text, in pieces of complete characters."""

from collections.abc import Iterator, Sequence

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
