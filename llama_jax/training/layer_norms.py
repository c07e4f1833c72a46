"""Norms of the weights, gradients and activations of one step, layer by layer."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.model.lora import Trained
from llama_jax.model.summary import path_names
from llama_jax.model.transformer import measured_hidden_states
from llama_jax.model.weights import Llama
from llama_jax.parallel.collectives import shard_sequence
from llama_jax.training.step import gradients
from llama_jax.training.trainable import complete_model

_LAYERS = "layers."  # starts the names of stacked weights, which have a leading axis L

Norms = dict[str, Any]  # by dotted name of the weight: a norm, or those of the layers [L]


class LayerNorms(NamedTuple):
    """Norms before a step. Those of weights and gradients are Euclidean norms."""

    weights: Norms  # of what the step trains
    gradients: Norms  # before clipping
    activations: Norms  # √ of the mean square of each layer's output, over all tokens of the batch


@partial(jax.jit, static_argnums=0)
def compute_norms(
    config: Config, trained: Trained, batch: Batch, step: jax.Array, base: Llama | None
) -> LayerNorms:
    """Returns the norms of a step, on all devices. The arguments are those of `train_step`.

    It is a program of its own, so that an ordinary step computes no norms.
    """
    grads = gradients(config, trained, batch, base, step).grads
    model = complete_model(config, trained, base)

    def mean_square(x_BTD: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(x_BTD.astype(jnp.float32)))

    def measure(rows: Batch) -> Any:
        rows = jax.tree.map(shard_sequence, rows)
        inputs = rows.tokens, rows.positions, rows.segments, None
        return measured_hidden_states(config.model, model, *inputs, mean_square)[1]

    mean_squares_AL: Any = jax.lax.map(measure, batch)
    output_L = jax.reshard(jnp.sqrt(jnp.mean(mean_squares_AL, axis=0)), P())
    return LayerNorms(_norms(trained), _norms(grads), {_LAYERS + "output": output_L})


def _norms(tree: Trained) -> Norms:
    norms = Norms()
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = ".".join(path_names(path))
        axes = tuple(range(int(name.startswith(_LAYERS)), leaf.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes))
        norms[name] = jax.reshard(norm, P())
    return norms


def to_numbers(norms: LayerNorms) -> dict[str, dict[str, Any]]:
    """Returns the fields of `LayerNorms`: floats, or lists of floats; null if not finite."""

    def plain(norm: Any) -> Any:
        if np.ndim(norm):
            return [plain(value) for value in norm]
        return float(norm) if math.isfinite(norm) else None

    return {
        kind: {name: plain(np.asarray(norm)) for name, norm in by_name.items()}
        for kind, by_name in norms._asdict().items()
    }


def by_layer(norms: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the norm of each layer, 'layer 1' is the first, and of each weight outside of them.

    Args:
        norms: one kind of `to_numbers`.
    """
    outside = {name: norm for name, norm in norms.items() if not name.startswith(_LAYERS)}
    stacked = [norm for name, norm in norms.items() if name.startswith(_LAYERS)]
    layers = dict[str, float | None]()
    for i, values in enumerate(zip(*stacked, strict=True), 1):
        layers[f"layer {i}"] = None if None in values else math.hypot(*values)
    return layers | outside
