import math
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_config
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import tree
from llama_jax.parallel import replicas
from llama_jax.training.step import init_state


@pytest.mark.parametrize(
    ("shape", "hosts", "complete"),
    [
        ((2, 2, 2), {0}, True),
        ((2, 2, 2), {1}, True),
        ((1, 4, 2), {0, 1}, True),
        ((1, 4, 2), {1}, False),
        ((2, 2, 2), set(), False),
    ],
)
def test_hosts_have_all_shards_if_one_replica_of_each_is_there(shape, hosts, complete):
    devices = np.array([SimpleNamespace(process_index=i // 4) for i in range(8)])
    axes = ("data", "fsdp", "context", "tensor")
    mesh = SimpleNamespace(axis_names=axes, devices=devices.reshape(*shape[:2], 1, shape[2]))
    assert replicas.have_all_shards(mesh, hosts) is complete


@pytest.mark.parametrize("spec", [P("fsdp", "tensor"), P(None, "fsdp"), P()])
def test_the_first_valid_replica_is_copied_bit_for_bit(spec):
    with jax.set_mesh(mesh_of((2, 2, 2))) as _:
        mesh = jax.sharding.get_mesh()
        axes = replicas._replica_axes(mesh, spec)
        count = int(np.prod([mesh.shape[axis] for axis in axes]))
        wanted = np.array([[0.0, -0.0, np.nan, -np.inf], [1e-40, 3.5, -1.0, 2.0]] * 2, np.float32)
        values = np.stack([*[np.full_like(wanted, 7)] * (count - 1), wanted])
        valid = np.zeros(tuple(mesh.shape.values()), np.int32)
        # Of each group of replicas, only the last is valid.
        valid[tuple(-1 if axis in axes else slice(None) for axis in mesh.axis_names)] = 1
        found = replicas._first_valid(
            jax.device_put(values, NamedSharding(mesh, P(axes, *spec))),
            jax.device_put(valid, NamedSharding(mesh, P(*mesh.axis_names))),
            spec,
        )
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), wanted.ndim)
        np.testing.assert_array_equal(np.asarray(found).view(np.uint32), wanted.view(np.uint32))


def test_an_array_that_is_complete_stays_as_it_is():
    with jax.set_mesh(mesh_of((2, 2, 2))):
        sharding = NamedSharding(jax.sharding.get_mesh(), P("fsdp", "tensor"))
        array = jax.device_put(np.arange(16, dtype=np.int32).reshape(4, 4), sharding)
        found = replicas.fill_from_replicas(array, array)
        assert found.sharding == sharding
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2), (1, 8, 1)])
def test_hosts_write_about_equal_bytes(shape):
    with jax.set_mesh(mesh_of(shape)):
        state = tree.eval_shape_on_mesh(partial(init_state, tiny_config()), jax.random.key(0))
    arrays = jax.tree.leaves(state)
    writers = replicas.spread_over_hosts(arrays, simulated_host)
    written = np.zeros(4)
    for array, writer in zip(arrays, writers, strict=True):
        owners = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            owners.setdefault(replicas.position_of(index), set()).add(simulated_host(device))
        assert owners.keys() == writer.keys()
        assert all(host in owners[position] for position, host in writer.items())
        size = array.dtype.itemsize * math.prod(array.sharding.shard_shape(array.shape))
        for host in writer.values():
            written[host] += size
    # The weights and the two moments of AdamW are written once, and its counter of steps.
    assert written.sum() == sum(array.dtype.itemsize * array.size for array in arrays)
    assert written.max() / written.mean() < 1.05, written


def simulated_host(device):
    return device.id // 2
