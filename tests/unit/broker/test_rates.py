"""What is learnt of engines' speed, from nothing on."""

from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.rates import (
    BATCH_SLOPE,
    LOAD_S_MIN,
    SIZE_MIN,
    TOKENS_MIN,
    Arrivals,
    Fit,
    Mean,
    Rates,
    Scale,
)

GB = 10**9
S = 10**9
"""A second in ns."""


def rates(size: int = 5 * GB, engine: Scale | None = None, fleet: Scale | None = None) -> Rates:
    return Rates(size, engine or Scale(), fleet or Scale())


# Means and lines ------------------------------------------------------------------------------------------------------


def test_a_mean_is_the_prior_until_something_was_seen() -> None:
    mean = Mean()
    assert mean.of(7.0) == 7.0
    mean.add(3.0)
    assert mean.of(7.0) == 3.0


def test_a_mean_of_few_is_plain_and_of_many_follows_the_newest() -> None:
    mean = Mean()
    for value in (1.0, 2.0, 3.0, 4.0):
        mean.add(value)
    assert mean.value == pytest.approx(2.5)
    for _ in range(30):
        mean.add(10.0)
    assert mean.value == pytest.approx(10.0, rel=0.01)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_mean_lies_between_what_was_seen(values: list[float]) -> None:
    mean = Mean()
    for value in values:
        mean.add(value)
    assert min(values) - 1e-6 <= mean.value <= max(values) + 1e-6


def test_a_fit_finds_the_line() -> None:
    fit = Fit()
    for _ in range(5):
        for busy in range(8):
            fit.add(busy, 0.010 + 0.002 * busy)
    for beside in (0.0, 3.5, 20.0):
        assert fit.at(beside) == pytest.approx(0.010 + 0.002 * beside, rel=0.001)


def test_a_fit_of_one_load_goes_by_the_prior_slope() -> None:
    fit = Fit()
    for _ in range(5):
        fit.add(2.0, 0.014)
    base = 0.014 / (1 + 2 * BATCH_SLOPE)
    assert fit.at(2.0) == pytest.approx(0.014)
    assert fit.at(0.0) == pytest.approx(base)
    assert fit.at(6.0) == pytest.approx(base * (1 + 6 * BATCH_SLOPE))


def test_a_fit_never_says_that_company_makes_it_faster() -> None:
    fit = Fit()
    for beside in range(8):
        fit.add(beside, 0.020 - 0.002 * beside)
    assert fit.at(0.0) == fit.at(7.0) == pytest.approx(fit.y)


def test_a_fit_follows_what_has_changed() -> None:
    fit = Fit()
    for _ in range(100):
        fit.add(0.0, 0.010)
    for _ in range(150):
        fit.add(0.0, 0.050)
    assert fit.at(0.0) == pytest.approx(0.050, rel=0.02)


@given(st.lists(st.tuples(st.integers(0, 64), st.floats(1e-5, 1.0)), min_size=1, max_size=60), st.integers(0, 64))
def test_a_fit_is_never_next_to_nothing(values: list[tuple[int, float]], beside: int) -> None:
    fit = Fit()
    for x, y in values:
        fit.add(float(x), y)
    assert fit.at(beside) >= 0.1 * min(y for _, y in values) * (1 - 1e-9)


# Priors ---------------------------------------------------------------------------------------------------------------


def test_larger_models_are_slower_as_long_as_nothing_is_known() -> None:
    small, large = rates(2 * GB), rates(40 * GB)
    assert small.token_s(0) < large.token_s(0)
    assert small.prefill_s(100) < large.prefill_s(100)
    assert small.load_s() < large.load_s()
    assert large.token_s(4) == pytest.approx(large.token_s(0) * (1 + 4 * BATCH_SLOPE))
    assert large.prefill_s(200) == pytest.approx(2 * large.prefill_s(100))


def test_a_size_that_is_told_later_counts() -> None:
    """A lease that a worker claims comes before what it says of its models."""
    unknown = rates(0)
    assert unknown.size == SIZE_MIN
    unknown.resize(40 * GB)
    assert unknown.load_s() == rates(40 * GB).load_s()


def test_what_was_seen_counts_instead_of_the_prior() -> None:
    seen = rates()
    seen.saw_tokens(100, 5 * S, 0)
    seen.saw_prefill(1000, 2 * S)
    seen.saw_load(30 * S)
    assert seen.token_s(0) == pytest.approx(0.05)
    assert seen.prefill_s(500) == pytest.approx(1.0)
    assert seen.load_s() == pytest.approx(30.0)


def test_what_says_little_is_not_learnt() -> None:
    untouched, seen = rates(), rates()
    seen.saw_tokens(TOKENS_MIN - 1, 5 * S, 0)
    seen.saw_tokens(100, 0, 0)
    seen.saw_prefill(TOKENS_MIN - 1, 2 * S)
    seen.saw_prefill(1000, 0)
    seen.saw_load(int(LOAD_S_MIN * S) - 1)
    for one in (untouched, seen):
        assert one.token_s(0) == untouched.token_s(0)
        assert one.prefill_s(10) == untouched.prefill_s(10)
        assert one.load_s() == untouched.load_s()
        assert one.known_load_s() == one.known_prefill_s(10) == 0.0


def test_one_request_calibrates_the_other_models_of_its_engine() -> None:
    engine, fleet = Scale(), Scale()
    one, other = rates(4 * GB, engine, fleet), rates(16 * GB, engine, fleet)
    before = other.token_s(3), other.prefill_s(100), other.load_s()
    one.saw_tokens(100, int(100 * one.token_s(2) * 5 * S), 2)
    one.saw_prefill(1000, int(one.prefill_s(1000) * 7 * S))
    one.saw_load(int(one.load_s() * 3 * S))
    assert other.token_s(3) == pytest.approx(5 * before[0])
    assert other.prefill_s(100) == pytest.approx(7 * before[1])
    assert other.load_s() == pytest.approx(3 * before[2])
    assert other.known_load_s() == other.load_s()
    assert other.known_prefill_s(100) == other.prefill_s(100)


def test_and_other_engines_until_they_have_seen_one_of_their_own() -> None:
    fleet = Scale()
    engines = [Scale(), Scale()]
    here, there = rates(4 * GB, engines[0], fleet), rates(16 * GB, engines[1], fleet)
    before = there.load_s()
    here.saw_load(int(here.load_s() * 4 * S))
    assert there.load_s() == pytest.approx(4 * before)
    assert there.known_load_s() == 0.0
    there.saw_load(int(before / 2 * S))
    assert rates(16 * GB, engines[1], fleet).load_s() == pytest.approx(before / 2)
    assert rates(16 * GB, Scale(), fleet).load_s() == pytest.approx(before * exp(log(4 * 0.5) / 2))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_a_scale_lies_between_the_factors_that_were_seen(factors: list[float]) -> None:
    engine = Scale()
    one = rates(4 * GB, engine)
    prior = one.load_s()
    for factor in factors:
        one.saw_load(int(prior * factor * S))
    seen = [factor for factor in factors if prior * factor >= LOAD_S_MIN] or [1.0]
    other = rates(8 * GB, engine)
    assert min(seen) * 0.999 <= other.load_s() / rates(8 * GB).load_s() <= max(seen) * 1.001


# Arrivals -------------------------------------------------------------------------------------------------------------


def test_what_comes_steadily_is_counted_per_second() -> None:
    arrivals = Arrivals()
    assert arrivals.per_s(1e6) == 0.0
    for number in range(4000):
        arrivals.add(1e6 + number / 2)
    assert arrivals.per_s(1e6 + 2000) == pytest.approx(2.0, rel=0.01)


def test_what_stops_coming_is_forgotten_by_halves() -> None:
    arrivals = Arrivals()
    arrivals.add(1e6)
    first = arrivals.per_s(1e6)
    assert arrivals.per_s(1e6 + Arrivals.HALF_LIFE_S) == pytest.approx(first / 2)
    assert arrivals.per_s(1e6 + 100 * Arrivals.HALF_LIFE_S) == pytest.approx(0.0)


def test_some_count_less_than_others() -> None:
    arrivals, halves = Arrivals(), Arrivals()
    arrivals.add(1e6)
    halves.add(1e6, 0.5)
    halves.add(1e6, 0.5)
    assert halves.per_s(1e6) == arrivals.per_s(1e6)
