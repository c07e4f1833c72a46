"""The hosts' connections: who has come, where all stop, who can't be reached."""

import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import free_port

from llama_jax import handshake
from llama_jax.cli import main
from llama_jax.errors import InputError


def gather(processes, **changes):
    """Lets processes that are threads meet; returns a star or an error of each."""
    port = free_port()
    given = [(changes.get(f"n{i}", processes), changes.get(f"i{i}", i)) for i in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        waiting = [pool.submit(handshake.meet, "127.0.0.1", port, n, i, b"") for n, i in given]
        return [w.exception() or w.result()[0] for w in waiting]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n2": 4}, r"host 2 \(.*\) was started with --processes 4, host 0 with 3: start all"),
        ({"i2": 1}, r"two processes say that they are host 1 of 3 .*: number them from 0 to 2"),
    ],
)
def test_hosts_that_count_wrong_are_all_told(monkeypatch, changes, sentence):
    monkeypatch.setattr(handshake, "LATE_SECONDS", 0.5)
    for error in gather(3, **changes):
        with pytest.raises(InputError, match=sentence):
            raise error


def test_all_stop_before_the_same_step_whoever_wants_it_and_when():
    rng = random.Random(0)
    for _ in range(10):
        channels = gather(4)
        wanting, wanted_at = rng.randrange(4), rng.randrange(1, 20)
        sleeps = [random.Random(rng.random()) for _ in channels]
        # Like a device: a step ends when all have handed it over.
        steps = [threading.Barrier(4) for _ in range(60)]

        def run(i, channels=channels, sleeps=sleeps, steps=steps, wanting=wanting, at=wanted_at):
            for step in range(50):
                wish = "SIGTERM" if i == wanting and step >= at else None
                if why := channels[i].stop_before(step, wish):
                    assert why.startswith(f"SIGTERM on host {wanting} ")
                    return step
                time.sleep(sleeps[i].uniform(0, 0.002))
                steps[step].wait(10)
            return None

        with ThreadPoolExecutor(4) as pool:
            stopped = set(pool.map(run, range(4)))
        assert len(stopped) == 1
        assert wanted_at <= stopped.pop() <= wanted_at + 5
        for each in channels:
            each.leaving = True
        for each in channels:
            each.close()


def test_nobody_is_waited_for_for_ever(monkeypatch, capsys):
    monkeypatch.setattr(handshake, "JOIN_SECONDS", 0.5)
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "3", "--process"]
    for process, sentence in [
        ("0", "of 3 hosts 1 have come within 0 s: start also 1, 2, or look why they can't reach"),
        ("1", "can't reach host 0 at 127.0.0.1:"),
    ]:
        assert main(["train", "no.yaml", *flags, process]) == 2
        assert f"llama-jax train: {sentence}" in capsys.readouterr().err


def test_another_program_at_the_port_is_not_taken_for_host_0():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        joining = pool.submit(handshake.meet, "127.0.0.1", port, 2, 1, b"")
        connection = server.accept()[0]
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        with pytest.raises(InputError, match="does not answer as one of this run"):
            joining.result(10)
        connection.close()
