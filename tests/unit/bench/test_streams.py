"""The benchmark itself, in small: real processes, all clients."""

import asyncio
import signal
from pathlib import Path
from time import perf_counter

import psutil
import pytest

from bench import fabric
from bench.clients import PROMPT, Answer, connections
from bench.fabric import BenchError, Fabric, Usage
from bench.figures import CLIENTS, SERVERS
from bench.streams import STOP_STREAMS, STOPPED, Load, loads, measure, measure_stops, run
from tests.processes import started
from workers.embedded.simulated import transcript


class Idle(Fabric):
    """No processes, hence no usage."""

    def usage(self) -> Usage:
        return Usage({}, {}, 0.0)


def a_load(streams: int = 2) -> Load:
    return Load(name="small", streams=streams, tokens=5, tokens_per_s=50, window_s=0.2, pause_s=0.001)


async def test_a_small_benchmark(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    found, others = await measure([a_load()], 1, tmp_path)
    assert [f.client for f in found] == list(CLIENTS)
    for f in found:
        assert f.first_ms.n > 0
        assert 0 < f.first_ms.p50 <= f.first_ms.p99
        assert 0 < f.tokens_per_s.median < 1000
        assert set(f.rss_mib) == set(SERVERS)
    assert others >= 0
    assert set(psutil.Process().children()) <= before  # every part has ended


async def test_stops_are_measured_until_the_engine_is_idle(tmp_path: Path) -> None:
    found = await measure_stops(tmp_path, times=2)
    assert [(s.client, s.streams, s.n) for s in found] == [(client, STOP_STREAMS, 2) for client in STOPPED]
    assert all(0 < s.ms.min <= s.ms.median <= s.ms.max for s in found)


async def test_wrong_tokens_end_the_run() -> None:
    async def generate(count: int) -> Answer:
        await asyncio.sleep(0)
        return Answer(perf_counter(), [perf_counter()], [" wrong"])

    with pytest.raises(BenchError, match="other tokens than the engine's"):
        await run(a_load(1), generate, Idle("", "", Path(), "", {}))


async def test_right_tokens_are_counted() -> None:
    async def generate(count: int) -> Answer:
        answer = Answer(perf_counter())
        await asyncio.sleep(0)
        answer.came_s, answer.tokens = [perf_counter()] * count, [transcript(PROMPT, 0, count)]
        return answer

    found = await run(a_load(1), generate, Idle("", "", Path(), "", {}))
    # An answer on either edge of the window may be in it with its tokens or its first token only.
    assert found.tokens > 0
    assert abs(found.tokens - 5 * len(found.first_ms)) <= 5


async def test_a_window_without_a_stream_is_measured_again() -> None:
    asked = 0

    async def generate(count: int) -> Answer:
        nonlocal asked
        answer = Answer(perf_counter())
        asked += 1
        await asyncio.sleep(0.5 if asked == 1 or never else 0.01)
        answer.came_s, answer.tokens = [perf_counter()] * count, [transcript(PROMPT, 0, count)]
        return answer

    never = False
    assert (await run(a_load(1), generate, Idle("", "", Path(), "", {}))).first_ms
    assert asked > 2
    never = True
    with pytest.raises(BenchError, match="no stream began"):
        await run(a_load(1), generate, Idle("", "", Path(), "", {}))


async def test_a_part_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"(?s)engine ended at its start.*slots"):
        async with fabric.running(tmp_path, tokens_per_s=1, slots=0):
            pass


def test_ctrl_c_ends_it_without_figures_and_without_fuss(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    with started("bench", "streams", "--quick", "--json", str(figures)) as bench:
        bench.find("round 1 of")
        bench.signal(signal.SIGINT)
        assert bench.wait() == 1
        bench.find("stopped")
        assert not any("Traceback" in line for line in bench.lines)
    assert not figures.exists()


@pytest.mark.parametrize("quick", [True, False])
def test_the_gateways_rate_limit_is_kept(quick: bool) -> None:
    """Its default: 50 requests a second and connection, 256 streams."""
    paced, fast, full = loads(quick=quick)
    for load in (*paced, *fast):
        requests_per_s = load.streams / (load.answer_s + load.pause_s)
        assert requests_per_s / connections(load.streams) < 50
        assert load.streams <= 256
    # At full speed too, as long as the whole fabric does not bring more than this.
    assert all(50 * connections(load.streams) * load.tokens >= 400_000 for load in full)
