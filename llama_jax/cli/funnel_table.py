"""The funnel of each prepared source as a table: what every rule removed."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(funnels: Mapping[str, Any]) -> None:
    """Prints the tables on standard output.

    Args:
        funnels: the content of each `funnel.json`, by the name of the source.
    """
    # A cell is never wrapped: the lines are as long as they must be.
    console = Console(highlight=False, soft_wrap=True, markup=False, width=200)
    for name, funnel in funnels.items():
        first = funnel["rules"][0]
        console.print(
            f"{name} ({funnel['entry']['kind']}, {funnel['files']:,} files):"
            f" {funnel['documents']:,} of {first['documents']:,} documents,"
            f" {funnel['characters']:,} of {first['characters']:,} characters remain"
        )
        table = Table(box=None, pad_edge=False, header_style="")
        for column in ("  rule", "documents", "removed", "", "changed", "removed characters", ""):
            table.add_column(column, justify="left" if "rule" in column else "right")
        for row in funnel["rules"]:
            table.add_row(
                f"  {row['rule']}",
                f"{row['documents']:,}",
                f"{row['removed_documents']:,}",
                _share(row["removed_documents"], row["documents"]),
                f"{row['changed_documents']:,}",
                f"{row['removed_characters']:,}",
                _share(row["removed_characters"], row["characters"]),
            )
        console.print(table)
        for row in funnel["rules"]:
            if "report" in row:
                console.print(_evaluation_table(row["report"]))


def _evaluation_table(report: list[dict[str, Any]]) -> Table:
    """Returns the items of evaluation sets that decontamination found."""
    table = Table(box=None, pad_edge=False, header_style="")
    columns = ("  evaluation set", "items", "too short to find", "found", "in documents")
    for column in columns:
        table.add_column(column, justify="left" if "set" in column else "right")
    for row in report:
        counts = (row[key] for key in ("items", "too_short", "found", "documents"))
        table.add_row(f"  {row['set']}", *(f"{count:,}" for count in counts))
    return table


def _share(part: int, total: int) -> str:
    return f"{part / total:.2%}" if total else ""
