import jax
import numpy as np
import pytest
from conftest import tiny_model

from llama_jax.checkpoint.tree import abstract_model, tree_to_dict
from llama_jax.config.family import FAMILY
from llama_jax.config.model import ffn_dim
from llama_jax.convert.formats import huggingface, meta, model_folder
from llama_jax.convert.layout import AXES, Layout, Weight, same_bits, weights
from llama_jax.errors import InputError

# Heads 6, key/value heads 3: n_heads / n_kv_heads differs from n_kv_heads, so no mistake hides.
CONFIG = tiny_model(dim=48, n_heads=6, n_kv_heads=3, head_dim=8, hidden_dim=66, vocab_size=96)


def random(weight: Weight) -> np.ndarray:
    shape = CONFIG.shape(AXES[weight.name].ours)
    return np.random.default_rng(hash(weight) % 1000).standard_normal(shape, np.float32)


def test_the_table_has_the_axes_of_the_model():
    with jax.set_mesh(jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"))):
        model = tree_to_dict(abstract_model(CONFIG))
    for weight in weights(CONFIG):
        tree = model if weight.layer is None else model["layers"]
        shape = tree[weight.name].shape
        unstacked = shape if weight.layer is None else shape[1:]
        assert unstacked == CONFIG.shape(AXES[weight.name].ours), weight
    stored = {n for n in model if n != "layers"} | set(model["layers"])
    assert stored == {weight.name for weight in weights(CONFIG)}


@pytest.mark.parametrize("name", ["wq", "wk"])
def test_interleaved_rotary_pairs_become_half_split(name):
    heads = {"wq": 6, "wk": 3}[name]
    theirs = np.random.default_rng(0).standard_normal((heads * 8, 48), np.float32)
    ours = Layout(meta.NAMES, interleaved=True).to_ours(CONFIG, Weight(name, 0), [theirs])
    for head in range(heads):
        for pair in range(4):
            for part in range(2):
                row = theirs[head * 8 + 2 * pair + part]
                np.testing.assert_array_equal(ours[:, head, pair + 4 * part], row)
    same = Layout(huggingface.NAMES).to_ours(CONFIG, Weight(name, 0), [theirs])
    np.testing.assert_array_equal(same.reshape(48, -1).T, theirs)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("shards", [1, 3, 6])
def test_any_number_of_shards_restores_the_weights(shards, split):
    layout = Layout(meta.NAMES, interleaved=True, shards=shards, embedding_split=split)
    for weight in weights(CONFIG):
        ours = random(weight)
        tensors = layout.from_ours(CONFIG, weight, ours)
        shapes = [shape for _, _, shape in layout.tensor_specs(CONFIG, weight)]
        assert [tensor.shape for tensor in tensors] == shapes
        assert same_bits(layout.to_ours(CONFIG, weight, tensors), ours)


def test_metas_shards_are_consecutive_slices_of_the_single_files_tensors():
    one = Layout(meta.NAMES, interleaved=True)
    three = Layout(meta.NAMES, interleaved=True, shards=3, embedding_split=1)
    axes = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
    for weight in weights(CONFIG):
        (complete,) = one.from_ours(CONFIG, weight, random(weight))
        shards = three.from_ours(CONFIG, weight, random(weight))
        axis = 1 if weight.name == "tok_embeddings" else axes.get(weight.name)
        expected = [complete] * 3 if axis is None else np.split(complete, 3, axis)
        assert all(same_bits(a, b) for a, b in zip(shards, expected, strict=True)), weight


def test_405b_in_16_files_stores_each_key_value_head_twice():
    layout = meta.writer_layout(FAMILY["llama3.1-405b"], 16)
    specs = layout.tensor_specs(FAMILY["llama3.1-405b"], Weight("wk", 0))
    assert {shape for _, _, shape in specs} == {(128, 16_384)}


def test_the_copies_of_a_key_value_head_must_be_equal():
    layout = Layout(meta.NAMES, interleaved=True, shards=6)
    tensors = layout.from_ours(CONFIG, Weight("wv", 0), random(Weight("wv", 0)))
    assert same_bits(tensors[0], tensors[1])
    tensors[1] = tensors[1] + 1
    with pytest.raises(InputError, match="of shard 1 differs from shard 0's"):
        layout.to_ours(CONFIG, Weight("wv", 0), tensors)


@pytest.mark.parametrize(("name", "fits"), [("llama-33b", [1, 2, 4]), ("llama-7b", [1, 2, 4, 8])])
def test_a_head_is_not_split_over_two_shards(name, fits):
    for shards in (1, 2, 4, 8):
        if shards in fits:
            assert meta.writer_layout(FAMILY[name], shards).shards == shards
        else:
            with pytest.raises(InputError, match=r"numbers that do: 1, 2, 4"):
                meta.writer_layout(FAMILY[name], shards)


@pytest.mark.parametrize("name", FAMILY)
def test_params_json_describes_the_shape_of_every_member(name):
    member = FAMILY[name]
    params = meta.params_json(member)
    multiplier = params.get("ffn_dim_multiplier")
    assert ffn_dim(member.dim, params["multiple_of"], multiplier) == member.hidden_dim
    assert params.get("n_kv_heads", params["n_heads"]) == member.n_kv_heads
    assert params.get("rope_scaling_factor", 8.0) == getattr(member.rope_scaling, "factor", 8.0)


def test_metas_format_refuses_a_head_size_that_it_can_not_represent():
    with pytest.raises(InputError, match="Meta's format has heads of size dim / n_heads"):
        meta.writer_layout(tiny_model(head_dim=16), 1)


def test_a_model_folders_layout_does_not_copy_a_weight():
    for weight in weights(CONFIG):
        ours = random(weight)
        assert model_folder.layout(CONFIG).from_ours(CONFIG, weight, ours)[0] is ours


def test_bits_are_compared_not_values():
    a = np.array([np.nan, 0.0], np.float32)
    assert same_bits(a, a.copy())
    assert not same_bits(a, np.array([np.nan, -0.0], np.float32))
    assert not same_bits(a, a.astype(np.float16))
