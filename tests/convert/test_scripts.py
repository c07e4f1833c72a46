"""The scripts in convert/, one for each direction, preserve the weights bit for bit."""

import runpy
import sys

import pytest
from conftest import ROOT
from sample_checkpoints import GGUF_TENSORS, tokenizer_model, write_folder, write_gguf

from llama_jax.checkpoint.single_weights import WeightsReader
from llama_jax.convert.formats import meta


@pytest.fixture
def run(monkeypatch):
    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "convert" / f"{script}.py"), run_name="__main__")
        return ended.value.code

    return run


def weights(folder):
    reader = WeightsReader(folder)
    return {name: reader.read(name, None).tobytes() for name in reader.arrays}


def test_each_direction_preserves_the_weights(tmp_path, run):
    meta_folder, gguf_file, at = tmp_path / "from", tmp_path / "f32.gguf", tmp_path / "to"
    write_folder(meta_folder, meta, 1)
    (meta_folder / "tokenizer.model").write_bytes(tokenizer_model())
    write_gguf(gguf_file, GGUF_TENSORS, "F32")
    assert run("meta_to_orbax", meta_folder, at / "a") == 0
    assert run("orbax_to_huggingface", at / "a", at / "hf") == 0
    assert run("huggingface_to_orbax", at / "hf", at / "b") == 0
    assert run("orbax_to_meta", at / "b", at / "meta", "--shards", 2) == 0
    assert run("meta_to_orbax", at / "meta", at / "c") == 0
    assert len(list((at / "meta").glob("consolidated.*.pth"))) == 2
    assert weights(at / "a") == weights(at / "b") == weights(at / "c")
    assert run("gguf_to_orbax", gguf_file, at / "d") == 0
    assert weights(at / "d") == weights(at / "a")


def test_a_missing_source_is_reported_in_one_sentence(tmp_path, run, capsys):
    assert run("gguf_to_orbax", tmp_path / "none.gguf", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("llama-jax convert: there is no ")
