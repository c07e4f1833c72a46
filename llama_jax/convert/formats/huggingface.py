"""Reads and writes Hugging Face folders: `config.json`, and safetensors or PyTorch files."""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from llama_jax.config.model import ModelConfig, RopeScaling
from llama_jax.convert.files.safetensors import SafetensorsWriter, read_safetensors
from llama_jax.convert.files.tensor_file import StoredTensor, quote
from llama_jax.convert.files.torch_zip import read_torch
from llama_jax.convert.layout import Layout, Weight
from llama_jax.convert.source import (
    Source,
    config_dtypes,
    model_config,
    positive_float,
    positive_int,
    read_json,
)
from llama_jax.errors import InputError
from llama_jax.runtime.storage import AnyPath

NAMES = {
    "tok_embeddings": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "wq": "model.layers.{}.self_attn.q_proj.weight",
    "wk": "model.layers.{}.self_attn.k_proj.weight",
    "wv": "model.layers.{}.self_attn.v_proj.weight",
    "wo": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "w1": "model.layers.{}.mlp.gate_proj.weight",
    "w3": "model.layers.{}.mlp.up_proj.weight",
    "w2": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
}
_CONTEXT = "max_position_embeddings"
MAX_FILE_BYTES = 5_000_000_000  # the limit of transformers' files


def read(folder: AnyPath) -> Source:
    """Returns the checkpoint in a Hugging Face folder.

    Raises:
        InputError: a file is missing or damaged, or the model is not a LLaMA.
    """
    tensors = _read_weights(folder)
    config = read_config(folder / "config.json", **config_dtypes(tensors))
    stores_tied_head = config.tied_head and NAMES["output"] in tensors
    return Source(
        "huggingface", folder, config, Layout(NAMES, stores_tied_head=stores_tied_head), (tensors,)
    )


def read_config(path: AnyPath, **computed: Any) -> ModelConfig:
    """Returns the shape that a Hugging Face `config.json` describes.

    Args:
        path: the file.
        computed: `dtype` and `param_dtype`.

    Raises:
        InputError: it is missing, not of a LLaMA, or describes a feature that LLaMA lacks.
    """
    theirs = read_json(path)
    if theirs.get("model_type") != "llama":
        raise InputError(
            f"{path} describes a {quote(theirs.get('model_type'))} model, not a llama: give a LLaMA"
            " checkpoint"
        )
    for key in ("attention_bias", "mlp_bias"):
        if theirs.get(key):
            raise InputError(
                f"{path}: {key} is true, but LLaMA has no biases: give a LLaMA checkpoint"
            )
    if theirs.get("hidden_act", "silu") != "silu":
        raise InputError(
            f"{path}: hidden_act is {quote(theirs['hidden_act'])}, but LLaMA's is silu: give a"
            " LLaMA checkpoint"
        )
    if theirs.get("quantization_config"):
        raise InputError(
            f"{path}: the weights are quantized ({_method(theirs)[:100]!a}): fetch the unquantized"
            " model"
        )
    dim, n_heads = (positive_int(theirs, k, path) for k in ("hidden_size", "num_attention_heads"))
    kv, head = theirs.get("num_key_value_heads"), theirs.get("head_dim")
    # transformers 5 stores all parameters of the rotary embedding under one key.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling")
    if not isinstance(rope, dict | None):
        raise InputError(
            f"{path} has {quote(rope)} as its rope parameters, which must be an object: correct it"
        )
    theta = positive_float(theirs, "rope_theta", 1e4, path)
    theta = positive_float(rope or {}, "rope_theta", theta, path)
    return model_config(
        path,
        dim=dim,
        n_layers=positive_int(theirs, "num_hidden_layers", path),
        n_heads=n_heads,
        n_kv_heads=n_heads if kv is None else positive_int(theirs, "num_key_value_heads", path),
        head_dim=max(1, dim // n_heads) if head is None else positive_int(theirs, "head_dim", path),
        hidden_dim=positive_int(theirs, "intermediate_size", path),
        vocab_size=positive_int(theirs, "vocab_size", path),
        context=positive_int({_CONTEXT: 2048} | theirs, _CONTEXT, path),
        norm_eps=positive_float(theirs, "rms_norm_eps", 1e-6, path),
        rope_theta=theta,
        rope_scaling=_rope_scaling(rope, path),
        tied_head=theirs.get("tie_word_embeddings", False),
        **computed,
    )


def _method(theirs: dict[str, Any]) -> str:
    """Returns the name of the quantization method."""
    quantization = theirs["quantization_config"]
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "?"))
    return str(quantization)


def _rope_scaling(theirs: dict[str, Any] | None, path: AnyPath) -> RopeScaling | None:
    kind = (theirs or {}).get("rope_type", (theirs or {}).get("type", "default"))
    if theirs is None or kind == "default":
        return None
    if kind != "llama3":
        raise InputError(
            f"{path}: rope scaling of type {quote(kind)} is not LLaMA's: give a LLaMA checkpoint"
        )
    try:
        return RopeScaling(
            factor=theirs["factor"],
            low_freq_factor=theirs["low_freq_factor"],
            high_freq_factor=theirs["high_freq_factor"],
            original_context=theirs["original_max_position_embeddings"],
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: the llama3 rope scaling is incomplete or invalid: correct the file"
        ) from error


def _read_weights(folder: AnyPath) -> dict[str, StoredTensor]:
    """Returns all tensors, from one file or from the files of an index.

    Raises:
        InputError: there are no weights, or they are damaged.
    """
    kinds = (("model", "safetensors", read_safetensors), ("pytorch_model", "bin", read_torch))
    for stem, ending, read_file in kinds:
        index = folder / f"{stem}.{ending}.index.json"
        if index.exists():
            return _read_indexed(folder, index, read_file)
        if (folder / f"{stem}.{ending}").exists():
            return read_file(folder / f"{stem}.{ending}")
    raise InputError(
        f"{folder} contains no weights (model.safetensors, pytorch_model.bin, or one of their"
        " .index.json): fetch them too"
    )


def _read_indexed(folder: AnyPath, index: AnyPath, read_file: Any) -> dict[str, StoredTensor]:
    """Returns the tensors of all files that `index` maps names to.

    Raises:
        InputError: a file is missing, or index and files disagree.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index} has no weight_map of names to files: fetch it again")
    tensors = dict[str, StoredTensor]()
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise InputError(
                f"{index} names {quote(name)}, which is not a file of its own folder: fetch the"
                " index again"
            )
        if name not in present:
            raise InputError(f"{index} names {quote(name)}, which is missing: fetch it too")
        found = read_file(folder / name)
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        if expected != found.keys():
            different = min(expected ^ found.keys())
            raise InputError(
                f"{index} and {folder / name} disagree about {quote(different)}: fetch both again"
            )
        tensors |= found
    return tensors


class HuggingFaceWriter:
    """Writes safetensors files and their index, weight by weight in the order of the model."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        layout: Layout,
        dtypes: Mapping[Weight, np.dtype],
    ):
        self.files = dict[str, bytes]()  # these formats have no manifest
        files: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
        filled = 0
        for weight, dtype in dtypes.items():
            for _, name, shape in layout.tensor_specs(config, weight):
                size = int(np.prod(shape)) * dtype.itemsize
                if filled and filled + size > MAX_FILE_BYTES:
                    files.append({})
                    filled = 0
                files[-1][name] = (shape, dtype)
                filled += size
        n = len(files)
        paths = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        paths = paths if n > 1 else ["model.safetensors"]
        if n > 1:
            sizes = [int(np.prod(s)) * d.itemsize for file in files for s, d in file.values()]
            weight_map = {t: path for path, file in zip(paths, files, strict=True) for t in file}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        self._remaining = [(folder / p, file) for p, file in zip(paths, files, strict=True)]
        self._open = ExitStack()
        self._file: SafetensorsWriter | None = None
        self._names: Mapping[str, Any] = {}

    def write(self, tensors: Iterable[tuple[int, str, np.ndarray]]) -> None:
        """Writes tensors, given as (0, name, array)."""
        for _, name, array in tensors:
            if self._file is None or name not in self._names:
                self._open.close()
                path, self._names = self._remaining.pop(0)
                self._file = self._open.enter_context(SafetensorsWriter(path, self._names))
            self._file.write(name, array)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Completes the open file, or removes it after an error."""
        self._open.__exit__(*error)


def config_json(config: ModelConfig, bos_id: int | None, end_ids: Iterable[int]) -> dict[str, Any]:
    """Returns the `config.json` from which transformers creates this model."""
    ends = sorted(end_ids)
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": config.param_dtype,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
