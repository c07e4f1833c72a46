"""LoRA runs and PEFT folders as source: merged weights, the proof, and refused combinations."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from lora_runs import random_pairs, write_base, write_lora_run
from sample_checkpoints import convert_to

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.single_weights import WeightsReader
from llama_jax.config.lora import IN_OUT_DIMS, LoraConfig
from llama_jax.convert.detect import open_source
from llama_jax.convert.formats import peft
from llama_jax.convert.layout import dequantize, weights
from llama_jax.convert.verify import verify
from llama_jax.errors import InputError

SOME = LoraConfig(rank=2, alpha=4.0, targets=("w2", "wq", "wo"), rank_stabilized=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("lora") / "base", context=2048, head_dim=4)


@pytest.fixture(scope="module")
def run(base):
    return write_lora_run(base.parent / "run", base)


@pytest.fixture(scope="module")
def merged(run):
    return convert_to(run, run.parent / "merged")


@pytest.fixture(scope="module")
def adapter(run):
    return convert_to(run, run.parent / "adapter", to="peft")


def stored(folder):
    """Returns all weights of a model by weight, in our layout."""
    source = open_source(folder)
    return {
        weight: source.layout.to_ours(
            source.config, weight, [tensor.read() for tensor in source.stored_tensors(weight)]
        )
        for weight in weights(source.config)
    }


def assert_merged(folder, base_weights, pairs, epsilon=2.0**-24):
    """Checks each weight against base + scale · a·b in float64.

    A weight may differ by R + 4 roundings in float32 of terms that are at most the sum of their
    magnitudes, and by the rounding of its own type, half of whose epsilon is `epsilon`.
    """
    R = pairs.lora.rank
    for weight, found in stored(folder).items():
        w = base_weights[weight].astype(np.float64)
        if weight.name not in pairs.lora.targets:
            np.testing.assert_array_equal(found.astype(np.float64), w)
            continue
        a, b = (x.astype(np.float64) for x in pairs.read(*weight))
        product = np.tensordot(a, b, 1)
        terms = np.abs(w) + pairs.lora.scale * np.tensordot(np.abs(a), np.abs(b), 1)
        expected = w + pairs.lora.scale * product
        bound = (R + 4) * 2.0**-24 * terms + epsilon * np.abs(expected)
        assert np.all(np.abs(found.astype(np.float64) - expected) <= bound), weight
        assert np.max(np.abs(expected - w)) > 0.05


@pytest.mark.parametrize("to", ["orbax", "hf", "meta"])
def test_the_weights_of_an_export_are_base_plus_scaled_product(base, run, tmp_path, to):
    folder = convert_to(run, tmp_path / "merged", to=to)
    config = read_model_config(base)
    assert_merged(folder, stored(base), random_pairs(config))
    report = json.loads((folder / "receipt.json").read_text())
    assert report["verified"] == {"identical": 7, "converted": 0, "merged": 14}
    assert (report["lora"]["name"], report["lora"]["rank"], report["lora"]["scale"]) == (
        "run", 4, 1.5,
    )  # fmt: skip
    record = next(r for r in report["weights"] if r["weight"] == "layers.1.wo")
    assert [t["name"] for t in record["pair"]] == ["layers.1.wo.a", "layers.1.wo.b"]
    assert verify(folder, run, progress=False) == report["verified"]
    assert verify(folder, base, lora=run, progress=False) == report["verified"]
    assert verify(folder, progress=False) == report["verified"]


def test_the_receipt_names_the_hash_of_the_base(base, merged):
    manifest = json.loads((base / "manifest.json").read_text())
    assert json.loads((merged / "receipt.json").read_text())["lora"]["base"] == manifest["sha256"]


def test_pairs_beside_some_matrices_leave_the_others_bit_for_bit(base, tmp_path):
    folder = convert_to(write_lora_run(tmp_path / "run", base, SOME), tmp_path / "merged")
    assert_merged(folder, stored(base), random_pairs(read_model_config(base), SOME))


def test_a_base_in_bfloat16_is_merged_in_float32_and_rounded_once(tmp_path):
    base = write_base(tmp_path / "base", param_dtype="bfloat16", dtype="bfloat16")
    run = write_lora_run(tmp_path / "run", base)
    pairs = random_pairs(read_model_config(base))
    folder = convert_to(run, tmp_path / "merged")
    assert {w.dtype for w in stored(folder).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_merged(folder, stored(base), pairs, epsilon=2.0**-8)
    # In float32 nothing is rounded to bfloat16 at all.
    wide = convert_to(run, tmp_path / "wide", dtype="float32")
    assert_merged(wide, stored(base), pairs)


def test_int8_weights_are_dequantized_before_the_sum(base, tmp_path):
    int8 = convert_to(base, tmp_path / "int8", quantize="int8")
    run = write_lora_run(tmp_path / "run", int8)
    folder = convert_to(run, tmp_path / "merged", to="hf")
    assert open_source(folder).config.quantized == "none"
    reader, source = WeightsReader(int8), open_source(int8)
    dequantized = {}
    for weight in weights(source.config):
        name = f"layers.{weight.name}" if weight.layer is not None else weight.name
        if f"{name}.values" in reader.arrays:
            parts = [reader.read(f"{name}.{side}", weight.layer) for side in ("values", "scale")]
            dequantized[weight] = dequantize(weight, *parts)
        else:
            dequantized[weight] = reader.read(name, weight.layer)
    assert_merged(folder, dequantized, random_pairs(source.config))
    assert verify(folder, run, progress=False) == {"identical": 5, "converted": 2, "merged": 14}


def test_quantization_follows_the_merge(base, run, merged, tmp_path):
    at_once = convert_to(run, tmp_path / "at-once", quantize="int8")
    afterwards = convert_to(merged, tmp_path / "afterwards", quantize="int8")
    readers = [WeightsReader(folder) for folder in (at_once, afterwards)]
    for name in readers[0].arrays:
        np.testing.assert_array_equal(*(reader.read(name, None) for reader in readers))
    counts = {"identical": 5, "converted": 2, "merged": 14}
    assert verify(at_once, run, progress=False) == counts


def test_pairs_beside_weights_that_training_quantized_are_merged_with_a_warning(base, tmp_path):
    from llama_jax.convert.convert import convert

    run = write_lora_run(tmp_path / "run", base, quantized="int8")
    outcome = convert(run, tmp_path / "merged", progress=False)
    assert any("was trained beside int8 weights" in note for note in outcome.notes)
    assert_merged(outcome.folder, stored(base), random_pairs(read_model_config(base)))


def test_a_run_that_changed_the_rotary_embedding_exports_its_own(base, tmp_path):
    run = write_lora_run(tmp_path / "run", base, rope_theta=5e5, context=4096)
    source = open_source(convert_to(run, tmp_path / "merged", to="hf"))
    assert (source.config.rope_theta, source.config.context) == (5e5, 4096)
    with pytest.raises(InputError, match=r"with model.rope_theta 500000.0, but the base has"):
        convert_to(base, tmp_path / "other", lora=run)


class TestPeftFolders:
    def test_an_export_has_the_pairs_of_the_run_bit_for_bit(self, base, run, adapter):
        config = read_model_config(base)
        back, expected = peft.read(adapter, config), random_pairs(config)
        for name in IN_OUT_DIMS:
            for layer in range(config.n_layers):
                for ours, theirs in zip(
                    back.read(name, layer), expected.read(name, layer), strict=True
                ):
                    np.testing.assert_array_equal(ours, theirs)
        report = json.loads((adapter / "receipt.json").read_text())
        assert report["verified"] == {"identical": 28, "converted": 0}
        assert verify(adapter, run, progress=False) == report["verified"]
        assert verify(adapter, progress=False) == report["verified"]

    def test_it_merges_into_the_base_like_the_run(self, base, merged, adapter, tmp_path):
        folder = convert_to(base, tmp_path / "m", lora=adapter)
        ours, theirs = stored(folder), stored(merged)
        assert all(np.array_equal(ours[weight], theirs[weight]) for weight in theirs)
        exported = convert_to(base, tmp_path / "hf", to="hf")
        again = stored(convert_to(exported, tmp_path / "m2", lora=adapter))
        assert all(np.array_equal(again[weight], theirs[weight]) for weight in theirs)

    def test_a_changed_export_is_detected(self, base, adapter, run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(adapter, copy)
        path = copy / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-2] ^= 4
        path.write_bytes(data)
        with pytest.raises(InputError, match="the pairs are not those that were written"):
            verify(copy, progress=False)
        path.write_bytes((adapter / path.name).read_bytes())
        other = write_lora_run(tmp_path / "other", base, seed=1)
        with pytest.raises(InputError, match="does not contain the pairs that were exported"):
            verify(copy, other, progress=False)
        (copy / "receipt.json").write_text("{}")
        with pytest.raises(InputError, match="is damaged"):
            verify(copy, progress=False)

    def test_only_the_pairs_of_a_run_are_exported(self, base, run, tmp_path):
        with pytest.raises(InputError, match="is not a LoRA run, and --to peft writes low-rank"):
            convert_to(base, tmp_path / "m", to="peft")
        with pytest.raises(InputError, match="use no other option than --tokenizer"):
            convert_to(run, tmp_path / "m", to="peft", dtype="bfloat16")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_of_pairs_is_no_model(self, adapter, tmp_path):
        with pytest.raises(InputError, match="contains low-rank pairs of PEFT, and no model"):
            convert_to(adapter, tmp_path / "m")
        with pytest.raises(InputError, match="contains low-rank pairs of PEFT, and no model"):
            read_model_config(adapter)


class TestRefusals:
    def test_a_flipped_bit_of_a_merged_weight_is_detected(self, run, merged, tmp_path):
        for name in ("orbax", "hf"):
            folder = tmp_path / name
            if name == "orbax":
                shutil.copytree(merged, folder)
            else:
                convert_to(run, folder, to="hf")
            largest = max(
                (p for p in folder.rglob("*") if p.is_file() and "json" not in p.name),
                key=lambda p: p.stat().st_size,
            )
            data = bytearray(largest.read_bytes())
            data[len(data) // 2] ^= 4
            largest.write_bytes(data)
            with pytest.raises(InputError, match=r"is not the tensor|damaged|restore"):
                verify(folder, progress=False)

    def test_other_pairs_or_no_pairs_are_not_those_of_the_conversion(self, base, merged, tmp_path):
        sentence = "was not merged with this low-rank pair: give the LoRA run"
        other = write_lora_run(tmp_path / "other", base, seed=1)
        for lora in (other, None):
            with pytest.raises(InputError, match=sentence):
                verify(merged, base, lora=lora, progress=False)

    def test_pairs_are_merged_only_into_the_base_of_their_training(self, run, adapter, tmp_path):
        other = write_base(tmp_path / "other", context=2048, head_dim=4, norm_eps=1e-6)
        for lora in (run, adapter):
            sentence = r"are not those beside which the pairs of .* were trained"
            with pytest.raises(InputError, match=sentence):
                convert_to(other, tmp_path / "m", lora=lora)
        moved = tmp_path / "moved"
        shutil.copytree(run, moved)
        text = (moved / "config.yaml").read_text()
        for path, sentence in [
            (other, "are not those beside which the pairs of .* were trained"),
            (tmp_path / "nowhere", "the model that it started from, .*nowhere, is not there"),
        ]:
            (moved / "config.yaml").write_text(text.replace(str(run.parent / "base"), str(path)))
            with pytest.raises(InputError, match=sentence):
                convert_to(moved, tmp_path / "m")
        assert not (tmp_path / "m").exists()

    def test_a_run_has_its_own_pairs(self, run, merged, tmp_path):
        with pytest.raises(InputError, match="is a LoRA run, which has low-rank pairs of its own"):
            convert_to(run, tmp_path / "m", lora=run)
        with pytest.raises(InputError, match=r"is neither a LoRA run .* nor a PEFT folder"):
            convert_to(merged, tmp_path / "m", lora=merged)

    def test_a_changed_rank_does_not_fit_the_checkpoint(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        path = tmp_path / "run/config.yaml"
        path.write_text(path.read_text().replace("rank: 4", "rank: 8"))
        with pytest.raises(InputError, match=r"the pair of wq has a \(2, 32, 4\), but .* require"):
            convert_to(tmp_path / "run", tmp_path / "m")
