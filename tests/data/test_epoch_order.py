"""The permutation of an epoch's windows: bijective for any number of windows, and random.

The limits of the statistics are 6 standard deviations, at fixed seeds.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.epoch_order import find_windows, permute

MANY = 2**40


def epoch(n, seed=0, number=0):
    return permute(np.arange(n), n, seed, np.full(n, number))


def test_an_epoch_has_each_window_once():
    for n in [*range(1, 300), 1023, 1024, 1025, 4096, 65_537, 10**5]:
        np.testing.assert_array_equal(np.sort(epoch(n, seed=n, number=3 * n)), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, MANY), st.integers(0, 2**70), st.integers(0, 2**20), st.data(),
)  # fmt: skip
def test_different_windows_of_any_epoch_stay_different(n, seed, number, data):
    start = data.draw(st.integers(0, n - 1))
    indices = np.arange(start, min(n, start + 1000))
    images = permute(indices, n, seed, np.full(len(indices), number))
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(indices)


def test_a_window_depends_on_the_seed_the_epoch_and_the_index_alone():
    n, numbers = 1000, np.arange(500, 2500)
    together = find_windows(numbers, n, seed=5)
    order = np.random.default_rng(0).permutation(len(numbers))
    np.testing.assert_array_equal(find_windows(numbers[order], n, 5), together[order])
    alone = [find_windows(numbers[i : i + 1], n, 5)[0] for i in range(0, 2000, 99)]
    assert alone == together[::99].tolist()
    np.testing.assert_array_equal(together[500:1500], epoch(n, seed=5, number=1))


def chi_square(counts, expected):
    """Returns the chi-square of counts, in standard deviations from its mean."""
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def reference(n, count):
    """`count` random permutations of [0, n)."""
    return np.random.default_rng(0).permuted(np.tile(np.arange(n), (count, 1)), axis=1)


def ours(n, count):
    """The orders of the first `count` epochs."""
    return find_windows(np.arange(n * count), n, seed=1).reshape(count, n)


@pytest.mark.parametrize("permutations", [ours, reference])
def test_all_orders_of_four_windows_are_equally_frequent(permutations):
    drawn = permutations(4, 24_000)
    _, counts = np.unique(drawn @ [64, 16, 4, 1], return_counts=True)
    assert len(counts) == 24
    assert abs(chi_square(counts, 1000)) < 6


@pytest.mark.parametrize("n", [10, 31, 100])
@pytest.mark.parametrize("permutations", [ours, reference])
def test_all_pairs_of_images_are_equally_frequent(permutations, n):
    epochs = 300_000 // n
    drawn = permutations(n, epochs)
    for distance in (1, n // 2):
        pairs = np.zeros((n, n))
        np.add.at(pairs, (drawn, np.roll(drawn, distance, axis=1)), 1)
        counts = pairs[~np.eye(n, dtype=bool)]
        assert abs(chi_square(counts, drawn.size / counts.size)) < 6


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1] * math.sqrt(len(x))


def first_windows(n, seed, number):
    return permute(np.arange(10_000), n, seed, np.full(10_000, number))


def random_windows(n, seed, number):
    return np.random.default_rng([seed, number]).permutation(n)[:10_000]


CASES = [(random_windows, 20_000), (random_windows, 2**20)]
CASES += [(first_windows, n) for n in (20_000, 2**20, 10**9 + 7, MANY)]


@pytest.mark.parametrize(("draw", "n"), CASES)
def test_neighbours_epochs_and_seeds_are_uncorrelated_and_uniform(draw, n):
    parts = [draw(n, *key) for key in [(0, 0), (0, 1), (1, 0), (0, 2**30)]]
    for windows in parts:
        for distance in (1, 2, 3, 64):
            assert abs(correlation(windows[:-distance], windows[distance:])) < 6
        # Half of 20,000 windows are drawn: their counts vary less than those of a sample.
        assert chi_square(np.bincount(windows * 100 // n, minlength=100), 100) < 6
        assert chi_square(np.bincount(windows % 16, minlength=16), 625) < 6
    for x, y in itertools.combinations(parts, 2):
        assert abs(correlation(x, y)) < 6


def test_neighbours_are_rarely_read_one_after_another():
    n, epochs = 1000, 200
    drawn = ours(n, epochs)
    # (n - 1) / n is the expected number of each of both in a random permutation.
    for step in (1, -1):
        assert np.mean((np.diff(drawn) == step).sum(1)) == pytest.approx(1, abs=6 / epochs**0.5)
    # Fixed points and windows at the same place in the next epoch: also one is expected.
    assert np.mean((drawn == np.arange(n)).sum(1)) == pytest.approx(1, abs=6 / epochs**0.5)
    same = (drawn[1:] == drawn[:-1]).sum(1)
    assert np.mean(same) == pytest.approx(1, abs=6 / epochs**0.5)
