"""LoraConfig: which matrices get low-rank pairs, and of which rank."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from llama_jax.config.model import (
    STRICT,
    ModelConfig,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StrictBool,
)

# A layer's matrices: the letters of their input axes and of their output axes.
IN_OUT_DIMS = {
    "wq": ("D", "NH"),
    "wk": ("D", "KH"),
    "wv": ("D", "KH"),
    "wo": ("NH", "D"),
    "w1": ("D", "F"),
    "w3": ("D", "F"),
    "w2": ("F", "D"),
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adaptation, LoRA (arXiv 2106.09685).

    A matrix W stays as it is. Beside it a pair A [in, R], B [R, out] is trained: y = xW + s·(xA)B
    with s = α/R. B starts at zero, so the first step has the loss of the base.
    """

    rank: PositiveInt = Field(default=8, description="R, rank of each low-rank pair")
    alpha: PositiveFloat = Field(
        default=16.0, description="α: the product of a pair is multiplied by α/R"
    )
    targets: tuple[Literal["wq", "wk", "wv", "wo", "w1", "w3", "w2"], ...] = Field(
        default=("wq", "wk", "wv", "wo", "w1", "w3", "w2"),
        description="matrices of each layer that get a pair, by Meta's names (q_proj is wq, k_proj"
        " wk, v_proj wv, o_proj wo, gate_proj w1, up_proj w3, down_proj w2)",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="probability with which an element of the input of A is dropped in training",
    )
    rank_stabilized: StrictBool = Field(
        default=False, description="multiply by α/√R instead of α/R (rsLoRA, arXiv 2312.03732)"
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the initial A and of dropout")

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        if not self.targets:
            raise ValueError("targets must name at least one matrix")
        if len({*self.targets}) < len(self.targets):
            raise ValueError("targets names a matrix twice")
        return self

    @property
    def scale(self) -> float:
        """The factor of the product of a pair."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def check_rank(self, model: ModelConfig) -> None:
        """Checks that the rank is at most the largest rank that each matrix can have.

        Raises:
            ValueError: the rank exceeds the number of rows or columns of a matrix.
        """
        for name in self.targets:
            largest = min(model.count(dims) for dims in IN_OUT_DIMS[name])
            if self.rank > largest:
                raise ValueError(
                    f"lora.rank ({self.rank}) is larger than the smaller side of {name}"
                    f" ({largest}), the largest rank that the matrix can have: lower it"
                )

    def n_params(self, model: ModelConfig) -> int:
        """Returns the number of trained parameters: those of all pairs."""
        sides = sum(model.count(dims) for name in self.targets for dims in IN_OUT_DIMS[name])
        return model.n_layers * self.rank * sides
