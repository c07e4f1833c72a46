"""Reads and writes the weights of a model folder or a checkpoint one at a time.

`orbax.py` moves complete models between a folder and a mesh. Here at most one weight of one layer
is in memory. Both read and write the same folders.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from llama_jax.checkpoint import orbax
from llama_jax.checkpoint.arrays import classify_errors, open_arrays

# The caller syncs to the disk once, not after each chunk.
_NOT_SYNCED = ts.Context({"file_io_sync": False})


class WeightsReader:
    """Reads the weights of a model folder, or of a run folder's newest checkpoint, by dotted name.

    Attributes:
        folder: the folder of the arrays.

    Raises:
        InputError: the folder has no weights, or they are damaged.
        Fault: the machine could not read them.
    """

    def __init__(self, folder: Path):
        self.folder = orbax.weights_folder(folder) / "model"
        self._stores = open_arrays(self.folder)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each weight, layers stacked."""
        return {n: (tuple(s.shape), s.dtype.numpy_dtype) for n, s in self._stores.items()}

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """Returns a weight, or its slice for `layer`."""
        store = self._stores[name]
        with classify_errors(self.folder / name):
            return (store if layer is None else store[layer]).read().result()


class WeightsWriter:
    """Writes `weights/` of a model folder, weight by weight.

    Args:
        folder: an incomplete model folder.
        arrays: of each weight, by dotted name: the shape with layers stacked, the type, and the
            number of parts into which a mesh splits each dimension (1 each if no mesh is given).
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, tuple[int, ...]]],
    ):
        location = orbax.write_placeholders(folder, list(arrays))
        self._stores = dict[str, Any]()
        for name, (shape, dtype, splits) in arrays.items():
            shutil.rmtree(location / name)
            chunk = [size // parts for size, parts in zip(shape, splits, strict=True)]
            if name.startswith("layers."):
                chunk[0] = 1
            while np.prod(chunk) * dtype.itemsize > orbax.CHUNK_BYTES:
                # Halve the first dimension that can be halved: a chunk stays contiguous in memory.
                first = next(i for i, size in enumerate(chunk) if size > 1)
                chunk[first] = -(-chunk[first] // 2)
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{location.absolute()}/{name}/"},
                "metadata": {
                    "shape": shape,
                    "data_type": dtype.name,
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                    # No compression, because weights don't compress; a checksum, so that a flipped
                    # bit is detected.
                    "codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "fill_value": 0,
                },
                "store_data_equal_to_fill_value": True,
            }
            self._stores[name] = ts.open(spec, create=True, context=_NOT_SYNCED).result()

    def write(self, name: str, layer: int | None, array: np.ndarray) -> None:
        """Writes a weight, or its slice for `layer`."""
        store = self._stores[name]
        (store if layer is None else store[layer]).write(array).result()
