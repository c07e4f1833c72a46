"""GGUF files of the llama architecture, whose quantized weights are computed back to float32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from llama_jax.convert.layout import Layout
from llama_jax.convert.source import Source, integer, model_config, number, stored_dtype
from llama_jax.convert.stored import Stored, in_file, shown
from llama_jax.data.tokenizer_gguf import has_tokenizer
from llama_jax.errors import InputError
from llama_jax.family import ModelConfig, RopeScaling
from llama_jax.model.rope import frequencies

NAMES = {
    "tok_embeddings": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "wq": "blk.{}.attn_q.weight",
    "wk": "blk.{}.attn_k.weight",
    "wv": "blk.{}.attn_v.weight",
    "wo": "blk.{}.attn_output.weight",
    "ffn_norm": "blk.{}.ffn_norm.weight",
    "w1": "blk.{}.ffn_gate.weight",
    "w3": "blk.{}.ffn_up.weight",
    "w2": "blk.{}.ffn_down.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q5_0", "Q5_1", "Q5_K")
_BLOCK = 1 << 22  # numbers computed back at a time


def read(path: Path) -> Source:
    """Returns the checkpoint in a GGUF file.

    Raises:
        InputError: it is damaged, of another architecture, or of an unknown quantization.
    """
    reader = open_gguf(path)
    about: dict[str, Any] = {
        name.removeprefix("llama."): _value(field)
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.")
    }
    if about.get("general.architecture") != "llama":
        raise InputError(
            f"{path} holds a {shown(about.get('general.architecture'))} model, not a llama: give a"
            " LLaMA checkpoint"
        )
    if about.get("split.count", 0) not in (0, 1):
        raise InputError(f"{path} is one of several parts: merge them with llama-gguf-split first")
    tensors = {tensor.name: _tensor(path, tensor) for tensor in reader.tensors}
    dim, heads = (integer(about, k, path) for k in ("embedding_length", "attention.head_count"))
    embedding = tensors.get(NAMES["tok_embeddings"])
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{path} lacks the matrix {NAMES['tok_embeddings']}: give a whole model")
    theta = number(about, "rope.freq_base", 10_000.0, path)
    usual = {"attention.head_count_kv": heads, "rope.dimension_count": max(1, dim // heads)}
    said = usual | about
    head_key = next(k for k in ("attention.key_length", "rope.dimension_count") if k in said)
    kind = about.get("rope.scaling.type", "none")
    if kind not in ("none", "llama3"):
        raise InputError(
            f"{path}: rope scaling of type {shown(kind)} is not LLaMA's: give a LLaMA checkpoint"
        )
    factors = tensors.pop(_ROPE_FACTORS, None)
    config = model_config(
        path,
        dim=dim,
        n_layers=integer(about, "block_count", path),
        n_heads=heads,
        n_kv_heads=integer(said, "attention.head_count_kv", path),
        head_dim=integer(said, head_key, path),
        hidden_dim=integer(about, "feed_forward_length", path),
        vocab_size=embedding.shape[0],
        context=integer(about, "context_length", path),
        norm_eps=_shortest(number(about, "attention.layer_norm_rms_epsilon", None, path)),
        rope_theta=_shortest(theta),
        tied_head=NAMES["output"] not in tensors,
        **stored_dtype((tensors,)),
    )
    if factors:
        config = _stretched(config, factors.read(), path)
    return Source(
        "gguf",
        path,
        config,
        Layout(NAMES, interleaved=True),
        (tensors,),
        dropped={_ROPE_FACTORS: "follows from the configuration"} if factors else {},
    )


def open_gguf(path: Path) -> GGUFReader:
    """Returns a reader of the file.

    Raises:
        InputError: it is not a GGUF file, or is damaged.
    """
    has_tokenizer(path)  # looks at all metadata: the package doesn't end where a list has no end
    try:
        with np.errstate(all="raise"):
            reader = GGUFReader(path)
    except Exception as error:  # the package raises many types for damaged files
        raise InputError(
            f"{path} is not a GGUF file, or is damaged or cut short ({shown(str(error))}): fetch it"
            " again"
        ) from error
    end, unit = reader.data_offset, int(reader.alignment)
    for tensor in reader.tensors:
        if tensor.data_offset != end:
            raise InputError(
                f"{path} is damaged: {shown(tensor.name)} leaves a gap or overlaps: fetch it again"
            )
        end += -(-tensor.n_bytes // unit) * unit
    return reader


def _value(field: Any) -> Any:
    try:
        return field.contents()
    except Exception:  # a damaged field: its reader then says that the value is missing
        return None


def _tensor(path: Path, tensor: Any) -> Stored:
    kind: GGMLQuantizationType = tensor.tensor_type
    shape = tuple(int(size) for size in reversed(tensor.shape))
    offset, n_bytes = int(tensor.data_offset), int(tensor.n_bytes)
    if kind.name in _PLAIN:
        return in_file(path, tensor.name, np.dtype(_PLAIN[kind.name]), offset, shape)
    if kind.name not in _QUANTIZED:
        raise InputError(
            f"{path}: {shown(tensor.name)} is quantized as {kind.name}, which is not supported:"
            f" give one of {', '.join([*_PLAIN, *_QUANTIZED])}"
        )

    def computed() -> np.ndarray:
        rows = int(np.prod(shape[:-1]))
        packed = np.memmap(path, np.uint8, "r", offset, (rows, n_bytes // rows))
        out = np.empty((rows, shape[-1]), np.float32)
        step = max(1, _BLOCK // shape[-1])
        for i in range(0, rows, step):
            out[i : i + step] = dequantize(packed[i : i + step], kind)
        return out.reshape(shape)

    return Stored(shape, np.dtype(np.float32), computed, exact=False)


def _shortest(number: float) -> float:
    """Returns the shortest decimal that float32 rounds to the same: 1e-05, not 9.9999997e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(number)))


def _stretched(config: ModelConfig, factors: np.ndarray, path: Path) -> ModelConfig:
    """Returns the config with the scaling of Llama 3.1 that gives the file's factors [H/2].

    A factor is by how much the wavelength of a pair is stretched.
    """
    if np.isfinite(factors).all() and factors.shape == (config.head_dim // 2,) and min(factors) > 0:
        made = replace(config, rope_scaling=RopeScaling(factor=float(factors.max())))
        if np.allclose(factors, frequencies(config) / frequencies(made), rtol=1e-4):
            return made
    raise InputError(
        f"{path}: {_ROPE_FACTORS} is not the rope scaling of Llama 3.1 or 3.2 and would give wrong"
        " positions: give a LLaMA checkpoint"
    )
