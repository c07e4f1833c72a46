"""A text in, its continuation out."""

from collections.abc import Sequence

from llama_jax.config.model import ModelConfig
from llama_jax.inference.detokenize import cut_at_stop, stream_text
from llama_jax.inference.sampling import Sampling
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
    """Returns the text that follows a prompt, up to the end of text, a stop string or a length.

    >>> prompt = "The capital of France is"
    >>> lj.complete(config, model, tokenizer, prompt, max_new_tokens=16, stops=["."])
    ' Paris'

    Args:
        config: of the model.
        model: weights of that config.
        tokenizer: of the model.
        prompt: a text; or a chat, `[{"role": "user", "content": "…"}, …]`, which the model is to
            answer, in its own format.
        max_new_tokens: at most so many; default: 200, or fewer where the context ends.
        sampling: how tokens are drawn; the default is greedy.
        stops: the text ends before the first of these.
        seed: of the draws.

    Raises:
        InputError: the prompt doesn't fit the model's context, or is no chat that its format knows.
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
    """Returns the ids of a text as a model's prompt, or of a chat that it is to answer.

    With `parse_special` the text of a special token, written in a prompt, gives that token; one
    that begins with the begin token gets no second one. Messages of a chat are never parsed so.

    Raises:
        InputError: it is no chat that the model's format knows.
    """
    if not isinstance(prompt, str):
        return tokenizer.encode_chat(prompt)
    ids = tokenizer.parse(prompt) if parse_special else tokenizer.encode(prompt)
    # An empty text begins somewhere too.
    bos = (tokenizer.add_bos or not prompt) and ids[:1] != [tokenizer.bos_id]
    return [tokenizer.bos_id] * bos + ids


def default_max_new_tokens(config: ModelConfig, prompt: Sequence[int]) -> int:
    """Returns how many tokens to make where nothing is said: 200, or as many as fit, at least 1."""
    return max(1, min(200, config.context - len(prompt)))
