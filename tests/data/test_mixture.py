"""Shares, numbers and phases of a mixture, up to 10^12 samples, without any data."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.mixture import WINDOW, Draw, Mixture, MixtureSchedule
from llama_jax.data.samples import locate_windows

PAPER = [67.0, 15.0, 4.5, 4.5, 4.5, 2.5, 2.0]  # per cent, table 1 of arXiv 2302.13971
FAR = 10**12

weight = st.one_of(
    st.integers(1, 100).map(float),
    st.decimals("0.01", 100, places=2).map(float),
    st.floats(1e-4, 1e4),
    st.integers(10**9, 10**12).map(float),  # tokens of a source
)
weights = st.lists(weight, min_size=1, max_size=12)
sample = st.integers(0, FAR)
cheap = settings(max_examples=60, deadline=None)


def exact_shares(numbers):
    return [Fraction(str(number)) / sum(Fraction(str(n)) for n in numbers) for number in numbers]


def errors(mixture, shares, first, count):
    """Returns how many samples each source has too many in [first, first + count)."""
    counts = (b - a for a, b in zip(*map(mixture.drawn, (first, first + count)), strict=True))
    return [n - count * share for n, share in zip(counts, shares, strict=True)]


@cheap
@given(weights, sample)
def test_in_any_10000_samples_each_source_is_within_one_of_its_share(numbers, first):
    shares = exact_shares(numbers)
    mixture = Mixture(numbers)
    found = errors(mixture, shares, first, WINDOW)
    for error, share in zip(found, shares, strict=True):
        rest = WINDOW * share % 1
        nearly_integer = 0 < min(rest, 1 - rest) < Fraction(1, 1024)
        assert abs(error) <= (1 + min(rest, 1 - rest) if nearly_integer else 1)
    assert sum(found) == 0


@cheap
@given(weights, sample)
def test_from_the_first_sample_on_the_shares_are_exact_up_to_a_constant(numbers, n):
    shares = exact_shares(numbers)
    rests = [WINDOW * share % 1 for share in shares]
    distances = [min(rest, 1 - rest) for rest in rests if rest] or [1]
    bound = 10 + 1 / (4 * max(min(distances), Fraction(1, 1024)))
    assert max(map(abs, errors(Mixture(numbers), shares, 0, n))) < bound + 1


@cheap
@given(weights, sample, st.integers(1, 300))
def test_the_number_of_samples_drawn_needs_no_scan(numbers, first, count):
    mixture = Mixture(numbers)
    counts = Counter(mixture.source(n) for n in range(first, first + count))
    before, after = mixture.drawn(first), mixture.drawn(first + count)
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        counts[i] for i in range(len(numbers))
    ]


def test_the_papers_mixture_is_exact_in_any_10000_samples_and_nearly_in_any_100():
    mixture, shares = Mixture(PAPER), exact_shares(PAPER)
    sources = [mixture.source(n) for n in range(2 * WINDOW)]
    for first in range(0, WINDOW, 7):
        counts = Counter(sources[first : first + WINDOW])
        assert [counts[i] for i in range(7)] == [6700, 1500, 450, 450, 450, 250, 200]
        few = Counter(sources[first : first + 100])
        assert max(abs(few[i] - 100 * share) for i, share in enumerate(shares)) <= 2


def test_a_fraction_of_a_sample_is_never_lost():
    # Rounded to whole numbers of 356 samples, the second would lack 1.3 G of 1.4 T tokens.
    assert Mixture([0.41, 0.31, 0.28]).drawn(FAR) == [41 * 10**10, 31 * 10**10, 28 * 10**10]
    thirds = Mixture([1.0, 1.0, 1.0]).drawn(FAR + 2)
    assert max(abs(n - (FAR + 2) / 3) for n in thirds) < 10


def test_a_very_small_source_does_not_change_the_shares_of_the_others():
    large, _, small = Mixture([1.0, 2.0, 1e-9]).drawn(10**10)
    assert small == pytest.approx(10**10 * 1e-9 / 3, abs=1)
    assert large == pytest.approx(10**10 / 3, abs=267)


@st.composite
def schedules(draw):
    """Phases whose sources are some of six, each with a weight."""
    firsts = [0, *draw(st.lists(st.integers(1, FAR), max_size=3, unique=True))]
    mixture = st.dictionaries(st.sampled_from("abcdef"), weight, min_size=1)
    return {first: draw(mixture) for first in firsts}


@cheap
@given(schedules(), sample, st.integers(0, 12), st.integers(1, 12))
def test_a_run_that_starts_at_any_sample_draws_what_a_run_that_reads_on_draws(
    phases, first, skipped, count
):
    schedule = MixtureSchedule(phases)
    assert schedule.draw(first, skipped + count)[skipped:] == MixtureSchedule(phases).draw(
        first + skipped, count
    )


sizes = st.one_of(st.integers(1, 40), st.integers(1, FAR))  # windows of a source


@cheap
@given(schedules(), st.lists(sizes, min_size=6, max_size=6), st.integers(0, FAR // 64),
       st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 99))  # fmt: skip
def test_any_number_of_hosts_reads_the_windows_of_one_host(phases, counts, step, hosts, seed):
    rows = 12
    together = MixtureSchedule(phases).draw(step * rows, rows)
    windows = locate_windows(together, counts, seed)
    for host in range(hosts):
        own = range(host * rows // hosts, (host + 1) * rows // hosts)
        draws = MixtureSchedule(phases).draw(step * rows, rows)
        assert [draws[row] for row in own] == [together[row] for row in own]
        found = locate_windows([draws[row] for row in own], counts, seed)
        assert found == [windows[row] for row in own]


@cheap
@given(schedules(), st.lists(st.integers(1, 9), min_size=6, max_size=6), st.integers(0, 99),
       st.integers(0, FAR))  # fmt: skip
def test_each_epoch_has_each_window_once_through_all_phases(phases, counts, seed, start):
    schedule = MixtureSchedule(phases)
    read = {}
    for first in [*phases, start]:  # the samples around each change, and anywhere
        begin = max(first - 40, 0)
        draws = schedule.draw(begin, 80)
        windows = locate_windows(draws, counts, seed)
        for (source, number), window in zip(draws, windows, strict=True):
            read[source, number] = window
    epochs = {}
    for (source, number), window in read.items():
        epochs.setdefault((source, number // counts[source]), []).append(window)
    for (source, _), windows in epochs.items():
        assert len(set(windows)) == len(windows) <= counts[source]
        assert set(windows) <= set(range(counts[source]))


@cheap
@given(schedules())
def test_a_source_continues_in_a_new_phase_where_it_was(phases):
    schedule = MixtureSchedule(phases)
    for first in phases:
        start = max(first - 50, 0)
        numbers = dict(enumerate(schedule.drawn(start)))
        for n, (source, number) in enumerate(schedule.draw(start, 100), start):
            mixture = phases[max(f for f in phases if f <= n)]
            assert schedule.names[source] in mixture
            assert number == numbers[source]  # none is repeated, none is skipped
            numbers[source] += 1


def test_the_shares_of_a_sample_are_those_of_its_phase_and_name_earlier_sources():
    schedule = MixtureSchedule({0: {"a": 1.0}, 8: {"a": 1.0, "b": 3.0}, 16: {"c": 2.0}})
    assert schedule.shares(7) == {0: 1}
    assert schedule.shares(8) == schedule.shares(15) == {0: Fraction(1, 4), 1: Fraction(3, 4)}
    assert schedule.shares(FAR) == {0: 0, 1: 0, 2: 1}


@cheap
@given(schedules(), sample)
def test_each_phase_has_its_own_shares(phases, n):
    schedule, expected = MixtureSchedule(phases), Counter()
    ends = [*sorted(f for f in phases if f < n), n]
    for first, end in itertools.pairwise(ends):
        mixture = phases[first]
        for name, share in zip(mixture, exact_shares([*mixture.values()]), strict=True):
            expected[name] += (end - first) * share
    for name, count in zip(schedule.names, schedule.drawn(n), strict=True):
        assert abs(count - expected[name]) < len(phases) * 267


def test_sources_of_the_same_size_are_read_in_different_orders():
    count = FAR // 2048
    first, second = (
        locate_windows([Draw(source, n) for n in range(4_000)], [count, count], seed=0)
        for source in (0, 1)
    )
    assert len(set(first)) == len(set(second)) == 4_000
    assert len(set(first) & set(second)) < 5  # 0.03 are expected


def test_equal_draws_of_a_schedule_of_one_source_are_its_own_samples():
    assert MixtureSchedule({0: {"a": 1.0}}).draw(FAR, 2) == [Draw(0, FAR), Draw(0, FAR + 1)]
