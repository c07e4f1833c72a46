"""The correction of a plan by published runs: its arithmetic, its table and its reports."""

import math

import pytest

from llama_jax.config.family import FAMILY
from llama_jax.config.mesh import MeshConfig
from llama_jax.config.run import Config, DataConfig, TrainingConfig
from llama_jax.plan import calibration, serving_report, topology, training_report
from llama_jax.plan.calibration import PublishedRun, calibration_of, published_runs
from llama_jax.plan.program_time import ProgramTime
from llama_jax.plan.serving import InferencePlan, WeightBytes
from llama_jax.plan.training import TrainingPlan


def run(measured: float, estimated: float | None, **changes) -> PublishedRun:
    fields = {"name": f"a run of {measured} s", "program": "MaxText", "work": "training",
              "pod": "v6e:16x16", "source": "a page", "estimated_with": "versions"}  # fmt: skip
    return PublishedRun(measured=measured, estimated=estimated, **(fields | changes))


RUNS = [
    run(4.0, 2.0),
    run(10.0, 8.0),
    run(3.0, None),
    run(1.0, 1.1, pod="v5p:4x4x4"),
    run(0.006, 0.009, work="decoding", pod="v5e:4x4"),
    run(0.025, None, work="decoding"),
]


def test_an_estimate_is_divided_by_the_mean_factor_and_the_range_by_the_extreme_ones():
    chosen = calibration_of("v6e", "training", RUNS)
    assert chosen.factors == [0.5, 0.8]
    assert chosen.factor == pytest.approx(math.sqrt(0.5 * 0.8))
    corrected = chosen.correct(1.6)
    assert corrected == pytest.approx((1.6 / math.sqrt(0.4), 1.6 / 0.8, 1.6 / 0.5))
    # Each measured run lies within the range of its own corrected estimate.
    for published in chosen.compared:
        _, fastest, slowest = chosen.correct(published.estimated)
        assert fastest <= published.measured <= slowest


def test_only_runs_of_the_same_chips_and_the_same_work_correct_an_estimate():
    assert calibration_of("v5p", "training", RUNS).factors == [1.1]
    assert calibration_of("v5e", "decoding", RUNS).factors == pytest.approx([1.5])
    assert calibration_of("v5e", "training", RUNS).runs == ()


def test_a_correction_says_from_how_many_runs_it_comes():
    def sentence(chip_name, work):
        return calibration_of(chip_name, work, RUNS).describe()

    several = "corrected by 2 measured runs of v6e training (MaxText), whose estimates are 0.50 to"
    assert sentence("v6e", "training").startswith(several)
    assert "one measured run of v5p training" in sentence("v5p", "training")
    assert sentence("v5p", "training").endswith("one run shows no range")
    assert "v6e decoding is known (1 published)" in sentence("v6e", "decoding")
    assert "v4 training is known (no published)" in sentence("v4", "training")


def test_json_has_no_range_from_one_run_and_no_correction_from_none():
    one = calibration_of("v5p", "training", RUNS).as_dict(2.2)
    assert one["seconds"] == pytest.approx(2.0)
    assert (one["range"], one["runs"]) == (None, 1)
    none = calibration_of("v6e", "decoding", RUNS).as_dict(2.2)
    assert (none["seconds"], none["factor"], none["range"]) == (None, None, None)
    assert (none["runs"], none["runs_without_estimate"]) == (0, 1)
    two = calibration_of("v6e", "training", RUNS).as_dict(1.6)
    assert two["range"] == pytest.approx([2.0, 3.2])


def test_each_published_run_is_on_a_known_pod_and_has_its_source_and_versions():
    runs = published_runs()
    assert len({(r.program, r.name, r.pod) for r in runs}) == len(runs)
    for published in runs:
        assert published.work in ("training", "decoding")
        assert topology.parse(published.pod).n_chips >= 1
        assert published.measured > 0
        assert "/" in published.source
        if published.estimated is None:
            assert published.estimated_with.startswith("not computed")
            assert published.command == ""
        else:
            assert "libtpu" in published.estimated_with
            assert published.command.startswith("python benchmarks/calibrate.py ")
            assert 0.2 < published.factor < 5


@pytest.fixture
def known_runs(monkeypatch):
    monkeypatch.setattr(calibration, "published_runs", lambda: tuple(RUNS))


def training_plan(pod: str) -> TrainingPlan:
    config = Config(
        model=FAMILY["llama3.1-8b"],
        mesh=MeshConfig(),
        data=DataConfig(mixture={"x": 1.0}, batch_size=1024, seq_len=8192),
        training=TrainingConfig(out="x", steps=900),
    )
    memory = {"weights": 2.0**30}
    return TrainingPlan(config=config, pod=topology.parse(pod), memory=memory, compiler_seconds=1.6)


def test_a_training_plan_prints_estimate_correction_and_range(known_runs, capsys):
    training_report.show(training_plan("v6e:16x16"))
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split()[-4:] for line in lines if line.startswith("the ")}
    # 900 steps on 256 chips are 64 chip-hours a second.
    mean = 1.6 / math.sqrt(0.4)
    assert rows["the mean of the runs"][::3] == [f"{mean:.2f}", f"{64 * mean:,.0f}"]
    assert rows["the fastest"][::3] == ["2.00", "128"]
    assert rows["the slowest"][::3] == ["3.20", "205"]
    assert lines[-1].startswith("corrected by 2 measured runs")
    assert training_report.as_dict(training_plan("v6e:16x16"))["corrected"]["runs"] == 2


def test_a_training_plan_on_uncalibrated_chips_says_so(known_runs, capsys):
    training_report.show(training_plan("v4:4x4x4"))
    printed = capsys.readouterr().out
    assert "not corrected: no estimate of a measured run of v4 training is known" in printed
    assert "corrected by measured runs" not in printed


def test_a_serving_plan_corrects_its_decode_steps(known_runs, capsys):
    pod = topology.parse("v5e:4x4")
    plan = InferencePlan(
        config=FAMILY["llama2-70b"], pod=pod, context=4096, batch=8,
        weights=WeightBytes(1, 2, 3), cache_bytes_per_row=4, decode_peak_bytes=100.0,
        largest_batch=8,
    )  # fmt: skip
    plan.decode_times[8] = ProgramTime(
        memory=0.012, compute=0.0, network=0.0, cycles=0.0, compiler=0.0
    )
    serving_report.show(plan)
    printed = capsys.readouterr().out
    # 12 ms ÷ 1.5, and a single run shows no range; 8 rows in 8 ms.
    row = next(line for line in printed.splitlines() if line.endswith("62.5"))
    assert row.split()[3:] == ["8.00", "?", "1,000", "62.5"]
    assert "corrected by one measured run of v5e decoding" in printed
    corrected = serving_report.as_dict(plan)["decode"][0]["corrected"]
    assert corrected["seconds"] == pytest.approx(0.008)
    assert corrected["range"] is None
