"""Top-p against a float64 reference."""

import jax
import numpy as np
import pytest

from llama_jax.inference.sampling import Sampling, process_logits, stack_sampling
from llama_jax.parallel.mesh import shard_array


@pytest.mark.usefixtures("one_device")
def test_top_p_near_1_includes_the_tokens_of_a_float64_reference():
    tails = [0.3, 9e-5, 1e-5, 3e-7, 5e-8, 2e-8, 1e-9, 1e-12]
    rows = stack_sampling([Sampling(temperature=1.0, top_p=1 - tail) for tail in tails])
    logits = np.random.default_rng(0).normal(0, 7, (len(tails), 500)).astype(np.float32)
    share = np.exp(logits.astype(np.float64))
    tail_mass = np.cumsum(np.sort(share / share.sum(axis=1, keepdims=True)), axis=1)
    tails_B1 = np.array([1 - (1 - tail) for tail in tails])[:, None]  # as float64 gives 1 - p
    # The rounding error of a sum of 500 float32 numbers is below 500 x 2^-24: no tail is that near.
    assert np.abs(tail_mass / tails_B1 - 1).min() > 500 * 2**-24
    sharded = jax.tree.map(lambda column_B: shard_array(column_B, "B"), rows)
    got = np.isfinite(jax.jit(process_logits)(sharded, None, logits)).sum(axis=1)
    assert got.tolist() == (tail_mass > tails_B1).sum(axis=1).tolist()
    assert got[0] < got[-1] < 500
