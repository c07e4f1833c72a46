import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.layers import rms_norm, swiglu

RNG = np.random.default_rng(0)
SHAPE = (2, 8, 64)
X, Y, DY = (jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32) for _ in range(3))
SCALE = jnp.asarray(1 + 0.1 * RNG.standard_normal(SHAPE[-1]), jnp.float32)


def plain_norm(x, scale):
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return (unit * scale).astype(x.dtype)


def plain_gate(gate, up):
    return gate * jax.nn.sigmoid(gate) * up


def norm(x, scale):
    return rms_norm(x, scale, 1e-5)


PAIRS = pytest.mark.parametrize(
    ("ours", "plain", "operands"),
    [(norm, plain_norm, (X, SCALE)), (swiglu, plain_gate, (X, Y))],
)


@PAIRS
def test_values_and_gradients_are_those_that_jax_derives(ours, plain, operands):
    (made, pull), (expected, expected_pull) = (jax.vjp(f, *operands) for f in (ours, plain))
    np.testing.assert_allclose(made, expected, rtol=1e-6, atol=1e-7)
    for found, derived in zip(pull(DY), expected_pull(DY), strict=True):
        # Sums of up to 64 terms of size 1, each rounded: 64 · 2^-24.
        np.testing.assert_allclose(found, derived, rtol=1e-5, atol=64 * 2**-24)


@PAIRS
def test_gradients_of_bfloat16_are_rounded_once(ours, plain, operands):
    first, second = operands[0].astype(jnp.bfloat16), operands[1]
    second = second.astype(jnp.bfloat16) if second.shape == SHAPE else second
    _, pull = jax.vjp(ours, first, second)
    wide = (first.astype(jnp.float32), second.astype(jnp.float32))
    _, exact = jax.vjp(plain, *wide)
    dy = DY.astype(jnp.bfloat16)
    for found, derived in zip(pull(dy), exact(dy.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), derived, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "operands", "beside"),
    [(norm, (X, SCALE), 4 * 64 + 4 * 2 * 8), (swiglu, (X, Y), 2 * X.size)],
)
def test_little_more_is_kept_than_the_operands(ours, operands, beside):
    """The norm keeps one number a token, the gate nothing."""
    halves = [x.astype(jnp.bfloat16) if x.shape == SHAPE else x for x in operands]
    _, pull = jax.vjp(ours, *halves)
    assert sum(x.nbytes for x in jax.tree.leaves(pull)) == 2 * X.size + beside
