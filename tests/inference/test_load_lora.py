"""A model with low-rank pairs computes the same, merged or apart, on one device and on eight."""

import jax
import numpy as np
import pytest
from conftest import mesh_of
from lora_runs import random_pairs, write_base, write_lora_run
from sample_checkpoints import convert_to

import llama_jax as lj
from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.model_folders import load_model
from llama_jax.config.lora import LoraConfig
from llama_jax.errors import InputError
from llama_jax.inference.load import load
from llama_jax.model.lora import Adapted
from llama_jax.model.quantize import Int8Matrix
from llama_jax.parallel.mesh import one_device_mesh

TOKENS_BT = np.random.default_rng(0).integers(0, 320, (2, 24))
# Merged and unmerged sums round differently: about 2^-24 of each of a few hundred operations.
ATOL = 5e-5
SOME = LoraConfig(rank=2, alpha=4.0, targets=("w2", "wk", "wo", "wv"), rank_stabilized=True)
forward = jax.jit(lj.forward, static_argnums=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def run(base):
    return write_lora_run(base.parent / "run", base)


def logits(*args, **options):
    config, model = load(*args, **options)
    return np.asarray(forward(config, model, TOKENS_BT))


@pytest.fixture(scope="module")
def expected(base, run):
    """The logits of the model that `convert` has merged."""
    with jax.set_mesh(one_device_mesh()):
        return logits(convert_to(run, base.parent / "merged"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 4), (1, 1, 8)])  # 8: two copies of each head
def test_merged_and_unmerged_logits_are_those_of_the_converted_model(base, run, expected, shape):
    with jax.set_mesh(mesh_of(shape)):
        plain = logits(base)
        for unmerged in (False, True):
            found = logits(run, unmerged=unmerged)
            np.testing.assert_allclose(found, expected, atol=ATOL, rtol=0)
            np.testing.assert_array_less(0.1, np.max(np.abs(found - plain)))
            given = logits(base, pairs=random_pairs(read_model_config(base)), unmerged=unmerged)
            np.testing.assert_array_equal(given, found)


@pytest.mark.usefixtures("one_device")
def test_pairs_beside_some_matrices_and_with_a_stabilized_scale(base):
    config = read_model_config(base)
    pairs = random_pairs(config, SOME)
    merged, apart = (logits(base, pairs=pairs, unmerged=unmerged) for unmerged in (False, True))
    np.testing.assert_allclose(merged, apart, atol=ATOL, rtol=0)
    _, model = load(base, pairs=pairs, unmerged=True)
    kinds = {name: type(getattr(model.layers[1], name)) for name in ("wq", "wk", "w1", "w2")}
    assert [name for name, kind in kinds.items() if kind is Adapted] == ["wk", "w2"]


@pytest.mark.usefixtures("one_device")
def test_the_same_tokens_are_generated_merged_and_unmerged(run):
    tokens = [
        lj.generate(
            *load(run, unmerged=unmerged), TOKENS_BT[:, :5], [5, 3], lj.Sampling(), [0, 0],
            max_new_tokens=20,
        ).tokens_Bn
        for unmerged in (False, True)
    ]  # fmt: skip
    np.testing.assert_array_equal(*tokens)


@pytest.mark.usefixtures("one_device")
def test_an_int8_base_stays_int8_with_its_pairs_apart(base, tmp_path):
    int8 = convert_to(base, tmp_path / "int8", quantize="int8")
    of_int8 = write_lora_run(tmp_path / "run", int8)
    in_training = write_lora_run(tmp_path / "quantized", base, quantized="int8")
    found = []
    for folder, options in [
        (of_int8, {}),
        (in_training, {}),
        (write_lora_run(tmp_path / "float", base), {"quantize": "int8", "unmerged": True}),
        (int8, {"pairs": random_pairs(read_model_config(base))}),
    ]:
        config, model = load(folder, **options)
        assert config.quantized == "int8"
        assert isinstance(model.layers[0].w1, Adapted)
        assert isinstance(model.layers[0].w1.base, Int8Matrix)
        found.append(np.asarray(forward(config, model, TOKENS_BT)))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    merged = logits(convert_to(of_int8, tmp_path / "merged"))
    np.testing.assert_allclose(found[0], merged, atol=ATOL, rtol=0)


@pytest.mark.usefixtures("one_device")
def test_pairs_are_merged_before_a_model_is_quantized(run, tmp_path):
    config, model = load(run, quantize="int8")
    assert isinstance(model.layers[0].w1, Int8Matrix)
    converted = load(convert_to(run, tmp_path / "m", quantize="int8"))[1]
    difference = np.asarray(model.layers[0].w1.values[...], np.int32)
    difference -= np.asarray(converted.layers[0].w1.values[...], np.int32)
    # XLA and NumPy round the float32 sum differently, rarely across the border of a step.
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 1e-3
    assert config.quantized == "int8"


@pytest.mark.usefixtures("one_device")
def test_refused_loads(base, run, tmp_path):
    pairs = random_pairs(read_model_config(base))
    with pytest.raises(InputError, match="is a LoRA run, which has low-rank pairs of its own"):
        load(run, pairs=pairs)
    with pytest.raises(InputError, match="has no low-rank pairs that could stay apart: give a"):
        load(base, unmerged=True)
    with pytest.raises(InputError, match="low-rank pairs only: create a model with `llama-jax con"):
        load_model(run)
    other = write_base(tmp_path / "other", norm_eps=1e-6)
    path = run / "config.yaml"
    text = path.read_text()
    try:
        path.write_text(text.replace(str(base), str(other)))
        with pytest.raises(InputError, match="are not those beside which the pairs of"):
            load(run)
    finally:
        path.write_text(text)
