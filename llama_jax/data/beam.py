"""Runs tasks in Apache Beam: on this machine, or on Dataflow, Flink or Spark by Beam's flags."""

from collections.abc import Callable, Sequence
from typing import Any

from llama_jax.data.tasks import Task
from llama_jax.errors import missing_extra


def beam_runner(flags: Sequence[str]) -> Callable[[Sequence[Task]], None]:
    """Returns a function that runs tasks in a pipeline, for `run_tasks`.

    The machines of the pipeline need this package, and must see the inputs and outputs.

    Args:
        flags: of Beam, such as --runner=DataflowRunner. Without a runner among them, Beam's
            FnApiRunner runs the tasks in this process.

    Raises:
        InputError: Beam is not installed.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )
        from apache_beam.runners.portability.fn_api_runner import (  # pyright: ignore[reportMissingImports]
            FnApiRunner,
        )
    except ImportError as error:
        raise missing_extra("--beam: apache-beam is not installed", "beam") from error

    def run(tasks: Sequence[Task]) -> None:
        # Beam may run a task twice, also at the same time: both write the same bytes.
        options = PipelineOptions([*flags])
        # Beam's own default fetches a program from the network.
        named = any(flag.split("=")[0] == "--runner" for flag in flags)
        runner = None if named else FnApiRunner()
        with beam.Pipeline(runner=runner, options=options) as pipeline:
            created = pipeline | "tasks" >> beam.Create(tasks)
            _ = created | "distribute" >> beam.Reshuffle() | "run" >> beam.Map(_run_task)

    return run


def _run_task(task: Any) -> None:  # Beam checks types at run time, and knows no protocols
    task.run()
