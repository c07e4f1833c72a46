"""Hosts find host 0, count each other, and prove that they belong to the run."""

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hostile_peers import HostilePeers
from processes import close, free_port, gather

from llama_jax.cli.main import main
from llama_jax.errors import InputError
from llama_jax.runtime import handshake


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n2": 4}, r"host 2 \(.*\) was started with --processes 4, host 0 with 3: start all"),
        ({"i2": 1}, r"two processes say that they are host 1 of 3 .*: number them from 0 to 2"),
    ],
)
def test_hosts_that_count_wrong_all_get_the_sentence(monkeypatch, changes, sentence):
    monkeypatch.setattr(handshake, "LATE_SECONDS", 0.5)
    for error in gather(3, **changes):
        with pytest.raises(InputError, match=sentence):
            raise error


def test_no_host_waits_for_ever(monkeypatch, capsys):
    monkeypatch.setattr(handshake, "JOIN_SECONDS", 0.5)
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "3", "--process"]
    for process, sentence in [
        ("0", "of 3 hosts 1 have come within 0 s: start also 1, 2, or look why they can't reach"),
        ("1", "can't reach host 0 at 127.0.0.1:"),
    ]:
        assert main(["train", "no.yaml", *flags, process]) == 2
        assert f"llama-jax train: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b'["challenge",[1]]\n', b"["])
def test_another_program_at_the_port_is_not_taken_for_host_0(monkeypatch, answer):
    monkeypatch.setattr(handshake, "JOIN_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        joining = pool.submit(handshake.meet, "127.0.0.1", port, 2, 1, b"")
        connection = server.accept()[0]
        connection.sendall(answer)
        with pytest.raises(InputError, match="does not answer as one of this run"):
            joining.result(10)
        connection.close()


def test_thirty_hostile_peers_delay_no_join(capsys):
    with ThreadPoolExecutor(1) as pool:
        port = free_port()
        first = pool.submit(handshake.meet, "127.0.0.1", port, 2, 0, b"secret")
        with HostilePeers(port, 30) as peers:
            assert peers.all_connected.wait(60)
            begun = time.monotonic()
            second = handshake.meet("127.0.0.1", port, 2, 1, b"secret")[0]
            host_0 = first.result(60)[0]
            assert time.monotonic() - begun < 2  # 0.01 to 0.1 s on an idle machine
            assert host_0.names == second.names == [socket.gethostname()] * 2
            # The peers go on. Both hosts hear each other.
            host_0.to_others("decision", "go on")
            assert second.decisions.get(timeout=60) == "go on"
            second.to_coordinator("values", {"step": 1})
            assert host_0.values[1].get(timeout=60) == {"step": 1}
            close([host_0, second])
    dropped = f"llama-jax: dropped a connection from 127.0.0.1 to port {port}, which "
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) <= 2  # one of each kind, of hundreds
    assert all(line.startswith(dropped) for line in lines)
    assert any("knows the protocol but not the job token" in line for line in lines)


def test_a_connection_has_a_deadline_in_all(monkeypatch):
    monkeypatch.setattr(handshake, "GREETING_SECONDS", 0.3)
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(handshake.meet, "127.0.0.1", port, 2, 0, b"")
        handshake._connect("127.0.0.1", port, time.monotonic() + 60).socket.close()
        with socket.create_connection(("127.0.0.1", port), timeout=0.05) as slow:
            received, begun = None, time.monotonic()
            while received is None:  # a byte each 0.05 s
                with contextlib.suppress(TimeoutError):
                    slow.sendall(b"[")
                    received = slow.recv(1)
                assert time.monotonic() - begun < 60
            assert received == b""
        close([handshake.meet("127.0.0.1", port, 2, 1, b"")[0], first.result(60)[0]])


def test_silent_connections_take_no_place_from_hosts(monkeypatch):
    monkeypatch.setattr(handshake, "STRANGERS", 4)
    port = free_port()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        first = pool.submit(handshake.meet, "127.0.0.1", port, 2, 0, b"")
        silent = []
        for _ in range(20):
            connection = handshake._connect("127.0.0.1", port, time.monotonic() + 60).socket
            silent.append(stack.enter_context(connection))
        for connection in silent[:14]:  # all but the newest 4 + 2
            connection.settimeout(60)
            assert connection.recv(1) == b""
        close([handshake.meet("127.0.0.1", port, 2, 1, b"")[0], first.result(60)[0]])


def test_a_host_of_another_run_is_told_and_the_run_goes_on(capsys):
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(handshake.meet, "127.0.0.1", port, 2, 0, b"one token")
        with pytest.raises(InputError, match="belongs to another run, or has another job token"):
            handshake.meet("127.0.0.1", port, 2, 1, b"another token")
        close([handshake.meet("127.0.0.1", port, 2, 1, b"one token")[0], first.result(60)[0]])
    assert "which knows the protocol but not the job token; the next" in capsys.readouterr().err


def test_a_host_that_ended_while_it_waited_may_come_again(monkeypatch):
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(handshake.meet, "127.0.0.1", port, 3, 0, b"")]
        gone = handshake._connect("127.0.0.1", port, time.monotonic() + 60)
        assert handshake._greet(gone, "host 0", 3, 1, b"", time.monotonic() + 60)
        gone.socket.close()
        waiting += [pool.submit(handshake.meet, "127.0.0.1", port, 3, i, b"") for i in (1,)]
        last = handshake.meet("127.0.0.1", port, 3, 2, b"")[0]
        close([*(w.result(60)[0] for w in waiting), last])
