"""The metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, and the MFU."""

import contextlib
import importlib.util
import json
import math
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from llama_jax.config.run import Config, LoggingConfig
from llama_jax.errors import Fault, InputError
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.chips import chip_of
from llama_jax.runtime.storage import AnyPath, remove_tree, write_file, write_many

EVALUATION = "eval/"  # starts the names of results on tasks: eval/TASK/METRIC
UPLOAD_SECONDS = 60.0  # between two uploads of the logs into a bucket; each checkpoint also uploads


def peak_flops(config: LoggingConfig, device_kind: str) -> float | None:
    """Returns the peak of one device [FLOP/s], or None if it is unknown."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    chip = chip_of(device_kind)
    return chip.bf16_tflops * 1e12 if chip else None


def seconds_at_peak(config: Config, device_kind: str, devices: int) -> float | None:
    """Returns the time of a step at the peak of the devices [s], or None if that is unknown.

    The MFU of a step is this time divided by its own (PaLM, arXiv 2204.02311, appendix B).
    """
    peak = peak_flops(config.logging, device_kind)
    flops = config.flops_per_token * config.data.batch_size * config.data.seq_len
    return flops / (peak * devices) if peak else None


def check_wandb_installed(config: LoggingConfig) -> None:
    """Checks that the package wandb is installed if the configuration uses it.

    Raises:
        InputError: it is missing.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"logging.wandb is {config.wandb}, but the package wandb is not installed: pip install"
            " wandb, or set logging.wandb to null"
        )


class MetricsLog:
    """Writes one record per step to metrics.jsonl, and to the other logs of the configuration.

    Args:
        folder: of the run.
        config: of the run.
        step: of the checkpoint from which the run resumes. Records of later steps are removed:
            the run computes these steps again.

    Attributes:
        reached: number of steps that earlier processes have computed and logged.
    """

    def __init__(self, folder: AnyPath, config: Config, step: int):
        self.path = folder / "metrics.jsonl"
        found = read_metrics(self.path)
        self.reached = max((record["step"] for record in found), default=0)
        earlier = [record for record in found if record["step"] <= step]
        write_file(self.path, "".join(json.dumps(record) + "\n" for record in earlier).encode())
        # Objects can't be appended to: in a bucket the files are written here and uploaded.
        self._folder, self._uploaded = folder, time.monotonic()
        self._local = Path(tempfile.mkdtemp()) if isinstance(folder, BucketPath) else folder
        if self._local != folder:
            (self._local / "metrics.jsonl").write_bytes(self.path.read_bytes())
        self._file = open(self._local / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (close)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.logging.tensorboard:
            from llama_jax.training.tensorboard import TensorBoardLog

            self._tensorboard = TensorBoardLog(self._local / "tensorboard", step + 1)
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
        path = self.path
        try:
            self._file.write(json.dumps({"step": step} | finite) + "\n")
            self._file.flush()
            if self._tensorboard:
                path = self._folder / "tensorboard"
                self._tensorboard.write(step, values)
        except OSError as error:
            raise Fault(
                f"can't write {path} ({error.strerror}): fix the cause; the same command then"
                " resumes from the last checkpoint"
            ) from error
        if self._wandb:
            self._wandb.log(values, step=step)
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.upload()

    def upload(self) -> None:
        """Copies the logs into the bucket of the run folder, if it is in one.

        Raises:
            Fault: the bucket can't be written.
        """
        if self._local == self._folder:
            return
        self._uploaded = time.monotonic()
        try:
            if self._tensorboard:
                self._tensorboard.flush()
            paths = [path for path in self._local.rglob("*") if path.is_file()]
            logs = {path.relative_to(self._local).as_posix(): path.read_bytes() for path in paths}
            write_many(self._folder, logs)
        except OSError as error:
            raise Fault(f"can't write the logs of {self._folder} ({error})") from error

    def close(self) -> None:
        """Closes all logs."""
        with contextlib.suppress(OSError):  # `write` has raised it already
            self._file.close()
        if self._tensorboard:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
            self._tensorboard = None
        if self._wandb:
            self._wandb.finish()
        if self._local != self._folder:
            with contextlib.suppress(Fault):  # must not replace the error that ended the run
                self.upload()
            remove_tree(self._local)


def _wandb_id(path: AnyPath) -> str:
    """Returns the id of the run at Weights & Biases: generated once, then read from `path`.

    The name of the run folder can't be the id: two folders of one name would become one run.
    """
    if not path.exists():
        write_file(path, uuid.uuid4().hex.encode())
    return path.read_text().strip()


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """Returns the records of a metrics.jsonl, without a last line that is incomplete."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
