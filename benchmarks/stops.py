"""Stops one of two hosts of a run with SIGSTOP: the watchdog must name it and end the other.

    python benchmarks/stops.py [--stops 20] [--seed 0]

The hosts are two processes that train a tiny model over the loopback interface, with the times of
`training/watchdog.py`. Each stop comes at a random moment after a random step, and the same command
then resumes the run. A stop counts if the other host ends within the bound with exit code 75, and
its last line names the host that was stopped. At the end SIGTERM ends the run, and the ledger must
add up to its wall time within 1 %. The exit code is 1 if anything is wrong.
"""

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from kill_runs import make_config, make_environment, write_tokens
from kills import Run

from llama_jax.config import yaml_file
from llama_jax.runtime.control_channel import SHUTDOWN_SECONDS
from llama_jax.training import watchdog
from llama_jax.training.ledger import read_sessions, sum_sessions
from llama_jax.training.metrics import read_metrics

# From the last step until the host is named, and until the other processes have ended.
NAMED_SECONDS = watchdog.ASK_SECONDS + watchdog.ANSWER_SECONDS
BOUND = NAMED_SECONDS + SHUTDOWN_SECONDS + 5.0  # polls, stacks, a busy machine


def newest_step(folder: Path) -> int:
    """Returns the newest step in metrics.jsonl; 0 without one."""
    return max((record["step"] for record in read_metrics(folder / "metrics.jsonl")), default=0)


def start(path: Path, folder: Path, environment: dict[str, str], steps: int) -> Run:
    """Starts the run, and waits until it has done some steps."""
    run = Run(path, 2, environment)
    run.wait_until(lambda: "compiled in" in run.errors)  # which is after metrics.jsonl was cut
    first = newest_step(folder)
    run.wait_until(lambda: newest_step(folder) >= first + steps)
    if not run.is_running():
        raise SystemExit(f"the run ended: {run.errors_of(0)}\n{run.errors_of(1)}")
    return run


def stop_host(run: Run, host: int) -> tuple[float, int, str]:
    """Stops a host; returns the seconds until the other ends, its exit code and its errors."""
    other = 1 - host
    run.processes[host].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        code = run.processes[other].wait(2 * BOUND)
    except subprocess.TimeoutExpired:
        code = -1
    seconds = time.monotonic() - stopped
    run.kill([0, 1])
    return seconds, code, run.errors_of(other)


def main() -> int:
    """Prints each stop; returns 1 if a host was not named, or the ledger doesn't add up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, all_seconds, wrong = random.Random(args.seed), list[float](), list[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "run")
        environment = make_environment(Path(temporary))
        write_tokens(Path(temporary, "texts.jsonl"), Path(temporary, "tokens"))
        config = make_config(Path(temporary, "tokens"), folder, 2, 1_000_000, None)
        path = Path(temporary, "run.yaml")
        path.write_text(yaml_file.dump(replace(config, logging=replace(config.logging, every=1))))
        for number in range(1, args.stops + 1):
            run = start(path, folder, environment, rng.randrange(1, 30))
            time.sleep(rng.random())
            host = rng.randrange(2)
            seconds, code, errors = stop_host(run, host)
            line = (errors.splitlines() or [""])[-1]
            all_seconds.append(seconds)
            named = line.startswith(f"llama-jax: host {host} (") and " does not answer: " in line
            right = named and code == watchdog.STALLED and seconds < BOUND
            wrong += [] if right else [f"stop {number}, host {host}, code {code}: {errors}"]
            print("" if right else wrong[-1], end="")
            print(f"stop {number}: host {host}, {seconds:.1f} s, exit code {code}: {line}")
            sys.stdout.flush()
        run = start(path, folder, environment, 1)
        run.processes[0].send_signal(signal.SIGTERM)
        run.wait()
        sessions = read_sessions(folder)
        wall, sums = time.time() - sessions[0].start, sum_sessions(sessions)
        accounted = sum(sums.values())
        if abs(accounted - wall) > 0.01 * wall:
            wrong.append(f"the ledger has {accounted:.1f} s of {wall:.1f} s")
    median, longest = statistics.median(all_seconds), max(all_seconds)
    print(
        f"{args.stops - len(wrong)} of {args.stops} right; until the other host has ended: median"
        f" {median:.1f} s, at most {longest:.1f} s (bound {BOUND:.0f} s)\n"
        f"ledger of {len(sessions)} starts: {accounted:.1f} s of {wall:.1f} s"
    )
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
