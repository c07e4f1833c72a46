"""Compares estimates of published runs with their measured times, to correct a plan's estimate.

`published_runs.yaml` lists runs that others measured. The estimate of a run is of the very program
that was measured, by the method of `plan` (`benchmarks/calibrate.py` computes it).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from llama_jax.plan import topology


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run that others measured, and the estimate of its program.

    Attributes:
        name: model, dtype and batch.
        program: whose program ran.
        work: kind of work: 'training' or 'decoding'.
        pod: topology on which it ran, as in `topology.parse`.
        measured: time of a step [s].
        source: where the measurement was published, with the versions that ran.
        estimated: estimate of a step of the same program [s]; None if it was not computed.
        estimated_with: program, JAX and libtpu that were compiled for the estimate; the reason if
            there is none.
        command: computes the estimate again; empty if it was not computed.
    """

    name: str
    program: str
    work: str
    pod: str
    measured: float
    source: str
    estimated: float | None = None
    estimated_with: str
    command: str = ""

    @property
    def chip_name(self) -> str:
        """Generation of the chips: key of `PLANNABLE_CHIPS`."""
        return topology.parse(self.pod).chip_name

    @property
    def factor(self) -> float | None:
        """Estimate over measurement; None if the estimate was not computed."""
        return None if self.estimated is None else self.estimated / self.measured


class Corrected(NamedTuple):
    """A time that was corrected by published runs [s].

    Attributes:
        seconds: the estimate, divided by the mean factor.
        fastest: the estimate, divided by the largest factor of a run.
        slowest: the estimate, divided by the smallest factor of a run.
    """

    seconds: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Calibration:
    """Published runs of one kind of work on one generation of chips.

    Attributes:
        chip_name: generation of the chips.
        work: kind of work.
        runs: published runs, with or without an estimate.
    """

    chip_name: str
    work: str
    runs: tuple[PublishedRun, ...]

    @property
    def compared(self) -> list[PublishedRun]:
        """The runs whose estimate was computed."""
        return [run for run in self.runs if run.estimated is not None]

    @property
    def factors(self) -> list[float]:
        """Estimate over measurement of each compared run, in increasing order."""
        return sorted(run.factor for run in self.compared if run.factor is not None)

    @property
    def factor(self) -> float | None:
        """Geometric mean of the factors; None if there is no compared run."""
        factors = self.factors
        return math.exp(sum(map(math.log, factors)) / len(factors)) if factors else None

    def correct(self, seconds: float) -> Corrected | None:
        """Returns the corrected estimate and its range; None if there is no compared run.

        The range has no width if there is one compared run: the spread of the factors is unknown.
        """
        factors, mean = self.factors, self.factor
        if mean is None:
            return None
        return Corrected(seconds / mean, seconds / factors[-1], seconds / factors[0])

    def describe(self) -> str:
        """Returns a sentence: from how many runs the correction comes, and their factors."""
        kind = f"{self.chip_name} {self.work}"
        compared, factors = self.compared, self.factors
        if not compared:
            published = f"{len(self.runs)} published" if self.runs else "no published"
            return (
                f"not corrected: no estimate of a measured run of {kind} is known ({published}),"
                " so the error of this estimate is unknown"
            )
        programs = " and ".join(sorted({run.program for run in compared}))
        if len(compared) == 1:
            return (
                f"corrected by one measured run of {kind} ({programs}), whose estimate is"
                f" {factors[0]:.2f} of its measured time; one run shows no range"
            )
        return (
            f"corrected by {len(compared)} measured runs of {kind} ({programs}), whose estimates"
            f" are {factors[0]:.2f} to {factors[-1]:.2f} of their measured times; the range is"
            " that of these runs, not a bound"
        )

    def as_dict(self, seconds: float) -> dict[str, Any]:
        """Returns the correction of an estimate for JSON; None where it is unknown."""
        corrected = self.correct(seconds)
        has_range = len(self.compared) > 1
        return {
            "seconds": corrected and corrected.seconds,
            "range": [corrected.fastest, corrected.slowest] if corrected and has_range else None,
            "factor": self.factor,
            "factors": {f"{run.program}: {run.name}": run.factor for run in self.compared},
            "runs": len(self.compared),
            "runs_without_estimate": len(self.runs) - len(self.compared),
        }


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    """Returns all runs of `published_runs.yaml`."""
    text = (files("llama_jax.plan") / "published_runs.yaml").read_text()
    return tuple(PublishedRun(**entry) for entry in yaml.safe_load(text))


def calibration_of(
    chip_name: str, work: str, runs: Sequence[PublishedRun] | None = None
) -> Calibration:
    """Returns the published runs of a kind of work on a generation of chips.

    Args:
        runs: instead of `published_runs`.
    """
    runs = published_runs() if runs is None else runs
    selected = (run for run in runs if run.chip_name == chip_name and run.work == work)
    return Calibration(chip_name, work, tuple(selected))
