"""The control channel: the step at which all hosts stop, and malformed messages."""

import queue
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from processes import close, connect_threads

from llama_jax.runtime import handshake
from llama_jax.runtime.connection import MESSAGE_BYTES, Connection
from llama_jax.runtime.control_channel import ControlChannel


def test_all_hosts_stop_before_the_same_step():
    rng = random.Random(0)
    for _ in range(10):
        channels = connect_threads(4)
        stopping, request_step = rng.randrange(4), rng.randrange(1, 20)
        sleeps = [random.Random(rng.random()) for _ in channels]
        # Like a device: a step ends when all hosts have dispatched it.
        device = threading.Barrier(4, timeout=60)

        def run(
            i, channels=channels, sleeps=sleeps, device=device, stopping=stopping, at=request_step
        ):
            for step in range(
                100_000
            ):  # the number of steps until the stop depends on the machine's load
                own = "SIGTERM" if i == stopping and step >= at else None
                if reason := channels[i].stop_before(step, own):
                    assert reason.startswith(f"SIGTERM on host {stopping} ")
                    return step
                time.sleep(sleeps[i].uniform(0, 0.002))
                device.wait()
            return None

        with ThreadPoolExecutor(4) as pool:
            stopped = set(pool.map(run, range(4)))
        (step,) = stopped
        assert step >= request_step
        close(channels)


MALFORMED = [
    b"\xff\x00 no JSON", b"", b"null", b"[]", b'["decision"]', b"[" * 100_000, b"9" * 10_000,
    b'["hello","00"]', b'["error",null]', b'["error",["x",256]]', b'["shutdown",["x"]]',
    b'["values",[1]]', b'["which step",1]', b'["step","x"]', b'["stop before",[1]]',
    b'["stop request",3]', b'["report",{}]', b'["ask",1]', b'["state",[1]]',
    b'"' + b"x" * 2 * MESSAGE_BYTES,
]  # fmt: skip
# Only host 0 may send these.
COMMANDS = [b'["decision",1]', b'["shutdown",["x",0]]', b'["stop before",[0,"x"]]']


def test_malformed_messages_change_nothing(capsys):
    channels = connect_threads(2)
    for i, lines in [(1, MALFORMED + COMMANDS), (0, MALFORMED)]:
        (connection,) = channels[i].connections.values()
        for line in lines:
            connection.socket.sendall(line + b"\n")
    channels[0].to_others("decision", "the next")
    assert channels[1].decisions.get(timeout=60) == "the next"
    channels[1].to_coordinator("values", {"loss": 1.5})
    assert channels[0].values[1].get(timeout=60) == {"loss": 1.5}
    channels[1].to_coordinator("report", [7])
    channels[0].to_coordinator("report", [8])
    reports = [channels[0].reports.get(timeout=60) for _ in channels]
    assert sorted(reports) == [(0, [8]), (1, [7])]
    channels[1].describe_state = lambda: {"step": 3}
    channels[0].ask()
    channels[0].to_others("ask", None)
    channels[1].to_coordinator("report", [9])  # after the answers
    assert channels[0].reports.get(timeout=60) == (1, [9])
    assert channels[0].decisions.empty()
    assert [channel.stop_before(0, None) for channel in channels] == [None, None]
    assert all(
        len(c._rest) <= MESSAGE_BYTES + 1 for ch in channels for c in ch.connections.values()
    )
    close(channels)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # one for each host, for 43 messages
    assert all("ignored a malformed message from host" in line for line in lines)


def test_a_message_that_arrives_with_the_start_is_not_lost():
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(socket.create_connection(server.getsockname()))
        host_0 = server.accept()[0]
    with host_0:
        host_0.sendall(b'["start",[["a","b"],1234]]\n["decision","at once"]\n')
        names, _ = handshake._wait_for_start(connection, "host 0", 2)
        channel = ControlChannel(1, names, {0: connection})
        assert channel.decisions.get(timeout=60) == "at once"
        close([channel])


def test_a_bug_in_the_reader_ends_the_run(monkeypatch, capsys):
    channels, exits = connect_threads(2), queue.SimpleQueue()

    def exit_later(message, code):
        exits.put((message, code))
        threading.Event().wait()  # instead of the end of the process

    for channel in channels:
        monkeypatch.setattr(channel, "_exit", exit_later)
    monkeypatch.setattr(channels[0].connections[1], "read", lambda: 1 / 0)
    channels[1].to_coordinator("step", 1)
    expected = f"{channels[0].name(0)}: ZeroDivisionError: division by zero", 1
    assert [exits.get(timeout=60) for _ in channels] == [expected] * 2
    assert "in _read_until_closed" in capsys.readouterr().err
    for channel in channels:
        for connection in channel.connections.values():
            connection.socket.close()


def test_a_decision_larger_than_a_message_arrives_in_one_piece_and_in_order():
    channels = connect_threads(3)
    masks = ["é\\" * MESSAGE_BYTES, "x" * 3 * MESSAGE_BYTES]
    for decision in ("before", masks, "after"):
        channels[0].decide(decision)
    for channel in channels[1:]:
        found = [channel.decisions.get(timeout=60) for _ in range(3)]
        assert found == ["before", masks, "after"]
    close(channels)
