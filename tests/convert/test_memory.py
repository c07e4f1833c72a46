"""The default memory limit of a conversion: the free memory of the machine and the container."""

import struct
import sys

import pytest
from sample_checkpoints import convert_to, write_llama2c

from llama_jax.convert.verify import verify
from llama_jax.errors import InputError
from llama_jax.runtime import process_memory
from llama_jax.runtime.process_memory import available_memory

MIB = 1 << 20
V1 = "5:cpu,cpuacct:/x\n4:memory:/docker/a\n0::/docker/a\n"


def write_system_files(root, cgroup, files):
    """Writes the files in which Linux reports memory, for a machine with 900 MiB free."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:  921600 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def limits(limit, usage, cache=0, v1=False):
    names = "memory.limit_in_bytes memory.usage_in_bytes" if v1 else "memory.max memory.current"
    stat = f"inactive_file {cache}\nactive_file 0\n"
    stat += f"total_inactive_file {cache}\ntotal_active_file {MIB}\n" if v1 else ""
    return dict(zip(names.split(), (f"{limit}\n", f"{usage}\n"), strict=True)) | {
        "memory.stat": stat
    }


def inside(folder, files):
    return {f"{folder}{name}": text for name, text in files.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and cgroups")
@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/\n", {}, 900),
        ("0::/\n", limits(700 * MIB, 300 * MIB, 50 * MIB), 450),  # in a container
        ("0::/\n", limits(200 * MIB, 300 * MIB), 0),
        ("0::/a/b\n", inside("a/b/", limits("max", MIB)), 900),
        ("0::/a/b\n", inside("a/", limits(500 * MIB, 100 * MIB)), 400),  # limit of the parent group
        ("0::/a\n", inside("a/", limits(5000 * MIB, MIB)), 900),
        (V1, inside("memory/docker/a/", limits(600 * MIB, 300 * MIB, 9 * MIB, v1=True)), 310),
        (V1, inside("memory/", limits(600 * MIB, 300 * MIB, v1=True)), 301),  # in a container
    ],
)
def test_available_memory_is_the_minimum_of_machine_and_cgroups(tmp_path, cgroup, files, free):
    assert available_memory(write_system_files(tmp_path, cgroup, files)) == free * MIB


def test_a_sparse_file_with_weights_larger_than_the_memory_is_refused(tmp_path):
    path = tmp_path / "huge.bin"
    sizes = (1 << 18, 1 << 18, 1, 1, 1, 1 << 18, 8)  # 256 GiB a matrix
    numbers = 3 * 2**18 + 8 * 2**36  # three norms, eight matrices
    header = b"24ka" + struct.pack("<i", 1) + struct.pack("<7i", *sizes) + b"\1"
    path.write_bytes(header.ljust(256, b"\0"))
    with open(path, "r+b") as file:
        file.truncate(256 + 4 * numbers)
    with pytest.raises(InputError, match=r"while it is converted, takes 768\.06 GiB of memory"):
        convert_to(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["huge.bin"]


def test_a_conversion_without_enough_free_memory_is_refused(tmp_path, monkeypatch):
    write_llama2c(tmp_path / "m.bin", 1)
    convert_to(tmp_path / "m.bin", tmp_path / "m")
    monkeypatch.setattr(process_memory, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"0\.00 GiB are free: free more, or use a machine with"):
        convert_to(tmp_path / "m.bin", tmp_path / "other")
    with pytest.raises(InputError, match=r"the largest weight of .* takes 0\.00 GiB of memory"):
        verify(tmp_path / "m", progress=False)
    assert convert_to(
        tmp_path / "m.bin", tmp_path / "other", max_ram=8 << 30
    ).exists()  # explicitly allowed
