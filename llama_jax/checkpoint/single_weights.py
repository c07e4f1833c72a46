"""The weights of a model folder or a checkpoint, read and written one at a time.

`checkpoint` moves whole models between folder and mesh; here no more than one weight of one layer
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

# The caller waits for the disk once, not after each chunk.
_NOT_SYNCED = ts.Context({"file_io_sync": False})


class WeightsReader:
    """The weights in `folder` (a model folder, or a run folder's newest checkpoint) by dotted name.

    Raises:
        InputError: the folder holds no weights, or they are damaged.
        Fault: the machine could not read them.
    """

    def __init__(self, folder: Path):
        self.place = orbax.weights_folder(folder) / "model"
        self._stores = open_arrays(self.place)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each weight, layers stacked."""
        return {n: (tuple(s.shape), s.dtype.numpy_dtype) for n, s in self._stores.items()}

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """Returns a weight, or the part of it that belongs to `layer`."""
        store = self._stores[name]
        with classify_errors(self.place / name):
            return (store if layer is None else store[layer]).read().result()


class WeightsWriter:
    """Writes `weights/` of a model folder, weight by weight.

    Args:
        folder: a model folder in the making.
        arrays: of each weight, by dotted name: shape with layers stacked, type, and into how many
            parts a mesh cuts each dimension (1 for all of them if the mesh is not known).
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, tuple[int, ...]]],
    ):
        place = orbax.write_skeleton(folder, list(arrays))
        self._stores = dict[str, Any]()
        for name, (shape, dtype, cuts) in arrays.items():
            shutil.rmtree(place / name)
            chunk = [size // cut for size, cut in zip(shape, cuts, strict=True)]
            if name.startswith("layers."):
                chunk[0] = 1
            while np.prod(chunk) * dtype.itemsize > orbax.CHUNK_BYTES:
                first = next(i for i, size in enumerate(chunk) if size > 1)  # one piece of memory
                chunk[first] = -(-chunk[first] // 2)
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{place.absolute()}/{name}/"},
                "metadata": {
                    "shape": shape,
                    "data_type": dtype.name,
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                    # Weights don't compress, but a flipped bit must not pass unseen.
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
        """Writes a weight, or the part of it that belongs to `layer`."""
        store = self._stores[name]
        (store if layer is None else store[layer]).write(array).result()
