import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.inference.sampling import Sampling, keep_likely, sample

pytestmark = pytest.mark.usefixtures("one_device")
LOGITS = jnp.log(jnp.array([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.3, 0.4]]))


def kept(logits=LOGITS, **settings):
    return np.isfinite(keep_likely(Sampling(**settings), logits)).tolist()


def test_greedy_takes_the_most_likely():
    assert sample(Sampling(), LOGITS, jax.random.key(0)).tolist() == [0, 4]


def test_top_k_keeps_k():
    assert kept(top_k=2) == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert kept(top_k=99) == kept(top_k=0) == [[1] * 5] * 2


@pytest.mark.parametrize(("p", "count"), [(0.3, 1), (0.41, 2), (0.69, 2), (0.71, 3), (1.0, 5)])
def test_top_p_keeps_the_fewest_that_reach_the_mass(p, count):
    assert kept(top_p=p)[0] == [1] * count + [0] * (5 - count)


def test_top_p_counts_the_mass_that_top_k_left():
    # Of two tokens the first has 4/7 of the mass.
    assert kept(top_k=2, top_p=0.56)[0] == [1, 0, 0, 0, 0]
    assert kept(top_k=2, top_p=0.58)[0] == [1, 1, 0, 0, 0]


def test_temperature_comes_before_top_p():
    # At temperature 1/2 the masses are squared: 0.4² of 0.285 is 56 %, so p = 0.5 keeps one.
    cold = Sampling(temperature=0.5, top_p=0.5)
    draws = sample(cold, jnp.repeat(LOGITS[:1], 100, axis=0), jax.random.key(0))
    assert set(draws.tolist()) == {0}
    assert kept(top_p=0.5)[0] == [1, 1, 0, 0, 0]


def test_draws_follow_the_distribution():
    n = 20_000
    logits = jnp.repeat(LOGITS[:1], n, axis=0)
    drawn = sample(Sampling(temperature=2.0), logits, jax.random.key(0))
    share = np.bincount(drawn, minlength=5) / n
    expected = np.sqrt([0.4, 0.3, 0.15, 0.1, 0.05])
    expected /= expected.sum()
    # Five standard deviations of a binomial share.
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / n))
