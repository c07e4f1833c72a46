"""Starts several processes of one run on this machine, connected over the loopback interface.

They are forked from a process that has imported JAX and llama_jax, which takes seconds, and has
started no threads.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from object_store import free_port

from llama_jax.runtime import handshake
from llama_jax.training.metrics import read_metrics

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("llama_jax.cli.train", "llama_jax.training.loop", "llama_jax.training.tensorboard"),
        *("matplotlib.figure", "matplotlib.backends.backend_agg", __name__),
    ]
)
gc.set_threshold(100_000, 50, 1000)  # as in conftest.py


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


def _run(program, argv, environment, n_devices, out, err):
    """Runs a program in this process, as `python *program *argv` does."""
    import jax

    from llama_jax.runtime import folder_lock

    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    jax.config.update("jax_num_cpu_devices", n_devices)  # JAX has read its variables
    _store_programs_of_each_process()
    # The next run takes over from a killed one after 2 s without a heartbeat, rather than 20 s.
    folder_lock.BEAT_SECONDS, folder_lock.WATCH_SECONDS = 0.5, 2.0
    option, source = program
    sys.argv = [option, *argv]
    if option == "-m":
        runpy.run_module(source, run_name="__main__", alter_sys=True)
    else:
        exec(compile(source, "program", "exec"), {"__name__": "__main__"})


def _store_programs_of_each_process():
    """Lets all processes write to the compilation cache, of which JAX lets only the first.

    On accelerators all processes have the same programs. On a CPU each has its own, with keys of
    its own, and compiles them anew in each run.
    """
    from jax._src import compiler, distributed

    write = compiler._cache_write

    def write_as_the_first(*args):
        number = distributed.global_state.process_id
        distributed.global_state.process_id = 0
        try:
            write(*args)
        finally:
            distributed.global_state.process_id = number

    compiler._cache_write = write_as_the_first


class Group:
    """Processes of one run, each with an equal share of the simulated devices.

    Args:
        folder: for their outputs.
        processes: how many.
        argv: arguments of all.
        program: arguments of Python that name the program.
        own_arguments: further arguments, one list for each process.
        devices: how many. Collectives are sent over the loopback interface, also those between
            devices of one process: a step takes 0.15 s on 8 devices, and 0.02 s on 2.
    """

    def __init__(
        self,
        folder,
        processes,
        *argv,
        program=("-m", "llama_jax"),
        own_arguments=(),
        devices=8,
    ):
        folder.mkdir()
        self.folder = folder
        self.processes = []
        self.port = free_port()
        for i in range(processes):
            own = own_arguments[i] if own_arguments else ()
            flags = ["--coordinator", f"127.0.0.1:{self.port}"]
            flags += ["--processes", str(processes), "--process", str(i)]
            arguments = [*map(str, argv), *own, *flags]
            outputs = folder / f"out{i}", folder / f"err{i}"
            for path in outputs:
                path.touch()
            process = _context.Process(
                target=_run,
                args=(program, arguments, {**os.environ}, devices // processes, *outputs),
            )
            process.start()
            self.processes.append(process)

    def outputs(self, name):
        """Returns the outputs so far, 'out' or 'err', one of each process."""
        return [(self.folder / f"{name}{i}").read_text() for i in range(len(self.processes))]

    def send_signal(self, process, number):
        os.kill(self.processes[process].pid, number)

    def wait(self, seconds=150):
        """Returns the exit codes. After `seconds`, kills all processes and fails."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            for process in self.processes:
                process.kill()
            pytest.fail(f"still running after {seconds} s: {self.outputs('err')}")
        return codes

    def wait_until_ended(self, process, seconds=60):
        """Waits until one process has ended; the others may run."""
        self.processes[process].join(seconds)

    def wait_for_step(self, run, step):
        self.wait_until(lambda: any(r["step"] >= step for r in read_metrics(run / "metrics.jsonl")))

    def wait_until(self, reached, seconds=120):
        deadline = time.monotonic() + seconds
        while not reached():
            codes = [process.exitcode for process in self.processes]
            if any(code is not None for code in codes) or time.monotonic() > deadline:
                self.wait(0)
                pytest.fail(f"{codes}: {self.outputs('err')}")
            time.sleep(0.01)
