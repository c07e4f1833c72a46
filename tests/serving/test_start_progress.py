import re
import sys
import time

import jax.numpy as jnp
import pytest
from rich.console import Console

from llama_jax.runtime import console
from llama_jax.runtime.console import TaskProgress
from llama_jax.serving import start_progress
from llama_jax.serving.start_progress import loading_progress, stage_progress


def test_a_line_appears_every_ten_seconds(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with stage_progress("compiling 12 programs", "compiled 12 programs") as progress:
        for i, now in enumerate((4.0, 11.0, 12.0, 21.5)):  # noqa: B007 (the clock reads `now`)
            progress(i / 12, f"{i + 1} of 12: decode")
        now = 30.0
    assert capsys.readouterr().err.splitlines() == [
        "compiling 12 programs …",
        "compiling 2 of 12: decode  11 s",
        "compiling 4 of 12: decode  22 s",
        "compiled 12 programs in 30.0 s",
    ]


def test_a_terminal_shows_a_bar(capsys, monkeypatch):
    def terminal(**_):
        return Console(file=sys.stderr, force_terminal=True, width=100)

    monkeypatch.setattr(console, "Console", terminal)
    with stage_progress("compiling 12 programs", "compiled 12 programs") as progress:
        progress(0.5, "7 of 12: decode")
    err = capsys.readouterr().err
    assert "compiling 7 of 12: decode" in err
    assert "━" in err
    assert re.search(r"compiled 12 programs in \d+\.\d s\n$", err)


def test_a_stage_that_fails_is_not_reported_as_done(capsys):
    with pytest.raises(MemoryError), stage_progress("compiling", "compiled"):
        raise MemoryError
    assert capsys.readouterr().err == "compiling …\n"


def test_loading_counts_the_bytes_on_the_devices(capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(start_progress, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(
        TaskProgress, "update", lambda self, share, text, **_: shown.append((share, text))
    )
    jnp.zeros((5_000_000,)).delete()  # compiled here: a busy machine takes seconds for it
    with loading_progress(40_000_000):
        half = jnp.zeros((5_000_000,))
        while not shown or shown[-1] != (0.5, "loading weights: 0.02 of 0.04 GB"):
            assert len(shown) < 10_000
        half.delete()
        n = len(shown)
        while len(shown) < n + 3:
            pass
    assert shown[-1] == (0.5, "loading weights: 0.02 of 0.04 GB")  # it never decreases
    assert capsys.readouterr().err.startswith("loaded 0.04 GB of weights in ")
