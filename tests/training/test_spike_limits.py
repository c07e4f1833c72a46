"""The limits of the loss and the gradient norm are robust estimates from the steps before."""

import json
import math
import statistics

import numpy as np
import pytest

from llama_jax.training.spike_limits import LAG, MIN_STEPS, WINDOW, SpikeLimits

RNG = np.random.default_rng(0)
NUMBERS = [(2 + RNG.normal() / 50, 0.5 + RNG.exponential() / 10) for _ in range(300)]


def limits_of(numbers, threshold=7.0):
    spike_limits = SpikeLimits(threshold)
    for step, (loss, norm) in enumerate(numbers, 1):
        spike_limits.add(step, loss, norm)
    return spike_limits


def limit_of(values, threshold=7.0):
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    return median + threshold * max(1.4826 * mad, 0.01 * median)


def test_the_limits_are_those_of_the_last_128_steps_that_the_host_can_know():
    spike_limits = limits_of(NUMBERS)
    known = NUMBERS[300 - LAG + 1 - WINDOW : 300 - LAG + 1]  # until step 299
    expected = [limit_of(values) for values in zip(*known, strict=True)]
    np.testing.assert_allclose(spike_limits.limits(301), expected, rtol=1e-7)
    # Whether the step before is known already makes no difference.
    assert spike_limits.limits(301).tolist() == limits_of(NUMBERS[:299]).limits(301).tolist()


def test_the_limits_of_a_resumed_run_are_the_same():
    spike_limits = limits_of(NUMBERS[:200])
    resumed = SpikeLimits(7.0, json.loads(json.dumps(spike_limits.recent)))
    for step, (loss, norm) in enumerate(NUMBERS[200:], 201):
        assert resumed.limits(step).tolist() == spike_limits.limits(step).tolist()
        for one in (spike_limits, resumed):
            one.add(step, loss, norm)


def test_outliers_hardly_move_the_limits():
    spoiled = [*NUMBERS[:280], *[(100.0, 1e6)] * 10, *NUMBERS[290:]]
    np.testing.assert_allclose(
        limits_of(spoiled).limits(301), limits_of(NUMBERS).limits(301), rtol=0.1
    )


@pytest.mark.parametrize(
    ("numbers", "threshold", "first", "expected"),
    [
        (NUMBERS[:MIN_STEPS], 7.0, 1, math.inf),  # too few: the last one is not known
        (NUMBERS, 7.0, 260, math.inf),  # another phase of the data began in step 260
        ([*NUMBERS[: MIN_STEPS - 1], *[(math.nan, 1.0)] * 50], 7.0, 1, math.inf),
        (NUMBERS, 0.0, 1, math.nan),
    ],
)
def test_there_are_no_limits(numbers, threshold, first, expected):
    limits = limits_of(numbers, threshold).limits(len(numbers) + 1, first)
    np.testing.assert_array_equal(limits, np.float32([expected] * 2))


def test_a_constant_loss_has_limits_above_it():
    assert limits_of([(2.0, 1.0)] * 100).limits(101).tolist() == pytest.approx([2.14, 1.07])
