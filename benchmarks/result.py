"""The result of a benchmark, as a line of JSON for `python -m benchmarks`."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """Our rate and that of a peer, or of a physical limit, in the same run. More is better.

    Attributes:
        name: the benchmark and its settings.
        unit: of both rates.
        ours: our rate.
        peer: name of the peer or of the limit.
        theirs: its rate.
        ratio: ours / theirs. Sides that alternate report the median over the pairs of rounds, which
            differs from the ratio of the medians.
        note: details for the last column of the table.
    """

    name: str
    unit: str
    ours: float
    peer: str
    theirs: float
    ratio: float
    note: str = ""


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds --json FILE, whose value is passed to `append_result`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to FILE too")


def append_result(file: Path | None, result: Result) -> None:
    """Appends a result to `file` as a line of JSON; does nothing where `file` is None."""
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(result._asdict()) + "\n")
