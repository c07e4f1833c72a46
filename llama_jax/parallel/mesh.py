"""Device meshes: construction, checks against a model, sizes of the current mesh."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llama_jax.config.mesh import MeshConfig
from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import BATCH_AXES, MESH_AXES, WEIGHT_AXES, activation_spec

LANES = 128  # of a TPU's vector unit


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns an Explicit mesh of `devices` (default: all) with the axes `MESH_AXES`.

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
        requested = " × ".join(f"{axis} {getattr(config, axis)}" for axis in MESH_AXES)
        raise InputError(
            f"mesh: {requested} does not fit {len(devices)} device(s): the sizes must multiply to"
            f" {len(devices)}; set one of them to -1 to fill"
        )
    types = (AxisType.Explicit,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices == 1:
        # An axis of 16 on a pod of 8 × 8 × 8 needs one physical axis and a part of another.
        device_array = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    else:
        device_array = _multi_slice_devices(sizes, slices, devices)
    return Mesh(device_array, MESH_AXES, axis_types=types)


def _multi_slice_devices(sizes: dict[str, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices of several slices (or GPU nodes) as an array with the mesh's axes.

    Only `data` crosses slices. Between GPU nodes another axis may cross if `data` can't.

    Raises:
        InputError: `data` is not a multiple of the number of TPU slices.
    """
    if sizes["data"] % slices == 0:
        within = tuple((sizes | {"data": sizes["data"] // slices}).values())
        across = (slices, *(1 for _ in MESH_AXES[1:]))
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        raise InputError(
            f"mesh: data {sizes['data']} is not a multiple of the {slices} slices, and no other"
            " axis may cross the network between slices: set data to a multiple, or to -1"
        )
    ordered = sorted(devices, key=lambda device: (device.slice_index, device.id))
    return np.array(ordered).reshape(*sizes.values())


def one_device_mesh() -> Mesh:
    """Returns a mesh of the first local device."""
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.local_devices()[:1])


def tensor_mesh(model: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a `tensor` mesh of as many devices (default: the local ones) as divide the model.

    If the model has fewer key/value heads than the mesh has devices, several devices have a copy
    of each.
    """
    devices = jax.local_devices() if devices is None else devices
    size = max(n for n in tensor_sizes(model) if n <= len(devices))
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=size), devices[:size])


def inference_mesh(model: ModelConfig) -> Mesh:
    """Returns a mesh of all hosts: `tensor_mesh` on one host, repeated along another axis.

    That axis is `fsdp` if it divides the model, which shards the weights, or else `data`.
    """
    local = tensor_mesh(model)
    if jax.process_count() == 1:
        return local
    shards = jax.device_count() // local.size
    fsdp = shards if model.dim % shards == 0 else 1
    return make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=local.size))


def serving_mesh(model: ModelConfig, copies: int | None = None) -> Mesh:
    """Returns the mesh on which requests are served: copies of the model, each on a `tensor` mesh.

    Args:
        model: its config.
        copies: default: one; on several hosts, all of whose devices must take part, as few as
            possible.

    Raises:
        InputError: the devices can't have so many copies.
    """
    sizes, n_devices = tensor_sizes(model), jax.device_count()
    if jax.process_count() == 1:
        copies = copies or 1
        fitting = [size for size in sizes if copies * size <= n_devices]
    else:
        sizes = [size for size in sizes if n_devices % size == 0]
        copies = copies or n_devices // max(sizes)
        fitting = [size for size in sizes if copies * size == n_devices]
    if not fitting:
        possible = ", ".join(
            str(n_devices // size) for size in reversed(sizes) if size <= n_devices
        )
        raise InputError(
            f"{n_devices} device(s) can't have {copies} copies of this model, each on equally many:"
            f" give --replicas one of {possible}"
        )
    used = jax.devices()[: copies * max(fitting)]
    return make_mesh(MeshConfig(data=copies, fsdp=1, tensor=max(fitting)), used)


_default = threading.local()  # .mesh: the last mesh that `set_default_mesh` set in this thread


def set_default_mesh(create: Callable[[], Mesh]) -> None:
    """Sets this thread's current mesh to the one that `create` returns, unless the caller set one.

    So a notebook can load a model without creating a mesh. The next default replaces this one.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh == getattr(_default, "mesh", None):
        _default.mesh = create()
        jax.set_mesh(_default.mesh)


def check_current_mesh(w: jax.Array) -> None:
    """Checks that a weight is sharded over the current mesh.

    Raises:
        InputError: it is sharded over another one.
    """
    own, current = jax.typeof(w).sharding.mesh, jax.sharding.get_abstract_mesh()
    if not own.empty and own.shape != current.shape:
        raise InputError(
            f"the model is on another mesh ({_sizes(own)}) than the current one"
            f" ({_sizes(current)}): use it in `with jax.set_mesh(model.norm[...].sharding.mesh):`"
        )


def _sizes(mesh: Any) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()) or "none is set"


def tensor_sizes(model: ModelConfig) -> list[int]:
    """Returns the numbers of devices over which `tensor_mesh` can split the model, ascending."""
    K = model.n_kv_heads
    common = math.gcd(model.n_heads, model.hidden_dim, model.vocab_size)
    return [n for n in divisors(common) if K % n == 0 or n % K == 0]


def check_divides(
    mesh: Mesh, model: ModelConfig, batch: int | None = None, seq_len: int | None = None
) -> None:
    """Checks that the mesh's axes divide the model's dimensions, the batch's rows and `seq_len`.

    Raises:
        InputError: an axis does not divide a dimension; lists the sizes that would.
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
            f"mesh: context {mesh.shape['context']} splits windows into {chunks} chunks, which"
            f" does not divide data.seq_len ({seq_len}); sizes of context that do:"
            f" {', '.join(str(n // 2) for n in divisors(seq_len) if n % 2 == 0)}"
        )
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch is not None and batch % rows:
        raise InputError(
            f"mesh: data × fsdp ({rows}) does not divide the {batch} rows of a (micro-)batch;"
            f" sizes that do: {', '.join(map(str, divisors(batch)))}"
        )


def platform() -> str:
    """Returns the platform of the current mesh's devices: 'cpu', 'gpu' or 'tpu'."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform


def is_single_device() -> bool:
    """Returns whether the current mesh has one device."""
    return jax.sharding.get_abstract_mesh().size == 1


def context_shards() -> int:
    """Returns the number of shards of a sequence on the current mesh."""
    return jax.sharding.get_abstract_mesh().shape["context"]


def batch_shards() -> int:
    """Returns the number of shards of a batch on the current mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in BATCH_AXES)


def batch_shard_devices() -> np.ndarray:
    """Returns the devices of the current mesh that compute each shard of a batch, [shards, …]."""
    return jax.sharding.get_mesh().devices.reshape(batch_shards(), -1)


def head_shards() -> int:
    """Returns the number of shards of the heads on the current mesh."""
    return jax.sharding.get_abstract_mesh().shape[WEIGHT_AXES["N"]]


def vocab_shards() -> int:
    """Returns the number of shards of the vocabulary on the current mesh."""
    return jax.sharding.get_abstract_mesh().shape[WEIGHT_AXES["V"]]


def divisors(number: int) -> list[int]:
    """Returns all divisors of `number`, ascending."""
    return [i for i in range(1, number + 1) if number % i == 0]


def shard_array(array: np.ndarray, dims: str) -> jax.Array:
    """Returns `array` on the current mesh, sharded as `activation_spec(dims)`.

    Every process must pass the complete array.
    """
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), activation_spec(dims))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
