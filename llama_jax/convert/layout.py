"""How checkpoints name, order, turn and split the weights.

Ours: axes [in…, out…], rotary halves apart. Theirs (Meta, Hugging Face, GGUF, llama2.c): matrices
[out, in]; Meta, GGUF and llama2.c keep the two numbers that turn together side by side
(interleaved), Hugging Face half a head apart. The rules: facts of the reference's `model.py`,
`llama/generation.py` and transformers' `convert_llama_weights_to_hf.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError

_AT_ONCE = 1 << 20  # numbers that are quantized in one go, in a handful of float32 copies


class Weight(NamedTuple):
    """One weight of one layer (or of none: embedding, last norm, head), under our name."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


class OrbaxArray(NamedTuple):
    """One of the arrays that our own folders keep a weight in."""

    suffix: str  # after its name
    letters: str
    dtype: np.dtype | None  # None: the weight's own


class Axes(NamedTuple):
    """The letters of a weight: ours, theirs as rows and columns, and where Meta splits theirs."""

    ours: str
    rows: str
    columns: str = ""
    split: int | None = None


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
_IN_LAYERS = ("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w3", "w2")


def weights(config: ModelConfig) -> Iterator[Weight]:
    """Yields every weight of a model, in the order of the forward pass."""
    yield Weight("tok_embeddings")
    for layer in range(config.n_layers):
        for name in _IN_LAYERS:
            yield Weight(name, layer)
    yield Weight("norm")
    if not config.tied_head:
        yield Weight("output")


@dataclass(frozen=True)
class Layout:
    """A format's names and habits."""

    names: Mapping[str, str]  # our name -> theirs, {} for the number of the layer
    ours: bool = False  # axes and rotary order are ours already
    quantized: bool = False  # ours alone: matrices are int8 values and float32 scales
    interleaved: bool = False
    shards: int = 1  # files over which Meta's model parallelism splits each matrix
    embedding_split: int = 0  # axis: 1 for Llama 1 and 2, 0 for Llama 3 and later
    stores_tied_head: bool = False  # a tied head is written out a second time

    def tensor_specs(
        self, config: ModelConfig, weight: Weight
    ) -> list[tuple[int, str, tuple[int, ...]]]:
        """Returns (shard, their name, their shape) of what makes up `weight`, in order."""
        if self.ours:
            full, bracket, layer = self.names[weight.name].format(weight.layer).partition("[")
            return [
                (0, f"{full}{part.suffix}{bracket}{layer}", config.shape(part.letters))
                for part in self.orbax_arrays(weight)
            ]
        shape = self._shape(config, weight.name)
        found = [(i, self.names[weight.name].format(weight.layer), shape) for i in self._shards()]
        if weight.name == "tok_embeddings" and self._head_beside(config):
            shape = self._shape(config, "output")
            found += [(i, self.names["output"], shape) for i in self._shards()]
        return found

    def orbax_arrays(self, weight: Weight) -> list[OrbaxArray]:
        """Returns the arrays that one of our own folders keeps `weight` in."""
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
        """Returns the size of `weight` as it is written in this layout [bytes]."""
        if self.ours:
            kinds = [part.dtype or dtype for part in self.orbax_arrays(weight)]
        else:
            kinds = [dtype] * len(self.tensor_specs(config, weight))
        shapes = [shape for _, _, shape in self.tensor_specs(config, weight)]
        return sum(
            math.prod(shape) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)
        )

    def to_ours(
        self, config: ModelConfig, weight: Weight, pieces: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Returns a weight in our axes and rotary order; `pieces` follow `tensor_specs`.

        Raises:
            InputError: pieces that must be equal (norms, a tied head) are not.
        """
        if self.ours:
            return pieces[0]
        made = self._join(config, weight, pieces[: self.shards])
        for i, head in enumerate(pieces[self.shards :]):
            if not same_bits(head, made[i * len(head) : (i + 1) * len(head)]):
                raise InputError(
                    f"{self.names['output']} differs from {self.names['tok_embeddings']}, but the"
                    " configuration ties them: correct the configuration"
                )
        return made

    def from_ours(self, config: ModelConfig, weight: Weight, ours: np.ndarray) -> list[np.ndarray]:
        """Returns the pieces of a weight, as named by `tensor_specs()`: `to_ours` undone."""
        if self.ours:
            in_two = len(self.orbax_arrays(weight)) == 2
            return _quantized(ours, AXES[weight.name].ours) if in_two else [ours]
        made = self._part(config, weight, ours)
        if weight.name == "tok_embeddings" and self._head_beside(config):
            made += np.split(ours, self.shards)
        return made

    def _head_beside(self, config: ModelConfig) -> bool:
        return config.tied_head and self.stores_tied_head

    def _shards(self) -> range:
        return range(self.shards)

    def _split(self, name: str) -> int | None:
        return self.embedding_split if name == "tok_embeddings" else AXES[name].split

    def _copies(self, config: ModelConfig, name: str) -> int:
        """Returns in how many shards each key/value head stands: 2 for 405B in 16 files."""
        return max(1, self.shards // config.n_kv_heads) if name in ("wk", "wv") else 1

    def _shape(self, config: ModelConfig, name: str) -> tuple[int, ...]:
        axes = AXES[name]
        shape = [math.prod(config.shape(letters)) for letters in axes[1:3] if letters]
        split = self._split(name)
        if split is not None:
            shape[split] = shape[split] * self._copies(config, name) // self.shards
        return tuple(shape)

    def _join(
        self, config: ModelConfig, weight: Weight, pieces: Sequence[np.ndarray]
    ) -> np.ndarray:
        name, split = weight.name, self._split(weight.name)
        copies = self._copies(config, name)
        groups = [pieces[i : i + copies] for i in range(0, len(pieces), copies)]
        if split is None:
            groups = [pieces]
        for group in groups:
            for number, other in enumerate(group[1:], 1):
                if not same_bits(group[0], other):
                    raise InputError(
                        f"{self.names[name].format(weight.layer)} of shard {number} differs from"
                        " shard 0's, but every shard holds the same: the files are not of one"
                        " model, fetch them again"
                    )
        parts = [group[0] for group in groups]
        shape = config.shape(AXES[name].ours)
        if split is None or (len(parts) == 1 and name == "tok_embeddings"):
            return np.ascontiguousarray(parts[0]).reshape(shape)
        if name == "tok_embeddings":
            return np.concatenate(parts, axis=split)
        rows, columns = parts[0].shape
        across = (rows * len(parts), columns) if split == 0 else (rows, columns * len(parts))
        made = np.empty(across[::-1], parts[0].dtype)
        for i, part in enumerate(parts):
            if self.interleaved and name in ("wq", "wk"):
                part = _exchange(part, config.head_dim, to_halves=True)
            if split == 0:
                _turn(part, made[:, i * rows : (i + 1) * rows])
            else:
                _turn(part, made[i * columns : (i + 1) * columns])
        return made.reshape(shape)

    def _part(self, config: ModelConfig, weight: Weight, ours: np.ndarray) -> list[np.ndarray]:
        name, split = weight.name, self._split(weight.name)
        if split is None:
            return [ours] * self.shards
        if name != "tok_embeddings":
            columns = math.prod(config.shape(AXES[name].columns))
            flat = ours.reshape(columns, -1)
            ours = np.empty(flat.shape[::-1], flat.dtype)
            _turn(flat, ours)
            if self.interleaved and name in ("wq", "wk"):
                ours = _exchange(ours, config.head_dim, to_halves=False)
        copies = self._copies(config, name)
        parts = np.split(ours, self.shards // copies, axis=split)
        return [np.ascontiguousarray(part) for part in parts for _ in range(copies)]


def _exchange(rows: np.ndarray, head_dim: int, *, to_halves: bool) -> np.ndarray:
    """Returns the rows of each head reordered: pairs (2i, 2i+1) to (i, i + H/2), or back."""
    inner = (head_dim // 2, 2) if to_halves else (2, head_dim // 2)
    heads = rows.reshape(-1, *inner, rows.shape[-1])
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(rows.shape)


def _turn(matrix: np.ndarray, out: np.ndarray) -> None:
    """Writes the transposed `matrix` to `out` in tiles that fit a cache: 5 times numpy's pace."""
    tall, wide = 128, 1024
    for i in range(0, matrix.shape[0], tall):
        for j in range(0, matrix.shape[1], wide):
            out[j : j + wide, i : i + tall] = matrix[i : i + tall, j : j + wide].T


def _quantized(w: np.ndarray, dims: str) -> list[np.ndarray]:
    """Returns `int8(w, dims)`, made of a part of the output channels at a time."""
    from llama_jax.model.quantize import output_dims, quantize_int8

    scale = np.empty([w.shape[dims.index(letter)] for letter in output_dims(dims)], np.float32)
    rows_first = dims[0] in output_dims(dims)
    flat = w.reshape((scale.size, -1) if rows_first else (-1, scale.size))
    values, scales = np.empty(flat.shape, np.int8), scale.reshape(-1)
    step = max(1, _AT_ONCE * scale.size // w.size)
    for i in range(0, scale.size, step):
        part = slice(i, i + step)
        at = part if rows_first else (slice(None), part)
        values[at], scales[part] = quantize_int8(flat[at], "VD" if rows_first else "DV")
    return [values.reshape(w.shape), scale]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Tells whether two arrays hold the same bits (a NaN equals itself, 0 differs from -0)."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits))
