"""Warns of frequent mistakes in LLaMA checkpoints: epsilon, rope, vocabulary, end tokens."""

import json

from llama_jax.config.family import FAMILY
from llama_jax.config.model import ModelConfig
from llama_jax.tokenizer.tokenizer import Tokenizer

_USUAL = {"norm_eps": (1e-8, 1e-3), "rope_theta": (1e2, 1e9), "context": (1, 1 << 30)}


def sanity_warnings(config: ModelConfig, tokenizer: Tokenizer | None) -> list[str]:
    """Returns a sentence for each suspicious value of a model and its tokenizer."""
    found = list[str]()
    if config.context == 4096 and config.norm_eps == 1e-6:
        found.append(
            "norm_eps is 1e-6, but Llama 2 was trained with 1e-5: early params.json of Llama-2-7b"
            "-chat had the wrong value"
        )
    for name, (low, high) in _USUAL.items():
        value = getattr(config, name)
        if not low <= value <= high:
            found.append(f"{name} is {value:g}, far from the value of every LLaMA: check it")
    scaling = config.rope_scaling
    for name, member in FAMILY.items():
        same = (member.dim, member.n_layers, member.hidden_dim, member.vocab_size) == (
            config.dim,
            config.n_layers,
            config.hidden_dim,
            config.vocab_size,
        )
        expected = member.rope_scaling
        if same and name.startswith("llama3.2") and expected and scaling != expected:
            factor = f"{scaling.factor:g}" if scaling else "none"
            found.append(
                f"the shape is that of {name}, whose rope scaling factor is"
                f" {expected.factor:g}, but here it is {factor}: convert with --model {name}"
            )
    if tokenizer is None:
        found.append("there is no tokenizer: give one with --tokenizer")
        return found
    if tokenizer.n_vocab > config.vocab_size:
        found.append(
            f"the tokenizer has {tokenizer.n_vocab:,} tokens, but the embedding has"
            f" {config.vocab_size:,} rows: they don't belong together"
        )
    elif config.vocab_size - tokenizer.n_vocab >= 1024:  # embeddings are padded, but by less
        found.append(
            f"the embedding has {config.vocab_size:,} rows, but the tokenizer has only"
            f" {tokenizer.n_vocab:,} tokens: check that it is the tokenizer of this model"
        )
    if "generation_config.json" in tokenizer.files and tokenizer.template:
        eos = json.loads(tokenizer.files["generation_config.json"]).get("eos_token_id")
        listed = {eos} if isinstance(eos, int) else set(eos or ())
        if len(listed) == 1 and len(tokenizer.end_ids) > 1:
            found.append(
                f"generation_config.json lists only {min(listed)} as end of text, but an instruct"
                f" model also ends with {sorted(tokenizer.end_ids - listed)}: llama_jax stops at"
                " all of them, other programs do not"
            )
    return found
