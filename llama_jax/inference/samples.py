"""Continues a few prompts in one batch, with the model and on the mesh of a training run."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.inference.detokenize import stream_text
from llama_jax.inference.generate import NO_TOKEN, generate
from llama_jax.inference.sampling import Sampling
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import batch_shards, shard_array
from llama_jax.parallel.sharding import activation_spec
from llama_jax.tokenizer.tokenizer import Tokenizer


def continue_prompts(
    config: ModelConfig,
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Returns the text that the model generates greedily after each prompt, up to an end token.

    All hosts call it, with the same prompts.

    Args:
        config: the model's config.
        model: weights of that config, with stacked layers, on a mesh that does not split sequences.
        tokenizer: the model's tokenizer.
        prompts: token ids, at least one for each prompt; with the new tokens they fit the context.
        max_new_tokens: the most tokens that follow a prompt.
    """
    # The mesh splits a batch into shards of equal size: the last prompt fills the rest.
    rows = -(-len(prompts) // batch_shards()) * batch_shards()
    ids = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.zeros((rows, lengths.max()), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    found: Any = generate(
        config,
        model,
        shard_array(tokens, "BT"),
        shard_array(lengths, "B"),
        Sampling(),
        shard_array(np.zeros(rows, np.uint32), "B"),  # greedy decoding uses no seeds
        max_new_tokens=max_new_tokens,
        end_ids=tuple(sorted(tokenizer.end_ids)),
    )
    generated = np.asarray(jax.reshard(found.tokens_Bn, activation_spec("SS")))  # on every host
    texts = list[str]()
    for prompt, row in zip(prompts, generated, strict=False):
        _, *pieces = stream_text(tokenizer, prompt, iter(row[row != NO_TOKEN].tolist()))
        texts.append("".join(pieces))
    return texts
