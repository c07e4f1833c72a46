"""Evaluates a model on tasks of lm-evaluation-harness, on the current mesh."""

import hashlib
import importlib.util
import json
import os
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config.model import ModelConfig
from llama_jax.errors import InputError, missing_extra
from llama_jax.evaluation.answers import Answers
from llama_jax.evaluation.jobs import Evaluated, end_jobs, follow_jobs
from llama_jax.evaluation.tasks import FEWSHOT_SEED
from llama_jax.model.weights import Llama, UnstackedLlama
from llama_jax.parallel.mesh import context_shards
from llama_jax.runtime import hosts
from llama_jax.tokenizer.tokenizer import Tokenizer

_SEED = 0  # of Python's `random`, as in lm-eval's command line, where NumPy has FEWSHOT_SEED
_BOOTSTRAP = 1000  # samples for the standard error of a metric that has no formula


class Evaluation(NamedTuple):
    """The result of `evaluate`, plain JSON.

    Attributes:
        results: {"tasks": {name: {"shots", "items", "version", "prompts", "metrics"}}, "groups":
            {name: {"metrics", "tasks"}}, "prompts"}. Metrics are {name: {"value", "stderr"}}; the
            name of a metric of a filter is 'METRIC,FILTER'. "prompts" is the hash of all requests.
        items: of each task, in order: {"id", "doc", "target", "answers", "metrics": {name: value}}.
            The answers are those to each request of the item, one for each repetition.
    """

    results: dict[str, Any]
    items: dict[str, list[dict[str, Any]]]


def check_installed() -> None:
    """Checks that lm-eval is installed.

    Raises:
        InputError: it is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("evaluating tasks needs lm-eval", "eval")


def check_tasks(config: ModelConfig, tasks: Mapping[str, Any]) -> None:
    """Checks that a model can generate the answers of the tasks, before any is computed.

    Args:
        config: the model's config.
        tasks: of `load_tasks`.

    Raises:
        InputError: lm-eval is missing, or a task needs a kind of generation that is not supported,
            or more tokens than the model's context has.
    """
    check_installed()
    os.environ.setdefault("TQDM_DISABLE", "1")  # `HarnessModel` shows the progress
    from llama_jax.evaluation.harness import read_generation

    for name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            try:
                read_generation(task.config.generation_kwargs, config.context)
            except InputError as error:
                raise InputError(f"task {name}: {error}") from error


def evaluate(
    config: ModelConfig,
    model: Llama | UnstackedLlama,
    tokenizer: Tokenizer,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    answers: Answers | None = None,
    chat: bool = False,
    shown: bool = True,
) -> Evaluation | None:
    """Returns the results of a model on tasks, on host 0; None on other hosts.

    All hosts of the mesh call this. Host 0 runs the harness, the others compute what it asks.

    Args:
        config: the model's config.
        model: weights of that config, on a mesh that does not split sequences.
        tokenizer: the model's tokenizer.
        tasks: of `load_tasks`; only those of host 0 are used.
        limit: number of items of each task, the first ones; None: all.
        answers: those of an earlier call that was killed; new ones are added.
        chat: whether prompts are messages in the model's chat format.
        shown: whether to show progress.

    Raises:
        InputError: lm-eval is missing, the mesh splits sequences, or a task doesn't fit the model.
    """
    if context_shards() > 1:
        raise InputError("evaluation on tasks needs a mesh with context 1, which splits no text")
    evaluated = Evaluated(config, model, tokenizer)
    if not hosts.is_host_zero():
        follow_jobs(evaluated)
        return None
    check_tasks(config, tasks)
    # Its bootstrap would fork this process, in which JAX runs threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval import evaluator

    from llama_jax.evaluation.harness import HarnessModel

    random.seed(_SEED)
    np.random.seed(FEWSHOT_SEED)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    found: Any = evaluator.evaluate(
        lm=HarnessModel(evaluated, answers or Answers(), shown),
        task_dict=dict(tasks),
        limit=limit,
        bootstrap_iters=_BOOTSTRAP,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=True,  # `load_tasks` has refused them unless the user allows them
    )
    end_jobs()
    return _read_results(found)


def _read_results(found: Mapping[str, Any]) -> Evaluation:
    """Returns the results that `lm_eval.evaluator.evaluate` returned."""
    samples = found["samples"]
    prompts = {name: _hash([s["arguments"] for s in samples[name]]) for name in samples}
    tasks = {
        name: {
            "shots": found["n-shot"].get(name),
            "items": found["n-samples"][name]["effective"],
            "version": found["versions"].get(name),
            "prompts": prompts[name],
            "metrics": _metrics(found["results"][name]),
        }
        for name in samples
    }
    groups = {
        name: {"metrics": _metrics(values), "tasks": found["group_subtasks"].get(name, [])}
        for name, values in found.get("groups", {}).items()
    }
    results = {"tasks": tasks, "groups": groups, "prompts": _hash(sorted(prompts.items()))}
    items = {name: _items(samples[name]) for name in samples}
    return Evaluation(_plain(results), _plain(items))


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    metrics = {}
    for key, value in values.items():
        name, comma, filter_ = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            stderr = values.get(f"{name}_stderr,{filter_}")
            known = isinstance(stderr, int | float)
            metrics[_label(name, filter_)] = {"value": value, "stderr": stderr if known else None}
    return metrics


def _items(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the items of a task; lm-eval has one sample per item and filter."""
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        item = {"id": sample["doc_id"], "doc": sample["doc"], "target": sample["target"]}
        item = items.setdefault(
            sample["doc_id"], item | {"answers": sample["resps"], "metrics": {}}
        )
        for name in sample["metrics"]:
            item["metrics"][_label(name, sample["filter"])] = sample[name]
    return [items[i] for i in sorted(items)]


def _label(metric: str, filter_: str) -> str:
    return metric if filter_ == "none" else f"{metric},{filter_}"


def _plain(value: Any) -> Any:
    """Returns a value as plain JSON; a value of a type that JSON lacks becomes its text."""
    return json.loads(json.dumps(value, default=_to_json))


def _to_json(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
