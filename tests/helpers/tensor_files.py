"""Files of tensors in safetensors or PyTorch format, according to the name's suffix."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llama_jax.convert.files.safetensors import SafetensorsWriter, read_safetensors
from llama_jax.convert.files.tensor_file import StoredTensor, TensorFileWriter
from llama_jax.convert.files.torch_zip import TorchWriter, read_torch
from llama_jax.errors import InputError

DTYPES = [np.float64, np.int64, np.float32, np.int32, np.float16, ml_dtypes.bfloat16, np.int16]
DTYPES = [*map(np.dtype, [*DTYPES, np.int8, np.uint8, np.bool_])]  # in order of size, largest first
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (7, 3), (2, 1, 3, 2)]


def sample_arrays() -> dict[str, np.ndarray]:
    """Returns tensors of every dtype and many shapes, with random bits."""
    rng = np.random.default_rng(0)
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            size = math.prod(shape) * dtype.itemsize
            raw = rng.integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
            tensors[f"{dtype}.{shape}"] = raw.view(dtype).reshape(shape)
    return tensors


def reader_of(path: Path) -> Callable[[Path], dict[str, StoredTensor]]:
    return read_safetensors if path.suffix == ".safetensors" else read_torch


def writer_of(path: Path) -> type[TensorFileWriter]:
    return SafetensorsWriter if path.suffix == ".safetensors" else TorchWriter


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    with writer_of(path)(path, header) as file:
        for name, array in tensors.items():
            file.write(name, array)
    return path


def read_error(path: Path) -> str:
    """Returns the error message of reading an invalid file."""
    with pytest.raises(InputError) as caught:
        reader_of(path)(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message
