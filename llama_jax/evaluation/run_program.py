"""Runs a Python program that a model wrote: without network, without writing files, with limits.

The program runs in its own process. A seccomp filter, which the kernel applies to all its threads,
refuses: sockets and io_uring; opening a file for writing; creating, renaming, removing or changing
one; new processes and programs; signals to, or access to the memory of, any process. CPU time,
memory and wall time are limited, and no file descriptor is inherited. The program can still
compute, and read the files that the user can read, which it can send nowhere. Needs Linux on
x86-64.
"""

import subprocess
import sys
from pathlib import Path

from llama_jax.errors import InputError
from llama_jax.evaluation.program_sandbox import NO_FILTER, PASSED

_WALL_SECONDS = 15


def passes(program: str) -> bool:
    """Returns whether a program ends without an exception, within its limits.

    Raises:
        InputError: this machine can't isolate a process.
    """
    sandbox = Path(__file__).with_name("program_sandbox.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", str(sandbox)],
            input=program.encode(errors="replace"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,  # no terminal
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode == NO_FILTER:
        raise InputError(
            "--run-code: this machine can't run programs without network: use Linux on x86-64 with"
            " seccomp, or leave out the tasks that run code"
        )
    return done.returncode == 0 and done.stdout == PASSED
