"""Processes that are told to end (SIGTERM), faults 8 to 10."""

import asyncio
import signal

import pytest

from tests.faults.cluster import until
from tests.faults.conftest import TERMINAL_S, Clusters

pytestmark = pytest.mark.faults

SOON = {"WEFTLINE_GATEWAY_RESUME_S": "3"}
"""A worker that drains waits for those who could come back for what it has: here for 3 s, not 60."""


@pytest.mark.quick
async def test_a_worker_that_is_told_to_end_finishes_first(clusters: Clusters) -> None:
    """8: no new lease, its streams finish, status 0."""
    async with clusters(workers=2, settings=SOON) as cluster, cluster.client() as client:
        requests = [client.send(f"p{number}", 200) for number in range(4)]
        for request in requests:
            await request.reached(10)
        cluster.fault("term", "worker-1")
        cluster.worker(1).signal(signal.SIGTERM)
        await until(lambda: "draining" in cluster.worker(1).log.read_text(), "it drains")
        later = [client.send(f"q{number}", 20) for number in range(3)]
        assert set(await asyncio.gather(*(request.over() for request in requests + later))) == {"end"}
        assert {request.end["host"] for request in later} == {"worker-2"}
        assert {request.end["attempts"] for request in requests} == {1}
        assert await cluster.worker(1).ended() == 0


@pytest.mark.quick
async def test_a_gateway_that_is_told_to_end_sends_its_clients_elsewhere(clusters: Clusters) -> None:
    """9: it says so, closes with 1001, and streams are resumed at the other."""
    async with clusters(gateways=2) as cluster, cluster.client() as client, cluster.client(gateways=[1, 2]) as other:
        requests = [client.send("p", 400), other.send("q", 400)]
        for request in requests:
            await request.reached(20)
        cluster.fault("term", "gateway-1")
        cluster.gateway(1).signal(signal.SIGTERM)
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}
        assert any(message["type"] == "draining" for message in client.told + other.told)
        assert all(request.resumed for request in requests)
        assert await cluster.gateway(1).ended() == 0


async def test_a_gateway_that_is_told_to_end_lets_those_finish_that_cannot_resume(clusters: Clusters) -> None:
    """9."""
    async with clusters(gateways=2) as cluster, cluster.client(gateways=[1], resume=False) as client:
        request = client.send("p", 300)
        await request.reached(20)
        cluster.gateway(1).signal(signal.SIGTERM)
        assert await request.over() == "end"
        assert await cluster.gateway(1).ended() == 0


async def test_a_broker_that_is_told_to_end_loses_nothing(clusters: Clusters) -> None:
    """10."""
    async with clusters(slots=2) as cluster, cluster.client() as client:
        requests = [client.send(f"p{number}", 200) for number in range(4)]
        await requests[0].reached(20)
        cluster.broker.signal(signal.SIGTERM)
        assert await cluster.broker.ended() == 0
        await cluster.broker.start()
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}


async def test_every_part_is_restarted_in_turn(clusters: Clusters) -> None:
    """11, of one version: a rolling restart under load costs no request."""
    async with clusters(workers=2, gateways=2, settings=SOON) as cluster, cluster.client() as client:
        running = True

        async def load() -> set[str]:
            ends = set()
            number = 0
            while running:
                number += 1
                ends.add(await client.send(f"p{number}", 100).over())
            return ends

        streams = [asyncio.create_task(load()) for _ in range(4)]
        for name in ("worker-1", "worker-2", "broker", "gateway-1", "gateway-2"):
            cluster.fault("term", name)
            cluster.parts[name].signal(signal.SIGTERM)
            assert await cluster.parts[name].ended(2 * TERMINAL_S) == 0, name
            await cluster.parts[name].start()
            await cluster.ready()
        running = False
        assert set().union(*await asyncio.gather(*streams)) == {"end"}
