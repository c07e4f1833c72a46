"""The configuration of a run: frozen dataclasses whose fields have descriptions."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from llama_jax.config.data import DataConfig, Fraction, StoragePath
from llama_jax.config.evaluate import EvaluateConfig
from llama_jax.config.lora import LoraConfig
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.model import (
    STRICT,
    ModelConfig,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictBool,
)
from llama_jax.runtime.storage import parse_path


def _check_local(path: str) -> str:
    if not isinstance(parse_path(path), Path):
        raise ValueError(f"{path} is a bucket: give a folder on a disk or RAM disk of each host")
    return path


LocalPath = Annotated[StoragePath, AfterValidator(_check_local)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are LLaMA's (arXiv 2302.13971, section 2.3)."""

    schedule: Literal["cosine", "wsd"] = Field(
        default="cosine",
        description="learning rate after the warm-up: cosine falls until the last of"
        " training.steps; wsd (warm-up, stable, decay; MiniCPM, arXiv 2404.06395, section 4) stays"
        " at peak_lr and falls in the last decay_steps, so a run can be extended",
    )
    peak_lr: PositiveFloat = Field(default=3e-4, description="learning rate after warm-up")
    warmup_steps: NonNegativeInt = Field(default=2000, description="steps of linear warm-up")
    final_lr_fraction: Fraction = Field(
        default=0.1,
        description="learning rate of the last step divided by peak_lr (for wsd: if it decays)",
    )
    decay_steps: NonNegativeInt = Field(
        default=0,
        description="for wsd: number of last steps in which the learning rate falls from peak_lr to"
        " final_lr_fraction of it, as 1 - sqrt (Hägele et al., arXiv 2405.18392, section 3, who use"
        " 20 % of the steps); 0: no decay",
    )
    b1: Fraction = Field(default=0.9, description="decay rate of the first moment")
    b2: Fraction = Field(default=0.95, description="decay rate of the second moment")
    eps: PositiveFloat = Field(
        default=1e-8, description="epsilon of Adam (LLaMA's paper doesn't state it)"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="weight decay of the matrices; norm scales have none"
    )
    clip_norm: PositiveFloat = Field(default=1.0, description="largest global norm of the gradient")

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(
                f"decay_steps ({self.decay_steps}) is for the schedule wsd: set schedule to wsd, or"
                " omit decay_steps (cosine decays in all steps after the warm-up)"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """Length, initial weights, objective, validation and supervision of a run."""

    out: StoragePath = Field(
        description="run folder; it is created if it is missing, and resumed if it has checkpoints"
    )
    init_from: StoragePath | None = Field(
        default=None,
        description="model folder or run folder with the initial weights, used until the run has a"
        " checkpoint (with `lora` or the objective dpo always: its weights are the frozen base, the"
        " reference); null: random weights",
    )
    steps: PositiveInt = Field(description="optimizer steps of the complete run")
    micro_batches: PositiveInt = Field(
        default=1,
        description="parts of a batch that are computed one after another, to save memory",
    )
    objective: Literal["next_token", "dpo"] = Field(
        default="next_token",
        description="what the run minimizes: the cross-entropy of the next token, or DPO's loss"
        " (arXiv 2305.18290) on preference data, with the model in init_from as reference",
    )
    dpo_beta: PositiveFloat = Field(
        default=0.1, description="for dpo: β, which holds the model near the reference"
    )
    dpo_sft_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="for dpo: weight of the mean cross-entropy of the chosen answers in the loss",
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="weight of log² Z in the loss (1e-4 is common; 0: off)"
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the random weights")
    max_skipped: PositiveInt = Field(
        default=10,
        description="number of consecutive skipped steps, or of rewinds to one checkpoint, after"
        " which the run stops",
    )
    on_spike: Literal["record", "skip", "rewind"] = Field(
        default="record",
        description="what happens at a spike of the loss or gradient norm, besides its record in"
        " spikes/: record: nothing; skip: the step changes no weights; rewind: back to the last"
        " checkpoint, and on without the batches of up to 100 steps that end with this one",
    )
    spike_threshold: Annotated[float, Field(ge=0)] = Field(
        default=7.0,
        description="a spike is this many standard deviations above the median of the last 128"
        " steps (1.4826 MAD; OLMo 2, arXiv 2501.00656, counts spikes from 7 on); 0: nothing is one",
    )
    eval_every: NonNegativeInt = Field(
        default=1000, description="steps between validations (0: only at the end)"
    )
    eval_batches: PositiveInt = Field(
        default=20,
        description="maximum number of batches per validation; they are divided among the sources"
        " of the mixture, at least one each",
    )
    evaluate: EvaluateConfig | None = Field(
        default=None,
        description="evaluate the model on tasks of lm-evaluation-harness during the run; null:"
        " don't",
    )
    watchdog: Annotated[float, Field(ge=0)] = Field(
        default=20.0,
        description="a step that takes longer than this multiple of the median, and than 180 s,"
        " ends the run with exit code 75, and so does a host that doesn't answer; 0: neither",
    )
    check_every: NonNegativeInt = Field(
        default=0,
        description="steps between comparisons of the devices: replicas of the state, and a loss"
        " and gradient of the same rows (0: never)",
    )
    profile: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None,
        description="first and last step of which a trace of jax.profiler is written into the run"
        " folder; null: none, except for SIGUSR1",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if self.profile and not self.profile[0] <= self.profile[1] <= self.steps:
            raise ValueError(
                f"profile ({self.profile[0]}, {self.profile[1]}): give the first and the last step,"
                f" of 1 to steps ({self.steps})"
            )
        if self.objective == "dpo" and self.init_from is None:
            raise ValueError(
                "objective dpo needs init_from: the model to train, which is also the reference"
            )
        if self.objective == "dpo" and self.z_loss:
            raise ValueError(f"z_loss ({self.z_loss}) is for the objective next_token: omit it")
        if self.objective != "dpo" and self.dpo_sft_weight:
            raise ValueError(
                f"dpo_sft_weight ({self.dpo_sft_weight}) is for the objective dpo: set objective to"
                " dpo, or omit dpo_sft_weight"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LocalCheckpointConfig:
    """The local checkpoints, which every host saves on its own disk or RAM disk."""

    path: LocalPath = Field(
        description="folder on a disk or RAM disk of each host, such as /dev/shm/llama_jax; it"
        " needs space for three times the state of the host's devices"
    )
    every: PositiveInt = Field(default=50, description="steps between local checkpoints")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are saved, and which are retained."""

    every: PositiveInt = Field(
        default=1000, description="steps between checkpoints (the last step is always saved)"
    )
    keep: PositiveInt = Field(
        default=3, description="number of newest checkpoints that are retained"
    )
    keep_every: PositiveInt | None = Field(
        default=None,
        description="also retain every checkpoint whose step is a multiple of this; null: none",
    )
    on_damage: Literal["previous", "stop"] = Field(
        default="previous",
        description="what a run does when its newest checkpoint is damaged: resume from the one"
        " before it, or stop",
    )
    local: LocalCheckpointConfig | None = Field(
        default=None,
        description="checkpoints on each host's own disk, in addition to the shared ones; a run"
        " resumes from the newest step that all hosts can restore; null: none",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingConfig:
    """Logs, progress and samples of a run."""

    every: PositiveInt = Field(default=1, description="steps between lines of metrics.jsonl")
    progress: StrictBool = Field(default=True, description="show a progress bar on standard error")
    tensorboard: StrictBool = Field(
        default=True, description="write TensorBoard files into the run folder"
    )
    wandb: str | None = Field(default=None, description="project of Weights & Biases; null: none")
    peak_tflops: PositiveFloat | None = Field(
        default=None,
        description="peak of one device, for MFU [TFLOP/s]; null: from the table of known devices",
    )
    samples: tuple[str, ...] = Field(
        default=(),
        description="prompts that the model continues at the end of the run; on data of chats,"
        " messages of a user that it answers after each validation",
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """The configuration of a run. Sections may be dicts.

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
    lora: LoraConfig | None = Field(
        default=None,
        description="train low-rank pairs beside the frozen weights of training.init_from; null:"
        " train all weights",
    )
    training: TrainingConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def has_base(self) -> bool:
        """Whether each step computes with the frozen weights of training.init_from."""
        return self.lora is not None or self.training.objective == "dpo"

    @property
    def program(self) -> "Config":
        """This configuration with only what the compiled programs of a run depend on.

        All other fields have fixed values. JAX compiles a program once for each configuration, so
        the runs of one process share their programs though their folders or their data differ.
        """
        names = "steps", "micro_batches", "objective", "dpo_beta", "dpo_sft_weight", "z_loss"
        training = {name: getattr(self.training, name) for name in names}
        sizes = {name: getattr(self.data, name) for name in ("batch_size", "seq_len")}
        return Config(
            model=self.model,
            data=DataConfig(mixture={"any": 1.0}, **sizes),
            optimizer=self.optimizer,
            lora=self.lora,
            training=TrainingConfig(out="any", init_from="any", **training),
        )

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of training on one token (`ModelConfig.flops_per_token`), of pairs too.

        A reference's forward pass counts: a third of training all weights.
        """
        flops = self.model.flops_per_token(self.data.seq_len)
        reference = flops / 3 if self.training.objective == "dpo" else 0.0
        if self.lora is None:
            return flops + reference
        frozen = self.model.flops_per_token(self.data.seq_len, frozen=True)
        return frozen + 6.0 * self.lora.n_params(self.model) + reference

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
        warmup, decay = self.optimizer.warmup_steps, self.optimizer.decay_steps
        if decay > max(self.training.steps - warmup, 0):
            raise ValueError(
                f"optimizer.decay_steps ({decay}) is larger than training.steps"
                f" ({self.training.steps}) minus optimizer.warmup_steps ({warmup})"
            )
        if self.lora:
            if self.training.init_from is None:
                raise ValueError("lora needs training.init_from, the model that the pairs adapt")
            self.lora.check_rank(self.model)
        elif self.model.param_dtype != "float32":
            raise ValueError(
                f"model.param_dtype {self.model.param_dtype} is only for inference and for the"
                " frozen base of lora (small updates round to zero): set float32; model.dtype sets"
                " the type of the computation"
            )
        elif self.model.quantized != "none":
            raise ValueError(
                f"model.quantized {self.model.quantized} is only for inference and for the frozen"
                " base of lora (integers have no gradient): omit it, or set lora"
            )
        if not self.data.mixture:
            raise ValueError("data.mixture must name at least one folder of token shards")
        if self.data.corpus and len(self.data.folders) != 1:
            raise ValueError(
                "one folder is created from data.corpus, but data.mixture names"
                f" {len(self.data.folders)}: create each with `llama-jax tokenize` instead"
            )
        return self
