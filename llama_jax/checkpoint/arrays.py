"""Reads the arrays of a checkpoint onto devices; distinguishes damaged files from machine faults.

An item of a checkpoint (`model`, `optimizer`) is a folder of zarr arrays. TensorStore reads them
and verifies the checksum of every chunk.
"""

import math
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax.checkpoint.array_files import dotted
from llama_jax.checkpoint.content_sums import complete_sums, stored_sum
from llama_jax.errors import InputError
from llama_jax.parallel.replicas import Position, position_of, spread_over_hosts
from llama_jax.runtime import damage, hosts, zarr_arrays
from llama_jax.runtime.damage import Damaged, classify_errors
from llama_jax.runtime.regular_file import check_regular_files
from llama_jax.runtime.storage import AnyPath
from llama_jax.runtime.zarr_arrays import array_names

# A fault of a device raises JAX's own exception.
FAULTS = (*damage.FAULTS, jax.errors.JaxRuntimeError)
_PRIVATE_MEMORY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_AHEAD_BYTES = 256 << 20  # a disk of 2 GB/s is busy for 0.1 s


def load_items(
    where: AnyPath,
    names: Iterable[str],
    wanted: dict[str, Any],
    sums: Mapping[str, str] | None = None,
    *,
    aliased: bool = False,
) -> dict[str, Any]:
    """Returns the items `wanted` of the checkpoint `where`, in their dtypes and shardings.

    Args:
        where: the folder of the checkpoint.
        names: the files in its manifest.
        wanted: for each item, a tree of abstract arrays.
        sums: the content sums in its manifest, with which those of the arrays are compared; all
            hosts then call this. None if the caller compares fingerprints.
        aliased: whether arrays on a CPU may be the memory into which their files were read. This
            saves a copy of each, but JAX can't overwrite this memory: a program to which they are
            donated allocates its results anew.

    Raises:
        Damaged: the files of the checkpoint are not those that were written.
        InputError: the checkpoint has other names or shapes.
        Fault: the machine could not read it.
    """
    stores = {item: open_arrays(where, item, names) for item in wanted}
    for item, tree in wanted.items():
        _check_shapes(where, item, stores[item], tree)
    parts = dict[str, int]()
    opened = [
        (stores[item][dotted(path)], like)
        for item, tree in wanted.items()
        for path, like in jax.tree.leaves_with_path(tree)
    ]

    def load(item: str, path: tuple[Any, ...], like: Any) -> jax.Array:
        name, reads = dotted(path), next(reads_ahead)
        array = _make_array(reads, like)
        if sums is not None:
            parts[f"{item}/{name}"] = _sum_shards(stores[item][name], reads, like)
        return array

    with classify_errors(where, FAULTS):
        reads_ahead = _read_ahead(opened, _AlignedRead if aliased else _start_read)
        loaded = {
            item: jax.tree.map_with_path(partial(load, item), tree) for item, tree in wanted.items()
        }
    if sums is not None:
        local = all(like.sharding.is_fully_addressable for like in jax.tree.leaves(wanted))
        for name, found in complete_sums([parts] if local else hosts.gather(parts)).items():
            if sums.get(name, found) != found:
                raise Damaged(where, f"{name} is not the array that was written")
    return loaded


def _read_ahead(
    arrays: Iterable[tuple[Any, Any]], start_read: Callable[[Any], Any]
) -> Iterator[dict[Position, Any]]:
    """Yields the reads of each array in turn, while the next arrays are being read.

    So the disk reads while the caller converts and places an array. At least one array is read
    ahead, and more while all together have at most `_AHEAD_BYTES`.

    Args:
        arrays: pairs of a stored array and the abstract array that it becomes.
        start_read: starts to read a part of a stored array; returns a future.
    """
    ahead, n_bytes = deque[tuple[dict[Position, Any], int]](), 0
    for store, like in arrays:
        reads = _read_shards(store, like, start_read)
        shard = math.prod(like.sharding.shard_shape(like.shape))
        ahead.append((reads, len(reads) * shard * like.dtype.itemsize))
        n_bytes += ahead[-1][1]
        while len(ahead) > 1 and n_bytes > _AHEAD_BYTES:
            reads, size = ahead.popleft()
            n_bytes -= size
            yield reads
    for reads, _ in ahead:
        yield reads


def _read_shards(store: Any, like: Any, start_read: Callable[[Any], Any]) -> dict[Position, Any]:
    """Starts to read the shards that this host's devices need, each once; returns the futures."""
    indices = like.sharding.addressable_devices_indices_map(like.shape).values()
    shards = {position_of(index): store[index] for index in indices}
    return {position: start_read(shard) for position, shard in shards.items()}


def _start_read(shard: Any) -> Any:
    return shard.read()


class _AlignedRead:
    """A read into memory that begins at a page, where a CPU's arrays may begin."""

    def __init__(self, shard: Any):
        import tensorstore as ts

        dtype, n = shard.dtype.numpy_dtype, math.prod(shard.shape)
        # Not numpy's memory: its large pages take the system up to twice as long to provide.
        memory = mmap.mmap(-1, max(1, n * dtype.itemsize), flags=_PRIVATE_MEMORY)
        self._values = np.frombuffer(memory, dtype, n).reshape(shard.shape)
        self._reading = ts.array(self._values).write(shard)

    def result(self) -> np.ndarray:
        """Returns the values when they have been read."""
        self._reading.result()
        return self._values


def _make_array(reads: dict[Position, Any], like: Any) -> jax.Array:
    def shard(index: Any) -> np.ndarray:
        return np.asarray(reads[position_of(index)].result(), like.dtype)

    return jax.make_array_from_callback(like.shape, like.sharding, shard)


def _sum_shards(store: Any, reads: dict[Position, Any], like: Any) -> int:
    """Returns this host's partial content sum: of the hosts that have a shard, one counts it."""
    (adds,) = spread_over_hosts([like])
    ours = [position for position in reads if adds[position] == jax.process_index()]
    return stored_sum(store, (([a or 0 for a, _ in p], reads[p].result()) for p in ours))


def open_arrays(where: AnyPath, item: str, names: Iterable[str]) -> dict[str, Any]:
    """Opens the arrays of a checkpoint's item; returns them by dotted name, their data not read.

    Args:
        where: the folder of the checkpoint.
        item: name of the item.
        names: the files in the manifest of the checkpoint.

    Raises:
        Damaged: the item is damaged.
        Fault: the machine could not read it.
    """
    if isinstance(where, Path):
        check_regular_files(where / item)
    prefix = f"{item}/"
    arrays = [n.removeprefix(prefix) for n in array_names(names) if n.startswith(prefix)]
    with classify_errors(where, FAULTS):
        return zarr_arrays.open_for_reading(where / item, arrays)


def _check_shapes(
    where: AnyPath, item: str, stores: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Checks names and shapes before anything is read: TensorStore would clip an index.

    Raises:
        InputError: an array is missing, unknown or of another shape.
    """
    found = {name: tuple(store.shape) for name, store in stores.items()}
    expected = {dotted(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(wanted)}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise InputError(
                f"the checkpoint {where} was written with another model configuration:"
                f" {item}.{name} is {found.get(name, 'absent')} in the checkpoint, but"
                f" {expected.get(name, 'absent')} in the configuration"
            )
