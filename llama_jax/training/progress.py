"""What a run shows people: lines and a bar on standard error, and a picture of the losses."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llama_jax.runtime.atomic_write import replaced_file
from llama_jax.runtime.console import duration
from llama_jax.runtime.hosts import leads
from llama_jax.training.metrics import read_metrics


class StepProgress:
    """Shows where a run stands: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, steps: int, start: int, shown: bool):
        self.steps, self.start, self.shown = steps, start, shown and leads()
        self.console = Console(stderr=True)
        self._begun = self._told = time.monotonic()
        self._bar: Progress | None = None
        if self.shown and self.console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("compiling …", total=steps, completed=start)
            self._bar.start()

    def update(self, step: int, parts: dict[str, str]) -> None:
        """Tells that `step` steps are done. `parts` are shown as name and value."""
        now = time.monotonic()
        if step == self.start + 1:
            self._begun = now  # compilation is not part of the pace
        seconds = (now - self._begun) / max(1, step - self.start - 1) * (self.steps - step)
        left = {"left": duration(seconds)} if step > self.start + 1 else {}
        described = "  ".join(f"{name} {value}" for name, value in (parts | left).items())
        text = f"step {step}/{self.steps}  {described}"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif self.shown and (now - self._told > 10 or step in (self.start + 1, self.steps)):
            self._told = now
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def draw_losses(folder: Path, unigram_entropy: float | None) -> Path:
    """Draws the losses in metrics.jsonl as loss.png and returns its path."""
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
    axes.set(xlabel="step", ylabel="loss [nats per token]", title=folder.name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    try:
        with replaced_file(path) as partial:
            figure.savefig(partial, format="png")
    finally:
        plt.close(figure)
    return path
