"""Compiles programs for devices that need not be there, and reads what came out."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.checkpoint.tree import eval_shape_on_mesh
from llama_jax.config.run import Config
from llama_jax.data.windows import Batch
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import activation_spec
from llama_jax.plan.schedule import Event, events
from llama_jax.runtime.chips import PlannableChip
from llama_jax.training.step import init_state, train_step


class Reading(NamedTuple):
    """What the compiler says of a program; all figures are for one device."""

    arguments: int  # bytes
    peak: int  # bytes of all that is held at once; more than a device has, and it refuses
    seconds: float  # the compiler's estimate; a loop's body counts once, kernels not at all
    flops: float
    events: list[Event]


class Program(NamedTuple):
    """A compiled training step: a reading, and what its memory holds."""

    weights: int  # bytes, and so on
    optimizer: int
    arguments: int
    kept: int  # of the forward pass for the backward one
    peak: int
    seconds: float
    flops: float
    events: list[Event]


class DoesNotFit(Exception):
    """The compiler found no program that fits the device's memory.

    Attributes:
        needed: bytes that it would need; None if the compiler doesn't say.
    """

    def __init__(self, needed: int | None):
        super().__init__(needed)
        self.needed = needed


def compiled(config: Config, mesh: jax.sharding.Mesh, chip: PlannableChip) -> Program:
    """Returns the training step of `config` as it is compiled for `mesh`.

    Raises:
        DoesNotFit: it needs more memory than a device has.
        InputError: the compiler fails.
    """
    with jax.set_mesh(mesh):
        model, opt_state = eval_shape_on_mesh(lambda: init_state(config, jax.random.key(0)))
        A, B = config.training.micro_batches, config.data.batch_size
        sharding = jax.NamedSharding(mesh, activation_spec("ABT"))
        rows = jax.ShapeDtypeStruct((A, B // A, config.data.seq_len), jnp.int32, sharding=sharding)
        batch = Batch(rows, rows, rows, rows if config.data.isolate_documents else None)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        traced = train_step.trace(config, model, opt_state, batch, step)
        lowered = traced.lower()
    read = reading(lowered, chip, chip.compiler_options, "model.remat or training.micro_batches")
    return Program(
        weights=on_a_device(model),
        optimizer=on_a_device(opt_state),
        kept=_kept(traced.jaxpr.jaxpr, config.model.n_layers),
        **read._asdict(),
    )


def reading(lowered: Any, chip: PlannableChip, options: dict[str, str], instead: str) -> Reading:
    """Compiles a lowered program and returns what the compiler says of it.

    Args:
        options: of XLA.
        instead: what else to try where the compiler fails, beside another mesh.

    Raises:
        DoesNotFit: it needs more memory than a device has.
        InputError: the compiler fails.
    """
    try:
        executable = lowered.compile(compiler_options={**options})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).lower():
            raise DoesNotFit(_used(str(error))) from error
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"the TPU compiler itself failed on this step ({reason}): try another mesh, {instead}"
        ) from error
    memory: Any = executable.memory_analysis()
    cost: Any = executable.cost_analysis()
    return Reading(
        arguments=memory.argument_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        seconds=_known(cost["optimal_seconds"], cost["flops"] / (chip.bf16_tflops * 1e12)),
        flops=cost["flops"],
        events=events(executable.as_text() or ""),
    )


def _kept(jaxpr: Any, layers: int) -> int:
    """Returns the bytes that the first loop over layers stacks up: what it keeps."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == layers:
            of_a_layer = equation.params["jaxpr"].out_avals
            stacked = [
                variable.aval
                for variable, one in zip(equation.outvars, of_a_layer, strict=True)
                if variable.aval.ndim > one.ndim
            ]
            if stacked:
                return on_a_device(stacked)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and (found := _kept(inner, layers)):
                return found
    return 0


def _known(seconds: float, least: float) -> float:
    """Returns the compiler's sum without what it doesn't know.

    It counts whatever it has no estimate for (all that is handed to the SparseCore) as -1 s. No
    step of a layer or two is a second slower than its FLOPs at the peak, so the least number of
    whole seconds that is missing is theirs. The sum is a float32: beside 50 such seconds it is good
    to 4 µs an operation, which layers of tens of milliseconds hardly feel.
    """
    return seconds + max(0, math.ceil(least - seconds))


def of_depth(config: Config, layers: int) -> Config:
    """Returns a run of that many layers, unrolled, and of one micro-batch."""
    model = dataclasses.replace(config.model, n_layers=layers, scan=False)
    rows = config.data.batch_size // config.training.micro_batches
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, batch_size=rows),
        training=dataclasses.replace(config.training, micro_batches=1),
    )


def on_a_device(arrays: Any) -> int:
    """Returns the bytes of a tree of sharded arrays, abstract or not, on one device."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(arrays)
    )


def _used(message: str) -> int | None:
    """Returns the bytes that the compiler says it would need: '… temporaries (102.24G) …'."""
    found = re.search(r"(?:Used|temporaries) \(?([\d.]+)([KMGT])\b", message)
    return found and int(float(found[1]) * 1024 ** (" KMGT".index(found[2])))
