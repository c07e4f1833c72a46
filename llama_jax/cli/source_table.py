"""The use of each source of a run as a table and as a dict for JSON. Imports no JAX."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_jax.config.run import Config
from llama_jax.data.source_use import SourceUse, describe_excess, describe_phases
from llama_jax.runtime.console import print_status


def as_dict(config: Config, uses: Sequence[SourceUse], done: int | None) -> dict[str, Any]:
    """Returns the use of each source, in tokens and bytes, by folder.

    Args:
        config: of the run.
        uses: of all sources.
        done: steps done; None: the run has not started.
    """
    T, samples = config.data.seq_len, sum(use.drawn for use in uses)
    sources = {
        use.folder: {
            "share": use.drawn / samples,
            "tokens": use.tokens,
            "drawn_tokens": use.drawn * T,
            "epochs": use.epochs,
            "max_epochs": use.max_epochs,
            "bytes": use.n_bytes,
            "planned": use.is_planned,
            "drawn_tokens_so_far": None if done is None else use.drawn_so_far * T,
        }
        for use in uses
    }
    return {"steps": config.training.steps, "steps_done": done, "sources": sources}


def show(config: Config, uses: Sequence[SourceUse], done: int | None) -> None:
    """Prints the table on standard output, and warnings on standard error."""
    T, steps = config.data.seq_len, config.training.steps
    table = Table(box=None, pad_edge=False, header_style="", show_footer=True, footer_style="")
    samples = sum(use.drawn for use in uses)
    sizes = [use.n_bytes for use in uses]
    columns = {
        "": [("* " if use.is_planned else "") + use.folder for use in uses] + ["all"],
        "share": [f"{use.drawn / samples:.2%}" for use in uses] + ["100.00%"],
        "tokens": [_short(use.tokens) for use in uses] + [_short(sum(u.tokens for u in uses))],
        "drawn": [_short(use.drawn * T) for use in uses] + [_short(samples * T)],
        "epochs": [f"{use.epochs:.2f}" for use in uses] + [""],
        "text": [_short(n, "B") for n in sizes] + [_short(_sum(sizes), "B")],
        "bytes/token": [f"{use.n_bytes / use.tokens:.2f}" if use.n_bytes else "" for use in uses]
        + [""],
    }
    if done is not None:
        columns["drawn so far"] = [f"{use.drawn_so_far * T:,}" for use in uses]
        columns["drawn so far"].append(f"{done * config.data.batch_size * T:,}")
        columns["epochs so far"] = [f"{use.drawn_so_far / use.windows:.2f}" for use in uses] + [""]
    for name, cells in columns.items():
        table.add_column(name, cells[-1], justify="right" if name else "left")
    for row in zip(*(cells[:-1] for cells in columns.values()), strict=True):
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{steps:,} steps of {config.data.batch_size * T:,} tokens"
        + ("" if done is None else f"; {done:,} steps are saved")
    )
    console.print(table)
    for line in describe_phases(config.data):
        console.print(line)
    if any(use.is_planned for use in uses):
        console.print("* does not exist yet: the sizes are those that data.mixture states")
    for use in uses:
        if use.exceeds_limit:
            print_status(f"warning: {describe_excess(use)}")


def _sum(sizes: Sequence[int | None]) -> int | None:
    known = [n for n in sizes if n is not None]
    return sum(known) if len(known) == len(sizes) else None


def _short(n: int | None, unit: str = "") -> str:
    """Returns a number in four digits: 852,741,000,000 as '852.7 G'."""
    if n is None:
        return ""
    for scale, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= scale:
            return f"{n / scale:.4g} {prefix}{unit}"
    return f"{n} {unit}"
