"""A server on several real processes: host 0 answers, all compute."""

import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import pytest
from processes import Group, free_port

from llama_jax.inference.complete import complete
from llama_jax.inference.load import load
from llama_jax.inference.sampling import Sampling
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

# Prompts of one and of several chunks, greedy and drawn, more than there are rows.
REQUESTS = [
    {
        "prompt": "aeiou klt " * (1 + 2 * (i % 3)),
        "max_tokens": 10 + 3 * i,
        "temperature": (0, 1.3)[i % 2],
        "top_p": 0.9,
        "seed": i,
    }
    for i in range(8)
]


@pytest.fixture(scope="module")
def expected(model_folder):
    """The text of each request, alone on one device."""
    tokenizer = load_tokenizer(model_folder)
    with jax.set_mesh(one_device_mesh()):
        config, model = load(model_folder)
        return [
            complete(
                config, model, tokenizer, request["prompt"],
                max_new_tokens=request["max_tokens"], seed=request["seed"],
                sampling=Sampling(temperature=request["temperature"], top_p=request["top_p"]),
            )
            for request in REQUESTS
        ]  # fmt: skip


def start(folder, processes, devices, model_folder, *flags):
    """Starts a server on several processes with `devices` in all; returns them and its URL."""
    port = free_port()
    argv = "serve", model_folder, "--port", port, "--rows", 3, "--context", 128, *flags
    group = Group(folder, processes, *argv, devices=devices)
    group.wait_until(lambda: "is served at" in group.outputs("err")[0], 300)
    return group, f"http://127.0.0.1:{port}/v1/completions"


def post(url, request):
    response = httpx.post(url, json=request, timeout=100)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def answers(url):
    """Returns the texts of all requests, which are sent at the same time."""
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        return list(pool.map(lambda request: post(url, request), REQUESTS))


def scores(url):
    """Returns the log-probabilities of a prompt, which are computed as a prefix tree."""
    body = {"prompt": "aeiou klt", "max_tokens": 0, "echo": True, "logprobs": 0}
    found = httpx.post(url, json=body, timeout=100).json()
    return found["choices"][0]["logprobs"]["token_logprobs"]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "flags"), [(4, ()), (2, ("--cache-tokens", 256))])
def test_two_hosts_answer_as_one_and_end_after_the_running_request(
    expected, model_folder, tmp_path, devices, flags
):
    group, url = start(tmp_path / "two", 2, devices, model_folder, *flags)
    assert answers(url) == expected
    assert answers(url) == expected  # from the KV cache of the first ones
    assert all(logprob < 0 for logprob in scores(url)[1:])
    limited = {"prompt": "aeiou", "max_tokens": 20, "guided_regex": "[a-c]{3}-[0-9]{2}"}
    with ThreadPoolExecutor(3) as pool:
        for text in pool.map(lambda seed: post(url, limited | {"seed": seed}), range(3)):
            assert re.fullmatch("[a-c]{3}-[0-9]{2}", text)
    body = {"prompt": "aeiou", "max_tokens": 20, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=100) as response:
        lines = response.iter_lines()
        next(lines)
        group.send_signal(1, signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert group.wait() == [0, 0], group.outputs("err")
    err, quiet = group.outputs("err")
    assert quiet == ""
    assert "Traceback" not in err


@pytest.mark.slow
def test_two_copies_on_two_hosts_each_end_with_a_sentence_when_one_host_is_killed_under_load(
    expected, model_folder, tmp_path
):
    copies = "--replicas", 2, "--rows", 4
    group, url = start(tmp_path / "four", 4, 4, model_folder, *copies)
    assert answers(url) == expected
    stopped = threading.Event()

    def load_server():
        while not stopped.is_set():
            try:
                answers(url)
            except (httpx.HTTPError, AssertionError):  # no answer, or status 500
                return

    thread = threading.Thread(target=load_server)
    thread.start()
    time.sleep(0.5)
    group.send_signal(2, signal.SIGKILL)
    start_time = time.monotonic()
    codes = group.wait(60)
    assert time.monotonic() - start_time < 20
    stopped.set()
    thread.join()
    assert codes == [1, 1, -signal.SIGKILL, 1]
    for i in (0, 1, 3):
        last = group.outputs("err")[i].splitlines()[-1]
        assert last.startswith("llama-jax: host 2 (")
        assert "has died or can't be reached" in last
