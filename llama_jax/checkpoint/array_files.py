"""Writes arrays as files of a checkpoint: zarr 3, in chunks of at most 16 MiB with a checksum each.

Orbax reads the result like its own. It doesn't write it, because it can't write `s3://` and adds no
checksums to the data.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.checkpoint.content_sums import chunk_parts, stored_chunk, stored_sum
from llama_jax.checkpoint.orbax_format import metadata_files
from llama_jax.model.summary import path_names
from llama_jax.parallel.replicas import position_of, spread_over_hosts
from llama_jax.runtime import zarr_arrays
from llama_jax.runtime.storage import AnyPath

CHUNK_BYTES = 1 << 24  # a device that needs a part of an array reads only its chunks


class ArraySpec(NamedTuple):
    """An array to write.

    Attributes:
        shape: with layers stacked.
        dtype: of the elements.
        parts: number of parts into which a mesh splits each dimension. No chunk crosses a part.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[int, ...]


def array_specs(tree: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """Returns the specifications of the arrays of a nested dict, by dotted name."""

    def spec(x: Any) -> ArraySpec:
        shard = x.sharding.shard_shape(x.shape)
        return ArraySpec(
            x.shape, x.dtype, tuple(n // m for n, m in zip(x.shape, shard, strict=True))
        )

    return {dotted(path): spec(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def dotted(path: tuple[Any, ...]) -> str:
    """Returns the name of an array in files: 'layers.wq'."""
    return ".".join(path_names(path))


def metadata(items: Mapping[str, Mapping[str, ArraySpec]]) -> dict[str, bytes]:
    """Returns the small files of a checkpoint by relative name: Orbax's, and one for each array."""
    files = metadata_files({item: [*specs] for item, specs in items.items()})
    arrays = {
        f"{item}/{name}": _zarr(name, spec)
        for item, specs in items.items()
        for name, spec in specs.items()
    }
    return files | zarr_arrays.metadata_files(arrays)


def open_for_writing(
    folder: AnyPath, specs: Mapping[str, ArraySpec], *, synced: bool = True
) -> dict[str, Any]:
    """Returns the arrays of an item, to be written. Their metadata files are written by the caller.

    Args:
        folder: the folder of the item.
        specs: the arrays, by dotted name.
        synced: whether a write ends when its bytes are on the disk.
    """
    metadata = {name: _zarr(name, spec) for name, spec in specs.items()}
    return zarr_arrays.open_for_writing(folder, metadata, synced=synced)


class HostShard(NamedTuple):
    """A shard in the memory of this host: its array, its position in it, and its values."""

    name: str
    position: tuple[slice, ...]
    values: np.ndarray


def copy_shards(
    items: Mapping[str, Mapping[str, Any]], *, replicas: bool = False
) -> dict[str, list[HostShard]]:
    """Copies shards of this host's devices into its memory; the arrays may then be donated.

    Of a shard that several hosts have, one of them copies it: all copy about equally many bytes.

    Args:
        items: nested dicts of arrays.
        replicas: whether to copy each shard on this host, even if another host copies it.

    Returns:
        The shards of each item.
    """
    leaves = [
        (item, dotted(path), array)
        for item, tree in items.items()
        for path, array in jax.tree.leaves_with_path(tree)
    ]
    writers = spread_over_hosts(array for _, _, array in leaves)
    chosen = []
    for (item, name, array), writer in zip(leaves, writers, strict=True):
        seen = set()
        for shard in array.addressable_shards:
            where = position_of(shard.index)
            if where not in seen and (replicas or writer[where] == jax.process_index()):
                seen.add(where)
                shard.data.copy_to_host_async()
                chosen.append((item, name, shard))
    # A CPU device's buffer is the host's memory: only a copy survives its donation.
    copied: dict[str, list[HostShard]] = {item: [] for item in items}
    for item, name, shard in chosen:
        copied[item].append(HostShard(name, shard.index, np.array(shard.data, copy=True)))
    return copied


def sum_shards(stores: Mapping[str, Any], shards: Iterable[HostShard]) -> dict[str, int]:
    """Returns the partial content sum of this host's shards of each array."""
    sums = dict.fromkeys(stores, 0)
    for name, index, values in shards:
        sums[name] += stored_sum(stores[name], [([part.start or 0 for part in index], values)])
    return sums


def write_shards(stores: Mapping[str, Any], shards: Iterable[HostShard]) -> None:
    """Writes shards, all concurrently; returns and raises as `await_writes`."""
    writes = []
    for name, index, values in shards:
        writes += start_writes(stores[name], [part.start or 0 for part in index], values)
    await_writes(writes)


def start_writes(store: Any, origin: Sequence[int], values: np.ndarray) -> list[Any]:
    """Starts to write a block of an array, each chunk by itself; returns TensorStore's futures.

    One write of several chunks would fail with the first one that fails, while others are still
    being written.

    Args:
        store: the array.
        origin: position of the block in it. The block consists of whole chunks.
        values: of the block; they must not change until all is written.
    """
    return [
        store[tuple(map(slice, start, np.add(start, part.shape)))].write(
            part, can_reference_source_data_indefinitely=True
        )
        for start, part in chunk_parts(values, origin, stored_chunk(store))
    ]


def await_writes(writes: Sequence[Any]) -> None:
    """Waits until no chunk is being written any more, so that a caller can remove the folder.

    Raises:
        ValueError: a chunk can't be written.
    """
    for write in writes:
        write.exception()
    for write in writes:
        write.result()


def _zarr(name: str, spec: ArraySpec) -> dict[str, Any]:
    return zarr_arrays.array_metadata(spec.shape, spec.dtype.name, chunk_shape(name, spec))


def chunk_shape(name: str, spec: ArraySpec) -> list[int]:
    """Returns the shape of a chunk: of one layer, within one part, and contiguous in memory."""
    chunk = [size // parts for size, parts in zip(spec.shape, spec.parts, strict=True)]
    if ".layers." in f".{name}.":
        chunk[0] = 1
    while math.prod(chunk) * spec.dtype.itemsize > CHUNK_BYTES:
        # Halve the first dimension that can be halved. An odd size is halved upwards, which only a
        # dimension with one part allows: elsewhere a chunk would cross into the next part.
        first = next(i for i, size in enumerate(chunk) if size > 1)
        chunk[first] = _smaller_divisor(chunk[first], spec.parts[first])
    return chunk


def _smaller_divisor(size: int, parts: int) -> int:
    """Returns about half of a chunk's size; a divisor of it if the dimension has several parts."""
    if parts == 1:
        return -(-size // 2)
    return max(n for n in range(1, size // 2 + 1) if size % n == 0)
