"""A device that holds or computes other numbers than the others is found and named."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_config, tiny_model

from llama_jax.config.run import DataConfig, LoggingConfig
from llama_jax.data.batches import Batches
from llama_jax.errors import Fault
from llama_jax.training import device_check, loop
from llama_jax.training.device_check import check_devices
from llama_jax.training.metrics import read_metrics
from llama_jax.training.start import initial_state


def flip_bit(array, number):
    """Returns the array with one bit flipped in the copy of one device."""
    buffers = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == number:
            data.reshape(-1).view(np.uint32)[3] ^= 1 << 20
        buffers.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers)


def flip_weight(trained, number):
    leaves, tree = jax.tree.flatten(trained)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(trained)]
    (i,) = [i for i, name in enumerate(names) if "wq" in name]
    return tree.unflatten([*leaves[:i], flip_bit(leaves[i], number), *leaves[i + 1 :]])


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 1, 2), (4, 2, 1)])
def test_a_flipped_bit_in_one_devices_weights_is_found(shape, token_folder, tmp_path, monkeypatch):
    config = replace(
        tiny_config(check_every=5, micro_batches=1, out=str(tmp_path)),
        data=DataConfig(mixture={str(token_folder): 1.0}, batch_size=8, seq_len=16),
    )
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        trained, opt_state = initial_state(config)
        batch = Batches(config.data, 1, 10).train(0)
        check_devices(config, 5, trained, opt_state, batch, None)
        flipped = flip_weight(trained, 5)
        with pytest.raises(Fault, match=r"after step 10 .*until step 5 all were equal") as error:
            check_devices(config, 10, flipped, opt_state, batch, None)
        assert re.findall(r"device (\d+) of host 0 \(", str(error.value)) == ["5"]
        assert "weights.layers.wq in memory" in str(error.value)
        event = json.loads((tmp_path / "events.jsonl").read_text())
        assert (event["step"], event["event"]) == (10, "silent data corruption")
        assert (event["devices"], event["hosts"]) == ([5], [0])
        assert str(error.value).startswith(event["text"])
        if shape == (4, 2, 1):
            return  # the flipped shard of fsdp is gathered by both devices of its replica
        # Without the comparison of the replicas, the computation differs where the bit is used.
        monkeypatch.setattr(device_check, "replica_groups", lambda array: [])
        with pytest.raises(Fault, match="the losses of the same rows") as error:
            check_devices(config, 10, flipped, opt_state, batch, None)
        named = set(re.findall(r"device (\d+) of host 0 \(", str(error.value)))
        assert named == {str(d.id) for row in mesh.devices.reshape(shape[0], -1).tolist()
                         if 5 in [d.id for d in row] for d in row}  # fmt: skip
        monkeypatch.setattr(device_check, "_outliers", lambda v, o=device_check._outliers: (
            [] if len(v) == shape[0] and len(v[0]) < 16 else o(v)))  # fmt: skip
        with pytest.raises(Fault, match="the gradient of the same rows") as error:
            check_devices(config, 10, flipped, opt_state, batch, None)
        assert set(re.findall(r"device (\d+) of host 0 \(", str(error.value))) == named


@pytest.mark.slow
def test_a_device_that_computes_preferences_wrongly_is_found(
    preference_folder, tmp_path, monkeypatch
):
    config = tiny_config(tiny_model(n_layers=1), check_every=5, out=str(tmp_path))
    data = DataConfig(mixture={str(preference_folder): 1.0}, batch_size=8, seq_len=16)
    config = replace(config, data=data)
    with jax.set_mesh(mesh_of((4, 1, 1))):
        trained, opt_state = initial_state(config)
        training = replace(config.training, objective="dpo", init_from="base")
        config = replace(config, training=training)
        batch = Batches(config.data, 1, 10).train(0)
        check_devices(config, 5, trained, opt_state, batch, trained)
        # The bit is found where it is used, without the comparison of the replicas.
        monkeypatch.setattr(device_check, "replica_groups", lambda array: [])
        flipped = flip_weight(trained, 2)
        with pytest.raises(Fault, match="the gradient of the same rows") as error:
            check_devices(config, 10, flipped, opt_state, batch, trained)
    assert re.findall(r"device (\d+) of host 0 \(", str(error.value)) == ["2"]


def test_a_run_that_is_checked_has_the_losses_of_one_that_is_not(token_folder, tmp_path):
    def losses(name, every):
        config = replace(
            tiny_config(out=str(tmp_path / name), steps=4, eval_every=0, check_every=every),
            data=DataConfig(mixture={str(token_folder): 1.0}, batch_size=8, seq_len=16),
            logging=LoggingConfig(progress=False, tensorboard=False),
        )
        assert loop.run(config).finished
        return [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]

    assert losses("checked", 2) == losses("unchecked", 0)
