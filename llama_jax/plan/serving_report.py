"""Tells a plan of serving to people and to programs."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_jax.plan.serving import InferencePlan, Time
from llama_jax.plan.training_report import GIB, table


def as_dict(plan: InferencePlan) -> dict[str, Any]:
    """Returns all figures of a plan, in bytes, seconds and shares of 1; None where unknown."""
    memory = {
        "hbm": plan.pod.chip.hbm_gib * GIB,
        "usable": plan.usable,
        "needed": _finite(plan.needed),
        **plan.weights._asdict(),
        "cache": plan.cache,
        "decode_temporaries": _finite(plan.decode_temporaries),
        "prefill": plan.prefill_room,
    }
    chips = plan.pod.size
    return {
        "topology": str(plan.pod),
        "chips": chips,
        "parameters": plan.parameters,
        "context": plan.context,
        "batch": plan.batch,
        "fits": plan.fits,
        "memory": memory,
        "largest_batch": plan.largest_batch,
        "largest_batch_needed": plan.largest_peak,
        "largest_context": plan.largest_context,
        "decode": [
            {
                "batch": batch,
                **_times(time),
                "tokens_per_second": plan.tokens_per_second(batch),
                "tokens_per_second_per_chip": plan.tokens_per_second(batch) / chips,
            }
            for batch, time in plan.decode.items()
        ],
        "prefill": plan.prefill
        and {
            **_times(plan.prefill),
            "tokens_per_second": plan.context * plan.pod.slices / plan.prefill.estimate,
            "mfu": plan.prefill_mfu,
        },
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _times(time: Time) -> dict[str, Any]:
    return {
        "seconds": time.estimate,
        "roofline_seconds": time.roofline,
        "bound": time.bound,
        "parts": time._asdict(),
    }


def show(plan: InferencePlan) -> None:
    """Prints the plan as tables, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    chip, slices = plan.pod.chip, plan.pod.slices
    over = f"{plan.pod.size // slices} chips" + (f", in each of {slices} slices" * (slices > 1))
    config = plan.config
    kind = config.param_dtype if config.quantized == "none" else config.quantized
    console.print(
        f"{plan.pod}: {plan.parameters:,} parameters in {kind}, each layer"
        f" split over {over}; {plan.batch} row(s) of {plan.context:,} tokens, cache in"
        f" {config.dtype if config.cache_dtype == 'same' else config.cache_dtype}"
    )
    memory = table("memory of a chip", "GiB", "")
    for kind, used in (
        *(("weights: " + kind, used) for kind, used in plan.weights._asdict().items()),
        (f"keys and values, {plan.batch} row(s)", plan.cache),
        ("temporaries of decoding", plan.decode_temporaries),
        ("or, while a prompt is read", plan.prefill_room),
    ):
        memory.add_row(kind, _gib(used), "")
    verdict = "fits in" if plan.fits else "does NOT fit in"
    room = f"{verdict} {chip.usable_hbm_gib:g} for a program"
    memory.add_row("all, the larger of both", _gib(plan.needed), room)
    console.print(memory)
    if plan.prefill is None:
        console.print(f"no program that reads {plan.context:,} tokens in one piece fits")
    if not plan.largest_batch:
        console.print("not one row of this context fits: take more chips, or a shorter context")
        return
    console.print(
        f"the largest batch of this context: {plan.largest_batch} row(s), compiled, in"
        f" {plan.largest_peak / GIB:.2f} GiB; the longest row alone: about"
        f" {plan.largest_context:,} tokens, by arithmetic"
    )
    speeds = table("a step, ms", "estimate", "roofline", "its bound", "tokens/s", "a chip", "MFU")
    parts = table("its parts, ms", "memory", "compute", "network", "cycles", "compiler")
    for batch, time in plan.decode.items():
        rate = plan.tokens_per_second(batch)
        _add(speeds, parts, f"decode, batch {batch}", time, rate, rate / plan.pod.size, "")
    if plan.prefill is not None:
        rate = plan.context * slices / plan.prefill.estimate
        name, mfu = f"read {plan.context:,} tokens", f"{plan.prefill_mfu:.1%}"
        _add(speeds, parts, name, plan.prefill, rate, rate / plan.pod.size, mfu)
    console.print(speeds)
    console.print(parts)


def _add(speeds: Table, parts: Table, name: str, time: Time, rate: float, each: float, mfu: str):
    rates = f"{rate:,.0f}", f"{each:,.1f}"
    speeds.add_row(name, _ms(time.estimate), _ms(time.roofline), time.bound, *rates, mfu)
    parts.add_row(name, *map(_ms, time))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _gib(used: float | None) -> str:
    return "?" if used is None or math.isinf(used) else f"{used / GIB:.2f}"
