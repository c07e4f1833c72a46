"""Device meshes: how they are made, checked against a model, and asked for their sizes."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.config.model import ModelConfig
from llama_jax.config.run import MeshConfig
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import BATCH_AXES, MESH_AXES, WEIGHT_AXES, activation_spec


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns an Explicit mesh of `devices` (default: all) with the axes of `AXES`.

    Raises:
        InputError: the axes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1:
        raise InputError(f"mesh: only one axis can be -1 (fill), but {' and '.join(open_axes)} are")
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        asked = " × ".join(f"{axis} {getattr(config, axis)}" for axis in MESH_AXES)
        raise InputError(
            f"mesh: {asked} does not fit {len(devices)} device(s): the sizes must multiply to"
            f" {len(devices)}; set one of them to -1 to fill"
        )
    types = (AxisType.Explicit,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices == 1:
        # An axis of 16 on a pod of 8 × 8 × 8 takes one of its dimensions and a part of another.
        placed = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    else:
        placed = _across_slices(sizes, slices, devices)
    return Mesh(placed, MESH_AXES, axis_types=types)


def _across_slices(sizes: dict[str, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices of several slices (or GPU nodes), with `data` across them.

    Raises:
        InputError: `data` is no multiple of the number of TPU slices.
    """
    if sizes["data"] % slices == 0:
        within = tuple((sizes | {"data": sizes["data"] // slices}).values())
        across = (slices, *(1 for _ in MESH_AXES[1:]))
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        raise InputError(
            f"mesh: data {sizes['data']} is no multiple of the {slices} slices, and no other axis"
            " may cross the network between them: set it to one, or to -1"
        )
    ordered = sorted(devices, key=lambda device: (device.slice_index, device.id))
    return np.array(ordered).reshape(*sizes.values())


def one_device_mesh() -> Mesh:
    """Returns a mesh of the first local device alone."""
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])


def tensor_mesh(model: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh that splits the model over as many devices (default: local) as divide it.

    Where there are fewer key/value heads than devices, each is held by several of these.
    """
    devices = jax.local_devices() if devices is None else devices
    size = max(n for n in tensor_sizes(model) if n <= len(devices))
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=size), devices[:size])


_default = threading.local()  # .mesh: the last one that `set_default_mesh` set in this thread


def set_default_mesh(make: Callable[[], Mesh]) -> None:
    """Puts this thread on the mesh that `make` returns, unless the caller set one.

    So that a notebook begins with a model and not with a mesh. The next default replaces this one.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh == getattr(_default, "mesh", None):
        _default.mesh = make()
        jax.set_mesh(_default.mesh)


def check_current_mesh(w: jax.Array) -> None:
    """Checks that a weight lies on the current mesh.

    Raises:
        InputError: it lies on another one.
    """
    lies, here = jax.typeof(w).sharding.mesh, jax.sharding.get_abstract_mesh()
    if not lies.empty and lies.shape != here.shape:
        raise InputError(
            f"the model lies on another mesh ({_sizes(lies)}) than the current one"
            f" ({_sizes(here)}): use it in `with jax.set_mesh(model.norm[...].sharding.mesh):`"
        )


def _sizes(mesh: Any) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()) or "none is set"


def tensor_sizes(model: ModelConfig) -> list[int]:
    """Returns over how many devices `tensor_mesh` can split the model, ascending."""
    K = model.n_kv_heads
    common = math.gcd(model.n_heads, model.hidden_dim, model.vocab_size)
    return [n for n in divisors(common) if K % n == 0 or n % K == 0]


def check_divides(
    mesh: Mesh, model: ModelConfig, batch: int | None = None, seq_len: int | None = None
) -> None:
    """Refuses a mesh whose axes don't divide the model's dimensions (or the batch's rows, or T).

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
    chunks = 2 * mesh.shape["context"]
    if mesh.shape["context"] > 1 and seq_len is not None and seq_len % chunks:
        raise InputError(
            f"mesh: context {mesh.shape['context']} cuts windows into {chunks} chunks, which don't"
            f" divide data.seq_len ({seq_len}); sizes of context that do:"
            f" {', '.join(str(n // 2) for n in divisors(seq_len) if n % 2 == 0)}"
        )
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch is not None and batch % rows:
        raise InputError(
            f"mesh: data × fsdp ({rows}) does not divide the {batch} rows of a (micro-)batch;"
            f" sizes that do: {', '.join(map(str, divisors(batch)))}"
        )


def platform() -> str:
    """Returns what the program is compiled for: 'cpu', 'gpu' or 'tpu'."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform


def is_single_device() -> bool:
    """Tells whether the current mesh is one device."""
    return jax.sharding.get_abstract_mesh().size == 1


def context_shards() -> int:
    """Returns how many parts the current mesh splits a sequence into."""
    return jax.sharding.get_abstract_mesh().shape["context"]


def head_shards() -> int:
    """Returns how many parts the current mesh splits the heads into."""
    return jax.sharding.get_abstract_mesh().shape[WEIGHT_AXES["N"]]


def vocab_shards() -> int:
    """Returns how many parts the current mesh splits the vocabulary into."""
    return jax.sharding.get_abstract_mesh().shape[WEIGHT_AXES["V"]]


def divisors(number: int) -> list[int]:
    """Returns all divisors of `number`, ascending."""
    return [i for i in range(1, number + 1) if number % i == 0]


def shard_array(array: np.ndarray, dims: str) -> jax.Array:
    """Returns `array`, complete on every process, sharded over the current mesh by `dims`."""
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), activation_spec(dims))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
