"""The figure of a run's losses and of its results on tasks, loss.png."""

import io
import math
from typing import Any

from llama_jax.runtime.storage import AnyPath, write_file
from llama_jax.training.metrics import EVALUATION, read_metrics

_MAX_LINES = 10  # of results, or of sources; more can't be distinguished

Points = list[tuple[int, float]]  # steps and values


def draw_losses(folder: AnyPath, unigram_entropy: float | None) -> AnyPath:
    """Draws the losses in metrics.jsonl as loss.png, and returns the path of loss.png.

    If the run has several sources, a panel shows the losses of each; if it was evaluated on tasks,
    a panel shows the first metric of each.

    Args:
        folder: of the run.
        unigram_entropy: of the held-out text [nats per token], drawn as a line unless all losses
            are below it, as in a fine-tune; None: no line.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(folder / "metrics.jsonl")
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    sources, results = _by_source(records), _results(records)
    panels = 1 + bool(sources) + bool(results)
    figure, grid = plt.subplots(
        panels, figsize=(8, 4.5 * panels), dpi=120, layout="constrained", sharex=True, squeeze=False
    )
    axes = grid[0, 0]
    if training:
        axes.plot(*zip(*training, strict=True), color="#9db4d6", lw=1, label="training")
    if validation:
        style = {"color": "#1f4e9c", "marker": "o", "ms": 4, "lw": 1.8}
        axes.plot(*zip(*validation, strict=True), **style, label="validation")
        step, loss = validation[-1]
        axes.annotate(
            f"{loss:.2f}", (step, loss), xytext=(0, 8), textcoords="offset points", ha="right"
        )
    losses = [loss for _, loss in (*training, *validation)]
    if unigram_entropy is not None and unigram_entropy < max(losses, default=math.inf):
        label = f"unigram entropy of the held-out text ({unigram_entropy:.2f})"
        axes.axhline(unigram_entropy, color="#b0532d", ls="--", lw=1.2, label=label)
    unit = "preference" if any("preferences" in r for r in records) else "token"
    axes.set(ylabel=f"loss [nats per {unit}]", title=folder.name)
    if sources:
        _draw_sources(grid[1, 0], sources)
        grid[1, 0].set(ylabel=f"loss of each source [nats per {unit}]")
    if results:
        for name, points in results.items():
            grid[-1, 0].plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
        grid[-1, 0].set(ylabel="results on tasks")
    for axes in grid[:, 0]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    axes.set(xlabel="step")
    path = folder / "loss.png"
    try:
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write_file(path, picture.getvalue())
    finally:
        plt.close(figure)
    return path


def _by_source(records: list[dict[str, Any]]) -> dict[str, tuple[Points, Points]]:
    """Returns the training losses and the validation losses of each source, by folder."""
    points = dict[str, tuple[Points, Points]]()
    for record in records:
        for name, value in record.items():
            kind, _, folder = name.partition("/")
            if value is not None and kind in ("loss", "validation_loss") and folder:
                of_source = points.setdefault(folder, ([], []))
                of_source[kind == "validation_loss"].append((record["step"], value))
    return dict([*points.items()][:_MAX_LINES])


def _draw_sources(axes: Any, sources: dict[str, tuple[Points, Points]]) -> None:
    """Draws a thin line of the training losses of each source, and points of its validation."""
    for i, (folder, (training, validation)) in enumerate(sources.items()):
        color, label = f"C{i}", folder  # of the first line that the source has
        if validation:
            style = {"color": color, "marker": "o", "ms": 4, "lw": 1.8, "label": label}
            axes.plot(*zip(*validation, strict=True), **style)
            label = None
        if training:
            style = {"color": color, "lw": 0.8, "alpha": 0.4, "label": label}
            axes.plot(*zip(*training, strict=True), **style)


def _results(records: list[dict[str, Any]]) -> dict[str, Points]:
    """Returns the steps and values of the first metric of each task, by 'TASK METRIC'."""
    points: dict[str, Points] = {}
    metrics: dict[str, str] = {}
    for record in records:
        for name, value in record.items():
            task, _, metric = name.removeprefix(EVALUATION).rpartition("/")
            if not name.startswith(EVALUATION) or value is None:
                continue
            if metrics.setdefault(task, metric) == metric:
                points.setdefault(f"{task} {metric}", []).append((record["step"], value))
    return dict([*points.items()][:_MAX_LINES])
