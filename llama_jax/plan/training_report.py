"""Reports a training plan as tables and as a dict for JSON."""

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_jax.config.run import Config
from llama_jax.plan.calibration import Calibration, calibration_of
from llama_jax.plan.training import TrainingPlan

GIB = 2**30
NOTE_ON_GPUS = (
    "JAX takes 75 % of a GPU's memory: set XLA_PYTHON_CLIENT_MEM_FRACTION=0.92, of which this plan"
    " assumes that a program can use all. XLA has no estimates of time for GPUs."
)


def as_dict(plan: TrainingPlan) -> dict[str, Any]:
    """Returns all figures of a plan, in bytes, seconds and shares of 1; None where unknown."""
    memory = {"hbm": plan.pod.chip.hbm_gib * GIB, "needed": plan.needed_bytes, **plan.memory}
    summary: dict[str, Any] = {
        "topology": str(plan.pod),
        "chips": plan.pod.n_chips,
        "parameters": plan.config.model.n_params,
        "tokens_per_step": plan.tokens_per_step,
        "fits": plan.fits,
        "memory": {kind: finite(used) for kind, used in memory.items()},
    }
    if not plan.compiler_seconds:
        return summary
    run_seconds = plan.step_seconds * plan.config.training.steps
    return summary | {
        "step_seconds": {
            "compiler": plan.compiler_seconds,
            "attention": plan.attention_seconds,
            "network": plan.exposed_seconds,
            "all": plan.step_seconds,
        },
        "tokens_per_second_per_chip": plan.tokens_per_second_per_chip(plan.step_seconds),
        "run_days": run_seconds / 86_400,
        "run_chip_hours": plan.chip_hours(plan.step_seconds),
        "mfu_causal": plan.mfu(plan.step_seconds),
        "mfu_full": plan.mfu(plan.step_seconds, causal=False),
        "mfu_causal_compiler_alone": plan.mfu(plan.compiler_seconds),
        "mfu_causal_with_attention": plan.mfu(plan.compiler_seconds + plan.attention_seconds),
        "hfu": plan.hfu,
        "corrected": _calibration(plan).as_dict(plan.step_seconds),
        "traffic": {kind: total._asdict() for kind, total in plan.traffic.items()},
        "compile_seconds": plan.compile_seconds,
    }


def show(plan: TrainingPlan) -> None:
    """Prints the plan as tables, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(_headline(plan))
    memory = empty_table(f"memory of a {plan.pod.device_name}", "GiB", "")
    for kind, used in plan.memory.items():
        memory.add_row(kind, gib(used), "")
    verdict = "fits in" if plan.fits else "does NOT fit in"
    capacity = f"{verdict} {plan.capacity_bytes / GIB:g} GiB"
    memory.add_row("all", gib(plan.needed_bytes), capacity)
    console.print(memory)
    if not plan.compiler_seconds:
        if plan.pod.chip.gpu:
            console.print(NOTE_ON_GPUS)
        return
    console.print(_step_table(plan))
    console.print(_network_table(plan))
    run_seconds = plan.step_seconds * plan.config.training.steps
    console.print(
        f"{plan.tokens_per_second_per_chip(plan.step_seconds):,.0f} tokens/s/chip;"
        f" {plan.config.training.steps:,} steps: {run_seconds / 86_400:.1f} days,"
        f" {plan.chip_hours(plan.step_seconds):,.0f} chip-hours (compiled in"
        f" {plan.compile_seconds:.0f} s)"
    )
    calibration = _calibration(plan)
    if calibration.compared:
        console.print(_corrected_table(plan, calibration))
    console.print(calibration.describe())


def show_ranking(plans: list[TrainingPlan]) -> None:
    """Prints a table of several plans, in the given order."""
    table = empty_table("ways to run", "step ms", "MFU causal", "compiler alone", "GiB", "fits")
    for plan in plans:
        config = plan.config
        times = ("", "", "")
        if plan.compiler_seconds:
            times = (
                f"{plan.step_seconds * 1e3:,.0f}",
                f"{plan.mfu(plan.step_seconds):.1%}",
                f"{plan.mfu(plan.compiler_seconds):.1%}",
            )
        micro_batches = config.training.micro_batches
        name = f"{_mesh(config)}, remat {config.model.remat}, {micro_batches} micro-batch(es)"
        fits = "yes" if plan.fits else "no"
        table.add_row(name, *times, gib(plan.needed_bytes, 1), fits)
    Console(highlight=False, soft_wrap=True).print(table)


def empty_table(title: str, *columns: str) -> Table:
    """Returns a table without rows; its first column has no heading."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def finite(number: float) -> float | None:
    """Returns a number for JSON; None if it is infinite, which means unknown."""
    return number if math.isfinite(number) else None


def gib(used: float | None, digits: int = 2) -> str:
    """Returns a number of bytes in GiB; '?' if it is unknown: None or infinite."""
    return "?" if used is None or math.isinf(used) else f"{used / GIB:.{digits}f}"


def _headline(plan: TrainingPlan) -> str:
    """Returns the pod, the batch and the mesh in one line."""
    config, micro_batches = plan.config, plan.config.training.micro_batches
    pairs = f" beside {config.lora.n_params(config.model):,} trained ones" if config.lora else ""
    return (
        f"{plan.pod}: {plan.pod.n_chips} chips, {config.model.n_params:,} parameters{pairs},"
        f" {plan.tokens_per_step:,} tokens a step in {micro_batches} micro-batch(es)"
        f" of {config.data.seq_len}; mesh {_mesh(config)}, remat {config.model.remat}"
    )


def _step_table(plan: TrainingPlan) -> Table:
    """Returns the parts of a step's time, with the MFU of the parts so far."""
    table = empty_table("an estimate of a step", "ms", "MFU causal", "MFU full")
    total = 0.0
    for name, seconds in (
        ("the compiler's estimate alone", plan.compiler_seconds),
        ("+ attention, modelled", plan.attention_seconds),
        ("+ exposed communication", plan.exposed_seconds),
    ):
        total += seconds
        causal, full = f"{plan.mfu(total):.1%}", f"{plan.mfu(total, causal=False):.1%}"
        table.add_row(name, f"{seconds * 1e3:,.1f}", causal, full)
    table.add_row("all", f"{plan.step_seconds * 1e3:,.1f}", "", f"HFU {plan.hfu:.1%}")
    return table


def _calibration(plan: TrainingPlan) -> Calibration:
    return calibration_of(plan.pod.chip_name, "training")


def _corrected_table(plan: TrainingPlan, calibration: Calibration) -> Table:
    """Returns the corrected step time and its range, with MFU and cost."""
    table = empty_table(
        "corrected by measured runs", "s", "MFU causal", "tokens/s/chip", "chip-hours"
    )
    corrected = calibration.correct(plan.step_seconds)
    assert corrected is not None
    rows = {"the mean of the runs": corrected.seconds}
    if len(calibration.compared) > 1:
        rows |= {"the fastest": corrected.fastest, "the slowest": corrected.slowest}
    for name, seconds in rows.items():
        table.add_row(
            name,
            f"{seconds:,.2f}",
            f"{plan.mfu(seconds):.0%}",
            f"{plan.tokens_per_second_per_chip(seconds):,.0f}",
            f"{plan.chip_hours(seconds):,.0f}",
        )
    return table


def _network_table(plan: TrainingPlan) -> Table:
    """Returns bytes, time and exposed share of each kind of collective."""
    table = empty_table(f"a {plan.pod.device_name} sends in a step", "GB", "ms", "exposed")
    for kind, total in sorted(plan.traffic.items()):
        exposed = total.exposed / total.seconds if total.seconds else 0.0
        table.add_row(
            kind, f"{total.bytes / 1e9:.2f}", f"{total.seconds * 1e3:,.1f}", f"{exposed:.0%}"
        )
    return table


def _mesh(config: Config) -> str:
    sizes = (f"{axis} {size}" for axis, size in asdict(config.mesh).items() if size != 1)
    return " × ".join(sizes) or "one chip"
