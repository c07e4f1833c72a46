"""The figure of a run shows its metrics, restarts and skipped steps at the right times."""

import json
import math

import pytest
from conftest import run

from llama_jax.training.ledger import Session
from llama_jax.training.run_figure import plot_run

START = 1e9
SESSIONS = [
    Session(START, 2, {"compiling": 120.0, "training": 180.0}),
    Session(START + 600.0, 4, {"training": 120.0}),
]


def record(step, seconds, **values):
    measured = {"loss": 5.0 - step, "grad_norm": 0.1, "tokens_per_second": 100, "goodput": 0.5}
    return {"step": step, "time": START + seconds, "skipped": 0} | measured | values


def test_steps_and_restarts_are_at_their_times():
    import matplotlib.pyplot as plt

    records = [
        record(1, 180),
        record(2, 240, loss=None, skipped=1),
        record(3, 660),
        record(4, 720),
    ]
    figure = plot_run("mine", SESSIONS, records)
    panels = figure.axes
    first, second, skipped, restart = panels[0].lines
    assert list(first.get_xdata()) == [3, 4]  # minutes
    assert list(first.get_ydata()) == pytest.approx([4, math.nan], nan_ok=True)
    assert (list(second.get_xdata()), list(second.get_ydata())) == ([11, 12], [2, 1])
    assert list(skipped.get_xdata()) == [4]
    assert list(restart.get_xdata()) == [10, 10]
    [down] = panels[0].patches
    assert (down.get_x(), down.get_x() + down.get_width()) == (5, 10)
    assert panels[0].get_title() == "mine: 4 steps, 1 restart, 1 skipped"
    labels = [panel.get_ylabel() for panel in panels]
    assert labels == ["training loss [nats]", "gradient norm", "tokens/s", "goodput"]
    assert panels[-1].get_xlabel() == "minutes since the first start"
    plt.close(figure)


def test_a_picture_of_nothing_is_one_sentence(token_folder, tmp_path, capsys):
    code, _, err = run(capsys, "info", token_folder, "--picture", tmp_path / "a.png")
    assert code == 2
    assert "--picture draws a run" in err
    code, _, err = run(capsys, "info", token_folder, "--picture", tmp_path / "a.jpg")
    assert code == 2
    assert "ends with .png or .svg" in err
    assert not [*tmp_path.iterdir()]


def test_a_run_of_an_earlier_version_has_no_times(tmp_path, capsys):
    from llama_jax.errors import InputError
    from llama_jax.training.run_figure import draw_run

    old = {"step": 1, "loss": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    with pytest.raises(InputError, match="has no steps with a time"):
        draw_run(tmp_path, tmp_path / "run.png")
