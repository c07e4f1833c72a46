"""Runs tasks that each write one output: in processes here, on many machines, or in Apache Beam.

A task is done if and only if its output exists. So a killed run continues with the missing tasks
alone, and machines that share nothing but a folder divide the tasks between them.
"""

import collections
import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from llama_jax.data.worker_pool import submit, worker_pool
from llama_jax.errors import Fault, InputError
from llama_jax.runtime import hosts
from llama_jax.runtime.atomic_write import INCOMPLETE, is_written
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.console import TEXT_COLUMN, TaskProgress, print_status
from llama_jax.runtime.cpu import cpu_cores
from llama_jax.runtime.storage import AnyPath

POLL_SECONDS = 1.0  # at least, between two checks for the outputs of other processes
_LISTED = 8  # with more outputs than this in a folder, one listing finds them


class Task(Protocol):
    """A piece of work whose only effect is its output. Tasks can be pickled, and are frozen."""

    @property
    def output(self) -> AnyPath:
        """The file or folder that `run` writes; nothing else decides whether the task is done."""
        ...

    def run(self) -> None:
        """Writes the output, which appears complete: the same bytes at each attempt.

        A file or a local folder is written aside and renamed. The output in a bucket is the object
        that is written last, or a folder of `new_folder`.
        """
        ...


@dataclass(frozen=True)
class Part:
    """The part of the tasks that this process runs: those with number `index` modulo `count`."""

    index: int  # from 0
    count: int


def find_part(argument: str | None) -> Part | None:
    """Returns the part of this process; None: it runs all tasks.

    Args:
        argument: of `--task`: 'I/N', with I from 1. None: the scheduler decides, by the variables
            of a SLURM array or of an indexed Job of Kubernetes (whose number of pods is in
            JOB_COMPLETIONS), or the processes of a TPU pod or of a SLURM step.

    Raises:
        InputError: the argument is not I/N, or the scheduler's numbers don't determine a part.
    """
    if argument is not None:
        numbers = re.fullmatch(r"(\d+)/(\d+)", argument)
        if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
            raise InputError(f"--task {argument}: write I/N with I from 1 to N, as in 1/4")
        return Part(int(numbers[1]) - 1, int(numbers[2]))
    found = _scheduled_part()
    if found is None or found[0].count == 1:
        return None
    part, origin = found
    print_status(
        f"runs part {part.index + 1} of {part.count} of the tasks, by {origin}"
        " (--task 1/1 runs all tasks)"
    )
    return part


def _scheduled_part() -> tuple[Part, str] | None:
    """Returns the part of this process by its environment, and the variable that states it."""
    array, index = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("JOB_COMPLETION_INDEX")
    if array is not None:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "0"))
        number, rest = divmod(int(array) - first, step)
        if rest or not 0 <= number < count:
            raise InputError(
                f"SLURM_ARRAY_TASK_ID is {array}, and the array has {count} tasks from {first} on:"
                " number them without gaps (--array=0-9), or give --task I/N"
            )
        return Part(number, count), "SLURM_ARRAY_TASK_ID"
    if index is not None and (count := os.environ.get("JOB_COMPLETIONS")):
        if not int(index) < int(count):
            raise InputError(f"JOB_COMPLETION_INDEX is {index}, but JOB_COMPLETIONS is {count}")
        return Part(int(index), int(count)), "JOB_COMPLETION_INDEX"
    if process := hosts.process_in_cluster():
        return Part(*process), "the hosts of this cluster"
    if index is not None:
        raise InputError(
            f"JOB_COMPLETION_INDEX is {index}, and the number of pods is unknown: set"
            f" JOB_COMPLETIONS to the Job's completions, or give --task {int(index) + 1}/N"
        )
    return None


def run_tasks(
    tasks: Iterable[Task],
    *,
    title: str,
    workers: int | None = None,
    part: Part | None = None,
    progress: bool = True,
    runner: Callable[[Sequence[Task]], None] | None = None,
    until: AnyPath | None = None,
) -> None:
    """Runs the tasks whose outputs don't exist; when it returns, all outputs exist.

    Args:
        tasks: of one stage: none needs the output of another.
        title: text of the progress bar.
        workers: number of processes; 1 runs the tasks in this process; default: one per core.
        part: run only this part, then wait for the outputs of the others.
        progress: whether to show the progress on standard error.
        runner: runs the missing tasks elsewhere, such as `beam.beam_runner` returns.
        until: an output of a later stage. If it exists, all tasks of this stage were done, and
            their outputs may have been removed: the others' outputs are not waited for.

    Raises:
        InputError, Fault: as the first task that fails. The tasks that are done stay done.
    """
    tasks = [*tasks]
    own = tasks if part is None else tasks[part.index :: part.count]
    missing = _missing(own)
    if runner is not None and missing:
        runner(missing)
    elif missing:
        results = _run(missing, workers or cpu_cores())
        columns = (TEXT_COLUMN, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        total, before = len(own), len(own) - len(missing)
        bar = TaskProgress(*columns, total=total, text=title, completed=before, shown=progress)
        with contextlib.closing(bar), contextlib.closing(results):
            for done, _ in enumerate(results, before + 1):
                bar.update(done, title, line_details=f"  {done:,} of {total:,}")
    if part is not None:
        _wait_for_others(tasks, title, progress, until)


def _run(tasks: Sequence[Task], workers: int) -> Generator[None, None, None]:
    """Runs tasks in their order, and yields after each."""
    if workers == 1:
        for task in tasks:
            task.run()
            yield
        return
    waiting = iter(tasks)
    with worker_pool(min(workers, len(tasks))) as pool:
        running = {submit(pool, task.run) for task in itertools.islice(waiting, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            try:
                running |= {submit(pool, task.run) for task in itertools.islice(waiting, len(done))}
                for future in done:
                    future.result()
                    yield
            except BrokenProcessPool as error:
                raise Fault(
                    "the system ended a worker process, perhaps because memory ran out: run the"
                    " same command again, with fewer --workers; finished tasks are not repeated"
                ) from error


def _missing(tasks: Sequence[Task]) -> list[Task]:
    """Returns the tasks whose outputs don't exist, from one listing of each folder of outputs."""
    by_folder = collections.defaultdict[AnyPath, set[str]](set)
    for task in tasks:
        by_folder[task.output.parent].add(task.output.name)
    found = {
        folder: _names(folder)
        if len(names) > _LISTED
        else {name for name in names if is_written(folder / name)}
        for folder, names in by_folder.items()
    }
    return [task for task in tasks if task.output.name not in found[task.output.parent]]


def _names(folder: AnyPath) -> set[str]:
    if isinstance(folder, BucketPath):
        objects = [str(path.relative_to(folder)) for path in folder.files()]
        incomplete = {name for name in objects if name.endswith(f"/{INCOMPLETE}")}
        names = {name.partition("/")[0] for name in objects}
        return names - {name.partition("/")[0] for name in incomplete}
    with contextlib.suppress(FileNotFoundError):
        return {*os.listdir(folder)}
    return set()


def _wait_for_others(
    tasks: Sequence[Task], title: str, progress: bool, until: AnyPath | None
) -> None:
    """Waits until the outputs of all tasks exist, or that of a later stage."""
    missing = _missing(tasks)
    columns = (TEXT_COLUMN, BarColumn(), MofNCompleteColumn())
    shown = progress and bool(missing)
    with contextlib.closing(TaskProgress(*columns, total=len(tasks), shown=shown)) as bar:
        first = True
        while missing and not (until and is_written(until)):
            counts = f"{len(missing):,} of {len(tasks):,}"
            text = f"{title}: waits for {counts} outputs of other processes"
            bar.update(len(tasks) - len(missing), text, line_now=first)
            first = False
            start = time.monotonic()
            missing = _missing(missing)
            # A listing of a bucket may take seconds: this process is asleep most of the time.
            if missing:
                time.sleep(max(POLL_SECONDS, 10 * (time.monotonic() - start)))
