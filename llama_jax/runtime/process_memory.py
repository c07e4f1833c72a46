"""The process's memory: what glibc does with freed memory, how much is used, how much is left."""

import ctypes
import os
import resource
import sys
from importlib.util import find_spec
from pathlib import Path

import jax

from llama_jax.errors import InputError

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets the process keep the memory that is freed, where JAX computes on the CPU with glibc.

    XLA takes a step's temporaries, often gigabytes, from malloc, and frees them when it ends. By
    itself glibc gives such blocks back to the system, which in the next step clears and maps
    every page of them again. Kept, they cost nothing, but the process stays as large as it ever
    was, and may come to hold the space of the temporaries twice.

    To be called before anything asks JAX for its devices: threads that exist keep their own heaps.
    """
    libc = ctypes.CDLL(None)
    if _cpu_alone() and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_M_MMAP_MAX, 0)  # no block is mapped by itself and unmapped when freed
        libc.mallopt(_M_ARENA_MAX, 1)  # all threads take from the heap that can grow


def _cpu_alone() -> bool:
    """Returns whether JAX will choose the CPU, without making it choose."""
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] (made late)
    if chosen:
        return chosen == "cpu"
    return not (find_spec("jax_plugins") or find_spec("libtpu"))  # what jax[cuda], jax[tpu] add


_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_M_MMAP_THRESHOLD = -3  # malloc.h


def give_freed_memory_back() -> None:
    """Makes glibc map every large array by itself, so that it leaves the process when it is freed.

    Otherwise each thread keeps what it freed up to 32 MiB at a time, beyond any limit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def resident() -> int:
    """Returns the memory that this process holds now [bytes]."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return peak_resident()


def check_memory(nbytes: int, what: str) -> None:
    """Checks that this process can hold so many more bytes.

    Raises:
        InputError: the machine, or the limit of a container, has no room for `what`.
    """
    has = available_memory()
    if nbytes > has:
        raise InputError(
            f"{what} takes {nbytes / 2**30:,.2f} GiB of memory, but {has / 2**30:,.2f} GiB are"
            " free: make room, or take a machine with more"
        )


def available_memory(root: Path = Path("/")) -> int:
    """Returns how many more bytes this process can hold.

    On Linux the machine's free memory, or what its cgroup's limit leaves if that is less; what
    files take as a cache counts as free. Elsewhere all memory of the machine.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    meminfo = (root / "proc/meminfo").read_text()
    free = [int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        names = ("memory.max", "memory.current") if not controllers else _CGROUP_1
        place = root / ("sys/fs/cgroup" if not controllers else "sys/fs/cgroup/memory")
        if controllers in ("", "memory"):
            group = place / name.lstrip("/")
            free += [_left(g, *names) for g in (group, *group.parents) if g.is_relative_to(place)]
    return max(0, min(free))


def _left(group: Path, limit: str, usage: str) -> int:
    """Returns the bytes that the limit of a cgroup leaves."""
    try:
        most = int((group / limit).read_text())  # or 'max', which is no number
        used = int((group / usage).read_text())
        lines = map(str.split, (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is no such limit, or no such file
        return sys.maxsize
    stat = {name: int(value) for name, value in lines}
    cache = sum(stat.get(f"total_{n}", stat.get(n, 0)) for n in ("inactive_file", "active_file"))
    return most - used + cache


def peak_resident() -> int:
    """Returns the most memory that this process has held so far [bytes]."""
    if sys.platform == "linux":  # getrusage also counts what the process before exec had held
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
