"""A folder of stored programs for tests, without JAX's compilation cache, as in a command."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextmanager
def program_folder(cache: Path) -> Iterator[Path]:
    """Makes `cache` the folder of JAX's caches; yields the folder of the stored programs."""
    before = os.environ["JAX_COMPILATION_CACHE_DIR"]
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield cache / "programs"
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()
