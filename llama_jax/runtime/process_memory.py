"""Memory of this process: how much is used and left, and when glibc's malloc returns freed memory.

XLA and numpy take large arrays from malloc. Two kinds of process want opposite things when they
free them:

- Training on the CPU calls `retain_freed_memory`: each step allocates and frees the same gigabytes
  of temporaries, and mapping and clearing their pages again would slow each step down.
- Conversion calls `release_freed_memory`: it works under a limit of memory (`--max-ram`), which
  arrays that are already freed must not use up.

Any other process leaves malloc as it is.
"""

import ctypes
import os
import resource
import sys
from importlib.util import find_spec
from pathlib import Path

import jax

from llama_jax.errors import InputError

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8

# Files of a memory cgroup of version 1: its limit and its usage.
_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def retain_freed_memory() -> None:
    """Makes malloc keep freed memory in this process, where JAX computes on the CPU with glibc.

    XLA allocates a step's temporaries, often gigabytes, with malloc and frees them at the end of
    the step. By default glibc returns such blocks to the system, and the next step must map and
    clear every page again. Retained memory costs no time, but the process stays at its peak size,
    and fragmentation may double the space of the temporaries.

    Call it before anything asks JAX for its devices: threads that exist keep their own heaps.
    """
    libc = ctypes.CDLL(None)
    if _cpu_is_only_platform() and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never shrink the heap
        libc.mallopt(_M_MMAP_MAX, 0)  # no block has its own mapping, which free would unmap
        libc.mallopt(_M_ARENA_MAX, 1)  # all threads allocate from the heap that can grow


def release_freed_memory() -> None:
    """Makes malloc return each large array to the system when it is freed, on Linux.

    Each array of 1 MiB or more gets its own mapping. Otherwise glibc raises that threshold up to
    32 MiB, and each thread retains the smaller arrays that it frees, beyond any limit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _cpu_is_only_platform() -> bool:
    """Returns whether JAX will choose the CPU, without initializing a backend."""
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] (set at runtime)
    if chosen:
        return chosen == "cpu"
    return not (find_spec("jax_plugins") or find_spec("libtpu"))  # installed by jax[cuda], jax[tpu]


def resident() -> int:
    """Returns the resident memory of this process [bytes]; outside of Linux its peak."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return peak_resident()


def peak_resident() -> int:
    """Returns the largest resident memory of this process so far [bytes]."""
    if sys.platform == "linux":  # getrusage also counts the process before exec
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_memory(nbytes: int, purpose: str) -> None:
    """Checks that this process can allocate `nbytes` more.

    Raises:
        InputError: the machine, or the limit of a container, has no room for `purpose`.
    """
    available = available_memory()
    if nbytes > available:
        raise InputError(
            f"{purpose} takes {nbytes / 2**30:,.2f} GiB of memory, but"
            f" {available / 2**30:,.2f} GiB are free: free more, or use a machine with more memory"
        )


def available_memory(root: Path = Path("/")) -> int:
    """Returns how many more bytes this process can allocate.

    On Linux: the machine's free memory, or the room below its cgroup's limit if that is less. The
    page cache counts as free. Elsewhere: all memory of the machine.

    Args:
        root: folder that contains `proc` and `sys`.
    """
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    meminfo = (root / "proc/meminfo").read_text()
    limits = [int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        names = ("memory.max", "memory.current") if not controllers else _CGROUP_1
        mount = root / ("sys/fs/cgroup" if not controllers else "sys/fs/cgroup/memory")
        if controllers in ("", "memory"):
            group = mount / name.lstrip("/")
            groups = [g for g in (group, *group.parents) if g.is_relative_to(mount)]
            limits += [_cgroup_room(g, *names) for g in groups]
    return max(0, min(limits))


def _cgroup_room(group: Path, limit: str, usage: str) -> int:
    """Returns the bytes that a cgroup may still use; without a limit, the largest int.

    Args:
        limit: name of the file with its limit.
        usage: name of the file with its usage.
    """
    try:
        most = int((group / limit).read_text())  # ValueError: it is 'max', no limit
        used = int((group / usage).read_text())
        lines = map(str.split, (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return sys.maxsize
    stat = {name: int(value) for name, value in lines}
    cache = sum(stat.get(f"total_{n}", stat.get(n, 0)) for n in ("inactive_file", "active_file"))
    return most - used + cache
