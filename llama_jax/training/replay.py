"""Computes a step of a run again, from the nearest checkpoint before it: `train --replay STEP`.

The seed and the step determine a batch, and the restored state is that of the run, so on the same
mesh the step has the loss and the gradient norm of the run bit for bit. The run is only read.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.data.windows import Batch
from llama_jax.errors import InputError
from llama_jax.runtime import hosts
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import parse_path
from llama_jax.training.batch_rows import DescribedRow, describe_rows
from llama_jax.training.flight_recorder import leave_out_batches, read_rewinds
from llama_jax.training.layer_norms import compute_norms, to_numbers
from llama_jax.training.loop import compile_step
from llama_jax.training.metrics import read_metrics
from llama_jax.training.run_folder import check_unchanged
from llama_jax.training.start import (
    TrainingState,
    check_kind,
    check_vocabulary,
    make_run_mesh,
)
from llama_jax.training.step import Gate, StepMetrics


class Replay(NamedTuple):
    """A step that was computed again."""

    step: int  # 1 is the first
    batch: int  # 1 is the first; another number than the step if a rewind has left out batches
    start: int  # step of the checkpoint from which it was computed; 0: the initial weights
    loss: float  # as in metrics.jsonl
    grad_norm: float
    recorded: dict[str, float | None] | None  # loss and grad_norm of the run; None: not logged
    rows: list[DescribedRow]
    norms: dict[str, Any]  # `layer_norms.to_numbers`

    @property
    def equal(self) -> bool | None:
        """Whether loss and gradient norm are those of the run bit for bit; None: not logged."""
        if self.recorded is None:
            return None
        ours = {"loss": self.loss, "grad_norm": self.grad_norm}
        return all(
            value == ours[name] or (value is None and not math.isfinite(ours[name]))
            for name, value in self.recorded.items()
        )


def replay(config: Config, step: int) -> Replay:
    """Computes `step` (1 is the first) of the run in `training.out` again. All hosts call this.

    Raises:
        InputError: the run has no such step, no checkpoint before it, or another configuration.
        Damaged: the checkpoint before it is damaged.
    """
    mesh = make_run_mesh(config)
    folder = parse_path(config.training.out)

    def check() -> None:
        check_unchanged(config, folder)

    hosts.broadcast_decision(check)
    with jax.set_mesh(mesh):
        checkpoints = TrainingCheckpoints(folder / "checkpoints", config.checkpoint)
        records = hosts.broadcast_json(lambda: read_metrics(folder / "metrics.jsonl"))
        losses = {r["step"]: r for r in records if "grad_norm" in r}
        # `TrainingState` restores the newest of these steps.
        checkpoints.steps = _start(config, step, checkpoints.steps, max(losses, default=0))
        data = Batches(config.data, config.training.micro_batches, step)
        leave_out_batches(data, read_rewinds(folder))
        check_kind(config, data)
        check_vocabulary(config, data)
        state = TrainingState(config, data, checkpoints, None)
        start = state.step
        step_function = compile_step(config, data, state)
        skips = config.training.on_spike == "skip"

        def compute(number: int, batch: Batch) -> StepMetrics:
            """Computes a step (1 is the first); it can be held only in a run that skips spikes."""
            limits = state.limits(number) if skips else np.full(2, np.nan, np.float32)
            state.trained, state.opt_state, metrics = step_function(
                state.trained,
                state.opt_state,
                batch,
                np.int32(number - 1),
                state.base,
                Gate(limits, np.bool_(False)),
            )
            found = np.asarray(metrics.loss).item(), np.asarray(metrics.grad_norm).item()
            state.spike_limits.add(number, *found)
            return metrics

        print_status(
            f"computes step {step} from " + (f"checkpoint {start}" if start else "the start")
        )
        for done in range(start, step - 1):
            compute(done + 1, data.train(done))
        number, batch = np.int32(step - 1), data.train(step - 1)
        # The step donates the weights, so their norms are computed before it.
        norms: Any = compute_norms(config.program, state.trained, batch, number, state.base)
        norms = to_numbers(norms)
        metrics = compute(step, batch)
        recorded = losses.get(step)
        return Replay(
            step,
            data.samples.batch_number(step - 1) + 1,
            start,
            np.asarray(metrics.loss).item(),
            np.asarray(metrics.grad_norm).item(),
            recorded and {name: recorded[name] for name in ("loss", "grad_norm")},
            describe_rows(data, step, metrics.rows),
            norms,
        )


def _start(config: Config, step: int, saved: list[int], logged: int) -> list[int]:
    """Returns a list with the step of the checkpoint before `step`; [] for the initial weights.

    Raises:
        InputError: the run has no such step, or no checkpoint before it.
    """
    done = max([logged, *saved])
    if not 1 <= step <= done:
        raise InputError(
            f"--replay {step}: {config.training.out} has done {done} steps: give one of them"
        )
    before = [s for s in saved if s < step]
    if not before and step > config.checkpoint.every:
        oldest = f"the oldest is {min(saved)}" if saved else "it has none"
        raise InputError(
            f"--replay {step}: {config.training.out} has no checkpoint before this step ({oldest}):"
            " give a later step (checkpoint.keep_every retains old checkpoints)"
        )
    return before[-1:]
