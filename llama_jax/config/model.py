"""ModelConfig: the architecture of a model, and how it is computed."""

import math
from dataclasses import fields
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

# Every configuration class is frozen and hashable, because it is a static argument of jitted
# functions, and refuses unknown keys.
STRICT = ConfigDict(extra="forbid")
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
StrictBool = Annotated[bool, Field(strict=True)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeScaling:
    """Scaling of the rotary wavelengths for a longer context, as in Llama 3.1 and later."""

    factor: PositiveFloat = Field(
        default=8.0, description="factor by which the longest wavelengths are stretched"
    )
    low_freq_factor: PositiveFloat = Field(
        default=1.0,
        description="wavelengths above original_context / low_freq_factor are stretched by factor",
    )
    high_freq_factor: PositiveFloat = Field(
        default=4.0,
        description="wavelengths below original_context / high_freq_factor don't change",
    )
    original_context: PositiveInt = Field(
        default=8192, description="context of the model without scaling [tokens]"
    )

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be larger than low_freq_factor")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Architecture:
    """The fields that define a model: with another value of any of them it is another model.

    One letter names a dimension everywhere: B batch, T query positions, S key positions, L layers,
    V vocabulary, D width, N query heads, K key/value heads, H head size, F FFN hidden, R LoRA rank.
    """

    dim: PositiveInt = Field(description="D, width of the residual stream")
    n_layers: PositiveInt = Field(description="L, number of layers")
    n_heads: PositiveInt = Field(description="N, number of query heads")
    n_kv_heads: PositiveInt = Field(description="K, number of key/value heads; must divide n_heads")
    head_dim: PositiveInt = Field(description="H, size of a head; even")
    hidden_dim: PositiveInt = Field(description="F, hidden size of the feed-forward block")
    vocab_size: PositiveInt = Field(description="V, rows of the embedding [tokens]")
    context: PositiveInt = Field(
        default=2048, description="longest sequence that the model supports [tokens]"
    )
    norm_eps: PositiveFloat = Field(default=1e-5, description="epsilon of RMSNorm")
    rope_theta: PositiveFloat = Field(
        default=10_000.0, description="base of the rotary wavelengths"
    )
    rope_scaling: RopeScaling | None = Field(
        default=None, description="scaling of the wavelengths as in Llama 3.1; null: none"
    )
    tied_head: bool = Field(
        default=False, description="the output head is the transposed embedding"
    )
    quantized: Literal["none", "int8"] = Field(
        default="none",
        description="storage of the matrices: none (as param_dtype), or int8 with a scale for each"
        " output channel, for inference and for the frozen base of `lora`; param_dtype is then the"
        " type of the norms",
    )

    @model_validator(mode="after")
    def _check(self) -> "Architecture":
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary embeddings")
        return self

    def shape(self, dims: str) -> tuple[int, ...]:
        """Returns the sizes that the letters `dims` name: 'DNH' -> (dim, n_heads, head_dim)."""
        size = {
            "L": self.n_layers,
            "V": self.vocab_size,
            "D": self.dim,
            "N": self.n_heads,
            "K": self.n_kv_heads,
            "H": self.head_dim,
            "F": self.hidden_dim,
        }
        return tuple(size[letter] for letter in dims)

    def count(self, dims: str) -> int:
        """Returns the number of elements of an array with the axes `dims`: 'NH' -> N·H."""
        return math.prod(self.shape(dims))

    def differences(self, other: "Architecture") -> list[str]:
        """Returns the names of the fields that make `other` a different model."""
        names = [field.name for field in fields(Architecture)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @property
    def n_params(self) -> int:
        """Number of weights, each counted once (a tied head is the embedding)."""
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        block = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim  # and two norms
        ends = 1 if self.tied_head else 2
        return self.n_layers * block + ends * self.vocab_size * self.dim + self.dim

    def flops_per_token(self, seq_len: int, *, frozen: bool = False) -> float:
        """Returns the model FLOPs of training on one token: forward and backward, no recompute.

        6 for each weight of a matrix product (the embedding look-up is not one), or 4 if the
        weights are frozen, and the causal half of attention's scores and values: 6·L·N·H·T. LLaMA's
        paper and most MFU figures use this count.
        """
        weights = self.n_params - (0 if self.tied_head else self.vocab_size * self.dim)
        attention = 6 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return (4.0 if frozen else 6.0) * weights + attention


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComputeConfig:
    """The fields that define how a model is computed: no value makes it another model."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="type of activations and of matrix products"
    )
    param_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="type of the stored weights; training needs float32, except for the frozen base"
        " of `lora` (released LLaMA weights are float16 or bfloat16)",
    )
    cache_dtype: Literal["same", "int8"] = Field(
        default="same",
        description="type of the KV cache in generation: same (as dtype) or int8",
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type in which gradients are accumulated over devices"
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(
        default="auto",
        description="attention kernel; auto selects splash on TPU, cudnn on NVIDIA if"
        " data.isolate_documents is false, and xla otherwise",
    )
    remat: Literal["none", "products", "projections", "attention", "full", "offload"] = Field(
        default="full",
        description="activations of a layer that are saved for the backward pass, from most memory"
        " to least: none (no rematerialization: all are saved), products (outputs of matrix"
        " products), projections (q, k, v and the output of attention), attention (its output),"
        " full (full rematerialization: only the input of the layer is saved), offload (as full,"
        " but the input is saved in host memory)",
    )
    scan: bool = Field(
        default=True,
        description="compute the layers in a loop (lax.scan); false unrolls the loop, which takes"
        " long to compile",
    )


# Dataclasses collect fields from the last base to the first: the architecture comes first.
@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig(ComputeConfig, Architecture):
    """A model and how it is computed."""

    @property
    def weight_dtype(self) -> str:
        """Type in which the matrices are stored: param_dtype, or int8 if they are quantized."""
        return self.param_dtype if self.quantized == "none" else self.quantized


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Returns F as Meta's code derives it from the keys of `params.json`.

    Two thirds of 4·dim, times `multiplier` if given, rounded up to a multiple of `multiple_of`
    (`FeedForward.__init__` in the reference's model.py).
    """
    hidden = int(8 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of
