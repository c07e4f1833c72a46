"""Evaluation on tasks during a training run, on its mesh and with its weights."""

from llama_jax.config.run import Config
from llama_jax.errors import InputError
from llama_jax.evaluation.evaluate import check_installed, check_tasks, evaluate
from llama_jax.evaluation.tasks import load_tasks
from llama_jax.model.weights import Llama
from llama_jax.runtime import hosts
from llama_jax.runtime.storage import parse_path
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.training.loop import Evaluate


def evaluator(config: Config) -> Evaluate:
    """Returns the function with which all hosts of a run evaluate its model on tasks.

    It loads the tasks now, before the run starts, and uses the model without a copy.

    Args:
        config: of a run, with `training.evaluate`.

    Raises:
        InputError: lm-eval or the data of a task is missing, a task is unknown, or the mesh splits
            sequences.
    """
    check_installed()
    settings = config.training.evaluate
    assert settings
    if config.mesh.context != 1:
        raise InputError(
            f"training.evaluate needs mesh.context 1, not {config.mesh.context}: a mesh that splits"
            " sequences can't evaluate tasks"
        )
    data = parse_path(settings.data) if settings.data else None
    tasks = load_tasks(settings.tasks, data) if hosts.is_host_zero() else {"tasks": {}}
    check_tasks(config.model, tasks)

    def evaluate_tasks(model: Llama) -> dict[str, float]:
        tokenizer = load_tokenizer(config.training.out)  # written at the start of the run
        found = evaluate(
            config.model, model, tokenizer, tasks,
            limit=settings.limit, shown=config.logging.progress,
        )  # fmt: skip
        if found is None:
            return {}
        groups = found.results["groups"]
        grouped = {task for group in groups.values() for task in group["tasks"]}
        alone = {n: task for n, task in found.results["tasks"].items() if n not in grouped}
        return {
            f"{name}/{metric}": measured["value"]
            for name, part in {**groups, **alone}.items()
            for metric, measured in part["metrics"].items()
        }

    return evaluate_tasks
