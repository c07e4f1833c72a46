"""Before step 1: prepares and checks the data, and initializes or restores the state."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from llama_jax.checkpoint import folders, model_folders
from llama_jax.checkpoint.local_checkpoints import LocalCheckpoints
from llama_jax.checkpoint.model_folders import manifest_hash
from llama_jax.checkpoint.training_checkpoints import Progress, TrainingCheckpoints
from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.run import Config
from llama_jax.data import tokenize
from llama_jax.data.batches import LEFT_OUT, Batches, check_order
from llama_jax.data.source_use import count_use, describe_phases
from llama_jax.data.text_files import SPLITS
from llama_jax.errors import InputError
from llama_jax.model.lora import Trained
from llama_jax.model.weights import Llama, quantize_model
from llama_jax.parallel.mesh import check_divides, make_mesh, set_default_mesh
from llama_jax.runtime import hosts, stop_signal
from llama_jax.runtime.atomic_write import is_written
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import AnyPath, parse_path
from llama_jax.training import init_from
from llama_jax.training.events import EVENTS
from llama_jax.training.optimizer import adamw
from llama_jax.training.run_folder import check_unchanged
from llama_jax.training.schedule_change import print_schedule_change
from llama_jax.training.spike_limits import SpikeLimits
from llama_jax.training.step import init_state
from llama_jax.training.trainable import initial_key


def make_run_mesh(config: Config) -> jax.sharding.Mesh:
    """Returns the mesh of a run.

    Raises:
        InputError: it doesn't divide the devices, the model or the batch.
    """
    mesh = make_mesh(config.mesh)
    rows = config.data.batch_size // config.training.micro_batches
    check_divides(mesh, config.model, rows, config.data.seq_len)
    return mesh


def prepare(config: Config, folder: AnyPath, saved_steps: list[int]) -> None:
    """Checks the run folder and prepares the data, once for all hosts.

    Args:
        config: of the run.
        folder: of the run.
        saved_steps: the steps of the run's checkpoints.

    Raises:
        InputError: the run can't start or resume with this configuration.
    """
    if saved_steps:
        print_schedule_change(config, check_unchanged(config, folder), saved_steps)
    elif (folder / "config.yaml").exists():
        print_status(f"{folder} has no checkpoint yet: the run starts from the beginning")
    if config.has_base or not saved_steps:
        init_from.check_shape(config)
    with stop_signal.raise_at_sigterm():
        prepare_data(config)


def initial_state(config: Config) -> tuple[Trained, optax.OptState]:
    """Returns what a run trains, as it is at the start, and its optimizer state.

    These are the weights of `training.init_from`, or drawn with `training.seed`; or with
    `config.lora` the pairs, drawn with `lora.seed`. Layers are stacked, as in training. If no mesh
    is set, that of `config.mesh` is set permanently.

    >>> model, opt_state = lj.initial_state(run)
    >>> model.layers.wq.shape  # L, D, N, H
    (2, 32, 8, 8)

    Raises:
        InputError: the mesh doesn't divide the model, or as `checkpoint.load_model`.
    """
    _set_mesh(config)
    source = config.training.init_from
    if source is None or config.lora:
        # The program runs once, and LLVM's full optimization takes longer than that: 4.8 and 0.1 s
        # for the quickstart. Level 1 takes 1.5 s, and computed the same bits.
        key, on_cpu = initial_key(config), jax.default_backend() == "cpu"
        options: Any = {"xla_backend_optimization_level": 1} if on_cpu else {}
        return init_state.lower(config.program, key).compile(options)(key)
    print_status(f"starts from the weights in {source}")
    _, model = model_folders.load_model(source, config.model)
    return model, jax.jit(adamw(config.optimizer).init)(model)


def load_base(config: Config) -> Llama | None:
    """Returns the frozen weights of a run of LoRA or DPO, those of `training.init_from`; else None.

    They are quantized here if `model.quantized` is int8 and the folder's weights are not.

    Raises:
        InputError: as `initial_state`.
    """
    if not config.has_base:
        return None
    _set_mesh(config)
    source = str(config.training.init_from)
    stored = folders.read_model_config(source).quantized
    as_stored = replace(config.model, quantized=stored)
    if config.lora:
        print_status(f"trains pairs of rank {config.lora.rank} beside the weights in {source}")
    if config.training.objective == "dpo":
        print_status(f"the reference of DPO is the model in {source}")
    _, base = model_folders.load_model(source, as_stored)
    if config.model.quantized != stored:
        _, base = quantize_model(as_stored, base)
    return base


def _set_mesh(config: Config) -> None:
    set_default_mesh(partial(make_mesh, config.mesh))
    check_divides(jax.sharding.get_mesh(), config.model)


class TrainingState:
    """What the run trains, its optimizer state and the number of steps done.

    Args:
        config: of the run.
        data: of the run.
        checkpoints: of the run; the newest is restored. Without one the state is initialized.
        local: checkpoints on the hosts' own disks, of later steps; preferred if they are usable.

    Attributes:
        trained: all weights, or the pairs of a LoRA run.
        base: the frozen weights of a run of LoRA or DPO, otherwise None.
        spike_limits: limits of the loss and the gradient norm.

    Raises:
        InputError: the checkpoint was trained on other data, or beside other weights.
    """

    step: int
    trained: Any
    opt_state: Any
    spike_limits: SpikeLimits

    def __init__(
        self,
        config: Config,
        data: Batches,
        checkpoints: TrainingCheckpoints,
        local: LocalCheckpoints | None,
    ):
        self._config, self._data, self._base_hash = config, data, None
        source = config.training.init_from
        if config.has_base:
            self._base_hash = hosts.broadcast_decision(lambda: manifest_hash(str(source)))
        progress = self.restore(checkpoints, local)
        if progress:
            _check_data(config, progress, data.fingerprint(self.step))
            if progress.base != self._base_hash:
                raise InputError(
                    f"the weights in {source}, training.init_from, are not those with which"
                    f" {config.training.out} was trained: restore them, or choose another"
                    " training.out"
                )
        self.base = load_base(config)

    def restore(
        self, checkpoints: TrainingCheckpoints, local: LocalCheckpoints | None = None
    ) -> Progress | None:
        """Restores the newest checkpoint, or initializes the state if there is none.

        The arguments are those of the class. Returns the metadata of the checkpoint, if any.
        """
        self.trained = self.opt_state = None  # frees their memory
        like = eval_shape_on_mesh(partial(init_state, self._config.program), jax.random.key(0))
        restored = local.restore_newest(*like) if local else None
        if restored is None and checkpoints.steps:
            restored = checkpoints.restore_newest(*like)
        progress = None
        if restored:
            progress, self.trained, self.opt_state = restored
        else:
            self.trained, self.opt_state = initial_state(self._config)
        self.step = progress.step if progress else 0
        self.spike_limits = SpikeLimits(
            self._config.training.spike_threshold, progress.recent if progress else None
        )
        return progress

    def limits(self, step: int) -> np.ndarray:
        """Returns the limits of the loss and gradient norm of a step (1 is the first)."""
        return self.spike_limits.limits(step, self._data.phase_start(step - 1) + 1)

    @property
    def progress(self) -> Progress:
        """The metadata of a checkpoint of this state."""
        fingerprint = self._data.fingerprint(self.step)
        return Progress(self.step, fingerprint, self._base_hash, self.spike_limits.recent)


def _check_data(config: Config, progress: Progress, fingerprint: list[str]) -> None:
    """Compares the data of the steps done with those of the configuration.

    Args:
        config: of the run, from now on.
        progress: of the checkpoint from which the run resumes.
        fingerprint: of as many steps of the configuration's data.

    Raises:
        InputError: they differ, in content or in order.
    """
    check_order(config.training.out, progress.data)
    if progress.data == fingerprint:
        return
    saved, now = (
        [p for p in parts if p.startswith(LEFT_OUT)] for parts in (progress.data, fingerprint)
    )
    if saved != now:
        raise InputError(
            f"{config.training.out} was trained {', '.join(saved) or 'with all batches'}, but"
            f" its {EVENTS} says {', '.join(now) or 'that none was left out'}: restore this file,"
            " or choose another training.out"
        )
    saved, now = (
        {p.partition(":")[2] for p in parts} - {""} for parts in (progress.data, fingerprint)
    )
    if saved == now:  # the hashes, without the shares and the phases
        raise InputError(
            f"{config.training.out} was trained with other shares of its sources in the first"
            f" {progress.step} steps than data.mixture and data.phases have now, or in another"
            f" order: restore them (a phase may change or begin after step {progress.step}), or"
            " choose another training.out"
        )
    raise InputError(
        f"the data in {', '.join(config.data.folders)} differ from those that the run"
        f" {config.training.out} was trained on: restore them, or choose another training.out"
    )


def prepare_data(config: Config) -> None:
    """Tokenizes `data.corpus` into the folder of `data.mixture`, if that doesn't exist.

    Raises:
        InputError: the folder is missing and `data.corpus` is empty.
    """
    for name in config.data.folders:
        if is_written(parse_path(name)):
            continue
        if not config.data.corpus:
            raise InputError(
                f"there is no folder of token shards at {name}: create it with `llama-jax"
                " tokenize`, or set data.corpus"
            )
        print_status(f"{name} does not exist yet: tokenizing {', '.join(config.data.corpus)}")
        meta = tokenize.tokenize_corpus(
            config.data.corpus,
            name,
            n_vocab=config.model.vocab_size,
            tokenizer=init_from.tokenizer_source(config),
            validation_fraction=config.data.validation_fraction,
            progress=config.logging.progress,
        )
        train, held_out = (meta["splits"][split] for split in SPLITS)
        print_status(
            f"{name}: {train['tokens']:,} tokens to train on, {held_out['tokens']:,} held out"
        )


def check_evaluator(config: Config, evaluate: object) -> None:
    """Checks that a run whose configuration has tasks got the function that evaluates them.

    Raises:
        InputError: it got none.
    """
    if config.training.evaluate and evaluate is None:
        raise InputError(
            "training.evaluate needs a function that evaluates: start the run with `llama-jax"
            " train`, or pass llama_jax.evaluation.in_training.evaluator(config)"
        )


def check_kind(config: Config, data: Batches) -> None:
    """Compares the kind of the data with the objective.

    Raises:
        InputError: the objective is dpo and the data are no preferences, or vice versa.
    """
    for tokens in data.splits["train"]:
        if config.training.objective == "dpo" and tokens.kind != "preferences":
            raise InputError(
                f"training.objective is dpo, but {tokens.folder} contains {tokens.kind}: give a"
                " folder that `llama-jax tokenize --chat` created from rows with prompt, chosen and"
                " rejected"
            )
        if config.training.objective != "dpo" and tokens.kind == "preferences":
            raise InputError(
                f"{tokens.folder} contains preferences: set training.objective to dpo, or give a"
                " folder of texts or chats"
            )


def check_vocabulary(config: Config, data: Batches) -> None:
    """Compares the vocabulary of the data with that of the model.

    Raises:
        InputError: the folders of the mixture have different tokenizers, or a larger vocabulary
            than the model.
    """
    hashes = {tokens.meta["tokenizer_sha256"] for tokens in data.splits["train"]}
    if len(hashes) > 1:
        raise InputError(
            "the folders of data.mixture have different tokenizers: tokenize them with the same one"
            " (`llama-jax tokenize --tokenizer`)"
        )
    n_vocab = data.splits["train"][0].meta["n_vocab"]
    if n_vocab > config.model.vocab_size:
        raise InputError(
            f"the tokenizer of {next(iter(config.data.mixture))} has {n_vocab} tokens, but"
            f" model.vocab_size is {config.model.vocab_size}: set it to {n_vocab} or more"
        )


def _describe_parameters(config: Config) -> str:
    n_params = config.model.n_params
    if config.lora is None:
        return f"{n_params:,} parameters"
    pairs, storage = config.lora.n_params(config.model), config.model.weight_dtype
    return f"{pairs:,} trained parameters ({pairs / n_params:.2%} of {n_params:,} in {storage})"


def print_summary(config: Config, mesh: jax.sharding.Mesh, step: int) -> None:
    """Prints the parameters, devices, steps and epochs of a run."""
    devices = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    tokens = config.data.batch_size * config.data.seq_len
    of_hosts = f" of {jax.process_count()} hosts" if hosts.is_multi_host() else ""
    kind = jax.devices()[0].device_kind + " device(s)" + of_hosts
    print_status(
        f"{_describe_parameters(config)} on {jax.device_count()} {kind}"
        f" ({devices}); {config.training.steps - step:,} steps of {tokens:,} tokens"
    )
    for use in count_use(config.data, config.training.steps):
        print_status(f"{use.folder}: {use.tokens:,} tokens, {use.epochs:.2f} epochs in this run")
    for line in describe_phases(config.data):
        print_status(line)
