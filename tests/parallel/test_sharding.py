import re

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_model
from jax.sharding import PartitionSpec as P

from llama_jax.config.mesh import MeshConfig
from llama_jax.errors import InputError
from llama_jax.parallel import collectives, sharding
from llama_jax.parallel.collectives import sum_gradient
from llama_jax.parallel.mesh import (
    _multi_slice_devices,
    check_divides,
    make_mesh,
    serving_mesh,
    shard_array,
    tensor_mesh,
)
from llama_jax.parallel.sharding import activation_spec, weight_spec


def test_dimension_letters_map_to_mesh_axes():
    assert weight_spec("DNH") == P("fsdp", "tensor", None)
    assert activation_spec("BTD") == P(("data", "fsdp"), "context", None)


def test_minus_one_fills_an_axis():
    assert dict(make_mesh(MeshConfig(tensor=2)).shape) == {
        "data": 1,
        "fsdp": 4,
        "context": 1,
        "tensor": 2,
    }


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MeshConfig(data=3), "data 3 × fsdp -1 × context 1 × tensor 1 does not fit 8 device(s)"),
        (MeshConfig(data=-1, fsdp=-1), "only one axis can be -1"),
        (MeshConfig(data=1, fsdp=4, tensor=1), "must multiply to 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_rejected(config, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        make_mesh(config)


def test_a_mesh_that_does_not_divide_the_model_is_rejected_with_the_sizes_that_do():
    with pytest.raises(InputError, match=r"tensor 8 does not divide model.n_kv_heads \(4\); sizes"):
        check_divides(mesh_of((1, 1, 8)), tiny_model())
    with pytest.raises(InputError, match=r"sizes that divide this model: 1, 2, 4$"):
        check_divides(mesh_of((1, 1, 8)), tiny_model())
    with pytest.raises(InputError, match=r"data × fsdp \(8\) does not divide the 12 rows"):
        check_divides(mesh_of((2, 4, 1)), tiny_model(), batch=12)


def test_a_context_axis_that_does_not_divide_the_windows_is_rejected():
    sentence = r"context 8 splits windows into 16 chunks, which does not divide data.seq_len \(24\)"
    with pytest.raises(InputError, match=sentence + r".*sizes of context that do: 1, 2, 3, 4, 6"):
        check_divides(mesh_of((1, 1, 1, 8)), tiny_model(), batch=8, seq_len=24)


class SliceDevice:
    """A simulated device of one of several slices."""

    def __init__(self, number, slice_index, platform):
        self.id, self.slice_index, self.platform = number, slice_index, platform
        self.process_index, self.device_kind = slice_index, "some chip"
        self.coords, self.core_on_chip = (number % 2, number % 4 // 2, 0), 0


def test_only_data_crosses_slices():
    devices = [SliceDevice(i, i // 4, "tpu") for i in range(8)]
    array = _multi_slice_devices({"data": 4, "fsdp": 2, "context": 1, "tensor": 1}, 2, devices)
    assert [d.slice_index for d in array[:, 0, 0, 0]] == [0, 0, 1, 1]
    with pytest.raises(InputError, match="data 1 is not a multiple of the 2 slices, and no other"):
        _multi_slice_devices({"data": 1, "fsdp": 8, "context": 1, "tensor": 1}, 2, devices)
    # JAX reports GPU nodes as slices, and fsdp may cross nodes.
    nodes = [SliceDevice(i, i // 4, "gpu") for i in reversed(range(8))]
    array = _multi_slice_devices({"data": 1, "fsdp": 8, "context": 1, "tensor": 1}, 2, nodes)
    assert [d.id for d in array.ravel()] == list(range(8))


def test_tensor_mesh_has_as_many_devices_as_divide_the_model():
    assert tensor_mesh(tiny_model()).size == 8  # two devices to each of 4 key/value heads
    assert tensor_mesh(tiny_model(n_heads=4)).size == 4
    assert tensor_mesh(tiny_model(n_kv_heads=3, n_heads=12, vocab_size=324)).size == 1


def test_a_server_has_as_many_copies_of_the_model_as_requested():
    copies = {n: serving_mesh(tiny_model(), n).shape for n in (None, 1, 3, 4, 8)}
    sizes = {n: (shape["data"], shape["tensor"]) for n, shape in copies.items()}
    assert sizes == {None: (1, 8), 1: (1, 8), 3: (3, 2), 4: (4, 2), 8: (8, 1)}
    with pytest.raises(InputError, match=r"8 device\(s\) can't have 9 copies .* one of 1, 2, 4, 8"):
        serving_mesh(tiny_model(), 9)


def test_shard_array_preserves_the_values():
    array = np.arange(16).reshape(8, 2)
    with jax.set_mesh(mesh_of((2, 2, 2))):
        sharded = shard_array(array, "BT")
    assert sharded.sharding.spec == activation_spec("BT")
    assert np.array_equal(sharded, array)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1)])
def test_a_reduce_scatter_in_two_steps_gives_the_same_sum(monkeypatch, shape):
    """Over the columns of a square of devices, then over its rows: each device gets its shard."""
    given = np.random.default_rng(0).standard_normal((8, 16, 4)).astype(np.float32)

    def summed():
        def local(x):
            return sum_gradient(x[0], "DF", "float32")

        mapped = jax.shard_map(
            local, in_specs=P(sharding.BATCH_AXES), out_specs=weight_spec("DF"), check_vma=False
        )
        with jax.set_mesh(mesh_of(shape)):
            rows = jax.NamedSharding(jax.sharding.get_mesh(), P(sharding.BATCH_AXES))
            x = jax.device_put(given, rows)
            return np.asarray(jax.jit(mapped)(x))

    np.testing.assert_allclose(summed(), given.sum(0), atol=8 * 2**-23 * 4)
    monkeypatch.setattr(
        collectives, "_scatter_groups", lambda parts, _: collectives.square_groups(parts)
    )
    np.testing.assert_allclose(summed(), given.sum(0), atol=8 * 2**-23 * 4)


def test_a_square_of_devices_may_have_more_columns_than_rows():
    columns, rows = collectives.square_groups(8)
    assert columns == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]
