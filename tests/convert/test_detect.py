"""A checkpoint of another format is refused with a message that contains its conversion command."""

import re
import shlex
import shutil

import pytest
from sample_checkpoints import (
    GGUF_TENSORS,
    tokenizer_model,
    write_folder,
    write_gguf,
    write_llama2c,
)

import llama_jax as lj
from llama_jax.checkpoint.folders import read_model_config
from llama_jax.cli.main import main
from llama_jax.convert.detect import open_source
from llama_jax.convert.formats import huggingface, meta
from llama_jax.errors import InputError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a checkpoint of every other format; its name needs quoting in a shell."""
    at = tmp_path_factory.mktemp("all") / "it's $here"
    at.mkdir()
    for name, kind in (("Llama/original", meta), ("models--o--n/snapshots/0f3c", huggingface)):
        (at / name).parent.mkdir(parents=True)
        write_folder(at / name, kind, 1)
        (at / name / "tokenizer.model").write_bytes(tokenizer_model())
    (at / "gguf").mkdir()
    write_gguf(at / "gguf/a-q8.gguf", GGUF_TENSORS, "Q8_0")
    write_llama2c(at / "stories.bin", 1)
    (at / "tokenizer.model").write_bytes(tokenizer_model())
    return at


CHECKPOINTS = {  # path -> format, and the folder in the suggested command
    "Llama/original": ("Meta", "models/Llama"),
    "Llama/original/consolidated.00.pth": ("Meta", "models/Llama"),
    "models--o--n/snapshots/0f3c": ("Hugging Face", "models/n"),
    "gguf": ("GGUF", "models/a-q8"),
    "gguf/a-q8.gguf": ("GGUF", "models/a-q8"),
    "stories.bin": ("llama2.c", "models/stories"),
}


def command(path):
    """Returns the message with which a path is refused, and the command in it."""
    with pytest.raises(InputError) as caught:
        read_model_config(path)
    (quoted,) = re.findall("`(.*)`", str(caught.value))
    return str(caught.value), shlex.split(quoted)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_suggested_command_converts_the_checkpoint(
    sources, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    kind, target = CHECKPOINTS[name]
    message, words = command(sources / name)
    assert f"{sources / name} is a checkpoint in {kind}'s format: convert it with `" in message
    assert message.endswith(f"`, then give {target}")
    assert main(words[1:]) == 0
    assert "warning" not in capsys.readouterr().err
    config, _ = lj.load(target)
    assert config.n_layers == 2
    assert lj.load_tokenizer(target).n_vocab == 288
    assert command(sources / name)[1][3] == f"{target}-2"  # the existing folder is not overwritten


def test_every_command_that_takes_a_model_suggests_the_conversion(
    sources, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sources / "Llama/original", "-meta")
    (tmp_path / "text").write_text("ab")
    commands = [
        ["generate", "--prompt", "a"],
        ["serve"],
        ["eval", "--perplexity", "text"],
        ["info"],
    ]
    for name, *options in commands:
        assert main([name, "./-meta", *options]) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith(f"llama-jax {name}: -meta is a checkpoint in Meta's format: ")
        assert "`llama-jax convert ./-meta models/-meta`" in stderr
    with pytest.raises(InputError, match=r"convert it with `llama-jax convert \./-meta"):
        lj.load("-meta")


def test_no_command_is_suggested_if_there_is_no_checkpoint(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"here")
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        with pytest.raises(InputError, match="neither a run folder nor a model folder"):
            read_model_config(path)
        with pytest.raises(InputError, match="contains weights without the configuration"):
            open_source(path)
    with pytest.raises(InputError, match="does not exist: give a folder"):
        read_model_config(tmp_path / "none")
    for name in "ab":
        write_gguf(tmp_path / f"{name}.gguf", {}, "F32")
    with pytest.raises(InputError, match=r"contains 2 \.gguf files: give one of them"):
        open_source(tmp_path)
