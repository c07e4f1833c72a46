"""Compiles the training step for devices that need not be there, and reads what came out."""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.chips import Chip
from llama_jax.config import Config
from llama_jax.data.batches import Batch
from llama_jax.sharding import act
from llama_jax.training.step import init_state, train_step
from llama_jax.tree import abstract


class Collective(NamedTuple):
    """An operation between devices, in a compiled program."""

    kind: str  # all-gather, reduce-scatter, all-reduce, …
    bytes: float  # that a device sends
    devices: int  # that take part
    hidden: bool  # started before it is waited for, or inside of a product


class Program(NamedTuple):
    """A compiled training step; all figures are for one device."""

    weights: int  # bytes, and so on
    optimizer: int
    arguments: int
    temporaries: int
    seconds: float  # the compiler's estimate; a loop's body counts once, kernels not at all
    flops: float
    collectives: list[Collective]
    compile_seconds: float


class DoesNotFit(Exception):
    """The compiler found no program that fits the device's memory.

    Attributes:
        needed: bytes that it would need; None if the compiler doesn't say.
    """

    def __init__(self, needed: int | None):
        super().__init__(needed)
        self.needed = needed


def compiled(config: Config, mesh: jax.sharding.Mesh, chip: Chip) -> Program:
    """Returns the training step of `config` as it is compiled for `mesh`.

    Raises:
        DoesNotFit: it needs more memory than a device has.
    """
    begun = time.monotonic()
    with jax.set_mesh(mesh):
        model, opt_state = abstract(lambda: init_state(config, jax.random.key(0)))
        A, B = config.training.micro_batches, config.data.batch_size
        sharding = jax.NamedSharding(mesh, act("ABT"))
        rows = jax.ShapeDtypeStruct((A, B // A, config.data.seq_len), jnp.int32, sharding=sharding)
        batch = Batch(rows, rows, rows, rows if config.data.isolate_documents else None)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        lowered = train_step.lower(config, model, opt_state, batch, step)
    try:
        executable = lowered.compile(compiler_options={**chip.options})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).lower():
            raise DoesNotFit(_used(str(error))) from error
        raise
    memory: Any = executable.memory_analysis()
    cost: Any = executable.cost_analysis()
    return Program(
        weights=_bytes_on_a_device(model),
        optimizer=_bytes_on_a_device(opt_state),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        seconds=cost["optimal_seconds"],
        flops=cost["flops"],
        collectives=list(collectives(executable.as_text() or "")),
        compile_seconds=time.monotonic() - begun,
    )


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


def _bytes_on_a_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _used(message: str) -> int | None:
    """Returns the bytes that the compiler says it would need: '… temporaries (102.24G) …'."""
    found = re.search(r"(?:Used|temporaries) \(?([\d.]+)([KMGT])\b", message)
    return found and int(float(found[1]) * 1024 ** (" KMGT".index(found[2])))


_OPERATION = re.compile(
    r" *(?:ROOT )?%[\w.-]+ = (?P<type>\(.*?\)|\S+) (?P<kind>all-gather|reduce-scatter|all-reduce"
    r"|all-to-all|collective-permute)(?P<start>-start)?"
    r"\(.*?channel_id=(?P<channel>\d+), (?:replica_groups|source_target_pairs)=(?P<groups>.*)"
)
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}


def collectives(text: str) -> Iterator[Collective]:
    """Yields the collectives in the text of a compiled program.

    One that is started, or done step by step inside of products, stands in fusions: several times,
    with one number.
    """
    fused, seen = False, set[str]()
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            fused = line.startswith(("%fused_computation", "%async_collective_fusion"))
        found = _OPERATION.match(line)
        if found is None or (fused and found["channel"] in seen):
            continue
        if fused:
            seen.add(found["channel"])
        devices, size, kind = group_size(found["groups"]), _size(found["type"]), found["kind"]
        # A started all-gather's type holds what goes in and what comes out.
        if found["start"] and kind == "all-gather":
            size = size * devices // (devices + 1)
        if kind == "reduce-scatter":
            size *= devices
        share = 1.0 if kind == "collective-permute" else (devices - 1) / devices
        sent = size * share * (2 if kind == "all-reduce" else 1)
        hidden = fused or bool(found["start"])
        yield Collective(kind, sent, devices, hidden)


def _size(shapes: str) -> int:
    """Returns the bytes of 'bf16[4096,64]{…}', or of a tuple of such."""
    found = re.findall(r"\b(\w+)\[([\d,]*)\]", shapes)
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in found
    )


def group_size(groups: str) -> int:
    """Returns how many devices a group of `replica_groups` has, in any of XLA's notations."""
    if groups.startswith("mesh["):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        axes = re.search(r"\{('[^}]*)\}", groups)
        return (
            math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes[1])) if axes else 1
        )
    if groups.startswith("{{"):
        return groups.partition("}")[0].count(",") + 1
    return int(re.findall(r"\d+", groups)[1])
