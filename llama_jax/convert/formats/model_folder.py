"""Model folders and run folders of llama_jax as source, model folders as destination."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from llama_jax.checkpoint import folders, model_folders
from llama_jax.checkpoint.array_files import ArraySpec
from llama_jax.checkpoint.content_sums import complete_sums
from llama_jax.checkpoint.single_weights import WeightsReader, WeightsWriter
from llama_jax.config.model import ModelConfig
from llama_jax.convert.files.tensor_file import StoredTensor
from llama_jax.convert.layout import AXES, LAYER_WEIGHTS, Layout, Weight, weights
from llama_jax.convert.source import Source
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import MESH_AXES, weight_spec
from llama_jax.runtime.storage import AnyPath, write_many

NAMES = {name: f"layers.{name}[{{}}]" if name in LAYER_WEIGHTS else name for name in AXES}


def layout(config: ModelConfig) -> Layout:
    """Returns how a model folder stores a model of this configuration."""
    return Layout(NAMES, ours=True, quantized=config.quantized == "int8")


def read(folder: AnyPath) -> Source:
    """Returns the checkpoint in a model folder, or the newest checkpoint of a run folder.

    Raises:
        InputError: the folder is neither, or damaged.
    """
    config = folders.read_model_config(folder)
    reader = WeightsReader(folder)

    def tensor(full: str, layer: int | None) -> StoredTensor:
        shape, dtype = reader.arrays[full]
        shape = shape if layer is None else shape[1:]
        return StoredTensor(shape, dtype, lambda: reader.read(full, layer))

    tensors = dict[str, StoredTensor]()
    for full, (shape, _) in reader.arrays.items():
        if not full.startswith("layers."):
            tensors[full] = tensor(full, None)
        elif shape[:1] != (config.n_layers,):
            raise InputError(
                f"{reader.folder / full} is {shape}, but the configuration requires"
                f" {config.n_layers} layers: they are not of one model, convert it again"
            )
        else:
            tensors |= {f"{full}[{i}]": tensor(full, i) for i in range(shape[0])}
    return Source("orbax", folder, config, layout(config), (tensors,))


class ModelFolderWriter:
    """Writes config.json and `weights/`, in chunks that match a mesh with these axis sizes.

    Attributes:
        files: the small files that it has written, by relative name.
    """

    def __init__(
        self,
        folder: AnyPath,
        config: ModelConfig,
        dtypes: Mapping[Weight, np.dtype],
        mesh: Mapping[str, int],
    ):
        arrays = {}
        for weight in weights(config):
            for array in layout(config).orbax_arrays(weight):
                letters, full = array.letters, weight.name + array.suffix
                if weight.layer is not None:
                    letters, full = "L" + letters, f"layers.{full}"
                splits = tuple(mesh.get(axis, 1) for axis in weight_spec(letters))
                dtype = array.dtype or dtypes[weight]
                arrays[full] = ArraySpec(config.shape(letters), dtype, splits)
        self.files = model_folders.model_files(config, arrays, None)
        write_many(folder, self.files)
        self._writer = WeightsWriter(folder, arrays)

    def write(self, tensors: Iterable[tuple[int, str, np.ndarray]]) -> None:
        """Writes tensors, given as (0, name, array)."""
        for _, name, array in tensors:
            full, _, layer = name.partition("[")
            self._writer.write(full, int(layer[:-1]) if layer else None, array)

    @property
    def sums(self) -> dict[str, str]:
        """The content sum of each array, for the manifest."""
        return complete_sums([self._writer.sums])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Does nothing: each tensor is complete once written."""


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the sizes of the mesh axes in 'fsdp=8,tensor=4'.

    Raises:
        InputError: a part doesn't name an axis and a positive size.
    """
    sizes = dict[str, int]()
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"{part!r} is not a mesh axis with its size: write --mesh like fsdp=8,tensor=4"
            )
        sizes[axis] = int(size)
    return sizes
