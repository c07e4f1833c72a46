"""Models as inference wants them: layer by layer, on the current mesh."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import orbax
from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.tree import abstract_model
from llama_jax.config.model import ModelConfig
from llama_jax.model.weights import UnstackedLlama, quantize_model, unstack_layers
from llama_jax.parallel.mesh import check_divides, head_shards, set_default_mesh, tensor_mesh
from llama_jax.parallel.sharding import weight_spec
from llama_jax.runtime.cpu import cpu_has_bfloat16


def load(
    folder: str | Path, config: ModelConfig | None = None, quantize: str | None = None
) -> tuple[ModelConfig, UnstackedLlama]:
    """Returns a model from a model folder or a run folder, straight onto the current mesh.

    >>> config, model = lj.load("models/tiny")
    >>> config.n_layers, config.vocab_size
    (2, 320)
    >>> len(model.layers), model.tok_embeddings.shape  # V, D
    (2, (320, 32))

    Where no mesh is set, it sets one: all local devices that divide the model. The next model that
    is loaded so sets its own, and this one is then used under `jax.set_mesh(its mesh)`. For another
    mesh, call `jax.set_mesh` before.

    Over more devices than it has key/value heads, each device holds the one that its query heads
    want: the configuration that is returned counts these copies as heads of their own, and gives
    the same results.

    Args:
        folder: a model folder, or a run folder (its newest checkpoint).
        config: how to compute it; default: the folder's, through `choose_compute_dtype`.
        quantize: 'int8' keeps its matrices so; None as they are.

    Raises:
        InputError: as `checkpoint.load_model`, it is quantized already, or the mesh that the
            caller set does not divide it.
    """
    config = config or choose_compute_dtype(read_model_config(folder))
    set_default_mesh(partial(tensor_mesh, config))
    copies = max(1, head_shards() // config.n_kv_heads)
    all_heads = replace(config, n_kv_heads=config.n_heads)
    copied = head_shards() % config.n_kv_heads == 0  # then key/value heads need not divide
    check_divides(jax.sharding.get_mesh(), all_heads if copied else config)
    if copies == 1:
        config, model = orbax.load_model(folder, config)
        config, model = quantize_model(config, model) if quantize else (config, model)
        return config, unstack_layers(model)
    wide = replace(config, n_kv_heads=copies * config.n_kv_heads)
    like = abstract_model(wide)
    for name in ("wk", "wv"):
        setattr(
            like.layers, name, jax.tree.map(partial(_stored, config), getattr(like.layers, name))
        )
    _, model = orbax.load_model(folder, config, like=like)
    for name in ("wk", "wv"):
        copied = jax.tree.map(partial(_copied, copies), getattr(model.layers, name))
        setattr(model.layers, name, copied)
    wide, model = quantize_model(wide, model) if quantize else (wide, model)
    return wide, unstack_layers(model)


def choose_compute_dtype(config: ModelConfig) -> ModelConfig:
    """Returns the configuration with the compute type that is fastest on this machine.

    That is the model's own, but float32 instead of bfloat16 on a CPU without instructions for
    bfloat16: XLA converts there what it multiplies, and makes half as many tokens a second. The
    numbers are the same or nearer to exact; the weights take twice the memory. Where they would
    take more than half of the machine's, the type stays.
    """
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if (
        config.dtype != "bfloat16"
        or jax.local_devices()[0].platform != "cpu"
        or cpu_has_bfloat16()
        or 4 * config.n_params > half
    ):
        return config
    return replace(config, dtype="float32", param_dtype="float32")


def _stored(config: ModelConfig, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns a leaf [L, …, K, H] with the heads that are stored, all of them on every device."""
    *before, _, H = leaf.shape
    sharding: Any = leaf.sharding
    spec = P(*sharding.spec[: len(before)], None, None)
    shape = (*before, config.n_kv_heads, H)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(sharding.mesh, spec))


@partial(jax.jit, static_argnums=0)
def _copied(copies: int, w_L_KH: jax.Array) -> jax.Array:
    """Returns each head `copies` times, as the query heads that read it lie on the devices."""
    dims = "LDKH" if w_L_KH.ndim == 4 else "LKH"  # a weight, or the scales of one in int8
    return jax.reshard(jnp.repeat(w_L_KH, copies, axis=-2), weight_spec(dims))
