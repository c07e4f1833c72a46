"""Several drawn answers to each item: pass@k of programs, majority votes (maj1@k) of the rest.

LLaMA, tables 7 and 8. pass@k is the unbiased estimate of Chen et al. (2021), section 2.1; maj1@k
judges the answer that most of the first k draws give (Lewkowycz et al. 2022, section 3.2).
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llama_jax.errors import InputError

# The paper's: 100 for HumanEval and GSM8K, 80 for MBPP, 256 for MATH.
_K = (1, 10, 80, 100, 256)
TEMPERATURE = 0.8  # of the paper, for k above 1


def pass_at(k: int, n: int, n_right: int) -> float:
    """Returns the probability that at least one of `k` programs is right.

    They are drawn from `n` programs without replacement.

    Args:
        k: at most `n`.
        n: number of programs.
        n_right: how many of them pass their tests.
    """
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


def majority(answers: Sequence[str]) -> str:
    """Returns the most frequent answer; of equally frequent ones, that which was drawn first."""
    return Counter(answers).most_common(1)[0][0]


def draw_answers(name: str, task: Any, n: int, temperature: float) -> list[str]:
    """Makes an lm-eval task draw `n` answers to each item; returns the names of its metrics.

    Args:
        name: of the task.
        task: a task whose answers are generated, with the metric pass@1 or exact_match.
        n: number of draws.
        temperature: of the draws.

    Raises:
        InputError: the task has no such answers.
    """
    metric = next((m for m in ("pass@1", "exact_match") if m in task.aggregation()), None)
    if task.OUTPUT_TYPE != "generate_until" or metric is None:
        raise InputError(
            f"--samples: the answers to task {name} are not drawn: choose tasks with programs or"
            " final answers, such as humaneval, mbpp, gsm8k and minerva_math"
        )
    mean, judge = task.aggregation()[metric], task.process_results
    key = _math_answer if name.startswith("minerva_math") else str
    ks = sorted({k for k in _K if k < n} | {n})

    def process(doc: Any, results: list[list[str]]) -> dict[str, float]:
        (answers,) = results
        if metric == "pass@1":
            n_right = sum(judge(doc, [answer])[metric] == 1 for answer in answers)
            return {f"pass@{k}": pass_at(k, n, n_right) for k in ks}
        keys = [key(answer) for answer in answers]
        chosen = {k: keys.index(majority(keys[:k])) for k in ks}
        judged = {i: judge(doc, [answers[i]])[metric] for i in {*chosen.values()}}
        return {f"maj1@{k}": judged[i] for k, i in chosen.items()}

    names = [f"{'pass' if metric == 'pass@1' else 'maj1'}@{k}" for k in ks]
    for metric_name in names:
        task.aggregation()[metric_name] = mean
        task.higher_is_better()[metric_name] = True
    task.process_results = process
    for filters in task._filters:
        filters.filters[-1] = _KeepAll  # instead of the first draw
    task.set_config("repeats", n)
    task.set_config("generation_kwargs", {"do_sample": True, "temperature": temperature}, True)
    return names


def aggregate_draws(group: Any, names: Sequence[str]) -> None:
    """Makes an lm-eval group report the metrics `names` of its tasks as it does its own."""
    (own,) = group.aggregate_metric_list
    group.aggregate_metric_list = [type(own)(**{**vars(own), "metric": name}) for name in names]


class _KeepAll:
    """A filter of lm-eval that passes on all draws."""

    def apply(self, resps: Any, docs: Any) -> list[Any]:
        return [list(answers) for answers in resps]


def _math_answer(answer: str) -> str:
    """Returns the normalized final answer of a solution, as lm-eval compares it."""
    from lm_eval.tasks.minerva_math import utils

    return utils.normalize_final_answer(utils.get_unnormalized_answer(answer))
