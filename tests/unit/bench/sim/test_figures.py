"""The figures are what their definitions say."""

from collections import Counter

import pytest

from bench.sim.compare import interval
from bench.sim.figures import fair_shares, figures, good, jain, percentile, service_gap
from bench.sim.hosts import Host, HostSpec, Job
from bench.sim.pictures import Axis, chart
from bench.sim.workload import Ask, ModelSpec
from bench.sim.world import Outcome, Sample

MODEL = ModelSpec("m:latest", 5.0)


def job(first_at: float | None, end_at: float | None, *, output: int = 11, at_s: float = 0.0) -> Job:
    return Job(0, Ask(at_s, "c", MODEL, 100, output, ()), first_at=first_at, end_at=end_at)


@pytest.mark.parametrize(
    ("tried", "is_good"),
    [
        (job(5.0, 6.0), True),
        (job(5.1, 6.0), False),
        (job(5.0, 6.1), False),
        (job(5.0, 5.0, output=1), True),
        (job(None, None), False),
        (job(14.0, 15.0, at_s=10.0), True),
    ],
)
def test_good(tried: Job, is_good: bool) -> None:
    assert good(tried) is is_good


def test_percentiles() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, percent) for percent in (1, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([3.0], 99) == 3.0
    assert percentile([], 50) is None


def test_max_min_fair_shares() -> None:
    assert fair_shares(10, {"a": 2, "b": 20, "c": 4}) == {"a": 2, "c": 4, "b": 4}
    assert fair_shares(100, {"a": 2, "b": 20}) == {"a": 2, "b": 20}


def test_jain() -> None:
    assert jain({"a": 5, "b": 5}, {"a": 50, "b": 50}) == 1.0
    assert jain({"a": 5, "b": 1}, {"a": 5, "b": 1}) == 1.0  # each has what it asked for
    assert jain({"a": 10}, {"a": 50, "b": 50}) == 0.5  # one of two has it all
    # Of 10, fair are 2 and 8; they got 4 and 6: (2 + 0.75)² / (2 · (4 + 0.5625)).
    assert jain({"a": 4, "b": 6}, {"a": 2, "b": 20}) == pytest.approx(2.75**2 / 9.125)
    assert jain({}, {"a": 1}) is None


def test_the_gap_counts_while_both_wait() -> None:
    def sample(a: int, b: int, waiting: str) -> Sample:
        return Sample(Counter(a=a, b=b), frozenset(waiting))

    assert service_gap([sample(0, 0, "ab"), sample(10, 0, "ab"), sample(10, 30, "ab")]) == 30
    assert service_gap([sample(0, 0, "ab"), sample(10, 0, "ab"), sample(10, 90, "a"), sample(10, 95, "ab")]) == 10
    assert service_gap([]) == 0


def test_nothing_to_measure() -> None:
    host = Host(HostSpec(name="h", vram_gb=8, prefill_tps=1, decode_tps=1))
    found = figures(Outcome([], [host], 0.0))
    assert found["completed"] == found["shed"] == 0
    assert found["goodput"] is found["jain"] is found["utilisation"] is found["eta_error_p50"] is None


def test_the_error_of_what_was_told() -> None:
    told = [job(3.0, 4.0) for _ in range(3)]
    for each, eta_s in zip(told, (1.0, 2.0, None), strict=True):
        each.told_eta_s, each.leased_at = eta_s, 2.5
    found = figures(Outcome(told, [], 0.0))
    assert (found["eta_told"], found["eta_error_p50"], found["eta_error_p90"]) == (2, 0.5, 1.5)


def test_confidence_intervals() -> None:
    assert interval([1.0]) == (1.0, 0.0)
    mean, half = interval([1.0, 2.0, 3.0])
    assert [mean, half] == pytest.approx([2.0, 4.303 / 3**0.5])


def test_a_chart() -> None:
    axis = Axis("load <1>", 0, 2, [0, 1, 2])
    picture = chart("Title & more", axis, Axis("y", 0.1, 10, [0.1, 1, 10], log=True), {"a": [(0, 1, 0.5), (2, 10, 0)]})
    assert "load &lt;1&gt;" in picture
    assert "M64.0 206.0L570.0 44.0" in picture  # 1 is in the middle of 0.1 and 10, 10 at the top
