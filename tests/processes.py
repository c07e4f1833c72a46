"""Real processes that train as one, over the loopback."""

import os
import socket
import subprocess
import sys
import time

import pytest

from llama_jax.training.metrics import read_metrics


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Group:
    """Processes that train together, each with an equal part of 8 simulated devices."""

    def __init__(self, folder, processes, *argv, program=("-m", "llama_jax"), apart=()):
        folder.mkdir()
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(8 // processes)}
        self.folder = folder
        self.processes = []
        port = free_port()
        for i in range(processes):
            own = apart[i] if apart else ()
            flags = ["--coordinator", f"127.0.0.1:{port}"]
            flags += ["--processes", str(processes), "--process", str(i)]
            with open(folder / f"out{i}", "w") as out, open(folder / f"err{i}", "w") as err:
                command = [sys.executable, *program, *map(str, argv), *own, *flags]
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=err)
                )

    def said(self, name):
        return [(self.folder / f"{name}{i}").read_text() for i in range(len(self.processes))]

    def wait(self, seconds=150):
        """Returns the exit codes; kills what still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            pytest.fail(f"still running after {seconds} s: {self.said('err')}")

    def wait_for_step(self, run, step):
        self.wait_until(lambda: any(r["step"] >= step for r in read_metrics(run / "metrics.jsonl")))

    def wait_until(self, reached):
        deadline = time.monotonic() + 120
        while not reached():
            codes = [process.poll() for process in self.processes]
            if any(code is not None for code in codes) or time.monotonic() > deadline:
                self.wait(0)
                pytest.fail(f"{codes}: {self.said('err')}")
            time.sleep(0.01)
