"""Draws the paper's tables with the measured results: a panel for each table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.errors import InputError
from llama_jax.evaluation.paper_tables import TABLES, Metrics, own_row, tables_of
from llama_jax.runtime.atomic_write import replace_file

_LLAMA = ("#c6d4ea", "#9db4d6", "#5b86c4", "#1f4e9c")  # 7B, 13B, 33B, 65B
_OWN, _OTHERS = "#b0532d", "#7a7a7a"
# Within the unit of a column: the dots, the bars of LLaMA, a gap, the measured bar.
_DOTS, _PLACES, _WIDTH = -0.42, (-0.31, -0.17, -0.03, 0.11, 0.29), 0.14


def check_columns(names: Sequence[str]) -> None:
    """Checks that a picture will show something, before the evaluation runs for hours.

    Args:
        names: the tasks to evaluate, `paper:TABLE` among them.

    Raises:
        InputError: none of them is in the paper's tables.
    """
    columns = {column.task for table in TABLES.values() for column in table.columns}
    if not any(name in columns or name.startswith("paper:") for name in names):
        raise InputError(
            "--picture draws the paper's tables: add one of them, such as paper:common-sense, to"
            " --tasks"
        )


def draw_tables(path: Path, results: Metrics, model: str) -> None:
    """Draws each table of which a column was measured; the suffix of `path` selects the format.

    Bars are LLaMA 7B to 65B and the measured model, dots the other models in the table.

    Args:
        path: a .png or .svg file.
        results: of `metrics_of`.
        model: label of the measured bars.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = tables_of(results)
    figure, axes = plt.subplots(
        len(names), figsize=(10, 0.6 + 2.9 * len(names)), dpi=120, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for panel, name in zip(axes[:, 0], names, strict=True):
        _draw_table(panel, name, results, model)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    with replace_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])
    plt.close(figure)


def _draw_table(panel: Any, name: str, results: Metrics, model: str) -> None:
    """Draws the measured columns of a table."""
    table = TABLES[name]
    own = own_row(table, results)
    measured = [i for i, value in enumerate(own) if value is not None]
    llama = {row: values for row, values in table.rows.items() if row.startswith("LLaMA")}
    bars = [
        *zip(llama, llama.values(), _LLAMA, _PLACES, strict=False),
        (model, own, _OWN, _PLACES[-1]),
    ]
    for label, values, color, place in bars:
        heights = [values[column] for column in measured]
        places = [x + place for x in range(len(measured))]
        drawn = panel.bar(places, heights, _WIDTH, color=color, label=label)
        if values is own:
            panel.bar_label(drawn, fmt="%.1f", fontsize=8, padding=1)
    dots = [
        (x + _DOTS, values[column])
        for row, values in table.rows.items()
        if row not in llama
        for x, column in enumerate(measured)
        if values[column] is not None
    ]
    panel.plot(
        [x for x, _ in dots],
        [y for _, y in dots],
        ".",
        color=_OTHERS,
        label="GPT-3, PaLM and others",
    )
    labels = [table.columns[column].label for column in measured]
    panel.set_xticks(range(len(measured)), labels)
    panel.set(ylabel="%", xlim=(-0.6, max(len(measured), 3) - 0.4))
    panel.set_title(table.title, loc="left", fontsize=10)
    panel.grid(axis="y", alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
