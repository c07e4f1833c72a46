"""Copies of key/value heads: if a mesh has more devices than heads, several have the same head."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config.model import ModelConfig
from llama_jax.parallel.mesh import head_shards
from llama_jax.parallel.sharding import WEIGHT_AXES


def copies_of_head(K: int) -> int:
    """Returns the number of devices on the current mesh that have a copy of each of K heads."""
    return max(1, head_shards() // K)


def with_copies(config: ModelConfig) -> ModelConfig:
    """Returns the config whose shapes the matrices have on the current mesh, copies included."""
    return replace(config, n_kv_heads=config.n_kv_heads * copies_of_head(config.n_kv_heads))


def copy_number(copies: int) -> Any:
    """Returns which copy of its head this device has. For use in `jax.shard_map`."""
    return jax.lax.axis_index(WEIGHT_AXES["K"]) % copies


def gather_from_copies(x: jax.Array, copies: int, axis: int) -> jax.Array:
    """Returns x of all devices that have a copy of this device's head, concatenated along `axis`.

    For use in `jax.shard_map`.
    """
    if copies == 1:
        return x
    groups = _groups(copies)
    return jax.lax.all_gather(x, WEIGHT_AXES["K"], axis=axis, tiled=True, axis_index_groups=groups)


def exchange_with_copies(x: jax.Array, copies: int) -> jax.Array:
    """Sends x[i] to the device with copy i of this device's head; returns the received [copies, …].

    For use in `jax.shard_map`. The first axis of x has length `copies`.
    """
    groups = _groups(copies)
    return jax.lax.all_to_all(x, WEIGHT_AXES["K"], 0, 0, tiled=True, axis_index_groups=groups)


def _groups(copies: int) -> list[list[int]]:
    """Returns the numbers of the devices that share each head."""
    return np.arange(head_shards()).reshape(-1, copies).tolist()


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
