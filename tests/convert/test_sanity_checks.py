import json
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import pytest

from llama_jax.config.family import FAMILY
from llama_jax.config.model import RopeScaling
from llama_jax.convert.sanity_checks import sanity_warnings
from llama_jax.tokenizer.export import huggingface_files
from llama_jax.tokenizer.tokenizer import load_tokenizer


def llama3(folder: Path, end_ids: list[int] | int):
    """Returns a small tokenizer with Llama 3's special tokens, a chat template and end ids."""
    ranks = [bytes([i]) for i in range(256)]
    lines = [f"{b64encode(token).decode()} {i}" for i, token in enumerate(ranks)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    for name, data in huggingface_files(load_tokenizer(folder)).items():
        (folder / name).write_bytes(data)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids}))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return load_tokenizer(folder)


def test_the_released_models_cause_no_warning(llama2):
    assert sanity_warnings(FAMILY["llama2-7b"], llama2) == []
    assert sanity_warnings(FAMILY["llama-7b"], llama2) == []
    assert sanity_warnings(FAMILY["codellama-7b"], llama2) == []


def test_the_epsilon_of_early_llama2_chat_files_causes_a_warning(llama2):
    (warning,) = sanity_warnings(replace(FAMILY["llama2-7b"], norm_eps=1e-6), llama2)
    assert "Llama 2 was trained with 1e-5" in warning


@pytest.mark.parametrize("scaling", [RopeScaling(factor=8.0), None])
def test_a_wrong_rope_factor_of_llama_3_2_causes_a_warning(scaling):
    config = replace(FAMILY["llama3.2-1b"], rope_scaling=scaling)
    first, *_ = sanity_warnings(config, None)
    assert "whose rope scaling factor is 32" in first
    assert "--model llama3.2-1b" in first
    (no_tokenizer,) = sanity_warnings(FAMILY["llama3.2-3b"], None)
    assert sanity_warnings(FAMILY["llama3.2-1b"], None) == [no_tokenizer]


def test_a_single_end_token_of_an_instruct_model_causes_a_warning(tmp_path):
    config = replace(FAMILY["llama3-8b"], vocab_size=512)
    (warning,) = sanity_warnings(config, llama3(tmp_path, 257))
    assert "lists only 257 as end of text" in warning
    assert sanity_warnings(config, llama3(tmp_path, [257, 264, 265])) == []


def test_a_tokenizer_that_does_not_fit_the_embedding_causes_a_warning(llama2):
    (warning,) = sanity_warnings(replace(FAMILY["llama2-7b"], vocab_size=31_999), llama2)
    assert "32,000 tokens, but the embedding has 31,999 rows" in warning
    (warning,) = sanity_warnings(FAMILY["llama3-8b"], llama2)
    assert "the tokenizer has only 32,000 tokens" in warning
