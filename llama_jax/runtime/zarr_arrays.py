"""Opens zarr arrays (version 3) on disks and in buckets: the only module that knows their metadata.

Every chunk has a checksum (CRC-32C), which TensorStore verifies when it reads the chunk.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.runtime.storage import AnyPath, context, kvstore_spec

_FILE = "/zarr.json"  # in the folder of each array
_CACHED = {
    "cache_pool": "cache_pool#indices",
    "recheck_cached_data": False,
    "recheck_cached_metadata": False,
}


def array_metadata(
    shape: Sequence[int],
    dtype: str,
    chunk: Sequence[int],
    shard: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Returns the metadata of an array.

    Args:
        shape: of the array.
        dtype: zarr's name of the type of its elements.
        chunk: shape of the smallest part that is read and verified alone.
        shard: shape of a file that contains many chunks; default: each chunk is a file.
    """
    # Weights don't compress, and tokens hardly.
    codecs: list[Any] = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "crc32c"},
    ]
    if shard:
        inner = {"chunk_shape": [*chunk], "codecs": codecs, "index_codecs": codecs}
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [*(shard or chunk)]}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [*shape],
        "data_type": dtype,
        "chunk_grid": grid,
        "chunk_key_encoding": {"name": "default"},
        "codecs": codecs,
        "fill_value": 0,
    }


def metadata_files(arrays: Mapping[str, dict[str, Any]]) -> dict[str, bytes]:
    """Returns the metadata file of each array by its relative name."""
    return {name + _FILE: json.dumps(array).encode() for name, array in arrays.items()}


def array_names(files: Iterable[str]) -> list[str]:
    """Returns the names of the arrays whose metadata files are among `files`."""
    return [name.removesuffix(_FILE) for name in files if name.endswith(_FILE)]


def open_for_reading(
    folder: AnyPath, names: Iterable[str], *, cached: bool = False
) -> dict[str, Any]:
    """Opens arrays by their names relative to a folder, all concurrently.

    Args:
        folder: contains the folders of the arrays.
        names: of the arrays.
        cached: whether to cache the index of each shard. The files must not change.

    Raises:
        ValueError: TensorStore can't open one.
    """
    import tensorstore as ts

    opening = {
        name: ts.open(
            {
                "driver": "zarr3",
                "kvstore": kvstore_spec(folder / name),
                "fill_missing_data_reads": False,  # a missing file is an error, not zeros
                **(_CACHED if cached else {}),
            },
            read=True,
            context=context(),
        )
        for name in names
    }
    return {name: array.result() for name, array in opening.items()}


def open_for_writing(
    folder: AnyPath, arrays: Mapping[str, dict[str, Any]], *, synced: bool = True
) -> dict[str, Any]:
    """Opens arrays to be written. Their metadata files are written by the caller.

    Args:
        folder: contains the folders of the arrays.
        arrays: metadata by name relative to `folder`.
        synced: whether a write to a disk ends when its bytes are on it.
    """
    import tensorstore as ts

    opening = {
        name: ts.open(
            {
                "driver": "zarr3",
                "kvstore": kvstore_spec(folder / name),
                "metadata": metadata,
                "store_data_equal_to_fill_value": True,
            },
            open=True,
            assume_metadata=True,
            context=context(synced),
        )
        for name, metadata in arrays.items()
    }
    return {name: array.result() for name, array in opening.items()}
