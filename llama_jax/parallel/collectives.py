"""Communication between the devices of a mesh: weights, gradients, sequences, the vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.parallel.mesh import context_shards, divisors, platform, vocab_shards
from llama_jax.parallel.sharding import BATCH_AXES, WEIGHT_AXES, activation_spec


def gather_weight(w: jax.Array, dims: str, dtype: Any) -> jax.Array:
    """Returns a weight in `dtype`, gathered over `fsdp`: cast first, so that fewer bytes travel."""
    return jax.reshard(w.astype(dtype), activation_spec(dims))


def _balanced_order() -> np.ndarray:
    parts = context_shards()
    return np.array([chunk for i in range(parts) for chunk in (i, 2 * parts - 1 - i)])


def to_balanced_order(sequence: np.ndarray) -> np.ndarray:
    """Returns a sequence [T] as it is split over `context`, in twice as many chunks as parts.

    Part i holds the chunks i and 2·parts - 1 - i: an early one, whose queries see few keys, and a
    late one, so that causal attention costs all parts the same (arXiv 2407.21783, section 3.3.2).
    """
    if context_shards() == 1:
        return sequence
    return sequence.reshape(2 * context_shards(), -1)[_balanced_order()].reshape(-1)


def shard_sequence(x_BT: jax.Array) -> jax.Array:
    """Returns rows in balanced order, split as `activation_spec("BT")`."""
    if context_shards() == 1:
        return jax.reshard(x_BT, activation_spec("BT"))
    x_BT = jax.reshard(x_BT, P(BATCH_AXES, None))
    order = to_balanced_order(np.arange(x_BT.shape[1]))
    return jax.reshard(x_BT[:, order], activation_spec("BT"))


def local_sequence_shard(x: jax.Array, axis: int) -> jax.Array:
    """Returns this device's part of what all have whole. For use in `jax.shard_map`."""
    size = x.shape[axis] // context_shards()
    start = jax.lax.axis_index("context") * size
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def gather_sequence(x: jax.Array) -> jax.Array:
    """Returns all of a sequence [B, T, …] in the order of the text, from a part of it.

    For use in `jax.shard_map`. The gradient is summed as it is scattered.
    """
    if context_shards() == 1:
        return x
    return to_text_order(jax.lax.all_gather(x, "context", axis=1, tiled=True))


def to_text_order(x: jax.Array) -> jax.Array:
    """Returns a whole sequence [B, T, …] that was in balanced order in that of the text."""
    if context_shards() == 1:
        return x
    chunks = x.reshape(x.shape[0], 2 * context_shards(), -1, *x.shape[2:])
    return chunks[:, np.argsort(_balanced_order())].reshape(x.shape)


def local_text_positions(T: int) -> jax.Array:
    """Returns where in the text this device's T positions of a balanced sequence stand, [T].

    For use in `jax.shard_map`.
    """
    parts, half = context_shards(), T // 2
    if parts == 1:
        return jnp.arange(T)
    part = jax.lax.axis_index("context")
    early, late = part * half, (2 * parts - 1 - part) * half
    return jnp.concatenate([early + jnp.arange(half), late + jnp.arange(half)])


def sum_gradient(gradient: jax.Array, dims: str, dtype: str) -> jax.Array:
    """Returns this device's part of a weight's gradient, from what each device's tokens gave.

    For use in `jax.shard_map`. What travels is of the type `dtype`. The sum over `fsdp` is a
    reduce-scatter, and only the part that is left is summed over the other axes.
    """
    sizes, out = jax.sharding.get_abstract_mesh().shape, gradient.dtype
    gradient = gradient.astype(dtype)
    if sizes["fsdp"] > 1:
        at = [WEIGHT_AXES[letter] for letter in dims].index("fsdp")
        for groups in _scatter_groups(sizes["fsdp"], gradient.shape[at]):
            gradient = jax.lax.psum_scatter(
                gradient, "fsdp", scatter_dimension=at, tiled=True, axis_index_groups=groups
            )
    others = tuple(axis for axis in ("data", "context") if sizes[axis] > 1)
    return (jax.lax.psum(gradient, others) if others else gradient).astype(out)


def _scatter_groups(parts: int, size: int) -> list[list[list[int]] | None]:
    """Returns the groups of each scatter that together cut `size` into sums of `parts` devices.

    Where many chips share what is no whole tiles each, the TPU compiler would sum all of it on all
    of them and cut then. Columns of a square of chips first, then its rows: each device ends with
    its own part.
    """
    if platform() != "tpu" or parts < 64 or size // parts % 128 == 0:
        return [None]
    return square_groups(parts)


def square_groups(parts: int) -> list[list[list[int]] | None]:
    """Returns the columns, and the rows, of the squarest table of `parts` devices."""
    rows = max(n for n in divisors(parts) if n * n <= parts)
    table = np.arange(parts).reshape(rows, -1)
    return [table.T.tolist(), table.tolist()]


def vocab_shard_start(size: int) -> jax.Array:
    """Returns the first token of this device's `size`. For use in `jax.shard_map`."""
    return jax.lax.axis_index(WEIGHT_AXES["V"]) * size


def reduce_over_vocab(reduction: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns `jax.lax.psum` or `pmax` of the vocabulary's parts. For use in `jax.shard_map`."""
    return reduction(x, WEIGHT_AXES["V"]) if vocab_shards() > 1 else x


def sum_over_tokens(x: jax.Array) -> jax.Array:
    """Returns the sum over all devices with other tokens. For use in `jax.shard_map`."""
    return jax.lax.psum(x, (*BATCH_AXES, "context"))
