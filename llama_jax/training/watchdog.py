"""The watchdog of a run: a step that does not end, or a host that does not answer, ends the run.

JAX's heartbeat comes from a thread of its own, which continues while the main thread hangs.
"""

import contextlib
import faulthandler
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from jax.errors import JaxRuntimeError

from llama_jax.runtime import host_states, hosts
from llama_jax.runtime.storage import AnyPath, write_many
from llama_jax.training.events import record_events
from llama_jax.training.ledger import STEP_KINDS, Ledger

FOLDER = "stacks"
STALLED = 75  # exit code: EX_TEMPFAIL of sysexits.h, a failure that a restart may solve
# A host that doesn't answer is noticed after at most the sum of the first two, which is less than
# half of `hosts.HEARTBEAT_SECONDS`. A thread of a busy machine may not run for many seconds.
ASK_SECONDS, ANSWER_SECONDS = 30.0, 30.0
STEP_SECONDS = 180.0  # no step counts as hung earlier: reads of a bucket are repeated for 120 s
FIRST_STEP_SECONDS = 600.0  # before the median is known: the first steps connect the devices
MEASURED_STEPS = 5  # after so many, the median is known
WRITE_SECONDS = 20.0  # a run folder that can't be reached may be the cause
STACK_BYTES = 1 << 18  # of one host; a message has at most `connection.MESSAGE_BYTES`
STAGES = ("reads the batch of", "dispatches", "waits for its devices in")


class Watchdog:
    """Watches the steps of a run, in a thread.

    Args:
        folder: of the run.
        ledger: of the run, which knows what this host does.
        factor: a step hangs after this multiple of the median time, and `STEP_SECONDS`; 0: never.
        step: number of steps done.
    """

    def __init__(self, folder: AnyPath, ledger: Ledger, factor: float, step: int):
        self._folder, self._ledger, self._factor = folder, ledger, factor
        self._step, self._stage, self._marks = step, 0, 0
        self._durations = deque[float](maxlen=100)
        self._closed = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        if factor:
            host_states.answer(self._state)
            self._thread.start()

    def start_step(self) -> None:
        """Marks that this host asks for the batch of the next step."""
        self._step, self._stage = self._step + 1, 0

    def return_to(self, step: int) -> None:
        """Marks that the run continues after `step` steps."""
        self._step = step
        self._marks += 1

    def end_stage(self) -> None:
        """Marks that this host has the batch of the step, and then that it has dispatched it."""
        self._stage += 1

    def end_step(self, seconds: float) -> None:
        """Marks that the devices have ended a step, which took `seconds`."""
        self._durations.append(seconds)
        self._marks += 1

    @contextlib.contextmanager
    def delaying_gloo_errors(self) -> Iterator[None]:
        """Delays errors of Gloo in the block, so that the watchdog names the host first.

        Collectives of CPUs (Gloo) may fail after 30 s, before a host that is stopped is named.
        Those of other devices wait.
        """
        try:
            yield
        except JaxRuntimeError as error:
            if self._factor and hosts.is_multi_host() and "Gloo" in str(error):
                self._closed.wait(ASK_SECONDS + ANSWER_SECONDS)
            raise

    def close(self) -> None:
        """Ends the watchdog."""
        self._closed.set()
        if self._factor:
            self._thread.join()

    def _limit(self) -> float:
        if len(self._durations) < MEASURED_STEPS:
            return FIRST_STEP_SECONDS
        return max(STEP_SECONDS, self._factor * statistics.median([*self._durations]))

    def _watch(self) -> None:
        marks, elapsed, asked, last = 0, 0.0, 0.0, time.monotonic()
        while not self._closed.wait(0.5):
            now = time.monotonic()
            # A process that was stopped itself, with all others, must not count that time.
            elapsed, last = elapsed + min(now - last, 1.0), now
            if self._marks != marks:
                marks, elapsed, asked = self._marks, 0.0, 0.0
                continue
            if elapsed - asked < ASK_SECONDS:
                continue
            asked = elapsed
            states, silent = host_states.ask_states(ANSWER_SECONDS, self._closed)
            states[hosts.number()] = self._state()
            if self._closed.is_set() or self._marks != marks:
                continue
            if silent:
                self._end(states, silent, _describe_silent(states, silent))
                continue
            in_step = all(state.get("doing") in STEP_KINDS for state in states.values())
            if elapsed > self._limit() and in_step and hosts.is_host_zero():
                self._end(states, silent, _describe_hang(states, elapsed))

    def _state(self) -> dict[str, Any]:
        """Returns where this host is, and the stacks of its threads."""
        frame: Any = sys._current_frames().get(self._main)
        while frame and "llama_jax" not in frame.f_code.co_filename:
            frame = frame.f_back
        at = ""
        if frame:
            name = frame.f_code.co_filename.rpartition("llama_jax")[2]
            at = f"{frame.f_code.co_name} (llama_jax{name}:{frame.f_lineno})"
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read(STACK_BYTES).decode(errors="replace")
        progress = [self._step, min(self._stage, len(STAGES) - 1)]
        return {"progress": progress, "doing": self._ledger.kind, "at": at, "stacks": stacks}

    def _end(self, states: dict[int, Any], silent: list[int], text: str) -> None:
        """Writes the stacks and ends all hosts that can be reached."""
        stacks = {f"host{host}.txt": state["stacks"].encode() for host, state in states.items()}
        message = (
            f"{text}; the stacks of all threads are in {self._folder / FOLDER}; start the run again"
            " with the same command"
        )

        def write() -> None:
            write_many(self._folder / FOLDER, stacks)
            if hosts.is_host_zero():
                record_events(
                    self._folder,
                    [{"step": self._step - 1, "event": "stalled", "hosts": silent, "text": text}],
                )

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)
        if not self._closed.is_set():
            host_states.end(message, STALLED)


def _describe_silent(states: dict[int, Any], silent: list[int]) -> str:
    names = ", ".join(map(hosts.name, silent))
    step = max(state["progress"][0] for state in states.values())
    verb = "does" if len(silent) == 1 else "do"
    return (
        f"{names} {verb} not answer: stopped (SIGSTOP, a frozen machine) or hung outside of Python;"
        f" the other hosts wait in step {step}"
    )


def _describe_hang(states: dict[int, Any], seconds: float) -> str:
    """Returns who waits for whom: the hosts that are behind delay the others."""
    progress = {host: tuple(state["progress"]) for host, state in states.items()}
    step = max(progress.values())[0]
    behind = [host for host in progress if progress[host] == min(progress.values())]
    first = states[behind[0]]
    text = f"no step has ended for {seconds:.0f} s: "
    if len(behind) == len(states) and min(progress.values())[1] == len(STAGES) - 1:
        which = "the host has" if len(states) == 1 else f"all {len(states)} hosts have"
        return text + (
            f"{which} dispatched step {step}, and the devices don't end it: a collective or a"
            f" device hangs ({first['at']})"
        )
    names = ", ".join(map(hosts.name, behind[:10]))
    at_step, stage = progress[behind[0]]
    waiting = len(states) - len(behind)
    others = f", and {waiting} other host(s) wait for it in step {step}" if waiting else ""
    return text + f"{names} {STAGES[stage]} step {at_step}{others}: it is in {first['at']}"
