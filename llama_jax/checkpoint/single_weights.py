"""Reads and writes the weights of a model folder or a checkpoint one at a time.

`model_folders.py` moves complete models between a folder and a mesh. Here at most one weight of one
layer is in memory. Both read and write the same folders.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from llama_jax.checkpoint import array_files
from llama_jax.checkpoint.array_files import ArraySpec
from llama_jax.checkpoint.arrays import FAULTS, open_arrays
from llama_jax.checkpoint.content_sums import complete_sums, stored_sum
from llama_jax.checkpoint.model_folders import weights_location
from llama_jax.runtime.damage import Damaged, classify_errors
from llama_jax.runtime.storage import AnyPath


class WeightsReader:
    """Reads the weights of a model folder, or of a run folder's newest checkpoint, by dotted name.

    Attributes:
        folder: the folder of the arrays.

    Raises:
        Damaged: the weights are damaged.
        InputError: the folder has no weights.
        Fault: the machine could not read them.
    """

    def __init__(self, folder: AnyPath):
        where, files = weights_location(folder)
        self.folder = where / "model"
        self._stores = open_arrays(where, "model", files.names)
        self._sums = files.sums
        self._parts = defaultdict[str, dict[int, int]](dict)  # of each weight, by layer

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each weight, layers stacked."""
        return {n: (tuple(s.shape), s.dtype.numpy_dtype) for n, s in self._stores.items()}

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """Returns a weight, or its slice for `layer`.

        Raises:
            Damaged: a chunk is damaged; or this was the last slice of a weight that is not the one
                that was written.
            Fault: the machine could not read it.
        """
        store = self._stores[name]
        with classify_errors(self.folder / name, FAULTS):
            array = (store if layer is None else store[layer]).read().result()
        parts = self._parts[name]
        parts[layer or 0] = stored_sum(store, [_block(layer, array)])
        if layer is None or len(parts) == store.shape[0]:
            item = f"model/{name}"
            found = complete_sums({item: part} for part in parts.values())[item]
            if self._sums.get(item, found) != found:
                raise Damaged(self.folder / name, "it is not the array that was written")
        return array


class WeightsWriter:
    """Writes the arrays of a model folder weight by weight. The caller writes their metadata files.

    Args:
        folder: an incomplete model folder.
        arrays: each weight, by dotted name.

    Attributes:
        sums: partial content sum of each array, of the weights written so far.
    """

    def __init__(self, folder: AnyPath, arrays: Mapping[str, ArraySpec]):
        # The caller syncs to the disk once, not after each chunk.
        location = folder / "weights" / "model"
        self._stores = array_files.open_for_writing(location, arrays, synced=False)
        self.sums = dict.fromkeys(arrays, 0)

    def write(self, name: str, layer: int | None, array: np.ndarray) -> None:
        """Writes a weight, or its slice for `layer`."""
        store, block = self._stores[name], _block(layer, array)
        writes = array_files.start_writes(store, *block)
        self.sums[name] += stored_sum(store, [block])
        array_files.await_writes(writes)


def _block(layer: int | None, array: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Returns the origin and the values of a weight, or of its slice for `layer`, in its array."""
    values = array if layer is None else array[None]
    return [layer or 0, *[0] * (values.ndim - 1)], values
