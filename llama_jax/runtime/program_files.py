"""The files of stored programs: which one a program has, reading and writing them.

An entry is a pickle, which may execute anything: entries are read only from a folder that nobody
else can write to, and nothing from a checkpoint gets into them.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

from llama_jax.errors import Fault, InputError
from llama_jax.runtime.atomic_write import replace_file
from llama_jax.runtime.private_folder import open_private_folder, read_private

_MAX_BYTES = 4 << 30  # of all entries; the ones that were not used for longest are removed
_DIGEST = hashlib.sha256().digest_size


class ProgramFiles:
    """A folder of programs of this machine, this version and these settings.

    Args:
        folder: created if it is missing.

    Raises:
        OSError: others could change the folder, or it can't be created.
    """

    def __init__(self, folder: Path):
        self._folder, self._environment = open_private_folder(folder), _environment()

    def name(self, function: str, *parts: object) -> str:
        """Returns the name of the file of a program that `parts` determine."""
        return f"{function}-{_hash(self._environment, function, *parts)}"

    def read_words(self, kind: str, *parts: object) -> list[str]:
        """Returns the words that `write_words` recorded last for these parts."""
        data = read_private(self._folder / self.name(kind, *parts))
        return (data or b"").decode(errors="replace").split()

    def write_words(self, words: Sequence[str], kind: str, *parts: object) -> None:
        """Records words without spaces; does nothing if the disk is full."""
        with contextlib.suppress(InputError, Fault):
            _write_private(self._folder / self.name(kind, *parts), "\n".join(words).encode())

    def read(self, name: str) -> Any:
        """Returns a stored program; None if it is missing, damaged or not for this machine."""
        path = self._folder / name
        data = read_private(path)
        if data is None or hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            return None
        try:
            ids, *program = pickle.loads(data[_DIGEST:])
            devices = {device.id: device for device in jax.devices()}
            found = serialize_executable.deserialize_and_load(
                *program,
                backend=jax.devices()[0].client,
                execution_devices=[devices[i] for i in ids],
            )
            os.utime(path)
        except Exception:  # of pickle, JAX or XLA: compile the program instead
            return None
        return found

    def write(self, name: str, program: Any, device_ids: list[int]) -> None:
        """Stores a program; does nothing if it can't be stored."""
        try:
            data = pickle.dumps((device_ids, *serialize_executable.serialize(program)))
            _write_private(self._folder / name, hashlib.sha256(data).digest() + data)
            _remove_oldest(self._folder, _MAX_BYTES)
        except Exception:  # a full disk, or a program that can't be serialized
            return


@functools.cache
def _environment() -> str:
    """Returns what all programs depend on, as text."""
    import flax

    package = Path(__file__).parents[1]
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    jaxlib = jax.lib.__version__  # pyright: ignore[reportPrivateImportUsage]
    versions = jax.__version__, jaxlib, np.__version__, flax.__version__
    settings = {
        name: value for name, value in jax.config.values.items()
        if isinstance(value, bool | int | float | str) and "cache" not in name
    }  # fmt: skip
    flags = {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    client = jax.devices()[0].client
    parts = source.hexdigest(), versions, sorted(settings.items()), flags, client.platform_version
    return repr((*parts, platform.python_version(), platform.machine(), _cpu_features()))


def _cpu_features() -> list[str]:
    """Returns the lines of /proc/cpuinfo that tell which instructions XLA:CPU may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # macOS has no such file
        return [platform.processor()]
    return sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _write_private(path: Path, data: bytes) -> None:
    with replace_file(path) as partial:
        partial.touch(0o600, exist_ok=False)
        partial.write_bytes(data)


def _remove_oldest(folder: Path, limit: int) -> None:
    """Removes the files that were not used for longest, until all have at most `limit` bytes."""
    files: Sequence[tuple[float, int, Path]] = sorted(
        (status.st_mtime, status.st_size, path)
        for path in folder.iterdir()
        if (status := path.stat())
    )
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
