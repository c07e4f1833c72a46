import math
from dataclasses import replace

from conftest import tiny_config

from llama_jax.config.family import FAMILY
from llama_jax.plan import figure, topology
from llama_jax.plan.figure import Chart
from llama_jax.plan.program_time import ProgramTime
from llama_jax.plan.schedule import Traffic
from llama_jax.plan.serving import InferencePlan, WeightBytes
from llama_jax.plan.training import TrainingPlan

GIB = 2**30


def test_a_training_chart_shows_memory_and_step_time(tmp_path):
    plan = TrainingPlan(
        config=tiny_config(), pod=topology.parse("v5p:4x4x4"),
        memory={"weights": GIB, "activations": 3.5 * GIB},
        compiler_seconds=0.5, attention_seconds=0.25,
        traffic={"all-gather": Traffic(bytes=8, seconds=2.0, exposed=0.125)},
    )  # fmt: skip
    chart = figure.chart_training(plan)
    assert chart.capacity == 95
    assert sum(chart.memory["a chip"].values()) == plan.needed_bytes / GIB == 4.5
    assert list(chart.times["a step"].values()) == [500, 250, 125]
    assert f"{plan.mfu(0.875):.1%}" in chart.title
    for name, start in (("p.png", b"\x89PNG"), ("p.svg", b"<?xml")):
        figure.draw_chart(tmp_path / name, chart)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_chart_of_a_rejected_run_has_no_times(tmp_path):
    plan = TrainingPlan(
        config=tiny_config(), pod=topology.parse("v5p:4x4x4"), memory={"all": math.inf},
        rejected=True,
    )  # fmt: skip
    chart = figure.chart_training(plan)
    assert chart.times == {}
    assert chart.title.endswith("does NOT fit")
    figure.draw_chart(tmp_path / "p.svg", chart)
    assert (tmp_path / "p.svg").stat().st_size > 0


def test_an_inference_chart_shows_the_needed_memory_and_the_time_of_each_program():
    config = FAMILY["llama2-7b"]
    time = ProgramTime(memory=1.0, compute=0.5, network=0.25, cycles=2.0, compiler=9.0)
    plan = InferencePlan(
        config=config, pod=topology.parse("v5e:2x4"), context=4096,
        batch=8, weights=WeightBytes(embedding=GIB, layers=4 * GIB, head=GIB),
        cache_bytes_per_row=GIB // 8, decode_peak_bytes=9 * GIB, prefill_bytes=GIB,
        decode_times={1: time, 8: time}, prefill_time=time,
    )  # fmt: skip
    chart = figure.chart_inference(plan)
    assert isinstance(chart, Chart)
    assert chart.capacity == 15.75
    assert chart.memory["a chip"] == {"weights": 6, "KV cache": 1, "temporaries of decoding": 2}
    assert list(chart.times) == ["decode, batch 1", "decode, batch 8", "prefill 4,096 tokens"]
    assert list(chart.times["decode, batch 8"].values()) == [2000, 250]
    larger_prefill = figure.chart_inference(replace(plan, prefill_bytes=4 * GIB))
    assert larger_prefill.memory["a chip"]["during prefill"] == 4
