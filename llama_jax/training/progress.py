"""Shows the progress of a run's steps on standard error."""

import time

from rich.progress import BarColumn

from llama_jax.runtime.console import TEXT_COLUMN, TaskProgress
from llama_jax.runtime.duration import format_duration


class StepProgress:
    """Shows the steps done, their metrics and the time left.

    Args:
        steps: steps of the run in all.
        start: steps done before.
        shown: False shows nothing.
    """

    def __init__(self, steps: int, start: int, shown: bool):
        self.steps, self.start = steps, start
        self._first_step_end = time.monotonic()
        columns = (BarColumn(bar_width=20), TEXT_COLUMN)
        self._display = TaskProgress(
            *columns, total=steps, text="compiling …", completed=start, shown=shown
        )

    def update(self, step: int, metrics: dict[str, str]) -> None:
        """Shows that `step` steps are done. `metrics` are shown as name and value."""
        now = time.monotonic()
        first = step == self.start + 1
        if first:
            self._first_step_end = now  # the first step may compile: the pace leaves it out
        else:
            pace = (now - self._first_step_end) / (step - self.start - 1)
            metrics = metrics | {"left": format_duration(pace * (self.steps - step))}
        described = "  ".join(f"{name} {value}" for name, value in metrics.items())
        text = f"step {step}/{self.steps}  {described}"
        self._display.update(step, text, line_now=first or step == self.steps)

    def close(self) -> None:
        """Removes the bar."""
        self._display.close()
