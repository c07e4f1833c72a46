"""Where each host spends the time of a step, and which host delays the others."""

import statistics
import time
from collections import defaultdict
from typing import Any

from llama_jax.runtime import hosts
from llama_jax.runtime.console import print_status
from llama_jax.runtime.storage import AnyPath
from llama_jax.training.events import record_events

GATHER_STEPS = 10  # steps over which a host's times are summed, and between two reports
# A host delays the others if it works longer than they do by more than DELAY_SHARE of a step, and
# waits for its own devices in less than SLACK_SHARE: the step would be shorter without it.
DELAY_SHARE, SLACK_SHARE = 0.1, 0.1
PARTS = ("data", "dispatch", "other")  # what a host does in a step, besides waiting for its devices


class HostTimes:
    """Measures what this host does in each step; on host 0, compares the hosts.

    Every `GATHER_STEPS` steps each host sends its sums to host 0 over the control channel. Neither
    a host nor a device waits for that.

    The devices of all hosts wait for each other in every step, so a step takes equally long on all
    hosts. The host that delays it is the one that does not wait for its devices.

    Args:
        folder: of the run, for events.jsonl.

    Attributes:
        metrics: the host that spends the most time besides waiting for its devices, and how much
            longer than the others [s per step]; empty before the first comparison.
    """

    def __init__(self, folder: AnyPath):
        self._folder = folder
        self._seconds = dict.fromkeys([*PARTS, "device"], 0.0)
        self._steps = -1  # of these sums, without the first step, which also connects the devices
        self._mark = time.monotonic(), time.thread_time()
        self._reports = defaultdict[int, dict[int, list[float]]](dict)  # by step, by host
        self.metrics: dict[str, float | int] = {}
        self._slow: int | None = None  # the host that delayed the others when it was last reported

    def start_step(self) -> None:
        """Marks the time at which the host asks for the batch of a step."""
        self._mark = time.monotonic(), time.thread_time()

    def end_part(self, part: str) -> None:
        """Adds the time since the last mark to `part` or 'device'.

        A dispatch may wait until the devices have ended an earlier step: only the time that this
        thread computes counts as 'dispatch', the rest as 'device'.
        """
        wall, computed = self._mark
        self._mark = time.monotonic(), time.thread_time()
        seconds = self._mark[0] - wall
        if part == "dispatch":
            waited = max(0.0, seconds - (self._mark[1] - computed))
            self._seconds["device"] += waited
            seconds -= waited
        self._seconds[part] += seconds

    def gather(self, step: int) -> None:
        """Sends this host's times after `step` (1 is the first) if that is due.

        Host 0 compares the times that have arrived, and updates `metrics`.
        """
        if not hosts.is_multi_host():
            return
        self._steps += 1
        if self._steps and step % GATHER_STEPS == 0:
            hosts.send_report([step, *(total / self._steps for total in self._seconds.values())])
            self._steps = 0
        if self._steps == 0:
            self._seconds = dict.fromkeys(self._seconds, 0.0)
        for host, report in hosts.take_reports():
            match report:
                case [int(ended), *seconds] if len(seconds) == len(PARTS) + 1:
                    self._reports[ended][host] = seconds
        for ended in sorted(self._reports):
            if len(self._reports[ended]) == hosts.count():
                self._compare(ended, self._reports.pop(ended))

    def _compare(self, step: int, seconds: dict[int, list[float]]) -> None:
        """Finds the slowest host, and reports it if it delays the others.

        Args:
            step: the last one of the means.
            seconds: of each host: mean of each of `PARTS`, and of waiting for its devices [s].
        """
        own = {host: sum(parts[:-1]) for host, parts in seconds.items()}
        slowest = max(own, key=lambda host: own[host])
        others = [
            statistics.median(values)
            for values in zip(*(s for h, s in seconds.items() if h != slowest), strict=True)
        ]
        lag = own[slowest] - sum(others[:-1])
        period = own[slowest] + seconds[slowest][-1]
        delays = lag > DELAY_SHARE * period and seconds[slowest][-1] < SLACK_SHARE * period
        if delays and self._slow != slowest:
            parts = ", ".join(
                f"{part} {mine:.3f} s (others {theirs:.3f} s)"
                for part, mine, theirs in zip(PARTS, seconds[slowest], others, strict=False)
            )
            self._record(
                step,
                "slow host",
                f"{hosts.name(slowest)} delays each step by about {lag:.3f} s of {period:.3f} s:"
                f" {parts}",
                {"host": slowest, "seconds": round(lag, 3)},
            )
        elif not delays and self._slow is not None:
            text = f"{hosts.name(self._slow)} no longer delays the steps"
            self._record(step, "slow host recovered", text, {"host": self._slow})
        self._slow = slowest if delays else None
        self.metrics = {"slowest_host": slowest, "host_lag": lag}

    def _record(self, step: int, event: str, text: str, fields: dict[str, Any]) -> None:
        print_status(f"step {step}: {text}")
        record_events(self._folder, [{"step": step, "event": event, **fields, "text": text}])
