"""Where a dimension letter meets a mesh axis: the only place that names the axes of the mesh.

Axes: `data` replicates the weights (across slices or nodes, over the slow network), `fsdp` splits
weights and batch, `tensor` splits heads, feed-forward and vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.config import MeshConfig
from llama_jax.errors import InputError
from llama_jax.family import ModelConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Weights at rest. Stacked layers (L) are never split: every device holds its part of each layer.
_WEIGHT = {"L": None, "V": "tensor", "D": "fsdp", "N": "tensor", "K": "tensor", "H": None}
_WEIGHT |= {"F": "tensor"}

# Everything that a forward pass makes: activations, gathered weights, the cache. A stands for the
# micro-batches of gradient accumulation, G for the query heads that share a key/value head.
_ACTIVATION = {"A": None, "B": BATCH_AXES, "T": None, "S": None, "L": None, "D": None, "H": None}
_ACTIVATION |= {"N": "tensor", "K": "tensor", "G": None, "F": "tensor", "V": "tensor"}


def weight(dims: str) -> P:
    """Returns how a weight with the dimensions `dims` is split: 'DF' -> P('fsdp', 'tensor')."""
    return P(*(_WEIGHT[letter] for letter in dims))


def act(dims: str) -> P:
    """Returns how an activation is split: 'BTD' -> P(('data', 'fsdp'), None, None)."""
    return P(*(_ACTIVATION[letter] for letter in dims))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns an Explicit mesh of `devices` (default: all) with the axes data, fsdp, tensor.

    Raises:
        InputError: the axes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1:
        raise InputError(f"mesh: only one axis can be -1 (fill), but {' and '.join(open_axes)} are")
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        asked = " × ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise InputError(
            f"mesh: {asked} does not fit {len(devices)} device(s): the sizes must multiply to"
            f" {len(devices)}; set one of them to -1 to fill"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * 3, devices=list(devices)
    )


def one_device_mesh() -> Mesh:
    """Returns a mesh of the first local device alone."""
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])


def tensor_mesh(model: ModelConfig) -> Mesh:
    """Returns a mesh that splits the model over as many local devices as divide it."""
    devices = jax.local_devices()
    common = math.gcd(model.n_kv_heads, model.n_heads, model.hidden_dim, model.vocab_size)
    size = max(size for size in divisors(common) if size <= len(devices))
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=size), devices[:size])


def check_divides(mesh: Mesh, model: ModelConfig, batch: int | None = None) -> None:
    """Refuses a mesh whose axes don't divide the model's dimensions (or the batch's rows).

    Raises:
        InputError: names the dimension and the sizes of the axis that would divide it.
    """
    split = [
        ("tensor", "model.n_heads", model.n_heads),
        ("tensor", "model.n_kv_heads", model.n_kv_heads),
        ("tensor", "model.hidden_dim", model.hidden_dim),
        ("tensor", "model.vocab_size", model.vocab_size),
        ("fsdp", "model.dim", model.dim),
    ]
    common = {
        axis: math.gcd(*(size for a, _, size in split if a == axis)) for axis in ("tensor", "fsdp")
    }
    for axis, name, size in split:
        if size % mesh.shape[axis]:
            fitting = ", ".join(map(str, divisors(common[axis])))
            raise InputError(
                f"mesh: {axis} {mesh.shape[axis]} does not divide {name} ({size});"
                f" sizes that divide this model: {fitting}"
            )
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch is not None and batch % rows:
        raise InputError(
            f"mesh: data × fsdp ({rows}) does not divide the {batch} rows of a (micro-)batch;"
            f" sizes that do: {', '.join(map(str, divisors(batch)))}"
        )


def divisors(number: int) -> list[int]:
    """Returns all divisors of `number`, ascending."""
    return [i for i in range(1, number + 1) if number % i == 0]


def place(array: np.ndarray, dims: str) -> jax.Array:
    """Returns `array`, which every process holds whole, on the current mesh as `act(dims)`."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), act(dims))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
