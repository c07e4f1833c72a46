"""DataConfig: the sources of a run's tokens, and how they are mixed."""

import dataclasses
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetPydanticSchema,
    PlainSerializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from llama_jax.config.model import (
    STRICT,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictBool,
)
from llama_jax.runtime.storage import check_path

Fraction = Annotated[float, Field(ge=0, le=1)]
StoragePath = Annotated[str, AfterValidator(check_path)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Source:
    """A folder's entry in a mixture. The sizes are those of a folder that doesn't exist yet."""

    weight: PositiveFloat
    max_epochs: PositiveFloat | None = None
    planned_tokens: PositiveFloat | None = None
    planned_bytes: PositiveFloat | None = None  # of its text


def _to_source(entry: Any) -> Any:
    return entry if isinstance(entry, dict | Source) else {"weight": entry}


def _to_plain(source: Source) -> Any:
    stated = {key: value for key, value in dataclasses.asdict(source).items() if value is not None}
    return stated if len(stated) > 1 else source.weight


_Entry = Annotated[Source, BeforeValidator(_to_source), PlainSerializer(_to_plain)]
# A weight alone is converted to a Source.
Mixture = dict[
    StoragePath,
    Annotated[
        float | Source, GetPydanticSchema(lambda _, handler: handler.generate_schema(_Entry))
    ],
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """The training data: folders of token shards, and the corpus that one is created from."""

    mixture: Annotated[
        Mixture,
        Field(
            description="map from a folder of token shards (created by `llama-jax tokenize`) to its"
            " sampling weight, or to a map of weight, max_epochs (a run that needs more does not"
            " start), planned_tokens and planned_bytes (of a folder that doesn't exist yet, for"
            " `llama-jax data`)"
        ),
    ] = dataclasses.field(hash=False)  # a dict has no hash, and Config needs one
    phases: Annotated[
        dict[Annotated[int, Field(ge=1)], Mixture],
        Field(
            description="map from a number of completed steps to the mixture of the steps after it,"
            " such as {90000: {data/text: 0.7, data/math: 0.3}}; a source continues where it was"
        ),
    ] = dataclasses.field(default_factory=dict, hash=False)
    corpus: tuple[StoragePath, ...] = Field(
        default=(),
        description="files, folders or globs of text and JSONL (.gz, .zst) from which the only"
        " folder of `mixture` is created if it is missing; python-stdlib is the source code of"
        " Python's standard library",
    )
    tokenizer: StoragePath | None = Field(
        default=None,
        description="tokenizer (file or folder) for `corpus`; null: the tokenizer of"
        " training.init_from, or else a tokenizer that is trained on `corpus`",
    )
    validation_fraction: Fraction = Field(
        default=0.05, description="fraction of the documents of `corpus` that is held out"
    )
    seq_len: PositiveInt = Field(
        default=2048, description="T, length of a training window [tokens]"
    )
    batch_size: PositiveInt = Field(description="windows per optimizer step, over all devices")
    isolate_documents: StrictBool = Field(
        default=True,
        description="mask attention between the documents of a window, and compute no loss on the"
        " first token of a document; false: a window is one text",
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the random order of the windows")

    @property
    def mixtures(self) -> dict[int, dict[str, float]]:
        """The weights of each phase, by the number of steps before it, in order."""
        return {
            first: {folder: source.weight for folder, source in mixture.items()}
            for first, mixture in self._mixtures()
        }

    @property
    def sources(self) -> dict[str, Source]:
        """The first entry of each folder, in the order in which the run first reads them."""
        sources = dict[str, Source]()
        for _, mixture in self._mixtures():
            sources |= {folder: entry for folder, entry in mixture.items() if folder not in sources}
        return sources

    @property
    def folders(self) -> list[str]:
        """The folders of all mixtures, in the order in which the run first reads them."""
        return [*self.sources]

    def _mixtures(self) -> list[tuple[int, dict[str, Source]]]:
        return cast(Any, sorted({0: self.mixture, **self.phases}.items()))

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        for step, mixture in self.phases.items():
            if not mixture:
                raise ValueError(f"phases.{step} must name at least one folder of token shards")
        return self
