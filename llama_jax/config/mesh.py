"""The configuration of a device mesh."""

from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from llama_jax.config.model import STRICT

AxisSize = Annotated[int, Field(ge=-1, strict=True)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Number of devices along each axis of the mesh; one axis may be -1: all other devices."""

    data: AxisSize = Field(
        default=1, description="number of replicas of the weights, across slices or nodes"
    )
    fsdp: AxisSize = Field(default=-1, description="number of shards of weights and batch")
    context: AxisSize = Field(default=1, description="number of shards of each window")
    tensor: AxisSize = Field(default=1, description="number of shards of heads, FFN and vocabulary")

    @model_validator(mode="after")
    def _check(self) -> "MeshConfig":
        if 0 in (self.data, self.fsdp, self.context, self.tensor):
            raise ValueError("the size of an axis is at least 1, or -1 for all other devices")
        return self
