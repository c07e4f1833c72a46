"""Hugging Face folders: `config.json` and `model.safetensors`."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from llama_jax.checkpoint import abstract_model, dict_to_tree, tree_to_dict
from llama_jax.errors import InputError
from llama_jax.family import ModelConfig, RopeScaling
from llama_jax.model.transformer import Llama

# Our weight: (their weight, its letters, our letters). Both turn q and k half-split, so no row
# changes its place.
_LAYER = {
    "attention_norm": ("input_layernorm", "D", "D"),
    "wq": ("self_attn.q_proj", "NHD", "DNH"),
    "wk": ("self_attn.k_proj", "KHD", "DKH"),
    "wv": ("self_attn.v_proj", "KHD", "DKH"),
    "wo": ("self_attn.o_proj", "DNH", "NHD"),
    "ffn_norm": ("post_attention_layernorm", "D", "D"),
    "w1": ("mlp.gate_proj", "FD", "DF"),
    "w3": ("mlp.up_proj", "FD", "DF"),
    "w2": ("mlp.down_proj", "DF", "FD"),
}
_ENDS = {
    "tok_embeddings": ("model.embed_tokens", "VD", "VD"),
    "norm": ("model.norm", "D", "D"),
    "output": ("lm_head", "VD", "DV"),
}


def read_config(folder: Path) -> ModelConfig:
    """Returns the shape that a Hugging Face `config.json` describes, computed in float32.

    Raises:
        InputError: it is missing, not of a LLaMA, or asks for what LLaMA doesn't have.
    """
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: give a Hugging Face model folder") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: fetch it again") from error
    if theirs.get("model_type") != "llama":
        raise InputError(f"{path} describes a {theirs.get('model_type')!r} model, not a llama")
    for key in ("attention_bias", "mlp_bias"):
        if theirs.get(key):
            raise InputError(f"{path}: {key} is true, but LLaMA has no biases")
    try:
        return ModelConfig(
            dim=theirs["hidden_size"],
            n_layers=theirs["num_hidden_layers"],
            n_heads=theirs["num_attention_heads"],
            n_kv_heads=theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
            head_dim=theirs.get("head_dim")
            or theirs["hidden_size"] // theirs["num_attention_heads"],
            hidden_dim=theirs["intermediate_size"],
            vocab_size=theirs["vocab_size"],
            context=theirs["max_position_embeddings"],
            norm_eps=theirs["rms_norm_eps"],
            rope_theta=theirs.get("rope_theta", 10_000.0),
            rope_scaling=_rope_scaling(theirs.get("rope_scaling"), path),
            tied_head=theirs.get("tie_word_embeddings", False),
            dtype="float32",
        )
    except KeyError as error:
        raise InputError(f"{path} lacks {error.args[0]!r}: fetch it again") from error


def _rope_scaling(theirs: dict[str, Any] | None, path: Path) -> RopeScaling | None:
    if theirs is None:
        return None
    kind = theirs.get("rope_type", theirs.get("type"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{path}: rope scaling of type {kind!r} is not LLaMA's")
    return RopeScaling(
        factor=theirs["factor"],
        low_freq_factor=theirs["low_freq_factor"],
        high_freq_factor=theirs["high_freq_factor"],
        original_context=theirs["original_max_position_embeddings"],
    )


def load(folder: str | Path) -> tuple[ModelConfig, Llama]:
    """Returns the model of a Hugging Face folder on the current mesh, weights in float32.

    Raises:
        InputError: a file is missing or damaged, or a weight is missing, unknown or misshapen.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / "model.safetensors"
    try:
        theirs = load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: give a folder with its weights") from error
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short ({error}): fetch it again") from error

    def take(name: str, their_dims: str, dims: str) -> np.ndarray:
        full = f"{name}.weight"
        if full not in theirs:
            raise InputError(f"{path} lacks {full}: the model needs it")
        weight, shape = theirs.pop(full), config.shape(their_dims)
        if weight.size != np.prod(shape):
            raise InputError(f"{path}: {full} is {weight.shape}, but config.json asks for {shape}")
        return np.einsum(f"{their_dims}->{dims}", weight.reshape(shape).astype(np.float32))

    ends = {name: row for name, row in _ENDS.items() if name != "output" or not config.tied_head}
    weights: dict[str, Any] = {name: take(*row) for name, row in ends.items()}
    weights["layers"] = {
        name: np.stack([take(f"model.layers.{i}.{their}", *dims) for i in range(config.n_layers)])
        for name, (their, *dims) in _LAYER.items()
    }
    unknown = [name for name in theirs if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise InputError(f"{path} holds {unknown[0]}, which LLaMA doesn't have")
    model = abstract_model(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree_to_dict(model))
    return config, dict_to_tree(model, jax.device_put(weights, shardings))
