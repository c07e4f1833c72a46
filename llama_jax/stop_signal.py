"""SIGTERM while a run has nothing to save: as it starts, and after its end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# Python handles a signal when XLA, which compiles for minutes, has returned. So long, the main
# thread may take to clean up; then the process ends without it.
PATIENCE_SECONDS = 3.0


class Stopped(BaseException):
    """SIGTERM came and there was nothing to save; the message says so."""


def _end(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    os._exit(0)


# How a process ends whose main thread is busy. `distributed` ends all hosts of its run instead.
end: Callable[[str], NoReturn] = _end


@contextlib.contextmanager
def stops_at_sigterm(message: str) -> Iterator[None]:
    """Leaves the block when SIGTERM comes, and prints `message`.

    Exit code 0 is right after that. Inside, another handler may take its place for a time.
    """

    def stop(*_: Any) -> None:
        raise Stopped(message)

    over = threading.Event()

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is stop:
                if not over.wait(PATIENCE_SECONDS):
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
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup)
        over.set()
        os.close(write)
        watching.join()
        os.close(read)
