"""Low-rank pairs beside the matrices of a model (LoRA, arXiv 2106.09685).

A matrix W [in…, out…] stays as it is; a pair A [in…, R], B [R, out…] is trained beside it:
y = xW + s·(xA)B. `linear.matmul` computes it, whatever the storage of W.
"""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config.lora import IN_OUT_DIMS, LoraConfig
from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.model.quantize import MATRIX_DIMS, Int8Matrix
from llama_jax.model.summary import WeightsModule
from llama_jax.model.weights import Block, Llama, UnstackedLlama
from llama_jax.parallel.sharding import weight_spec

Model = TypeVar("Model", Llama, UnstackedLlama)


class LowRank(WeightsModule):
    """A low-rank pair: `a` [in…, R] and `b` [R, out…], float32; stacked, both with a leading L."""

    def __init__(self, a: jax.Array, b: jax.Array):
        self.a = nnx.Param(a)
        self.b = nnx.Param(b)


class LayerPairs(WeightsModule):
    """The pairs of one layer, or of all layers stacked: one `LowRank` for each target."""

    def __init__(self, pairs: dict[str, LowRank]):
        for name, pair in pairs.items():
            setattr(self, name, pair)


class Adapters(WeightsModule):
    """The pairs of all layers, float32, which LoRA trains. `layers` is a `LayerPairs`, stacked.

    B is zero. A is uniform in ±1/√in, as PEFT draws it (Kaiming's uniform with a = √5).
    """

    def __init__(self, config: ModelConfig, lora: LoraConfig, key: jax.Array):
        # One key for each matrix of a layer, whichever are targets.
        keys = dict(zip(IN_OUT_DIMS, jax.random.split(key, len(IN_OUT_DIMS)), strict=True))

        def pair(name: str) -> LowRank:
            a_dims, b_dims = (f"L{dims}" for dims in low_rank_dims(MATRIX_DIMS[name]))
            limit = config.count(IN_OUT_DIMS[name][0]) ** -0.5
            a_shape, b_shape = (_shape(config, lora, dims) for dims in (a_dims, b_dims))
            a = jax.random.uniform(
                keys[name], a_shape, jnp.float32, -limit, limit, out_sharding=weight_spec(a_dims)
            )
            return LowRank(a, jnp.zeros(b_shape, jnp.float32, out_sharding=weight_spec(b_dims)))

        self.layers = LayerPairs({name: pair(name) for name in lora.targets})


def _shape(config: ModelConfig, lora: LoraConfig, dims: str) -> tuple[int, ...]:
    return tuple(lora.rank if letter == "R" else config.count(letter) for letter in dims)


def low_rank_dims(dims: str) -> tuple[str, str]:
    """Returns the axes of the pair of a matrix: 'DNH' -> ('DR', 'RNH')."""
    return next(
        (f"{inputs}R", f"R{outputs}")
        for inputs, outputs in IN_OUT_DIMS.values()
        if inputs + outputs == dims
    )


# The weights that a run trains, which have gradients, optimizer state and checkpoints: all weights
# of the model, or the pairs.
Trained = Llama | Adapters


class Adapted(WeightsModule):
    """A matrix with its low-rank pair; stacked, all arrays have a leading L.

    Attributes:
        base: nnx.Param, `Int8Matrix` or `Transposed`.
        a: of the pair.
        b: of the pair.
        scale: factor of the product of the pair.
        dropout: probability with which an element of the input of `a` is dropped.
        key: random key of the dropout; None: nothing is dropped.
    """

    def __init__(
        self, base: Any, pair: LowRank, lora: LoraConfig, dropout_key: jax.Array | None = None
    ):
        self.base, self.a, self.b = base, pair.a, pair.b
        self.scale, self.dropout = lora.scale, lora.dropout
        self.key = nnx.data(dropout_key)  # nnx would treat an array of keys as static


def attach(
    lora: LoraConfig, model: Model, adapters: Adapters, dropout_key: jax.Array | None = None
) -> Model:
    """Returns the model with each target as an `Adapted`: new modules, the same arrays.

    Args:
        lora: with which the adapters were initialized.
        model: the base, of any storage.
        adapters: of a model of the same shape.
        dropout_key: determines the dropped elements of this forward pass, with the numbers of layer
            and matrix; for a stacked model. None: nothing is dropped.
    """
    if isinstance(model, UnstackedLlama):
        layers = jax.tree.map(lambda leaf: leaf, model.layers)
        for i, layer in enumerate(layers):
            pairs = jax.tree.map(lambda x_L, i=i: x_L[i], adapters.layers)
            _adapt(lora, layer, pairs, {})
        return model._replace(layers=layers)
    keys = {}
    if dropout_key is not None and lora.dropout:
        of_matrices = jax.random.split(dropout_key, len(IN_OUT_DIMS))
        n_layers = len(model.layers.attention_norm[...])
        keys = {
            name: jax.random.split(key, n_layers)
            for name, key in zip(IN_OUT_DIMS, of_matrices, strict=True)
        }
    adapted: Any = jax.tree.map(lambda leaf: leaf, model)
    _adapt(lora, adapted.layers, adapters.layers, keys)
    return adapted


def _adapt(lora: LoraConfig, layer: Block, pairs: LayerPairs, keys: dict[str, Any]) -> None:
    """Replaces each target of a layer, or of stacked layers, by an `Adapted`."""
    for name in lora.targets:
        pair = getattr(pairs, name)
        setattr(layer, name, Adapted(getattr(layer, name), pair, lora, keys.get(name)))


def is_adapted(model: Llama | UnstackedLlama) -> bool:
    """Returns whether pairs are attached to the model, so that its own weights are frozen."""
    layer = model.layers[0] if isinstance(model, UnstackedLlama) else model.layers
    return any(isinstance(getattr(layer, name), Adapted) for name in MATRIX_DIMS)


def merge(lora: LoraConfig, model: Llama, adapters: Adapters) -> Llama:
    """Returns the model with each target W as W + s·AB: new modules.

    The sum is in float32 and is then cast to the dtype of W.

    Raises:
        InputError: the matrices are int8, which the sum would round once more.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for name in lora.targets:
        w, pair = getattr(model.layers, name), getattr(adapters.layers, name)
        if isinstance(w, Int8Matrix):
            raise InputError(
                "low-rank pairs can't be merged into int8 matrices: merge them into the model that"
                " was quantized, or keep them apart (--unmerged)"
            )
        setattr(
            model.layers,
            name,
            nnx.Param(_merged(w[...], pair, dims=MATRIX_DIMS[name], scale=lora.scale)),
        )
    return model


@partial(jax.jit, static_argnames=("dims", "scale"))
def _merged(w: jax.Array, pair: LowRank, *, dims: str, scale: float) -> jax.Array:
    a_dims, b_dims = low_rank_dims(dims)
    product = jnp.einsum(
        f"L{a_dims},L{b_dims}->L{dims}",
        pair.a[...],
        pair.b[...],
        out_sharding=weight_spec(f"L{dims}"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (w.astype(jnp.float32) + scale * product).astype(w.dtype)
