"""Which source each sample of a mixture comes from, as a pure function of the sample's number.

Each source has an arc of a circle, as long as its share of the mixture. Sample n is at the point
n·α [turns] and comes from the source whose arc contains the point. α = c/W + ε, with W = 10,000 and
c coprime to W, so W consecutive samples are at the W-th parts of the circle, each displaced by less
than W·ε. An arc of share p therefore contains more than Wp - 1 - W²ε and less than Wp + 1 + W²ε of
them. W²ε is at most the distance of each Wp that is no integer to the nearest one (but see
`_SLOWEST`), so **of any 10,000 consecutive samples, each source has Wp, rounded up or down**. If Wp
is an integer, it is Wp or one sample more or less; if all are integers, ε is 0, and it is Wp.

All numbers are integers: c/W and ε in units of 1 / `_CIRCLE` turns.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from llama_jax.config.data import DataConfig

WINDOW = 10_000  # W
_CIRCLE = WINDOW << 96  # one turn; an arc is rounded to a sample in 10³² or less
# c, turns in W samples. c/W is near the golden ratio, and its partial quotients are at most 3: the
# shares of shorter runs of samples are nearly as even.
_TURNS = 6_181
# The least W²ε. A source has ⌊Wp⌋ samples in many windows, then ⌈Wp⌉ in many: that repeats after
# 1 / W²ε windows. If a Wp is closer to an integer than this, its source may have Wp ± 1.001.
# Otherwise a source of share 1e-12 would make the shares of the others wrong for 1e12 samples.
_SLOWEST = Fraction(1, 1024)
# With ε = 1 / (W²x + W·q), where c/W has the convergents …, p/q, c/W, x continues the continued
# fraction of c/W. After an integer, x has the quotients of the golden ratio, which are all 1.
_TAIL = Fraction("0.618033988749894848204586834366") + Fraction(pow(-_TURNS, -1, WINDOW), WINDOW)


class Mixture:
    """An endless sequence of sources in exact shares.

    The number of samples of a source among the first n differs from its share of n by less than 10
    + 1 / 4W²ε: by a few, or by 266 if a W·p is close to an integer.

    Args:
        weights: of each source, positive. A float is taken for the decimal number that it prints
            as: 0.1 is a tenth.

    Attributes:
        shares: of each source; their sum is 1.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        ends = itertools.accumulate(self.shares, initial=Fraction(0))
        self._bounds = [round(_CIRCLE * end) for end in ends]
        self._step = math.floor(_CIRCLE * (_TURNS + self._drift() / WINDOW) / WINDOW)

    def _drift(self) -> Fraction:
        """Returns W²ε."""
        rests = [WINDOW * share % 1 for share in self.shares]
        distances = [min(rest, 1 - rest) for rest in rests if rest]
        if not distances:
            return Fraction(0)
        return 1 / (math.ceil(1 / max(min(distances), _SLOWEST) - _TAIL) + _TAIL)

    def source(self, n: int) -> int:
        """Returns the index of the source of sample n."""
        return bisect.bisect_right(self._bounds, n * self._step % _CIRCLE) - 1

    def drawn(self, n: int) -> list[int]:
        """Returns the number of samples of each source among the first n, without a scan."""
        below = [self._count_below(bound, n) for bound in self._bounds]
        return [after - before for before, after in itertools.pairwise(below)]

    def _count_below(self, bound: int, n: int) -> int:
        """Returns how many of the first n points are below `bound`."""
        # ⌊x / C⌋ - ⌊(x - bound) / C⌋ is 1 if x mod C < bound, otherwise 0.
        step = self._step
        return _floor_sum(n, _CIRCLE, step, 0) - _floor_sum(n, _CIRCLE, step, -bound)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Returns the sum of ⌊(a·i + b) / m⌋ over 0 ≤ i < n, in O(log m) as Euclid's algorithm."""
    total = 0
    while True:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        n, b = divmod(a * n + b, m)
        if n == 0:
            return total
        a, m = m, a


class Draw(NamedTuple):
    """The origin of a sample."""

    source: int  # index of the source
    number: int  # of the sample among those of its source, from 0


class _Phase(NamedTuple):
    """A part of the samples with one mixture."""

    first: int  # sample
    mixture: Mixture
    sources: list[int]  # of the mixture
    drawn: list[int]  # samples of each source before this phase


_first = operator.attrgetter("first")


class MixtureSchedule:
    """The origin of each sample, where the mixture changes at given samples.

    A source continues in each phase where it was: its samples are numbered through all phases.

    Args:
        phases: the weights of the sources by name, by the first sample of the phase. One starts
            with sample 0.

    Attributes:
        names: of all sources, in the order in which the phases name them.
    """

    def __init__(self, phases: Mapping[int, Mapping[str, float]]):
        self.names = list(dict.fromkeys(n for first in sorted(phases) for n in phases[first]))
        self._phases = list[_Phase]()
        drawn = [0] * len(self.names)
        for first in sorted(phases):
            if self._phases:
                drawn = self.drawn(first)
            sources = [self.names.index(name) for name in phases[first]]
            mixture = Mixture([*phases[first].values()])
            self._phases.append(_Phase(first, mixture, sources, drawn))

    def drawn(self, n: int) -> list[int]:
        """Returns the number of samples of each source among the first n."""
        phase = self._phase(max(n - 1, 0))
        drawn = [*phase.drawn]
        counts = phase.mixture.drawn(n - phase.first)
        for source, count in zip(phase.sources, counts, strict=True):
            drawn[source] += count
        return drawn

    def shares(self, n: int) -> dict[int, Fraction]:
        """Returns each source's share in the mixture of sample n; 0: only an earlier one has it."""
        shares = dict[int, Fraction]()
        for phase in self._phases[: bisect.bisect_right(self._phases, n, key=_first)]:
            shares = dict.fromkeys([*shares, *phase.sources], Fraction(0))
            shares |= zip(phase.sources, phase.mixture.shares, strict=True)
        return shares

    def draw(self, first: int, count: int) -> list[Draw]:
        """Returns the origins of samples [first, first + count)."""
        numbers, draws = self.drawn(first), list[Draw]()
        for n in range(first, first + count):
            phase = self._phase(n)
            source = phase.sources[phase.mixture.source(n - phase.first)]
            draws.append(Draw(source, numbers[source]))
            numbers[source] += 1
        return draws

    def _phase(self, n: int) -> _Phase:
        return self._phases[bisect.bisect_right(self._phases, n, key=_first) - 1]


def open_schedule(config: DataConfig) -> MixtureSchedule:
    """Returns the origin of each sample of a run; a step has `batch_size` samples."""
    return MixtureSchedule(
        {steps * config.batch_size: mixture for steps, mixture in config.mixtures.items()}
    )
