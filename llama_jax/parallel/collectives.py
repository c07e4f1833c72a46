"""Collectives over the mesh, for weights, gradients, sequences and the vocabulary."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.parallel.mesh import LANES, context_shards, divisors, platform, vocab_shards
from llama_jax.parallel.sharding import (
    ACTIVATION_AXES,
    BATCH_AXES,
    MESH_AXES,
    WEIGHT_AXES,
    activation_spec,
)


def gather_weight(w: jax.Array, dims: str, dtype: Any) -> jax.Array:
    """Returns a weight in `dtype`, gathered over `fsdp`.

    The cast comes before the gather, so that fewer bytes are sent.
    """
    return jax.reshard(w.astype(dtype), activation_spec(dims))


def _balanced_order() -> np.ndarray:
    shards = context_shards()
    return np.array([chunk for i in range(shards) for chunk in (i, 2 * shards - 1 - i)])


def to_balanced_order(sequence: np.ndarray) -> np.ndarray:
    """Returns a sequence [T] in the order in which it is split over `context`.

    The sequence has 2n chunks for n shards. Shard i contains the chunks i and 2n - 1 - i: an early
    one, whose queries attend to few keys, and a late one. So causal attention costs all shards the
    same (arXiv 2407.21783, section 3.3.2).
    """
    if context_shards() == 1:
        return sequence
    return sequence.reshape(2 * context_shards(), -1)[_balanced_order()].reshape(-1)


def shard_sequence(x: jax.Array, dims: str = "BT") -> jax.Array:
    """Returns rows [B, T, …] in balanced order, sharded as `activation_spec(dims)`."""
    if context_shards() == 1:
        return jax.reshard(x, activation_spec(dims))
    x = jax.reshard(x, activation_spec(dims.replace("T", "S")))  # S: complete sequences
    order = to_balanced_order(np.arange(x.shape[1]))
    return jax.reshard(x[:, order], activation_spec(dims))


def local_sequence_shard(x: jax.Array, axis: int) -> jax.Array:
    """Returns this device's shard of an array that all devices have complete.

    For use in `jax.shard_map`. `axis` is the one that `context` splits.
    """
    size = x.shape[axis] // context_shards()
    start = jax.lax.axis_index("context") * size
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def gather_sequence(x: jax.Array) -> jax.Array:
    """Returns the complete sequence [B, S, …] in text order, given this device's shard [B, T, …].

    For use in `jax.shard_map`. The gradient is a reduce-scatter.
    """
    if context_shards() == 1:
        return x
    return to_text_order(jax.lax.all_gather(x, "context", axis=1, tiled=True))


def to_text_order(x: jax.Array) -> jax.Array:
    """Returns a complete sequence [B, S, …] in text order, given one in balanced order."""
    if context_shards() == 1:
        return x
    chunks = x.reshape(x.shape[0], 2 * context_shards(), -1, *x.shape[2:])
    return chunks[:, np.argsort(_balanced_order())].reshape(x.shape)


def local_text_positions(T: int) -> jax.Array:
    """Returns the text positions [T] of this device's shard of a sequence in balanced order.

    For use in `jax.shard_map`.
    """
    shards, half = context_shards(), T // 2
    if shards == 1:
        return jnp.arange(T)
    shard = jax.lax.axis_index("context")
    early, late = shard * half, (2 * shards - 1 - shard) * half
    return jnp.concatenate([early + jnp.arange(half), late + jnp.arange(half)])


def sum_gradient(gradient: jax.Array, dims: str, dtype: str) -> jax.Array:
    """Returns this device's shard of a weight's gradient, summed over the tokens of all devices.

    For use in `jax.shard_map`. `gradient` has the terms of this device's tokens; the devices
    exchange it in `dtype`. The sum over `fsdp` is a reduce-scatter if that axis splits the weight;
    only the shard that it leaves is all-reduced over the other axes.
    """
    sizes, result_dtype = jax.sharding.get_abstract_mesh().shape, gradient.dtype
    gradient, axes = gradient.astype(dtype), [WEIGHT_AXES[letter] for letter in dims]
    if sizes["fsdp"] > 1 and "fsdp" in axes:
        axis = axes.index("fsdp")
        for groups in _scatter_groups(sizes["fsdp"], gradient.shape[axis]):
            gradient = jax.lax.psum_scatter(
                gradient, "fsdp", scatter_dimension=axis, tiled=True, axis_index_groups=groups
            )
    others = tuple(
        axis for axis in ("data", "fsdp", "context") if sizes[axis] > 1 and axis not in axes
    )
    return (jax.lax.psum(gradient, others) if others else gradient).astype(result_dtype)


def _scatter_groups(devices: int, size: int) -> list[list[list[int]] | None]:
    """Returns the `axis_index_groups` of each psum_scatter of an axis of `size` over `devices`.

    Normally one psum_scatter over all devices (None) is enough. On 64 TPU chips and more, if a
    shard is not a multiple of LANES, the compiler would all-reduce the complete array and then
    slice it. Two psum_scatters avoid that: over the columns of a square of chips, then over its
    rows. Each device gets the same shard as with one.
    """
    if platform() != "tpu" or devices < 64 or size // devices % LANES == 0:
        return [None]
    return square_groups(devices)


def square_groups(devices: int) -> list[list[list[int]] | None]:
    """Returns the columns, and the rows, of the most nearly square table of `devices`."""
    rows = max(n for n in divisors(devices) if n * n <= devices)
    table = np.arange(devices).reshape(rows, -1)
    return [table.T.tolist(), table.tolist()]


def vocab_shard_start(size: int) -> jax.Array:
    """Returns the first token id of this device's vocabulary shard, which has `size` tokens.

    For use in `jax.shard_map`.
    """
    return jax.lax.axis_index(WEIGHT_AXES["V"]) * size


def reduce_over_vocab(reduction: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns `jax.lax.psum` or `pmax` over the vocabulary shards. For use in `jax.shard_map`."""
    return reduction(x, WEIGHT_AXES["V"]) if vocab_shards() > 1 else x


def sum_over_tokens(x: jax.Array) -> jax.Array:
    """Returns the sum over all devices that have different tokens. For use in `jax.shard_map`."""
    return jax.lax.psum(x, (*BATCH_AXES, "context"))


def sum_over_context(x: jax.Array) -> jax.Array:
    """Returns the sum over the devices that share a row's tokens. For use in `jax.shard_map`."""
    return jax.lax.psum(x, "context") if context_shards() > 1 else x


def sum_over_shards(x: jax.Array, letters: Iterable[str]) -> jax.Array:
    """Returns the sum over the devices that share the dimensions `letters` of activations.

    For use in `jax.shard_map`.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = {ACTIVATION_AXES[letter] for letter in letters}
    axes = tuple(axis for axis in MESH_AXES if axis in axes and sizes[axis] > 1)
    return jax.lax.psum(x, axes) if axes else x
