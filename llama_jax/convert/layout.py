"""How each checkpoint format names, orders, transposes and splits the weights.

Our layout: axes [in…, out…], rotary halves half a head apart. The other formats (Meta, Hugging
Face, GGUF, llama2.c) store matrices [out, in]. Meta, GGUF and llama2.c store the two numbers of a
rotary pair next to each other (interleaved), Hugging Face half a head apart. Sources: Meta's
`model.py` and `llama/generation.py`, and transformers' `convert_llama_weights_to_hf.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.convert.row_major import row_major
from llama_jax.errors import InputError

_QUANTIZED_AT_ONCE = 1 << 20  # numbers: quantization creates several float32 copies of them


class Weight(NamedTuple):
    """A weight under our name, of one layer or outside the layers (embedding, last norm, head)."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


class OrbaxArray(NamedTuple):
    """One of the arrays in which an Orbax folder stores a weight."""

    suffix: str  # of the name: "", or ".values" and ".scale" of an int8 matrix
    letters: str  # of its dimensions
    dtype: np.dtype | None  # None: the type of the weight


class Axes(NamedTuple):
    """The dimensions of a weight in letters, and the axis along which Meta's shards split it."""

    ours: str
    rows: str  # of the other formats' matrix
    columns: str = ""
    split: int | None = None  # axis of the other formats' matrix; None: every shard has a copy


AXES = {
    "tok_embeddings": Axes("VD", "V", "D", 0),  # Llama 1 and 2 split the columns
    "attention_norm": Axes("D", "D"),
    "wq": Axes("DNH", "NH", "D", 0),
    "wk": Axes("DKH", "KH", "D", 0),
    "wv": Axes("DKH", "KH", "D", 0),
    "wo": Axes("NHD", "D", "NH", 1),
    "ffn_norm": Axes("D", "D"),
    "w1": Axes("DF", "F", "D", 0),
    "w3": Axes("DF", "F", "D", 0),
    "w2": Axes("FD", "D", "F", 1),
    "norm": Axes("D", "D"),
    "output": Axes("DV", "V", "D", 0),
}
LAYER_WEIGHTS = ("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w3", "w2")


def weights(config: ModelConfig) -> Iterator[Weight]:
    """Yields every weight of a model, in the order of the forward pass."""
    yield Weight("tok_embeddings")
    for layer in range(config.n_layers):
        for name in LAYER_WEIGHTS:
            yield Weight(name, layer)
    yield Weight("norm")
    if not config.tied_head:
        yield Weight("output")


@dataclass(frozen=True)
class Layout:
    """The tensor names of a checkpoint format, and how it orders and splits the numbers."""

    names: Mapping[str, str]  # our name -> the format's, with {} for the index of the layer
    ours: bool = False  # our axes and rotary order: nothing to permute
    quantized: bool = False  # only if `ours`: matrices are int8 values and float32 scales
    interleaved: bool = False  # rotary pairs
    shards: int = 1  # files over which Meta's model parallelism splits each matrix
    embedding_split: int = 0  # axis: 1 for Llama 1 and 2, 0 for Llama 3 and later
    stores_tied_head: bool = False  # a tied head is stored in addition to the embedding

    def tensor_specs(
        self, config: ModelConfig, weight: Weight
    ) -> list[tuple[int, str, tuple[int, ...]]]:
        """Returns (shard, name, shape) of each tensor in which the format stores `weight`."""
        if self.ours:
            full, bracket, layer = self.names[weight.name].format(weight.layer).partition("[")
            return [
                (0, f"{full}{array.suffix}{bracket}{layer}", config.shape(array.letters))
                for array in self.orbax_arrays(weight)
            ]
        name, shape = self.names[weight.name].format(weight.layer), self._shape(config, weight.name)
        specs = [(shard, name, shape) for shard in range(self.shards)]
        if self._has_head_copy(config, weight):
            shape = self._shape(config, "output")
            specs += [(shard, self.names["output"], shape) for shard in range(self.shards)]
        return specs

    def orbax_arrays(self, weight: Weight) -> list[OrbaxArray]:
        """Returns the arrays in which an Orbax folder stores `weight`."""
        # Imported here because it imports JAX, which `llama-jax info` does not need.
        from llama_jax.model.quantize import output_dims

        axes = AXES[weight.name]
        if not self.quantized or not axes.columns:
            return [OrbaxArray("", axes.ours, None)]
        return [
            OrbaxArray(".values", axes.ours, np.dtype(np.int8)),
            OrbaxArray(".scale", output_dims(axes.ours), np.dtype(np.float32)),
        ]

    def nbytes(self, config: ModelConfig, weight: Weight, dtype: np.dtype) -> int:
        """Returns the size of `weight` in this layout [bytes]."""
        specs = self.tensor_specs(config, weight)
        dtypes = [dtype] * len(specs)
        if self.ours:
            dtypes = [array.dtype or dtype for array in self.orbax_arrays(weight)]
        return sum(
            math.prod(shape) * kind.itemsize
            for (_, _, shape), kind in zip(specs, dtypes, strict=True)
        )

    def to_ours(
        self, config: ModelConfig, weight: Weight, tensors: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Returns a weight in our axes and rotary order; `tensors` follow `tensor_specs`.

        An int8 matrix is dequantized to float32. Others are transposed as a view: no bytes move
        before `from_ours`, which transposes back for all formats but ours.

        Raises:
            InputError: tensors that must be equal (norms, a tied head) differ.
        """
        if self.ours:
            return tensors[0] if len(tensors) == 1 else dequantize(weight, *tensors)
        joined = self._join_shards(config, weight, tensors[: self.shards])
        for i, head in enumerate(tensors[self.shards :]):
            if not same_bits(head, joined[i * len(head) : (i + 1) * len(head)]):
                raise InputError(
                    f"{self.names['output']} differs from {self.names['tok_embeddings']}, but the"
                    " configuration ties them: correct the configuration"
                )
        return joined

    def from_ours(self, config: ModelConfig, weight: Weight, ours: np.ndarray) -> list[np.ndarray]:
        """Returns the tensors of a weight, in the order of `tensor_specs`: `to_ours` inverted.

        Those of other formats than ours may be views of `ours` in another order.
        """
        if self.ours:
            if len(self.orbax_arrays(weight)) == 2:
                return _quantize(ours, AXES[weight.name].ours)
            if ours.flags.c_contiguous:
                return [ours]
            return [row_major(_as_matrix(config, weight.name, ours)).reshape(ours.shape)]
        tensors = self._split_shards(config, weight, ours)
        if self._has_head_copy(config, weight):
            tensors += np.split(ours, self.shards)
        return tensors

    def _has_head_copy(self, config: ModelConfig, weight: Weight) -> bool:
        """Returns whether the tensors of `weight` include a second copy, for a tied head."""
        return weight.name == "tok_embeddings" and config.tied_head and self.stores_tied_head

    def _split_axis(self, name: str) -> int | None:
        return self.embedding_split if name == "tok_embeddings" else AXES[name].split

    def _copies(self, config: ModelConfig, name: str) -> int:
        """Returns how many shards store each key/value head: 2 for 405B in 16 files."""
        return max(1, self.shards // config.n_kv_heads) if name in ("wk", "wv") else 1

    def _shape(self, config: ModelConfig, name: str) -> tuple[int, ...]:
        """Returns the shape of one shard's tensor."""
        axes = AXES[name]
        shape = [math.prod(config.shape(letters)) for letters in axes[1:3] if letters]
        split = self._split_axis(name)
        if split is not None:
            shape[split] = shape[split] * self._copies(config, name) // self.shards
        return tuple(shape)

    def _join_shards(
        self, config: ModelConfig, weight: Weight, tensors: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Returns a weight in our layout from the tensors of all shards.

        Raises:
            InputError: shards that must have equal tensors differ.
        """
        name, split = weight.name, self._split_axis(weight.name)
        copies = self._copies(config, name) if split is not None else len(tensors)
        equal_groups = [tensors[i : i + copies] for i in range(0, len(tensors), copies)]
        for group in equal_groups:
            for number, other in enumerate(group[1:], 1):
                if not same_bits(group[0], other):
                    raise InputError(
                        f"{self.names[name].format(weight.layer)} of shard {number} differs from"
                        " shard 0's, but all shards must have the same: the files are not of one"
                        " model, fetch them again"
                    )
        parts = [group[0] for group in equal_groups]
        if self.interleaved and name in ("wq", "wk"):
            parts = [_permute_rotary(part, config.head_dim, to_halves=True) for part in parts]
        joined = parts[0] if split is None or len(parts) == 1 else np.concatenate(parts, axis=split)
        matrix = joined if name == "tok_embeddings" or split is None else joined.T
        return matrix.reshape(config.shape(AXES[name].ours))

    def _split_shards(
        self, config: ModelConfig, weight: Weight, ours: np.ndarray
    ) -> list[np.ndarray]:
        """Returns the tensor of each shard: `_join_shards` inverted."""
        name, split = weight.name, self._split_axis(weight.name)
        if split is None:
            return [ours] * self.shards
        matrix = ours
        if name != "tok_embeddings":
            matrix = _as_matrix(config, name, ours).T
        if self.interleaved and name in ("wq", "wk"):
            matrix = _permute_rotary(row_major(matrix), config.head_dim, to_halves=False)
        copies = self._copies(config, name)
        parts = np.split(matrix, self.shards // copies, axis=split)
        return [part for part in parts for _ in range(copies)]


def _as_matrix(config: ModelConfig, name: str, ours: np.ndarray) -> np.ndarray:
    """Returns a view of a weight in our axes as [in, out]."""
    return ours.reshape(math.prod(config.shape(AXES[name].columns)), -1)


def _permute_rotary(rows: np.ndarray, head_dim: int, *, to_halves: bool) -> np.ndarray:
    """Returns the rows of each head reordered: pairs (2i, 2i+1) to (i, i + H/2), or back."""
    inner = (head_dim // 2, 2) if to_halves else (2, head_dim // 2)
    heads = rows.reshape(-1, *inner, rows.shape[-1])
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(rows.shape)


def dequantize(weight: Weight, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns an int8 matrix as float32: its values times the scale of their output channel."""
    return values * element_scales(weight, scale)


def element_scales(weight: Weight, scale: np.ndarray) -> np.ndarray:
    """Returns the scales of a matrix with the axes of its values; contracted axes have length 1."""
    from llama_jax.model.quantize import output_dims

    dims = AXES[weight.name].ours
    outputs = output_dims(dims)
    return np.expand_dims(scale, [i for i, letter in enumerate(dims) if letter not in outputs])


def _quantize(w: np.ndarray, dims: str) -> list[np.ndarray]:
    """Returns `quantize_int8(w, dims)`, computed for a few output channels at a time.

    This keeps the temporary float32 arrays small.
    """
    from llama_jax.model.quantize import output_dims, quantize_int8

    scale = np.empty([w.shape[dims.index(letter)] for letter in output_dims(dims)], np.float32)
    channels_first = dims[0] in output_dims(dims)
    matrix = w.reshape((scale.size, -1) if channels_first else (-1, scale.size))
    values, scales = np.empty(matrix.shape, np.int8), scale.reshape(-1)
    step = max(1, _QUANTIZED_AT_ONCE * scale.size // w.size)
    for i in range(0, scale.size, step):
        channels = slice(i, i + step)
        index = channels if channels_first else (slice(None), channels)
        values[index], scales[channels] = quantize_int8(
            matrix[index], "VD" if channels_first else "DV"
        )
    return [values.reshape(w.shape), scale]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays have the same bits (a NaN equals itself, 0 differs from -0)."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits))
