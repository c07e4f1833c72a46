"""Verifies every byte of a run's checkpoints, of a model folder or of token shards.

Runs on the host, with bounded memory; uses no device.
"""

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint import folders
from llama_jax.checkpoint.content_sums import complete_sums, stored_sum
from llama_jax.data import shards
from llama_jax.data.shard_writer import BY_SHARD, hash_shards
from llama_jax.runtime import zarr_arrays
from llama_jax.runtime.console import byte_progress
from llama_jax.runtime.damage import Damaged, classify_errors
from llama_jax.runtime.manifest import hash_bytes, verified_manifest
from llama_jax.runtime.storage import AnyPath
from llama_jax.runtime.zarr_arrays import array_names

_BYTES_IN_FLIGHT = 1 << 28  # read at the same time, and not yet verified

_Block = tuple[Sequence[int], np.ndarray]  # the position of its first element, and its values


class _Array(NamedTuple):
    """An array to verify.

    Attributes:
        name: of its folder, relative to the folder that is verified.
        hash_blocks: computes a hash of its content, from blocks in row-major order.
        expected: the hash when it was written, or None if it was not computed.
    """

    name: str
    hash_blocks: Callable[[Any, Iterable[_Block]], str]
    expected: str | None


class Verdict(NamedTuple):
    """The result for one folder.

    Attributes:
        name: 'step 4', or the path of the folder.
        n_bytes: size of the arrays.
        damage: how a file differs from the one that was written, or None.
    """

    name: str
    n_bytes: int
    damage: str | None


def verify_folder(folder: AnyPath, progress: bool = True) -> list[Verdict]:
    """Reads every byte of the arrays in a folder; verifies its checksums and content sums.

    Args:
        folder: a run folder, a model folder or a folder of token shards.
        progress: show a progress bar on standard error.

    Returns:
        One verdict for each checkpoint of a run; otherwise one.

    Raises:
        InputError: the folder is none of these.
        Fault: the machine could not read it.
    """
    if shards.is_token_folder(folder):
        return [_verify(folder, str(folder), _token_arrays, progress)]
    if not folders.is_run_folder(folder):
        return [_verify(folder, str(folder), _model_arrays, progress)]
    checkpoints = folder / "checkpoints"
    steps, _ = folders.committed_steps(checkpoints)
    return [
        _verify(checkpoints / str(step), f"step {step}", _checkpoint_arrays, progress)
        for step in steps
    ]


def _verify(
    folder: AnyPath, name: str, list_arrays: Callable[[AnyPath], list[_Array]], progress: bool
) -> Verdict:
    size = 0
    try:
        arrays = list_arrays(folder)
        with classify_errors(folder):
            stores = zarr_arrays.open_for_reading(folder, [array.name for array in arrays])
        size = sum(math.prod(s.shape) * s.dtype.numpy_dtype.itemsize for s in stores.values())
        title = f"verifying {name}"
        with classify_errors(folder), byte_progress(title, size, progress) as advance:
            for array in arrays:
                store = stores[array.name]
                found = array.hash_blocks(store, _read_blocks(store, advance))
                if array.expected not in (found, None):
                    raise Damaged(folder, f"{array.name} is not the array that was written")
    except Damaged as error:
        return Verdict(name, size, error.reason)
    return Verdict(name, size, None)


def _checkpoint_arrays(folder: AnyPath) -> list[_Array]:
    """Returns the arrays of a folder with a manifest, whose small files it verifies."""
    found = verified_manifest(folder)
    sums = found.get("sums", {})  # of a model folder, by names relative to its weights
    names = array_names(found["files"])
    return [_Array(n, _content_sum, sums.get(n.removeprefix("weights/"))) for n in names]


def _content_sum(store: Any, blocks: Iterable[_Block]) -> str:
    return complete_sums([{"": stored_sum(store, blocks)}])[""]


def _model_arrays(folder: AnyPath) -> list[_Array]:
    folders.read_model_config(folder)
    return _checkpoint_arrays(folder)


def _token_arrays(folder: AnyPath) -> list[_Array]:
    arrays = list[_Array]()
    for split in shards.read_meta(folder)["splits"]:
        stream = shards.TokenStream(folder, split)  # verifies the small files
        names = array_names(stream.summary["files"]) if len(stream) else []
        hashes = stream.summary["sha256"]
        arrays += [
            _Array(n, _sha256_of_shards if h.startswith(BY_SHARD) else _sha256, h)
            for n, h in zip(names, hashes, strict=True)
        ]
    return arrays


def _sha256(store: Any, blocks: Iterable[_Block]) -> str:
    digest = hashlib.sha256()
    for _, values in blocks:
        digest.update(values.data)
    return digest.hexdigest()


def _sha256_of_shards(store: Any, blocks: Iterable[_Block]) -> str:
    return hash_shards([hash_bytes(values.data) for _, values in blocks])


def _read_blocks(array: Any, advance: Callable[[int], None]) -> Iterator[_Block]:
    """Yields an array file by file. TensorStore verifies the checksum of each chunk."""
    block = array.chunk_layout.write_chunk.shape or ()  # None for a scalar
    itemsize = array.dtype.numpy_dtype.itemsize
    limit = max(1, _BYTES_IN_FLIGHT // (math.prod(block) * itemsize))
    starts = (range(0, n, size) for n, size in zip(array.shape, block, strict=True))
    reads = deque[tuple[tuple[int, ...], Any]]()

    def next_block() -> _Block:
        corner, read = reads.popleft()
        values = read.result()
        advance(values.nbytes)
        return corner, values

    for corner in itertools.product(*starts):
        ends = (min(a + b, n) for a, b, n in zip(corner, block, array.shape, strict=True))
        reads.append((corner, array[tuple(map(slice, corner, ends))].read()))
        if len(reads) >= limit:
            yield next_block()
    while reads:
        yield next_block()


def describe_verdicts(folder: AnyPath, verdicts: Iterable[Verdict]) -> list[str]:
    """Returns one line for each verdict, and one for incomplete checkpoints of a run."""
    lines = [
        f"{v.name}: damaged ({v.damage})"
        if v.damage
        else f"{v.name}: verified, {v.n_bytes:,} bytes"
        for v in verdicts
    ]
    if folders.is_run_folder(folder):
        _, incomplete = folders.committed_steps(folder / "checkpoints")
        lines += [f"step {step}: incomplete (not used)" for step in incomplete]
    return lines
