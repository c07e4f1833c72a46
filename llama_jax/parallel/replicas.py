"""Shards of an array that several devices have, its replicas: which host writes, how to copy."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import cache, partial
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.parallel.sharding import WEIGHT_AXES


def have_all_shards(mesh: Mesh, hosts: Collection[int]) -> bool:
    """Returns whether the devices of these hosts together have every shard of the weights."""
    present = np.array([device.process_index in hosts for device in mesh.devices.flat])
    unsplit = [i for i, axis in enumerate(mesh.axis_names) if axis not in WEIGHT_AXES.values()]
    return bool(present.reshape(mesh.devices.shape).any(axis=tuple(unsplit)).all())


Position = tuple[tuple[int | None, int | None], ...]


def position_of(index: tuple[slice, ...]) -> Position:
    """Returns the start and the stop of a shard in each dimension, which can be hashed."""
    return tuple((part.start, part.stop) for part in index)


def spread_over_hosts(
    arrays: Iterable[Any], host_of: Callable[[Any], int] = attrgetter("process_index")
) -> list[dict[Position, int]]:
    """Chooses a host for each shard, among those that have it: all get about equally many bytes.

    The choice is the same on all hosts.

    Args:
        arrays: arrays, or abstract arrays with shardings, in the same order on all hosts.
        host_of: the host of a device.

    Returns:
        For each array, the host of each shard.
    """
    kinds = [(array.shape, array.dtype.itemsize, array.sharding) for array in arrays]
    return _spread(tuple(kinds), host_of)


@cache
def _spread(kinds: tuple[Any, ...], host_of: Callable[[Any], int]) -> list[dict[Position, int]]:
    shards = []
    for number, (shape, itemsize, sharding) in enumerate(kinds):
        owners = defaultdict[Position, set[int]](set)
        for device, index in sharding.devices_indices_map(shape).items():
            owners[position_of(index)].add(host_of(device))
        nbytes = itemsize * math.prod(sharding.shard_shape(shape))
        shards += [(nbytes, number, position, hosts) for position, hosts in owners.items()]
    chosen: list[dict[Position, int]] = [{} for _ in kinds]
    load = Counter[int]()
    # The largest first: the small ones then fill the differences.
    for nbytes, number, position, hosts in sorted(shards, key=lambda shard: -shard[0]):
        host = min(hosts, key=lambda host: (load[host], host))
        chosen[number][position] = host
        # A shard without a choice doesn't count: every host has about equally many of them.
        load[host] += nbytes if len(hosts) > 1 else 0
    return chosen


@partial(jax.jit, static_argnums=0)
def compute_on_shards(compute: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """Calls `compute` on each device's own shard of each array, without any collective.

    Returns:
        For each array the results of all devices, with the axes of the mesh in front.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ones = (1,) * len(mesh.axis_names)

    def of_array(x: jax.Array) -> jax.Array:
        mapped = jax.shard_map(
            lambda shard: compute(shard).reshape(*ones, -1),
            in_specs=jax.typeof(x).sharding.spec,
            out_specs=P(*mesh.axis_names),
            check_vma=False,
        )
        return jax.reshard(mapped(x), P())

    return jax.tree.map(of_array, tree)


def replica_groups(array: jax.Array) -> list[list[tuple[Any, tuple[int, ...]]]]:
    """Returns for each shard the devices that have it, with their places in the mesh."""
    groups = defaultdict[Position, list[Any]](list)
    indices = array.sharding.devices_indices_map(array.shape)
    for place, device in np.ndenumerate(jax.sharding.get_mesh().devices):
        groups[position_of(indices[device])].append((device, place))
    return [*groups.values()]


def fill_from_replicas(array: jax.Array | None, like: Any) -> jax.Array:
    """Returns an array of which only some hosts have their shards, complete on all hosts.

    All hosts must call this, and `have_all_shards` must be true of those that pass an array.

    Args:
        array: this host's shards, sharded as `like`; None if it has none.
        like: abstract array; its sharding splits no dimension over `data` or `context`.
    """
    mesh, spec = like.sharding.mesh, like.sharding.spec
    replica_axes = _replica_axes(mesh, spec)
    count = int(np.prod([mesh.shape[axis] for axis in replica_axes]))
    shape = like.sharding.shard_shape(like.shape)
    shards = (
        {s.device: np.asarray(s.data) for s in array.addressable_shards}
        if array is not None
        else {}
    )
    values, valid = [], []
    for device in mesh.local_devices:
        shard = shards.get(device, np.zeros(shape, like.dtype))
        values.append(jax.device_put(shard[None], device))
        flag = np.full((1,) * mesh.devices.ndim, device in shards, np.int32)
        valid.append(jax.device_put(flag, device))
    return _first_valid(
        jax.make_array_from_single_device_arrays(
            (count, *like.shape), NamedSharding(mesh, P(replica_axes, *spec)), values
        ),
        jax.make_array_from_single_device_arrays(
            mesh.devices.shape, NamedSharding(mesh, P(*mesh.axis_names)), valid
        ),
        spec,
    )


def _replica_axes(mesh: Any, spec: P) -> tuple[str, ...]:
    """Returns the axes of the mesh that don't split an array, so that they replicate it."""
    split = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
    return tuple(axis for axis in mesh.axis_names if axis not in split)


@partial(jax.jit, static_argnames="spec")
def _first_valid(values: jax.Array, valid: jax.Array, spec: P) -> jax.Array:
    """Returns the first valid replica of each shard, bit for bit.

    Args:
        values: of the array, with a leading dimension of replicas.
        valid: for each device of the mesh, 1 if its replica is valid, else 0.
        spec: of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = _replica_axes(mesh, spec)
    # A sum of unsigned integers is exact. A sum of floats would lose the sign of a negative zero.
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[values.dtype.itemsize]

    def pick(value: jax.Array, valid: jax.Array) -> jax.Array:
        number = jax.lax.axis_index(axes)
        first = jax.lax.pmin(jnp.where(valid.reshape(()) > 0, number, values.shape[0]), axes)
        bits = jax.lax.bitcast_convert_type(value[0], unsigned)
        bits = jax.lax.psum(jnp.where(number == first, bits, jnp.zeros_like(bits)), axes)
        return jax.lax.bitcast_convert_type(bits, values.dtype)

    mapped = jax.shard_map(
        pick, in_specs=(P(axes, *spec), P(*mesh.axis_names)), out_specs=spec, check_vma=False
    )
    return mapped(values, valid)
