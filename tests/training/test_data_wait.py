"""The share of the step time in which the devices wait for data, and the warning."""

from types import SimpleNamespace
from typing import Any

import pytest

from llama_jax.training import report
from llama_jax.training.data_wait import WARN_SECONDS, DataWait


def test_the_share_is_that_of_the_waits_since_the_last_step():
    wait = DataWait()
    wait.add(0.1)
    wait.add(0.2)
    assert wait.end_step(3.0) == pytest.approx(0.1)
    assert wait.end_step(3.0) == 0.0
    wait.add(5.0)  # clocks of two calls may differ
    assert wait.end_step(3.0) == 1.0


@pytest.mark.parametrize(("waited", "warnings"), [(0.019, 0), (0.021, 1)])
def test_a_share_above_two_per_cent_is_reported_once(waited, warnings, capsys):
    wait = DataWait()
    for _ in range(round(5 * WARN_SECONDS)):
        wait.add(waited)
        wait.end_step(1.0)
    err = capsys.readouterr().err
    assert err.count("warning: the devices wait for data in 2.1% of the step time") == warnings
    assert err.count("\n") == warnings


def test_a_single_slow_step_is_no_reason_to_warn(capsys):
    wait = DataWait()
    wait.add(1.0)
    for _ in range(round(2 * WARN_SECONDS)):
        wait.end_step(1.0)
    assert not capsys.readouterr().err


def test_devices_that_compute_do_not_wait(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr(report.time, "monotonic", lambda: next(seconds))
    waits = []
    for computing in (
        SimpleNamespace(loss=SimpleNamespace(is_ready=lambda: False)),
        SimpleNamespace(loss=SimpleNamespace(is_ready=lambda: True)),
        None,
    ):
        run: Any = object.__new__(report.Report)
        run._data_wait = DataWait()
        run._host_times = SimpleNamespace(start_step=lambda: None, end_part=lambda part: None)
        run.watchdog = SimpleNamespace(start_step=lambda: None, end_stage=lambda: None)
        run.record_dispatch()
        run.record_batch(computing)
        waits.append(run._data_wait.end_step(2.0))
    assert waits == [0.0, 0.5, 0.5]
