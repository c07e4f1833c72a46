"""Stores compiled programs on disk, so that the next start neither traces nor lowers them.

JAX's compilation cache saves only the last step, from StableHLO to a program: tracing and lowering
take longer than reading it. Here the key of a program is what determines its trace: the source of
this package, versions, the static arguments, and shapes and shardings of the others.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from llama_jax.runtime.console import print_status
from llama_jax.runtime.program_files import ProgramFiles

R = TypeVar("R")

_store: "_Store | None" = None  # of the current `stored_programs`


class _Arguments(NamedTuple):
    """Arguments of a call: the static ones, and the others, by position and by name."""

    static: tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]
    dynamic: list[Any]
    dynamic_named: dict[str, Any]


class StoredProgram(Generic[R]):
    """A jitted function that a `stored_programs` block reads from disk; elsewhere `jax.jit`."""

    def __init__(self, function: Callable[..., R], options: dict[str, Any]):
        self.jitted = jax.jit(function, **options)
        self.lower = self.jitted.lower
        self._function, self._options = function, options
        self._name = f"{function.__module__}.{function.__qualname__}"
        names = list(inspect.signature(function).parameters)
        self._static_numbers = frozenset(_as_tuple(options.get("static_argnums", ())))
        static_names = _as_tuple(options.get("static_argnames", ()))
        self._static_names = {*static_names, *(names[i] for i in self._static_numbers)}
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **named: Any) -> R:
        """Runs the program."""
        store, mesh = _store, _current_mesh()
        if store is None or mesh is None:
            return self.jitted(*args, **named)
        arguments = self._split(args, named)
        # The signature of all arguments takes longer than a call. A program checks the shapes,
        # dtypes and shardings of arrays itself, before it runs.
        types = tuple(map(type, arguments.dynamic))
        kind = self._name, arguments.static, types, mesh
        if (recent := store.recent.get(kind)) is not None:
            with contextlib.suppress(TypeError, ValueError):
                return recent(*arguments.dynamic, **arguments.dynamic_named)
        program = store.recent[kind] = self._find(store, mesh, arguments, args, named)
        return program(*arguments.dynamic, **arguments.dynamic_named)

    def prepare(self, *args: Any, **named: Any) -> None:
        """Reads or compiles the program of these arguments, which may be `ShapeDtypeStruct`s."""
        store, mesh = _store, _current_mesh()
        if store is not None and mesh is not None:
            self._find(store, mesh, self._split(args, named), args, named)

    def _split(self, args: tuple[Any, ...], named: dict[str, Any]) -> "_Arguments":
        static = tuple(arg for i, arg in enumerate(args) if i in self._static_numbers)
        static_named = tuple((k, named[k]) for k in sorted(named) if k in self._static_names)
        return _Arguments(
            (static, static_named),
            [arg for i, arg in enumerate(args) if i not in self._static_numbers],
            {k: arg for k, arg in named.items() if k not in self._static_names},
        )

    def _find(
        self,
        store: "_Store",
        mesh: jax.sharding.Mesh,
        arguments: "_Arguments",
        args: tuple[Any, ...],
        named: dict[str, Any],
    ) -> Any:
        static, *dynamic = arguments
        leaves, tree = jax.tree.flatten(dynamic)
        key = self._name, static, tree, tuple(map(_signature, leaves)), mesh
        return store.find(key, lambda: self._lower_afresh(*args, **named))

    def _lower_afresh(self, *args: Any, **named: Any) -> Any:
        """Lowers a new function that calls this one.

        For a function that it has seen, JAX may reuse an executable that came from the compilation
        cache, which can't be stored (`_Store._read_or_compile`).
        """

        @functools.wraps(self._function)
        def function(*args: Any, **named: Any) -> R:
            return self._function(*args, **named)

        return jax.jit(function, **self._options).lower(*args, **named)


def stored_jit(**options: Any) -> Callable[[Callable[..., R]], StoredProgram[R]]:
    """Returns a decorator like `jax.jit` with `options`; the function's programs can be stored."""
    return lambda function: StoredProgram(function, options)


@contextlib.contextmanager
def stored_programs(*start: object) -> Iterator[None]:
    """Stores the programs that `stored_jit` functions compile in the block, and reads them.

    With several processes, with a compilation cache in a bucket, or without a private folder (a
    line says so), JAX's compilation cache serves alone. Where programs are stored, that cache is
    off in the block: a program that comes from it can't be stored again.

    Args:
        start: what distinguishes this start from others, such as the command and the model. The
            programs that an equal start has used are read in the background from the beginning.
    """
    global _store
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not cache or "://" in cache or jax.process_count() > 1 or _store is not None:
        yield
        return
    try:
        files = ProgramFiles(Path(cache, "programs"))
    except OSError as error:
        print_status(f"compiled programs are not stored, each start compiles them: {error}")
        yield
        return
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    store = _store = _Store(files, start)
    try:
        yield
    finally:
        _store = None  # what is prepared in the background ends after the current program
        store.close()
        jax.config.update("jax_enable_compilation_cache", enabled)


def is_storing() -> bool:
    """Returns whether there is a current `stored_programs` block that stores programs."""
    return _store is not None


def stored_number(kind: str, parts: object, measure: Callable[[], float]) -> float:
    """Returns the number that `measure` returned in an earlier `stored_programs` block, or now.

    Args:
        kind: of the number, in the name of its file.
        parts: what the number depends on, besides the machine, the versions and this package.
        measure: called if there is no such block or no number yet.
    """
    if _store is None:
        return measure()
    return _store.number(kind, parts, measure)


def prepare_in_background(prepare: Callable[[], None]) -> None:
    """Calls `prepare` in a thread of the current `stored_programs` block, on the current mesh.

    A call of a program that `prepare` is reading or compiling waits until it is ready. A program
    that it hasn't reached, or that it failed to compile, is read or compiled by the call.
    """
    assert _store is not None
    _store.end_early_reads()
    mesh = jax.sharding.get_mesh()

    def run() -> None:
        with jax.set_mesh(mesh):
            prepare()

    _store.threads.submit(run)


class _Store:
    """The programs of one `stored_programs` block, by their keys, and their files."""

    def __init__(self, files: ProgramFiles, start: object):
        self.recent: dict[Any, Any] = {}  # programs of the last calls, by what is quick to compare
        self.threads = ThreadPoolExecutor(2, "programs")
        self._files, self._start = files, start
        self._programs: dict[Any, Future[Any]] = {}
        self._lock = threading.Lock()
        self._used: list[str] = []
        self._is_starting = True
        self._recorded = files.read_words("start", start)
        self._read_early = {name: self.threads.submit(files.read, name) for name in self._recorded}

    def end_early_reads(self) -> None:
        """Makes later starts read no programs early that are first used from now on."""
        self._is_starting = False

    def close(self) -> None:
        """Ends the threads after their current programs; records what this start has used."""
        self.threads.shutdown(cancel_futures=True)
        if self._used != self._recorded:
            self._files.write_words(self._used, "start", self._start)

    def number(self, kind: str, parts: object, measure: Callable[[], float]) -> float:
        """Returns the stored number, or measures and stores it."""
        found = self._files.read_words(kind, parts)
        with contextlib.suppress(ValueError):
            (word,) = found
            return float(word)
        number = measure()
        self._files.write_words([repr(number)], kind, parts)
        return number

    def find(self, key: Any, lower: Callable[[], Any]) -> Any:
        """Returns a compiled program: of this process, of the folder, or else compiled now."""
        with self._lock:
            future, is_new = self._programs.get(key), key not in self._programs
            if is_new:
                future = self._programs[key] = Future()
        assert future is not None
        if is_new:
            try:
                future.set_result(self._read_or_compile(key, lower))
            except BaseException as error:
                with self._lock:
                    del self._programs[key]
                future.set_exception(error)
        return future.result()

    def _read_or_compile(self, key: Any, lower: Callable[[], Any]) -> Any:
        function, static, tree, leaves, mesh = key
        devices = [(device.id, device.device_kind) for device in mesh.devices.flat]
        described = [(*leaf[:-1], str(leaf[-1])) for leaf in leaves]
        parts = static, str(tree), described, mesh.shape_tuple, mesh.axis_types, devices
        name = self._files.name(function.rpartition(".")[2], function, *parts)
        if self._is_starting:
            self._used.append(name)
        early = self._read_early.pop(name, None)
        program = self._files.read(name) if early is None else early.result()
        if program is None:
            lowered = lower()
            with _CompilationCacheHits() as hits:
                program = lowered.compile()
            if hits.number:  # XLA:CPU can't serialize a program that it has deserialized
                return program
            self._files.write(name, program, [device.id for device in mesh.devices.flat])
        return program


class _CompilationCacheHits:
    """Counts the programs that JAX reads from its compilation cache in this thread."""

    def __enter__(self) -> "_CompilationCacheHits":
        self.number, self._thread = 0, threading.get_ident()
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._count)

    def _count(self, event: str, **_: str | int) -> None:
        hit = event == "/jax/compilation_cache/cache_hits"
        self.number += hit and threading.get_ident() == self._thread


def _as_tuple(given: Any) -> tuple[Any, ...]:
    return (given,) if isinstance(given, int | str) else tuple(given)


def _signature(leaf: Any) -> tuple[Any, ...]:
    """Returns the properties of an argument on which a program depends.

    Layouts are XLA's defaults everywhere: a program refuses an array with another one.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, str(leaf.dtype), leaf.weak_type, leaf.sharding
    if isinstance(leaf, jax.Array):
        return leaf.shape, str(leaf.dtype), leaf.aval.weak_type, leaf.sharding
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, str(leaf.dtype), None
    return type(leaf).__name__, None


def _current_mesh() -> jax.sharding.Mesh | None:
    """Returns the current mesh; None if there is none, or inside of another program's trace."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        return None
    return None if mesh.empty else mesh
