"""Compiled programs that one run of the tests leaves for the next: compiling takes a third of it.

Each process of a run has a folder of its own, JAX's compilation cache, with copies of what earlier
runs stored. JAX writes an entry in place, so a process that is killed leaves a part of one: only
complete entries are stored, when a process ends. `pytest --cache-clear` removes them.
"""

import os
import shutil
from pathlib import Path

STORED = Path(__file__).parents[2] / ".pytest_cache" / "d" / "compiled"
MAX_BYTES = 2 << 30  # entries of earlier versions of the code also count; then all are removed


def copy_stored(folder: Path) -> None:
    """Copies the entries of earlier runs into an empty folder."""
    if sum(path.stat().st_size for path in STORED.glob("*-cache")) > MAX_BYTES:
        shutil.rmtree(STORED, ignore_errors=True)
    for path in STORED.glob("*-cache"):
        shutil.copyfile(path, folder / path.name)


def store_new(folder: Path) -> None:
    """Stores the complete entries of a process for later runs, and removes its folder."""
    from jax._src.compilation_cache import decompress_executable

    STORED.mkdir(parents=True, exist_ok=True)
    stored = {path.name for path in STORED.iterdir()}
    for path in folder.glob("*-cache"):
        if path.name in stored:
            continue
        try:
            decompress_executable(path.read_bytes())
        except Exception:  # of zlib or of zstandard, whichever JAX found
            continue
        partial = STORED / f"{path.name}.{os.getpid()}"
        shutil.copyfile(path, partial)
        partial.rename(STORED / path.name)
    shutil.rmtree(folder, ignore_errors=True)
