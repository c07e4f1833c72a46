"""Runs of LoRA: killed, resumed, on other meshes, beside a base that is checked."""

import shutil
import signal
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_model
from processes import Group
from test_loop import losses, start_process, wait_for_step

from llama_jax.checkpoint import training_checkpoints
from llama_jax.checkpoint.model_folders import load_model, manifest_hash, save_model
from llama_jax.checkpoint.training_checkpoints import TrainingCheckpoints
from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.checkpoint.verify_folder import verify_folder
from llama_jax.config import yaml_file
from llama_jax.config.lora import LoraConfig
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)
from llama_jax.errors import InputError
from llama_jax.inference.load import load
from llama_jax.model.quantize import Int8Matrix
from llama_jax.model.transformer import forward
from llama_jax.model.weights import Llama, quantize_model
from llama_jax.parallel.mesh import one_device_mesh
from llama_jax.runtime.manifest import verified_manifest
from llama_jax.training import loop, start
from llama_jax.training.metrics import read_metrics
from llama_jax.training.step import init_state
from llama_jax.training.trainable import complete_model

STEPS = 12


def config(folder, data, base, *, mesh=(2, 2, 2), lora=None, model=None, local=None, **training):
    return Config(
        model=model or tiny_model(context=128),
        mesh=MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
        data=DataConfig(mixture={str(data): 1.0}, batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(warmup_steps=2, peak_lr=2e-2),
        lora=LoraConfig(**({"rank": 4, "dropout": 0.1} | (lora or {}))),
        training=TrainingConfig(
            out=str(folder),
            init_from=str(base),
            **({"steps": STEPS, "eval_every": 6, "eval_batches": 2} | training),
        ),
        checkpoint=CheckpointConfig(every=5, keep=3, local=local),
        logging=LoggingConfig(progress=False, tensorboard=False),
    )


@pytest.fixture(scope="module")
def full_run(token_folder, model_folder, tmp_path_factory):
    """The folder of a LoRA run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    assert loop.run(config(folder, token_folder, model_folder)).finished
    return folder


def test_the_loss_falls_and_only_the_pairs_are_in_the_checkpoints(full_run, model_folder):
    assert losses(full_run)[-3:].mean() < losses(full_run)[:3].mean() - 0.1
    files = verified_manifest(full_run / "checkpoints" / str(STEPS))
    names = {name.split("/")[1] for name in files["files"] if name.startswith("model/")}
    targets = LoraConfig().targets
    pairs = {f"layers.{target}.{side}" for target in targets for side in "ab"}
    assert names - {"_METADATA"} == pairs
    assert files["base"] == manifest_hash(model_folder)
    moments = {name.split("/")[1] for name in files["files"] if name.startswith("optimizer/")}
    assert len(moments - {"_METADATA"}) == 2 * len(pairs) + 1
    n_params = LoraConfig(rank=4).n_params(tiny_model())
    verdicts = verify_folder(full_run, progress=False)
    assert [v.damage for v in verdicts] == [None] * 3
    assert {v.n_bytes for v in verdicts} == {4 * 3 * n_params + 4}


def test_the_metrics_count_trained_and_masked_tokens(full_run):
    records = [r for r in read_metrics(full_run / "metrics.jsonl") if "loss" in r]
    for record in records:
        assert record["masked"] == pytest.approx(1 - record["targets"] / (8 * 16))
    assert any(record["masked"] for record in records)  # the first tokens of documents


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("mesh", "local"),
    [
        ((2, 2, 2), True),
        pytest.param((2, 2, 2), False, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), True, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), False, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_with_the_same_losses_and_pairs(
    mesh, local, full_run, token_folder, model_folder, tmp_path, monkeypatch
):
    """It ends in step 9 without a save: the shared checkpoint is of step 5, the local of step 8."""
    disk = {"path": str(tmp_path / "disk"), "every": 4} if local else None
    settings = config(tmp_path / "run", token_folder, model_folder, local=disk)
    read = loop.Batches.train

    def die(data, step):
        if step == 8:
            raise KilledError
        return read(data, step)

    monkeypatch.setattr(loop.Batches, "train", die)
    with pytest.raises(KilledError):
        loop.run(settings)
    monkeypatch.undo()
    if mesh == (1, 1, 1):
        monkeypatch.setattr(start, "make_mesh", lambda _: mesh_of(mesh))
    resumed = replace(settings, mesh=MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]))
    assert loop.run(resumed).finished
    same = mesh == (2, 2, 2)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(full_run), rtol=0 if same else 1e-5)
    prints = [
        verified_manifest(folder / "checkpoints" / str(STEPS))["fingerprints"]
        for folder in (tmp_path / "run", full_run)
    ]
    assert (prints[0] == prints[1]) == same


@pytest.mark.slow
def test_a_killed_process_resumes_with_the_same_losses(
    full_run, token_folder, model_folder, tmp_path
):
    settings = config(tmp_path / "run", token_folder, model_folder)
    process = start_process(settings, tmp_path)
    wait_for_step(process, tmp_path / "run", 7)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert loop.run(settings).finished
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(full_run))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(full_run, token_folder, model_folder, tmp_path):
    """Also the same masks of dropout."""
    path = tmp_path / "two.yaml"
    settings = config(tmp_path / "run", token_folder, model_folder, mesh=(1, 2, 1))
    path.write_text(yaml_file.dump(settings))
    group = Group(tmp_path / "output", 2, "train", path, devices=2)
    assert group.wait() == [0, 0], group.outputs("err")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(full_run), rtol=1e-5)


def test_a_run_resumes_beside_a_moved_base_but_not_beside_another(
    full_run, token_folder, model_folder, tmp_path, capsys
):
    folder, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(full_run, folder)
    shutil.copytree(model_folder, moved)
    with jax.set_mesh(one_device_mesh()):
        model = jax.jit(Llama, static_argnums=0)(tiny_model(context=128), jax.random.key(1))
        save_model(other, tiny_model(context=128), model, None)
    more = {"steps": STEPS + 2}
    with pytest.raises(InputError, match=r"other, training.init_from, are not those with which"):
        loop.run(config(folder, token_folder, other, **more))
    with pytest.raises(InputError, match="gone does not exist"):
        loop.run(config(folder, token_folder, tmp_path / "gone", **more))
    assert training_checkpoints.TrainingCheckpoints(folder / "checkpoints").steps[-1] == STEPS
    assert loop.run(config(folder, token_folder, moved, **more)).step == STEPS + 2
    assert "training.init_from changes from" in capsys.readouterr().err


def test_a_run_resumes_neither_with_other_pairs_nor_without(full_run, token_folder, model_folder):
    with pytest.raises(InputError, match=r"was trained with lora.rank = 4, and now it is 8"):
        loop.run(config(full_run, token_folder, model_folder, lora={"rank": 8}))
    full = replace(config(full_run, token_folder, model_folder), lora=None)
    with pytest.raises(InputError, match=r"was trained with lora.rank = 4, and now it is None"):
        loop.run(full)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["none", "int8"])
def test_an_int8_base_is_read_or_quantized_when_it_is_loaded(
    stored, token_folder, model_folder, tmp_path, capsys
):
    base, model_config = model_folder, tiny_model(context=128, quantized="int8")
    with jax.set_mesh(one_device_mesh()):
        quantized_config, quantized = quantize_model(*load_model(model_folder))
        if stored == "int8":
            base = tmp_path / "int8"
            save_model(base, quantized_config, quantized, None)
    settings = config(
        tmp_path / "run", token_folder, base, mesh=(1, 4, 2), model=model_config, steps=6
    )
    assert loop.run(settings).finished
    assert ("are quantized to int8 when they are loaded" in capsys.readouterr().err) == (
        stored == "none"
    )
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    with jax.set_mesh(mesh_of((1, 4, 2))):
        loaded = start.load_base(settings)
    assert isinstance(loaded.layers.wq, Int8Matrix)
    for ours, theirs in zip(*map(jax.tree.leaves, (loaded, quantized)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_int8_folder_needs_an_int8_configuration(token_folder, model_folder, tmp_path):
    with jax.set_mesh(one_device_mesh()):
        save_model(tmp_path / "int8", *quantize_model(*load_model(model_folder)), None)
    with pytest.raises(InputError, match=r"are int8: set model.quantized to int8$"):
        loop.run(config(tmp_path / "run", token_folder, tmp_path / "int8"))


def test_the_hash_of_a_base_is_that_of_its_weights(model_folder, full_run, tmp_path):
    with jax.set_mesh(one_device_mesh()):
        loaded = load_model(model_folder)
        save_model(tmp_path / "same", *loaded, None)
        save_model(tmp_path / "again", *loaded, None)
        loaded[1].layers.w1[...] = -loaded[1].layers.w1[...]
        save_model(tmp_path / "other", *loaded, None)
    hashes = [manifest_hash(tmp_path / name) for name in ("same", "again", "other")]
    assert hashes[0] == hashes[1] != hashes[2]
    assert manifest_hash(full_run) == verified_manifest(full_run / "checkpoints/12")["sha256"]


def test_the_run_folder_is_loaded_as_the_model_that_was_trained(
    full_run, token_folder, model_folder
):
    settings = config(full_run, token_folder, model_folder)
    tokens_BT = np.random.default_rng(0).integers(0, 320, (8, 16))
    logits = jax.jit(forward, static_argnums=0)
    with jax.set_mesh(mesh_of((2, 2, 2))):
        like = eval_shape_on_mesh(partial(init_state, settings), jax.random.key(0))
        checkpoints = TrainingCheckpoints(full_run / "checkpoints")
        _, adapters, _ = checkpoints.restore(STEPS, *like)
        trained = complete_model(settings, adapters, start.load_base(settings))
        expected = np.asarray(logits(settings.model, trained, tokens_BT))
    with jax.set_mesh(one_device_mesh()):
        for unmerged in (False, True):
            found = logits(*load(full_run, unmerged=unmerged), tokens_BT)
            np.testing.assert_allclose(found, expected, atol=5e-5, rtol=0)
        assert np.abs(logits(*load(model_folder), tokens_BT) - expected).max() > 0.1
