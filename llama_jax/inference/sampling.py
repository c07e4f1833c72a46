"""From logits to the next token: every row of a batch with settings of its own.

The settings are arrays, so that none of them is compiled in. What is done, and in what order, is
what transformers does: penalties, temperature, top-k, top-p, min-p.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from llama_jax.config.model import STRICT
from llama_jax.parallel.sharding import activation_spec


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sampling:
    """How the next token is drawn. The default takes the most likely one.

    >>> lj.Sampling(temperature=0.8, top_p=0.95).top_k
    0
    """

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


class SamplingArrays(NamedTuple):
    """The settings of each row: float32 [B], `top_k_B` int32 [B]. Split as `activation_spec("B")`.

    `tail_p_B` is 1 - top_p: float32 has 2^-24 between numbers near 1, but any number near 0.
    """

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    tail_p_B: jax.Array | np.ndarray
    min_p_B: jax.Array | np.ndarray
    repetition_B: jax.Array | np.ndarray
    presence_B: jax.Array | np.ndarray
    frequency_B: jax.Array | np.ndarray


class TokenCounts(NamedTuple):
    """The tokens that penalties count, sharded as `activation_spec("BS")`: V is not split."""

    prompt_BV: jax.Array  # bool: tokens of the prompt
    generated_BV: jax.Array  # int32: how often each token was made


def stack_sampling(samplings: Sequence[Sampling]) -> SamplingArrays:
    """Returns the settings of rows as NumPy arrays, for the caller to place."""

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
    """Returns the logits that rows draw from, float32 [B, V], with tokens left out at -inf.

    A greedy row's are penalised and no more. Other rows are shifted, the most likely token to 0.

    Args:
        sampling: settings of the rows.
        counts: may be None where no row has penalties.
        logits_BV: of the next token, of any float type, split in any way.
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
    """Returns a token for each row, int32 [B]. Greedy rows alone cost one argmax.

    Args:
        sampling, counts, logits_BV: as of `process_logits`.
        keys_B: typed random keys. A row's draw depends on its own key, logits and settings alone;
            a greedy row's not on the key.
    """
    logits_BV = _apply_penalties(sampling, counts, logits_BV)
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    drawn_B = sampling.temperature_B > 0
    keys_B = jax.reshard(keys_B, activation_spec("B"))

    def draw() -> jax.Array:
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, _filter_logits(sampling, logits_BV))
        return jnp.where(drawn_B, tokens_B.astype(jnp.int32), likeliest_B)

    return jax.lax.cond(jnp.any(drawn_B), draw, lambda: likeliest_B)


def logprobs_from_logits(
    logits_BV: jax.Array, tokens_B: jax.Array, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the model's own log-probabilities of tokens: before temperature and penalties.

    Args:
        logits_BV: of any float type, split in any way; or of several positions, [B, S, V].
        tokens_B: tokens of the vocabulary; or [B, S].
        top: how many of the most likely tokens to return; static, at most V.

    Returns:
        The tokens' log-probabilities, float32 [B] (nats), and the most likely tokens, best first:
        log-probabilities, float32 [B, top], and tokens, int32 [B, top]; or [B, S] and [B, S, top].
        A token among the most likely has the same number in both.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    is_token_BV = jnp.arange(logits_BV.shape[-1]) == tokens_B[..., None]
    chosen_B = jnp.sum(jnp.where(is_token_BV, logits_BV, 0), axis=-1)
    total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    # The logits stay split but for this sort, which needs all of a position's.
    top_BA, top_tokens_BA = jax.lax.top_k(
        jax.reshard(logits_BV, activation_spec("BSS"[: logits_BV.ndim])), top
    )
    return chosen_B - total_B, top_BA - total_B[..., None], top_tokens_BA


def _apply_penalties(
    sampling: SamplingArrays, counts: TokenCounts | None, logits_BV: jax.Array
) -> jax.Array:
    """Returns float32 logits after penalties, split as `activation_spec("BS")`.

    Repetition: CTRL (arXiv 1909.05858, section 4.1), with the signs of transformers. Presence and
    frequency: OpenAI's API reference, logit - frequency · count - presence · (count > 0).
    """
    logits_BV = jax.reshard(logits_BV, activation_spec("BS")).astype(jnp.float32)
    if counts is None:
        return logits_BV

    def penalise() -> jax.Array:
        repetition_B1 = sampling.repetition_B[:, None]
        was_generated_BV = counts.generated_BV > 0
        less_BV = jnp.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
        left_BV = jnp.where(counts.prompt_BV | was_generated_BV, less_BV, logits_BV)
        left_BV -= sampling.frequency_B[:, None] * counts.generated_BV
        return left_BV - sampling.presence_B[:, None] * was_generated_BV

    any_B = (sampling.repetition_B != 1) | (sampling.presence_B != 0) | (sampling.frequency_B != 0)
    return jax.lax.cond(jnp.any(any_B), penalise, lambda: logits_BV)


def _filter_logits(sampling: SamplingArrays, logits_BV: jax.Array) -> jax.Array:
    """Returns logits over temperature, the best at 0, those that are left out at -inf.

    Tokens that tie with the last one kept stay (transformers leaves some of them out by top-p, as
    its sort happens to put them). Rows of temperature 0 hold nothing of use.
    """
    drawn_B = sampling.temperature_B > 0
    best_B = jnp.max(logits_BV, axis=-1)
    # Before the division, lest it make ties.
    in_top_k_BV = _top_k_mask(jnp.where(drawn_B, sampling.top_k_B, 0), logits_BV, best_B)
    temperature_B = jnp.maximum(sampling.temperature_B, jnp.finfo(jnp.float32).tiny)
    scaled_BV = (logits_BV - best_B[:, None]) / temperature_B[:, None]
    scaled_BV = jnp.where(in_top_k_BV, scaled_BV, -jnp.inf)
    in_top_p_BV = _top_p_mask(jnp.where(drawn_B, sampling.tail_p_B, 0), scaled_BV)
    in_min_p_BV = jnp.exp(scaled_BV) >= sampling.min_p_B[:, None]
    return jnp.where(in_top_p_BV & in_min_p_BV, scaled_BV, -jnp.inf)


def _top_k_mask(k_B: jax.Array, logits_BV: jax.Array, best_B: jax.Array) -> jax.Array:
    """Returns whether a token is among the k most likely; all are where k is 0."""
    V = logits_BV.shape[-1]
    k_B = jnp.where(k_B > 0, k_B, V)

    def enough(least_B: jax.Array) -> jax.Array:
        return jnp.sum(logits_BV >= least_B[:, None], axis=-1) >= k_B

    return jax.lax.cond(
        jnp.any(k_B < V),
        lambda: logits_BV >= _highest_threshold(enough, best_B)[:, None],
        lambda: jnp.ones_like(logits_BV, bool),
    )


def _top_p_mask(tail_p_B: jax.Array, scaled_BV: jax.Array) -> jax.Array:
    """Returns whether a token is among the fewest most likely whose mass reaches 1 - `tail_p_B`.

    arXiv 1904.09751, section 3.1. As in transformers the tail is summed, which loses nothing when
    p is near 1: at most `tail_p_B` of the mass is left out. All tokens are in where that is 0.
    """

    def keeps() -> jax.Array:
        mass_BV = jnp.exp(scaled_BV)
        # Nothing is left out where p is 1, not even tokens of no mass.
        tail_B = jnp.where(tail_p_B > 0, tail_p_B, -1) * jnp.sum(mass_BV, axis=-1)

        def few_below(least_B: jax.Array) -> jax.Array:
            below_BV = scaled_BV < least_B[:, None]
            return jnp.sum(jnp.where(below_BV, mass_BV, 0), axis=-1) <= tail_B

        return scaled_BV >= _highest_threshold(few_below, jnp.zeros_like(tail_B))[:, None]

    return jax.lax.cond(jnp.any(tail_p_B > 0), keeps, lambda: jnp.ones_like(scaled_BV, bool))


def _highest_threshold(holds: Callable[[jax.Array], jax.Array], most_B: jax.Array) -> jax.Array:
    """Returns the highest float32 up to `most_B` of which `holds` is true, -inf where of none.

    `holds` must be true below some number and false above it. All 32 bits are bisected, which reads
    a vocabulary 32 times and still costs a tenth of sorting it.
    """

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = ends
        middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # rounded up, without overflow
        holds_B = holds(_from_ordered_int(middle_B))
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B - 1)

    ends = _to_ordered_int(jnp.full_like(most_B, -jnp.inf)), _to_ordered_int(most_B)
    return _from_ordered_int(jax.lax.fori_loop(0, 32, halve, ends)[0])


def _to_ordered_int(x: jax.Array) -> jax.Array:
    """Returns integers in the order of float32 numbers."""
    return _flip_negative(jax.lax.bitcast_convert_type(x, jnp.int32))


def _from_ordered_int(rank: jax.Array) -> jax.Array:
    """Returns the float32 numbers of these ranks."""
    return jax.lax.bitcast_convert_type(_flip_negative(rank), jnp.float32)


def _flip_negative(bits: jax.Array) -> jax.Array:
    """Turns the order of negative floats' bits, which count away from zero, around; and back."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
