"""What training on the CPU wants of the process's memory."""

import ctypes
from importlib.util import find_spec

import jax

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
