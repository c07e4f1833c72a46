"""Reports a serving plan as tables and as a dict for JSON."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_jax.plan.calibration import Calibration, calibration_of
from llama_jax.plan.program_time import ProgramTime
from llama_jax.plan.serving import InferencePlan, decode_step_bytes
from llama_jax.plan.training_report import GIB, NOTE_ON_GPUS, empty_table, finite, gib


def as_dict(plan: InferencePlan) -> dict[str, Any]:
    """Returns all figures of a plan, in bytes, seconds and shares of 1; None where unknown."""
    memory = {
        "hbm": plan.pod.chip.hbm_gib * GIB,
        "usable": plan.usable_bytes,
        "needed": finite(plan.needed_bytes),
        **plan.weights._asdict(),
        "cache": plan.cache_bytes,
        "decode_temporaries": finite(plan.decode_temporary_bytes),
        "prefill": plan.prefill_bytes,
    }
    chips, calibration = plan.pod.n_chips, calibration_of(plan.pod.chip_name, "decoding")
    return {
        "topology": str(plan.pod),
        "chips": chips,
        "parameters": plan.config.n_params,
        "context": plan.context,
        "batch": plan.batch,
        "fits": plan.fits,
        "memory": memory,
        "largest_batch": plan.largest_batch,
        "largest_cache_tokens": plan.largest_cache_tokens,
        "largest_batch_needed": plan.largest_batch_bytes,
        "largest_context": plan.largest_context,
        "decode": [
            {
                "batch": batch,
                **_time_as_dict(time),
                "corrected": calibration.as_dict(time.estimate),
                "tokens_per_second": plan.tokens_per_second(batch),
                "tokens_per_second_per_chip": plan.tokens_per_second(batch) / chips,
            }
            for batch, time in plan.decode_times.items()
        ],
        "prefill": plan.prefill_time
        and {
            **_time_as_dict(plan.prefill_time),
            "tokens_per_second": _prefill_tokens_per_second(plan, plan.prefill_time),
            "mfu": plan.prefill_mfu,
        },
    }


def show(plan: InferencePlan) -> None:
    """Prints the plan as tables, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(_headline(plan))
    console.print(_memory_table(plan))
    if plan.prefill_bytes is None:
        console.print(f"no program fits that prefills {plan.context:,} tokens in one piece")
    if not plan.largest_batch:
        console.print(
            "not a single row of this context fits: take more chips, or a shorter context"
        )
        return
    console.print(
        f"the largest batch of this context: {plan.largest_batch} row(s), which is a cache of"
        f" {plan.largest_cache_tokens:,} tokens (serve --cache-tokens), compiled, in"
        f" {plan.largest_batch_bytes / GIB:.2f} GiB; the longest row alone: about"
        f" {plan.largest_context:,} tokens, by arithmetic"
    )
    if plan.pod.chip.gpu:
        console.print(_least_times(plan))
        console.print(NOTE_ON_GPUS)
        return
    speeds = empty_table(
        "a step, ms", "estimate", "roofline", "bound by", "tokens/s", "a chip", "MFU"
    )
    parts = empty_table("its parts, ms", "memory", "compute", "network", "cycles", "compiler")
    for batch, time in plan.decode_times.items():
        name, rate = f"decode, batch {batch}", plan.tokens_per_second(batch)
        speeds.add_row(name, *_speed_cells(plan, time, rate), "")
        parts.add_row(name, *map(_ms, asdict(time).values()))
    if (time := plan.prefill_time) is not None:
        name, rate = f"prefill {plan.context:,} tokens", _prefill_tokens_per_second(plan, time)
        speeds.add_row(name, *_speed_cells(plan, time, rate), f"{plan.prefill_mfu:.1%}")
        parts.add_row(name, *map(_ms, asdict(time).values()))
    console.print(speeds)
    console.print(parts)
    calibration = calibration_of(plan.pod.chip_name, "decoding")
    if calibration.compared:
        console.print(_corrected_table(plan, calibration))
    console.print(calibration.describe())


def _headline(plan: InferencePlan) -> str:
    """Returns the model, its dtypes and the way it is split, in one line."""
    config, n_slices = plan.config, plan.pod.n_slices
    chips = f"{plan.pod.chips_per_slice} chips"
    chips += f", in each of {n_slices} slices" if n_slices > 1 else ""
    cache = config.dtype if config.cache_dtype == "same" else config.cache_dtype
    return (
        f"{plan.pod}: {config.n_params:,} parameters in {config.weight_dtype}, each layer split"
        f" over {chips}; {plan.batch} row(s) of {plan.context:,} tokens, cache in {cache}"
    )


def _memory_table(plan: InferencePlan) -> Table:
    memory = empty_table(f"memory of a {plan.pod.device_name}", "GiB", "")
    for kind, used in plan.weights._asdict().items():
        memory.add_row(f"weights: {kind}", gib(used), "")
    memory.add_row(f"KV cache, {plan.batch} row(s)", gib(plan.cache_bytes), "")
    memory.add_row("temporaries of decoding", gib(plan.decode_temporary_bytes), "")
    memory.add_row("or of prefill", gib(plan.prefill_bytes), "")
    verdict = "fits in" if plan.fits else "does NOT fit in"
    available = f"{verdict} {plan.pod.chip.usable_hbm_gib:g} for a program"
    memory.add_row("sum, with the larger of both", gib(plan.needed_bytes), available)
    return memory


def _least_times(plan: InferencePlan) -> Table:
    """Returns the time of decode steps that only read weights and cache, all slots in use."""
    table = empty_table("a step takes at least", "ms", "tokens/s at most")
    for batch in sorted({1, plan.batch, plan.largest_batch}):
        seconds = decode_step_bytes(plan, batch) / (plan.pod.chip.hbm_gb_per_s * 1e9)
        rate = batch * plan.pod.n_slices / seconds
        table.add_row(f"decode, batch {batch}", _ms(seconds), f"{rate:,.0f}")
    return table


def _corrected_table(plan: InferencePlan, calibration: Calibration) -> Table:
    """Returns the corrected times of the decode steps, with their range."""
    table = empty_table("corrected by measured runs", "ms", "range", "tokens/s", "a chip")
    for batch, time in plan.decode_times.items():
        corrected = calibration.correct(time.estimate)
        assert corrected is not None
        has_range = len(calibration.compared) > 1
        interval = f"{_ms(corrected.fastest)} … {_ms(corrected.slowest)}" if has_range else "?"
        rate = plan.tokens_per_second(batch) * time.estimate / corrected.seconds
        per_chip = rate / plan.pod.n_chips
        cells = _ms(corrected.seconds), interval, f"{rate:,.0f}", f"{per_chip:,.1f}"
        table.add_row(f"decode, batch {batch}", *cells)
    return table


def _speed_cells(plan: InferencePlan, time: ProgramTime, rate: float) -> tuple[str, ...]:
    """Returns estimate, roofline, bound, tokens per second, and tokens per second of a chip."""
    per_chip = rate / plan.pod.n_chips
    return _ms(time.estimate), _ms(time.roofline), time.bound, f"{rate:,.0f}", f"{per_chip:,.1f}"


def _prefill_tokens_per_second(plan: InferencePlan, time: ProgramTime) -> float:
    return plan.context * plan.pod.n_slices / time.estimate


def _time_as_dict(time: ProgramTime) -> dict[str, Any]:
    return {
        "seconds": time.estimate,
        "roofline_seconds": time.roofline,
        "bound": time.bound,
        "parts": asdict(time),
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"
