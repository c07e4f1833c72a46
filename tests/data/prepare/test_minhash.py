"""Sets of word sequences, and the probability that signatures find a similar pair."""

import numpy as np
import pytest

from llama_jax.data.epoch_order import splitmix64
from llama_jax.data.prepare.minhash import (
    BANDS,
    ROWS,
    hash_bands,
    hash_shingles,
    jaccard,
    overlap,
)


def count_shared(first, second, n_words=2):
    a, b = hash_shingles(first, n_words), hash_shingles(second, n_words)
    return len(a), len(b), len(np.intersect1d(a, b))


@pytest.mark.parametrize(
    ("first", "second", "sizes"),
    [
        ("a b c d", "A, b - C\n d!", (3, 3, 3)),
        ("a b c d", "a b c e", (3, 3, 2)),
        ("a b c d", "d c b a", (3, 3, 0)),
        ("a b a b a b", "a b a", (2, 2, 2)),
        ("ж é", "Ж É", (1, 1, 1)),
        ("a", "a", (1, 1, 1)),  # fewer than two words
        ("", "… !", (0, 0, 0)),
    ],
)
def test_a_set_contains_the_sequences_of_consecutive_words(first, second, sizes):
    assert count_shared(first, second) == sizes


def test_hashes_are_the_same_on_all_machines():
    assert hash_shingles("to be or not to be", 3).tolist() == [
        966028526612161957,
        13787721277666920887,
        15553950206308899183,
        17034895072578079192,
    ]


def test_mixing_changes_half_of_the_bits():
    x = np.arange(2000, dtype=np.uint64)
    for bit in (0, 31, 63):
        changed = np.bitwise_count(splitmix64(x) ^ splitmix64(x ^ np.uint64(1 << bit)))
        assert abs(changed.mean() - 32) < 4 * 4 / 2000**0.5  # 4 is the standard deviation


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8])
def test_pairs_share_a_band_with_the_probability_of_their_similarity(similarity):
    n, size = 1000, 300
    rng = np.random.default_rng(0)
    shared = round(2 * size * similarity / (1 + similarity))
    hashes = rng.integers(0, 2**64, (n, 2 * size - shared), dtype=np.uint64)
    first = hash_bands([np.sort(row[:size]) for row in hashes])
    second = hash_bands([np.sort(row[size - shared :]) for row in hashes])
    assert jaccard(shared, size, size) == pytest.approx(similarity, abs=2e-3)
    expected = 1 - (1 - similarity**ROWS) ** BANDS
    found = (first == second).any(1).mean()
    assert abs(found - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 0.005


def test_an_empty_set_has_bands_too():
    assert hash_bands([np.empty(0, np.uint64)]).shape == (1, BANDS)
    assert hash_bands([]).shape == (0, BANDS)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((50, 100, 100), (1 / 3, 0.5)), ((50, 50, 100), (0.5, 0.5)), ((0, 0, 0), (0, 0))],
)
def test_similarities_follow_from_sizes(sizes, expected):
    assert (jaccard(*sizes), overlap(*sizes)) == pytest.approx(expected)
