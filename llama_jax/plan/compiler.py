"""Compiles a lowered program for a chip that need not be there; reads memory, cost, schedule."""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from llama_jax.errors import InputError
from llama_jax.plan.schedule import Event, parse_events
from llama_jax.runtime.chips import PlannableChip


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """The compiler's figures for a program; all are for one device.

    Attributes:
        argument_bytes: memory of the arguments.
        peak_bytes: most memory allocated at one time, arguments included. The TPU compiler rejects
            a program that needs more than the device has.
        seconds: the compiler's estimate. It counts a loop's body once and Pallas kernels as 0. The
            compiler for GPUs has none: 0, and so are FLOPs, and there are no events.
        flops: floating-point operations; a loop's body counts once here too.
        events: the schedule, with each loop body repeated for every iteration.
    """

    argument_bytes: int
    peak_bytes: int
    seconds: float
    flops: float
    events: list[Event]


class DoesNotFit(Exception):
    """The compiler found no program that fits the device's memory.

    Attributes:
        needed_bytes: the memory that the program would need; None if the compiler doesn't report
            it.
    """

    def __init__(self, needed_bytes: int | None):
        super().__init__(needed_bytes)
        self.needed_bytes = needed_bytes


def compile_program(
    lowered: Any, chip: PlannableChip, options: dict[str, str], alternatives: str
) -> CompiledProgram:
    """Compiles a lowered program and returns the compiler's figures for it.

    Args:
        lowered: result of `jax.jit(…).lower(…)`, for the devices of `topology.devices`.
        options: XLA options.
        alternatives: settings, besides the mesh, that the error message of a failing compiler
            suggests to change.

    Raises:
        DoesNotFit: the program needs more memory than a device has.
        InputError: the compiler fails for another reason.
    """
    if chip.gpu:
        options = options | {"xla_gpu_autotune_level": "0"}  # it would run kernels to choose them
    try:
        with _without_compilation_cache():
            executable = lowered.compile(compiler_options={**options})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).lower():
            raise DoesNotFit(_parse_needed_bytes(str(error))) from error
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"the compiler itself failed on this step ({reason}): try another mesh, {alternatives}"
        ) from error
    memory: Any = executable.memory_analysis()
    if chip.gpu:
        return CompiledProgram(
            argument_bytes=memory.argument_size_in_bytes,
            peak_bytes=memory.peak_memory_in_bytes,
            seconds=0.0,
            flops=0.0,
            events=[],
        )
    cost: Any = executable.cost_analysis()
    peak_seconds = cost["flops"] / (chip.bf16_tflops * 1e12)
    return CompiledProgram(
        argument_bytes=memory.argument_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        seconds=_remove_unknown_operations(cost["optimal_seconds"], peak_seconds),
        flops=cost["flops"],
        events=parse_events(executable.as_text() or ""),
    )


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Disables JAX's compilation cache, which can't read the program of a chip that is not there.

    It would write programs of many megabytes, and warn of each that it finds.
    """
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def bytes_per_device(arrays: Any) -> int:
    """Returns the bytes of a pytree of sharded arrays, abstract or not, on one device."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(arrays)
    )


def _remove_unknown_operations(seconds: float, peak_seconds: float) -> float:
    """Returns the compiler's sum of seconds without the operations that it can't estimate.

    The compiler counts each operation without an estimate (all that run on the SparseCore) as -1 s.
    One or two layers never take a full second longer than their FLOPs at the peak, so the sum
    plus the smallest integer that lifts it to `peak_seconds` is the time of the other operations.
    The sum is a float32: with 50 such operations it resolves 4 µs an operation, negligible for
    layers of tens of milliseconds.
    """
    return seconds + max(0, math.ceil(peak_seconds - seconds))


def _parse_needed_bytes(message: str) -> int | None:
    """Returns the memory that an error of the compiler names: '… temporaries (102.24G) …'."""
    found = re.search(r"(?:Used|temporaries) \(?([\d.]+)([KMGT])\b", message)
    return found and int(float(found[1]) * 1024 ** (" KMGT".index(found[2])))
