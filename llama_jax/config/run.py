"""A run's whole configuration: frozen dataclasses whose fields carry their own manual."""

import dataclasses
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from llama_jax.config.model import STRICT, ModelConfig, PositiveFloat, PositiveInt
from llama_jax.runtime.storage import check_local

NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
AxisSize = Annotated[int, Field(ge=-1, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
StrictBool = Annotated[bool, Field(strict=True)]
LocalPath = Annotated[str, AfterValidator(check_local)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """How many devices along each axis of the mesh; -1 for one axis that takes the rest."""

    data: AxisSize = Field(default=1, description="replicas of the weights, across slices or nodes")
    fsdp: AxisSize = Field(default=-1, description="parts that weights and batch are split into")
    context: AxisSize = Field(default=1, description="parts that each window is split into")
    tensor: AxisSize = Field(
        default=1, description="parts that heads, FFN and vocabulary are split into"
    )

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        if 0 in (self.data, self.fsdp, self.context, self.tensor):
            raise ValueError("the size of an axis is at least 1, or -1 to fill")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What is trained on: folders of token shards, and the corpus to make one from."""

    mixture: Annotated[
        dict[LocalPath, PositiveFloat],
        Field(description="folder of token shards (made by `llama-jax tokenize`): sampling weight"),
    ] = dataclasses.field(hash=False)  # a dict has no hash; a Config needs one
    corpus: tuple[LocalPath, ...] = Field(
        default=(),
        description="files, folders or globs of text and JSONL (.gz, .zst) to fill the one folder"
        " of `mixture` from when it is not there yet; python-stdlib is Python's own sources",
    )
    tokenizer: LocalPath | None = Field(
        default=None,
        description="tokenizer (file or folder) to use for `corpus`; null takes that of"
        " training.init_from, or trains one on it",
    )
    validation_fraction: Fraction = Field(
        default=0.05, description="share of the documents of `corpus` that is held out"
    )
    seq_len: PositiveInt = Field(
        default=2048, description="T, length of a training window [tokens]"
    )
    batch_size: PositiveInt = Field(description="windows in one optimizer step, over all devices")
    isolate_documents: StrictBool = Field(
        default=True,
        description="documents in a window don't see each other, and no loss is taken on the"
        " first token of one; false reads a window as one text",
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the order of the windows")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are the paper's (arXiv 2302.13971, section 2.3)."""

    peak_lr: PositiveFloat = Field(default=3e-4, description="learning rate after warm-up")
    warmup_steps: NonNegativeInt = Field(default=2000, description="steps of linear warm-up")
    final_lr_fraction: Fraction = Field(
        default=0.1, description="learning rate of the last step, over the peak (cosine in between)"
    )
    b1: Fraction = Field(default=0.9, description="decay of the first moment")
    b2: Fraction = Field(default=0.95, description="decay of the second moment")
    eps: PositiveFloat = Field(
        default=1e-8, description="Adam's epsilon (the paper doesn't state its own)"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="decay of the matrices; norm scales are exempt"
    )
    clip_norm: PositiveFloat = Field(default=1.0, description="largest global norm of the gradient")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """How long, from where, and in what pieces."""

    out: LocalPath = Field(
        description="run folder, made if missing, resumed if it holds checkpoints"
    )
    init_from: LocalPath | None = Field(
        default=None,
        description="model folder (or run folder) whose weights the run starts from while it has no"
        " checkpoint of its own; null draws fresh weights",
    )
    steps: PositiveInt = Field(description="optimizer steps of the whole run")
    micro_batches: PositiveInt = Field(
        default=1, description="pieces a batch is computed in, one after another, to save memory"
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of log² Z in the objective (1e-4 is usual; 0 is off)"
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the fresh weights")
    max_skipped: PositiveInt = Field(
        default=10,
        description="steps in a row with a non-finite gradient after which the run stops",
    )
    eval_every: NonNegativeInt = Field(
        default=1000, description="steps between validations (0: at the end only)"
    )
    eval_batches: PositiveInt = Field(
        default=20, description="largest number of batches in a validation"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: PositiveInt = Field(
        default=1000, description="steps between checkpoints (the last is always saved)"
    )
    keep: PositiveInt = Field(default=3, description="newest checkpoints that are kept")
    keep_every: PositiveInt | None = Field(
        default=None,
        description="steps: checkpoints at multiples of this are kept for ever; null for none",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingConfig:
    """What the run tells, and where."""

    every: PositiveInt = Field(default=1, description="steps between lines of metrics.jsonl")
    progress: StrictBool = Field(default=True, description="a progress bar on standard error")
    tensorboard: StrictBool = Field(default=True, description="TensorBoard files in the run folder")
    wandb: str | None = Field(default=None, description="Weights & Biases project; null for none")
    peak_tflops: PositiveFloat | None = Field(
        default=None, description="peak of one device, for MFU [TFLOP/s]; null looks the device up"
    )
    samples: tuple[str, ...] = Field(
        default=(), description="prompts that are continued at the end"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One run's whole configuration. Sections may be given as dicts.

    >>> small = lj.Config(
    ...     model=config,
    ...     data={"mixture": {"data/tiny": 1}, "seq_len": 16, "batch_size": 4},
    ...     training={"out": "runs/small", "init_from": "models/tiny", "steps": 2},
    ... )
    >>> small.optimizer.weight_decay
    0.1
    """

    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.data.batch_size % self.training.micro_batches:
            raise ValueError(
                f"training.micro_batches ({self.training.micro_batches}) must divide"
                f" data.batch_size ({self.data.batch_size})"
            )
        if self.data.seq_len > self.model.context:
            raise ValueError(
                f"data.seq_len ({self.data.seq_len}) is longer than model.context"
                f" ({self.model.context})"
            )
        if self.model.param_dtype != "float32":
            raise ValueError(
                f"model.param_dtype {self.model.param_dtype} is for inference alone (small updates"
                " vanish in it): take float32; what is computed with follows model.dtype"
            )
        if self.model.quantized != "none":
            raise ValueError(
                f"model.quantized {self.model.quantized} is for inference alone (no gradient"
                " reaches whole numbers): leave it out"
            )
        if not self.data.mixture:
            raise ValueError("data.mixture must name at least one folder of token shards")
        if self.data.corpus and len(self.data.mixture) != 1:
            raise ValueError(
                "data.corpus fills one folder, but data.mixture names"
                f" {len(self.data.mixture)}: tokenize each with `llama-jax tokenize` instead"
            )
        return self
