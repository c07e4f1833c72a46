"""JAX's cache of compiled programs on disk, and the number and time of compilations."""

import functools
import os
from typing import NamedTuple

import jax

# Events of JAX: Python to jaxpr, jaxpr to StableHLO, StableHLO to a program (or its read from the
# cache).
_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


def enable_compile_cache() -> None:
    """Makes JAX store compiled programs in a folder, so that the next start is faster.

    The folder is JAX_COMPILATION_CACHE_DIR, or llama_jax in XDG_CACHE_HOME (~/.cache). In the
    latter, programs that compile in less than 0.1 s are not stored.
    """
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(caches, "llama_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class CompileStatistics(NamedTuple):
    """Compilations of this process since the first call of `compile_statistics`."""

    programs: int
    seconds: float


class _Counter:
    def __init__(self):
        self.programs = 0
        self.seconds = 0.0

    def add(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _EVENTS:
            self.seconds += duration_secs
            self.programs += event == _EVENTS[-1]


@functools.cache
def _counter() -> _Counter:
    counter = _Counter()
    jax.monitoring.register_event_duration_secs_listener(counter.add)
    return counter


def compile_statistics() -> CompileStatistics:
    """Returns the number of programs compiled so far, and the seconds that it took."""
    return CompileStatistics(_counter().programs, _counter().seconds)
