"""EvaluateConfig: the tasks on which a run evaluates its model."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from llama_jax.config.data import StoragePath
from llama_jax.config.model import STRICT, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """The tasks on which the model is evaluated during the run."""

    tasks: tuple[str, ...] = Field(
        min_length=1, description="names of tasks, as for `llama-jax eval --tasks`"
    )
    every: PositiveInt = Field(
        default=1000, description="steps between evaluations (the last step always has one)"
    )
    limit: PositiveInt | None = Field(
        default=None, description="number of items of each task, the first ones; null: all"
    )
    data: StoragePath | None = Field(
        default=None,
        description="folder with the data sets of the tasks; null: the harness fetches them",
    )
