"""Commands, their output and exit codes, and the sentence for each bad input."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run, tiny_model

from llama_jax.cli.main import COMMANDS, main
from llama_jax.config import yaml_file
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import Config, DataConfig, LoggingConfig, TrainingConfig
from llama_jax.data import text_files
from llama_jax.runtime import compile_cache


@pytest.mark.slow
def test_the_quickstart_trains_resumes_and_generates(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    # .ci/run trains on the complete library.
    library = sorted(text_files._standard_library())[:150]
    monkeypatch.setattr(text_files, "_standard_library", lambda: iter(library))
    command = ["train", "configs/quickstart.yaml", "mesh.fsdp=1", "mesh.data=8"]
    command += ["training.eval_every=2", "training.eval_batches=2", "data.seq_len=64"]
    command += ["model.n_layers=1"]  # each layer is compiled: four take four times as long
    cached = []
    monkeypatch.setattr(compile_cache, "enable_compile_cache", lambda: cached.append(True))
    code, out, err = run(capsys, *command, "training.steps=2")
    assert (code, len(cached)) == (0, 4)  # the run, and each of its three samples
    assert "data/quickstart does not exist yet: tokenizing python-stdlib" in err
    assert re.search(r"step 2/2  loss .*  data wait \d+\.\d%", err)
    assert "validation loss" in out
    assert "unigram entropy" in out
    assert out.count("--- sample") == 3
    assert 'continue with: llama-jax generate runs/quickstart --prompt "def "' in out
    code, out, err = run(capsys, *command, "training.steps=4")
    assert (code, "resumes after step 2 of 4" in err) == (0, True)
    code, out, err = run(capsys, *command, "training.steps=4")
    assert (code, "is finished: 4 steps are done" in err) == (0, True)
    code, out, err = run(
        capsys, "generate", "runs/quickstart", "--prompt", "def ", "--max-new-tokens", 4
    )
    assert (code, out.startswith("def ")) == (0, True)
    code, out, err = run(capsys, "info", "runs/quickstart")
    assert "4 of 4 steps saved (finished)" in out
    assert re.search(r"data wait   \d+\.\d\d% of the step time", out)
    assert "1,786,624 parameters" in out
    assert yaml_file.load(ROOT / "configs/quickstart.yaml").model.n_params == 4_000_000


def test_tokenize_creates_a_folder_that_info_describes(capsys, tmp_path):
    texts = tmp_path / "t.jsonl"
    texts.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(40)))
    out = tmp_path / "shards"
    code, output, _ = run(capsys, "tokenize", texts, "--out", out, "--vocab-size", 280)
    assert code == 0
    assert "train: 38 documents" in output
    code, output, _ = run(capsys, "info", out)
    assert code == 0
    assert "38 documents" in output
    assert "280 tokens, begin 1, end 2" in output
    again = tmp_path / "again"
    run(capsys, "tokenize", texts, "--out", again, "--tokenizer", out / "tokenizer.model")
    assert (again / "meta.json").read_text() == (out / "meta.json").read_text()


def test_info_describes_a_model(capsys, model_folder):
    _, out, _ = run(capsys, "info", model_folder)
    assert "8 heads of 8, 4 key/value heads" in out
    assert "320 tokens, begin 1, end 2" in out


def test_convert_reports_its_proof_and_verify_repeats_it(capsys, model_folder, tmp_path):
    code, out, _ = run(capsys, "convert", model_folder, tmp_path / "hf", "--to", "hf")
    assert code == 0
    assert "peak memory" in out
    assert "21 weights are bit-identical to the source's" in out
    code, out, _ = run(capsys, "convert", "--verify", tmp_path / "hf", model_folder)
    assert (code, out) == (0, f"{tmp_path / 'hf'}: 21 weights are bit-identical to the source's\n")
    code, _, err = run(
        capsys, "convert", tmp_path / "hf", tmp_path / "m", "--dtype", "bfloat16",
        "--mesh", "fsdp=2", "--max-ram", "64GiB", "--tokenizer", model_folder,
    )  # fmt: skip
    assert (code, err) == (0, "")
    _, out, _ = run(capsys, "info", tmp_path / "m")
    assert "receipt     from huggingface hf: 0 weights proven identical, 21 changed in type" in out
    assert "\nwarning " not in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_like_a_manual_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"example:\n  llama-jax {command} " in out
    if command == "train":
        for key in yaml_file.KEYS:
            assert f"  {key}  (" in out


def bad_commands(tmp_path, model_folder, token_folder):
    """Returns commands with bad inputs, and a part of the expected message of each."""

    def damaged_copy(change):
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(model_folder, copy)
        change(copy)
        return copy

    def write_config(**sections):
        values = {
            "model": tiny_model(),
            "mesh": MeshConfig(data=8, fsdp=1),
            "data": DataConfig(mixture={str(token_folder): 1.0}, batch_size=8, seq_len=16),
            "training": TrainingConfig(out=str(tmp_path / "run"), steps=1),
            "logging": LoggingConfig(tensorboard=False, progress=False),
        }
        path = tmp_path / f"c{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml_file.dump(Config(**(values | sections))))
        return path

    good = write_config()
    typo = tmp_path / "typo.yaml"
    typo.write_text(good.read_text().replace("peak_lr:", "peek_lr:"))
    incomplete = tmp_path / "incomplete.jsonl"
    incomplete.write_text('{"text": "a"}\n{"text": "b')
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 " * 100)
    small = tmp_path / "small.txt"
    small.write_text("a few words")
    other_tokenizer = damaged_copy(lambda f: (f / "tokenizer.model").write_bytes(b"junk"))
    no_weights = damaged_copy(lambda f: shutil.rmtree(f / "weights"))
    truncated = damaged_copy(
        lambda f: [
            path.write_bytes(path.read_bytes()[:40])
            for path in f.glob("weights/model/*/c/**/*")
            if path.is_file()
        ]
    )
    wider = damaged_copy(
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"dim": 32', '"dim": 64')
        )
    )
    foreign = damaged_copy(lambda f: (f / "config.json").write_text('{"model_type": "llama"}'))
    out, tokens = tmp_path / "out", token_folder
    vocabulary = ["--vocab-size", "300"]
    hosts = ["--processes", "2", "--coordinator"]
    return [
        (["train", tmp_path / "no.yaml"], "can't read the configuration"),
        (["train", typo], "optimizer.peek_lr is not a known key; did you mean optimizer.peak_lr?"),
        (["train", good, "training.steps=soon"], "training.steps must be a valid integer"),
        (["train", good, "training"], "an override has the form section.key=value"),
        (["train", good, "mesh.data=3"], "does not fit 8 device(s)"),
        (["train", good, "mesh.tensor=8", "mesh.data=1"], "sizes that divide this model: 1, 2, 4"),
        (["train", good, "data.batch_size=12"], "does not divide the 12 rows"),
        (["train", good, "data.seq_len=64000", "model.context=64000"], "fewer than one window"),
        (["train", good, "data.mixture={nowhere: 1}"], "no folder of token shards at nowhere"),
        (["train", good, f"data.mixture={{{tmp_path}: 1}}"], "has no meta.json"),
        (["train", good, "model.vocab_size=128"], "has 320 tokens, but model.vocab_size is 128"),
        (["train", good, f"training.out={good}"], "can't write the run folder"),
        (["train", good, f"training.init_from={tmp_path}"], "neither a run folder nor a model"),
        (["tokenize", tmp_path / "no*", "--out", out, *vocabulary], "no text files at"),
        (["train", good, "--process", "0"], "--processes and --process go together"),
        (["train", good, *hosts, "h", "--process", "0"], "--coordinator h: write HOST:PORT"),
        (
            ["train", good, *hosts, "h:1", "--process", "2"],
            "--process 2 with --processes 2: number the",
        ),
        (["tokenize", incomplete, "--out", out, *vocabulary], "incomplete.jsonl:2: not valid JSON"),
        (["tokenize", latin, "--out", out, *vocabulary], "latin.txt:1: not UTF-8 text"),
        (["tokenize", small, "--out", out, "--vocab-size", "9999"], "corpus is too small to train"),
        (["tokenize", small, "--out", out, "--vocab-size", "5"], "corpus is too small to train"),
        (["tokenize", small, "--out", out, "--tokenizer", small], "is not a SentencePiece model"),
        (["tokenize", small, "--out", tokens, *vocabulary], "already exists"),
        (
            ["tokenize", small, "--out", out, *vocabulary, "--validation-fraction", "2"],
            "--validation-fraction must be",
        ),
        (["generate", tmp_path], "neither a run folder nor a model folder"),
        (["generate", tmp_path / "no"], "does not exist"),
        (["generate", model_folder, "--temperature", "-1"], "--temperature must be greater"),
        (["generate", model_folder, "--top-p", "0"], "--top-p must be greater than 0"),
        (["generate", model_folder, "--max-new-tokens", "500"], "don't fit the model's context"),
        (["generate", model_folder, "--max-new-tokens", "0"], "--max-new-tokens must be at least"),
        (["generate", other_tokenizer], "the checksum of tokenizer.model differs"),
        (["generate", no_weights], "is damaged or cut short"),
        (["generate", truncated], "is damaged or cut short"),
        (["generate", wider], "contains dim 64, but the weights were written with 32"),
        (["generate", foreign], "is not the configuration of a llama_jax model"),
        (["serve", tmp_path / "no"], "does not exist"),
        (["serve", model_folder, "--rows", "0"], "--rows must be at least 1, not 0"),
        (["serve", model_folder, "--replicas", "9"], "8 device(s) can't have 9 copies"),
        (["serve", model_folder, "--replicas", "3"], "8 rows can't be shared equally by 3 copies"),
        (["serve", model_folder, "--max-tokens", "0"], "--max-tokens must be at least 1, not 0"),
        (["serve", model_folder, "--context", "500"], "--context 500 is more than the model's 128"),
        (
            ["serve", model_folder, "--port", "99999"],
            "the server can't listen on 127.0.0.1, port 99999",
        ),
        (
            ["serve", model_folder, "--host", "a host"],
            "the server can't listen on a host, port 8000",
        ),
        (["serve", model_folder, "--max-body", "lots"], "--max-body must be a size such as"),
        (["serve", model_folder, "--timeout", "nan"], "--timeout must be above 0, not nan"),
        (["serve", model_folder, "--api-key", ""], "the API key must be printable ASCII"),
        (
            ["eval", model_folder, "--perplexity", tmp_path / "no"],
            "can't be read (No such file or directory)",
        ),
        (
            ["plan", good, "--topology", "v5p:4x4x4", "--picture", "plan.pdf"],
            "--picture plan.pdf: name a file that ends with .png or .svg",
        ),
        (
            ["plan", good, "--topology", "v5p:4x4x4", "--picture", "no/plan.png"],
            "--picture no/plan.png: there is no folder no: create it first",
        ),
        (
            ["plan", "llama2-7b", "--topology", "v5p:4x4x4"],
            "llama2-7b is a model, and a training run needs a configuration file: give one, or add"
            " --inference to plan serving llama2-7b",
        ),
        (["plan", model_folder, "--topology", "v5p:4x4x4"], "or add --inference to plan serving"),
        (
            ["eval", model_folder, "--perplexity", latin],
            "latin.txt can't be read (it is not UTF-8)",
        ),
        (["convert", tmp_path / "no", out], "there is no"),
        (["convert", tmp_path, out], "is not a checkpoint: give a Meta folder"),
        (["convert", small, out], "small.txt is not a checkpoint"),
        (["convert", model_folder], "the folder to create is missing"),
        (["convert", model_folder, tokens], "already exists"),
        (["convert", model_folder, out, "--shards", "2"], "--shards is for --to meta"),
        (
            ["convert", model_folder, out, "--to", "meta"],
            "Meta's format has heads of size dim / n_heads",
        ),
        (["convert", model_folder, out, "--to", "hf", "--quantize", "int8"], "is for --to orbax"),
        (["convert", model_folder, out, "--max-ram", "lots"], "--max-ram must be a size such as"),
        (["convert", model_folder, out, "--max-ram", "1MB"], "is too little: the largest weight"),
        (["convert", model_folder, out, "--mesh", "rows=2"], "write --mesh like fsdp=8,tensor=4"),
        (["convert", model_folder, out, "--model", "llama-9b"], "is not known; the family is"),
        (["convert", model_folder, out, "--model", "llama-7b"], "requires (32000, 4096)"),
        (["convert", model_folder, out, "--tokenizer", small], "is not a SentencePiece model"),
        (["convert", no_weights, out], "contains no weights"),
        (["convert", truncated, out], "is damaged or cut short"),
        (["convert", "--verify", model_folder], "has no receipt.json"),
        (["info", tmp_path / "no"], "there is no folder"),
        (
            ["train", good, "training.out=hdfs://b/x"],
            "training.out: hdfs://b/x: URLs of hdfs: are not",
        ),
        (
            ["train", good, "training.init_from=hdfs://b/x"],
            "training.init_from: hdfs://b/x: URLs of hdfs: are not",
        ),
        (["train", good, "data.mixture={hdfs://b/x: 1}"], "hdfs://b/x: URLs of hdfs: are not"),
        (
            ["train", good, "data.corpus=[https://h/x]"],
            "https://h/x: URLs of https: are not",
        ),
        (["train", "hdfs://b/run.yaml"], "hdfs://b/run.yaml: URLs of hdfs: are not"),
        (
            ["tokenize", small, "--out", "hdfs://b/x", *vocabulary],
            "hdfs://b/x: URLs of hdfs: are not",
        ),
        (
            ["tokenize", small, "hdfs://b/t", "--out", out, *vocabulary],
            "hdfs://b/t: URLs of hdfs: are not",
        ),
        (["tokenize", small, "--out", out, "--tokenizer", "hf://t"], "hf://t: URLs of hf: are not"),
        (["generate", "hdfs://b/m"], "hdfs://b/m: URLs of hdfs: are not"),
        (["serve", "hdfs://b/m"], "hdfs://b/m: URLs of hdfs: are not"),
        (
            ["eval", model_folder, "--perplexity", "https://h/t.txt"],
            "https://h/t.txt: URLs of https: are not",
        ),
        (["convert", "hf://a/b", out], "hf://a/b: URLs of hf: are not"),
        (["convert", model_folder, "hdfs://b/m"], "hdfs://b/m: URLs of hdfs: are not"),
        (["info", "hdfs://b/m"], "hdfs://b/m: URLs of hdfs: are not"),
        (["info", tmp_path], "neither a run folder nor a model folder"),
    ]


def test_every_bad_input_gets_one_sentence_and_exit_code_2(
    capsys, tmp_path, model_folder, token_folder
):
    commands = bad_commands(tmp_path, model_folder, token_folder)
    assert len(commands) >= 20
    other_sentences = []
    for argv, sentence in commands:
        before = {p for p in tmp_path.iterdir() if p.name != "run"}
        code, out, err = run(capsys, *argv)
        messages = [s for s in err.splitlines() if s.startswith(f"llama-jax {argv[0]}: ")]
        assert code == 2, argv
        if sentence not in messages[0]:
            other_sentences.append((sentence, messages[0]))
        assert len(messages) == 1
        assert "Traceback" not in err
        assert out == ""
        assert {p for p in tmp_path.iterdir() if p.name != "run"} == before, argv
    assert other_sentences == []


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["plan", "--topology"]])
def test_help_and_mistyped_commands_answer_without_jax(argv):
    program = f"""
import sys
from llama_jax.cli.main import COMMANDS, main
try:
    main({argv})
except SystemExit:
    print({{"jax", "flax", "orbax", "starlette"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr


def test_inference_on_a_cpu_starts_without_pallas():
    program = """
import sys
import llama_jax.inference.engine.engine, llama_jax.inference.load, llama_jax.inference.stream
print("jax.experimental.pallas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
