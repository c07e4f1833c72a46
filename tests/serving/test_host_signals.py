import signal
import time

from llama_jax.runtime import hosts
from llama_jax.serving.host_signals import share_sigterm


def test_a_signal_after_the_end_of_the_server_does_not_end_the_hosts(monkeypatch):
    """It ended them with a message on each, if it came between the server's end and the block's."""
    for name, result in (
        ("is_multi_host", True),
        ("is_host_zero", True),
        ("stop_before", "SIGTERM"),
    ):
        monkeypatch.setattr(hosts, name, lambda *_, result=result: result)
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))
    try:
        with share_sigterm():
            time.sleep(0.1)  # the server has ended, and its handlers are restored
        assert received == []
        signal.raise_signal(signal.SIGTERM)
        assert received == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGTERM, before)
