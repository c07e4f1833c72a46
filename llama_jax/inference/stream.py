"""Streams the continuation of one prompt, token by token."""

from collections.abc import Iterator, Sequence

import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.inference.generate import NO_TOKEN, DecodeState, decode, init_rows, prefill
from llama_jax.inference.sampling import Sampling
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import batch_shards, shard_array


def check_prompt(config: ModelConfig, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Checks that the model can continue a prompt.

    Raises:
        InputError: the prompt is empty, contains an unknown id, or doesn't fit the model's context.
    """
    if not prompt:
        raise InputError("the prompt is empty: give at least the begin-of-text token")
    unknown = [i for i in prompt if not 0 <= i < config.vocab_size]
    if unknown:
        raise InputError(
            f"token {unknown[0]} of the prompt is outside the model's vocabulary of"
            f" {config.vocab_size}: the tokenizer is not this model's"
        )
    if len(prompt) + max_new_tokens > config.context:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones don't fit the model's"
            f" context of {config.context}: shorten the prompt or ask for fewer"
        )


def stream(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    end_ids: frozenset[int] = frozenset(),
    seed: int = 0,
    block: int = 16,
) -> Iterator[int]:
    """Yields the tokens that follow one prompt as the model generates them; an end id is the last.

    On several hosts all call this with the same arguments, and take all tokens.

    Args:
        config: the model's config.
        model: weights of that config.
        prompt: token ids, at least one.
        max_new_tokens: the most tokens to generate.
        sampling: the sampling settings; the default is greedy.
        end_ids: ids that end the text.
        seed: seed of the draws.
        block: tokens generated in one dispatch.

    Raises:
        InputError: the prompt is empty, contains an unknown id, or doesn't fit the model's context.
    """
    check_prompt(config, prompt, max_new_tokens)
    B = batch_shards()  # of the rows, all but the first generate nothing
    tokens = np.zeros((B, _round_up(len(prompt))), np.int32)
    tokens[:, : len(prompt)] = prompt
    in_prompt = np.zeros((B, config.vocab_size), bool)
    in_prompt[:, list(prompt)] = True
    slots = cache_slots(len(prompt), max_new_tokens)
    lengths = shard_array(np.full(B, len(prompt), np.int32), "B")
    cache, logits = prefill(config, model, shard_array(tokens, "BT"), lengths, slots=slots)
    new_tokens = [max_new_tokens] + [0] * (B - 1)
    rows = init_rows([sampling] * B, [seed] * B, new_tokens, [sorted(end_ids)] * B, in_prompt)
    state = DecodeState(cache, logits, rows)
    remaining, n = max_new_tokens, 1  # the first dispatch: one token, for a short time to it
    while remaining > 0:
        generated, state = decode(config, model, state, n, capacity=block)
        n = block
        tokens = np.asarray(generated.tokens_Bn)[0]
        tokens = tokens[tokens != NO_TOKEN].tolist()
        yield from tokens
        remaining = 0 if {*tokens} & end_ids else remaining - len(tokens)


def cache_slots(n_prompt: int, max_new_tokens: int) -> int:
    """Returns the slots of the KV cache with which `stream` continues a prompt.

    They contain the prompt, its continuation, and one slot more, which `decode` needs. The padding
    of the prompt fits too, and new tokens overwrite it.
    """
    return _round_up(n_prompt + max_new_tokens + 1)


def _round_up(number: int) -> int:
    """Returns the next power of two, at least 32, so that a few programs serve all lengths."""
    return 1 << max(5, (number - 1).bit_length())
