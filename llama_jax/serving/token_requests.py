"""The requests of /tokenize and /detokenize, which evaluation clients use.

Source: vLLM's Tokenizer API (vllm/entrypoints, `/tokenize` and `/detokenize`).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from llama_jax.inference.detokenize import Detokenizer
from llama_jax.serving.openai_messages import validate_messages
from llama_jax.serving.openai_tools import validate_tools
from llama_jax.tokenizer.tokenizer import Tokenizer


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a text, or a chat up to the model's answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Any] | None, BeforeValidator(validate_messages)] = None
    tools: Annotated[list[Any], BeforeValidator(validate_tools)] = []
    add_special_tokens: bool = True  # of a text: the begin token; chats have their own tokens
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one_kind(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: list[int]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token; U+FFFD for a part of a character, special tokens as text."""
    names = {token: name for name, token in tokenizer.special.items()}
    pieces = tokenizer.token_bytes()
    return [(pieces[i] or names.get(i, "").encode()).decode(errors="replace") for i in ids]


def text_with_special(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, with that of special tokens."""
    names = {token: name for name, token in tokenizer.special.items()}
    detokenizer, parts = Detokenizer(tokenizer), list[str]()
    for token in ids:
        parts.append(names[token] if token in names else detokenizer.add(token))
    return "".join([*parts, detokenizer.flush()])
