import os

from conftest import ROOT

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
