"""A run's whole configuration: frozen dataclasses, read from YAML, unknown keys refused.

pydantic checks the types and says where something is wrong; this module adds the line of the
file and the nearest valid name, and makes the manual of all keys out of the same fields.
"""

import dataclasses
import difflib
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from llama_jax.errors import InputError
from llama_jax.family import FAMILY, STRICT, Count, ModelConfig, Positive

Whole = Annotated[int, Field(ge=0, strict=True)]
AxisSize = Annotated[int, Field(ge=-1, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """How many devices along each axis of the mesh; -1 for one axis that takes the rest."""

    data: AxisSize = Field(1, description="replicas of the weights, across slices or nodes")
    fsdp: AxisSize = Field(-1, description="parts that weights and batch are split into")
    tensor: AxisSize = Field(1, description="parts that heads, FFN and vocabulary are split into")

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        if 0 in (self.data, self.fsdp, self.tensor):
            raise ValueError("the size of an axis is at least 1, or -1 to fill")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What is trained on: folders of token shards, and the corpus to make one from."""

    mixture: Annotated[
        dict[str, Positive],
        Field(
            description="folder of token shards (made by `llama-jax tokenize`): sampling weight"
        ),
    ] = dataclasses.field(hash=False)  # a dict has no hash; a Config needs one
    corpus: tuple[str, ...] = Field(
        (),
        description="files, folders or globs of text and JSONL (.gz, .zst) to fill the one folder"
        " of `mixture` from when it is not there yet; python-stdlib is Python's own sources",
    )
    tokenizer: str | None = Field(
        None, description="tokenizer.model to use for `corpus`; null trains one on it"
    )
    validation_fraction: Fraction = Field(
        0.05, description="share of the documents of `corpus` that is held out"
    )
    seq_len: Count = Field(2048, description="T, length of a training window [tokens]")
    batch_size: Count = Field(description="windows in one optimizer step, over all devices")
    isolate_documents: Flag = Field(
        True,
        description="documents in a window don't see each other, and no loss is taken on the"
        " first token of one; false reads a window as one text",
    )
    seed: Whole = Field(0, description="seed of the order of the windows")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are the paper's (arXiv 2302.13971, section 2.3)."""

    peak_lr: Positive = Field(3e-4, description="learning rate after warm-up")
    warmup_steps: Whole = Field(2000, description="steps of linear warm-up")
    final_lr_fraction: Fraction = Field(
        0.1, description="learning rate of the last step, over the peak (cosine in between)"
    )
    b1: Fraction = Field(0.9, description="decay of the first moment")
    b2: Fraction = Field(0.95, description="decay of the second moment")
    eps: Positive = Field(1e-8, description="Adam's epsilon (the paper doesn't state its own)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="decay of the matrices; norm scales are exempt"
    )
    clip_norm: Positive = Field(1.0, description="largest global norm of the gradient")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """How long, from where, and in what pieces."""

    out: str = Field(description="run folder, made if missing, resumed if it holds checkpoints")
    init_from: str | None = Field(
        None, description="model folder to start from; null draws fresh weights"
    )
    steps: Count = Field(description="optimizer steps of the whole run")
    micro_batches: Count = Field(
        1, description="pieces a batch is computed in, one after another, to save memory"
    )
    z_loss: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of log² Z in the objective (1e-4 is usual; 0 is off)"
    )
    seed: Whole = Field(0, description="seed of the fresh weights")
    max_skipped: Count = Field(
        10, description="steps in a row with a non-finite gradient after which the run stops"
    )
    eval_every: Whole = Field(1000, description="steps between validations (0: at the end only)")
    eval_batches: Count = Field(20, description="largest number of batches in a validation")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: Count = Field(1000, description="steps between checkpoints (the last is always saved)")
    keep: Count = Field(3, description="newest checkpoints that are kept")
    keep_every: Count | None = Field(
        None, description="steps: checkpoints at multiples of this are kept for ever; null for none"
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoggingConfig:
    """What the run tells, and where."""

    every: Count = Field(1, description="steps between lines of metrics.jsonl")
    progress: Flag = Field(True, description="a progress bar on standard error")
    tensorboard: Flag = Field(True, description="TensorBoard files in the run folder")
    wandb: str | None = Field(None, description="Weights & Biases project; null for none")
    peak_tflops: Positive | None = Field(
        None, description="peak of one device, for MFU [TFLOP/s]; null looks the device up"
    )
    samples: tuple[str, ...] = Field((), description="prompts that are continued at the end")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One run's whole configuration."""

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
        if not self.data.mixture:
            raise ValueError("data.mixture must name at least one folder of token shards")
        if self.data.corpus and len(self.data.mixture) != 1:
            raise ValueError(
                "data.corpus fills one folder, but data.mixture names"
                f" {len(self.data.mixture)}: tokenize each with `llama-jax tokenize` instead"
            )
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the configuration in the YAML file `path`, changed by `overrides`.

    Args:
        path: a YAML file with the sections of `Config`. `model.family` names a member of the
            family whose numbers are the defaults of the section.
        overrides: `section.key=value` each, the value read as YAML.

    Raises:
        InputError: names file, line and key, and the nearest valid name of an unknown key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"can't read the configuration {path}: {reason}") from error
    document = _Document(str(path))
    document.add_file(text)
    for override in overrides:
        document.add_override(override)
    return document.config()


def from_dict(values: dict[str, Any], where: str) -> Config:
    """Returns the configuration in nested plain values; `where` names them in errors."""
    document = _Document(where)
    document.values = values
    return document.config()


def dump(config: Config) -> str:
    """Returns the resolved configuration as YAML that `load` reads back to an equal one."""
    plain = TypeAdapter(Config).dump_python(config, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


class _Document:
    """Values on their way to a Config, with the place each came from."""

    def __init__(self, path: str):
        self.path = path
        self.values: dict[str, Any] = {}
        self.places: dict[tuple[str, ...], str] = {}

    def add_file(self, text: str) -> None:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or "it can't be parsed"
            raise InputError(f"{self.path}{line}: not valid YAML: {problem}") from error
        self._note_places(node, ())
        values = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise InputError(f"{self.path}: the file must hold sections: {', '.join(SECTIONS)}")
        self.values = values

    def _note_places(self, node: yaml.Node | None, key: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            child = (*key, str(key_node.value))
            place = f"{self.path}:{key_node.start_mark.line + 1}"
            if child in self.places:
                first = self.places[child].rsplit(":", 1)[1]
                raise InputError(f"{place}: {'.'.join(child)} was already given in line {first}")
            self.places[child] = place
            self._note_places(value_node, child)

    def add_override(self, override: str) -> None:
        name, equals, text = override.partition("=")
        key = tuple(name.split("."))
        place = f"command line, '{override}'"
        if not equals or not all(key):
            raise InputError(f"{place}: an override is written section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{place}: the value is not valid YAML") from error
        target = self.values
        for part in key[:-1]:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[key[-1]] = value
        # What stood under this key in the file is gone, and so are its places.
        self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key}
        self.places[key] = place

    def config(self) -> Config:
        values = self.values
        model = values.get("model")
        if isinstance(model, dict) and "family" in model:
            values = values | {"model": self._member(model)}
        try:
            return TypeAdapter(Config).validate_python(values)
        except ValidationError as error:
            raise InputError(self._sentence(error.errors(include_url=False)[0])) from error

    def _member(self, model: dict[str, Any]) -> dict[str, Any]:
        name = model["family"]
        if name not in FAMILY:
            near = _nearest(str(name), FAMILY)
            raise InputError(
                f"{self._place(('model', 'family'))}: model.family: there is no {name!r};"
                f" {near or 'known are ' + ', '.join(FAMILY)}"
            )
        defaults = dataclasses.asdict(FAMILY[name])
        return defaults | {key: value for key, value in model.items() if key != "family"}

    def _place(self, key: tuple[str, ...]) -> str:
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.path)

    def _sentence(self, problem: Any) -> str:
        key = tuple(str(part) for part in problem["loc"])
        key = tuple(part for part in key if part not in ("RopeScaling", "[key]"))
        name, place = ".".join(key), self._place(key)
        if problem["type"] == "unexpected_keyword_argument":
            siblings = [k for k in KEYS if k.rpartition(".")[0] == ".".join(key[:-1])]
            near = _elsewhere(key[-1]) or _nearest(name, siblings or SECTIONS)
            known = near or "known are " + ", ".join(siblings or SECTIONS)
            return f"{place}: {name} is not a known key; {known}"
        if problem["type"] == "missing":
            about = KEYS[name].description if name in KEYS else "a whole section"
            return f"{place}: {name} is missing ({about}); add it"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error":
            return f"{place}: {name + ': ' if name else ''}{message}"
        if problem["type"] == "dataclass_type":
            return f"{place}: {name} must be a section of keys, not {problem['input']!r}"
        message = message.removeprefix("Input should be ").partition(",")[0]
        message = message.replace("a valid tuple", "a list")
        return f"{place}: {name} must be {message}, not {problem['input']!r}"


def _nearest(name: str, valid: Sequence[str] | dict[str, Any]) -> str | None:
    close = difflib.get_close_matches(name.lower(), list(valid), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None


def _elsewhere(name: str) -> str | None:
    """Finds a key that was put into the wrong section."""
    close = [key for key in KEYS if key.rpartition(".")[2] == name]
    return f"did you mean {close[0]}?" if close else None


@dataclasses.dataclass(frozen=True)
class Key:
    """What the manual says about one key."""

    name: str
    type: str
    default: str
    description: str


def _keys(cls: type, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(cls, include_extras=False)
    for name, field in getattr(cls, "__pydantic_fields__").items():  # noqa: B009
        hint = hints[name]
        nested = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
        if field.description:
            default = "required" if field.is_required() else _yaml_value(field.default)
            yield Key(prefix + name, _type_name(hint), default, field.description)
        for cls_below in nested:
            yield from _keys(typing.cast(type, cls_below), f"{prefix}{name}.")


def _yaml_value(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return "|".join(_type_name(arg) for arg in args)
    if origin is tuple:
        return "list"
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "section"
    return {"str": "text", "dict": "map"}.get(
        name := getattr(origin or hint, "__name__", str(hint)), name
    )


SECTIONS = tuple(field.name for field in dataclasses.fields(Config))
_FAMILY_KEY = Key(
    "model.family", "text", "null", "member whose numbers are the defaults of this section"
)
KEYS = {key.name: key for key in [_FAMILY_KEY, *_keys(Config)]}


def manual() -> str:
    """Returns the page that explains every key: name, type, default, meaning [unit]."""
    lines: list[str] = []
    section = ""
    for key in KEYS.values():
        if key.name.split(".")[0] != section:
            section = key.name.split(".")[0]
            lines.append(f"\n{section}:")
        lines.append(f"  {key.name}  ({key.type}, default {key.default})")
        lines += textwrap.wrap(key.description, 88, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)
