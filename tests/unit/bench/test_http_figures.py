"""What each way over HTTP comes to: the arithmetic and the report."""

import pytest

from bench.clients import OLLAMA, Way
from bench.figures import Run
from bench.http_figures import HttpFigures, http_aims, http_figures, http_report

WAYS = [
    Way("direct", "", OLLAMA),
    Way("nginx", "", OLLAMA, "", ("nginx",), "direct"),
    Way("fabric", "", OLLAMA, "", ("gateway", "broker", "worker"), "direct"),
]


def a_run(*first_ms: float, tokens: int = 1000) -> Run:
    processes = ("engine", "nginx", "gateway", "broker", "worker", "client")
    return Run(
        first_ms=list(first_ms),
        gaps_ms=[20.0],
        tokens=tokens,
        window_s=0.5,
        cpu_s=dict.fromkeys(processes, 0.01),
        rss_bytes={name: number * 2**20 for number, name in enumerate(processes, 1)},
        machine_s=1.0,
    )


def by_way(found: list[HttpFigures]) -> dict[str, HttpFigures]:
    return {f.way: f for f in found}


def test_added_is_of_the_same_quantile_and_the_same_round() -> None:
    rounds = [
        {"direct": a_run(1.0, 2.0, 9.0), "nginx": a_run(1.5), "fabric": a_run(1.5, 3.0, 10.0)},
        {"direct": a_run(11.0, 12.0, 19.0), "nginx": a_run(12.0), "fabric": a_run(11.0, 12.5, 29.0)},
    ]
    found = by_way(http_figures("50 at 50/s", 50, WAYS, rounds))
    assert found["fabric"].added_p50_ms == (0.75, 0.5, 1.0)
    assert found["fabric"].added_p99_ms == (5.5, 1.0, 10.0)
    assert found["fabric"].first_ms == (10.0, 29.0, 6)
    assert (found["direct"].added_p50_ms, found["direct"].added_p99_ms) == (None, None)


def test_costs_are_those_of_what_is_between() -> None:
    rounds = [{way.name: a_run(1.0, tokens=tokens) for way in WAYS} for tokens in (500, 1500)]
    found = by_way(http_figures("16 at full speed", 16, WAYS, rounds))
    assert found["nginx"].cpu_us_per_line == pytest.approx(10.0)
    assert found["fabric"].cpu_us_per_line == pytest.approx(30.0)
    assert (found["nginx"].rss_mib, found["fabric"].rss_mib) == (2.0, 3.0 + 4.0 + 5.0)
    assert (found["direct"].cpu_us_per_line, found["direct"].rss_mib, found["direct"].of_direct) == (None, None, None)
    assert found["fabric"].lines_per_s == (2000.0, 1000.0, 3000.0)


def test_throughput_is_told_as_a_part_of_the_direct_ways() -> None:
    rounds = [{"direct": a_run(1.0, tokens=4000), "fabric": a_run(1.0, tokens=1000)}]
    assert by_way(http_figures("x", 16, WAYS, rounds))["fabric"].of_direct == 0.25


def test_a_way_that_did_not_come_through_all_rounds_has_no_figures() -> None:
    whole = {way.name: a_run(1.0) for way in WAYS}
    without = {"direct": a_run(1.0), "fabric": a_run(1.0)}
    assert list(by_way(http_figures("x", 1, WAYS, [whole, without]))) == ["direct", "fabric"]


@pytest.mark.parametrize(
    ("first_ms", "tokens", "met"), [((2.0, 14.0), 15_000, [True] * 3), ((2.25, 14.25), 14_999, [False] * 3)]
)
def test_aims(first_ms: tuple[float, float], tokens: int, met: list[bool]) -> None:
    direct = a_run(1.0, 9.0)
    paced = [
        *http_figures("16 at 50/s", 16, WAYS, [{"direct": direct, "fabric": a_run(1000.0)}]),
        *http_figures("50 at 50/s", 50, WAYS, [{"direct": direct, "fabric": a_run(*first_ms)}]),
    ]
    full = http_figures("16 at full speed", 16, WAYS, [{"direct": direct, "fabric": a_run(9.0, tokens=tokens)}])
    found = http_aims(paced, full, "fabric")
    assert [aim.met for aim in found] == met
    assert [aim.bound for aim in found] == [1.0, 5.0, 30_000]


def test_the_report_tells_of_every_way_and_of_those_left_out() -> None:
    rounds = [{way.name: a_run(ms) for way, ms in zip(WAYS, (1.0, 1.25, 1.75), strict=True)}]
    paced, full = http_figures("50 at 50/s", 50, WAYS, rounds), http_figures("16 at full speed", 16, WAYS, rounds)
    text = http_report(
        paced, full, http_aims(paced, full, "fabric"), {"nginx": "1.2"}, {"LiteLLM": "there is no network"}
    )
    assert all(way.name in text for way in WAYS)
    assert "+0.75 (+0.75 … +0.75)" in text
    assert "2,000 (2,000 … 2,000)" in text
    assert "nginx 1.2" in text
    assert "LiteLLM is left out: there is no network" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["nginx", "10.0", "10.0", "2"] in rows
    assert ["fabric", "30.0", "30.0", "12"] in rows
    assert [row[0] for row in rows if row[:1] in (["met"], ["missed"])] == ["met", "met", "missed"]
