"""Peers that are slow, or that flood (faults 22 to 25)."""

import asyncio
import itertools
import statistics
import time

import pytest

from tests.faults.client import Request
from tests.faults.cluster import until
from tests.faults.conftest import TERMINAL_S, Clusters

pytestmark = pytest.mark.faults

FAST = 5000.0
"""Tokens/s that fill a buffer soon."""


@pytest.mark.quick
async def test_a_client_that_never_reads_is_cut_and_its_job_stopped(clusters: Clusters) -> None:
    """22: cut in 10 s; what does not resume is stopped at once, what does after its window."""
    settings = {"WEFTLINE_GATEWAY_STALL_S": "2", "WEFTLINE_GATEWAY_OUTBOX_BYTES_MAX": "65536"}
    async with (
        clusters(tokens_per_s=FAST, settings=settings) as cluster,
        cluster.client(resume=False, ping_interval=None) as deaf,
        cluster.client() as other,
    ):
        request = deaf.send("p", 100_000)
        await request.reached(10)
        # Nothing is taken from the gateway any more, at whatever depth the system would buffer it.
        cluster.front[0].down.stalled = True
        deaf.reading.clear()
        await asyncio.sleep(3)
        cluster.front[0].heal()
        await cluster.idle(TERMINAL_S)
        deaf.reading.set()
        assert await request.over() == "GONE"
        assert await other.send("q", 10).over() == "end"


async def gaps_ms(requests: list[Request], tokens: int) -> list[float]:
    """Times between one token and the next, of all requests, as their readers saw them."""

    async def read(request: Request) -> list[float]:
        times = []
        for count in range(1, tokens + 1):
            await request.reached(count)
            times.append(time.monotonic())
        return [1000 * (b - a) for a, b in itertools.pairwise(times)]

    return [gap for gaps in await asyncio.gather(*map(read, requests)) for gap in gaps]


async def test_one_slow_client_among_many_costs_the_others_nothing(clusters: Clusters) -> None:
    """23: the others' p99 gap stays within 1.5 times what it is without it (and 20 ms: the machine is shared)."""
    async with (
        clusters(workers=2, slots=16, tokens_per_s=40) as cluster,
        cluster.client() as many,
        cluster.client(ping_interval=None) as slow,
    ):

        async def p99(name: str) -> float:
            requests = [many.send(f"{name} {number}", 120) for number in range(16)]
            gaps = await gaps_ms(requests, 120)
            await asyncio.gather(*(request.over() for request in requests))
            return statistics.quantiles(gaps, n=100)[-1]

        alone = await p99("alone")
        held = [slow.send(f"slow {number}", 400) for number in range(4)]
        await held[0].reached(1)
        slow.reading.clear()
        beside = await p99("beside")
        slow.reading.set()
        assert set(await asyncio.gather(*(request.over() for request in held))) == {"end"}
        assert beside <= max(1.5 * alone, alone + 20), (alone, beside)


async def test_a_slow_client_gets_all_of_it_in_the_end(clusters: Clusters) -> None:
    """Its streams pause, and are filled up by replays; nothing is lost and no line broken."""
    settings = {"WEFTLINE_GATEWAY_OUTBOX_BYTES_MAX": "65536", "WEFTLINE_GATEWAY_STALL_S": "30"}
    async with (
        clusters(tokens_per_s=FAST, settings=settings) as cluster,
        cluster.client(ping_interval=None) as client,
    ):
        request = client.send("p", 20_000)
        await request.reached(10)
        cluster.front[0].down.bytes_per_s = 400_000
        assert await asyncio.wait_for(request.over(), 60) == "end"
        assert client.lines == 1


async def test_a_slow_worker_gets_less_to_do(clusters: Clusters) -> None:
    """24: the load shifts to the fast one, and the broker's memory stays flat."""
    async with clusters(workers=2, slots=2) as cluster, cluster.client() as client:
        await cluster.inject(1, "slow_first", count=100, delay_s=3.0)
        before = cluster.broker.usage()[0]
        requests = [client.send(f"p{number}", 50) for number in range(20)]
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}
        hosts = [request.end["host"] for request in requests]
        assert hosts.count("worker-2") > 2 * hosts.count("worker-1")
        assert cluster.broker.usage()[0] - before < 16 * 2**20


async def test_a_slow_line_to_a_worker_costs_nothing(clusters: Clusters) -> None:
    """24: a third of a second away, and narrow."""
    async with clusters() as cluster, cluster.client() as client:
        line = cluster.lines[0]
        line.up.delay_s = line.down.delay_s = 0.3
        line.up.bytes_per_s = 30_000
        requests = [client.send(f"p{number}", 100) for number in range(2)]
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}
        assert {request.end["attempts"] for request in requests} == {1}


async def test_a_flood_whose_answers_are_not_read_is_closed(clusters: Clusters) -> None:
    """25: pings as fast as they go and no pong read: closed before 16 MiB wait for it."""
    async with clusters() as cluster, cluster.client(resume=False, ping_interval=None) as client:
        before = cluster.gateway(1).usage()[0]
        client.reading.clear()
        cluster.front[0].down.stalled = True
        highest = before
        for _ in range(300):
            for _ in range(200):
                client.say({"type": "ping"})
            await asyncio.sleep(0.005)
            highest = max(highest, cluster.gateway(1).usage()[0])
            if not cluster.front[0].connections:
                break
        assert highest - before < 16 * 2**20
        cluster.front[0].heal()
        client.reading.set()
        await until(lambda: bool(client.codes), "the line was closed", TERMINAL_S)
