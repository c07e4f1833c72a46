import os

import pytest
from conftest import ROOT

from llama_jax.runtime import cpu
from llama_jax.runtime.cpu import cpu_cores


def test_cores_are_counted_without_an_affinity_call_too(monkeypatch):
    assert cpu_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert cpu_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_cores() == 1


def test_only_cpu_py_reads_the_affinity():
    paths = [
        path for d in ("llama_jax", "convert", "benchmarks") for path in (ROOT / d).rglob("*.py")
    ]
    assert {p.name for p in paths if "sched_getaffinity" in p.read_text()} == {"cpu.py"}


@pytest.mark.parametrize(
    ("cpuinfo", "bfloat16", "uint8"),
    [
        ("flags\t\t: fpu avx2 fma f16c avx_vnni", False, False),
        ("flags\t\t: fpu avx512f avx512_bf16 avx512vl", True, False),
        ("flags\t\t: fpu avx512f avx512vl avx512_vnni", False, True),
        ("flags\t\t: avx512f amx_bf16 amx_tile amx_int8", True, True),
        ("Features\t: fp asimd i8mm bf16 dgh", True, False),
        ("Features\t: fp asimd asimddp", False, False),
        (None, False, False),  # neither Linux nor macOS
    ],
)
def test_features_are_read_from_the_cpus_flags(cpuinfo, bfloat16, uint8, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(f"processor\t: 0\n{cpuinfo}\n")
    monkeypatch.setattr(cpu, "Path", lambda _: path)
    monkeypatch.setattr(cpu, "_cpu_flags", cpu._cpu_flags.__wrapped__)  # without its cache
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (cpu.cpu_has_bfloat16(), cpu.cpu_multiplies_uint8()) == (bfloat16, uint8)
