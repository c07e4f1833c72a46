"""Loads models for inference: layers unstacked, sharded over the current mesh."""

import os
from dataclasses import replace
from functools import partial

import jax

from llama_jax.checkpoint import model_folders
from llama_jax.checkpoint.folders import is_lora_run, read_model_config
from llama_jax.checkpoint.lora_pairs import (
    StoredPairs,
    base_of_run,
    load_adapters,
    read_lora_run,
)
from llama_jax.checkpoint.tree import abstract_model
from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.model.lora import attach, merge
from llama_jax.model.weights import Llama, UnstackedLlama, quantize_model, unstack_layers
from llama_jax.parallel.head_copies import (
    as_copied_heads,
    copies_of_head,
    stored_heads,
    with_copies,
)
from llama_jax.parallel.mesh import check_divides, head_shards, set_default_mesh, tensor_mesh
from llama_jax.runtime.cpu import cpu_has_bfloat16
from llama_jax.runtime.storage import AnyPath, parse_path


def load(
    folder: str | AnyPath,
    config: ModelConfig | None = None,
    quantize: str | None = None,
    *,
    pairs: StoredPairs | None = None,
    unmerged: bool = False,
) -> tuple[ModelConfig, UnstackedLlama]:
    """Loads a model from a model folder or a run folder, directly onto the current mesh.

    >>> config, model = lj.load("models/tiny")
    >>> config.n_layers, config.vocab_size
    (2, 320)
    >>> len(model.layers), model.tok_embeddings.shape  # V, D
    (2, (320, 32))

    If no mesh is set, `load` sets one of as many local devices as divide the model. The next model
    that is loaded this way sets its own mesh; use the first model under `jax.set_mesh(its mesh)`
    from then on. For another mesh, call `jax.set_mesh` before `load`.

    If the mesh has more devices than the model has key/value heads, each device has a copy of the
    head that its query heads read. The returned config counts these copies as separate heads; the
    results are the same.

    Args:
        folder: a model folder, or a run folder (its newest checkpoint; of a LoRA run its base with
            the pairs of the newest checkpoint).
        config: how to compute it; default: the folder's, through `choose_compute_dtype`.
        quantize: 'int8' quantizes the matrices, after low-rank pairs have been merged into them;
            None leaves them as they are.
        pairs: low-rank pairs that belong to the model in `folder`; default: none, or those of a
            LoRA run.
        unmerged: whether the pairs stay apart from the matrices, which `quantize` may quantize.
            Otherwise they are merged: added in float32, and cast to the matrix's dtype. Those of an
            int8 model always stay apart.

    Raises:
        InputError: as `model_folders.load_model`; or `quantize` is set and the model is already
            quantized; or the mesh that the caller set doesn't divide the model; or pairs are
            missing, given twice or not for this model.
    """
    folder = parse_path(folder)
    config = config or choose_compute_dtype(read_model_config(folder))
    trained_as = config.quantized
    if is_lora_run(folder):
        if pairs:
            raise InputError(
                f"{folder} is a LoRA run, which has low-rank pairs of its own: give the model that"
                " it started from"
            )
        folder, pairs = base_of_run(folder), read_lora_run(folder, config)
        config = replace(config, quantized=read_model_config(folder).quantized)
        if trained_as != config.quantized:  # training quantized the base when it loaded it
            quantize = trained_as
    if unmerged and pairs is None:
        raise InputError(
            f"{folder} has no low-rank pairs that could stay apart: give a LoRA run, or add --lora"
        )
    set_default_mesh(partial(tensor_mesh, config))
    copies = copies_of_head(config.n_kv_heads)
    all_heads = replace(config, n_kv_heads=config.n_heads)
    # If the number of shards is a multiple of the heads, each shard gets a copy of one head.
    can_copy = head_shards() % config.n_kv_heads == 0
    check_divides(jax.sharding.get_mesh(), all_heads if can_copy else config)
    if copies == 1:
        config, model = model_folders.load_model(folder, config, aliased=True)
    else:
        model = _load_with_copies(folder, config, copies)
    adapters = load_adapters(config, pairs) if pairs else None
    apart = unmerged or trained_as != "none"
    if pairs and adapters and not apart:
        model = merge(pairs.lora, model, adapters)
    config, model = quantize_model(config, model) if quantize else (config, model)
    unstacked = unstack_layers(model)
    if pairs and adapters and apart:
        unstacked = attach(pairs.lora, unstacked, adapters)
    return config, unstacked


def _load_with_copies(folder: AnyPath, config: ModelConfig, copies: int) -> Llama:
    """Loads a model with `copies` of each key/value head, which its matrices have as heads."""
    like, wanted = (abstract_model(with_copies(config)) for _ in range(2))
    for name in ("wk", "wv"):
        leaves = jax.tree.map(partial(stored_heads, copies), getattr(like.layers, name))
        setattr(wanted.layers, name, leaves)
    _, model = model_folders.load_model(folder, config, like=wanted, aliased=True)
    for name in ("wk", "wv"):
        leaves = getattr(like.layers, name), getattr(model.layers, name)
        setattr(model.layers, name, jax.tree.map(as_copied_heads, *leaves))
    return model


def choose_compute_dtype(config: ModelConfig) -> ModelConfig:
    """Returns the config with the compute dtype that is fastest on this machine.

    This is the model's dtype, except on a CPU without bfloat16 instructions, where float32 replaces
    bfloat16: XLA converts the operands of each bfloat16 product there, which halves the tokens/s.
    The results are the same or more exact; the weights take twice the memory. If they would take
    more than half of the machine's memory, the dtype stays bfloat16.
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
