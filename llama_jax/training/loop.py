"""A training run, from its configuration or its newest checkpoint to its last step."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.checkpoint.local_checkpoints import LocalCheckpoints
from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.data.source_use import check_epochs, count_use
from llama_jax.model.weights import Llama
from llama_jax.runtime import hosts
from llama_jax.runtime.chips import chip_of
from llama_jax.runtime.console import print_status
from llama_jax.runtime.duration import format_duration
from llama_jax.runtime.folder_lock import lock_folder
from llama_jax.runtime.process_memory import retain_freed_memory
from llama_jax.runtime.storage import AnyPath, parse_path
from llama_jax.training import init_from
from llama_jax.training.device_check import check_devices
from llama_jax.training.flight_recorder import (
    FlightRecorder,
    RunStopped,
    leave_out_batches,
    read_rewinds,
)
from llama_jax.training.ledger import Ledger
from llama_jax.training.metrics import check_wandb_installed, read_metrics
from llama_jax.training.profile import Profiler
from llama_jax.training.report import Report, draw_figure, is_due
from llama_jax.training.run_folder import flatten, write_run_files
from llama_jax.training.source_losses import held_out_means
from llama_jax.training.start import (
    TrainingState,
    check_evaluator,
    check_kind,
    check_vocabulary,
    make_run_mesh,
    prepare,
    print_summary,
)
from llama_jax.training.step import Gate, StepMetrics, train_step
from llama_jax.training.trainable import complete_model

Sample = Callable[[Llama, int], None]
Evaluate = Callable[[Llama], dict[str, float]]


class RunOutcome(NamedTuple):
    """Result of `run`."""

    folder: AnyPath
    step: int  # number of steps done in all
    finished: bool  # False: a signal stopped the run, and it can be resumed
    validation_loss: float | None  # nats per token
    unigram_entropy: float | None  # nats per token, of the held-out text


def run(
    config: Config, sample: Sample | None = None, evaluate: Evaluate | None = None
) -> RunOutcome:
    """Trains until `training.steps` are done, from the newest checkpoint of the run folder, if any.

    >>> outcome = lj.train(lj.load_config("tiny.yaml"))
    >>> outcome.step, outcome.finished
    (60, True)

    From the first step on, SIGTERM and SIGINT end the run after the current step, with its state
    saved. A signal to any host ends all hosts after the same step.

    Args:
        config: of the run.
        sample: called on all hosts after each validation, with the model and the number of steps.
        evaluate: called on all hosts as `training.evaluate` says, with the model; returns the
            results on host 0, by 'TASK/METRIC' (`evaluation.in_training.evaluator`).

    Raises:
        InputError: the configuration, the data or the run folder is wrong.
        RunStopped: too many steps in a row were skipped, or the run has rewound too often.
        Fault: a checkpoint can't be read or saved. Earlier checkpoints are unchanged.
    """
    ledger = Ledger()
    retain_freed_memory()
    check_evaluator(config, evaluate)
    if hosts.is_host_zero():
        check_wandb_installed(config.logging)
    hosts.check_equal_on_hosts(
        dict(flatten(dataclasses.asdict(config))) | {"JAX's version": jax.__version__}
    )
    mesh = make_run_mesh(config)
    folder = parse_path(config.training.out)
    with lock_folder(folder) as lock, jax.set_mesh(mesh):
        checkpoints = TrainingCheckpoints(folder / "checkpoints", config.checkpoint, lock)
        finished = checkpoints.is_finished(config.training.steps)
        newest = max(checkpoints.steps, default=None)
        local, saved_steps = None, checkpoints.steps
        if config.checkpoint.local:
            last = config.training.steps
            local = LocalCheckpoints(folder, config.checkpoint.local, newest or 0, last)
            saved_steps = saved_steps + local.steps
        hosts.broadcast_decision(lambda: prepare(config, folder, saved_steps))
        data = Batches(config.data, config.training.micro_batches, config.training.steps)
        leave_out_batches(data, read_rewinds(folder))
        hosts.check_equal_on_hosts({"the content of data.mixture": data.fingerprint()})
        check_kind(config, data)
        check_vocabulary(config, data)
        check_epochs(count_use(config.data, config.training.steps))
        if newest is None:
            init_from.check_tokenizer(config, data)
        if newest is not None and finished:
            checkpoints.remove_leftovers()
            if local:
                local.remove()
            print_status(f"{folder} is finished: {newest} steps are done, no step remains")
            # A run that was killed between its last checkpoint and its end has no figure.
            if hosts.is_host_zero() and not (folder / "loss.png").exists():
                draw_figure(folder, data, newest)
            return _outcome(folder, newest, data, finished=True)
        with ledger.during("restoring"):
            state = TrainingState(config, data, checkpoints, local)
        if state.step:
            print_status(f"{folder}: resumes after step {state.step} of {config.training.steps}")
        hosts.broadcast_decision(lambda: write_run_files(config, data, folder, state.step))
        print_summary(config, mesh, state.step)
        with ledger.during("compiling"):
            step_function = compile_step(config, data, state)
        profiler = Profiler(folder, config.training.profile)
        with (
            _record_stop_signals() as stop,
            profiler.on_request(),
            contextlib.closing(ledger),
            contextlib.closing(checkpoints),
            contextlib.closing(local) if local else contextlib.nullcontext(),
        ):
            finished = _train(
                config,
                folder,
                data,
                checkpoints,
                local,
                ledger,
                profiler,
                state,
                step_function,
                stop,
                sample,
                evaluate,
            )
        if finished and local:
            local.remove()
        return _outcome(folder, state.step, data, finished)


def compile_step(config: Config, data: Batches, state: TrainingState) -> Any:
    """Returns the training step, compiled for the devices of this run."""
    start = time.monotonic()
    batch, step = data.train(state.step), np.int32(state.step)
    gate = Gate(np.zeros(2, np.float32), np.bool_(False))
    example = (state.trained, state.opt_state, batch, step, state.base, gate)
    chip = chip_of(jax.devices()[0].device_kind)
    options: Any = {**chip.compiler_options} if chip else {}
    step_function = train_step.lower(config.program, *example).compile(compiler_options=options)
    print_status(f"compiled in {format_duration(time.monotonic() - start)}")
    return step_function


def _train(
    config: Config,
    folder: AnyPath,
    data: Batches,
    checkpoints: TrainingCheckpoints,
    local: LocalCheckpoints | None,
    ledger: Ledger,
    profiler: Profiler,
    state: TrainingState,
    step_function: Any,
    stop: list[str],
    sample: Sample | None,
    evaluate: Evaluate | None,
) -> bool:
    """Runs the remaining steps; returns whether all are done.

    Args:
        stop: signals received so far; the first one stops the run.
    """
    steps, first = config.training.steps, state.step
    report = Report(config, folder, data, first, ledger)
    recorder = FlightRecorder(config, folder, data, checkpoints, local, state, report, ledger)
    pending: tuple[int, StepMetrics] | None = None  # of the step that the device computes
    dispatched = first  # with those that are dispatched again after a spike
    with contextlib.closing(report), report.watchdog.delaying_gloo_errors():
        while state.step < steps:
            ledger.enter_step(state.step + 1)
            checkpoints.check()
            if reason := hosts.stop_before(dispatched, stop[0] if stop else None):
                print_status(f"stopping on {reason}: saving step {state.step} …")
                break
            step = state.step
            profiler.before_step(step + 1)
            report.record_dispatch()
            batch = data.train(step)
            report.record_batch(pending[1] if pending else None)
            state.trained, state.opt_state, metrics = step_function(
                state.trained, state.opt_state, batch, np.int32(step), state.base, recorder.gate()
            )
            recorder.record_dispatch(metrics)
            report.record_computing()
            state.step, dispatched = step + 1, dispatched + 1
            profiler.after_step(state.step, metrics)
            # The device computes this step while the host reads the metrics of the previous one.
            previous, pending = pending, (state.step, metrics)
            if previous and not recorder.end_step(*previous):
                pending = None  # this step was held too
                continue
            validate = state.step == steps or is_due(state.step, config.training.eval_every)
            save = state.step == steps or is_due(state.step, config.checkpoint.every)
            tasks_every = config.training.evaluate.every if config.training.evaluate else 0
            on_tasks = evaluate and (state.step == steps or is_due(state.step, tasks_every))
            local_every = config.checkpoint.local.every if config.checkpoint.local else 0
            save_local = is_due(state.step, local_every) and not save
            check = is_due(state.step, config.training.check_every)
            # After a skipped step, read each step's metrics at once: the run may have to stop.
            # A checkpoint also needs the metrics up to its step in metrics.jsonl.
            read_now = (
                check or validate or on_tasks or save or save_local or state.step == first + 1
            )
            if read_now or report.skipped_in_a_row:
                recorder.end_step(*pending)
                pending = None
            if state.step <= step:  # this step was held: the run continues before it
                continue
            if check or validate or on_tasks:
                ledger.enter("evaluating")
            if check:
                check_devices(config, state.step, state.trained, state.opt_state, batch, state.base)
            if validate:
                means = held_out_means(config, data, state.step, state.trained, state.base)
                report.validation(state.step, means)
                if sample:
                    sample(complete_model(config, state.trained, state.base), state.step)
            if evaluate and on_tasks:
                model = complete_model(config, state.trained, state.base)
                report.evaluation(state.step, evaluate(model))
            if save or save_local:
                ledger.enter("saving")
            # The metrics first: a run that is killed now must find those of its last checkpoint.
            if save or report.skipped_in_a_row >= config.training.max_skipped:
                report.upload()
                checkpoints.save(state.progress, state.trained, state.opt_state)
            elif local and save_local:
                report.upload()
                local.save(state.progress, state.trained, state.opt_state)
            if report.skipped_in_a_row >= config.training.max_skipped:
                or_a_spike = ", or was a spike," if config.training.on_spike == "skip" else ""
                raise RunStopped(
                    f"the gradient was not finite{or_a_spike} in {report.skipped_in_a_row} steps in"
                    f" a row, up to step {state.step}: these steps changed no weights, and the"
                    f" state is saved in {folder}; check the data, or lower optimizer.peak_lr in a"
                    " new run"
                )
        if pending:
            recorder.end_step(*pending)
        ledger.enter("saving")
        if state.step < steps:
            report.upload()
            checkpoints.save(state.progress, state.trained, state.opt_state)
    return state.step >= steps


def _outcome(folder: AnyPath, step: int, data: Batches, finished: bool) -> RunOutcome:
    losses = [
        record["validation_loss"]
        for record in read_metrics(folder / "metrics.jsonl")
        if record.get("validation_loss") is not None
    ]
    last = losses[-1] if losses else None
    return RunOutcome(folder, step, finished, last, data.unigram_entropy(step))


@contextlib.contextmanager
def _record_stop_signals() -> Iterator[list[str]]:
    """Yields a list of the SIGTERM and SIGINT received so far; a second one kills the process."""
    received: list[str] = []

    def record(number: int, _: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(signal.Signals(number).name)

    previous = {s: signal.signal(s, record) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
