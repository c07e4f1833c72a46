"""Reports the metrics of a run: records, progress on standard error, and the loss figure."""

import time
from typing import Any

import jax
import numpy as np

from llama_jax.config.run import Config
from llama_jax.data.batches import Batches
from llama_jax.runtime.console import print_status
from llama_jax.runtime.hosts import is_host_zero
from llama_jax.runtime.storage import AnyPath
from llama_jax.training.data_wait import DataWait
from llama_jax.training.host_times import HostTimes
from llama_jax.training.ledger import Ledger
from llama_jax.training.loss import RowSums
from llama_jax.training.loss_figure import draw_losses
from llama_jax.training.metrics import EVALUATION, MetricsLog, seconds_at_peak
from llama_jax.training.progress import StepProgress
from llama_jax.training.source_losses import split_loss
from llama_jax.training.step import StepMetrics
from llama_jax.training.watchdog import Watchdog


def is_due(step: int, every: int) -> bool:
    """Returns whether an action every `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0


def draw_figure(folder: AnyPath, data: Batches, steps: int) -> None:
    """Draws the losses of a run of `steps` steps as loss.png.

    A failure is printed: it must neither fail the run nor replace the error that ended it.
    """
    try:
        draw_losses(folder, data.unigram_entropy(steps))
    except OSError as error:
        print_status(f"can't draw the losses: {error}")


class Report:
    """Logs step metrics, shows progress and draws the loss figure. Only host 0 writes.

    Args:
        config: of the run.
        folder: of the run.
        data: of the run.
        first: number of steps done before.
        ledger: of the run; host 0 opens it here.

    Attributes:
        watchdog: of the run.
    """

    def __init__(self, config: Config, folder: AnyPath, data: Batches, first: int, ledger: Ledger):
        self.config, self.folder, self.data, self._ledger = config, folder, data, ledger
        self.log = MetricsLog(folder, config, first) if is_host_zero() else None
        if self.log:
            ledger.open(folder, first, self.log.reached)
        self.progress = StepProgress(config.training.steps, first, config.logging.progress)
        self.skipped_in_a_row = self.skipped = 0
        self._validation = ""
        self._data_wait, self._host_times = DataWait(), HostTimes(folder)
        self.watchdog = Watchdog(folder, ledger, config.training.watchdog, first)
        self._dispatched = self._done = time.monotonic()
        device = jax.devices()[0].device_kind
        self._seconds_at_peak = seconds_at_peak(config, device, jax.device_count())
        self._tokens = config.data.batch_size * config.data.seq_len

    def record_dispatch(self) -> None:
        """Records the time at which the host dispatches a step."""
        self._dispatched = time.monotonic()
        self._host_times.start_step()
        self.watchdog.start_step()

    def record_batch(self, computing: StepMetrics | None) -> None:
        """Records that the batch of the step is on the host.

        Args:
            computing: of the previous step; None: it has ended. While the devices compute it, they
                don't wait. Otherwise they have waited since it ended, at most since the dispatch.
        """
        self._host_times.end_part("data")
        self.watchdog.end_stage()
        loss: Any = computing and computing.loss
        if loss is None or loss.is_ready():
            self._data_wait.add(time.monotonic() - self._dispatched)

    def record_computing(self) -> None:
        """Records that the host has dispatched the step to its devices."""
        self._host_times.end_part("dispatch")
        self.watchdog.end_stage()

    def read(self, metrics: StepMetrics) -> Any:
        """Waits for a step; returns its metrics as a StepMetrics of numbers, without `rows`."""
        self._host_times.end_part("other")
        numbers = jax.tree.map(lambda value: np.asarray(value).item(), metrics._replace(rows=None))
        self._host_times.end_part("device")
        return numbers

    def step(self, step: int, numbers: Any, rows: RowSums | None) -> None:
        """Reports the metrics of a step (1 is the first), which has ended just now.

        Args:
            step: number of steps done.
            numbers: `read` of its metrics.
            rows: of its metrics.
        """
        self._host_times.gather(step)
        loss, norm, rate, targets, skipped, _, preferences, _ = numbers
        now = time.monotonic()
        # A step starts when the previous one ends, or when the host dispatches it if that is later.
        seconds = now - max(self._done, min(self._dispatched, now))
        self._done = now
        self.watchdog.end_step(seconds)
        data_wait = self._data_wait.end_step(seconds)
        self._ledger.end_step(step, data_wait * seconds)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        record = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": seconds,
            "data_wait": data_wait,
            "goodput": self._ledger.goodput(),
            "time": round(time.time(), 3),  # [s since 1970, UTC]
            "targets": targets,
            "masked": 1 - targets / self._tokens,
            "tokens_seen": step * self._tokens,
            "skipped": int(skipped),
            **(preferences._asdict() if preferences else {}),
            **self._host_times.metrics,
        }
        if self._seconds_at_peak:
            record["mfu"] = self._seconds_at_peak / seconds
        logged = is_due(step, self.config.logging.every) or step == self.config.training.steps
        if self.log and logged:
            if rows and len(self.config.data.folders) > 1:
                record |= split_loss(rows, self.data.samples.folders(step - 1))
            self.log.write(step, record)
        shown = {"loss": f"{loss:.3f}"}
        shown |= {"accuracy": f"{preferences.accuracy:.0%}"} if preferences else {}
        shown |= {"val": self._validation} if self._validation else {}
        shown |= {"tok/s": f"{record['tokens_per_second']:,.0f}"}
        shown |= {"MFU": f"{record['mfu']:.1%}"} if self._seconds_at_peak else {}
        shown |= {"data wait": f"{data_wait:.1%}"}
        shown |= {"skipped": str(self.skipped)} if self.skipped else {}
        self.progress.update(step, shown)
        self._host_times.end_part("other")

    def validation(self, step: int, means: dict[str, float]) -> None:
        """Reports the loss on the held-out data after `step` steps, and other means, by name."""
        if means:
            if self.log:
                self.log.write(step, {f"validation_{name}": x for name, x in means.items()})
            if "loss" in means:
                self._validation = f"{means['loss']:.3f}"
        self._done = time.monotonic()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Reports the results on tasks after `step` steps, by 'TASK/METRIC'; {} on other hosts."""
        if self.log and metrics:
            self.log.write(step, {f"{EVALUATION}{name}": x for name, x in metrics.items()})
        self._done = time.monotonic()

    def return_to(self, step: int) -> None:
        """Marks that the run continues after `step` steps, with a step that it has dispatched."""
        self._done = time.monotonic()
        self.watchdog.return_to(step)

    def rewind(self, step: int, reached: int) -> None:
        """Removes the records of the steps after `step`: the run replaces those until `reached`."""
        self.return_to(step)
        self._ledger.repeat_until(reached)
        if self.log:
            self.log.close()
            self.log = MetricsLog(self.folder, self.config, step)

    def upload(self) -> None:
        """Writes the ledger, and copies the logs into the bucket if the run folder is in one."""
        self._ledger.write()
        if self.log:
            self.log.upload()

    def close(self) -> None:
        """Ends the watchdog, closes the files and draws the loss figure."""
        self.watchdog.close()
        self.progress.close()
        if self.log:
            self.log.close()
            draw_figure(self.folder, self.data, self.config.training.steps)
