"""The answers of a model to the requests of an evaluation, saved one by one as they come."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import Fault, InputError

FILE = "answers.jsonl"


def request_key(*request: Any) -> str:
    """Returns the hash of a request (plain JSON), by which its answer is found."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


class Answers:
    """The answers so far, by the key of the request: in memory, and in a file if there is one.

    Each line of `answers.jsonl` is complete when `add` returns, so that a killed evaluation loses
    at most the line that it was writing. The first line contains what the answers depend on.

    Args:
        folder: of the file, created if it is missing; None: no file.
        identity: what the answers depend on besides the requests (plain JSON): the model, dtypes …

    Raises:
        InputError: the file contains the answers of another identity, or is damaged.
        Fault: it can't be written.
    """

    def __init__(self, folder: Path | None = None, identity: Mapping[str, Any] | None = None):
        self._answers: dict[str, Any] = {}
        self._file = None
        if folder is None:
            return
        self._path, own = folder / FILE, json.loads(json.dumps(identity or {}))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = self._path.read_bytes() if self._path.exists() else b""
            # Without the line that a killed process was writing.
            complete = content[: content.rfind(b"\n") + 1]
            self._read(complete.splitlines(), own)
            self._file = open(self._path, "ab")  # noqa: SIM115 (close)
            self._file.truncate(len(complete))
        except OSError as error:
            raise InputError(
                f"can't write results in {folder} ({error.strerror}): choose another --out"
            ) from error
        if not complete:
            self._write(own)

    def _read(self, lines: list[bytes], identity: Mapping[str, Any]) -> None:
        """Reads the answers in the file.

        Raises:
            InputError: they are of another identity, or damaged.
        """
        try:
            found, *pairs = map(json.loads, lines or [json.dumps(identity)])
            self._answers = dict(pairs)
        except ValueError as error:
            raise InputError(f"{self._path} is damaged ({error}): choose another --out") from error
        for name in {**identity, **found}:
            if found.get(name) != identity.get(name):
                raise InputError(
                    f"{self._path.parent} contains results with {name} {found.get(name)}, but this"
                    f" evaluation has {identity.get(name)}: choose another --out"
                )

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, key: str, answer: Any) -> None:
        """Adds an answer (plain JSON).

        Raises:
            Fault: the file can't be written.
        """
        self._answers[key] = answer
        if self._file:
            self._write([key, answer])

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            with contextlib.suppress(OSError):  # `add` has raised it already
                self._file.close()

    def _write(self, value: Any) -> None:
        assert self._file
        try:
            self._file.write(json.dumps(value).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise Fault(
                f"can't write {self._path} ({error.strerror}): fix the cause; the same command then"
                " goes on after the answers that it contains"
            ) from error
