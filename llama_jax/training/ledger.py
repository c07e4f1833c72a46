"""The ledger of a run: how each second since its first start was spent."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from llama_jax.errors import Fault
from llama_jax.runtime.bucket_path import BucketPath
from llama_jax.runtime.storage import AnyPath, read_many, write_file

FILE = "ledger.jsonl"
# What a process does. Only `training` advances the run: `repeating` computes steps again that a
# killed process had computed after its last checkpoint, or that a rewind replaces.
KINDS = (
    *("starting", "restoring", "compiling", "training", "repeating", "waiting for data"),
    *("evaluating", "saving"),
)
STEP_KINDS = ("training", "repeating")
WRITE_SECONDS, WRITE_SECONDS_IN_BUCKET = 10.0, 60.0
CLOCK_SECONDS = 10.0  # the clocks of two hosts may differ by less
DOWN = "down"  # between the last record of a process and the start of the next one


class Session(NamedTuple):
    """One start of the run."""

    start: float  # time of day [s since 1970, UTC]
    step: int  # number of steps done at the last record
    seconds: dict[str, float]  # by kind; only those that occurred

    @property
    def end(self) -> float:
        """Time of the last record."""
        return self.start + sum(self.seconds.values())


class Ledger:
    """Assigns each second since its creation to one of `KINDS`, and records the sums.

    Host 0 writes it every `WRITE_SECONDS`, at every checkpoint and at the end. A process that is
    killed loses the seconds since its last record: they count as `DOWN`.
    """

    def __init__(self):
        self._start, self._since = time.time(), time.monotonic()
        self._clock_offset = self._start - self._since
        self._kind, self._step, self._reached = "starting", 0, 0
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._earlier, self._folder = list[Session](), None
        self._written = self._since

    @property
    def kind(self) -> str:
        """What this process does, one of `KINDS`."""
        return self._kind

    def open(self, folder: AnyPath, step: int, reached: int) -> None:
        """Reads the earlier sessions, and records this one from now on. Only host 0 calls this.

        Args:
            folder: of the run.
            step: number of steps done, from which the run resumes.
            reached: number of steps that an earlier process has computed.
        """
        self._step, self._reached = step, reached
        self._earlier, self._folder = read_sessions(folder), folder
        behind = self._earlier[-1].end - self._start if self._earlier else 0.0
        if behind > CLOCK_SECONDS:
            _report(
                f"the clock of this machine is {behind:.0f} s behind the last record of"
                f" {folder / FILE}: it was set back, or is not that of the last host; the time"
                " between the two starts counts as 0"
            )

    def repeat_until(self, reached: int) -> None:
        """Counts the steps until `reached` as computed before: their next computation repeats."""
        self._reached = max(self._reached, reached)

    def enter(self, kind: str) -> None:
        """Assigns the time from now on to `kind`."""
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Assigns the time of the block to `kind`."""
        before = self._kind
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def enter_step(self, step: int) -> None:
        """Assigns the time from now on to step `step` (1 is the first)."""
        self.enter(self._step_kind(step))

    def _step_kind(self, step: int) -> str:
        return "repeating" if step <= self._reached else "training"

    def end_step(self, step: int, waited: float) -> None:
        """Records the end of a step, and writes the ledger if that is due.

        Args:
            step: number of steps done.
            waited: part of the step in which the devices waited for data [s].

        Raises:
            Fault: the run folder can't be written.
        """
        self._step = step
        self._seconds[self._step_kind(step)] -= waited
        self._seconds["waiting for data"] += waited
        in_bucket = isinstance(self._folder, BucketPath)
        every = WRITE_SECONDS_IN_BUCKET if in_bucket else WRITE_SECONDS
        if time.monotonic() - self._written > every:
            self.write()

    def goodput(self) -> float:
        """Returns the share of the time since the first start in which new steps were trained."""
        self.enter(self._kind)
        sums = sum_sessions(self._sessions())
        return sums["training"] / max(sum(sums.values()), 1e-9)

    def write(self) -> None:
        """Writes the ledger, if it is open.

        Raises:
            Fault: the run folder can't be written.
        """
        if self._folder is None:
            return
        self.enter(self._kind)
        self._written = self._since
        self._check_clock()
        records = []
        for session in self._sessions():
            start = datetime.fromtimestamp(session.start, UTC).isoformat(timespec="milliseconds")
            rounded = {kind: round(seconds, 3) for kind, seconds in session.seconds.items()}
            records.append({"start": start, "step": session.step, "seconds": rounded})
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        try:
            write_file(self._folder / FILE, data)
        except OSError as error:
            raise Fault(f"can't write {self._folder / FILE} ({error})") from error

    def _check_clock(self) -> None:
        """Reports a clock that was set since the last record."""
        before, self._clock_offset = self._clock_offset, time.time() - time.monotonic()
        moved = self._clock_offset - before
        if abs(moved) > CLOCK_SECONDS:
            _report(
                f"the clock of this machine was set {'back' if moved < 0 else 'forward'} by"
                f" {abs(moved):.0f} s: the times in metrics.jsonl follow it, the seconds in {FILE}"
                " do not"
            )

    def close(self) -> None:
        """Writes the ledger for the last time."""
        with contextlib.suppress(Fault):  # must not replace the error that ended the run
            self.write()

    def _sessions(self) -> list[Session]:
        seconds = {kind: s for kind, s in self._seconds.items() if s}
        return [*self._earlier, Session(self._start, self._step, seconds)]


def _report(message: str) -> None:
    # Imported here because it imports JAX, which `llama-jax info` does not need.
    from llama_jax.runtime.console import print_status

    print_status(message)


def read_sessions(folder: AnyPath) -> list[Session]:
    """Returns the sessions of a run; none if it has no ledger."""
    data = read_many(folder, [FILE])[FILE]
    records = [json.loads(line) for line in (data or b"").splitlines()]
    return [
        Session(datetime.fromisoformat(r["start"]).timestamp(), r["step"], r["seconds"])
        for r in records
    ]


def sum_sessions(sessions: Sequence[Session]) -> dict[str, float]:
    """Returns the seconds of each kind, and those between sessions as `DOWN`.

    Their sum is the time from the first start to the last record, unless the clock was set back.
    """
    sums = dict.fromkeys([*KINDS, DOWN], 0.0)
    for i, session in enumerate(sessions):
        for kind, seconds in session.seconds.items():
            sums[kind] += seconds
        if i:
            sums[DOWN] += max(0.0, session.start - sessions[i - 1].end)
    return sums
