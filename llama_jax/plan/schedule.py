"""Parses a compiled program's schedule and computes how much communication is exposed."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Collective(NamedTuple):
    """A communication operation among devices.

    Attributes:
        kind: all-gather, reduce-scatter, all-reduce, …
        bytes: bytes that one device sends.
        devices: number of participating devices.
    """

    kind: str
    bytes: float
    devices: int


class KernelWork(NamedTuple):
    """What a kernel does: FLOPs, and bytes that it accesses in HBM."""

    flops: float
    bytes: float


class Event(NamedTuple):
    """One step of a device's schedule: it computes, starts a collective, or waits for one.

    Attributes:
        cycles: cycles of computation.
        starts: the collective that starts; None if the device computes or waits.
        key: identifies the collective that starts, or that is awaited if `starts` is None.
        kernel: by its own cost estimate the work of a Pallas kernel, for which the compiler has no
            cycles; None for other operations.
    """

    cycles: float = 0.0
    starts: Collective | None = None
    key: str = ""
    kernel: KernelWork | None = None


class Traffic(NamedTuple):
    """Cost of all collectives of one kind, for one device.

    Attributes:
        bytes: bytes that the device sends.
        seconds: time that the collectives take.
        exposed: exposed communication: seconds in which the device waits and computes nothing.
    """

    bytes: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0


_KINDS = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
_COLLECTIVE = re.compile(
    rf"(?P<type>\(.*?\)|\S+) (?P<kind>{_KINDS})(?P<start>-start)?"
    r"\(.*?channel_id=(?P<channel>\d+), (?:replica_groups|source_target_pairs)=(?P<groups>.*)"
)
_INSTRUCTION = re.compile(r"  (?:ROOT )?%(?P<name>[\w.-]+) = (?P<rest>.* (?P<op>[a-z][\w-]*)\(.*)")
_CALLS = re.compile(r"(?:calls|to_apply)=%([\w.-]+)")
_BODY = re.compile(r"body=%([\w.-]+)")
_CONDITION = re.compile(r"condition=%([\w.-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_CYCLES = re.compile(r'estimated_cycles":"(\d+)"')
_KERNEL = re.compile(
    r'"cost_estimate":\{[^}]*"flops":"(?P<flops>\d+)"[^}]*"bytes_accessed":"(?P<bytes>\d+)"'
)
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}


class _Instruction(NamedTuple):
    name: str
    op: str
    operand: str
    calls: str
    cycles: float
    kernel: KernelWork | None
    collective: Collective | None
    channel: str
    body: str
    condition: str
    constant: int


def parse_events(hlo_text: str) -> list[Event]:
    """Returns the schedule of a device in a program, with loops repeated for every iteration."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", computations.setdefault("", [])
    for line in hlo_text.splitlines():
        if line.startswith(("%", "ENTRY")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
            current = computations.setdefault(name, [])
            entry = name if line.startswith("ENTRY") else entry
        elif (match := _INSTRUCTION.match(line)) is not None:
            current.append(_parse_instruction(match))
    return list(_walk(computations, entry))


def _parse_instruction(match: re.Match[str]) -> _Instruction:
    rest, op = match["rest"], match["op"]

    def search(pattern: re.Pattern[str]) -> str:
        found = pattern.search(rest)
        return found[1] if found else ""

    operands = rest[match.end("op") - match.start("rest") :]
    operand = re.match(r"\(%([\w.-]+)", operands)
    collective = _COLLECTIVE.match(rest) if re.match(_KINDS, op) else None
    kernel = _KERNEL.search(rest) if op == "custom-call" else None
    return _Instruction(
        name=match["name"],
        op=op,
        operand=operand[1] if operand else "",
        calls=search(_CALLS),
        cycles=float(search(_CYCLES) or 0),
        kernel=kernel and KernelWork(float(kernel["flops"]), float(kernel["bytes"])),
        collective=collective and _parse_collective(collective),
        channel=collective["channel"] if collective else "",
        body=search(_BODY),
        condition=search(_CONDITION),
        constant=int(search(_CONSTANT) or 0),
    )


def _walk(computations: dict[str, list[_Instruction]], name: str) -> Iterator[Event]:
    """Yields the events of one computation.

    A collective that XLA splits into steps inside matrix products appears in several fusions with
    one channel: it starts with the first fusion and is awaited with the last.
    """
    instructions = computations[name]
    fused = {
        i: _fused_collectives(computations, instruction)
        for i, instruction in enumerate(instructions)
        if instruction.op == "fusion"
    }
    last_fusion = {step.channel: i for i, steps in fused.items() for step in steps}
    started: set[str] = set()
    for i, instruction in enumerate(instructions):
        if instruction.op == "while":
            # A scan iterates while its counter is less than a constant.
            condition = computations[instruction.condition]
            for _ in range(max((c.constant for c in condition), default=1)):
                yield from _walk(computations, instruction.body)
        elif instruction.op.endswith("-start"):
            called = computations.get(instruction.calls, [])
            collectives = [c.collective for c in called if c.collective]
            if not collectives and instruction.collective:
                collectives = [instruction.collective]
            for collective in collectives:
                yield Event(starts=collective, key=instruction.name)
        elif instruction.op.endswith("-done"):
            yield Event(key=instruction.operand)
        elif instruction.collective is not None:
            yield Event(starts=instruction.collective, key=instruction.name)
            yield Event(key=instruction.name)
        else:
            steps = fused.get(i, [])
            for step in steps:
                if step.channel not in started:
                    yield Event(starts=step.collective, key=step.channel)
                    started.add(step.channel)
            yield Event(cycles=instruction.cycles, kernel=instruction.kernel)
            yield from (Event(key=s.channel) for s in steps if last_fusion[s.channel] == i)


def _fused_collectives(
    computations: dict[str, list[_Instruction]], fusion: _Instruction
) -> list[_Instruction]:
    """Returns the collectives inside a fusion, nested fusions included."""
    found = []
    for instruction in computations.get(fusion.calls, []):
        if instruction.collective:
            found.append(instruction)
        elif instruction.calls:
            found += _fused_collectives(computations, instruction)
    return found


def _parse_collective(match: re.Match[str]) -> Collective:
    devices, size = group_size(match["groups"]), _shape_bytes(match["type"])
    kind = match["kind"]
    # The type of an all-gather-start contains the operand and the result.
    if match["start"] and kind == "all-gather":
        size = size * devices // (devices + 1)
    if kind == "reduce-scatter":
        size *= devices
    sent = 1.0 if kind == "collective-permute" else (devices - 1) / devices
    return Collective(kind, size * sent * (2 if kind == "all-reduce" else 1), devices)


def simulate_traffic(
    events: list[Event], hertz: float, seconds: Callable[[Collective], float]
) -> dict[str, Traffic]:
    """Simulates the schedule and returns the cost of each kind of collective.

    The network runs one collective after the other. Computation continues meanwhile, until an
    instruction waits for a collective that has not finished.

    Args:
        events: schedule of a program.
        hertz: cycles of the device in a second.
        seconds: returns the time of a collective that has the network for itself.
    """
    totals: dict[str, Traffic] = defaultdict(Traffic)
    now = network_free = 0.0
    finishes: dict[str, tuple[str, float]] = {}  # by key: kind and time [s]
    for event in events:
        now += event.cycles / hertz
        if event.starts is not None:
            duration = seconds(event.starts)
            network_free = max(now, network_free) + duration
            kind = event.starts.kind
            finishes[event.key] = kind, network_free
            total = totals[kind]
            totals[kind] = total._replace(
                bytes=total.bytes + event.starts.bytes, seconds=total.seconds + duration
            )
        elif event.key in finishes:
            kind, finish = finishes.pop(event.key)
            wait = max(0.0, finish - now)
            totals[kind] = totals[kind]._replace(exposed=totals[kind].exposed + wait)
            now += wait
    return dict(totals)


def _shape_bytes(shapes: str) -> int:
    """Returns the bytes of 'bf16[4096,64]{…}', or of a tuple of such shapes."""
    found = re.findall(r"\b(\w+)\[([\d,]*)\]", shapes)
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in found
    )


def group_size(groups: str) -> int:
    """Returns the number of devices in a group of `replica_groups`, in any of XLA's notations."""
    if groups.startswith("mesh["):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        axes = re.search(r"\{('[^}]*)\}", groups)
        return (
            math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes[1])) if axes else 1
        )
    if groups.startswith("{{"):
        return groups.partition("}")[0].count(",") + 1
    return int(re.findall(r"\d+", groups)[1])
