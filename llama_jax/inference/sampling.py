"""From logits to the next token, with separate settings for each row of a batch.

The settings are arrays, so one compiled program serves all settings. The steps and their order are
those of transformers: penalties, temperature, top-k, top-p, min-p.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from llama_jax.config.model import STRICT
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.sharding import activation_spec


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sampling:
    """Settings for the choice of the next token. The default takes the most likely token.

    >>> lj.Sampling(temperature=0.8, top_p=0.95).top_k
    0
    """

    # Beyond the bounds of temperature and repetition penalty, float32 logits could overflow or
    # underflow.
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
        description="draw from the fewest most likely tokens whose probabilities reach this sum",
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="draw from tokens with at least this share of the largest probability",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=1e-6,
        le=1e6,
        allow_inf_nan=False,
        description="above 1, tokens of the prompt and generated tokens become less likely",
    )
    presence_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="subtracted from the logit of each token that was generated",
    )
    frequency_penalty: float = Field(
        default=0.0,
        ge=-2,
        le=2,
        allow_inf_nan=False,
        description="subtracted from the logit of a token once for each time it was generated",
    )


class SamplingArrays(NamedTuple):
    """The settings of all rows, float32 [B] and `top_k_B` int32 [B], sharded as "B".

    `tail_p_B` is 1 - top_p: float32 numbers near 1 are 2^-24 apart, those near 0 are far closer.
    """

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    tail_p_B: jax.Array | np.ndarray
    min_p_B: jax.Array | np.ndarray
    repetition_B: jax.Array | np.ndarray
    presence_B: jax.Array | np.ndarray
    frequency_B: jax.Array | np.ndarray


class TokenCounts(NamedTuple):
    """The tokens that penalties count, sharded as "BS": the vocabulary is not split."""

    prompt_BV: jax.Array  # bool: tokens of the prompt
    generated_BV: jax.Array  # int32: how often the row generated each token


def stack_sampling(samplings: Sequence[Sampling]) -> SamplingArrays:
    """Returns the settings of all rows as NumPy arrays, which the caller shards."""

    def column(name: str, dtype: type = np.float32) -> np.ndarray:
        return np.array([getattr(sampling, name) for sampling in samplings], dtype)

    return SamplingArrays(
        temperature_B=column("temperature"),
        top_k_B=column("top_k", np.int32),
        tail_p_B=np.array([1 - sampling.top_p for sampling in samplings], np.float32),
        min_p_B=column("min_p"),
        repetition_B=column("repetition_penalty"),
        presence_B=column("presence_penalty"),
        frequency_B=column("frequency_penalty"),
    )


def process_logits(
    sampling: SamplingArrays, counts: TokenCounts | None, logits_BV: jax.Array
) -> jax.Array:
    """Returns the logits that rows draw from, float32 [B, V], with excluded tokens at -inf.

    In greedy rows only the penalties apply. Other rows are shifted so that their maximum is 0.

    Args:
        sampling: settings of the rows.
        counts: token counts; may be None if no row has penalties.
        logits_BV: logits of the next token, any float dtype, any sharding.
    """
    logits_BV = _apply_penalties(sampling, counts, logits_BV)
    drawn_B = sampling.temperature_B > 0
    return jax.lax.cond(
        jnp.any(drawn_B),
        lambda: jnp.where(drawn_B[:, None], _filter_logits(sampling, logits_BV), logits_BV),
        lambda: logits_BV,
    )


def sample(
    sampling: SamplingArrays, counts: TokenCounts | None, logits_BV: jax.Array, keys_B: jax.Array
) -> jax.Array:
    """Returns a token for each row, int32 [B]. A batch of only greedy rows costs one argmax.

    Args:
        sampling, counts, logits_BV: as in `process_logits`.
        keys_B: typed random keys. A row's token depends only on the row's own key, logits and
            settings; in a greedy row it doesn't depend on the key.
    """
    logits_BV = _apply_penalties(sampling, counts, logits_BV)
    likeliest_B = _argmax(logits_BV)
    drawn_B = sampling.temperature_B > 0
    keys_B = jax.reshard(keys_B, activation_spec("B"))

    def draw() -> jax.Array:
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, _filter_logits(sampling, logits_BV))
        return jnp.where(drawn_B, tokens_B.astype(jnp.int32), likeliest_B)

    return jax.lax.cond(jnp.any(drawn_B), draw, lambda: likeliest_B)


def _argmax(logits_BV: jax.Array) -> jax.Array:
    """Returns the first of the likeliest tokens of each row, int32 [B].

    XLA:CPU computes a maximum with vector instructions, but an argmax element by element. So it
    searches the maxima of groups there, and then the first group that contains the maximum.
    """
    if platform() != "cpu":
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def of_row(logits_V: jax.Array) -> jax.Array:
        size = math.gcd(len(logits_V), 256)
        groups_Gn = logits_V.reshape(-1, size)
        group = jnp.argmax(jnp.max(groups_Gn, axis=1))
        return group * size + jnp.argmax(groups_Gn[group])

    return jax.vmap(of_row)(logits_BV).astype(jnp.int32)


def logprobs_from_logits(
    logits_BV: jax.Array, tokens_B: jax.Array, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the model's log-probabilities of tokens, before temperature and penalties.

    Args:
        logits_BV: any float dtype, any sharding; or logits of several positions, [B, S, V].
        tokens_B: tokens of the vocabulary; or [B, S].
        top: the number of most likely tokens to return; static, at most V.

    Returns:
        The tokens' log-probabilities, float32 [B] (nats), and the most likely tokens, best first:
        log-probabilities, float32 [B, top], and tokens, int32 [B, top]; or [B, S] and [B, S, top].
        A token that is also among the most likely has bitwise the same number in both.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    is_token_BV = jnp.arange(logits_BV.shape[-1]) == tokens_B[..., None]
    chosen_B = jnp.sum(jnp.where(is_token_BV, logits_BV, 0), axis=-1)
    total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    # Only this sort needs all logits of a position on one device: elsewhere they stay sharded.
    top_BA, top_tokens_BA = jax.lax.top_k(
        jax.reshard(logits_BV, activation_spec("BSS"[: logits_BV.ndim])), top
    )
    return chosen_B - total_B, top_BA - total_B[..., None], top_tokens_BA


def _apply_penalties(
    sampling: SamplingArrays, counts: TokenCounts | None, logits_BV: jax.Array
) -> jax.Array:
    """Returns float32 logits after penalties, sharded as "BS".

    Repetition: CTRL (arXiv 1909.05858, section 4.1), with the signs of transformers. Presence and
    frequency: OpenAI's API reference, logit - frequency · count - presence · (count > 0).
    """
    logits_BV = jax.reshard(logits_BV, activation_spec("BS")).astype(jnp.float32)
    if counts is None:
        return logits_BV

    def penalize() -> jax.Array:
        repetition_B1 = sampling.repetition_B[:, None]
        was_generated_BV = counts.generated_BV > 0
        repeated_BV = jnp.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
        penalized_BV = jnp.where(counts.prompt_BV | was_generated_BV, repeated_BV, logits_BV)
        penalized_BV -= sampling.frequency_B[:, None] * counts.generated_BV
        return penalized_BV - sampling.presence_B[:, None] * was_generated_BV

    any_B = (sampling.repetition_B != 1) | (sampling.presence_B != 0) | (sampling.frequency_B != 0)
    return jax.lax.cond(jnp.any(any_B), penalize, lambda: logits_BV)


def _filter_logits(sampling: SamplingArrays, logits_BV: jax.Array) -> jax.Array:
    """Returns logits divided by temperature, their maximum shifted to 0, excluded tokens at -inf.

    Tokens that tie with the last included token are included as well (with top-p, transformers
    excludes some of them, by the order of its sort). The results of rows with temperature 0 have no
    meaning.
    """
    drawn_B = sampling.temperature_B > 0
    best_B = jnp.max(logits_BV, axis=-1)
    # Top-k comes before the division, which may round different logits to a tie.
    in_top_k_BV = _top_k_mask(jnp.where(drawn_B, sampling.top_k_B, 0), logits_BV, best_B)
    temperature_B = jnp.maximum(sampling.temperature_B, jnp.finfo(jnp.float32).tiny)
    scaled_BV = (logits_BV - best_B[:, None]) / temperature_B[:, None]
    scaled_BV = jnp.where(in_top_k_BV, scaled_BV, -jnp.inf)
    in_top_p_BV = _top_p_mask(jnp.where(drawn_B, sampling.tail_p_B, 0), scaled_BV)
    in_min_p_BV = jnp.exp(scaled_BV) >= sampling.min_p_B[:, None]
    return jnp.where(in_top_p_BV & in_min_p_BV, scaled_BV, -jnp.inf)


def _top_k_mask(k_B: jax.Array, logits_BV: jax.Array, best_B: jax.Array) -> jax.Array:
    """Returns which tokens are among the k most likely, bool [B, V]; all of them if k is 0."""
    V = logits_BV.shape[-1]
    k_B = jnp.where(k_B > 0, k_B, V)

    def reaches_k(least_B: jax.Array) -> jax.Array:
        return jnp.sum(logits_BV >= least_B[:, None], axis=-1) >= k_B

    return jax.lax.cond(
        jnp.any(k_B < V),
        lambda: logits_BV >= _highest_threshold(reaches_k, best_B)[:, None],
        lambda: jnp.ones_like(logits_BV, bool),
    )


def _top_p_mask(tail_p_B: jax.Array, scaled_BV: jax.Array) -> jax.Array:
    """Returns which tokens are among the fewest most likely whose mass reaches 1 - `tail_p_B`.

    Bool [B, V]. arXiv 1904.09751, section 3.1. As in transformers, the sum is over the excluded
    tail, which loses no precision when p is near 1: the tail has at most `tail_p_B` of the mass.
    If `tail_p_B` is 0, all tokens are included.
    """

    def compute_mask() -> jax.Array:
        mass_BV = jnp.exp(scaled_BV)
        # -1: with p = 1 nothing is excluded, not even tokens whose mass underflows to 0.
        tail_B = jnp.where(tail_p_B > 0, tail_p_B, -1) * jnp.sum(mass_BV, axis=-1)

        def tail_is_small(least_B: jax.Array) -> jax.Array:
            below_BV = scaled_BV < least_B[:, None]
            return jnp.sum(jnp.where(below_BV, mass_BV, 0), axis=-1) <= tail_B

        return scaled_BV >= _highest_threshold(tail_is_small, jnp.zeros_like(tail_B))[:, None]

    return jax.lax.cond(jnp.any(tail_p_B > 0), compute_mask, lambda: jnp.ones_like(scaled_BV, bool))


def _highest_threshold(condition: Callable[[jax.Array], jax.Array], most_B: jax.Array) -> jax.Array:
    """Returns the highest float32 up to `most_B` that meets `condition`, or -inf if none does.

    `condition` must be true below some number and false above it. The bisection covers all 32 bits:
    it reads the vocabulary 32 times and still costs a tenth of sorting it.
    """

    def bisect(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # rounded up, without overflow
        is_met_B = condition(_from_ordered_int(middle_B))
        return jnp.where(is_met_B, middle_B, low_B), jnp.where(is_met_B, high_B, middle_B - 1)

    bounds = _to_ordered_int(jnp.full_like(most_B, -jnp.inf)), _to_ordered_int(most_B)
    return _from_ordered_int(jax.lax.fori_loop(0, 32, bisect, bounds)[0])


def _to_ordered_int(x: jax.Array) -> jax.Array:
    """Returns int32 numbers that compare like the float32 numbers `x`."""
    return _flip_negative(jax.lax.bitcast_convert_type(x, jnp.int32))


def _from_ordered_int(ordered: jax.Array) -> jax.Array:
    """Inverts `_to_ordered_int`."""
    return jax.lax.bitcast_convert_type(_flip_negative(ordered), jnp.float32)


def _flip_negative(bits: jax.Array) -> jax.Array:
    """Makes the bits of negative floats, which count away from 0, ascend; its own inverse."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
