"""`generate` by several real processes over the loopback, each with a part of the model."""

import json

import jax
import pytest
from conftest import run, tiny_model
from processes import Group

from llama_jax.checkpoint.model_folders import save_model
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer

DRAWN = "--temperature", 1.5, "--top-p", 0.9, "--seed", 3

# Prints how many numbers of the weights the process reads, and how many there are.
REPORTING = """
import json, math, sys
from llama_jax.checkpoint import arrays
from llama_jax.cli.main import main

read_shards, read, total = arrays._read_shards, 0, 0

def count(store, like, start_read):
    global read, total
    shards = read_shards(store, like, start_read)
    read += sum(math.prod((b or n) - (a or 0) for (a, b), n in zip(p, like.shape)) for p in shards)
    total += math.prod(like.shape)
    return shards

arrays._read_shards = count
code = main(sys.argv[1:])
print(json.dumps({"read": read, "total": total}))
sys.exit(code)
"""


def save(folder, token_folder, **changes):
    config = tiny_model(context=128, **changes)
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        save_model(folder, config, model, load_tokenizer(token_folder))
    return config


def command(folder, *more):
    return ["generate", folder, "--prompt", "aeiou", "--ignore-eos", "--max-new-tokens", 40, *more]


def test_two_processes_generate_the_text_of_one_and_read_half_of_the_weights(
    capsys, token_folder, tmp_path
):
    # Two devices have a copy of each of the two key/value heads.
    config = save(tmp_path / "model", token_folder, n_kv_heads=2)
    argv = command(tmp_path / "model", *DRAWN)
    group = Group(tmp_path / "group", 2, *argv, program=("-c", REPORTING), devices=4)
    code, expected, _ = run(capsys, *argv)
    assert code == 0
    assert group.wait() == [0, 0], group.outputs("err")
    (out, quiet), (err, no_err) = group.outputs("out"), group.outputs("err")
    continuation = expected.removeprefix("aeiou")
    assert [continuation in output for output in (out, quiet)] == [True, False]
    assert "40 tokens in" in err
    assert no_err == ""
    norms = (2 * config.n_layers + 1) * config.dim  # all devices have them
    for output in (out, quiet):
        counted = json.loads(output.splitlines()[-1])
        assert counted["total"] == config.n_params
        assert counted["read"] == norms + (config.n_params - norms) // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "more"),
    [((8, 2), ()), ((8, 4), DRAWN), ((2, 1), DRAWN)],
    ids=["greedy, two devices to a key/value head", "drawn", "drawn, two copies of the model"],
)
def test_four_processes_generate_the_text_of_one(capsys, token_folder, tmp_path, heads, more):
    save(tmp_path / "model", token_folder, n_heads=heads[0], n_kv_heads=heads[1])
    argv = command(tmp_path / "model", *more)
    group = Group(tmp_path / "group", 4, *argv, devices=4)
    expected = run(capsys, *argv)[1]
    assert group.wait() == [0] * 4, group.outputs("err")
    continuation = expected.removeprefix("aeiou")
    found = [continuation in output for output in group.outputs("out")]
    assert found == [True, False, False, False]


@pytest.mark.slow
def test_hosts_end_together_with_one_sentence(token_folder, tmp_path):
    save(tmp_path / "model", token_folder)
    seeds = [["--seed", "1"], ["--seed", "2"]]
    argv = command(tmp_path / "model")
    group = Group(tmp_path / "seeds", 2, *argv, own_arguments=seeds, devices=2)
    assert group.wait() == [2, 2]
    for err in group.outputs("err"):
        assert err.startswith("llama-jax: host 0 (")
        assert "--seed is 1 on host 0, but 2 on host 1" in err
        assert err.count("\n") == 1


# Host 0 has a standard output whose reader has exited.
CLOSED = """
import os, sys
from llama_jax.cli.main import main

if sys.argv[-1] == "0":
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_all_hosts_end_when_the_reader_of_the_text_exits(token_folder, tmp_path):
    save(tmp_path / "model", token_folder)
    argv = command(tmp_path / "model")
    group = Group(tmp_path / "head", 2, *argv, program=("-c", CLOSED), devices=2)
    assert group.wait() == [0, 0], group.outputs("err")
    for err in group.outputs("err"):
        assert err.startswith("llama-jax: host 0 (")
        assert err.endswith("): the reader of standard output has exited\n")
        assert err.count("\n") == 1
