"""Tells a plan to people and to programs."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_jax.config.run import Config
from llama_jax.plan.training import Plan

GIB = 2**30


def as_dict(plan: Plan) -> dict[str, Any]:
    """Returns all figures of a plan, in bytes, seconds and shares of 1."""
    summary: dict[str, Any] = {
        "topology": str(plan.pod),
        "chips": plan.pod.size,
        "parameters": plan.config.model.n_params,
        "tokens_per_step": plan.tokens,
        "fits": plan.fits,
        "memory": {"hbm": plan.pod.chip.hbm_gib * GIB, "needed": plan.needed, **plan.memory},
    }
    if not plan.compiler:
        return summary
    total = plan.step * plan.config.training.steps
    return summary | {
        "step_seconds": {
            "compiler": plan.compiler,
            "attention": plan.attention,
            "network": plan.network,
            "all": plan.step,
        },
        "tokens_per_second_per_chip": plan.tokens / plan.step / plan.pod.size,
        "run_days": total / 86_400,
        "run_chip_hours": total * plan.pod.size / 3600,
        "mfu_causal": plan.mfu(plan.step),
        "mfu_full": plan.mfu(plan.step, causal=False),
        "mfu_causal_compiler_alone": plan.mfu(plan.compiler),
        "mfu_causal_with_attention": plan.mfu(plan.compiler + plan.attention),
        "hfu": plan.hfu,
        "traffic": {kind: sums._asdict() for kind, sums in plan.traffic.items()},
        "compile_seconds": plan.compile_seconds,
    }


def show(plan: Plan) -> None:
    """Prints the plan as tables, on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{plan.pod}: {_first_lines(plan)}")
    memory = table("memory of a chip", "GiB", "")
    for kind, used in plan.memory.items():
        memory.add_row(kind, f"{used / GIB:.2f}", "")
    verdict = "fits in" if plan.fits else "does NOT fit in"
    memory.add_row("all", f"{plan.needed / GIB:.2f}", f"{verdict} {plan.pod.chip.hbm_gib:g} GiB")
    console.print(memory)
    if not plan.compiler:
        return
    step = table("an estimate of a step", "ms", "MFU causal", "MFU full")
    sums = [
        ("the compiler's estimate alone", plan.compiler, plan.compiler),
        ("+ attention, by a model", plan.attention, plan.compiler + plan.attention),
        ("+ network that nothing hides", plan.network, plan.step),
    ]
    for name, part, so_far in sums:
        shares = (f"{plan.mfu(so_far, causal=causal):.1%}" for causal in (True, False))
        step.add_row(name, f"{part * 1e3:,.1f}", *shares)
    step.add_row("all", f"{plan.step * 1e3:,.1f}", "", f"HFU {plan.hfu:.1%}")
    console.print(step)
    network = table("a chip sends in a step", "GB", "ms", "not hidden")
    for kind, sums in sorted(plan.traffic.items()):
        exposed = sums.exposed / sums.seconds if sums.seconds else 0.0
        figures = f"{sums.bytes / 1e9:.2f}", f"{sums.seconds * 1e3:,.1f}", f"{exposed:.0%}"
        network.add_row(kind, *figures)
    console.print(network)
    total = plan.step * plan.config.training.steps
    console.print(
        f"{plan.tokens / plan.step / plan.pod.size:,.0f} tokens/s/chip;"
        f" {plan.config.training.steps:,} steps: {total / 86_400:.1f} days,"
        f" {total * plan.pod.size / 3600:,.0f} chip-hours (compiled in"
        f" {plan.compile_seconds:.0f} s)"
    )


def ranking(plans: list[Plan]) -> None:
    """Prints several plans beside each other, in their order."""
    ways = table("ways to run", "step ms", "MFU causal", "compiler alone", "GiB", "fits")
    for plan in plans:
        config = plan.config
        shares = ("", "", "")
        if plan.compiler:
            shares = (f"{plan.step * 1e3:,.0f}",)
            shares += tuple(f"{plan.mfu(s):.1%}" for s in (plan.step, plan.compiler))
        micro = config.training.micro_batches
        name = f"{_mesh(config)}, remat {config.model.remat}, {micro} micro-batch(es)"
        fits = "yes" if plan.fits else "no"
        ways.add_row(name, *shares, f"{plan.needed / GIB:.1f}", fits)
    Console(highlight=False, soft_wrap=True).print(ways)


def _mesh(config: Config) -> str:
    sizes = (f"{axis} {size}" for axis, size in asdict(config.mesh).items() if size != 1)
    return " × ".join(sizes) or "one chip"


def _first_lines(plan: Plan) -> str:
    config = plan.config
    return (
        f"{plan.pod.size} chips, {config.model.n_params:,} parameters, {plan.tokens:,} tokens a"
        f" step in {config.training.micro_batches} micro-batch(es) of {config.data.seq_len};"
        f" mesh {_mesh(config)}, remat {config.model.remat}"
    )


def table(title: str, *columns: str) -> Table:
    """Returns an empty table whose first column has no head."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    made.add_column("")
    for column in columns:
        made.add_column(column, justify="right")
    return made
