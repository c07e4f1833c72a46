"""Clients that are silent, slow, numerous or send invalid HTTP do not block other clients."""

import json
import os
import resource
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
from fake_engine import COMPLETION, running, serving

from llama_jax.serving import connections

pytest_plugins = ["server_fixtures"]

BODY = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
HEAD = f"POST {COMPLETION} HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
REQUEST = (HEAD % len(BODY)).encode() + BODY
CHUNKED = HEAD.replace("content-length: %d", "transfer-encoding: chunked").encode()
PARTS = {
    "nothing": b"",
    "half a request line": b"GET /v1/mod",
    "half the headers": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-a: b\r\n",
    "half the body": (HEAD % 100).encode() + b"{",
}
TOO_MANY = "there are too many connections: try again later"


def connect(url, sent=b""):
    connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)
    connection.sendall(sent)
    return connection


def receive_all(connection):
    """Returns the bytes that the server sends until it closes the connection."""
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def read_error(connection):
    """Returns status and error of the only response on a connection that the server closes."""
    head, _, body = receive_all(connection).partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


def send_until_closed(connection, part, seconds=0.0):
    """Sends until the server closes."""
    with suppress(ConnectionError):
        while True:
            connection.sendall(part)
            time.sleep(seconds)


def post(url):
    return httpx.post(url + COMPLETION, content=BODY, timeout=20)


@contextmanager
def serving_with_limit(monkeypatch, tokenizer, limit):
    monkeypatch.setattr(connections, "connection_limit", lambda: limit)
    with serving(tokenizer) as (engine, url):
        yield engine, url


@pytest.mark.parametrize("part", PARTS)
def test_waiting_connections_do_not_block_other_clients(monkeypatch, tokenizer, part, caplog):
    with serving_with_limit(monkeypatch, tokenizer, 8) as (_, url), ExitStack() as stack:
        waiting = [stack.enter_context(connect(url, PARTS[part])) for _ in range(40)]
        for _ in range(3):
            assert post(url).status_code == 200
        # The server has closed the oldest ones. A silent one gets no response: it sent no request.
        for connection in waiting[:30]:
            if sent := receive_all(connection):
                assert b"503 Service Unavailable" in sent
                assert TOO_MANY.encode() in sent
        assert "connections are open" in caplog.text
        assert caplog.text.count("closes those that wait longest") == 1


def test_one_more_connection_is_refused_if_all_are_being_answered(monkeypatch, tokenizer):
    with serving_with_limit(monkeypatch, tokenizer, 2) as (engine, url):
        engine.may_generate.clear()
        with connect(url, REQUEST) as first, connect(url, REQUEST) as second:
            while len(engine.requests) < 2:
                time.sleep(0.002)
            refused = post(url)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"] == TOO_MANY
            assert int(refused.headers["retry-after"]) > 0
            engine.may_generate.set()
            assert b"200 OK" in first.recv(100)
            assert b"200 OK" in second.recv(100)
        assert post(url).status_code == 200


def test_the_server_accepts_again_after_file_descriptors_ran_out(tokenizer, caplog):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(tokenizer) as (_, url), ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(url))
        assert post(url).status_code == 200  # so the server has accepted them
        client = stack.enter_context(socket.socket())
        client.settimeout(20)
        highest = max(map(int, os.listdir("/dev/fd")))
        for _ in range(highest):  # so that no lower number is free
            stack.enter_context(open(os.devnull))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, before[1]))
        try:
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            client.sendall(REQUEST)
            assert b"200 OK" in client.recv(100)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "Too many open files" in caplog.text


@pytest.mark.parametrize(("allowed", "limit"), [(100, 3), (10, 1), (2**20, 4096), (-1, 4096)])
def test_the_connection_limit_follows_from_the_file_descriptors(monkeypatch, allowed, limit):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    monkeypatch.setattr(os, "listdir", lambda _: ["0"] * 65)
    assert connections.connection_limit() == limit


class TestTimeLimits:
    def test_a_silent_connection_is_closed(self, monkeypatch, tokenizer):
        monkeypatch.setattr(connections, "IDLE_SECONDS", 0.05)
        with serving(tokenizer) as (_, url):
            with connect(url) as connection:
                assert receive_all(connection) == b""
            # Also while the body of an answered request still arrives slowly.
            head = b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
            with connect(url, head) as connection:
                assert b"404 Not Found" in connection.recv(1000)
                send_until_closed(connection, b"a", 0.01)

    def test_headers_that_arrive_slowly_are_refused(self, monkeypatch, tokenizer):
        monkeypatch.setattr(connections, "_HEADERS_SECONDS", 0.1)
        with serving(tokenizer) as (_, url), connect(url, PARTS["half the headers"]) as connection:
            connection.settimeout(0.01)
            for _ in range(1000):
                connection.sendall(b"x-a: b\r\n")
                try:
                    assert connection.recv(1, socket.MSG_PEEK)
                    break
                except TimeoutError:
                    continue
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(20)
            status, error = read_error(connection)
        assert status == 408
        assert error["message"] == "the headers of the request did not arrive within 0.1 s"

    def test_a_body_that_arrives_slowly_is_refused(self, monkeypatch, tokenizer):
        monkeypatch.setattr("llama_jax.serving.middleware._BODY_SECONDS", 0.1)
        with serving(tokenizer) as (_, url), connect(url, PARTS["half the body"]) as connection:
            status, error = read_error(connection)
        assert (status, error["message"]) == (408, "the body did not arrive within 0.1 s")

    def test_a_client_that_receives_nothing_is_disconnected_and_a_slow_one_is_not(
        self, monkeypatch
    ):
        parts, part, done = 64, b"a" * (1 << 20), threading.Event()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for i in range(parts):
                message = {"type": "http.response.body", "body": part}
                await send(message | {"more_body": i < parts - 1})
            done.set()

        request = b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        with running(app) as url:
            monkeypatch.setattr(connections, "_STALL_SECONDS", 0.1)
            with connect(url, request) as connection:
                assert done.wait(20)
                assert len(receive_all(connection)) < parts * len(part) / 2
            monkeypatch.setattr(connections, "_STALL_SECONDS", 1)
            n = 0
            with connect(url, request) as connection:
                while received_part := connection.recv(len(part), socket.MSG_WAITALL):
                    n += len(received_part)
                    time.sleep(0.025)
        assert n > parts * len(part)


class TestTheClientReadsTheErrorResponse:
    @pytest.mark.parametrize("chunked", [False, True])
    def test_to_a_body_that_is_too_long(self, tokenizer, chunked):
        size = 30_000_000
        sent = (HEAD % size).encode() + b"a" * size
        if chunked:
            sent = CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"a" * size)
        with serving(tokenizer) as (_, url), connect(url, sent) as connection:
            status, error = read_error(connection)
        assert (status, error["message"]) == (413, "the body is longer than 20000 bytes")
        assert error["code"] == "request_too_large"

    def test_unless_it_never_stops_sending(self, monkeypatch, tokenizer):
        for limit, value in [("_LINGER_BYTES", 10_000_000), ("_LINGER_SECONDS", 0.1)]:
            with monkeypatch.context() as patch, serving(tokenizer) as (_, url):
                patch.setattr(connections, limit, value)
                with connect(url, (HEAD % 10**12).encode()) as connection:
                    send_until_closed(connection, b"a" * 100_000)

    @pytest.mark.parametrize(
        ("sent", "status", "reason"),
        [
            (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "illegal request line"),
            (b"GET / HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host: header"),
            (b"GET / HTTP/1.1\r\nhost: a\r\nb\r\n\r\n", 400, "illegal header line"),
            (b"GET / HTTP/1.1\r\nx: " + b"a" * 1_000_000, 431, "Receive buffer too long"),
            (HEAD.replace("%d", "-5").encode() + b"\r\n", 400, "bad Content-Length"),
            (CHUNKED + b"z\r\n", 400, "illegal chunk header"),
        ],
    )
    def test_to_invalid_http(self, served, sent, status, reason):
        with connect(served[1], sent) as connection:
            received_status, error = read_error(connection)
        assert (received_status, error["type"]) == (status, "invalid_request_error")
        assert error["message"].startswith("this is not a valid HTTP request: ")
        assert reason.lower() in error["message"].lower()
