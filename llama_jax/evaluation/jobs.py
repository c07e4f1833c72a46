"""Jobs that all hosts of a mesh compute together: scoring given tokens, and generation.

Host 0 runs the evaluation, because the order of its requests differs from process to process. The
other hosts receive each list of requests and compute it too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from llama_jax.config.model import ModelConfig
from llama_jax.inference.generate_batches import GenerateRequest, generate_batches
from llama_jax.inference.sampling import Sampling
from llama_jax.inference.score import ScoreRequest, score
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.runtime import hosts
from llama_jax.tokenizer.tokenizer import Tokenizer

Job = Sequence[ScoreRequest] | Sequence[GenerateRequest]


class Evaluated(NamedTuple):
    """The model that is evaluated, on the current mesh of all hosts."""

    config: ModelConfig
    model: Llama | UnstackedLlama
    tokenizer: Tokenizer


def run_job(evaluated: Evaluated, job: Job) -> Iterator[tuple[int, Any]]:
    """Yields the index and the answer of each request, on host 0, while the other hosts follow.

    An answer is plain JSON: [sum of log-probabilities (nats), whether each scored token is the most
    likely one] of a ScoreRequest, the generated tokens of a GenerateRequest.
    """
    yield from _compute(evaluated, hosts.broadcast_json(lambda: _encode(job)))


def end_jobs() -> None:
    """Makes `follow_jobs` return on the other hosts."""
    hosts.broadcast_json(lambda: None)


def follow_jobs(evaluated: Evaluated) -> None:
    """Computes the jobs of host 0, on another host, until `end_jobs`."""
    while (job := hosts.broadcast_json(lambda: None)) is not None:
        for _ in _compute(evaluated, job):
            pass


def _encode(job: Job) -> list[Any]:
    return [
        [*request[:-2], asdict(request.sampling), request.seed]
        if isinstance(request, GenerateRequest)
        else [*request]
        for request in job
    ]


def _compute(evaluated: Evaluated, job: list[Any]) -> Iterator[tuple[int, Any]]:
    config, model, tokenizer = evaluated
    if len(job[0]) == len(ScoreRequest._fields):
        scored = [ScoreRequest(tuple(tokens), n_context) for tokens, n_context in job]
        for i, found in score(config, model, scored):
            yield i, [found.total, bool(found.greedy)]
        return
    generated = [
        GenerateRequest(tuple(tokens), n, tuple(stops), Sampling(**sampling), seed)
        for tokens, n, stops, sampling, seed in job
    ]
    yield from generate_batches(config, model, tokenizer, generated)
