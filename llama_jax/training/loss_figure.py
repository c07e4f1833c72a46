"""The figure of a run's losses, loss.png."""

import io

from llama_jax.runtime.storage import AnyPath, write_file
from llama_jax.training.metrics import read_metrics


def draw_losses(folder: AnyPath, unigram_entropy: float | None) -> AnyPath:
    """Draws the losses in metrics.jsonl as loss.png, and returns the path of loss.png.

    Args:
        folder: of the run.
        unigram_entropy: of the held-out text [nats per token], drawn as a line; None: no line.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(folder / "metrics.jsonl")
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), color="#9db4d6", lw=1, label="training")
    if validation:
        style = {"color": "#1f4e9c", "marker": "o", "ms": 4, "lw": 1.8}
        axes.plot(*zip(*validation, strict=True), **style, label="validation")
        step, loss = validation[-1]
        axes.annotate(
            f"{loss:.2f}", (step, loss), xytext=(0, 8), textcoords="offset points", ha="right"
        )
    if unigram_entropy is not None:
        label = f"unigram entropy of the held-out text ({unigram_entropy:.2f})"
        axes.axhline(unigram_entropy, color="#b0532d", ls="--", lw=1.2, label=label)
    unit = "preference" if any("preferences" in r for r in records) else "token"
    axes.set(xlabel="step", ylabel=f"loss [nats per {unit}]", title=folder.name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    try:
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write_file(path, picture.getvalue())
    finally:
        plt.close(figure)
    return path
