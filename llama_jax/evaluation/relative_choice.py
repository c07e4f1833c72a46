"""Multiple choice by P(completion | context) / P(completion | "Answer:"): a metric of the paper.

LLaMA, section 3: for OpenBookQA and BoolQ, as Brown et al. (2020). lm-eval's `acc_mutual_info`
divides by P(completion | empty context) instead.
"""

from dataclasses import replace
from typing import Any

METRIC = "acc_relative"


def score_relative_to(task: Any, context: str) -> None:
    """Makes an lm-eval task of multiple choice score its choices relative to `context`.

    Each choice is a second request, after `context`. Equal requests of other items are computed
    once, because their tokens have a common prefix.
    """
    construct = task.construct_requests

    def construct_both(doc: Any, ctx: str, **options: Any) -> list[Any]:
        requests = construct(doc, ctx, **options)
        return requests + [
            replace(
                request,
                arguments=(context, request.args[1]),
                idx=len(requests) + i,
                resps=[],
                filtered_resps={},
            )
            for i, request in enumerate(requests)
        ]

    def process(doc: Any, results: list[tuple[float, bool]]) -> dict[str, float]:
        logprobs = [logprob for logprob, _ in results]
        n = len(logprobs) // 2
        ratios = [a - b for a, b in zip(logprobs[:n], logprobs[n:], strict=True)]
        best = max(range(n), key=ratios.__getitem__)
        return {METRIC: float(best == task.doc_to_target(doc))}

    task.construct_requests, task.process_results = construct_both, process
