"""The tokenizer of a fine-tuned model: with its chat template, and all tokens that end an answer.

A program that loads an export stops only at the tokens that `generation_config.json` lists. A base
model often lists its end of text alone, but fine-tuning on chats teaches it to end an answer with
the end token of the chat format, which is one of `Tokenizer.end_ids`.
"""

import json
from typing import Any

from llama_jax.tokenizer.settings import to_json
from llama_jax.tokenizer.tokenizer import Tokenizer, tokenizer_from_files

_GENERATION = "generation_config.json"


def complete_tokenizer(trained: Tokenizer, base: Tokenizer | None) -> Tokenizer:
    """Returns the tokenizer of a fine-tuned model.

    Args:
        trained: the tokenizer of the training data.
        base: that of the model from which training started. Its chat template and generation
            settings are used if `trained` has none, and its end tokens always.
    """
    files = dict(trained.files)
    if base and base.template and not trained.template:
        files["chat_template.jinja"] = base.template.encode()
    settings = base.files if base and _GENERATION not in files else files
    generation: dict[str, Any] = json.loads(settings.get(_GENERATION, b"{}"))
    ends = trained.end_ids | (base.end_ids if base else frozenset())
    generation.setdefault("bos_token_id", trained.bos_id)
    generation["eos_token_id"] = sorted(i for i in ends if i < trained.n_vocab)
    return tokenizer_from_files(trained.path, files | {_GENERATION: to_json(generation)})
