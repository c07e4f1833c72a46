"""Starts several processes of one run on this machine, connected over the loopback interface."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama_jax.runtime import handshake
from llama_jax.training.metrics import read_metrics


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def connect_threads(processes, **changes):
    """Connects threads as hosts; returns a control channel or an error of each.

    `changes` are wrong numbers: n2 is host 2's number of hosts, i2 its own number.
    """
    port = free_port()

    def connect(i):
        counts = changes.get(f"n{i}", processes), changes.get(f"i{i}", i)
        return handshake.connect_hosts("127.0.0.1", port, *counts, b"")[0]

    with ThreadPoolExecutor(processes) as pool:
        waiting = [pool.submit(connect, i) for i in range(processes)]
        return [w.exception() or w.result() for w in waiting]


def close(channels):
    """Closes the connections of hosts that are threads."""
    for channel in channels:
        channel.leaving = True
    for channel in channels:
        channel.close()


class Group:
    """Processes of one run, each with an equal share of 8 simulated devices.

    Args:
        folder: for their outputs.
        processes: how many.
        argv: arguments of all.
        program: arguments of Python that name the program.
        own_arguments: further arguments, one list for each process.
    """

    def __init__(self, folder, processes, *argv, program=("-m", "llama_jax"), own_arguments=()):
        folder.mkdir()
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(8 // processes)}
        self.folder = folder
        self.processes = []
        self.port = free_port()
        for i in range(processes):
            own = own_arguments[i] if own_arguments else ()
            flags = ["--coordinator", f"127.0.0.1:{self.port}"]
            flags += ["--processes", str(processes), "--process", str(i)]
            with open(folder / f"out{i}", "w") as out, open(folder / f"err{i}", "w") as err:
                command = [sys.executable, *program, *map(str, argv), *own, *flags]
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=err)
                )

    def outputs(self, name):
        """Returns the outputs so far, 'out' or 'err', one of each process."""
        return [(self.folder / f"{name}{i}").read_text() for i in range(len(self.processes))]

    def wait(self, seconds=150):
        """Returns the exit codes. After `seconds`, kills all processes and fails."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            pytest.fail(f"still running after {seconds} s: {self.outputs('err')}")

    def wait_for_step(self, run, step):
        self.wait_until(lambda: any(r["step"] >= step for r in read_metrics(run / "metrics.jsonl")))

    def wait_until(self, reached):
        deadline = time.monotonic() + 120
        while not reached():
            codes = [process.poll() for process in self.processes]
            if any(code is not None for code in codes) or time.monotonic() > deadline:
                self.wait(0)
                pytest.fail(f"{codes}: {self.outputs('err')}")
            time.sleep(0.01)
