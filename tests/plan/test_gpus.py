"""Plans for GPUs that are not here. CI installs XLA's compiler for GPUs in one leg."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
from conftest import tiny_model

from llama_jax.cli.main import main
from llama_jax.config import yaml_file
from llama_jax.plan import (
    serving,
    serving_program,
    serving_report,
    topology,
    training,
    training_report,
)
from llama_jax.runtime.chips import PLANNABLE_CHIPS

RUN = """\
model: {{dim: 256, hidden_dim: 512, n_layers: 3, n_heads: 4, n_kv_heads: 4, head_dim: 64,
  vocab_size: 256, context: 256, dtype: bfloat16}}
mesh: {{fsdp: -1, data: 1}}
data: {{mixture: {{data/text: 1}}, batch_size: 8, seq_len: 256, isolate_documents: {isolate}}}
training: {{out: runs/gpus, steps: 1000}}
"""
CONFIG = tiny_model(
    dim=512, hidden_dim=1024, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=64, context=1024,
    dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip


def log(message: str) -> None:
    """Ignores the progress of a plan."""


def test_nodes_of_gpus_have_names():
    pod = topology.parse("4*h100:8")
    assert (str(pod), pod.n_devices, pod.device_name) == ("4*h100:8", 32, "GPU")


def test_a_search_for_gpus_is_refused(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(isolate="true"))
    assert main(["plan", str(file), "--topology", "h100:8", "--search"]) == 2
    message = "--search ranks by estimates of time, which XLA has only for TPUs: omit it for h100:8"
    assert message in capsys.readouterr().err


@pytest.mark.skipif(find_spec("jax_plugins") is not None, reason="here is a compiler for GPUs")
def test_without_a_compiler_the_plan_says_what_to_install(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(isolate="true"))
    assert main(["plan", str(file), "--topology", "h100:8"]) == 2
    error = capsys.readouterr().err
    assert "need JAX 0.11 or later" in error or "llama_jax[gpu]" in error


class TestCompiled:
    """With the compiler."""

    @pytest.fixture(autouse=True)
    def _compiler(self):
        pytest.importorskip("jax_plugins.xla_cuda13", reason="no compiler for GPUs is installed")

    @pytest.mark.parametrize("isolate", ["true", "false"])  # attention by XLA, by cuDNN
    @pytest.mark.parametrize("name", ["h100:8", "2*a100:4", "b200:8"])
    def test_a_training_run(self, isolate, name, tmp_path, capsys):
        file = tmp_path / "run.yaml"
        file.write_text(RUN.format(isolate=isolate))
        pod = topology.parse(name)
        plan = training.plan_training(yaml_file.load(str(file), []), pod, log)
        n_params = plan.config.model.n_params
        assert plan.memory["weights"] == pytest.approx(4 * n_params / 8, rel=0.01)
        assert plan.memory["optimizer"] == pytest.approx(8 * n_params / 8, rel=0.01)
        assert plan.memory["temporaries"] > 0
        assert plan.fits
        training_report.show(plan)
        printed = capsys.readouterr().out
        assert "memory of a GPU" in printed
        assert "XLA has no estimates of time for GPUs" in printed
        assert "step_seconds" not in json.dumps(training_report.as_dict(plan))

    @pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
    @pytest.mark.parametrize("cache_dtype", ["same", "int8"])
    @pytest.mark.parametrize("name", ["h100:1", "a100:4", "h100:8"])  # of 8, two have the same head
    def test_a_decode_step_copies_no_pages(self, name, cache_dtype):
        config, pod = replace(CONFIG, cache_dtype=cache_dtype), topology.parse(name)
        mesh = serving_program.slice_mesh(config, pod)
        step = serving_program.compile_step(config, pod, mesh, 64, 1024)
        _, row_bytes = serving.weight_and_cache_bytes(config, mesh, 1024)
        assert step.peak_bytes - step.argument_bytes < 64 * row_bytes / 4

    @pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
    def test_serving(self, capsys, monkeypatch):
        small = replace(PLANNABLE_CHIPS["h100"], usable_hbm_gib=0.2)
        monkeypatch.setitem(PLANNABLE_CHIPS, "h100", small)
        plan = serving.plan_inference(CONFIG, topology.parse("h100:8"), 1024, 4, log)
        assert plan.fits
        assert plan.largest_batch_bytes < 0.2 * 2**30 < plan.largest_batch_bytes * 1.2
        serving_report.show(plan)
        assert "a step takes at least" in capsys.readouterr().out
        assert serving_report.as_dict(plan)["decode"] == []
