"""DataConfig: the sources of a run's tokens, and how they are mixed."""

import dataclasses
from typing import Annotated

from pydantic import AfterValidator, Field
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
class DataConfig:
    """The training data: folders of token shards, and the corpus that one is created from."""

    mixture: Annotated[
        dict[StoragePath, PositiveFloat],
        Field(
            description="map from a folder of token shards (created by `llama-jax tokenize`) to its"
            " sampling weight"
        ),
    ] = dataclasses.field(hash=False)  # a dict has no hash, and Config needs one
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
