import math
from dataclasses import replace

import pytest
from conftest import tiny_config

from llama_jax.config.family import FAMILY
from llama_jax.errors import InputError
from llama_jax.plan import figure, topology
from llama_jax.plan.schedule import Traffic
from llama_jax.plan.serving import InferencePlan, Time, Weights
from llama_jax.plan.training import Plan

GIB = 2**30


def test_the_bars_of_a_run_are_its_memory_and_its_step(tmp_path):
    memory = {"weights": GIB, "activations": 3.5 * GIB}
    plan = Plan(
        tiny_config(), topology.parse("v5p:4x4x4"), memory=memory,
        compiler=0.5, attention=0.25, traffic={"all-gather": Traffic(8, 2.0, 0.125)},
    )  # fmt: skip
    title, there, memory, times = figure.of_training(plan)
    assert there == 95
    assert sum(memory["a chip"].values()) == plan.needed / GIB == 4.5
    assert list(times["a step"].values()) == [500, 250, 125]
    assert f"{plan.mfu(0.875):.1%}" in title
    for name, start in (("p.png", b"\x89PNG"), ("p.svg", b"<?xml")):
        figure.draw(tmp_path / name, title, there, memory, times)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_the_compiler_refuses_is_drawn_without_time(tmp_path):
    plan = Plan(tiny_config(), topology.parse("v5p:4x4x4"), memory={"all": math.inf}, refused=True)
    bars = figure.of_training(plan)
    assert bars[3] == {}
    assert bars[0].endswith("does NOT fit")
    figure.draw(tmp_path / "p.svg", *bars)
    assert (tmp_path / "p.svg").stat().st_size > 0


def test_the_bars_of_serving_are_what_is_needed_and_each_step():
    config, weights = FAMILY["llama2-7b"], Weights(GIB, 4 * GIB, GIB)
    time = Time(memory=1.0, compute=0.5, network=0.25, cycles=2.0, compiler=9.0)
    plan = InferencePlan(
        config, config.n_params, topology.parse("v5e:2x4"), 4096, 8, weights, cache_row=GIB // 8,
        decode_peak=9 * GIB, prefill_room=GIB, decode={1: time, 8: time}, prefill=time,
    )  # fmt: skip
    _, there, memory, times = figure.of_inference(plan)
    assert there == 15.75
    assert memory["a chip"] == {
        "weights": 6, "keys and values": 1, "temporaries of decoding": 2,
    }  # fmt: skip
    assert list(times) == ["decode, batch 1", "decode, batch 8", "read 4,096 tokens"]
    assert list(times["decode, batch 8"].values()) == [2000, 250]
    reading = figure.of_inference(replace(plan, prefill_room=4 * GIB))[2]["a chip"]
    assert reading["while a prompt is read"] == 4


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("p.pdf", "ends with .png or .svg"), ("no/p.png", "there is no folder")],
)
def test_a_picture_that_can_not_be_written_is_refused_before_compiling(tmp_path, name, sentence):
    with pytest.raises(InputError, match=sentence):
        figure.check_path(str(tmp_path / name))
