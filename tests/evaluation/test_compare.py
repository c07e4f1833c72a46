"""Two evaluations compared item by item."""

import math

import numpy as np
import pytest
from conftest import run

from llama_jax.errors import InputError
from llama_jax.evaluation.compare import compare
from llama_jax.evaluation.evaluate import Evaluation

RNG = np.random.default_rng(0)


def evaluation(prompts="p", **tasks):
    """Returns an evaluation with the values of the metric acc of each task."""
    items = {
        name: [{"id": i, "metrics": {"acc": value}} for i, value in enumerate(values)]
        for name, values in tasks.items()
    }
    return Evaluation({"tasks": {name: {"prompts": prompts} for name in tasks}}, items)


def test_the_difference_has_the_paired_standard_error_and_the_items_that_flip():
    before = RNG.integers(0, 2, 400).astype(float)
    after = np.where(RNG.random(400) < 0.1, 1 - before, before)
    [found] = compare(evaluation(a=before.tolist()), evaluation(a=after.tolist()))
    n_up, n_down = int(((after - before) > 0).sum()), int(((after - before) < 0).sum())
    # Var(d) of paired 0/1 items, with n - 1: McNemar's counts.
    variance = (n_up + n_down - (n_up - n_down) ** 2 / 400) / 399
    assert found.stderr == pytest.approx(math.sqrt(variance / 400), rel=1e-12)
    assert found.after - found.before == pytest.approx((n_up - n_down) / 400, rel=1e-12)
    assert (found.higher, found.lower) == (
        np.flatnonzero(after > before).tolist(),
        np.flatnonzero(after < before).tolist(),
    )


@pytest.mark.parametrize(
    ("flips", "significant"),
    # 20 items of 400 change upwards, and so many downwards: z = (20 - k) / sqrt(20 + k).
    [(8, True), (9, True), (10, False), (20, False)],
)
def test_significance_agrees_with_mcnemars_statistic(flips, significant):
    before = [0.0] * 20 + [1.0] * 380
    after = [1.0] * 20 + [0.0] * flips + [1.0] * (380 - flips)
    [found] = compare(evaluation(a=before), evaluation(a=after))
    assert found.is_significant is significant


def test_a_task_with_other_prompts_is_refused_by_name():
    one, other = evaluation(a=[0.0], b=[1.0]), evaluation(a=[0.0], b=[1.0])
    other.results["tasks"]["b"]["prompts"] = "other"
    with pytest.raises(InputError, match="the prompts of b differ between the two results"):
        list(compare(one, other))
    with pytest.raises(InputError, match="no task in common: a, and c"):
        list(compare(evaluation(a=[0.0]), evaluation(c=[0.0])))


def test_a_folder_without_results_is_refused(capsys, tmp_path):
    code, _, err = run(capsys, "eval", "--compare", tmp_path, tmp_path)
    assert (code, "has no results of a finished evaluation" in err) == (2, True)
