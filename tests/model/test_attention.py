import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.attention import attention

pytestmark = pytest.mark.usefixtures("one_device")


def reference(q, k, v, segments):
    """Attention in float64, a query at a time."""
    B, T, N, H = q.shape
    G = N // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            for n in range(N):
                scores = k[b, seen, n // G] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ v[b, seen, n // G] / weights.sum()
    return out


def random(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("K", [1, 2, 6])
@pytest.mark.parametrize("T", [13, 100])
def test_equals_a_plain_reference_in_float64(K, T):
    B, N, H = 2, 6, 8
    q, k, v = random((B, T, N, H), 0), random((B, T, K, H), 1), random((B, T, K, H), 2)
    segments = np.sort(np.random.default_rng(3).integers(1, 4, (B, T)), axis=1).astype(np.int32)
    out = jax.jit(attention)(q, k, v, segments, segments)
    # Sums of at most 100 products of float32 numbers of size 1: 100 · 6e-8.
    np.testing.assert_allclose(
        out, reference(*(np.float64(x) for x in (q, k, v)), segments), atol=6e-6
    )


def test_nothing_crosses_a_segment_in_values_or_gradients():
    B, T, N, H = 1, 12, 2, 4
    q, k, v = (random((B, T, N, H), i) for i in range(3))
    segments = np.array([[1] * 5 + [2] * 7], np.int32)

    def second_document(q, k, v):
        return jnp.sum(attention(q, k, v, jnp.asarray(segments), jnp.asarray(segments))[:, 5:] ** 2)

    value_and_grads = jax.jit(jax.value_and_grad(second_document, argnums=(0, 1, 2)))
    value, grads = value_and_grads(q, k, v)
    for grad in grads:
        assert np.all(np.asarray(grad)[:, :5] == 0)
        assert np.all(np.abs(np.asarray(grad)[:, 6:]).sum((0, 2, 3)) > 0)
    for x in (q, k, v):
        x[:, :5] = 1e3
    assert value_and_grads(q, k, v)[0] == value


def test_the_future_is_not_seen():
    q, k, v = (random((1, 9, 2, 4), i) for i in range(3))
    ones = jnp.ones((1, 9), jnp.int32)

    def early(q, k, v):
        return jnp.sum(attention(q, k, v, ones, ones)[:, :4] ** 2)

    for grad in jax.jit(jax.grad(early, argnums=(1, 2)))(q, k, v):
        assert np.all(np.asarray(grad)[:, 4:] == 0)


def test_an_offset_places_queries_at_later_slots():
    q, k, v = (random((1, 10, 4, 8), i) for i in range(3))
    ones = np.ones((1, 10), np.int32)
    whole = jax.jit(attention)(q, k, v, ones, ones)
    part = jax.jit(attention)(q[:, 6:8], k, v, ones[:, 6:8], ones, 6)
    np.testing.assert_allclose(part, whole[:, 6:8], atol=1e-6)
