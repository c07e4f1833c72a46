"""Hosts connect to host 0, count each other, and authenticate."""

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hostile_peers import HostilePeers
from processes import close, connect_threads, free_port

from llama_jax.cli.main import main
from llama_jax.errors import InputError
from llama_jax.runtime import handshake


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n2": 4}, r"host 2 \(.*\) was started with --processes 4, host 0 with 3: start all"),
        ({"i2": 1}, r"two processes are both started as host 1 of 3 .*: number them from 0 to 2"),
    ],
)
def test_all_hosts_get_the_message_about_a_wrong_number(monkeypatch, changes, message):
    monkeypatch.setattr(handshake, "GRACE_SECONDS", 0.5)
    for error in connect_threads(3, **changes):
        with pytest.raises(InputError, match=message):
            raise error


def test_no_host_waits_forever(monkeypatch, capsys):
    monkeypatch.setattr(handshake, "JOIN_SECONDS", 0.5)
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "3", "--process"]
    for process, message in [
        ("0", "only 1 of 3 hosts joined within 0 s: start 1, 2 too, or check why they can't reach"),
        ("1", "can't reach host 0 at 127.0.0.1:"),
    ]:
        assert main(["train", "no.yaml", *flags, process]) == 2
        assert f"llama-jax train: {message}" in capsys.readouterr().err


def test_hosts_wait_until_jax_listens_on_host_0(monkeypatch):
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handshake.wait_until_reachable, "127.0.0.1", port)
        time.sleep(0.3)
        assert not waiting.done()
        with socket.create_server(("127.0.0.1", port)):
            waiting.result(10)
    monkeypatch.setattr(handshake, "JOIN_SECONDS", 0.2)
    with pytest.raises(InputError, match=rf"can't reach host 0 at 127.0.0.1:{port} .*all ports"):
        handshake.wait_until_reachable("127.0.0.1", port)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b'["challenge",[1]]\n', b"["])
def test_another_program_on_the_port_is_not_mistaken_for_host_0(monkeypatch, answer):
    monkeypatch.setattr(handshake, "JOIN_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        joining = pool.submit(handshake.connect_hosts, "127.0.0.1", port, 2, 1, b"")
        connection = server.accept()[0]
        connection.sendall(answer)
        with pytest.raises(InputError, match="does not answer as host 0 of this run"):
            joining.result(10)
        connection.close()


def test_thirty_hostile_peers_delay_no_join(capsys):
    with ThreadPoolExecutor(1) as pool:
        port = free_port()
        first = pool.submit(handshake.connect_hosts, "127.0.0.1", port, 2, 0, b"secret")
        with HostilePeers(port, 30) as peers:
            assert peers.all_connected.wait(60)
            start = time.monotonic()
            second = handshake.connect_hosts("127.0.0.1", port, 2, 1, b"secret")[0]
            host_0 = first.result(60)[0]
            assert time.monotonic() - start < 2  # 0.01 to 0.1 s on an idle machine
            assert host_0.names == second.names == [socket.gethostname()] * 2
            # While the peers continue, both hosts receive each other's messages.
            host_0.to_others("decision", "continue")
            assert second.decisions.get(timeout=60) == "continue"
            second.to_coordinator("values", {"step": 1})
            assert host_0.values[1].get(timeout=60) == {"step": 1}
            close([host_0, second])
    dropped = f"llama-jax: dropped a connection from 127.0.0.1 to port {port}, which "
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) <= 2  # one of each kind, of hundreds of connections
    assert all(line.startswith(dropped) for line in lines)
    assert any("knows the protocol but not the job token" in line for line in lines)


def test_a_connection_has_one_deadline_however_it_sends(monkeypatch):
    monkeypatch.setattr(handshake, "PROOF_SECONDS", 0.3)
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(handshake.connect_hosts, "127.0.0.1", port, 2, 0, b"")
        handshake._connect("127.0.0.1", port, time.monotonic() + 60).socket.close()
        with socket.create_connection(("127.0.0.1", port), timeout=0.05) as slow:
            received, start = None, time.monotonic()
            while received is None:  # one byte each 0.05 s
                with contextlib.suppress(TimeoutError):
                    slow.sendall(b"[")
                    received = slow.recv(1)
                assert time.monotonic() - start < 60
            assert received == b""
        close([handshake.connect_hosts("127.0.0.1", port, 2, 1, b"")[0], first.result(60)[0]])


def test_silent_connections_do_not_keep_hosts_out(monkeypatch):
    monkeypatch.setattr(handshake, "SPARE_CANDIDATES", 4)
    port = free_port()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        first = pool.submit(handshake.connect_hosts, "127.0.0.1", port, 2, 0, b"")
        silent = []
        for _ in range(20):
            connection = handshake._connect("127.0.0.1", port, time.monotonic() + 60).socket
            silent.append(stack.enter_context(connection))
        for connection in silent[:14]:  # all but the newest 4 + 2
            connection.settimeout(60)
            assert connection.recv(1) == b""
        close([handshake.connect_hosts("127.0.0.1", port, 2, 1, b"")[0], first.result(60)[0]])


def test_a_host_of_another_run_gets_an_error_and_the_run_continues(capsys):
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(handshake.connect_hosts, "127.0.0.1", port, 2, 0, b"one token")
        with pytest.raises(InputError, match="belongs to another run, or has another job token"):
            handshake.connect_hosts("127.0.0.1", port, 2, 1, b"another token")
        close(
            [handshake.connect_hosts("127.0.0.1", port, 2, 1, b"one token")[0], first.result(60)[0]]
        )
    assert "which knows the protocol but not the job token; the next" in capsys.readouterr().err


def test_a_host_that_exited_while_it_waited_may_join_again(monkeypatch):
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(handshake.connect_hosts, "127.0.0.1", port, 3, 0, b"")]
        closed = handshake._connect("127.0.0.1", port, time.monotonic() + 60)
        assert handshake._authenticate(closed, "host 0", 3, 1, b"", time.monotonic() + 60)
        closed.socket.close()
        waiting += [
            pool.submit(handshake.connect_hosts, "127.0.0.1", port, 3, i, b"") for i in (1,)
        ]
        last = handshake.connect_hosts("127.0.0.1", port, 3, 2, b"")[0]
        close([*(w.result(60)[0] for w in waiting), last])
