"""AdamW with the paper's schedule (arXiv 2302.13971, section 2.3)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.config.run import OptimizerConfig
from llama_jax.model.weights import Llama


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule: step (0 is the first) -> learning rate.

    A linear warm-up reaches the peak in step `warmup_steps`, then a cosine reaches
    `final_lr_fraction` of the peak in the last of `steps`. No step has a rate of 0.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.peak_lr * config.final_lr_fraction,
    )
    return lambda step: schedule(step + 1)


def adamw(config: OptimizerConfig) -> Any:
    """Returns an optax transformation: AdamW without clipping and learning rate.

    The training step applies both: clipping needs the norm that the step reports, and the rate its
    number.
    """
    return optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def decay_mask(model: Llama) -> Llama:
    """Returns for each weight whether it decays: matrices do, scales of the norms don't."""
    return jax.tree.map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), model)
