"""Reads the schedule of a compiled program: what computes, what travels, and what waits for it."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Collective(NamedTuple):
    """An operation between devices."""

    kind: str  # all-gather, reduce-scatter, all-reduce, …
    bytes: float  # that a device sends
    devices: int  # that take part


class Event(NamedTuple):
    """What a device does next; one of the three.

    Attributes:
        cycles: it computes for so many.
        starts: it starts a collective, which is then known by `key`.
        key: of the collective that it starts, or waits for.
    """

    cycles: float = 0.0
    starts: Collective | None = None
    key: str = ""


class Traffic(NamedTuple):
    """What collectives of a kind cost a device."""

    bytes: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0  # of the seconds: those in which it waits and computes nothing


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
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}


class _Instruction(NamedTuple):
    name: str
    op: str
    operand: str
    calls: str
    cycles: float
    collective: Collective | None
    channel: str
    body: str
    condition: str
    constant: int


def events(text: str) -> list[Event]:
    """Returns what a device does in a program, in order; loops as often as they go round."""
    computations: dict[str, list[_Instruction]] = {}
    entry, inside = "", computations.setdefault("", [])
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
            inside = computations.setdefault(name, [])
            entry = name if line.startswith("ENTRY") else entry
        elif (found := _INSTRUCTION.match(line)) is not None:
            inside.append(_instruction(found))
    return list(_walk(computations, entry))


def _instruction(found: re.Match[str]) -> _Instruction:
    rest, op = found["rest"], found["op"]

    def named(pattern: re.Pattern[str]) -> str:
        match = pattern.search(rest)
        return match[1] if match else ""

    operands = rest[found.end("op") - found.start("rest") :]
    operand = re.match(r"\(%([\w.-]+)", operands)
    collective = _COLLECTIVE.match(rest) if re.match(_KINDS, op) else None
    return _Instruction(
        found["name"],
        op,
        operand[1] if operand else "",
        named(_CALLS),
        float(named(_CYCLES) or 0),
        collective and _collective(collective),
        collective["channel"] if collective else "",
        named(_BODY),
        named(_CONDITION),
        int(named(_CONSTANT) or 0),
    )


def _walk(computations: dict[str, list[_Instruction]], name: str) -> Iterator[Event]:
    """Yields the events of one computation.

    A collective that is done step by step inside of products stands in several fusions, with one
    channel: it starts with the first and is awaited with the last.
    """
    here = computations[name]
    steps = {at: _fused(computations, one) for at, one in enumerate(here) if one.op == "fusion"}
    last = {found.channel: at for at, fused in steps.items() for found in fused}
    started: set[str] = set()
    for at, one in enumerate(here):
        if one.op == "while":
            # A scan goes round until its counter is no longer less than a constant.
            trips = max((c.constant for c in computations[one.condition]), default=1)
            for _ in range(trips):
                yield from _walk(computations, one.body)
        elif one.op.endswith("-start"):
            called = [c.collective for c in computations.get(one.calls, []) if c.collective]
            for collective in called or ([one.collective] if one.collective else []):
                yield Event(starts=collective, key=one.name)
        elif one.op.endswith("-done"):
            yield Event(key=one.operand)
        elif one.collective is not None:
            yield Event(starts=one.collective, key=one.name)
            yield Event(key=one.name)
        else:
            fused = steps.get(at, [])
            for found in fused:
                if found.channel not in started:
                    yield Event(starts=found.collective, key=found.channel)
                    started.add(found.channel)
            yield Event(cycles=one.cycles)
            yield from (Event(key=c.channel) for c in fused if last[c.channel] == at)


def _fused(computations: dict[str, list[_Instruction]], fusion: _Instruction) -> list[_Instruction]:
    """Returns the collectives inside of a fusion, also of one within it."""
    found = []
    for one in computations.get(fusion.calls, []):
        found += [one] if one.collective else _fused(computations, one) if one.calls else []
    return found


def _collective(found: re.Match[str]) -> Collective:
    devices, size, kind = group_size(found["groups"]), _size(found["type"]), found["kind"]
    # A started all-gather's type holds what goes in and what comes out.
    if found["start"] and kind == "all-gather":
        size = size * devices // (devices + 1)
    if kind == "reduce-scatter":
        size *= devices
    share = 1.0 if kind == "collective-permute" else (devices - 1) / devices
    return Collective(kind, size * share * (2 if kind == "all-reduce" else 1), devices)


def traffic(
    events: list[Event], hertz: float, seconds: Callable[[Collective], float]
) -> dict[str, Traffic]:
    """Returns what each kind of collective costs, by playing the schedule.

    The network does one collective after the other, each in `seconds` of it; computation goes on
    meanwhile, until something waits for what has not arrived.

    Args:
        events: of a program.
        hertz: cycles of the device in a second.
        seconds: tells how long a collective takes alone.
    """
    totals: dict[str, Traffic] = defaultdict(Traffic)
    now = free = 0.0
    arrives: dict[str, tuple[str, float]] = {}
    for event in events:
        now += event.cycles / hertz
        if event.starts is not None:
            takes = seconds(event.starts)
            free = max(now, free) + takes
            kind = event.starts.kind
            arrives[event.key] = kind, free
            sums = totals[kind]
            totals[kind] = sums._replace(
                bytes=sums.bytes + event.starts.bytes, seconds=sums.seconds + takes
            )
        elif event.key in arrives:
            kind, at = arrives.pop(event.key)
            waits = max(0.0, at - now)
            totals[kind] = totals[kind]._replace(exposed=totals[kind].exposed + waits)
            now += waits
    return dict(totals)


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
