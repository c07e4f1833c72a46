"""Samples of a run on chats: answered in the chat format, after each validation."""

import pytest
from conftest import run, tiny_model

from llama_jax.config import yaml_file
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    TrainingConfig,
)

PROMPTS = ("aeiou kltn", "oun", "sr")


def write_config(folder, tokens, base, samples=PROMPTS, **mesh):
    config = Config(
        model=tiny_model(context=128),
        mesh=MeshConfig(**mesh),
        data=DataConfig(mixture={str(tokens): 1.0}, batch_size=8, seq_len=16),
        lora={"rank": 2},
        training=TrainingConfig(
            out=str(folder / "run"), init_from=str(base), steps=4, eval_every=2, eval_batches=1
        ),
        checkpoint=CheckpointConfig(every=4),
        logging=LoggingConfig(progress=False, tensorboard=False, samples=samples),
    )
    path = folder / "run.yaml"
    path.write_text(yaml_file.dump(config))
    return path


@pytest.mark.slow
def test_messages_are_answered_after_each_validation_as_by_generate(
    capsys, chat_folder, model_folder, tmp_path
):
    path = write_config(tmp_path, chat_folder, model_folder, data=2, fsdp=2, tensor=2)
    code, out, err = run(capsys, "train", path)
    assert code == 0, err
    parts = out.split("\n--- step ")[1:]
    heads = [part.split("\n", 1)[0] for part in parts]
    assert heads == [f"{step}: {prompt!r}" for step in (2, 4) for prompt in PROMPTS]
    for prompt, part in zip(PROMPTS, parts[3:], strict=True):
        command = ["generate", tmp_path / "run", "--chat", "--prompt", prompt]
        code, text, err = run(capsys, *command, "--temperature", 0, "--max-new-tokens", 80)
        assert code == 0, err
        assert part.split("\n", 1)[1].startswith(text.rstrip("\n")), prompt


def test_a_prompt_that_does_not_fit_is_refused_before_the_first_step(
    capsys, chat_folder, model_folder, tmp_path
):
    path = write_config(tmp_path, chat_folder, model_folder, samples=("kltn" * 99,))
    code, _, err = run(capsys, "train", path)
    assert code == 2
    assert "80 new ones don't fit the model's context of 128" in err
    assert not (tmp_path / "run").exists()
