"""From logits to the next token."""

import jax
import jax.numpy as jnp
from pydantic import Field
from pydantic.dataclasses import dataclass

from llama_jax.family import STRICT
from llama_jax.sharding import act


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sampling:
    """How the next token is drawn. The default takes the most likely one."""

    # Temperature and repetition penalty end where float32 logits could overflow or vanish.
    temperature: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="divides the logits; 0 takes the most likely token",
    )
    top_k: int = Field(
        default=0,
        ge=0,
        le=2**31 - 1,
        description="draw from the k most likely tokens; 0 for all",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="draw from the most likely tokens that make up this mass",
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="draw from tokens at least this times as likely as the most likely one",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=1e-6,
        le=1e6,
        allow_inf_nan=False,
        description="above 1, tokens of the prompt and of what was made become less likely",
    )
    presence_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="taken from the logit of a token that was made",
    )
    frequency_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="taken from the logit of a token each time that it was made",
    )


def sample(sampling: Sampling, logits_BV: jax.Array, key: jax.Array) -> jax.Array:
    """Returns a token for each row, int32 [B]. Tokens that tie with the last kept one stay in."""
    logits_BV = jax.reshard(logits_BV, act("BS"))  # sorting needs the whole vocabulary
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = keep_likely(sampling, logits_BV / sampling.temperature)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def keep_likely(sampling: Sampling, logits_BV: jax.Array) -> jax.Array:
    """Returns the logits with those that top-k and top-p leave out at -inf.

    top-p keeps the fewest most likely tokens whose mass reaches it (arXiv 1904.09751, section 3.1).
    """
    V = logits_BV.shape[-1]
    if 0 < sampling.top_k < V:
        kth = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        falling = jnp.sort(logits_BV, axis=-1, descending=True)
        mass = jax.nn.softmax(falling, axis=-1)
        mass_before = jnp.cumsum(mass, axis=-1) - mass
        kept = jnp.where(mass_before < sampling.top_p, falling, jnp.inf)
        logits_BV = jnp.where(logits_BV < kept.min(axis=-1, keepdims=True), -jnp.inf, logits_BV)
    return logits_BV
