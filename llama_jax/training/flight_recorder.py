"""The flight recorder: records a spike of the loss or gradient norm, then lets the run continue.

The training step compares its loss and gradient norm with their limits on the devices, and a step
that exceeds one changes nothing (`step.Gate`). Neither do later ones, until the host has seen it.
So the state is still the one before the spike when the host has recorded it. Then the run continues
by `training.on_spike`:

- record: it computes the step again, without limits.
- skip: it continues with the next step.
- rewind: it restores the last checkpoint, and continues with the batches after the spike.

All of them depend on metrics that all hosts have, and on events.jsonl. So all hosts do the same,
and so does a run that was killed and resumed.
"""

import itertools
import json
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.checkpoint.local_checkpoints import LocalCheckpoints
from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.errors import Fault, InputError
from llama_jax.runtime import hosts
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import AnyPath, list_files, read_many, write_file
from llama_jax.training.batch_rows import describe_rows
from llama_jax.training.events import read_events, record_events
from llama_jax.training.layer_norms import compute_norms, to_numbers
from llama_jax.training.ledger import Ledger
from llama_jax.training.report import Report
from llama_jax.training.start import TrainingState
from llama_jax.training.step import Gate, StepMetrics

FOLDER = "spikes"
# PaLM (arXiv 2204.02311, section 5.1) went back about 100 steps before a spike, and left out the
# batches before and during it: the same batches from other weights gave no spike.
LEFT_OUT_STEPS = 100
# With `record`, a step so soon after a spike belongs to it: its record would cost two more steps.
REST_STEPS = 32


class RunStopped(RuntimeError):
    """A run ended before its last step. Its state is saved; the message gives the reason."""


class Rewind(NamedTuple):
    """A rewind of a run, as in events.jsonl."""

    step: int  # of the spike; 1 is the first
    to: int  # step of the checkpoint
    left_out: tuple[int, int]  # first and last batch; 1 is the first


def read_rewinds(folder: AnyPath) -> list[Rewind]:
    """Returns the rewinds of a run so far. All hosts call this."""

    def read() -> list[list[Any]]:
        events = read_events(folder, "rewind")
        return [[event[name] for name in Rewind._fields] for event in events]

    return [Rewind(*fields) for fields in hosts.broadcast_decision(read)]


def leave_out_batches(data: Batches, rewinds: list[Rewind]) -> None:
    """Leaves out the batches of these rewinds.

    They are left out wherever the run resumes: before the checkpoint of the rewind no step has had
    them.
    """
    for rewind in rewinds:
        first, last = rewind.left_out
        data.samples.leave_out(first - 1, last)


class FlightRecorder:
    """Ends each step of a run: reports it, or records its spike. All hosts do the same.

    Args:
        config: of the run.
        folder: of the run.
        data: of the run.
        checkpoints: of the run.
        local: local checkpoints of the run, if any.
        state: of the run. After a spike, its step says where the run continues.
        report: of the run.
        ledger: of the run.
    """

    def __init__(
        self,
        config: Config,
        folder: AnyPath,
        data: Batches,
        checkpoints: TrainingCheckpoints,
        local: LocalCheckpoints | None,
        state: TrainingState,
        report: Report,
        ledger: Ledger,
    ):
        self._config, self._folder, self._data, self._state = config, folder, data, state
        self._checkpoints, self._local = checkpoints, local
        self._report, self._ledger = report, ledger
        self._held: Any = np.bool_(False)  # of the step that was dispatched last
        self._rest_until = 0  # steps up to this one have no limits

    def gate(self) -> Gate:
        """Returns the gate of the next step."""
        if self._state.step < self._rest_until:
            return Gate(np.full(2, np.nan, np.float32), self._held)
        return Gate(self._state.limits(self._state.step + 1), self._held)

    def record_dispatch(self, metrics: StepMetrics) -> None:
        """Records that a step has been dispatched: if it is held, the next one will be."""
        self._held = metrics.held

    def end_step(self, step: int, metrics: StepMetrics) -> bool:
        """Waits for a step (1 is the first); returns False if it was held because of a spike.

        Then the one that may have been dispatched after it was held too, and the run continues
        after `state.step`.

        Raises:
            RunStopped: the run has rewound to one checkpoint `training.max_skipped` times.
            Fault: the run folder can't be written, or the checkpoint can't be read.
        """
        numbers = self._report.read(metrics)
        if not numbers.held:
            self._state.spike_limits.add(step, numbers.loss, numbers.grad_norm)
            self._report.step(step, numbers, metrics.rows)
            return True
        found = [repr(numbers.loss), repr(numbers.grad_norm)]
        hosts.check_equal_on_hosts({f"[loss, gradient norm] of the spike of step {step}": found})
        try:
            with self._ledger.during("evaluating"):
                self._end_spike(step, metrics, numbers)
        except OSError as error:
            raise Fault(
                f"can't record the spike of step {step} in {self._folder} ({error}): fix the cause;"
                " the same command then resumes from the last checkpoint"
            ) from error
        return False

    def _end_spike(self, step: int, metrics: StepMetrics, numbers: Any) -> None:
        self._state.step, self._held = step - 1, np.bool_(False)
        limits = [float(limit) for limit in self._state.limits(step)]
        values = [numbers.loss, numbers.grad_norm]
        path = self._record(step, metrics, values, limits)
        text = f"{_describe(values, limits)}; recorded in {path}"
        self._record_event({"step": step, "event": "spike"}, f"step {step}: {text}")
        match self._config.training.on_spike:
            case "record":
                self._rest_until = step + REST_STEPS
                self._report.return_to(step - 1)
            case "skip":
                self._state.spike_limits.add(step, numbers.loss, numbers.grad_norm)
                self._report.step(step, numbers._replace(skipped=True), metrics.rows)
                self._report.return_to(step)
                self._state.step = step
            case "rewind":
                self._rewind(step)

    def _record(
        self, step: int, metrics: StepMetrics, values: list[float], limits: list[float]
    ) -> AnyPath:
        """Writes the record of a spike; returns its path."""
        batch = self._data.samples.batch_number(step - 1) + 1
        names = ("loss", "grad_norm")
        content = {
            "step": step,
            "batch": batch,
            "time": round(time.time(), 3),
            **dict(zip(names, map(_finite, values), strict=True)),
            "limits": dict(zip(names, map(_finite, limits), strict=True)),
            "action": self._config.training.on_spike,
            "norms": self._norms(step),
        }

        def write() -> str:
            rows = describe_rows(self._data, step, metrics.rows)
            content["rows"] = [row._asdict() for row in rows]
            # After a rewind, a step has another batch: it doesn't replace the record of the first.
            for number in itertools.count(1):
                name = f"{step}.json" if number == 1 else f"{step}-{number}.json"
                found = read_many(self._folder / FOLDER, [name])[name]
                if found is None or json.loads(found)["batch"] == batch:
                    write_file(self._folder / FOLDER / name, json.dumps(content).encode())
                    return name
            raise AssertionError

        return self._folder / FOLDER / hosts.broadcast_decision(write)

    def _norms(self, step: int) -> dict[str, Any] | None:
        """Returns the norms of the state before `step`, from a program of its own.

        None: the devices have no memory for it, which must not end a run that has enough.
        """
        state, number = self._state, np.int32(step - 1)
        batch = self._data.train(step - 1)
        try:
            program = self._config.program
            norms: Any = compute_norms(program, state.trained, batch, number, state.base)
            return to_numbers(norms)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print_status(f"step {step}: the devices have no memory for the norms of its layers")
            return None

    def _rewind(self, step: int) -> None:
        """Restores the last checkpoint, and leaves out the batches before and during the spike.

        A run that is killed before the event is recorded finds the same spike again.

        Raises:
            RunStopped: see `end_step`.
        """
        self._checkpoints.wait()
        newest = max(self._checkpoints.steps, default=0)
        earlier = [rewind for rewind in read_rewinds(self._folder) if rewind.to == newest]
        if len(earlier) >= self._config.training.max_skipped:
            raise RunStopped(
                f"step {step} is a spike, and {len(earlier)} rewinds to step {newest}, which left"
                f" out ever more batches, have not avoided it (see {self._folder / FOLDER}): lower"
                " optimizer.peak_lr in a new run, or resume with training.on_spike=record"
            )
        if self._local:  # they belong to the steps that the run replaces
            self._local.remove()
        hosts.check_equal_on_hosts({})  # a barrier: all hosts have removed theirs
        with self._ledger.during("restoring"):
            self._state.restore(self._checkpoints)
        first = max(self._state.step, step - LEFT_OUT_STEPS)
        batches = [self._data.samples.batch_number(at) + 1 for at in (first, step - 1)]
        self._record_event(
            {"step": step, "event": "rewind", "to": self._state.step, "left_out": batches},
            f"rewinds to step {self._state.step} and leaves out the batches {batches[0]} to"
            f" {batches[1]}",
        )
        leave_out_batches(self._data, [Rewind(step, self._state.step, (batches[0], batches[1]))])
        self._report.rewind(self._state.step, step)

    def _record_event(self, event: dict[str, Any], text: str) -> None:
        print_status(text)
        hosts.broadcast_decision(lambda: record_events(self._folder, [event | {"text": text}]))


def read_record(folder: AnyPath, name: str) -> dict[str, Any]:
    """Returns the record of a spike: 'STEP', or 'STEP-2' for the second spike of a step.

    Raises:
        InputError: there is no such record.
    """
    if data := read_many(folder / FOLDER, [f"{name}.json"])[f"{name}.json"]:
        return json.loads(data)
    names = [path.name.removesuffix(".json") for path in list_files(folder / FOLDER)]
    ordered = sorted(names, key=lambda name: [int(n) for n in name.split("-") if n.isdecimal()])
    raise InputError(
        f"--spike {name}: {folder} has no record of it; "
        + (f"there are {', '.join(ordered)}" if names else "no step of it was a spike")
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _describe(values: list[float], limits: list[float]) -> str:
    names = ("loss", "gradient norm")
    high = [
        f"the {name} is {value:.4g}" + (f", above its limit {limit:.4g}" if value > limit else "")
        for name, value, limit in zip(names, values, limits, strict=True)
        if not value <= limit or not np.isfinite(value)
    ]
    return " and ".join(high)
