"""Complete conversions: the same weights from every format, and back bit for bit."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REFERENCES, mesh_of, peer, tiny_config, tiny_model
from sample_checkpoints import convert_to

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.checkpoint.model_folders import load_model, save_model
from llama_jax.checkpoint.single_weights import WeightsReader
from llama_jax.checkpoint.training_checkpoints import Progress, TrainingCheckpoints
from llama_jax.config import yaml_file
from llama_jax.config.run import CheckpointConfig
from llama_jax.convert import layout
from llama_jax.convert.detect import open_source
from llama_jax.convert.files.safetensors import read_safetensors
from llama_jax.convert.files.torch_zip import read_torch
from llama_jax.convert.formats.model_folder import parse_mesh
from llama_jax.errors import InputError
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.training.step import init_state

STORIES = ["stories260K/meta", "stories260K/hf", "stories260K/stories260K.bin"]


def bits(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of all weights of a model folder."""
    reader = WeightsReader(folder)
    return {name: reader.read(name, None).tobytes() for name in reader.arrays}


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Returns type and bytes of all tensors in a Meta or Hugging Face folder, by file and name."""
    content = {}
    for path in sorted([*folder.glob("*.pth"), *folder.glob("*.safetensors")]):
        read = read_torch if path.suffix == ".pth" else read_safetensors
        for name, tensor in read(path).items():
            shard = path.name if path.suffix == ".pth" else ""
            if "freqs" not in name:
                content[shard + name] = (tensor.dtype.name, tensor.read().tobytes())
    return content


def test_stories260k_is_the_same_from_every_format(shared_data, tmp_path):
    folders = [convert_to(shared_data / s, tmp_path / str(i)) for i, s in enumerate(STORIES)]
    first, *others = map(bits, folders)
    assert all(first == other for other in others)
    assert [read_model_config(folder).tied_head for folder in folders] == [True] * 3
    assert read_model_config(folders[1]).differences(read_model_config(folders[2])) == []


@pytest.mark.parametrize("name", ["llama2_mha", "llama2_gqa", "llama3_gqa", "llama31_scaled"])
def test_references_are_the_same_from_every_format(shared_data, tmp_path, name):
    kinds = [r for r in REFERENCES if r.startswith(name)]
    first, *others = (
        bits(convert_to(shared_data / "meta_reference" / k, tmp_path / k)) for k in kinds
    )
    assert others
    assert all(first == other for other in others)


class TestRoundTrips:
    @pytest.mark.parametrize("name", [r for r in REFERENCES if "/mp" in r])
    def test_metas_format_restores_every_bit(self, shared_data, tmp_path, name):
        source = shared_data / "meta_reference" / name
        shards = len(list(source.glob("*.pth")))
        model = convert_to(source, tmp_path / "model")
        back = convert_to(model, tmp_path / "back", to="meta", shards=shards)
        assert tensors(back) == tensors(source)
        other = convert_to(model, tmp_path / "other", to="meta", shards=3 - shards)
        again = convert_to(other, tmp_path / "again", to="meta", shards=shards)
        assert tensors(again) == tensors(source)
        through = convert_to(convert_to(model, tmp_path / "hf", to="hf"), tmp_path / "model2")
        last = convert_to(through, tmp_path / "last", to="meta", shards=shards)
        assert tensors(last) == tensors(source)

    @pytest.mark.parametrize("name", ["llama2_gqa", "llama31_scaled", "stories260K"])
    def test_hugging_faces_format_restores_every_bit(self, shared_data, tmp_path, name):
        at = shared_data if name == "stories260K" else shared_data / "meta_reference"
        source = at / name / "hf"
        back = convert_to(convert_to(source, tmp_path / "m"), tmp_path / "back", to="hf")
        assert tensors(back) == tensors(source)
        configs = [open_source(folder).config for folder in (source, back)]
        assert configs[0] == configs[1]

    def test_the_tokenizer_is_copied(self, shared_data, tmp_path):
        source = shared_data / "stories260K" / "meta"
        back = convert_to(convert_to(source, tmp_path / "m"), tmp_path / "back", to="meta")
        expected = (source / "tokenizer.model").read_bytes()
        assert (back / "tokenizer.model").read_bytes() == expected
        assert (tmp_path / "m" / "tokenizer.model").read_bytes() == expected

    def test_another_tokenizer_can_be_given(self, shared_data, tmp_path):
        given = shared_data / "tokenizers" / "tok512.model"
        folder = convert_to(shared_data / STORIES[2], tmp_path / "m", tokenizer=given)
        assert load_tokenizer(folder).n_vocab == 512

    def test_more_shards_than_key_value_heads_store_each_head_twice(self, tmp_path):
        config = tiny_model(n_heads=8, n_kv_heads=2, head_dim=4)
        with jax.set_mesh(one_device_mesh()):
            model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
            save_model(tmp_path / "m", config, model, None)
        folder = convert_to(tmp_path / "m", tmp_path / "meta", to="meta", shards=4)
        parts = [read_torch(folder / f"consolidated.{i:02d}.pth") for i in range(4)]
        keys = [part["layers.0.attention.wk.weight"].read() for part in parts]
        assert [np.array_equal(keys[0], key) for key in keys] == [True, True, False, False]
        assert bits(convert_to(folder, tmp_path / "back")) == bits(tmp_path / "m")
        assert bits(convert_to(folder, tmp_path / "b", to="orbax")) == bits(tmp_path / "m")

    def test_a_folder_chunked_for_a_mesh_loads_on_that_mesh_and_any_other(
        self, shared_data, tmp_path
    ):
        source = shared_data / "meta_reference/llama2_gqa/mp2"
        plain = convert_to(source, tmp_path / "plain")
        chunked = convert_to(source, tmp_path / "chunked", mesh={"fsdp": 4, "tensor": 2})
        first_layer = (chunked / "weights/model/layers.wq/c/0").rglob("*")
        assert len([path for path in first_layer if path.is_file()]) == 8
        assert bits(chunked) == bits(plain)
        for shape in [(1, 4, 2), (1, 8, 1)]:
            with jax.set_mesh(mesh_of(shape)):
                _, model = load_model(chunked)
            assert np.asarray(model.layers.wq[...]).tobytes() == bits(plain)["layers.wq"]


class TestTransformers:
    @pytest.mark.parametrize("name", ["stories260K/meta", *(r for r in REFERENCES if "mp1" in r)])
    def test_reads_the_export_without_a_warning_and_to_the_same_logits(
        self, shared_data, tmp_path, caplog, name
    ):
        torch, transformers = peer("torch"), peer("transformers")
        at = shared_data if "stories" in name else shared_data / "meta_reference"
        folder = convert_to(convert_to(at / name, tmp_path / "m"), tmp_path / "hf", to="hf")
        transformers.logging.enable_propagation()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        assert not caplog.records
        assert not any(info.values())
        config = replace(read_model_config(tmp_path / "m"), dtype="float32", param_dtype="float32")
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24), np.int32)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        with jax.set_mesh(one_device_mesh()):
            _, model = load_model(tmp_path / "m", config)
            logits = forward(config, model, tokens)
        np.testing.assert_allclose(logits, expected, atol=5e-5)

    def test_reads_an_export_of_several_files(self, shared_data, tmp_path, monkeypatch):
        transformers = peer("transformers")
        monkeypatch.setattr("llama_jax.convert.formats.huggingface.MAX_FILE_BYTES", 300_000)
        source = shared_data / "stories260K/meta"
        folder = convert_to(source, tmp_path / "hf", to="hf")
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
        _, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(info.values())
        assert bits(convert_to(folder, tmp_path / "m")) == bits(
            convert_to(source, tmp_path / "direct")
        )

    def test_pytorch_files_convert_like_safetensors(self, shared_data, tmp_path):
        torch = peer("torch")
        source = shared_data / "meta_reference/llama2_gqa/hf"
        names = {n: torch.from_dlpack(np.array(t.read()).view(np.int16)).view(torch.bfloat16)
                 for n, t in read_safetensors(source / "model.safetensors").items()}  # fmt: skip
        half = len(names) // 2
        files = {f"pytorch_model-0000{i}-of-00002.bin": dict(list(names.items())[part])
                 for i, part in ((1, slice(half)), (2, slice(half, None)))}  # fmt: skip
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, part in files.items():
            torch.save(part, folder / name)
        index = {"weight_map": {n: file for file, part in files.items() for n in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        shutil.copy(source / "config.json", folder)
        assert bits(convert_to(folder, tmp_path / "a")) == bits(convert_to(source, tmp_path / "b"))
        shutil.rmtree(folder)
        folder.mkdir()
        torch.save(names, folder / "pytorch_model.bin")
        shutil.copy(source / "config.json", folder)
        assert bits(convert_to(folder, tmp_path / "c")) == bits(tmp_path / "b")


class TestInterruptions:
    def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(
        self, shared_data, tmp_path, monkeypatch
    ):
        source = shared_data / "stories260K/meta"
        to_ours = layout.Layout.to_ours
        converted = []

        def interrupt_at_20(self, config, weight, tensors):
            converted.append(weight)
            if len(converted) == 20:
                raise KeyboardInterrupt
            return to_ours(self, config, weight, tensors)

        for to in ("orbax", "hf", "meta"):
            converted.clear()
            with monkeypatch.context() as patch:
                patch.setattr(layout.Layout, "to_ours", interrupt_at_20)
                with pytest.raises(KeyboardInterrupt):
                    convert_to(source, tmp_path / to, to=to)
            assert list(tmp_path.iterdir()) == []
            convert_to(source, tmp_path / to, to=to)
            shutil.rmtree(tmp_path / to)

    def test_a_partial_folder_of_a_killed_conversion_is_removed(self, shared_data, tmp_path):
        partial = tmp_path / ".m.partial-0123abcd"
        partial.mkdir()
        (partial / "config.json").write_text("{")
        folder = convert_to(shared_data / "stories260K/meta", tmp_path / "m")
        assert [p.name for p in tmp_path.iterdir()] == [folder.name]

    def test_an_existing_folder_is_not_touched(self, shared_data, tmp_path):
        (tmp_path / "m").mkdir()
        with pytest.raises(InputError, match="already exists"):
            convert_to(shared_data / "stories260K/meta", tmp_path / "m")

    def test_memory_stays_under_the_limit(self, tmp_path):
        """200 MB of weights in a process that may use at most 450 MB."""
        config = tiny_model(dim=512, hidden_dim=8192, n_heads=8, n_kv_heads=8, head_dim=64,
                            vocab_size=1000, n_layers=4)  # fmt: skip
        with jax.set_mesh(one_device_mesh()):
            model = jax.jit(Llama, static_argnums=0)(config, jax.random.key(0))
            save_model(tmp_path / "m", config, model, None)
        for source, folder, to in (
            ("m", "hf", "hf"),
            ("hf", "meta", "meta"),
            ("meta", "o", "orbax"),
        ):
            command = [sys.executable, "-m", "llama_jax", "convert", tmp_path / source,
                       tmp_path / folder, "--to", to, "--max-ram", "450MB"]  # fmt: skip
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            peak = float(done.stdout.split("peak memory ")[1].split()[0])
            assert peak * 2**30 < 450e6
        too_little = subprocess.run(
            [*map(str, command[:5]), str(tmp_path / "x"), "--max-ram", "200MB"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert too_little.returncode == 2
        assert "is too little: the largest weight takes" in too_little.stderr


def test_the_newest_checkpoint_of_a_run_is_exported(tmp_path):
    config, run = tiny_config(), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml_file.dump(config))
    with jax.set_mesh(mesh_of((1, 2, 2))):
        checkpoints = TrainingCheckpoints(run / "checkpoints", CheckpointConfig(keep=2))
        for step in (1, 2):
            state = init_state(config, jax.random.key(step))
            checkpoints.save(Progress(step, []), *state)
        checkpoints.close()
    back = convert_to(convert_to(run, tmp_path / "hf", to="hf"), tmp_path / "m")
    assert bits(back) == bits(run)
    assert bits(back)["layers.w1"] == np.asarray(state[0].layers.w1[...]).tobytes()


def test_mesh_option_gives_the_sizes_of_axes():
    assert parse_mesh("fsdp=8, tensor=4") == {"fsdp": 8, "tensor": 4}
    for text in ("fsdp", "fsdp=0", "rows=2"):
        with pytest.raises(InputError, match=r"is not a mesh axis.*like fsdp=8,tensor=4"):
            parse_mesh(text)
