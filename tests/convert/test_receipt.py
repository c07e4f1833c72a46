"""The content of the receipt, and the differences that a repeated verification detects."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sample_checkpoints import convert_to, read_tensors
from tensor_files import write_tensors

from llama_jax.checkpoint.folders import read_model_config
from llama_jax.cli.describe_folder import describe
from llama_jax.convert.convert import convert
from llama_jax.convert.verify import verify
from llama_jax.errors import InputError
from llama_jax.runtime.damage import Damaged


def changed(source: Path, folder: Path) -> Path:
    """Returns a copy of a Meta folder in which one bit of one weight is flipped."""
    shutil.copytree(source, folder)
    path = folder / "consolidated.00.pth"
    tensors = read_tensors(path)
    tensors["norm.weight"].view(np.uint8)[0] ^= 1
    write_tensors(path, tensors)
    return folder


def test_the_receipt_lists_each_tensor_and_the_verification(shared_data, tmp_path):
    folder = convert_to(shared_data / "meta_reference/llama2_gqa/mp2", tmp_path / "m")
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["verified"] == {"identical": 21, "converted": 0}
    assert receipt["source"]["rotary"] == "interleaved"
    assert receipt["output"]["rotary"] == "half-split"
    assert receipt["dropped"] == {"rope.freqs": "follows from the configuration"}
    assert receipt["end_ids"] == [2]
    wq = next(w for w in receipt["weights"] if w["weight"] == "layers.1.wq")
    assert [(t["name"], t.get("shard", 0), t["shape"], t["dtype"]) for t in wq["source"]] == [
        ("layers.1.attention.wq.weight", i, [32, 64], "bfloat16") for i in (0, 1)
    ]
    assert wq["written"][0]["shape"] == [64, 8, 8]


def test_an_unverified_folder_says_so_and_is_verified_later(shared_data, tmp_path):
    source = shared_data / "stories260K/meta"
    done = convert(source, tmp_path / "m", verify_later=True, progress=False)
    assert (done.identical, done.converted) == (0, 0)
    assert "llama-jax convert --verify" in "".join(describe(done.folder))
    assert verify(done.folder, progress=False) == {"identical": 47, "converted": 0}
    path = done.folder / "weights/model/layers.w1/c/1/0/0"
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(Damaged):
        verify(done.folder, progress=False)


def test_verify_needs_no_source_but_hashes_it_if_given(shared_data, tmp_path):
    source = shared_data / "stories260K/meta"
    folder = convert_to(source, tmp_path / "m", to="hf")
    for given in (None, source):
        counts = verify(folder, given, progress=False)
        assert counts == {"identical": 47, "converted": 0}
    with pytest.raises(InputError, match="is not the tensor that was converted"):
        verify(folder, changed(source, tmp_path / "other"), progress=False)
    with pytest.raises(InputError, match=r"\(tensors of tok_embeddings: 1 instead of 2\)"):
        verify(folder, convert_to(source, tmp_path / "model"), progress=False)


def test_a_change_of_type_is_verified_against_the_source(shared_data, tmp_path):
    source = shared_data / "stories260K/meta"
    folder = convert_to(source, tmp_path / "m", dtype="bfloat16")
    assert verify(folder, source, progress=False) == {"identical": 0, "converted": 47}
    config = read_model_config(folder)
    assert (config.param_dtype, config.dtype) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("to", ["orbax", "hf", "meta"])
def test_a_flipped_bit_is_detected(shared_data, tmp_path, to):
    folder = convert_to(shared_data / "stories260K/meta", tmp_path / "m", to=to)
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    with pytest.raises(InputError, match=r"does not restore|damaged|differs"):
        verify(folder, progress=False)


def test_a_changed_configuration_is_refused(shared_data, tmp_path):
    folder = convert_to(shared_data / "stories260K/meta", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    read_model_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-6}))
    with pytest.raises(InputError, match="norm_eps 1e-06, but the weights were written with 1e-05"):
        read_model_config(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "receipt.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        read_model_config(folder)
