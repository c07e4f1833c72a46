"""Functions that corrupt the pickle in a PyTorch file."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corrupt_checkpoint import Rng, choose, files, repickle


class CodePickle:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def code_pickle(rng: Rng, canary: Path) -> bytes:
    text, code = str(canary), f"open({str(canary)!r}, 'w').close()"
    calls = [(os.mkdir, text), (exec, code), (eval, code), (os.system, f"touch {text}")]
    calls += [(os.open, text, os.O_CREAT), (Path.touch, canary), (shutil.copy, os.devnull, text)]
    bad = CodePickle(*choose(rng, calls))
    objects = [bad, {"w": bad}, [bad], {"model": {"w": (bad,)}}, {"a": 1, "b": {"c": bad}}]
    return pickle.dumps(choose(rng, objects), int(rng.integers(6)))


def plant_code(checkpoint: Path, rng: Rng) -> None:
    path = choose(rng, files(checkpoint, ".pth", ".bin"))
    repickle(path, lambda _: code_pickle(rng, checkpoint.parent / "canary"))


def change_pickle(checkpoint: Path, rng: Rng) -> None:
    """Truncates the pickle, inserts an opcode or ends it early; the checksum stays valid."""

    def change(data: bytes) -> bytes:
        at = int(rng.integers(2, len(data)))
        ops = b"cioRbQPq2j0(\x80\x81\x82\x83\x84\x92\x93\x94\x97\x98.lde}]"
        other = bytes([choose(rng, ops)])
        return choose(rng, [data[:at], data[:at] + other + data[at:], data[:at] + other + b"."])

    repickle(choose(rng, files(checkpoint, ".pth", ".bin")), change)
