"""The benchmark's arithmetic and its report."""

import pytest

from bench.clients import Answer
from bench.fabric import Usage
from bench.figures import (
    CLIENTS,
    PROCESSES,
    Figures,
    Run,
    Spread,
    Stops,
    aims,
    figures_of,
    others_cores,
    quantiles,
    report,
    run_of,
)


def usage(cpu_s: float, machine_s: float = 0.0) -> Usage:
    return Usage(dict.fromkeys(PROCESSES, cpu_s), dict.fromkeys(PROCESSES, 2**20), machine_s)


def a_run(first_ms: float, *, tokens: int = 1000, cpu_s: float = 0.01) -> Run:
    return Run(
        first_ms=[first_ms],
        gaps_ms=[20.0],
        tokens=tokens,
        window_s=0.5,
        cpu_s=dict.fromkeys(PROCESSES, cpu_s),
        rss_bytes=dict.fromkeys(PROCESSES, 2**20),
        machine_s=1.0,
    )


def a_round(httpx: float, lean: float, websocket: float, weftline: float, *, tokens: int = 1000) -> dict[str, Run]:
    first_ms = {"httpx": httpx, "lean": lean, "websocket": websocket, "weftline": weftline}
    return {client: a_run(ms, tokens=tokens) for client, ms in first_ms.items()}


def by_client(found: list[Figures]) -> dict[str, Figures]:
    return {f.client: f for f in found}


def test_a_run_counts_what_falls_into_its_window() -> None:
    answers = [
        Answer(0.5, [0.9, 1.25], [" a", " b"]),  # asked for before: its second token and the gap before it count
        Answer(1.5, [1.625, 1.75, 2.5], [" a", " b", " c"]),  # ends after: two tokens and one gap count
        Answer(2.0, [2.25], [" a"]),  # asked for when it was over
    ]
    run = run_of(answers, 1.0, 2.0, usage(1.0, 5.0), usage(1.25, 7.0), asked_from_s=1.0)
    assert run.first_ms == [125.0]
    assert run.gaps_ms == pytest.approx([350.0, 125.0])
    assert run.tokens == 3
    assert run.tokens_per_s == 3.0
    assert run.cpu_s["broker"] == 0.25
    assert run.machine_s == 2.0
    earlier = run_of(answers, 1.0, 2.0, usage(1.0, 5.0), usage(1.25, 7.0), asked_from_s=0.25)
    assert earlier.first_ms == [400.0, 125.0]
    assert (earlier.tokens, earlier.gaps_ms) == (run.tokens, run.gaps_ms)


def test_what_no_process_of_ours_used_others_did() -> None:
    assert others_cores([a_run(1.0), a_run(1.0)]) == pytest.approx((2.0 - 2 * 5 * 0.01) / 1.0)
    assert others_cores([a_run(1.0, cpu_s=1.0)]) == 0.0


def test_quantiles_are_by_nearest_rank() -> None:
    assert quantiles([3.0]) == (3.0, 3.0, 1)
    assert quantiles([4.0, 1.0, 2.0, 3.0]) == (2.0, 4.0, 4)
    assert quantiles(float(n) for n in range(1, 201)) == (100.0, 198.0, 200)
    with pytest.raises(ValueError, match="no samples"):
        quantiles([])


def test_added_is_paired_within_a_round() -> None:
    """A slow round slows both: the difference stays."""
    rounds = [a_round(1.0, 0.25, 2.0, 3.0), a_round(11.0, 10.25, 12.5, 13.0), a_round(1.0, 0.25, 1.75, 3.0)]
    found = by_client(figures_of("1 at 50/s", 1, rounds))
    assert found["websocket"].added_first_ms["httpx"] == (1.0, 0.75, 1.5)
    assert found["websocket"].added_first_ms["lean"] == (1.75, 1.5, 2.25)
    assert found["httpx"].added_first_ms == {}
    assert found["websocket"].first_ms == (2.0, 12.5, 3)


def test_cpu_is_per_token_of_all_rounds() -> None:
    found = by_client(figures_of("x", 1, [a_round(1, 1, 1, 1, tokens=500), a_round(1, 1, 1, 1, tokens=1500)]))
    assert found["websocket"].cpu_us_per_token == pytest.approx(dict.fromkeys(PROCESSES, 10.0))
    assert found["lean"].cpu_us_per_token == pytest.approx({"engine": 10.0, "client": 10.0})
    assert found["lean"].tokens_per_s == (2000.0, 1000.0, 3000.0)


def stops(max_ms: float) -> list[Stops]:
    return [Stops(client, 8, 20, Spread(5.0, 1.0, ms)) for client, ms in (("lean", 900.0), ("websocket", max_ms))]


@pytest.mark.parametrize(
    ("websocket_ms", "tokens", "stop_ms", "met"), [(1.5, 10_000, 100.0, True), (2.5, 9_999, 100.1, False)]
)
def test_aims(websocket_ms: float, tokens: int, stop_ms: float, met: bool) -> None:
    paced = figures_of("1 at 50/s", 1, [a_round(1.0, 0.5, websocket_ms, 9.0)])
    fast = figures_of("16 at full speed", 16, [a_round(1.0, 0.5, 2.0, 3.0, tokens=tokens)])
    found = aims(paced, fast, stops(stop_ms))
    assert [aim.met for aim in found] == [met] * 4
    assert [aim.bound for aim in found] == [1.0, 1.5, 20_000, 100]


def test_the_report_names_every_client_and_says_which_aims_are_missed() -> None:
    paced = figures_of("1 at 50/s", 1, [a_round(1.0, 0.5, 1.75, 9.0)])
    fast = figures_of("16 at full speed", 16, [a_round(1.0, 0.5, 2.0, 3.0, tokens=20_000)])
    text = report(paced, fast, stops(12.5))
    assert all(name in text for name in (*CLIENTS.values(), *PROCESSES))
    assert "+0.75 (+0.75 … +0.75)" in text
    assert "40,000 (40,000 … 40,000)" in text
    lines = text.splitlines()
    first_aim = next(n for n, line in enumerate(lines) if line.split()[:2] == ["aim", "figure"]) + 1
    assert [line.split()[0] for line in lines[first_aim:]] == ["met"] * 4
    assert ["fabric,", "lean", "WebSocket", "8", "20", "5.0", "12.5"] in [line.split() for line in lines]
