"""GGUF files of the llama architecture, whose quantized weights are computed back to float32."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llama_jax.config.model import ModelConfig, RopeScaling
from llama_jax.convert.files.tensor_file import StoredTensor, mapped_tensor, quote
from llama_jax.convert.layout import Layout
from llama_jax.convert.source import Source, integer, model_config, number, stored_dtype
from llama_jax.errors import InputError
from llama_jax.model.rope import rope_frequencies
from llama_jax.runtime.regular_file import open_regular
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
_BLOCK = 1 << 22  # numbers computed back at a time
_MAX_ALIGNMENT = 1 << 16


def read(path: Path) -> Source:
    """Returns the checkpoint in a GGUF file.

    Raises:
        InputError: it is damaged, of another architecture, or of an unknown quantization.
    """
    header = read_header(path, ("general.", "llama.", "split."))
    about = {name.removeprefix("llama."): value for name, value in header.metadata.items()}
    if about.get("general.architecture") != "llama":
        raise InputError(
            f"{path} holds a {quote(about.get('general.architecture'))} model, not a llama: give a"
            " LLaMA checkpoint"
        )
    if about.get("split.count", 0) not in (0, 1):
        raise InputError(f"{path} is one of several parts: merge them with llama-gguf-split first")
    tensors = _tensors(path, header)
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
            f"{path}: rope scaling of type {quote(kind)} is not LLaMA's: give a LLaMA checkpoint"
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
        config = _stretched(config, factors, path)
    return Source(
        "gguf",
        path,
        config,
        Layout(NAMES, interleaved=True),
        (tensors,),
        dropped={_ROPE_FACTORS: "follows from the configuration"} if factors else {},
    )


def _tensors(path: Path, header: GGUFHeader) -> dict[str, StoredTensor]:
    """Returns the tensors by name, which must fill the file from the header to its end.

    GGUF has no checksum. A file that lost or gained bytes on its way is known by its length and by
    the zeros between tensors, which are then elsewhere.

    Raises:
        InputError: the tensors don't fill the file, or one is of an unknown quantization.
    """
    unit = header.metadata.get("general.alignment", 32)
    if type(unit) is not int or not 0 < unit <= _MAX_ALIGNMENT or unit & (unit - 1):
        raise InputError(
            f"{path} has {quote(unit)} as general.alignment, which must be a power of two: fetch it"
            " again"
        )
    tensors = dict[str, StoredTensor]()
    with open_regular(path) as file:
        end = begin = _aligned(path, file, header.nbytes, unit)
        for info in header.tensors:
            if begin + info.offset != end:
                raise InputError(
                    f"{path} is damaged: {quote(info.name)} leaves a gap or overlaps: fetch it"
                    " again"
                )
            tensors[info.name], nbytes = _tensor(path, info, end)
            end = _aligned(path, file, end + nbytes, unit)
        size = os.fstat(file.fileno()).st_size
    if size != end:
        raise InputError(
            f"{path} is {'cut short' if size < end else 'damaged'}: it has {size:,} bytes, but its"
            f" header tells of {end:,}: fetch it again"
        )
    return tensors


def _aligned(path: Path, file: BinaryIO, end: int, unit: int) -> int:
    """Returns the next multiple of `unit`, up to which the file must hold zeros."""
    missing = -end % unit
    if end < os.fstat(file.fileno()).st_size:  # else the file is too short, which is told later
        file.seek(end)
        if any(file.read(missing)):
            raise InputError(
                f"{path} is damaged: the bytes from {end:,} to the next multiple of {unit} must be"
                " zero, so its tensors have moved: fetch it again"
            )
    return end + missing


def _tensor(path: Path, info: TensorInfo, start: int) -> tuple[StoredTensor, int]:
    """Returns the tensor that begins at a byte of the file, and its bytes there."""
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

    def computed() -> np.ndarray:
        blocks, out = packed.read(), np.empty((rows, last), np.float32)
        step = max(1, _BLOCK // max(1, last))
        for i in range(0, rows, step):
            out[i : i + step] = dequantize(blocks[i : i + step], kind)
        return out.reshape(info.shape)

    return StoredTensor(info.shape, np.dtype(np.float32), computed, exact=False), packed.nbytes


def _shortest(number: float) -> float:
    """Returns the shortest decimal that float32 rounds to the same: 1e-05, not 9.9999997e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(number)))


def _stretched(config: ModelConfig, stored: StoredTensor, path: Path) -> ModelConfig:
    """Returns the config with the scaling of Llama 3.1 that gives the file's factors [H/2].

    A factor is by how much the wavelength of a pair is stretched.
    """
    fits = stored.shape == (config.head_dim // 2,)
    factors = stored.read() if fits else np.zeros(1)
    if np.isfinite(factors).all() and min(factors) > 0:
        made = replace(config, rope_scaling=RopeScaling(factor=float(factors.max())))
        if np.allclose(factors, rope_frequencies(config) / rope_frequencies(made), rtol=1e-4):
            return made
    raise InputError(
        f"{path}: {_ROPE_FACTORS} is not the rope scaling of Llama 3.1 or 3.2 and would give wrong"
        " positions: give a LLaMA checkpoint"
    )
