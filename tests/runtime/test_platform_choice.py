import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, peer

from llama_jax.runtime import platform_choice
from llama_jax.runtime.platform_choice import has_tpu, platforms_without_tpu, skip_missing_tpu


def write_device(root: Path, vendor: str, kind: str) -> None:
    folder = root / "sys/bus/pci/devices/0000:00:05.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(vendor + "\n")
    (folder / "class").write_text(kind + "\n")


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [
        ("0x1ae0", "0x120000", True),
        ("0x1ae0", "0xff0000", True),
        ("0x1ae0", "0x020000", False),  # Google's network card
        ("0x1ae0", "0x010802", False),  # Google's disk
        ("0x10de", "0x030200", False),  # an NVIDIA GPU
    ],
)
def test_a_tpu_is_found_among_the_pci_devices(tmp_path, vendor, kind, expected):
    write_device(tmp_path, vendor, kind)
    assert has_tpu({}, tmp_path) is expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [("accel0", True), ("vfio/3", True), ("vfio/vfio", False), ("nvidia0", False)],
)
def test_a_tpu_is_found_by_its_device_file(tmp_path, file, expected):
    assert not has_tpu({}, tmp_path)
    path = tmp_path / "dev" / file
    path.parent.mkdir(parents=True)
    path.touch()
    assert has_tpu({}, tmp_path) is expected


def test_a_variable_of_a_tpu_vm_names_a_tpu_unless_it_is_empty(tmp_path):
    assert has_tpu({"TPU_WORKER_ID": "0"}, tmp_path)
    assert has_tpu({"JAX_FORCE_TPU_INIT": "1"}, tmp_path)
    assert not has_tpu({"TPU_NAME": "", "TPU_SKIP_MDS_QUERY": "1"}, tmp_path)


@pytest.mark.parametrize(
    ("plugins", "gpu", "environment", "expected"),
    [
        (set(), False, {}, "cpu"),
        (set(), True, {}, "cpu"),  # JAX without CUDA
        ({"xla_cuda12"}, False, {}, "cpu"),
        ({"xla_cuda13"}, True, {}, "cuda,cpu"),
        ({"xla_cuda12"}, True, {"CUDA_VISIBLE_DEVICES": "1"}, "cuda,cpu"),
        ({"xla_cuda12"}, True, {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"xla_cuda12"}, True, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu"),
        ({"xla_rocm7"}, True, {}, None),
        ({"xla_cuda12", "metal"}, True, {}, None),
    ],
)
def test_a_machine_without_a_tpu_takes_its_gpu(tmp_path, plugins, gpu, environment, expected):
    if gpu:
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / "nvidia0").touch()
    assert platforms_without_tpu(environment, plugins, tmp_path) == expected


@pytest.mark.parametrize(
    ("given", "libtpu", "tpu", "expected"),
    [
        (None, True, False, "cpu"),
        (None, True, True, None),
        (None, False, False, None),
        ("tpu,cpu", True, False, "tpu,cpu"),
        ("", True, False, ""),
    ],
)
def test_the_choice_of_the_user_and_the_hardware_have_precedence(
    monkeypatch, given, libtpu, tpu, expected
):
    monkeypatch.setattr(os, "environ", {} if given is None else {"JAX_PLATFORMS": given})
    monkeypatch.setattr(
        platform_choice, "find_spec", lambda name: (name == "libtpu" and libtpu) or None
    )
    monkeypatch.setattr(platform_choice, "_plugins", set)
    monkeypatch.setattr(platform_choice, "has_tpu", lambda environment: tpu)
    skip_missing_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected


def test_a_command_prints_no_error_of_an_installed_libtpu():
    peer("libtpu")
    # `plan.topology` sets some of libtpu's variables, in this process too if other tests use it.
    unset = ("JAX_PLATFORMS", "TPU_", "JAX_FORCE_TPU_INIT")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
    if has_tpu(environment):
        pytest.skip("this machine has a TPU")
    code = (
        "from llama_jax.runtime.platform_choice import skip_missing_tpu; skip_missing_tpu()\n"
        "import jax; print(jax.default_backend())"
    )
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip() in ("cpu", "gpu"), done.stderr) == (True, "")
