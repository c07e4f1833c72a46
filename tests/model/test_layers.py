import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.layers import rms_norm, swiglu

RNG = np.random.default_rng(0)
SHAPE = (2, 8, 64)
X, Y, DY = (jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32) for _ in range(3))
SCALE = jnp.asarray(1 + 0.1 * RNG.standard_normal(SHAPE[-1]), jnp.float32)


def derived_norm(x, scale):
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return (unit * scale).astype(x.dtype)


def derived_swiglu(gate, up):
    return gate * jax.nn.sigmoid(gate) * up


def norm(x, scale):
    return rms_norm(x, scale, 1e-5)


PAIRS = pytest.mark.parametrize(
    ("ours", "derived", "operands"),
    [(norm, derived_norm, (X, SCALE)), (swiglu, derived_swiglu, (X, Y))],
)


@PAIRS
def test_values_and_gradients_equal_those_that_jax_derives(ours, derived, operands):
    (value, vjp), (expected, expected_vjp) = (jax.vjp(f, *operands) for f in (ours, derived))
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    for gradient, expected_gradient in zip(vjp(DY), expected_vjp(DY), strict=True):
        # Sums of up to 64 terms of size 1, each rounded: 64 · 2^-24.
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=64 * 2**-24)


@PAIRS
def test_bfloat16_gradients_are_rounded_once(ours, derived, operands):
    first, second = operands[0].astype(jnp.bfloat16), operands[1]
    second = second.astype(jnp.bfloat16) if second.shape == SHAPE else second
    _, vjp = jax.vjp(ours, first, second)
    _, exact_vjp = jax.vjp(derived, first.astype(jnp.float32), second.astype(jnp.float32))
    dy = DY.astype(jnp.bfloat16)
    for gradient, exact in zip(vjp(dy), exact_vjp(dy.astype(jnp.float32)), strict=True):
        np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "operands", "other_bytes"),
    [(norm, (X, SCALE), 4 * 64 + 4 * 2 * 8), (swiglu, (X, Y), 2 * X.size)],
)
def test_the_residuals_are_little_more_than_the_operands(ours, operands, other_bytes):
    """In addition to its operands, RMSNorm saves one float32 a token and SwiGLU saves nothing.

    The bytes: x in bfloat16, and `other_bytes` for the scale and the saved floats, or for `up`.
    """
    halves = [x.astype(jnp.bfloat16) if x.shape == SHAPE else x for x in operands]
    _, vjp = jax.vjp(ours, *halves)
    assert sum(x.nbytes for x in jax.tree.leaves(vjp)) == 2 * X.size + other_bytes
