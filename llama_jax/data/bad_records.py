"""Counts the records of a corpus that can't be used, by kind, and lists the first of each kind."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_jax.errors import InputError

LISTED = 100  # records of each kind that a report lists
EMPTY = "empty"  # these are counted and listed, and are not an error


@dataclass(frozen=True)
class BadLimit:
    """How many bad records a corpus may have: a number, or a share of all records."""

    count: int
    share: float | None = None


def parse_bad_limit(text: str) -> BadLimit:
    """Returns the limit that a number ('10') or a percentage ('0.1%') states.

    Raises:
        InputError: it is neither.
    """
    if re.fullmatch(r"\d+", text):
        return BadLimit(int(text))
    number = re.fullmatch(r"(\d+(?:\.\d*)?)\s*%", text)
    if not number or float(number[1]) > 100:
        raise InputError(f"--max-bad {text}: write a number or a percentage, as in 10 or 0.1%")
    return BadLimit(0, float(number[1]) / 100)


@dataclass
class BadRecords:
    """The bad records of a part of a corpus.

    Args:
        limit: `add` raises above this number of records; None: it never raises.
    """

    limit: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)  # locations, by kind

    def add(self, kind: str, problem: str, locate: Callable[[], str]) -> None:
        """Counts a record.

        Args:
            kind: of the problem, in a few words.
            problem: a sentence without its subject, which says what to do.
            locate: returns file and line.

        Raises:
            InputError: the limit is exceeded.
        """
        self.counts[kind] = self.counts.get(kind, 0) + 1
        listed = self.first.setdefault(kind, [])
        if len(listed) < LISTED:
            listed.append(locate())
        if self.limit is not None and self.total > self.limit and kind != EMPTY:
            allowed = f" ({self.total:,} bad records in this part of the corpus)"
            raise InputError(
                f"{locate()}: {problem}{allowed if self.limit else ''}, or allow bad records with"
                " --max-bad"
            )

    @property
    def total(self) -> int:
        """The number of bad records; empty ones don't count."""
        return sum(n for kind, n in self.counts.items() if kind != EMPTY)

    def merge(self, other: Mapping[str, Any]) -> None:
        """Adds the records of a later part, in the form of `as_dict`."""
        for kind, n in other["counts"].items():
            self.counts[kind] = self.counts.get(kind, 0) + n
            listed = self.first.setdefault(kind, [])
            listed += other["first"][kind][: LISTED - len(listed)]

    def as_dict(self) -> dict[str, Any]:
        """Returns the counts and locations, as JSON has them."""
        return {"counts": self.counts, "first": self.first}

    def report(self) -> bytes:
        """Returns the report: a JSON object with kind and location on each line."""
        lines = (
            json.dumps({"kind": kind, "at": location}, ensure_ascii=False)
            for kind, locations in self.first.items()
            for location in locations
        )
        return "".join(line + "\n" for line in lines).encode(errors="replace")

    def describe(self) -> str:
        """Returns the counts in words."""
        return ", ".join(f"{n:,} {kind}" for kind, n in self.counts.items())

    def check(self, limit: BadLimit, records: int, report: object) -> None:
        """Compares the bad records of a complete corpus with its limit.

        Args:
            limit: what is allowed.
            records: number of all records, with the bad ones.
            report: where the list of bad records is.

        Raises:
            InputError: there are more.
        """
        allowed = limit.count if limit.share is None else int(limit.share * records)
        if self.total > allowed:
            raise InputError(
                f"{self.total:,} of {records:,} records of the corpus are bad ({self.describe()}),"
                f" and --max-bad allows {allowed:,}: correct or remove those that {report}"
                " lists, or raise --max-bad"
            )
