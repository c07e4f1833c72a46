"""Scores by two real processes over the loopback, each with a part of the model."""

import json

import jax
import numpy as np
import pytest
from conftest import tiny_model
from processes import Group

from llama_jax.checkpoint.model_folders import save_model
from llama_jax.inference.score import ScoreRequest, score
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh

CONFIG = tiny_model()
PROGRAM = """
import json, sys
import jax
from llama_jax.checkpoint.model_folders import load_model
from llama_jax.config.mesh import MeshConfig
from llama_jax.inference.score import ScoreRequest, score
from llama_jax.parallel.mesh import make_mesh
from llama_jax.runtime import hosts

folder, requests, _, coordinator, _, processes, _, process = sys.argv[1:]
with hosts.join(coordinator, int(processes), int(process)):
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        config, model = load_model(folder)
        requests = [ScoreRequest(tuple(tokens), n) for tokens, n in json.loads(requests)]
        scores = dict(score(config, model, requests))
    print(json.dumps([(scores[i].logprobs.tolist(), scores[i].greedy) for i in sorted(scores)]))
"""


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path):
    random = np.random.default_rng(0)
    tokens = [tuple(random.integers(3, 320, n).tolist()) for n in (9, 30, 31, 64)]
    requests = [ScoreRequest(t, 1 + len(t) // 2) for t in tokens]
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))
        save_model(tmp_path / "model", CONFIG, model, tokenizer=None)
        expected = dict(score(CONFIG, model, requests))
    argv = tmp_path / "model", json.dumps(requests)
    group = Group(tmp_path / "group", 2, *argv, program=("-c", PROGRAM))
    assert group.wait() == [0, 0], group.outputs("err")
    outputs = [json.loads(output.splitlines()[-1]) for output in group.outputs("out")]
    assert outputs[0] == outputs[1]
    for i, (logprobs, greedy) in enumerate(outputs[0]):
        # Both are sums of at most 64 float32 terms of size 1, in different orders.
        np.testing.assert_allclose(logprobs, expected[i].logprobs, atol=1e-5)
        assert greedy == expected[i].greedy
