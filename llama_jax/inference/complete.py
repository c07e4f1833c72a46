"""Completes a text: from a prompt as text to its continuation as text."""

from collections.abc import Sequence

from llama_jax.config.model import ModelConfig
from llama_jax.inference.detokenize import stream_text
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.stop_strings import cut_at_stop
from llama_jax.inference.stream import stream
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.tokenizer.chat import Message
from llama_jax.tokenizer.tokenizer import Tokenizer


def complete(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling = Sampling(),
    stops: Sequence[str] = (),
    seed: int = 0,
) -> str:
    """Returns the continuation of a prompt, up to an end token, a stop string or a length.

    >>> prompt = "The capital of France is"
    >>> lj.complete(config, model, tokenizer, prompt, max_new_tokens=16, stops=["."])
    ' Paris'

    Args:
        config: the model's config.
        model: weights of that config.
        tokenizer: the model's tokenizer.
        prompt: a text; or a chat, `[{"role": "user", "content": "…"}, …]`, in which the model
            writes the next answer. The chat is formatted as the model's tokenizer specifies.
        max_new_tokens: the most tokens to generate; default: 200, or fewer if the context is full.
        sampling: the sampling settings; the default is greedy.
        stops: stop strings; the text ends before the first of them.
        seed: seed of the draws.

    Raises:
        InputError: the prompt doesn't fit the model's context, or the model's chat format doesn't
            accept the chat.
    """
    ids = prompt_ids(tokenizer, prompt)
    tokens = stream(
        config,
        model,
        ids,
        max_new_tokens=default_max_new_tokens(config, ids)
        if max_new_tokens is None
        else max_new_tokens,
        sampling=sampling,
        end_ids=tokenizer.end_ids,
        seed=seed,
    )
    pieces = stream_text(tokenizer, ids, tokens)
    next(pieces)  # the prompt
    return "".join(cut_at_stop(stops, pieces))


def prompt_ids(
    tokenizer: Tokenizer, prompt: str | Sequence[Message], *, parse_special: bool = False
) -> list[int]:
    """Returns the token ids of a prompt: a text, or a chat that the model answers.

    With `parse_special`, the text of a special token in a prompt becomes that token, and a prompt
    that starts with the begin token gets no second one. Messages of a chat are never parsed.

    Raises:
        InputError: the model's chat format doesn't accept the chat.
    """
    if not isinstance(prompt, str):
        return tokenizer.encode_chat(prompt)
    ids = tokenizer.parse(prompt) if parse_special else tokenizer.encode(prompt)
    # An empty prompt always gets the begin token: the model needs at least one token.
    bos = (tokenizer.add_bos or not prompt) and ids[:1] != [tokenizer.bos_id]
    return [tokenizer.bos_id] * bos + ids


def default_max_new_tokens(config: ModelConfig, prompt: Sequence[int]) -> int:
    """Returns 200, or as many tokens as still fit into the context, but at least 1."""
    return max(1, min(200, config.context - len(prompt)))
