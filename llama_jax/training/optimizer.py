"""AdamW with LLaMA's schedule, cosine (arXiv 2302.13971, section 2.3), or with WSD."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.config.run import OptimizerConfig
from llama_jax.model.lora import Trained


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule: step (0 is the first) -> learning rate.

    A linear warm-up reaches the peak in step `warmup_steps`; the first step's rate is above 0. Then
    a cosine, or the decay in the last `decay_steps` of WSD, reaches `final_lr_fraction` of the peak
    in the last of `steps`.
    """
    if config.schedule == "wsd":
        return partial(_wsd, config, steps)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.peak_lr * config.final_lr_fraction,
    )
    return lambda step: schedule(step + 1)


def _wsd(config: OptimizerConfig, steps: int, step: Any) -> jax.Array:
    """Returns the learning rate of `step` (0 is the first) in a WSD run of `steps` steps.

    Warm-up, stable, decay: MiniCPM, arXiv 2404.06395, section 4. With x, the completed fraction of
    the decay, the decay is 1 - (1 - final_lr_fraction) √x: the shape '1-sqrt' of Hägele et al.,
    arXiv 2405.18392, section 3. Their comparison finds it better than a linear decay.

    The operations are the same for all `steps` and `decay_steps`, only constants differ, and before
    the decay the rate is multiplied by exactly 1. So runs of different lengths are equal bit for
    bit until one of them decays.
    """
    number = jnp.asarray(step) + 1
    warmup = jnp.minimum(number / max(config.warmup_steps, 1), 1.0)
    x = (number - (steps - config.decay_steps)) / max(config.decay_steps, 1)
    depth = 1 - config.final_lr_fraction if config.decay_steps else 0.0
    return config.peak_lr * warmup * (1 - depth * jnp.sqrt(jnp.clip(x, 0.0, 1.0)))


def clip_scale(config: OptimizerConfig, norm: jax.Array) -> jax.Array:
    """Returns the factor that clips a gradient of this global norm to `clip_norm`."""
    return jnp.minimum(1.0, config.clip_norm / norm)


def adamw(config: OptimizerConfig) -> Any:
    """Returns an optax transformation: AdamW without clipping and learning rate.

    The training step applies both: `clip_scale` needs the norm that the step reports, and
    `learning_rate` its number.
    """
    return optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def decay_mask(trained: Trained) -> Trained:
    """Returns for each weight whether it decays: matrices do, scales of the norms don't."""
    return jax.tree.map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), trained)
