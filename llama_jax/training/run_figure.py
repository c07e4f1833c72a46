"""The figure of a complete run on one time axis: `llama-jax info RUN --picture`."""

import io
import itertools
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from llama_jax.errors import InputError
from llama_jax.runtime.atomic_write import replace_file
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.storage import AnyPath, write_file
from llama_jax.training.events import read_events
from llama_jax.training.ledger import Session, read_sessions
from llama_jax.training.metrics import read_metrics

_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_PANELS = (  # name in metrics.jsonl, label, scale
    ("loss", "training loss [nats]", "linear"),
    ("grad_norm", "gradient norm", "log"),
    ("tokens_per_second", "tokens/s", "linear"),
    ("goodput", "goodput", "linear"),
)
_LINE, _RESTART, _SKIPPED, _SPIKE, _REWIND = "#1f4e9c", "#b0532d", "#111111", "#c2185b", "#6a3d9a"
_FEW = 200  # steps; if a run has fewer, each has a dot


def draw_run(folder: AnyPath, path: AnyPath) -> None:
    """Draws loss, gradient norm, tokens per second and goodput of a run over time, into `path`.

    Dashed lines are restarts; the time before each in which no process ran is shaded. Triangles are
    spikes, dotted lines are rewinds. Steps that were repeated after a restart or a rewind are shown
    once, as their last computation.

    Args:
        folder: of the run.
        path: a .png or .svg file.

    Raises:
        InputError: the run has no steps yet, or an earlier version has recorded them without times.
    """
    sessions = read_sessions(folder)
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "time" in r and "loss" in r]
    if not sessions or not records:
        raise InputError(
            f"{folder} has no steps with a time in metrics.jsonl: there is nothing to draw yet, or"
            " an earlier version of llama_jax has recorded them (loss.png shows these)"
        )
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    events = read_events(folder, "spike") + read_events(folder, "rewind")
    figure = plot_run(folder.name, sessions, records, events)
    picture = io.BytesIO()
    figure.savefig(picture, format=str(path).rpartition(".")[2])
    plt.close(figure)
    if isinstance(path, BucketPath):
        write_file(path, picture.getvalue())
        return
    with replace_file(path) as partial:
        partial.write_bytes(picture.getvalue())


def plot_run(
    name: str,
    sessions: Sequence[Session],
    records: list[dict[str, Any]],
    events: Sequence[dict[str, Any]] = (),
) -> Any:
    """Returns the figure of `draw_run`: a panel for each of `_PANELS`.

    Args:
        name: of the run.
        sessions: of its ledger, at least one.
        records: of its steps, at least one.
        events: its spikes and rewinds.
    """
    import matplotlib.pyplot as plt

    start = sessions[0].start
    last = max(sessions[-1].end, records[-1]["time"]) - start
    unit, seconds = next((u for u in _UNITS if last >= 2 * u[1]), _UNITS[-1])
    figure, grid = plt.subplots(
        len(_PANELS), figsize=(10, 2.1 * len(_PANELS)), dpi=120, layout="constrained", sharex=True
    )
    for axes, (metric, label, scale) in zip(grid, _PANELS, strict=True):
        _draw_metric(axes, records, metric, sessions, seconds)
        _draw_restarts(axes, sessions, seconds)
        _draw_spikes(axes, events, start, seconds)
        axes.set(ylabel=label, yscale=scale)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set(ylim=(0, 1.02), xlabel=f"{unit} since the first start", xlim=(0, last / seconds))
    restarts = len(sessions) - 1
    skipped = sum(r.get("skipped", 0) for r in records)
    spikes = sum(event["event"] == "spike" for event in events)
    grid[0].set_title(
        f"{name}: {records[-1]['step']:,} steps, {restarts}"
        f" {'restart' if restarts == 1 else 'restarts'}, {skipped} skipped"
        + (f", {spikes} {'spike' if spikes == 1 else 'spikes'}" if spikes else "")
    )
    if grid[0].get_legend_handles_labels()[1]:
        grid[0].legend(frameon=False, loc="upper right")
    return figure


def _draw_metric(
    axes: Any,
    records: list[dict[str, Any]],
    metric: str,
    sessions: Sequence[Session],
    seconds: float,
) -> None:
    """Draws a metric over time, and a mark at the bottom for each skipped step.

    Args:
        axes: of the panel.
        records: of the steps.
        metric: its name in the records; where it is not finite, the line has a gap.
        sessions: of the run; each has a line of its own.
        seconds: unit of the time axis.
    """
    starts = [session.start for session in sessions]
    dots = {"marker": ".", "ms": 3} if len(records) < _FEW else {}
    found = [r[metric] for r in records if r.get(metric) is not None]
    for begin, end in itertools.pairwise([*starts, math.inf]):
        own = [r for r in records if begin <= r["time"] < end]
        times = [(r["time"] - starts[0]) / seconds for r in own]
        values = [math.nan if r.get(metric) is None else r[metric] for r in own]
        axes.plot(times, values, color=_LINE, lw=1, **dots)
    if metric == "tokens_per_second" and found:
        # A step that ends just after a late one seems to take no time: it must not set the scale.
        ordered = sorted(found)
        axes.set(ylim=(0, 1.25 * ordered[int(0.98 * (len(ordered) - 1))]))
    skipped = [(r["time"] - starts[0]) / seconds for r in records if r.get("skipped")]
    if skipped:
        style = {"color": _SKIPPED, "marker": "x", "ls": "", "ms": 5, "label": "skipped step"}
        axes.plot(skipped, [0.03] * len(skipped), transform=axes.get_xaxis_transform(), **style)


def _draw_spikes(axes: Any, events: Sequence[dict[str, Any]], start: float, seconds: float) -> None:
    """Draws a triangle at the top for each spike, and a line at each rewind."""
    times = {"spike": list[float](), "rewind": list[float]()}
    for event in events:
        at = datetime.fromisoformat(event["time"]).timestamp()  # in whole seconds
        times[event["event"]].append(max(0.0, at - start) / seconds)
    for i, at in enumerate(times["rewind"]):
        label = None if i else "rewind"
        axes.axvline(at, color=_REWIND, lw=0.8, ls=":", label=label)
    if times["spike"]:
        style = {"color": _SPIKE, "marker": "v", "ls": "", "ms": 5, "label": "spike"}
        heights = [0.97] * len(times["spike"])
        axes.plot(times["spike"], heights, transform=axes.get_xaxis_transform(), **style)


def _draw_restarts(axes: Any, sessions: Sequence[Session], seconds: float) -> None:
    """Draws a line at each restart, and shades the time between its process and the one before."""
    start = sessions[0].start
    for i, session in enumerate(sessions[1:]):
        end, begin = (sessions[i].end - start) / seconds, (session.start - start) / seconds
        label = None if i else "restart, after a time without a process"
        axes.axvspan(min(end, begin), begin, color=_RESTART, alpha=0.12, lw=0)
        axes.axvline(begin, color=_RESTART, lw=0.8, ls="--", label=label)
