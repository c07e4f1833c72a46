"""Compares two evaluations item by item."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from llama_jax.errors import InputError
from llama_jax.evaluation.evaluate import Evaluation

_SIGNIFICANT = 1.96  # standard errors: two-sided, at a level of 5 %


class Difference(NamedTuple):
    """The difference of a metric of a task between two evaluations, A and B.

    Attributes:
        task, metric: their names.
        before, after: the means of A and of B over all items.
        stderr: the standard error of their difference, from the items' own differences: it is
            smaller than that of two independent samples, because the items are the same.
        higher, lower: the ids of the items whose value is higher, or lower, in B.
    """

    task: str
    metric: str
    before: float
    after: float
    stderr: float
    higher: list[int]
    lower: list[int]

    @property
    def is_significant(self) -> bool:
        """Whether the difference is beyond 1.96 standard errors."""
        return abs(self.after - self.before) > _SIGNIFICANT * self.stderr

    def __str__(self) -> str:
        change = self.after - self.before
        verdict = "significant" if self.is_significant else "not significant"
        return (
            f"{self.task} {self.metric}: {self.before:.4f} → {self.after:.4f}, {change:+.4f} ±"
            f" {self.stderr:.4f} ({verdict}); {len(self.higher)} items higher"
            f"{_list(self.higher)}, {len(self.lower)} lower{_list(self.lower)}"
        )


def compare(a: Evaluation, b: Evaluation) -> Iterator[Difference]:
    """Yields the difference of each metric that both evaluations have for each item.

    Raises:
        InputError: they have no task in common, or a task has other prompts in B than in A.
    """
    tasks = [name for name in a.results["tasks"] if name in b.results["tasks"]]
    if not tasks:
        raise InputError(
            f"the two results have no task in common: {', '.join(a.results['tasks'])}, and"
            f" {', '.join(b.results['tasks'])}"
        )
    for task in tasks:
        if a.results["tasks"][task]["prompts"] != b.results["tasks"][task]["prompts"]:
            raise InputError(
                f"the prompts of {task} differ between the two results: evaluate both with the same"
                " --shots, --limit, --data, --chat and version of lm-eval"
            )
    for task in tasks:
        pairs = list(zip(a.items[task], b.items[task], strict=True))
        for metric in pairs[0][0]["metrics"]:
            values = [[_value(item, metric) for item in pair] for pair in pairs]
            if all(x is not None for pair in values for x in pair):
                yield _difference(task, metric, pairs, np.array(values, np.float64))


def _difference(task: str, metric: str, pairs: list[Any], values: np.ndarray) -> Difference:
    changes = values[:, 1] - values[:, 0]
    n = len(changes)
    stderr = float(changes.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    ids = np.array([pair[0]["id"] for pair in pairs])
    before, after = values.mean(axis=0).tolist()
    higher, lower = ids[changes > 0].tolist(), ids[changes < 0].tolist()
    return Difference(task, metric, before, after, stderr, higher, lower)


def _value(item: Mapping[str, Any], metric: str) -> float | None:
    value = item["metrics"].get(metric)
    return float(value) if isinstance(value, int | float) else None


def _list(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:10])) + (", …" if len(ids) > 10 else "")
    return f" ({shown})" if ids else ""
