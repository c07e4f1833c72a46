"""SIGTERM on several hosts: on any of them it ends the server, after the running requests."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llama_jax.runtime import hosts

_POLL_SECONDS = 0.2


@contextmanager
def share_sigterm() -> Iterator[None]:
    """In this block, which all hosts enter, SIGTERM on any host ends the server of host 0.

    A scheduler may send the signal to all hosts, or to one. If each host ended at once, running
    requests would not finish.
    """
    if not hosts.is_multi_host():
        yield
    elif hosts.is_host_zero():
        ended = threading.Event()
        # When the server has ended, the watcher may send the signal once more.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        watcher = threading.Thread(target=_watch, args=[ended], name="sigterm", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            signal.signal(signal.SIGTERM, before)
    else:
        before = signal.signal(signal.SIGTERM, lambda *_: hosts.stop_before(0, "SIGTERM"))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _watch(ended: threading.Event) -> None:
    for step in itertools.count():
        # Sent again at each poll: at first the server may not handle the signal yet.
        if hosts.stop_before(step, None):
            os.kill(os.getpid(), signal.SIGTERM)
        if ended.wait(_POLL_SECONDS):
            return
