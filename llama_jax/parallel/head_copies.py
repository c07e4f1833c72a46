"""Copies of key/value heads: if a mesh has more devices than heads, several have the same head."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.parallel.sharding import WEIGHT_AXES


def stored_heads(copies: int, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the heads of a checkpoint, each on the devices that have a copy of it.

    Args:
        copies: of each head.
        like: a weight [L, …, K, H] or its scales, with one copy of a head on each shard of K.
    """
    sharding: Any = like.sharding
    mesh, axis = sharding.mesh, WEIGHT_AXES["K"]
    i, (*before, K, H) = mesh.axis_names.index(axis), like.shape
    # The axis of K becomes two: `axis` splits the stored heads, and the other replicates them.
    sizes = *mesh.devices.shape[:i], K // copies, copies, *mesh.devices.shape[i + 1 :]
    names = *mesh.axis_names[: i + 1], "copies", *mesh.axis_names[i + 1 :]
    split = NamedSharding(Mesh(mesh.devices.reshape(sizes), names), P(*sharding.spec))
    return jax.ShapeDtypeStruct((*before, K // copies, H), like.dtype, sharding=split)


def as_copied_heads(like: jax.ShapeDtypeStruct, stored: jax.Array) -> jax.Array:
    """Returns an array of `stored_heads` as the array `like`, whose copies are separate heads."""
    shards = [shard.data for shard in stored.addressable_shards]
    sharding: Any = like.sharding
    return jax.make_array_from_single_device_arrays(like.shape, sharding, shards)
