"""What a benchmark found, for people and for `python -m benchmarks`."""

import argparse
import json
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """Ours beside a peer's or a physical limit's in the same run; more is better."""

    what: str
    unit: str
    ours: float
    against: str
    theirs: float
    ratio: float  # of pairs where sides worked in turn: not always that of the two medians
    note: str = ""


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `keep` wants."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to FILE too")


def keep(file: Path | None, result: Result) -> None:
    """Appends a result to the file that was asked for."""
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(result._asdict()) + "\n")
