"""The commands that run a model: generate, serve, eval --perplexity."""

import os
import re
import signal
import sys
import threading

import httpx
import pytest
from conftest import run
from fake_engine import FakeEngine

from llama_jax.inference import generate
from llama_jax.serving import server
from llama_jax.serving.server import startup_message
from llama_jax.tokenizer.tokenizer import load_tokenizer


def test_generate_writes_only_the_text_to_standard_output(capsys, model_folder):
    command = ["generate", model_folder, "--prompt", "aeiou", "--max-new-tokens", 20]
    code, out, err = run(capsys, *command)
    assert code == 0
    assert out.startswith("aeiou")
    assert "20 tokens in" in err
    assert run(capsys, *command)[1] == out
    sampled = [run(capsys, *command, "--temperature", 2, "--seed", s)[1] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_stats_count_the_bytes_of_the_cache_that_decoding_reads(
    capsys, model_folder, monkeypatch
):
    slots = []

    def prefill(*args, **options):
        slots.append(options["slots"])
        return generate.prefill(*args, **options)

    def step_bytes(config, model, batch, slots_of_report):
        assert (batch, [slots_of_report]) == (1, slots)
        return 2_000_000

    monkeypatch.setattr("llama_jax.inference.stream.prefill", prefill)
    monkeypatch.setattr("llama_jax.inference.bandwidth.step_bytes", step_bytes)
    monkeypatch.setattr("llama_jax.inference.bandwidth.stored_copy_bandwidth", lambda: 1e9)
    # The prompt is padded to 64 tokens. New tokens overwrite the padding: 64 slots suffice.
    n_prompt = len(load_tokenizer(model_folder).encode("xyz" * 12, bos=True))
    assert 32 < n_prompt < 54
    command = ["generate", model_folder, "--prompt", "xyz" * 12, "--max-new-tokens", 10]
    code, _, err = run(capsys, *command, "--ignore-eos", "--stats")
    assert (code, slots) == (0, [64])
    assert f"prompt: {n_prompt} tokens, first new token after " in err
    assert re.search(
        r"memory: a step reads 2 MB: .* of this machine's copy bandwidth, 1.0 GB/s", err
    )


def test_stories260k_generates_the_expected_text_byte_for_byte(capsys, shared_data, tmp_path):
    source = shared_data / "stories260K"
    assert run(capsys, "convert", source / "meta", tmp_path / "m")[0] == 0
    command = ["generate", tmp_path / "m", "--ignore-eos", "--max-new-tokens", 200]
    _, out, _ = run(capsys, *command)
    assert out == (source / "greedy_200_expected.txt").read_text() + "\n"


def test_perplexity_measures_the_loss_of_int8(capsys, model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("aeiou klt " * 10)
    code, comparison, _ = run(
        capsys, "eval", model_folder, "--perplexity", text, "--quantize", "int8"
    )
    types, nats = zip(*(line.split()[:2] for line in comparison.splitlines()), strict=True)
    assert (code, types) == (0, ("float32", "int8", "change"))
    assert float(nats[2]) == pytest.approx(float(nats[1]) - float(nats[0]), abs=2e-5)
    code, out, _ = run(capsys, "convert", model_folder, tmp_path / "int8", "--quantize", "int8")
    assert code == 0
    assert out.endswith(f"llama-jax eval {tmp_path / 'int8'} --perplexity TEXT\n")
    assert (
        run(capsys, "eval", tmp_path / "int8", "--perplexity", text)[1]
        == comparison.splitlines()[1] + "\n"
    )
    code, out, _ = run(capsys, "generate", tmp_path / "int8", "--prompt", "aei")
    assert (code, out.startswith("aei")) == (0, True)
    assert "int8 with a scale for each output" in run(capsys, "info", tmp_path / "int8")[1]
    code, out, err = run(
        capsys, "eval", tmp_path / "int8", "--perplexity", text, "--quantize", "int8"
    )
    assert (code, out, "is already quantized to int8: quantize the original" in err) == (
        2,
        "",
        True,
    )


def test_serve_answers_until_sigterm_and_finishes_running_requests(
    capsys, model_folder, token_folder, monkeypatch
):
    engines = []

    def engine(config, model, *, rows, context, queue, progress, cache_tokens):
        assert (config.vocab_size, rows, context, queue) == (320, 3, 100, 5)
        assert cache_tokens == 640
        progress(0.25, "2 of 4: decode")  # not printed: a line appears every ten seconds
        engines.append(FakeEngine(load_tokenizer(token_folder)))
        engines[0].seconds = 0.02
        return engines[0]

    monkeypatch.setattr("llama_jax.inference.engine.engine.Engine", engine)
    monkeypatch.setenv("LLAMA_JAX_API_KEY", "open sesame")
    with server.bind_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    lines = []

    def send_requests():
        url = f"http://127.0.0.1:{port}"
        with httpx.Client() as http:
            assert http.get(f"{url}/v1/models").status_code == 401
            body = {"model": "mine", "prompt": "x", "stream": True, "max_tokens": 40, "seed": 1}
            headers = {"authorization": "Bearer open sesame"}
            with http.stream(
                "POST", f"{url}/v1/completions", json=body, headers=headers
            ) as response:
                for line in response.iter_lines():
                    if not lines:
                        os.kill(os.getpid(), signal.SIGTERM)
                    lines.append(line)

    thread = threading.Thread(target=send_requests)
    monkeypatch.setattr(server, "startup_message", lambda *a: thread.start() or startup_message(*a))
    options = ["--port", port, "--rows", 3, "--context", 100, "--queue", 5, "--name", "mine"]
    options += ["--cache-tokens", 640]
    code, out, err = run(capsys, "serve", model_folder, *options)
    thread.join()
    assert (code, out) == (0, "")
    *progress, address, _ = re.sub(r"\d+\.\d s", "N s", err).split("\n")
    assert progress == [
        "loading 0.00 GB of weights …", "loaded 0.00 GB of weights in N s",
        "compiling 3 programs …", "compiled 3 programs in N s",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    assert address == f"mine is served at {url} (web page) and {url}/v1 (API)"
    assert lines[-2:] == ["data: [DONE]", ""]
    assert engines[0].closed
    assert engines[0].reasons in (["length"], ["stop"])


def test_serve_reports_a_missing_package(capsys, model_folder, monkeypatch):
    monkeypatch.delattr("llama_jax.serving.server", raising=False)
    monkeypatch.delitem(sys.modules, "llama_jax.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run(capsys, "serve", model_folder)
    assert code == 2
    assert err == (
        "llama-jax serve: the server needs uvicorn: install it with"
        " pip install 'llama_jax[serve]'\n"
    )
