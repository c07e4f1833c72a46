"""What JAX compiles: kept for the next start, and told apart from the time that work takes."""

import functools
import os
from typing import NamedTuple

import jax

# Python to jaxpr, jaxpr to StableHLO, StableHLO to a program (or its reading from a cache).
_PARTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


def enable_compile_cache() -> None:
    """Lets JAX keep what it compiles in a folder, so that a second start is quick.

    The folder is JAX_COMPILATION_CACHE_DIR, or llama_jax below XDG_CACHE_HOME (~/.cache). Programs
    that took less than a tenth of a second are not kept.
    """
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(caches, "llama_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Compiled(NamedTuple):
    """What this process has compiled since `compiled` was first called."""

    programs: int
    seconds: float


class _Sums:
    def __init__(self):
        self.programs = 0
        self.seconds = 0.0

    def add(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _PARTS:
            self.seconds += duration_secs
            self.programs += event == _PARTS[-1]


@functools.cache
def _sums() -> _Sums:
    sums = _Sums()
    jax.monitoring.register_event_duration_secs_listener(sums.add)
    return sums


def compile_statistics() -> Compiled:
    """Returns how many programs were compiled so far, and the seconds that took."""
    return Compiled(_sums().programs, _sums().seconds)
