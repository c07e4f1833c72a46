"""A training run from its configuration to its last checkpoint, resumed wherever it stopped."""

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.checkpoint.orbax import Progress, TrainingCheckpoints
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.parallel.mesh import check_divides, make_mesh
from llama_jax.runtime import hosts
from llama_jax.runtime.chips import chip_of
from llama_jax.runtime.console import format_duration, print_status
from llama_jax.runtime.process_memory import retain_freed_memory
from llama_jax.training import init_from
from llama_jax.training.metrics import check_installed, read_metrics
from llama_jax.training.report import Report, due
from llama_jax.training.run_folder import flat, only_run, write_run_files
from llama_jax.training.start import State, check_vocabulary, prepare, print_summary
from llama_jax.training.step import StepMetrics, eval_step, train_step


class RunStopped(RuntimeError):
    """A run had to end before its last step; its state is saved and the message says why."""


class Outcome(NamedTuple):
    """How a call of `run` ended."""

    folder: Path
    step: int  # steps done in all
    finished: bool  # False: it was asked to stop, and can be resumed
    validation_loss: float | None  # nats per token
    unigram_entropy: float | None  # nats per token, of the held-out text


def run(config: Config) -> Outcome:
    """Trains until `training.steps` are done, from the newest checkpoint of the run folder if any.

    >>> outcome = lj.train(lj.load_config("tiny.yaml"))
    >>> outcome.step, outcome.finished
    (60, True)

    From the first step on, SIGTERM and SIGINT end it after the step that is running, with
    everything saved; where there are several hosts, on all after the same step when it comes to
    any.

    Raises:
        InputError: something in the configuration, the data or the run folder is wrong.
        RunStopped: too many steps in a row had a gradient that is not finite.
        Fault: a checkpoint could not be read or saved. Those that were saved before are as they
            were.
    """
    retain_freed_memory()
    if hosts.is_host_zero():
        check_installed(config.logging)
    hosts.check_equal_on_hosts(
        dict(flat(dataclasses.asdict(config))) | {"JAX's version": jax.__version__}
    )
    mesh = make_mesh(config.mesh)
    rows = config.data.batch_size // config.training.micro_batches
    check_divides(mesh, config.model, rows, config.data.seq_len)
    folder = Path(config.training.out)
    with only_run(folder), jax.set_mesh(mesh):
        checkpoints = TrainingCheckpoints(folder / "checkpoints", config.checkpoint)
        newest = hosts.broadcast_decision(lambda: max(checkpoints.steps, default=None))
        hosts.broadcast_decision(lambda: prepare(config, folder, newest))
        data = Batches(config.data, config.training.micro_batches)
        hosts.check_equal_on_hosts({"the content of data.mixture": data.fingerprint})
        check_vocabulary(config, data)
        if newest is None:
            init_from.check_tokenizer(config, data)
        if newest is not None and newest >= config.training.steps:
            print_status(f"{folder} is finished: {newest} steps are done, nothing is left to train")
            return _outcome(folder, newest, data, finished=True)
        state = State(config, data, checkpoints, newest)
        hosts.broadcast_decision(lambda: write_run_files(config, data, folder))
        print_summary(config, data, mesh, state.step)
        step_function = _compiled(config, data, state)
        with _stop_signals() as stop, contextlib.closing(checkpoints):
            finished = _train(config, folder, data, checkpoints, state, step_function, stop)
        return _outcome(folder, state.step, data, finished)


def _compiled(config: Config, data: Batches, state: State) -> Any:
    """Returns the training step, compiled for the chip that is there."""
    begun = time.monotonic()
    example = (state.model, state.opt_state, data.train(state.step), np.int32(state.step))
    chip = chip_of(jax.devices()[0].device_kind)
    options: Any = {**chip.compiler_options} if chip else {}
    step_function = train_step.lower(config, *example).compile(compiler_options=options)
    print_status(f"compiled in {format_duration(time.monotonic() - begun)}")
    return step_function


def _train(
    config: Config,
    folder: Path,
    data: Batches,
    checkpoints: TrainingCheckpoints,
    state: State,
    step_function: Any,
    stop: list[str],
) -> bool:
    """Runs the steps that are left and returns whether all are done.

    Args:
        stop: gets the name of the signal that asks to stop.
    """
    steps, first = config.training.steps, state.step
    report = Report(config, folder, data, first)
    running: tuple[int, StepMetrics] | None = None
    with contextlib.closing(report):
        while state.step < steps:
            checkpoints.check()
            if why := hosts.stop_before(state.step, stop[0] if stop else None):
                print_status(f"stopping on {why}: saving step {state.step} …")
                break
            step = state.step
            report.dispatched()
            batch = data.train(step)
            state.model, state.opt_state, metrics = step_function(
                state.model, state.opt_state, batch, np.int32(step)
            )
            state.step += 1
            # The device works on this step while the host reads what the one before it told.
            if running:
                report.step(*running)
            running = (state.step, metrics)
            validate = state.step == steps or due(state.step, config.training.eval_every)
            save = state.step == steps or due(state.step, config.checkpoint.every)
            # After a skipped step the next ones are read at once, to stop at the right one.
            if validate or save or report.skipped_in_a_row or state.step == first + 1:
                report.step(*running)
                running = None
            if validate:
                report.validation(state.step, _validate(config, data, state))
            if save or report.skipped_in_a_row >= config.training.max_skipped:
                checkpoints.save(
                    Progress(state.step, data.fingerprint), state.model, state.opt_state
                )
            if report.skipped_in_a_row >= config.training.max_skipped:
                raise RunStopped(
                    f"the gradient was not finite in {report.skipped_in_a_row} steps in a row, up"
                    f" to step {state.step}: these steps changed nothing, and the state is saved in"
                    f" {folder}; look at the data, or lower optimizer.peak_lr in a new run"
                )
        if running:
            report.step(*running)
        if state.step < steps:
            progress = Progress(state.step, data.fingerprint)
            checkpoints.save(progress, state.model, state.opt_state)
    return state.step >= steps


def _validate(config: Config, data: Batches, state: State) -> float:
    """Returns the mean loss over the held-out batches [nats per token]."""
    nll, targets = 0.0, 0
    batches = data.count_validation_batches(config.training.eval_batches)
    for i in range(batches):
        batch_nll, batch_targets = eval_step(config, state.model, data.validation(i, batches))
        nll, targets = nll + float(batch_nll), targets + int(batch_targets)
    return nll / targets if targets else math.nan


def _outcome(folder: Path, step: int, data: Batches, finished: bool) -> Outcome:
    losses = [
        record["validation_loss"]
        for record in read_metrics(folder / "metrics.jsonl")
        if record.get("validation_loss") is not None
    ]
    last = losses[-1] if losses else None
    return Outcome(folder, step, finished, last, data.unigram_entropy)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Yields a list that gets the name of SIGTERM or SIGINT when it comes; twice kills."""
    received: list[str] = []

    def note(number: int, _: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(signal.Signals(number).name)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
