"""Greedy rows against NumPy's argmax."""

import jax
import numpy as np
import pytest

from llama_jax.inference.sampling import Sampling, sample, stack_sampling
from llama_jax.parallel.mesh import shard_array


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("V", [5, 512, 768, 1000])
def test_a_greedy_row_takes_the_first_of_the_likeliest_tokens(V):
    logits = np.random.default_rng(0).integers(-9, 9, (4, V)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, V // 2] = np.nan
    logits[3, -1] = 99
    rows = jax.tree.map(lambda x_B: shard_array(x_B, "B"), stack_sampling([Sampling()] * 4))
    keys = shard_array(jax.random.split(jax.random.key(0), 4), "B")
    tokens = jax.jit(sample)(rows, None, shard_array(logits, "BS"), keys)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
