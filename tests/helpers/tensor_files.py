"""Files of tensors that both formats hold, and how they are refused; the name tells the format."""

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
DTYPES = [*map(np.dtype, [*DTYPES, np.int8, np.uint8, np.bool_])]  # the widest first
SHAPES = [(), (0,), (3, 0, 2), (1,), (5,), (7, 3), (2, 1, 3, 2)]


def arrays() -> dict[str, np.ndarray]:
    """Tensors of every dtype and of many shapes, of random bits."""
    rng = np.random.default_rng(0)
    found = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            size = math.prod(shape) * dtype.itemsize
            raw = rng.integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
            found[f"{dtype}.{shape}"] = raw.view(dtype).reshape(shape)
    return found


def reader(path: Path) -> Callable[[Path], dict[str, StoredTensor]]:
    return read_safetensors if path.suffix == ".safetensors" else read_torch


def writer(path: Path) -> type[TensorFileWriter]:
    return SafetensorsWriter if path.suffix == ".safetensors" else TorchWriter


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    header = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    with writer(path)(path, header) as file:
        for name, array in tensors.items():
            file.write(name, array)
    return path


def refused(path: Path) -> str:
    """The message with which a file is refused."""
    with pytest.raises(InputError) as caught:
        reader(path)(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message
