"""Decodes a batch in which constraints limit the tokens of some rows."""

from collections.abc import Sequence

import numpy as np

from llama_jax.inference.engine.device_batch import DeviceBatch
from llama_jax.inference.engine.rows import Row
from llama_jax.inference.logit_limits import mask_to_text


def decode(batch: DeviceBatch, rows: Sequence[Row], with_logprobs: bool) -> tuple[np.ndarray, ...]:
    """Decodes one token in each row that is ready, because each token changes the masks.

    A small program chooses the tokens first. While the devices then compute the logits after them,
    the constraints compute their next masks.

    Returns:
        The arrays of `GeneratedTokens`.
    """
    constraints = [row.constraint for row in rows]
    masks = ["" if limit is None else mask_to_text(limit.mask_W) for limit in constraints]
    tokens_B, generated = batch.decode_constrained(masks, with_logprobs)
    for constraint, token in zip(constraints, tokens_B.tolist(), strict=True):
        if constraint is not None:
            constraint.advance(token)
    return tuple(np.asarray(x_Bn_) for x_Bn_ in generated)
