import json

import jax
import numpy as np
import pytest
from conftest import load_reference, mesh_of, tiny_model

from llama_jax.checkpoint.tree import abstract_model
from llama_jax.errors import InputError
from llama_jax.evaluation.perplexity import nats_per_token
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh

CONFIG = tiny_model()
TOKENS = np.random.default_rng(0).integers(3, 320, 150).tolist()


@pytest.fixture(scope="module")
def model():
    with jax.set_mesh(one_device_mesh()):
        return jax.jit(Llama, static_argnums=0)(CONFIG, jax.random.key(0))


def test_stories260k_has_the_cross_entropy_of_transformers(shared_data):
    folder = shared_data / "stories260K"
    expected = json.loads((folder / "stories260K_reference.json").read_text())["text_mean_nll"]
    ids = np.load(folder / "stories260K_reference.npz")["text_ids"].tolist()
    with jax.set_mesh(one_device_mesh()):
        config, model = load_reference(folder / "hf")
        assert nats_per_token(config, model, ids) == pytest.approx(expected, abs=5e-6)


def test_windows_are_independent_and_padding_does_not_count(model):
    # 149 tokens in windows of 32: four full ones and one of 21, in two batches of 4 rows.
    nats = []
    with jax.set_mesh(one_device_mesh()):
        full = jax.jit(forward, static_argnums=0)
        for i in range(0, 149, 32):
            window = TOKENS[i : i + 33]
            tokens = np.array([window[:-1] + [0] * (33 - len(window))], np.int32)
            logits = np.asarray(full(CONFIG, model, tokens), np.float64)[0, : len(window) - 1]
            chosen = logits[np.arange(len(logits)), window[1:]]
            nats += (np.log(np.exp(logits).sum(-1)) - chosen).tolist()
        found = nats_per_token(CONFIG, model, TOKENS, window=32)
    assert len(nats) == 149
    assert found == pytest.approx(np.mean(nats), abs=1e-5)


def test_a_sharded_model_has_the_same_cross_entropy(model):
    with jax.set_mesh(one_device_mesh()):
        expected = nats_per_token(CONFIG, model, TOKENS)
    with jax.set_mesh(mesh_of((1, 1, 4))):
        sharded = jax.device_put(model, jax.tree.map(lambda a: a.sharding, abstract_model(CONFIG)))
        assert nats_per_token(CONFIG, sharded, TOKENS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1], "the text is shorter than two tokens"),
        ([1, 320], "token 320 is outside the model's vocabulary of 320"),
    ],
)
def test_invalid_texts_are_refused_with_a_reason(model, tokens, message):
    with pytest.raises(InputError, match=message):
        nats_per_token(CONFIG, model, tokens)
