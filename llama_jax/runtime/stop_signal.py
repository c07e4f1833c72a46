"""SIGTERM while a run has nothing to save: as it starts, and after its end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# So long, work in Python may take to remove what it has half-written.
UNWINDING_SECONDS = 3.0


class Stopped(BaseException):
    """SIGTERM came and there was nothing to save; the message says so."""


def _end(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(0)


# How this process ends at SIGTERM. `hosts` ends all hosts of its run instead.
end: Callable[[str], NoReturn] = _end

_unwinds = False


@contextlib.contextmanager
def stops_at_sigterm(message: str) -> Iterator[None]:
    """Ends the process with exit code 0 when SIGTERM comes in the block, and prints `message`.

    Another handler may take its place for a time. A thread ends the process, because Python calls
    a handler only between its own instructions: XLA may compile for minutes, and an exception in
    the midst of an import aborts some modules written in C++.
    """

    def stop(*_: Any) -> None:
        if _unwinds:
            raise Stopped(message)

    over = threading.Event()

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is stop:
                if not (_unwinds and over.wait(UNWINDING_SECONDS)):
                    end(message)
                return

    # The signals' own handler, in C, writes the number of each into the pipe at once.
    read, write = os.pipe()
    os.set_blocking(write, False)
    handler = signal.signal(signal.SIGTERM, stop)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watching = threading.Thread(target=watch, daemon=True, name="stop-signal")
    watching.start()
    try:
        yield
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
    finally:
        over.set()
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(write)
        watching.join()
        os.close(read)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Lets SIGTERM raise `Stopped` in the block, so that what is half-written is removed."""
    global _unwinds
    _unwinds = True
    try:
        yield
    finally:
        _unwinds = False
