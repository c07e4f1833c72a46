import os

from conftest import ROOT

from llama_jax.runtime.chips import cpu_cores


def test_cores_are_counted_also_where_affinity_is_unknown(monkeypatch):
    assert cpu_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert cpu_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_cores() == 1


def test_affinity_is_asked_in_one_place():
    paths = [
        path for d in ("llama_jax", "convert", "benchmarks") for path in (ROOT / d).rglob("*.py")
    ]
    assert {p.name for p in paths if "sched_getaffinity" in p.read_text()} == {"chips.py"}
