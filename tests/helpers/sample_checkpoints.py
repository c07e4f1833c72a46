"""Writes a tiny model with random weights as a complete checkpoint in every format."""

import json
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import tiny_config, tiny_model
from tensor_files import reader_of, write_tensors

from llama_jax.config import yaml_file
from llama_jax.convert.convert import convert
from llama_jax.convert.formats import gguf as our_gguf
from llama_jax.convert.formats import huggingface, llama2c, meta
from llama_jax.convert.layout import AXES, Layout, weights
from llama_jax.runtime.manifest import read_manifest, write_manifest
from llama_jax.tokenizer.build import build_sentencepiece_model, infer_piece_types

MODEL = tiny_model(n_heads=4, n_kv_heads=2, vocab_size=288, context=2048)


def convert_to(source: Path, folder: Path, **options: Any) -> Path:
    """Converts a checkpoint without a progress bar; returns the new folder."""
    return convert(source, folder, progress=False, **options).folder


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".gguf":
        return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    return {name: np.array(tensor.read()) for name, tensor in reader_of(path)(path).items()}


def random_weights(
    layout: Layout, seed: int = 0, config=MODEL
) -> list[tuple[int, str, np.ndarray]]:
    """Returns (shard, name, tensor) for every tensor of a model with random weights."""
    rng, tensors = np.random.default_rng(seed), []
    for weight in weights(config):
        ours = rng.standard_normal(config.shape(AXES[weight.name].ours), np.float32)
        named = layout.tensor_specs(config, weight)
        parts = map(np.ascontiguousarray, layout.from_ours(config, weight, ours))
        tensors += [(i, name, part) for (i, name, _), part in zip(named, parts, strict=True)]
    return tensors


def write_folder(folder: Path, kind: Any, shards: int, seed: int = 0, config=MODEL) -> None:
    is_meta = kind is meta
    layout = meta.writer_layout(config, shards) if is_meta else Layout(huggingface.NAMES)
    folder.mkdir()
    dtypes = dict.fromkeys(weights(config), np.dtype(np.float32))
    writer_class = meta.MetaWriter if is_meta else huggingface.HuggingFaceWriter
    with writer_class(folder, config, layout, dtypes) as writer:
        writer.write(random_weights(layout, seed, config))
    if not is_meta:
        (folder / "config.json").write_text(json.dumps(huggingface.config_json(config, 1, [2])))


def tokenizer_model(n: int = MODEL.vocab_size) -> bytes:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefgh"]
    pieces += [f"ab{i}" for i in range(n - len(pieces))]
    scores = [-float(i) for i in range(n)]
    return build_sentencepiece_model(
        pieces, scores, infer_piece_types(pieces, (1, 2)), Path("here")
    )


GGUF_SHAPE = {
    "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "context_length": 2048,
    "attention.head_count": 4, "attention.head_count_kv": 2, "rope.freq_base": 1e4,
    "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"abcdefghijklmnopq"]
WORDS += [f"a{c}" for c in "abcdefghijkl"]
GGUF_TOKENIZER = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.scores": [-float(i) for i in range(MODEL.vocab_size)],
    "tokenizer.ggml.token_type": infer_piece_types(WORDS, (1, 2)),
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray], kind: str, **changes: Any) -> None:
    """Writes a GGUF file; `changes` replaces values of its metadata, None removes them."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {f"llama.{k}": v for k, v in GGUF_SHAPE.items()}
    metadata |= (GGUF_TOKENIZER if kind == "Q8_0" else {}) | changes
    adds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            list: writer.add_array, bool: writer.add_bool}  # fmt: skip
    for key, value in metadata.items():
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < 1 << 32:
            (writer.add_int32 if value < 0 else writer.add_uint64)(key, value)
        elif value is not None:
            adds[type(value)](key, value)
    for name, array in tensors.items():
        blocks = array.ndim == 2 and array.shape[1] % 32 == 0 and array.dtype == np.float32
        if kind == "Q8_0" and blocks:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_TENSORS = {n: a for _, n, a in random_weights(Layout(our_gguf.NAMES, interleaved=True))}


def write_llama2c(path: Path, version: int) -> None:
    arrays: dict[str, list[np.ndarray]] = {}
    for _, name, array in random_weights(Layout(llama2c.NAMES, interleaved=True)):
        arrays.setdefault(name.partition("[")[0], []).append(array)
    table = [np.zeros(MODEL.context * MODEL.head_dim, np.float32)]
    order = "tok_embeddings attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm table output"
    if version:
        order = "attention_norm ffn_norm norm tok_embeddings wq wk wv wo w1 w2 w3 output"
    vocab = MODEL.vocab_size if version else -MODEL.vocab_size
    header = struct.pack("<7i", 32, 64, 2, 4, 2, vocab, MODEL.context)
    if version:
        header = (b"24ka" + struct.pack("<i", 1) + header + b"\0").ljust(256, b"\0")
    ordered = [array for name in order.split() for array in (arrays | {"table": table})[name]]
    path.write_bytes(header + b"".join(array.tobytes() for array in ordered))


def write_all_formats(folder: Path) -> dict[str, Path]:
    """Writes MODEL in every format, and two other models in `other`; returns the paths by name."""
    write_folder(folder / "meta1", meta, 1)
    (folder / "meta1/tokenizer.model").write_bytes(tokenizer_model())
    write_folder(folder / "meta2", meta, 2)
    write_folder(folder / "hf1", huggingface, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "MAX_FILE_BYTES", 60_000)
        write_folder(folder / "hf3", huggingface, 1)
    for name, source in (("bin1", "hf1"), ("bin3", "hf3")):
        (folder / name).mkdir()
        shutil.copy(folder / source / "config.json", folder / name)
        for path in (folder / source).glob("*.safetensors"):
            write_tensors(folder / name / f"pytorch_{path.stem}.bin", read_tensors(path))
    index = (folder / "hf3/model.safetensors.index.json").read_text()
    index = re.sub(r"(model-\d+-of-\d+)\.safetensors", r"pytorch_\1.bin", index)
    (folder / "bin3/pytorch_model.bin.index.json").write_text(index)
    write_gguf(folder / "f32.gguf", GGUF_TENSORS, "F32")
    write_gguf(folder / "q8.gguf", GGUF_TENSORS, "Q8_0")
    write_llama2c(folder / "legacy.bin", 0)
    write_llama2c(folder / "version1.bin", 1)
    convert_to(folder / "meta1", folder / "model")
    convert_to(folder / "meta1", folder / "export", to="hf")
    shutil.copytree(folder / "model/weights", folder / "run/checkpoints/3")
    files = read_manifest(folder / "model")["files"]
    weights = {n.removeprefix("weights/"): h for n, h in files.items() if n.startswith("weights/")}
    content = {"format": 1, "step": 3, "data": [], "files": weights, "fingerprints": {}}
    write_manifest(folder / "run/checkpoints/3", content)
    (folder / "run/config.yaml").write_text(yaml_file.dump(tiny_config(MODEL)))
    (folder / "other").mkdir()
    wide = replace(MODEL, dim=64, n_heads=8, n_kv_heads=4)
    for i, (seed, config) in enumerate([(1, MODEL), (0, wide)]):
        write_folder(folder / f"other/meta{i}", meta, 2, seed, config)
        write_folder(folder / f"other/hf{i}", huggingface, 1, seed, config)
    return {path.name.split(".")[0]: path for path in folder.iterdir()}
