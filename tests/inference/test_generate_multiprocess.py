"""Generation by several real processes over the loopback, each with a part of the model."""

import json

import jax
import numpy as np
from conftest import tiny_model
from processes import Group

from llama_jax.checkpoint.model_folders import save_model
from llama_jax.inference.stream import stream
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh

CONFIG = tiny_model()
PROMPT = np.random.default_rng(0).integers(3, 320, 9).tolist()

PROGRAM = """
import json, sys
import jax
from llama_jax.parallel.mesh import tensor_mesh
from llama_jax.runtime import hosts
from llama_jax.checkpoint.folders import read_model_config
from llama_jax.inference.load import load
from llama_jax.inference.stream import stream

folder, prompt, _, coordinator, _, processes, _, process = sys.argv[1:]
with hosts.join(coordinator, int(processes), int(process)):
    mesh = tensor_mesh(read_model_config(folder), jax.devices())
    with jax.set_mesh(mesh):
        config, model = load(folder)
        own = model.layers[0].wq[...].addressable_shards
        tokens = list(stream(config, model, json.loads(prompt), max_new_tokens=20))
    print(json.dumps({"tokens": tokens, "devices": mesh.size, "own": len(own)}))
"""


def test_two_processes_generate_the_tokens_of_one(tmp_path):
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))
        save_model(tmp_path / "model", CONFIG, model, tokenizer=None)
        expected = list(stream(CONFIG, model, PROMPT, max_new_tokens=20))
    argv = tmp_path / "model", json.dumps(PROMPT)
    group = Group(tmp_path / "group", 2, *argv, program=("-c", PROGRAM))
    assert group.wait() == [0, 0], group.outputs("err")
    for output in group.outputs("out"):
        assert json.loads(output.splitlines()[-1]) == {
            "tokens": expected,
            "devices": 8,
            "own": 4,
        }
