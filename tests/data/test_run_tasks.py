"""Tasks run once each, here or divided between processes, and a killed run continues."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_jax.data import tasks
from llama_jax.data.tasks import Part, find_part, run_tasks
from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import replace_file

VARIABLES = re.findall(
    r"\w+",
    "SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT SLURM_ARRAY_TASK_MIN SLURM_ARRAY_TASK_STEP"
    " JOB_COMPLETION_INDEX JOB_COMPLETIONS SLURM_JOB_ID SLURM_STEP_NODELIST SLURM_NTASKS"
    " SLURM_PROCID SLURM_LOCALID",
)


@dataclass(frozen=True)
class Square:
    """Writes the square of a number, and records that it ran."""

    number: int
    folder: Path
    fatal: bool = False  # ends its process, unless the file `restarted` exists

    @property
    def output(self):
        return self.folder / "squares" / str(self.number)

    def run(self):
        if self.number < 0:
            raise InputError(f"{self.number} is negative: give another")
        with open(self.folder / f"runs-{self.number}", "a") as runs:
            runs.write("x")
        with replace_file(self.output) as partial:
            partial.write_text(str(self.number**2))
            if self.fatal and not (self.folder / "restarted").exists():
                os.kill(os.getpid(), signal.SIGKILL)


def squares(folder):
    return {path.name: path.read_text() for path in (folder / "squares").iterdir()}


def runs(folder):
    return [len((folder / f"runs-{i}").read_text()) for i in range(12)]


EXPECTED = {str(i): str(i * i) for i in range(12)}


@pytest.mark.parametrize("workers", [1, 2])
def test_each_missing_task_runs_once(tmp_path, workers):
    (tmp_path / "squares").mkdir()
    (tmp_path / "squares" / "5").write_text("25")
    for _ in range(2):
        run_tasks([Square(i, tmp_path) for i in range(12)], title="squares", workers=workers)
        assert squares(tmp_path) == EXPECTED
    (tmp_path / "runs-5").write_text("x")
    assert runs(tmp_path) == [1] * 12


def test_parts_divide_the_tasks_and_each_waits_for_all_outputs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.01)
    work = [Square(i, tmp_path) for i in range(12)]
    options = {"title": "squares", "workers": 1}
    first = threading.Thread(target=run_tasks, args=(work,), kwargs=options | {"part": Part(0, 2)})
    first.start()
    lines = ""
    while "squares: waits for 6 of 12 outputs of other processes" not in lines:
        assert first.is_alive(), lines  # nobody else has run the other part yet
        time.sleep(0.01)
        lines += capsys.readouterr().err
    run_tasks(work, part=Part(1, 2), **options)
    first.join()
    assert squares(tmp_path) == EXPECTED
    assert runs(tmp_path) == [1] * 12


def test_a_killed_run_continues_with_the_missing_tasks_alone(tmp_path):
    call = (
        "import sys; from pathlib import Path; from llama_jax.data.tasks import run_tasks;"
        " from test_run_tasks import Square; folder = Path(sys.argv[1]);"
        "run_tasks([Square(i, folder, fatal=i == 7) for i in range(12)], title='s', workers=1)"
    )
    command = [sys.executable, "-c", call, tmp_path]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    }
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert any(name.startswith(".7.partial-") for name in squares_and_leftovers(tmp_path))
    (tmp_path / "restarted").touch()
    subprocess.run(command, env=environment, check=True)
    assert squares(tmp_path) == EXPECTED  # without leftovers
    assert runs(tmp_path) == [1] * 7 + [2] + [1] * 4


def squares_and_leftovers(folder):
    return [path.name for path in (folder / "squares").iterdir()]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_a_task_ends_the_run_and_done_tasks_stay_done(tmp_path, workers):
    work = [Square(1, tmp_path), Square(-1, tmp_path)]
    with pytest.raises(InputError, match="-1 is negative: give another"):
        run_tasks(work, title="squares", workers=workers, progress=False)


def test_a_runner_gets_the_missing_tasks(tmp_path):
    work, received = [Square(i, tmp_path) for i in range(4)], []
    work[2].run()
    run_tasks(work, title="squares", runner=received.extend)
    assert received == [work[0], work[1], work[3]]


SLURM_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[0-1]", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("argument", "environment", "part"),
    [
        (None, {}, None),
        ("2/3", {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "20"}, Part(1, 3)),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "5"}, Part(3, 5)),
        (
            None,
            {
                "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2",
            },
            Part(2, 4),
        ),
        (None, {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "8"}, Part(2, 8)),
        (None, {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "1"}, None),
        (None, SLURM_STEP | {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, Part(3, 4)),
        (None, SLURM_STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
)  # fmt: skip
def test_the_part_is_that_of_the_argument_or_of_the_scheduler(
    monkeypatch, argument, environment, part
):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_part(argument) == part


@pytest.mark.parametrize(
    ("argument", "environment", "message"),
    [
        ("0/2", {}, "--task 0/2: write I/N with I from 1 to N"),
        ("3/2", {}, "--task 3/2: write I/N"),
        ("half", {}, "--task half: write I/N"),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"},
            "SLURM_ARRAY_TASK_ID is 9, and the array has 3 tasks from 0 on: number them without",
        ),
        (None, {"JOB_COMPLETION_INDEX": "2"}, "set JOB_COMPLETIONS to .*, or give --task 3/N"),
        (None, {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "2"}, "but JOB_COMPLETIONS is 2"),
    ],
)
def test_an_unclear_part_is_refused(monkeypatch, argument, environment, message):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        find_part(argument)
