import sys
import time

import pytest
from rich.console import Console
from rich.progress import BarColumn

from llama_jax.runtime import console
from llama_jax.runtime.console import TEXT_COLUMN, TaskProgress, byte_progress
from llama_jax.runtime.duration import format_duration
from llama_jax.training.progress import StepProgress


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    def on_terminal(**_):
        return Console(file=sys.stderr, force_terminal=True, width=100)

    monkeypatch.setattr(console, "Console", on_terminal)


def test_a_line_comes_at_most_every_ten_seconds(capsys, clock):
    progress = TaskProgress(TEXT_COLUMN, total=10)
    for clock.now in (4.0, 10.5, 12.0, 21.0):
        progress.update(1, f"at {clock.now:.0f}")
    progress.update(2, "at once", line_now=True)
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["at 10", "at 21", "at once"]


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_a_bar_with_the_text_alone(capsys):
    progress = TaskProgress(BarColumn(), TEXT_COLUMN, total=4, text="starting")
    progress.update(2, "half", line_details="  for lines", line_now=True)
    progress.close()
    err = capsys.readouterr().err
    assert "━" in err
    assert "half" in err
    assert "for lines" not in err


@pytest.mark.parametrize("on_terminal", [False, True])
def test_progress_that_is_not_shown_writes_nothing(capsys, clock, request, on_terminal):
    if on_terminal:
        request.getfixturevalue("terminal")
    with byte_progress("converting", 100, shown=False) as advance:
        clock.now = 30.0
        advance(50)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (4_000_000_000, "converting  1.0 GB of 4.0 GB  50.0 MB/s  60 s left"),
        (None, "converting  1.0 GB  50.0 MB/s"),
    ],
)
def test_bytes_are_shown_with_their_rate_and_the_time_left(capsys, clock, total, line):
    with byte_progress("converting", total, shown=True) as advance:
        advance(0)  # at the very start: no rate yet
        clock.now = 20.0
        advance(1_000_000_000)
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.usefixtures("terminal")
def test_bytes_of_an_unknown_total_have_a_bar_too(capsys):
    with byte_progress("tokenizing", None, shown=True) as advance:
        advance(3_000_000)
    assert "tokenizing" in capsys.readouterr().err


def test_the_time_left_of_a_run_leaves_out_the_first_step(capsys, clock):
    progress = StepProgress(steps=104, start=100, shown=True)
    for clock.now, step in ((60.0, 101), (75.0, 102), (76.0, 103), (90.0, 104)):
        progress.update(step, {"loss": "4.321"})
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 101/104  loss 4.321",  # compiled in it
        "step 102/104  loss 4.321  left 30s",
        "step 104/104  loss 4.321  left 0s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.4, "12s"), (249, "4m09s"), (7500, "2h05m"), (3 * 86_400 + 4 * 3600, "3d04h")],
)
def test_durations_are_short(seconds, text):
    assert format_duration(seconds) == text
