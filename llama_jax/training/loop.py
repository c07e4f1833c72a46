"""A training run from its configuration to its last checkpoint, resumed wherever it stopped."""

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from llama_jax import checkpoint, hosts, stop_signal
from llama_jax.checkpoint import Progress, TrainingCheckpoints
from llama_jax.chips import chip_of
from llama_jax.config import Config
from llama_jax.data import corpus
from llama_jax.data.batches import Batches
from llama_jax.errors import InputError
from llama_jax.model.transformer import Llama
from llama_jax.sharding import check_divides, make_mesh, set_default_mesh
from llama_jax.training import origin
from llama_jax.training.memory import keep_freed_memory
from llama_jax.training.metrics import check_installed, read_metrics
from llama_jax.training.optimizer import adamw
from llama_jax.training.progress import duration, tell
from llama_jax.training.report import Report, due
from llama_jax.training.run_folder import check_unchanged, flat, only_run, write_run_files
from llama_jax.training.step import StepMetrics, eval_step, init_state, train_step
from llama_jax.tree import abstract


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
    keep_freed_memory()
    if hosts.leads():
        check_installed(config.logging)
    hosts.agreed(dict(flat(dataclasses.asdict(config))) | {"JAX's version": jax.__version__})
    mesh = make_mesh(config.mesh)
    rows = config.data.batch_size // config.training.micro_batches
    check_divides(mesh, config.model, rows, config.data.seq_len)
    folder = Path(config.training.out)
    with only_run(folder), jax.set_mesh(mesh):
        checkpoints = TrainingCheckpoints(folder / "checkpoints", config.checkpoint)
        newest = hosts.decided(lambda: max(checkpoints.steps, default=None))
        hosts.decided(lambda: _prepare(config, folder, newest))
        data = Batches(config.data, config.training.micro_batches)
        hosts.agreed({"the content of data.mixture": data.fingerprint})
        _check_tokenizer(config, data)
        if newest is None:
            origin.check_tokenizer(config, data)
        if newest is not None and newest >= config.training.steps:
            tell(f"{folder} is finished: {newest} steps are done, nothing is left to train")
            return _outcome(folder, newest, data, finished=True)
        state = _State(config, data, checkpoints, newest)
        hosts.decided(lambda: write_run_files(config, data, folder))
        _tell_run(config, data, mesh, state.step)
        step_function = _compiled(config, data, state)
        with _stop_signals() as stop, contextlib.closing(checkpoints):
            finished = _train(config, folder, data, checkpoints, state, step_function, stop)
        return _outcome(folder, state.step, data, finished)


def _prepare(config: Config, folder: Path, newest: int | None) -> None:
    """Does what must be done once before the run goes on from its checkpoint `newest`."""
    if newest is not None:
        check_unchanged(config, folder)
    else:
        if (folder / "config.yaml").exists():
            tell(f"{folder} has no checkpoint yet: the run starts from the beginning")
        origin.check_shape(config)
    with stop_signal.unwinding():
        prepare_data(config)


def initial_state(config: Config) -> tuple[Llama, optax.OptState]:
    """Returns the weights that a run begins with, and the optimizer's state for them.

    The weights are those of `training.init_from`, or drawn with `training.seed`. Layers are
    stacked, as training wants them. Where no mesh is set, it sets that of `config.mesh` for good.

    >>> model, opt_state = lj.initial_state(run)
    >>> model.layers.wq.shape  # L, D, N, H
    (2, 32, 8, 8)

    Raises:
        InputError: the mesh doesn't divide the model, or as `checkpoint.load_model`.
    """
    set_default_mesh(partial(make_mesh, config.mesh))
    check_divides(jax.sharding.get_mesh(), config.model)
    source = config.training.init_from
    if source is None:
        return jax.jit(partial(init_state, config))(jax.random.key(config.training.seed))
    tell(f"starts from the weights in {source}")
    _, model = checkpoint.load_model(source, config.model)
    return model, jax.jit(adamw(config.optimizer).init)(model)


class _State:
    """Weights, optimizer state and the number of steps done: fresh, or restored."""

    def __init__(
        self, config: Config, data: Batches, checkpoints: TrainingCheckpoints, step: int | None
    ):
        self.step = 0
        if step is not None:
            model, opt_state = abstract(partial(init_state, config), jax.random.key(0))
            progress, self.model, self.opt_state = checkpoints.restore(step, model, opt_state)
            self.step = progress.step
            if progress.data != data.fingerprint:
                raise InputError(
                    f"the data in {', '.join(config.data.mixture)} are not those that the run"
                    f" {config.training.out} was trained on: restore them, or choose another"
                    " training.out"
                )
            tell(f"{config.training.out}: resumes after step {step} of {config.training.steps}")
        else:
            self.model, self.opt_state = initial_state(config)


def _compiled(config: Config, data: Batches, state: _State) -> Any:
    """Returns the training step, compiled for the chip that is there."""
    begun = time.monotonic()
    example = (state.model, state.opt_state, data.train(state.step), np.int32(state.step))
    chip = chip_of(jax.devices()[0].device_kind)
    options: Any = {**chip.options} if chip else {}
    step_function = train_step.lower(config, *example).compile(compiler_options=options)
    tell(f"compiled in {duration(time.monotonic() - begun)}")
    return step_function


def _train(
    config: Config,
    folder: Path,
    data: Batches,
    checkpoints: TrainingCheckpoints,
    state: _State,
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
                tell(f"stopping on {why}: saving step {state.step} …")
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


def _validate(config: Config, data: Batches, state: _State) -> float:
    """Returns the mean loss over the held-out batches [nats per token]."""
    nll, targets = 0.0, 0
    batches = data.validation_batches(config.training.eval_batches)
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


def prepare_data(config: Config) -> None:
    """Tokenizes `data.corpus` into the folder of `data.mixture`, where that is not there yet.

    Raises:
        InputError: the folder is missing and there is no corpus to make it from.
    """
    for name in config.data.mixture:
        if Path(name).exists():
            continue
        if not config.data.corpus:
            raise InputError(
                f"there is no folder of token shards at {name}: make it with `llama-jax tokenize`,"
                " or set data.corpus"
            )
        tell(f"{name} is not there yet: making it from {', '.join(config.data.corpus)}")
        meta = corpus.build(
            config.data.corpus,
            name,
            n_vocab=config.model.vocab_size,
            tokenizer=origin.tokenizer_of(config),
            validation_fraction=config.data.validation_fraction,
            progress=config.logging.progress,
        )
        train, held_out = (meta["splits"][split] for split in corpus.SPLITS)
        tell(f"{name}: {train['tokens']:,} tokens to train on, {held_out['tokens']:,} held out")


def _check_tokenizer(config: Config, data: Batches) -> None:
    hashes = {tokens.meta["tokenizer_sha256"] for tokens in data.splits["train"]}
    if len(hashes) > 1:
        raise InputError(
            "the folders of data.mixture were made with different tokenizers: tokenize them with"
            " one (`llama-jax tokenize --tokenizer`)"
        )
    n_vocab = data.splits["train"][0].meta["n_vocab"]
    if n_vocab > config.model.vocab_size:
        raise InputError(
            f"the tokenizer of {next(iter(config.data.mixture))} has {n_vocab} tokens, but"
            f" model.vocab_size is {config.model.vocab_size}: set it to {n_vocab} or more"
        )


def _tell_run(config: Config, data: Batches, mesh: jax.sharding.Mesh, step: int) -> None:
    devices = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    tokens = config.data.batch_size * config.data.seq_len
    of_hosts = f" of {jax.process_count()} hosts" if hosts.several() else ""
    kind = jax.devices()[0].device_kind + " device(s)" + of_hosts
    tell(
        f"{config.model.n_params:,} parameters on {jax.device_count()} {kind}"
        f" ({devices}); {config.training.steps - step:,} steps of {tokens:,} tokens"
    )
    for source in data.splits["train"]:
        epochs = config.training.steps * tokens / len(source)
        share = config.data.mixture[str(source.folder)] / sum(config.data.mixture.values())
        tell(f"{source.folder}: {len(source):,} tokens, {share * epochs:.2f} epochs in this run")


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
