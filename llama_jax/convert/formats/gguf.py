"""Reads GGUF files of the llama architecture; quantized weights are dequantized to float32."""

import math
import os
from dataclasses import replace
from typing import IO

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llama_jax.config.model import ModelConfig, RopeScaling
from llama_jax.convert.files.tensor_file import StoredTensor, mapped_tensor, quote
from llama_jax.convert.layout import Layout
from llama_jax.convert.source import (
    Source,
    config_dtypes,
    model_config,
    positive_float,
    positive_int,
)
from llama_jax.errors import InputError
from llama_jax.model.rope import rope_frequencies
from llama_jax.runtime.storage import AnyPath, open_file
from llama_jax.tokenizer.gguf_header import GGUFHeader, TensorInfo, read_header

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
_DEQUANTIZED_AT_ONCE = 1 << 22  # numbers
_MAX_ALIGNMENT = 1 << 16


def read(path: AnyPath) -> Source:
    """Returns the checkpoint in a GGUF file.

    Raises:
        InputError: the file is damaged, of another architecture, or of an unknown quantization.
    """
    header = read_header(path, ("general.", "llama.", "split."))
    metadata = {name.removeprefix("llama."): value for name, value in header.metadata.items()}
    if metadata.get("general.architecture") != "llama":
        raise InputError(
            f"{path} contains a {quote(metadata.get('general.architecture'))} model, not a llama:"
            " give a LLaMA checkpoint"
        )
    if metadata.get("split.count", 0) not in (0, 1):
        raise InputError(f"{path} is one of several parts: merge them with llama-gguf-split first")
    tensors = _tensors(path, header)
    dim = positive_int(metadata, "embedding_length", path)
    heads = positive_int(metadata, "attention.head_count", path)
    embedding = tensors.get(NAMES["tok_embeddings"])
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(
            f"{path} lacks the matrix {NAMES['tok_embeddings']}: give a complete model"
        )
    theta = positive_float(metadata, "rope.freq_base", 10_000.0, path)
    defaults = {"attention.head_count_kv": heads, "rope.dimension_count": max(1, dim // heads)}
    metadata = defaults | metadata
    head_key = next(k for k in ("attention.key_length", "rope.dimension_count") if k in metadata)
    kind = metadata.get("rope.scaling.type", "none")
    if kind not in ("none", "llama3"):
        raise InputError(
            f"{path}: rope scaling of type {quote(kind)} is not LLaMA's: give a LLaMA checkpoint"
        )
    factors = tensors.pop(_ROPE_FACTORS, None)
    config = model_config(
        path,
        dim=dim,
        n_layers=positive_int(metadata, "block_count", path),
        n_heads=heads,
        n_kv_heads=positive_int(metadata, "attention.head_count_kv", path),
        head_dim=positive_int(metadata, head_key, path),
        hidden_dim=positive_int(metadata, "feed_forward_length", path),
        vocab_size=embedding.shape[0],
        context=positive_int(metadata, "context_length", path),
        norm_eps=_shortest(
            positive_float(metadata, "attention.layer_norm_rms_epsilon", None, path)
        ),
        rope_theta=_shortest(theta),
        tied_head=NAMES["output"] not in tensors,
        **config_dtypes(tensors),
    )
    if factors:
        config = _with_rope_scaling(config, factors, path)
    return Source(
        "gguf",
        path,
        config,
        Layout(NAMES, interleaved=True),
        (tensors,),
        dropped={_ROPE_FACTORS: "follows from the configuration"} if factors else {},
    )


def _tensors(path: AnyPath, header: GGUFHeader) -> dict[str, StoredTensor]:
    """Returns the tensors by name, after checking that they fill the file from header to end.

    GGUF has no checksum. Lost or inserted bytes change the length of the file, and shift the zeros
    that pad the tensors.

    Raises:
        InputError: the tensors don't fill the file, or one has an unknown quantization.
    """
    unit = header.metadata.get("general.alignment", 32)
    if type(unit) is not int or not 0 < unit <= _MAX_ALIGNMENT or unit & (unit - 1):
        raise InputError(
            f"{path} has {quote(unit)} as general.alignment, which must be a power of two: fetch it"
            " again"
        )
    tensors = dict[str, StoredTensor]()
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        end = begin = _align(path, file, size, header.nbytes, unit)
        for info in header.tensors:
            if begin + info.offset != end:
                raise InputError(
                    f"{path} is damaged: {quote(info.name)} leaves a gap or overlaps: fetch it"
                    " again"
                )
            tensors[info.name], nbytes = _tensor(path, info, end)
            end = _align(path, file, size, end + nbytes, unit)
    if size != end:
        raise InputError(
            f"{path} is {'cut short' if size < end else 'damaged'}: it has {size:,} bytes, but its"
            f" header describes {end:,}: fetch it again"
        )
    return tensors


def _align(path: AnyPath, file: IO[bytes], size: int, end: int, unit: int) -> int:
    """Returns the next multiple of `unit`, after checking that the file is zero up to there.

    Raises:
        InputError: a byte of the padding isn't zero.
    """
    padding = -end % unit
    if end < size:  # the caller reports a file that is too short
        file.seek(end)
        if any(file.read(padding)):
            raise InputError(
                f"{path} is damaged: the bytes from {end:,} to the next multiple of {unit} must be"
                " zero, so the tensors are shifted: fetch it again"
            )
    return end + padding


def _tensor(path: AnyPath, info: TensorInfo, start: int) -> tuple[StoredTensor, int]:
    """Returns the tensor that begins at offset `start`, and its size in the file [bytes].

    Raises:
        InputError: its type is not supported, or its rows are not multiples of a block.
    """
    known = {kind.value: kind for kind in GGMLQuantizationType}
    kind = known.get(info.ggml_type)
    if kind is None or kind.name not in (*_PLAIN, *_QUANTIZED):
        raise InputError(
            f"{path}: {quote(info.name)} is quantized as {kind.name if kind else info.ggml_type},"
            f" which is not supported: give one of {', '.join([*_PLAIN, *_QUANTIZED])}"
        )
    if kind.name in _PLAIN:
        tensor = mapped_tensor(path, info.name, np.dtype(_PLAIN[kind.name]), start, info.shape)
        return tensor, tensor.nbytes
    block, block_bytes = GGML_QUANT_SIZES[kind]
    *before, last = info.shape or (1,)
    if last % block:
        raise InputError(
            f"{path} is damaged: {quote(info.name)} has rows of {last} numbers in blocks of"
            f" {block}: fetch it again"
        )
    rows = math.prod(before)
    packed = mapped_tensor(
        path, info.name, np.dtype(np.uint8), start, (rows, last // block * block_bytes)
    )

    def read_dequantized() -> np.ndarray:
        blocks, out = packed.read(), np.empty((rows, last), np.float32)
        step = max(1, _DEQUANTIZED_AT_ONCE // max(1, last))
        for i in range(0, rows, step):
            out[i : i + step] = dequantize(blocks[i : i + step], kind)
        return out.reshape(info.shape)

    return StoredTensor(
        info.shape, np.dtype(np.float32), read_dequantized, exact=False
    ), packed.nbytes


def _shortest(number: float) -> float:
    """Returns the shortest decimal with the same float32: 1e-05, not 9.9999997e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(number)))


def _with_rope_scaling(config: ModelConfig, stored: StoredTensor, path: AnyPath) -> ModelConfig:
    """Returns the configuration with the rope scaling of Llama 3.1 that matches the file's factors.

    Args:
        config: the configuration without rope scaling.
        stored: for each rotary pair [H/2], the factor by which its wavelength is multiplied.
        path: the file, for messages.

    Raises:
        InputError: the factors are not those of a Llama 3.1 or 3.2.
    """
    fits = stored.shape == (config.head_dim // 2,)
    factors = stored.read() if fits else np.zeros(1)
    if np.isfinite(factors).all() and min(factors) > 0:
        scaled = replace(config, rope_scaling=RopeScaling(factor=float(factors.max())))
        if np.allclose(factors, rope_frequencies(config) / rope_frequencies(scaled), rtol=1e-4):
            return scaled
    raise InputError(
        f"{path}: {_ROPE_FACTORS} is not the rope scaling of Llama 3.1 or 3.2, so positions would"
        " be wrong: give a LLaMA checkpoint"
    )
