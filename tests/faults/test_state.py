"""Names, ownership and limits of the system (faults 26 in part, 32, 38) and where cancels go."""

import asyncio
import contextlib
import resource

import pytest

from cli.keys import create_client
from gateway.store import Store
from tests.faults.client import WireClient
from tests.faults.cluster import until
from tests.faults.conftest import TERMINAL_S, Clusters

pytestmark = pytest.mark.faults


@pytest.mark.quick
async def test_another_clients_request_cannot_be_touched(clusters: Clusters) -> None:
    """32: stop and resume of it are answered NOT_FOUND, and it runs on."""
    async with clusters() as cluster, cluster.client() as client:
        with contextlib.closing(Store.open(cluster.folder / "data")) as store:
            files = create_client(store, "thief", cluster.folder / "thief")
        async with WireClient(cluster.urls, files.config, lambda *_, **__: None) as thief:
            request = client.send("p", 200)
            await request.reached(20)
            strange = thief.requests.setdefault(request.ref, type(request)(request.ref, {}, sent=True, seqs=[0]))
            thief.say({"type": "stop", "id": request.ref})
            assert await strange.over() == "NOT_FOUND"
            strange = thief.requests.setdefault(request.ref, type(request)(request.ref, {}, sent=True, seqs=[0]))
            thief.say({"type": "resume", "id": request.ref, "lastSeq": -1})
            assert await strange.over() == "NOT_FOUND"
            assert strange.words == []
            assert await request.over() == "end"


async def test_a_stop_reaches_the_engine(clusters: Clusters) -> None:
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 10_000)
        await request.reached(10)
        client.stop(request)
        assert await request.over() == "stopped"
        await cluster.working(1, 0)


async def test_a_client_that_leaves_stops_what_it_had(clusters: Clusters) -> None:
    """Close code 1000 says that it does not come back."""
    async with clusters() as cluster:
        async with cluster.client() as client:
            request = client.send("p", 10_000)
            await request.reached(10)
        await cluster.idle(2.0)


async def test_a_client_that_does_not_come_back_is_waited_for_and_then_not(clusters: Clusters) -> None:
    """The window is set to 3 s; then the engine is idle."""
    async with clusters(settings={"WEFTLINE_GATEWAY_RESUME_S": "3"}) as cluster, cluster.client() as client:
        request = client.send("p", 100_000)
        await request.reached(10)
        await cluster.front[0].refuse()
        cluster.front[0].cut()
        await asyncio.sleep(1.5)
        assert await cluster.busy(1) == 1, "it waits"
        await cluster.working(1, 0)
        await cluster.front[0].accept()
        assert await asyncio.wait_for(request.over(), TERMINAL_S) in ("NOT_FOUND", "CANCELLED")


async def test_a_finished_request_can_be_fetched_again(clusters: Clusters) -> None:
    """The end came while the client was away."""
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 100)
        await request.reached(20)
        await cluster.front[0].refuse()
        cluster.front[0].cut()
        await cluster.working(1, 0)
        await cluster.front[0].accept()
        assert await asyncio.wait_for(request.over(), TERMINAL_S) == "end"


async def test_a_restarted_worker_takes_its_name(clusters: Clusters) -> None:
    """26: the newer process of a name wins at once, the older ends with status 1."""
    async with clusters() as cluster, cluster.client() as client:
        old = cluster.parts["worker-1"]
        assert await client.send("p", 10).over() == "end"
        cluster.add("worker-twin", "workers", *old.arguments)
        twin = cluster.parts["worker-twin"]
        await twin.start()
        try:
            assert await old.ended() == 1
            assert await client.send("q", 10).over() == "end"
        finally:
            await twin.close()
            del cluster.parts["worker-twin"]


async def test_a_gateway_out_of_descriptors_recovers(clusters: Clusters) -> None:
    """38: no new connection gets in, those that are in go on, and when there is room again all is well."""
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 600)
        await request.reached(10)
        limits = resource.prlimit(cluster.gateway(1).pid, resource.RLIMIT_NOFILE)
        used = cluster.gateway(1).usage()[1]
        resource.prlimit(cluster.gateway(1).pid, resource.RLIMIT_NOFILE, (used + 2, limits[1]))
        lines = [await asyncio.open_connection("127.0.0.1", cluster.gateway(1).port) for _ in range(20)]
        await request.reached(200)
        for _, writer in lines:
            writer.close()
        resource.prlimit(cluster.gateway(1).pid, resource.RLIMIT_NOFILE, limits)
        async with cluster.client() as late:
            assert await late.send("q", 10).over() == "end"
        assert await request.over() == "end"
        await until(lambda: cluster.gateway(1).usage()[1] <= used + 4, "descriptors are back")
