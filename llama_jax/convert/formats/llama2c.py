"""Reads llama2.c's `.bin` files: a header, then float32 arrays with all layers stacked."""

import math
import struct

import numpy as np

from llama_jax.checkpoint.folders import LLAMA2C_MAGIC
from llama_jax.config.model import ModelConfig
from llama_jax.convert.files.tensor_file import StoredTensor, mapped_tensor
from llama_jax.convert.layout import AXES, LAYER_WEIGHTS, Layout
from llama_jax.convert.source import Source, model_config
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath, file_size, open_file

_ATTENTION = ("wq", "wk", "wv", "wo")
_LEGACY = (
    *("tok_embeddings", "attention_norm", *_ATTENTION),
    *("ffn_norm", "w1", "w2", "w3", "norm"),
)
_VERSION_1 = (
    *("attention_norm", "ffn_norm", "norm", "tok_embeddings"),
    *(*_ATTENTION, "w1", "w2", "w3"),
)
NAMES = {name: f"{name}[{{}}]" if name in LAYER_WEIGHTS else name for name in AXES}


def read(path: AnyPath) -> Source:
    """Returns the checkpoint in a llama2.c file, legacy or version 1 (both float32).

    Raises:
        InputError: the file is cut short, or of another version.
    """
    with open_file(path) as file:
        start = file.read(256)
    legacy = start[:4] != LLAMA2C_MAGIC
    if not legacy:
        version = struct.unpack_from("<i", start, 4)[0] if len(start) == 256 else None
        if version != 1:
            raise InputError(
                f"{path} is of version {version} of llama2.c's format: only versions 0 (legacy)"
                " and 1 contain floating-point weights; export it as one of them"
            )
    dim, hidden, layers, heads, kv, vocab, context = struct.unpack_from(
        "<7i", start, 0 if legacy else 8
    )
    # A negative vocabulary in a legacy file means that the head is not tied to the embedding.
    tied = vocab > 0 if legacy else bool(start[8 + 28])
    config = model_config(
        path,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv,
        head_dim=max(1, dim // max(1, heads)),
        hidden_dim=hidden,
        vocab_size=abs(vocab),
        context=context,
        tied_head=tied,
        dtype="float32",
    )
    layout = Layout(NAMES, interleaved=True)
    tensors, end = _tensors(path, config, layout, legacy)
    size = file_size(path)
    if end != size:
        raise InputError(
            f"{path} has {size:,} bytes, but a model of its header's shape needs"
            f" {end:,}: it is damaged or cut short, fetch it again"
        )
    dropped = {"freq_cis_real, freq_cis_imag": "follow from the configuration"} if legacy else {}
    return Source("llama2c", path, config, layout, (tensors,), dropped=dropped)


def _tensors(
    path: AnyPath, config: ModelConfig, layout: Layout, legacy: bool
) -> tuple[dict[str, StoredTensor], int]:
    """Returns the tensors by name, and the required size of the file [bytes]."""
    tensors = dict[str, StoredTensor]()
    offset, size = 28 if legacy else 256, file_size(path)
    head = () if config.tied_head else ("output",)
    dtype = np.dtype("<f4")

    for name in (*(_LEGACY if legacy else _VERSION_1), *head):
        axes = AXES[name]
        shape = tuple(math.prod(config.shape(s)) for s in (axes.rows, axes.columns) if s)
        if legacy and name == "output":  # the head follows two tables of cosines and sines
            offset += 4 * config.context * config.head_dim
        for layer in range(config.n_layers) if name in LAYER_WEIGHTS else [None]:
            full = layout.names[name].format(layer)
            tensors[full] = mapped_tensor(path, full, dtype, offset, shape)
            offset += 4 * math.prod(shape)
            if offset > size:
                return tensors, offset + 1
    if legacy and config.tied_head:
        offset += 4 * config.context * config.head_dim
    return tensors, offset
