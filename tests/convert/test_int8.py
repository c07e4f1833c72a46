"""convert --quantize int8: the weights it writes, their verification, and refused options."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_model
from flax import nnx
from sample_checkpoints import convert_to

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.model_folders import load_model, save_model
from llama_jax.convert import layout
from llama_jax.convert.verify import verify
from llama_jax.errors import InputError
from llama_jax.model.weights import Llama, quantize_model
from llama_jax.parallel.mesh import one_device_mesh


def changed(weight: jax.Array, at: tuple[int, ...], value: float) -> jax.Array:
    numbers = np.array(weight)
    assert numbers[at] != value
    numbers[at] = value
    return jnp.asarray(numbers)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folders(request, tmp_path_factory):
    """A model folder, and its int8 folder chunked for a mesh and quantized in small groups."""
    folder = tmp_path_factory.mktemp("quantize")
    config = tiny_model(param_dtype=request.param)
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        save_model(folder / "m", config, model, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_QUANTIZED_AT_ONCE", 700)
        convert_to(folder / "m", folder / "int8", quantize="int8", mesh={"fsdp": 2, "tensor": 4})
    return folder / "m", folder / "int8"


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 4)])
def test_an_int8_folder_loads_the_same_bits_as_quantization_on_load(folders, shape):
    with jax.set_mesh(mesh_of(shape)):
        expected_config, expected = quantize_model(*load_model(folders[0]))
        config, model = load_model(folders[1])
    assert config == expected_config
    assert jax.tree.structure(model) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)
        np.testing.assert_array_equal(ours, theirs)


def test_weights_of_two_types_are_quantized_from_one_type_as_on_load(tmp_path):
    config = tiny_model(param_dtype="bfloat16")
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
        model.tok_embeddings = nnx.Param(1.001 * model.tok_embeddings[...].astype(np.float32))
        save_model(tmp_path / "m", config, model, None)
        _, expected = quantize_model(*load_model(tmp_path / "m"))
        _, model = load_model(convert_to(tmp_path / "m", tmp_path / "int8", quantize="int8"))
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_receipt_lists_the_int8_arrays_and_verify_quantizes_the_source_again(folders):
    source, folder = folders
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["verified"] == {"identical": 5, "converted": 16}
    kinds = {r["weight"]: [t["dtype"] for t in r["written"]] for r in receipt["weights"]}
    assert kinds["layers.1.wo"] == kinds["output"] == ["int8", "float32"]
    assert len(kinds["norm"]) == len(kinds["layers.0.ffn_norm"]) == 1
    assert verify(folder, source, progress=False) == receipt["verified"]


def test_a_changed_source_and_a_changed_int8_value_are_detected(folders, tmp_path):
    source, folder = folders
    with jax.set_mesh(one_device_mesh()):
        config, model = load_model(source)
        model.layers.wk[...] = changed(model.layers.wk[...], (1, 3, 2, 1), 0.5)
        save_model(tmp_path / "other", config, model, None)
    with pytest.raises(InputError, match=r"layers.wk\[1\] is not the tensor that was converted"):
        verify(folder, tmp_path / "other", progress=False)
    with jax.set_mesh(one_device_mesh()):
        config, model = load_model(folder)
        model.layers.wk.values[...] = changed(model.layers.wk.values[...], (1, 3, 2, 1), 0)
        save_model(tmp_path / "int8", config, model, None)
    (tmp_path / "int8" / "receipt.json").write_bytes((folder / "receipt.json").read_bytes())
    sentence = r"layers.wk.values\[1\] is not the tensor that the conversion wrote"
    with pytest.raises(InputError, match=sentence):
        verify(tmp_path / "int8", progress=False)


class TestRefusals:
    @pytest.mark.parametrize("to", ["orbax", "hf", "meta"])
    def test_an_int8_folder_can_not_be_converted(self, folders, tmp_path, to):
        with pytest.raises(InputError, match="convert the checkpoint from which it was created"):
            convert_to(folders[1], tmp_path / "m", to=to)
        with pytest.raises(
            InputError, match="is an int8 folder, from which no other format can be"
        ):
            convert_to(folders[1], tmp_path / "m", quantize="int8")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("to", ["hf", "meta"])
    def test_only_orbax_folders_can_be_int8(self, folders, tmp_path, to):
        with pytest.raises(InputError, match="--quantize int8 is for --to orbax: remove one"):
            convert_to(folders[0], tmp_path / "m", to=to, quantize="int8")

    def test_an_int8_folder_does_not_load_as_float(self, folders):
        with (
            jax.set_mesh(one_device_mesh()),
            pytest.raises(InputError, match=r"are stored as int8: give the folder from which"),
        ):
            load_model(folders[1], read_model_config(folders[0]))

    def test_infinity_can_not_be_quantized(self, folders, tmp_path):
        with jax.set_mesh(one_device_mesh()):
            config, model = load_model(folders[0])
            model.layers.w2[...] = changed(model.layers.w2[...], (1, 3, 2), np.inf)
            save_model(tmp_path / "m", config, model, None)
        with pytest.raises(InputError, match=r"layers.1.w2 contains NaN or infinity.*int8 can't"):
            convert_to(tmp_path / "m", tmp_path / "int8", quantize="int8")
