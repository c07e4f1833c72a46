"""What the backward pass finds kept of a layer, and what it computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError
from llama_jax.parallel.mesh import platform

# The names that a layer gives to what it makes; `attention` also covers its softmax's sums.
_ATTENTION = ("attention",)
_PROJECTIONS = (*_ATTENTION, "query", "key", "value")
_PRODUCTS = (*_PROJECTIONS, "attended", "gate", "up")
_KEPT = {"full": (), "attention": _ATTENTION, "projections": _PROJECTIONS, "products": _PRODUCTS}


def save_for_backward(name: str, x: jax.Array) -> jax.Array:
    """Gives `x` the name by which `model.remat` may keep it."""
    return checkpoint_name(x, name)


def apply_remat(config: ModelConfig, block: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function of one layer, which keeps what `config.remat` names.

    Raises:
        InputError: the platform can't offload.
    """
    if config.remat == "none":
        return block
    policies = jax.checkpoint_policies
    if config.remat == "offload":
        if platform() == "cpu":
            raise InputError("model.remat offload needs a TPU or GPU: take full")
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*_KEPT[config.remat])
    return partial(jax.checkpoint, policy=policy, prevent_cse=not config.scan)(block)
