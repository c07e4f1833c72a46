"""Our own folders as source and destination: a model folder, or a run's newest checkpoint."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from llama_jax.checkpoint import folders
from llama_jax.checkpoint.single_weights import WeightsReader, WeightsWriter
from llama_jax.config.model import ModelConfig
from llama_jax.convert.files.tensor_file import StoredTensor
from llama_jax.convert.layout import AXES, Layout, Weight, weights
from llama_jax.convert.source import Source
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import weight_spec as placed

_ENDS = ("tok_embeddings", "norm", "output")
NAMES = {n: n if n in _ENDS else f"layers.{n}[{{}}]" for n in AXES}


def layout(config: ModelConfig) -> Layout:
    """Returns how our own folders keep a model of this configuration."""
    return Layout(NAMES, ours=True, quantized=config.quantized == "int8")


def read(folder: Path) -> Source:
    """Returns the checkpoint in a model folder, or the newest of a run folder.

    Raises:
        InputError: it is neither, or damaged.
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
                f"{reader.place / full} is {shape}, but the configuration asks for"
                f" {config.n_layers} layers: they are not of one model, convert it again"
            )
        else:
            tensors |= {f"{full}[{i}]": tensor(full, i) for i in range(shape[0])}
    return Source("orbax", folder, config, layout(config), (tensors,))


class ModelFolderWriter:
    """Writes config.json and `weights/`, in the chunks of a mesh with these sizes of axes."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtypes: Mapping[Weight, np.dtype],
        mesh: Mapping[str, int],
    ):
        arrays = {}
        for weight in weights(config):
            for part in layout(config).orbax_arrays(weight):
                letters, full = part.letters, weight.name + part.suffix
                if weight.layer is not None:
                    letters, full = "L" + letters, f"layers.{full}"
                cuts = tuple(mesh.get(axis, 1) for axis in placed(letters))
                arrays[full] = (config.shape(letters), part.dtype or dtypes[weight], cuts)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        self._writer = WeightsWriter(folder, arrays)

    def write(self, pieces: Iterable[tuple[int, str, np.ndarray]]) -> None:
        """Writes (0, name, tensor)s."""
        for _, name, piece in pieces:
            full, _, layer = name.partition("[")
            self._writer.write(full, int(layer[:-1]) if layer else None, piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Leaves what is written already."""
