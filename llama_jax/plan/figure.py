"""A plan as a picture: a chip's memory against what it has, and where the time of a step goes."""

import math
from pathlib import Path

from llama_jax.errors import InputError
from llama_jax.plan.serving import InferencePlan
from llama_jax.plan.training import Plan
from llama_jax.plan.training_report import GIB
from llama_jax.runtime.atomic_write import replace_file

Bars = dict[str, dict[str, float]]  # what a bar is of, and its parts by name, from left to right

_COLORS = ("#1f4e9c", "#5b86c4", "#a9c1e3", "#d9a05b", "#b0532d", "#7a8a5a")


def check_path(path: str) -> Path:
    """Returns where a picture is to be written, before hours are spent on what it shows.

    Raises:
        InputError: the name ends neither with .png nor with .svg, or its folder is missing.
    """
    picture = Path(path)
    if picture.suffix not in (".png", ".svg"):
        raise InputError(f"--picture {path}: name a file that ends with .png or .svg")
    if not picture.parent.is_dir():
        raise InputError(f"--picture {path}: there is no folder {picture.parent}: make it first")
    return picture


def of_training(plan: Plan) -> tuple[str, float, Bars, Bars]:
    """Returns title, memory of a chip [GiB], and the bars of memory [GiB] and of time [ms]."""
    title = f"{plan.config.model.n_params / 1e9:.1f}B on {plan.pod}"
    times: Bars = {}
    if not plan.fits:
        title += ": does NOT fit"
    if plan.compiler:
        title += f": MFU {plan.mfu(plan.step):.1%} (causal), estimated"
        times["a step"] = {
            "compiler's estimate": plan.compiler * 1e3,
            "attention, by a model": plan.attention * 1e3,
            "network that nothing hides": plan.network * 1e3,
        }
    memory = {kind: used / GIB for kind, used in plan.memory.items()}
    return title, plan.pod.chip.hbm_gib, {"a chip": memory}, times


def of_inference(plan: InferencePlan) -> tuple[str, float, Bars, Bars]:
    """Returns the same of serving: of decoding at each batch, and of reading a prompt."""
    title = f"{plan.parameters / 1e9:.1f}B on {plan.pod}, {plan.batch} row(s) of {plan.context:,}"
    weights, cache = sum(plan.weights) / GIB, plan.cache / GIB
    memory = {"weights": weights, "keys and values": cache}
    # Decoding and reading take turns: the larger of both counts.
    reading = plan.needed > plan.decode_peak
    rest = "while a prompt is read" if reading else "temporaries of decoding"
    memory[rest] = plan.needed / GIB - weights - cache
    times = {f"decode, batch {batch}": time for batch, time in plan.decode.items()}
    if plan.prefill:
        times[f"read {plan.context:,} tokens"] = plan.prefill
    parts = {
        name: {
            "memory, compute or cycles, whichever takes longest": (t.estimate - t.network) * 1e3,
            "network": t.network * 1e3,
        }
        for name, t in times.items()
    }
    return title, plan.pod.chip.usable_hbm_gib, {"a chip": memory}, parts


def draw(path: Path, title: str, there: float, memory: Bars, times: Bars) -> None:
    """Draws both kinds of bars into `path`, whose end says how: .png or .svg.

    Args:
        title: of the picture.
        there: memory of a chip that a program can have [GiB].
        memory: parts of it that are taken [GiB].
        times: parts of steps [ms]; none where the run does not fit.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [bars for bars in (memory, times) if bars]
    heights = [1.2 + 0.4 * len(bars) for bars in shown]
    figure, axes = plt.subplots(
        len(shown), figsize=(9, 0.6 + sum(heights)), dpi=120, layout="constrained",
        gridspec_kw={"height_ratios": heights}, squeeze=False,
    )  # fmt: skip
    figure.suptitle(title)
    for place, bars, unit in zip(axes[:, 0], shown, ("GiB", "ms"), strict=False):
        _bars(place, bars, unit)
    axes[0, 0].axvline(there, color="black", ls="--", lw=1.2)
    note = {"xytext": (-5, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    axes[0, 0].annotate(f"{there:g} GiB are there", (there, -0.4), **note, fontsize=9)
    with replace_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])
    plt.close(figure)


def _bars(axes, bars: Bars, unit: str) -> None:
    """Draws a bar for each of `bars`, its parts one after the other."""
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    columns = {name: [_drawn(parts.get(name, 0.0)) for parts in bars.values()] for name in names}
    seen = {name: widths for name, widths in columns.items() if any(round(w, 2) for w in widths)}
    ends = [0.0] * len(bars)
    for (name, widths), color in zip(seen.items(), _COLORS, strict=False):
        label = f"{name} {widths[0]:,.1f}" if len(bars) == 1 else name
        axes.barh(list(bars), widths, left=ends, height=0.6, color=color, label=label)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for row, end in enumerate(ends):
        axes.annotate(f" {end:,.1f} {unit}", (end, row), va="center")
    axes.set(xlabel=unit, ylim=(len(bars) - 0.5, -0.5))
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if seen:
        axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9)


def _drawn(width: float) -> float:
    """Returns what can be drawn: what the compiler refuses without a number can't."""
    return width if math.isfinite(width) else 0.0
