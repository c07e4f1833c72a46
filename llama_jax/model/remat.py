"""Rematerialization: which arrays of a layer are saved for the backward pass, or recomputed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import platform

# The names by which a layer marks its arrays; `attention` includes the log of the softmax
# denominators.
_ATTENTION = ("attention",)
_PROJECTIONS = (*_ATTENTION, "query", "key", "value")
_PRODUCTS = (*_PROJECTIONS, "attention_output", "gate", "up")
_SAVED = {"full": (), "attention": _ATTENTION, "projections": _PROJECTIONS, "products": _PRODUCTS}


def save_for_backward(name: str, x: jax.Array) -> jax.Array:
    """Marks `x` with the name by which a policy of `config.remat` saves or offloads it."""
    return checkpoint_name(x, name)


def apply_remat(config: ModelConfig, block: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of one layer, which saves only the arrays that `config.remat` selects.

    Raises:
        InputError: `config.remat` is offload, and the platform is a CPU.
    """
    if config.remat == "none":
        return block
    policies = jax.checkpoint_policies
    if config.remat == "offload":
        if platform() == "cpu":
            raise InputError("model.remat offload needs a TPU or GPU: use full")
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*_SAVED[config.remat])
    return partial(jax.checkpoint, policy=policy, prevent_cse=not config.scan)(block)
