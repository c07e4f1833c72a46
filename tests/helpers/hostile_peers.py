"""Peers that connect to a port and break every rule of its protocol."""

import contextlib
import itertools
import os
import socket
import threading

OPENINGS = {
    "null": b'["hello",null]\n',
    "one field": b'["hello",[1]]\n',
    "negative": b'["hello",[-1,2,"x"]]\n',
    "deep": b"[" * 100_000 + b"\n",
    "a byte every 3 s": b"[",
    "no end": b'["hello","' + b"x" * 65_536,
    "silent": b"",
    "binary": os.urandom(512) + b"\n",
    "impostor": b'["hello","00"]\n',  # well-formed, but then a false proof
    "web": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}
_CLAIM = b'["join",[1,2,"impostor","' + b"0" * 64 + b'"]]\n'


class HostilePeers:
    """Threads that connect to a port of this machine repeatedly, until the block ends.

    Attributes:
        connections: number of connections so far.
        all_connected: set once each peer has connected, and host 0 has dropped each impostor.
    """

    def __init__(self, port, peers=30):
        self.port = port
        self.connections = 0
        self.all_connected = threading.Event()
        self._peers = peers
        self._connected = set()
        self._ended = threading.Event()
        kinds = itertools.islice(itertools.cycle(OPENINGS), peers)
        self._threads = [
            threading.Thread(target=self._attack, args=peer) for peer in enumerate(kinds)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _attack(self, peer, kind):
        while not self._ended.wait(0.1):
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=0.2) as connection,
            ):
                self.connections += 1
                if kind != "impostor":
                    self._note(peer)
                connection.sendall(OPENINGS[kind])
                self._stay(kind, connection)
                self._note(peer)

    def _note(self, peer):
        self._connected.add(peer)
        if len(self._connected) == self._peers:
            self.all_connected.set()

    def _stay(self, kind, connection):
        """Keeps the connection open until the other end closes it."""
        silences = 0
        while not self._ended.is_set():
            try:
                if kind == "no end":
                    connection.sendall(b"x" * 65_536)
                elif not connection.recv(4096):
                    return
                elif kind == "impostor":
                    connection.sendall(_CLAIM)
            except TimeoutError:
                silences += 1
                if kind == "a byte every 3 s" and silences % 15 == 0:
                    connection.sendall(b"[")
