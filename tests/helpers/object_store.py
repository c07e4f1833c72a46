"""Object stores on the loopback interface, for tests: S3 (moto) and Google's (its emulator).

A proxy between the program and the store injects faults: it adds latency, refuses requests with 429
and 503, drops connections, sends bodies slowly and leaves requests without an answer.
"""

import contextlib
import http.client
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

from llama_jax.runtime import bucket_path

BUCKET = "test-bucket"
_COMMANDS = {
    "s3": [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}"],
    "gs": [
        sys.executable, "-c",
        "from gcp_storage_emulator.server import create_server;"
        "create_server('127.0.0.1', {port}, in_memory=True).run()",
    ],
}  # fmt: skip


@dataclass
class Faults:
    """What the proxy does to requests. Shares are in [0 … 1].

    Attributes:
        latency: delay before each response [s].
        refused: share of the requests that get 429 or 503.
        dropped: share of the requests whose connection closes in the middle of the response.
        slow: share of the responses whose body takes a second.
        stalled: share of the requests that get no answer, on a connection that stays open.
        requests: method and path of each request so far.
    """

    latency: float = 0.0
    refused: float = 0.0
    dropped: float = 0.0
    slow: float = 0.0
    stalled: float = 0.0
    requests: list[tuple[str, str]] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(0))


@dataclass
class Store:
    """A running store: its scheme, the environment that a client needs, and its faults."""

    scheme: str
    environment: dict[str, str]
    faults: Faults

    def url(self, name: str) -> str:
        return f"{self.scheme}://{BUCKET}/{name}"


def free_port() -> int:
    """Returns a port on which nobody listens."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _complete_headers(answer: http.client.HTTPResponse) -> dict[str, str]:
    """Returns the headers that Google's store sends and its emulator leaves out."""
    named = answer.getheader("x-goog-generation") or answer.getheader("ETag")
    return {} if named else {"x-goog-generation": "1"}


def _proxy(port: int, faults: Faults) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each body waits 40 ms for the headers' ACK

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _handle(self) -> None:
            body = self._body()
            faults.requests.append((self.command, self.path))
            time.sleep(faults.latency)
            if faults.draw.random() < faults.stalled:
                self.rfile.read(1)  # until the client closes the connection
                self.close_connection = True
                return
            if faults.draw.random() < faults.refused:
                self.send_response(faults.draw.choice((429, 503)))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
            headers["Content-Length"] = str(len(body))
            path = self.path
            if self.command == "GET":  # no reader here replaces an object that it reads
                path = re.sub(r"ifGeneration(Not)?Match=\d+", "", path)
            upstream.request(self.command, path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            status, ours = answer.status, _complete_headers(answer)
            end = re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range", ""))
            if end and status == 200:  # Google's emulator ignores the range of an object's end
                first = max(0, len(data) - int(end[1]))
                ours["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                status, data = 206, data[first:]
            self.send_response(status)
            for name, value in ours.items():
                self.send_header(name, value)
            dropped = {"transfer-encoding", "content-length", "connection", "date", "server"}
            for name, value in answer.getheaders():
                if name.lower() not in dropped:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            if faults.draw.random() < faults.dropped:
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if faults.draw.random() < faults.slow:
                half = len(data) // 2
                self.wfile.write(data[:half])
                time.sleep(1)
                data = data[half:]
            self.wfile.write(data)

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _handle

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def running_store(scheme: str) -> Iterator[Store]:
    """Runs a store with one empty bucket, behind the proxy."""
    port = free_port()
    command = [word.format(port=port) for word in _COMMANDS[scheme]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _create_bucket(scheme, port)
        faults = Faults()
        proxy = _proxy(port, faults)
        endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
        environment = {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
        } if scheme == "s3" else {
            "TENSORSTORE_GCS_HTTP_URL": endpoint, "STORAGE_EMULATOR_HOST": endpoint,
            "GCE_METADATA_ROOT": "127.0.0.1:1",
        }  # fmt: skip
        yield Store(scheme, environment, faults)
        proxy.shutdown()
        proxy.server_close()  # a client that still has the address is refused at once
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def store_of_this_process(scheme: str) -> Iterator[Store]:
    """Runs a store as `running_store` does; the clients of this process use it meanwhile."""
    with running_store(scheme) as store, mock.patch.dict(os.environ, store.environment):
        _forget_clients()
        yield store
    _forget_clients()


def _forget_clients() -> None:
    """Clears the caches of clients, which have the address of the store from their start."""
    bucket_path.open_bucket.cache_clear()
    with contextlib.suppress(ImportError):
        import fsspec

        for scheme in _COMMANDS:
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


def _create_bucket(scheme: str, port: int) -> None:
    url, method, body = f"http://127.0.0.1:{port}/{BUCKET}", "PUT", None
    if scheme == "gs":
        url = f"http://127.0.0.1:{port}/storage/v1/b?project=test"
        method, body = "POST", f'{{"name": "{BUCKET}"}}'.encode()
    headers = {"Content-Type": "application/json"} if body else {}
    request = urllib.request.Request(url, data=body, method=method, headers=headers)
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10):
                return
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
