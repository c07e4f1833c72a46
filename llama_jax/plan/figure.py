"""Draws a plan: bars of the memory of a chip and of the time of a step."""

import math
from dataclasses import dataclass
from pathlib import Path

from llama_jax.plan.serving import InferencePlan
from llama_jax.plan.training import TrainingPlan
from llama_jax.plan.training_report import GIB
from llama_jax.runtime.atomic_write import replace_file

Bars = dict[str, dict[str, float]]  # by the label of the bar: its parts from left to right

_COLORS = ("#1f4e9c", "#5b86c4", "#a9c1e3", "#d9a05b", "#b0532d", "#7a8a5a")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Content of a picture.

    Attributes:
        title: of the picture.
        capacity: memory of a chip that a program can use [GiB].
        memory: parts of the memory that the program needs [GiB].
        times: parts of the step times [ms]; empty where the run does not fit.
    """

    title: str
    capacity: float
    memory: Bars
    times: Bars


def chart_training(plan: TrainingPlan) -> Chart:
    """Returns the memory of a chip and the time of a training step."""
    title = f"{plan.config.model.n_params / 1e9:.1f}B on {plan.pod}"
    times: Bars = {}
    if not plan.fits:
        title += ": does NOT fit"
    if plan.compiler_seconds:
        title += f": MFU {plan.mfu(plan.step_seconds):.1%} (causal), estimated"
        times["a step"] = {
            "compiler's estimate": plan.compiler_seconds * 1e3,
            "attention, modelled": plan.attention_seconds * 1e3,
            "exposed communication": plan.exposed_seconds * 1e3,
        }
    memory = {kind: used / GIB for kind, used in plan.memory.items()}
    return Chart(
        title=title, capacity=plan.capacity_bytes / GIB, memory={"a chip": memory}, times=times
    )


def chart_inference(plan: InferencePlan) -> Chart:
    """Returns the memory of a chip, and the times of a decode step at each batch and of prefill."""
    title = (
        f"{plan.config.n_params / 1e9:.1f}B on {plan.pod}, {plan.batch} row(s) of {plan.context:,}"
    )
    weights, cache = sum(plan.weights) / GIB, plan.cache_bytes / GIB
    memory = {"weights": weights, "KV cache": cache}
    # Decoding and prefill alternate: the chart shows the one that needs more memory.
    prefill_is_larger = plan.needed_bytes > plan.decode_peak_bytes
    rest = "during prefill" if prefill_is_larger else "temporaries of decoding"
    memory[rest] = plan.needed_bytes / GIB - weights - cache
    times = {f"decode, batch {batch}": time for batch, time in plan.decode_times.items()}
    if plan.prefill_time:
        times[f"prefill {plan.context:,} tokens"] = plan.prefill_time
    parts = {
        name: {
            "memory, compute or cycles, whichever takes longest": (t.estimate - t.network) * 1e3,
            "network": t.network * 1e3,
        }
        for name, t in times.items()
    }
    capacity = plan.pod.chip.usable_hbm_gib
    return Chart(title=title, capacity=capacity, memory={"a chip": memory}, times=parts)


def draw_chart(path: Path, chart: Chart) -> None:
    """Draws a chart into `path`; the suffix selects the format: .png or .svg."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(chart.memory, "GiB"), *([(chart.times, "ms")] if chart.times else [])]
    heights = [1.2 + 0.4 * len(bars) for bars, _ in panels]
    figure, axes = plt.subplots(
        len(panels), figsize=(9, 0.6 + sum(heights)), dpi=120, layout="constrained",
        gridspec_kw={"height_ratios": heights}, squeeze=False,
    )  # fmt: skip
    figure.suptitle(chart.title)
    for panel, (bars, unit) in zip(axes[:, 0], panels, strict=True):
        _draw_bars(panel, bars, unit)
    axes[0, 0].axvline(chart.capacity, color="black", ls="--", lw=1.2)
    note = {"xytext": (-5, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    axes[0, 0].annotate(
        f"{chart.capacity:g} GiB available", (chart.capacity, -0.4), **note, fontsize=9
    )
    with replace_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])
    plt.close(figure)


def _draw_bars(axes, bars: Bars, unit: str) -> None:
    """Draws stacked horizontal bars, with a legend for the parts that are not 0."""
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    widths = {name: [_finite(parts.get(name, 0.0)) for parts in bars.values()] for name in names}
    visible = {name: row for name, row in widths.items() if any(round(w, 2) for w in row)}
    ends = [0.0] * len(bars)
    for (name, row), color in zip(visible.items(), _COLORS, strict=False):
        label = f"{name} {row[0]:,.1f}" if len(bars) == 1 else name
        axes.barh(list(bars), row, left=ends, height=0.6, color=color, label=label)
        ends = [end + width for end, width in zip(ends, row, strict=True)]
    for position, end in enumerate(ends):
        axes.annotate(f" {end:,.1f} {unit}", (end, position), va="center")
    axes.set(xlabel=unit, ylim=(len(bars) - 0.5, -0.5))
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if visible:
        axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9)


def _finite(width: float) -> float:
    """Returns 0 for an infinite width: a program that the compiler rejects without a number."""
    return width if math.isfinite(width) else 0.0
