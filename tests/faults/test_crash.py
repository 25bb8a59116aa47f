"""Processes that die: kill -9, SIGSTOP, SIGABRT, and engines that misbehave (faults 1 to 7)."""

import asyncio
import signal
import time

import pytest

from gateway.session import REPLAY_PATIENCE_S, REPLAYS_FRUITLESS_MAX
from tests.faults.cluster import Cluster, until
from tests.faults.conftest import TERMINAL_S, Clusters
from workers.embedded.simulated import transcript

pytestmark = pytest.mark.faults


async def host_of(cluster: Cluster) -> int:
    """The number of the one worker that works, and of its engine."""

    async def works() -> bool:
        return any([await cluster.busy(number) for number in range(1, cluster.workers + 1)])

    await until(works, "an engine works")
    (number,) = [number for number in range(1, cluster.workers + 1) if await cluster.busy(number)]
    return number


async def test_an_idle_worker_dies_and_nobody_notices(clusters: Clusters) -> None:
    async with clusters(workers=2) as cluster, cluster.client() as client:
        await cluster.kill("worker-1")
        await cluster.sees(1, 1, 4.0)
        request = client.send("p", 20)
        assert await request.over() == "end"
        assert request.end["host"] == "worker-2"


async def test_a_worker_dies_before_the_first_event(clusters: Clusters) -> None:
    """1, leased: the request is tried elsewhere, and its client sees nothing of it."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        await cluster.inject(1, "hang")
        await cluster.inject(2, "hang")
        request = client.send("p", 20)
        host = await host_of(cluster)
        await cluster.kill(f"worker-{host}")
        other = 3 - host
        await cluster.working(other, 1)
        # The second hangs too: a worker that dies twice in a row costs two attempts and no more.
        await cluster.parts[f"worker-{host}"].start()
        await cluster.kill(f"worker-{other}")
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "end"
        assert request.end["attempts"] == 3


async def test_a_worker_dies_while_requests_wait(clusters: Clusters) -> None:
    """1, queued: they keep their place and run where there is room."""
    async with clusters(workers=2, slots=1, tokens_per_s=50) as cluster, cluster.client() as client:
        requests = [client.send(f"p{number}", 30) for number in range(6)]
        await requests[1].reached(1)
        await cluster.kill("worker-1")
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}


@pytest.mark.quick
async def test_a_worker_dies_in_mid_stream(clusters: Clusters) -> None:
    """1, streaming: plain text goes on on another host, at the word where it broke."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        request = client.send("tell me", 200, seed=7)
        await request.reached(20)
        host = await host_of(cluster)
        await cluster.kill(f"worker-{host}")
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "end"
        assert request.text == transcript("tell me", 7, 200)
        assert request.end["migrated"]
        assert request.end["host"] == f"worker-{3 - host}"


async def test_a_worker_dies_and_the_request_may_not_move(clusters: Clusters) -> None:
    """`migrate: false`: the request ends in WORKER_LOST, with what had arrived."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        request = client.send("stay", 300, migrate=False)
        await request.reached(20)
        await cluster.kill(f"worker-{await host_of(cluster)}")
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "WORKER_LOST"
        assert len(request.words) >= 20


async def test_a_worker_dies_with_all_events_but_no_end_delivered(clusters: Clusters) -> None:
    """1, before its end: nothing is left to generate, and the stream still ends as it should."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        for host in (1, 2):
            await cluster.inject(host, "hang", after=30)
        request = client.send("nearly", 30)
        await request.reached(30)
        await cluster.kill(f"worker-{await host_of(cluster)}")
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "end"
        assert request.text == transcript("nearly", 0, 30)


@pytest.mark.quick
async def test_the_broker_dies_while_requests_wait_and_stream(clusters: Clusters) -> None:
    """2: streams go on, what waits keeps waiting, workers are back in 5 s."""
    async with clusters(workers=1, slots=2) as cluster, cluster.client() as client:
        streaming = [client.send(f"stream {number}", 300) for number in range(2)]
        waiting = [client.send(f"wait {number}", 20) for number in range(3)]
        for request in streaming:
            await request.reached(20)
        await cluster.kill("broker")
        await cluster.broker.start()
        await cluster.sees(1, 1, 5.0)
        assert set(await asyncio.gather(*(request.over() for request in [*streaming, *waiting]))) == {"end"}
        assert {request.end["attempts"] for request in streaming} == {1}, "nothing was generated twice"


async def test_the_broker_dies_before_the_first_event(clusters: Clusters) -> None:
    """2, leased."""
    async with clusters(first_token_s=1.5) as cluster, cluster.client() as client:
        request = client.send("p", 20)
        await cluster.working(1, 1)
        await cluster.kill("broker")
        await cluster.broker.start()
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "end"


async def test_the_broker_is_away_while_a_stream_ends(clusters: Clusters) -> None:
    """2, before the end: the worker keeps the end till there is somebody to tell."""
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 100)
        await request.reached(50)
        await cluster.kill("broker")
        await cluster.working(1, 0)
        await cluster.broker.start()
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "end"


async def test_a_broker_aborts_and_its_supervisor_starts_it(clusters: Clusters) -> None:
    """7: back in 2 s."""
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 300)
        await request.reached(10)
        cluster.fault("abort", "broker")
        cluster.broker.signal(signal.SIGABRT)
        assert await cluster.broker.ended() == -signal.SIGABRT
        began = time.monotonic()
        await cluster.broker.start()
        await cluster.sees(1, 1, 5.0)
        assert time.monotonic() - began < 2.0 + 3.0, "a start of Python on a busy machine, and 2 s"
        assert await request.over() == "end"


@pytest.mark.quick
async def test_a_gateway_dies_and_the_client_resumes_through_another(clusters: Clusters) -> None:
    """3: streams go on at the other gateway, from the event after the last."""
    async with clusters(gateways=2) as cluster, cluster.client() as client:
        requests = [client.send(f"p{number}", 300) for number in range(3)]
        for request in requests:
            await request.reached(30)
        await cluster.kill("gateway-1")
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}
        assert all(request.resumed for request in requests)


async def test_a_gateway_dies_and_comes_back(clusters: Clusters) -> None:
    """3, with only one: the client resumes through the new process."""
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 300)
        await request.reached(30)
        await cluster.kill("gateway-1")
        await cluster.gateway(1).start()
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "end"


async def test_a_gateway_dies_with_a_client_that_does_not_resume(clusters: Clusters) -> None:
    """3: nobody will ask for the stream again, so the engine stops."""
    async with clusters(gateways=2) as cluster, cluster.client(gateways=[1], resume=False) as client:
        request = client.send("p", 10_000)
        await request.reached(10)
        await cluster.kill("gateway-1")
        await cluster.idle(TERMINAL_S + 10)
        assert await request.over() == "GONE"


async def test_gateway_and_worker_die_together(clusters: Clusters) -> None:
    """Nobody is left who has the text: WORKER_LOST, when the worker has had the time to come back with it."""
    async with clusters(workers=2, gateways=2) as cluster, cluster.client(gateways=[1, 2]) as client:
        request = client.send("p", 400)
        await request.reached(30)
        host = await host_of(cluster)
        await asyncio.gather(cluster.kill("gateway-1"), cluster.kill(f"worker-{host}"))
        patience_s = REPLAYS_FRUITLESS_MAX * REPLAY_PATIENCE_S + 2 * TERMINAL_S
        assert await asyncio.wait_for(request.over(), patience_s) == "WORKER_LOST"
        assert cluster.check().died_together == 1


async def test_a_worker_dies_while_its_client_changes_gateways(clusters: Clusters) -> None:
    """The broker does not know yet, so the new gateway asks the dead worker; the old one has the text."""
    async with clusters(workers=2, gateways=2) as cluster, cluster.client(gateways=[1, 2]) as client:
        request = client.send("p", 300)
        await request.reached(30)
        await cluster.kill(f"worker-{await host_of(cluster)}")
        cluster.front[0].cut()
        assert await asyncio.wait_for(request.over(), 2 * TERMINAL_S) == "end"
        assert request.end["migrated"]


@pytest.mark.parametrize("kind", ["http_500", "http_503", "truncate", "die_mid"])
async def test_an_engine_misbehaves_before_the_first_event(clusters: Clusters, kind: str) -> None:
    """4: another attempt is made."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        await cluster.inject(1, kind)
        await cluster.inject(2, kind)
        request = client.send("p", 20)
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "end"
        assert request.end["attempts"] > 1


@pytest.mark.parametrize("kind", ["truncate", "die_mid"])
async def test_an_engine_breaks_off_in_mid_stream(clusters: Clusters, kind: str) -> None:
    """4: the stream goes on elsewhere, or ends in BACKEND_ERROR with the text whole up to there."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        await cluster.inject(1, kind, after=20)
        await cluster.inject(2, kind, after=20)
        request = client.send("p", 100)
        assert await asyncio.wait_for(request.over(), TERMINAL_S) in ("end", "BACKEND_ERROR")
        assert len(request.words) >= 20


async def test_an_engine_process_dies_in_mid_stream(clusters: Clusters) -> None:
    """4: as above, and requests that follow run on the other."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        request = client.send("p", 300)
        await request.reached(20)
        host = await host_of(cluster)
        await cluster.kill(f"engine-{host}")
        assert await asyncio.wait_for(request.over(), TERMINAL_S) in ("end", "BACKEND_ERROR")
        after = client.send("q", 10)
        assert await asyncio.wait_for(after.over(), TERMINAL_S) == "end"
        assert after.end["host"] == f"worker-{3 - host}"


async def test_a_worker_that_slept_is_fenced(clusters: Clusters) -> None:
    """5: its stream went on elsewhere meanwhile; what it still has is dropped, and it stops generating."""
    async with clusters(workers=2, tokens_per_s=50) as cluster, cluster.client() as client:
        request = client.send("p", 600)
        await request.reached(20)
        host = await host_of(cluster)
        cluster.freeze(f"worker-{host}")
        await cluster.working(3 - host, 1)
        cluster.thaw(f"worker-{host}")
        # Its engine went on for nobody while it slept.
        await cluster.working(host, 0)
        assert await cluster.busy(3 - host) == 1
        assert await request.over() == "end"
        assert request.end["host"] == f"worker-{3 - host}"
