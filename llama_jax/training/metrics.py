"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar, loss.png."""

import contextlib
import importlib.util
import json
import math
import uuid
from pathlib import Path
from typing import Any

from llama_jax.config.run import Config, LoggingConfig
from llama_jax.errors import Fault, InputError
from llama_jax.runtime.atomic_write import replace_file
from llama_jax.runtime.chips import chip_of


def peak_flops(config: LoggingConfig, device_kind: str) -> float | None:
    """Returns the peak of one device [FLOP/s], or None where it is not known."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    chip = chip_of(device_kind)
    return chip.bf16_tflops * 1e12 if chip else None


def check_installed(config: LoggingConfig) -> None:
    """Looks for the packages that the configuration asks for.

    Raises:
        InputError: one is missing.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"logging.wandb is {config.wandb}, but the package wandb is not installed: pip install"
            " wandb, or set logging.wandb to null"
        )


class MetricsLog:
    """Writes one record a step to metrics.jsonl and where else the configuration says.

    Opened at a step, it first drops the records of later steps: those will be made again.
    """

    def __init__(self, folder: Path, config: Config, step: int):
        self.path = folder / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= step]
        with replace_file(self.path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.logging.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if config.logging.wandb:
            import wandb  # pyright: ignore[reportMissingImports] (an extra)

            self._wandb = wandb.init(
                project=config.logging.wandb,
                name=folder.name,
                id=_wandb_id(folder / "wandb_id"),
                resume="allow",
            )

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Writes the values of `step` (1 is the first); a non-finite number becomes null.

        Raises:
            Fault: the disk is full, or can't be written for another reason.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        try:
            self._file.write(json.dumps({"step": step} | finite) + "\n")
            self._file.flush()
        except OSError as error:
            raise Fault(
                f"can't write {self.path} ({error.strerror}): mend that, and the same command goes"
                " on from the last checkpoint"
            ) from error
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Closes everything."""
        with contextlib.suppress(OSError):  # `write` has raised it before
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _wandb_id(path: Path) -> str:
    """Returns the run's id at Weights & Biases: made once, then kept in `path`.

    The name of the run folder would not do: two folders of one name would be one run there.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(uuid.uuid4().hex)
        partial.replace(path)
    return path.read_text().strip()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl; a last line that was cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
