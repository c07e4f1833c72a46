"""Draws the funnel of each prepared source: what remains after every rule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.runtime.atomic_write import replace_file


def draw_funnels(path: Path, funnels: Mapping[str, Any]) -> None:
    """Draws the funnels into `path`; the suffix selects the format: .png or .svg.

    Args:
        path: of the picture.
        funnels: the content of each `funnel.json`, by the name of the source.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lengths = [len(funnel["rules"]) + 1 for funnel in funnels.values()]
    figure, grid = plt.subplots(
        len(funnels), 1, figsize=(9, 0.8 + 0.8 * len(funnels) + 0.32 * sum(lengths)), dpi=120,
        height_ratios=lengths, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, (name, funnel) in zip(grid[:, 0], funnels.items(), strict=True):
        rules = funnel["rules"]
        labels = ["read", *(rule["rule"] for rule in rules)]
        for unit, shift, color in (("documents", -0.2, "#1f4e9c"), ("characters", 0.2, "#a9c1e3")):
            total = max(1, rules[0][unit])
            remaining = [row[unit] - row[f"removed_{unit}"] for row in rules]
            shares = [100 * n / total for n in (rules[0][unit], *remaining)]
            rows = [row + shift for row in range(len(shares))]
            axes.barh(rows, shares, height=0.4, color=color, label=unit)
            axes.margins(x=0.12)
            axes.annotate(f" {shares[-1]:.1f} %", (shares[-1], rows[-1]), va="center", fontsize=8)
        title = f"{name}: {rules[0]['documents']:,} documents"
        axes.set(title=title, ylim=(len(labels) - 0.4, -0.6))
        axes.set_yticks(range(len(labels)), labels)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, loc="lower right")
    grid[-1, 0].set_xlabel("what remains after each rule [% of what was read]")
    with replace_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])
    plt.close(figure)
