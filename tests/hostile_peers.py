"""Peers that connect to a port and break every rule of the control channel."""

import contextlib
import itertools
import json
import os
import socket
import threading

IMPOSTOR = json.dumps(["hello", [1, 2, "impostor"]]).encode() + b"\n"
OPENINGS = {
    "null": b'["hello",null]\n',
    "one field": b'["hello",[1]]\n',
    "negative": b'["hello",[-1,2,"x"]]\n',
    "deep": b"[" * 100_000 + b"\n",
    "a byte every 3 s": b"[",
    "no end": b'["hello","' + b"x" * 65_536,
    "silent": b"",
    "binary": os.urandom(512) + b"\n",
    "impostor": IMPOSTOR,
    "web": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


class HostilePeers:
    """Threads that connect to a port of this machine again and again, until the block ends.

    Attributes:
        connected: how often a connection came about.
    """

    def __init__(self, port, peers=30):
        self.port = port
        self.connected = 0
        self._over = threading.Event()
        kinds = itertools.islice(itertools.cycle(OPENINGS), peers)
        self._threads = [threading.Thread(target=self._attack, args=(kind,)) for kind in kinds]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _attack(self, kind):
        while not self._over.wait(0.01):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=0.2) as connection,
            ):
                self.connected += 1
                connection.sendall(OPENINGS[kind])
                self._stay(kind, connection)

    def _stay(self, kind, connection):
        """Holds the connection until the other end closes it."""
        sent = 0
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                if kind == "no end":
                    connection.sendall(b"x" * 65_536)
                elif not connection.recv(4096):
                    return
                sent += 1
                if kind == "a byte every 3 s" and sent % 15 == 0:
                    connection.sendall(b"[")
