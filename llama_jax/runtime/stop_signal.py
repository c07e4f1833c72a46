"""Handles SIGTERM while a run has nothing to save: before its first step and after its last.

In between, `training/loop.py` records the signal, and `hosts.stop_before` finds the step before
which all hosts save and stop.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# Time for Python code to remove its half-written files after SIGTERM.
CLEANUP_SECONDS = 3.0


class SigtermReceived(BaseException):
    """SIGTERM came and there was nothing to save; the message says so."""


def _exit(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(0)


# Ends this process at SIGTERM. `hosts.join` replaces it by a function that ends all hosts.
exit_run: Callable[[str], NoReturn] = _exit

_raises = False  # in a block of `raise_at_sigterm`


@contextlib.contextmanager
def exit_at_sigterm(message: str) -> Iterator[None]:
    """Prints `message` and ends the process with exit code 0 when SIGTERM comes in the block.

    Another handler may replace this one for a time. A thread ends the process, because Python
    calls a handler only between its own instructions: XLA may compile for minutes, and an
    exception in the middle of an import aborts some modules written in C++.
    """

    handled = False
    raised = False  # by `handle`; when the watcher looks, the block of `_raises` may have ended

    def handle(*_: Any) -> None:
        nonlocal handled, raised
        handled = True
        if _raises and not raised:  # a second signal does not interrupt the cleanup
            raised = True
            raise SigtermReceived(message)

    block_ended, main_thread = threading.Event(), threading.get_ident()

    def cleans_up() -> bool:
        """Whether the block ends in time."""
        end = time.monotonic() + CLEANUP_SECONDS
        while not block_ended.wait(0.1):
            if time.monotonic() > end:
                return False
            if not handled:  # it came just before a system call, which only a new signal interrupts
                signal.pthread_kill(main_thread, signal.SIGTERM)
        return True

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handle:
                if not ((_raises or raised) and cleans_up()):
                    exit_run(message)
                return

    # Python's signal handler in C writes the number of each signal into the pipe at once.
    read, write = os.pipe()
    os.set_blocking(write, False)
    handler = signal.signal(signal.SIGTERM, handle)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True, name="stop-signal")
    watcher.start()
    try:
        yield
    except SigtermReceived as received:
        print(received, file=sys.stderr, flush=True)
    finally:
        block_ended.set()
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(write)
        watcher.join()
        os.close(read)


@contextlib.contextmanager
def raise_at_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise `SigtermReceived` in the block, so that half-written files are removed.

    It has an effect only in a block of `exit_at_sigterm`.
    """
    global _raises
    _raises = True
    try:
        yield
    finally:
        _raises = False
