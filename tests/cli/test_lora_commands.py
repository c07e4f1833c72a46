"""The commands with the low-rank pairs of a LoRA run or of PEFT."""

import re

import pytest
from conftest import run
from lora_runs import write_lora_run

from llama_jax.errors import InputError
from llama_jax.model.lora import is_adapted


@pytest.fixture(scope="module")
def lora_run(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    return write_lora_run(folder, model_folder, tokenizer=model_folder)


@pytest.fixture(scope="module")
def adapter(lora_run):
    from llama_jax.convert.convert import convert

    return convert(lora_run, lora_run.parent / "adapter", to="peft", progress=False).folder


def test_generate_writes_the_same_text_from_the_run_and_from_its_parts(
    capsys, model_folder, lora_run, adapter, tmp_path
):
    def text(*args):
        code, out, err = run(capsys, "generate", *args, "--prompt", "aei", "--max-new-tokens", 20)
        assert code == 0, err
        return out

    expected = text(lora_run)
    assert expected != text(model_folder)
    assert text(lora_run, "--unmerged") == expected
    assert text(model_folder, "--lora", adapter) == expected
    code, out, _ = run(capsys, "convert", lora_run, tmp_path / "merged")
    assert code == 0
    assert "7 weights are bit-identical to the source's, 14 equal base + α·BA/r" in out
    out = run(capsys, "convert", "--verify", tmp_path / "merged", lora_run)[1]
    assert "14 equal base + α·BA/r" in out
    out = run(capsys, "info", tmp_path / "merged")[1]
    assert "7 weights proven identical, 0 changed in type, 14 merged with low-rank pairs" in out


def test_perplexity_measures_the_pairs(capsys, model_folder, lora_run, adapter, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("aeiou klt " * 10)

    def nats(*args):
        code, out, err = run(capsys, "eval", args[0], "--perplexity", path, *args[1:])
        assert code == 0, err
        return [float(line.split()[1]) for line in out.splitlines()]

    (expected,) = nats(lora_run)
    assert nats(lora_run, "--unmerged") == pytest.approx([expected], abs=2e-5)
    assert nats(model_folder, "--lora", adapter) == [expected]
    assert abs(nats(model_folder)[0] - expected) > 1e-3
    assert nats(lora_run, "--quantize", "int8")[0] == expected


def test_serve_keeps_pairs_apart_on_request(capsys, model_folder, lora_run, monkeypatch):
    models = []

    def engine(config, model, **options):
        models.append(model)
        raise InputError("the test ends here")

    monkeypatch.setattr("llama_jax.inference.engine.engine.Engine", engine)
    monkeypatch.setattr("llama_jax.inference.bandwidth.stored_copy_bandwidth", lambda: 1e9)
    for args in ((lora_run,), (lora_run, "--unmerged"), (model_folder, "--lora", lora_run)):
        code, _, err = run(capsys, "serve", *args, "--port", 0)
        assert (code, "the test ends here" in err) == (2, True), err
    assert [is_adapted(model) for model in models] == [False, True, False]


def test_info_describes_the_pairs_and_the_base(capsys, model_folder, lora_run):
    out = run(capsys, "info", lora_run)[1]
    # R (in + out) of each matrix: wq, wo 32 + 64, wk, wv 32 + 32, w1, w2, w3 32 + 64.
    n_params = 2 * 4 * (2 * 96 + 2 * 64 + 3 * 96)
    assert f"pairs       {n_params:,} trained parameters (" in out
    assert "rank 4, α/R 1.5, beside wq, wk, wv, wo, w1, w3, w2" in out
    assert f"base        {model_folder}" in out
    code, out, _ = run(capsys, "info", lora_run, "--verify")
    assert code == 0
    assert re.search(r"step 1: verified, [\d,]+ bytes", out)


def test_wrong_combinations_are_refused_in_a_sentence(capsys, model_folder, lora_run, adapter):
    for argv, sentence in [
        (["generate", adapter], "contains low-rank pairs of PEFT, and no model: give the model"),
        (["generate", lora_run, "--lora", adapter], "which has low-rank pairs of its own"),
        (["generate", model_folder, "--unmerged"], "has no low-rank pairs that could stay apart"),
        (["generate", model_folder, "--lora", model_folder], "neither a LoRA run"),
        (["convert", model_folder, "x", "--to", "peft"], "is not a LoRA run"),
        (["convert", lora_run, "x", "--lora", adapter], "which has low-rank pairs of its own"),
    ]:
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "")
        assert sentence in err
        assert len(err.splitlines()) == 1
