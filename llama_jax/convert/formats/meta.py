"""Reads and writes Meta folders: `params.json` and `consolidated.NN.pth`, one for each rank."""

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from llama_jax.config.family import FAMILY
from llama_jax.config.model import ModelConfig, RopeScaling, ffn_dim
from llama_jax.convert.files.tensor_file import StoredTensor, quote
from llama_jax.convert.files.torch_zip import TorchWriter, read_torch
from llama_jax.convert.layout import Layout, Weight, same_bits
from llama_jax.convert.source import (
    Source,
    config_dtypes,
    model_config,
    positive_float,
    positive_int,
    read_json,
)
from llama_jax.errors import InputError
from llama_jax.runtime.process_memory import check_memory
from llama_jax.runtime.storage import AnyPath, open_file

_ATTENTION, _FFN = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
NAMES = (
    {name: f"{name}.weight" for name in ("tok_embeddings", "norm", "output")}
    | {name: f"layers.{{}}.{name}.weight" for name in ("attention_norm", "ffn_norm")}
    | {name: f"layers.{{}}.attention.{name}.weight" for name in _ATTENTION}
    | {name: f"layers.{{}}.feed_forward.{name}.weight" for name in _FFN}
)
_FILE = re.compile(r"consolidated\.(\d+)\.pth")


def read(folder: AnyPath) -> Source:
    """Returns the checkpoint in a Meta folder.

    params.json lacks the context, and the factor of the rope scaling (Meta's code always uses 8;
    Llama 3.2 needs 32): both come from the member of the family with the same shape.

    Raises:
        InputError: a file is missing or damaged, or the files don't belong together.
    """
    path = folder / "params.json"
    params = read_json(path)
    shards = tuple(_read_shard(file, i) for i, file in enumerate(_files(folder)))
    first = shards[0].get(NAMES["tok_embeddings"])
    if first is None or len(first.shape) != 2:
        raise InputError(f"{folder} lacks {NAMES['tok_embeddings']}: give a LLaMA checkpoint")
    dim, n_heads = positive_int(params, "dim", path), positive_int(params, "n_heads", path)
    split = 1 if first.shape[1] != dim else 0
    rows = first.shape[0] * (1 if split else len(shards))
    vocab_size = (
        rows if params.get("vocab_size", -1) == -1 else positive_int(params, "vocab_size", path)
    )
    multiplier, kv = params.get("ffn_dim_multiplier"), params.get("n_kv_heads")
    config = model_config(
        path,
        dim=dim,
        n_layers=positive_int(params, "n_layers", path),
        n_heads=n_heads,
        n_kv_heads=n_heads if kv is None else positive_int(params, "n_kv_heads", path),
        head_dim=max(1, dim // n_heads),
        hidden_dim=ffn_dim(
            dim,
            positive_int({"multiple_of": 256} | params, "multiple_of", path),
            None if multiplier is None else positive_float(params, "ffn_dim_multiplier", 1.0, path),
        ),
        vocab_size=vocab_size,
        norm_eps=positive_float(params, "norm_eps", 1e-5, path),
        rope_theta=positive_float(params, "rope_theta", 10_000.0, path),
        **config_dtypes(shards[0]),
    )
    config = _with_context_and_rope(config, params, "rope.freqs" in shards[0], path)
    layout = Layout(
        NAMES, interleaved=True, shards=len(shards), embedding_split=split, stores_tied_head=True
    )
    source = Source("meta", folder, config, layout, shards)
    tied = replace(source, config=replace(config, tied_head=True))
    return tied if _is_tied(source) else source


def _files(folder: AnyPath) -> list[AnyPath]:
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := _FILE.fullmatch(p.name))]
    found = dict(numbered)
    if sorted(i for i, _ in numbered) != list(range(len(found))) or not found:
        has = ", ".join(str(i) for i, _ in sorted(numbered)) or "none"
        raise InputError(
            f"{folder} must contain consolidated.00.pth, .01.pth … each once and without a gap,"
            f" but it has {has}: fetch the missing ones"
        )
    return [found[i] for i in range(len(found))]


def _read_shard(path: AnyPath, number: int) -> dict[str, StoredTensor]:
    tensors = read_torch(path)
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        inner = _FILE.fullmatch(archive.namelist()[0].split("/")[0] + ".pth")
    # PyTorch stores the file's name inside the file, which reveals a renamed shard.
    if inner and int(inner[1]) != number:
        raise InputError(
            f"{path} was written as shard {int(inner[1])}, not {number}: give the files their"
            " original names"
        )
    return tensors


def _with_context_and_rope(
    config: ModelConfig, params: dict[str, Any], llama2: bool, path: AnyPath
) -> ModelConfig:
    """Returns the configuration with its context and rope scaling, which params.json lacks.

    Args:
        config: the configuration from params.json.
        params: the content of params.json.
        llama2: whether the checkpoint is of Llama 2: its 7B and 13B have the shapes of LLaMA's.
        path: params.json, for messages.
    """
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool | None):
        raise InputError(f"{path} has {quote(scaled)} as use_scaled_rope: correct the file")
    config = replace(config, rope_scaling=RopeScaling() if scaled else None)
    member = next((member for member in FAMILY.values() if _same_shape(member, config)), None)
    if llama2:
        context = 4096
    elif member:
        context = member.context
    else:
        context = 131_072 if scaled else {5e5: 8192, 1e6: 16_384}.get(config.rope_theta, 2048)
    factor = member.rope_scaling.factor if member and member.rope_scaling else 8.0
    factor = positive_float(params, "rope_scaling_factor", factor, path)
    scaling = RopeScaling(factor=factor) if scaled else None
    return replace(config, context=context, rope_scaling=scaling)


def _same_shape(a: ModelConfig, b: ModelConfig) -> bool:
    def key(config: ModelConfig) -> tuple[Any, ...]:
        heads = (config.n_heads, config.n_kv_heads, config.vocab_size, config.rope_theta)
        return (config.dim, config.n_layers, config.hidden_dim, *heads, bool(config.rope_scaling))

    return key(a) == key(b)


def _is_tied(source: Source) -> bool:
    """Returns whether head and embedding have the same bits, as in Llama 3.2 1B and 3B.

    False if their shapes or types are wrong: `validate_source` reports those.

    Raises:
        InputError: the machine lacks the memory for the comparison.
    """
    embedding, head = Weight("tok_embeddings"), Weight("output")
    names = NAMES["tok_embeddings"], NAMES["output"]
    if any(name not in shard for name in names for shard in source.shards):
        return False
    tensors = source.stored_tensors(embedding), source.stored_tensors(head)
    for weight, parts in zip((embedding, head), tensors, strict=True):
        expected = {shape for _, _, shape in source.layout.tensor_specs(source.config, weight)}
        if {part.shape for part in parts} != expected or len({part.dtype for part in parts}) > 1:
            return False
    compared = sum(part.nbytes for parts in tensors for part in parts)
    check_memory(compared, f"comparing {names[0]} with {names[1]} in {source.path}")
    first_row = np.concatenate([part.read()[0] for part in tensors[0]])[: source.config.dim]
    if not same_bits(first_row, tensors[1][0].read()[0]):
        return False  # the usual case: no need to read everything
    a, b = (
        source.layout.to_ours(source.config, weight, [part.read() for part in parts])
        for weight, parts in zip((embedding, head), tensors, strict=True)
    )
    return same_bits(a, b.T)


def writer_layout(config: ModelConfig, shards: int) -> Layout:
    """Returns the layout of a model with this configuration in `shards` files.

    Raises:
        InputError: the sizes are not divisible by `shards`, or Meta's format can't represent the
            configuration.
    """
    if config.head_dim * config.n_heads != config.dim:
        raise InputError(
            f"Meta's format has heads of size dim / n_heads, but this model has {config.n_heads}"
            f" heads of size {config.head_dim} and a dim of {config.dim}: convert to Hugging Face's"
            " format instead"
        )
    if config.rope_scaling and replace(config.rope_scaling, factor=8.0) != RopeScaling():
        raise InputError(
            "Meta's format can represent only the rope scaling of Llama 3.1 and 3.2, not this"
            " model's: convert to Hugging Face's format instead"
        )
    by_vocab = config.rope_theta == 5e5  # Llama 3 and later split the embedding by vocabulary
    embedding_size = config.vocab_size if by_vocab else config.dim

    def divides(n: int) -> bool:
        kv = config.n_kv_heads % n == 0 or n % config.n_kv_heads == 0
        sizes = (config.n_heads, config.hidden_dim, config.vocab_size, embedding_size)
        return kv and not any(size % n for size in sizes)

    if not divides(shards):
        fitting = [n for n in range(1, config.n_heads + 1) if divides(n)]
        raise InputError(
            f"--shards {shards} does not divide this model (heads {config.n_heads}, key/value heads"
            f" {config.n_kv_heads}, FFN {config.hidden_dim}, vocabulary {config.vocab_size});"
            f" numbers that do: {', '.join(map(str, fitting))}"
        )
    return Layout(
        NAMES, interleaved=True, shards=shards, embedding_split=not by_vocab, stores_tied_head=True
    )


class MetaWriter:
    """Writes params.json and the shards into `folder`, weight by weight in the model's order."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        layout: Layout,
        dtypes: Mapping[Weight, np.dtype],
    ):
        self.files = dict[str, bytes]()  # these formats have no manifest
        headers: list[dict[str, tuple[tuple[int, ...], np.dtype]]]
        headers = [{} for _ in range(layout.shards)]
        for weight, dtype in dtypes.items():
            for shard, name, shape in layout.tensor_specs(config, weight):
                headers[shard][name] = (shape, dtype)
        (folder / "params.json").write_text(json.dumps(params_json(config)))
        self._open = ExitStack()
        self._files = [
            self._open.enter_context(TorchWriter(folder / f"consolidated.{i:02d}.pth", header))
            for i, header in enumerate(headers)
        ]

    def write(self, tensors: Iterable[tuple[int, str, np.ndarray]]) -> None:
        """Writes tensors, given as (shard, name, array)."""
        for shard, name, array in tensors:
            self._files[shard].write(name, array)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """Completes the files, or removes them after an error."""
        self._open.__exit__(*error)


def params_json(config: ModelConfig) -> dict[str, Any]:
    """Returns params.json; keys that Meta's oldest code doesn't know are omitted if possible."""
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        **_ffn_params(config),
    }
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10_000.0:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling:
        params["use_scaled_rope"] = True
        if config.rope_scaling.factor != 8.0:
            params["rope_scaling_factor"] = config.rope_scaling.factor
    return params


def _ffn_params(config: ModelConfig) -> dict[str, Any]:
    """Returns `multiple_of` and `ffn_dim_multiplier` from which Meta's code computes F."""
    for multiplier in (None, 1.3, 1.4, 1.5):  # the values of released models
        for multiple_of in (256, 1024, 4096):
            if ffn_dim(config.dim, multiple_of, multiplier) == config.hidden_dim:
                found = {"multiple_of": multiple_of}
                return found | ({"ffn_dim_multiplier": multiplier} if multiplier else {})
    # Half above F: Meta's code truncates the product, which is then F despite rounding.
    exact = (config.hidden_dim + 0.5) / int(8 * config.dim / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": exact}
