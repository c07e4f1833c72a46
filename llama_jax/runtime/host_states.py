"""Where the hosts of a run are, also while their main threads hang."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from llama_jax.runtime import hosts
from llama_jax.runtime.control_channel import log


def answer(describe_state: Callable[[], dict[str, Any]]) -> None:
    """Lets this host answer `ask_states` with the result (plain JSON) of a function."""
    if channel := hosts.channel():
        channel.describe_state = describe_state


def ask_states(seconds: float, closed: threading.Event) -> tuple[dict[int, Any], list[int]]:
    """Asks the hosts where they are: host 0 asks all others, another host asks host 0.

    Args:
        seconds: to wait for the answers.
        closed: ends the wait earlier.

    Returns:
        The states by host, and the hosts that did not answer.
    """
    channel = hosts.channel()
    if channel is None:
        return {}, []
    channel.ask()
    deadline = time.monotonic() + seconds
    while len(channel.states) < len(channel.connections) and time.monotonic() < deadline:
        if closed.wait(0.1):
            break
    states = dict(channel.states)
    return states, [host for host in channel.connections if host not in states]


def end(message: str, code: int) -> NoReturn:
    """Ends this process, and on host 0 all others, while their main threads may hang."""
    if channel := hosts.channel():
        channel.end(message, code)
    log(message)
    os._exit(code)
