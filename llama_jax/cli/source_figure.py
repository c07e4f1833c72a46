"""Draws what a run reads of each source: bars of its tokens and of its epochs."""

from collections.abc import Sequence
from pathlib import Path

from llama_jax.config.run import Config
from llama_jax.data.source_use import SourceUse
from llama_jax.runtime.atomic_write import replace_file


def draw_sources(path: Path, config: Config, uses: Sequence[SourceUse]) -> None:
    """Draws the use of the sources into `path`; the suffix selects the format: .png or .svg."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    T, samples = config.data.seq_len, sum(use.drawn for use in uses)
    names = [use.folder for use in uses]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.45 * len(uses)), dpi=120, sharey=True, layout="constrained"
    )
    scale, unit = (1e9, "G") if samples * T >= 1e10 else (1e6, "M")
    figure.suptitle(f"{samples * T / scale:,.4g} {unit} tokens in {config.training.steps:,} steps")
    rows = range(len(uses))
    upper, lower = ([row + shift for row in rows] for shift in (-0.2, 0.2))
    drawn = [use.drawn * T / scale for use in uses]
    unique = [use.tokens / scale for use in uses]
    left.barh(upper, drawn, height=0.4, color="#1f4e9c", label="drawn in the run")
    left.barh(lower, unique, height=0.4, color="#a9c1e3", label="in the source")
    for row, use, n in zip(upper, uses, drawn, strict=True):
        left.annotate(f" {use.drawn / samples:.1%}", (n, row), va="center", fontsize=9)
    left.set(xlabel=f"tokens [{unit}]", ylim=(len(uses) - 0.5, -0.5))
    left.set_yticks([*rows], names)
    left.legend(frameon=False)
    colors = ["#b0532d" if use.exceeds_limit else "#5b86c4" for use in uses]
    right.barh([*rows], [use.epochs for use in uses], height=0.6, color=colors)
    right.axvline(1, color="black", ls="--", lw=1)
    for row, use in enumerate(uses):
        right.annotate(f" {use.epochs:.2f}", (use.epochs, row), va="center", fontsize=9)
        if use.max_epochs:
            right.plot([use.max_epochs] * 2, [row - 0.4, row + 0.4], color="black", lw=2.5)
    right.set(xlabel="epochs in the run (thick line: max_epochs)")
    for axes in (left, right):
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    with replace_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])
    plt.close(figure)
