"""Lines that break (faults 12 to 17, 19 to 21); those marked `root` on a real link that loses packets."""

import asyncio
import random

import pytest

from tests.faults.conftest import TERMINAL_S, Clusters
from tests.faults.network import linked, missing

pytestmark = pytest.mark.faults
root = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


@pytest.mark.quick
async def test_a_clients_line_is_cut_in_mid_frame(clusters: Clusters) -> None:
    """17, in front: again and again, at places drawn from a seed."""
    rng = random.Random(17)
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 400)
        for count in range(20, 200, 40):
            await request.reached(count)
            cluster.front[0].down.cut_after = rng.randrange(1, 400)
        assert await request.over() == "end"
        assert client.lines > 3


async def test_a_workers_line_is_cut_in_mid_frame(clusters: Clusters) -> None:
    """17, behind: repaired by replays, unseen by the client."""
    rng = random.Random(18)
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 400)
        for count in range(20, 200, 40):
            await request.reached(count)
            cluster.fault("cut", "worker-line-1")
            cluster.lines[0].up.cut_after = rng.randrange(1, 400)
        assert await request.over() == "end"
        assert request.end["attempts"] == 1
        assert not request.resumed


async def test_a_gateways_line_is_cut_in_mid_frame(clusters: Clusters) -> None:
    """17, in the middle."""
    rng = random.Random(19)
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 400)
        for count in range(20, 200, 40):
            await request.reached(count)
            cluster.up[0].down.cut_after = rng.randrange(1, 400)
        assert await request.over() == "end"
        assert request.end["attempts"] == 1


async def test_a_worker_is_partitioned_for_half_a_minute(clusters: Clusters) -> None:
    """12: its streams go on elsewhere; back again it is of use."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        requests = [client.send(f"p{number}", 500) for number in range(4)]
        for request in requests:
            await request.reached(10)
        cluster.fault("stall", "worker-line-1")
        cluster.lines[0].stall()
        await cluster.sees(1, 1, 5.0)
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}
        await asyncio.sleep(25)
        cluster.lines[0].heal()
        await cluster.ready(5.0)


@pytest.mark.parametrize(("up", "down"), [(True, False), (False, True)])
async def test_a_workers_line_is_dead_one_way(clusters: Clusters, up: bool, down: bool) -> None:
    """13: found in 3 beats either way, for who hears nothing says so."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        requests = [client.send(f"p{number}", 600) for number in range(4)]
        for request in requests:
            await request.reached(10)
        cluster.lines[0].stall(up=up, down=down)
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}
        cluster.lines[0].heal()
        await cluster.ready(5.0)


@pytest.mark.parametrize(("up", "down"), [(True, True), (True, False), (False, True)])
async def test_a_gateways_line_is_dead_for_a_while(clusters: Clusters, up: bool, down: bool) -> None:
    """13."""
    async with clusters(gateways=2) as cluster, cluster.client() as client:
        request = client.send("p", 600)
        await request.reached(10)
        cluster.up[0].stall(up=up, down=down)
        await asyncio.sleep(5)
        cluster.up[0].heal()
        assert await asyncio.wait_for(request.over(), 2 * TERMINAL_S) == "end"


async def test_a_half_open_worker_is_found(clusters: Clusters) -> None:
    """16: bytes vanish, then it is killed, and nothing tells the broker but the missing beats."""
    async with clusters(workers=2) as cluster, cluster.client() as client:
        requests = [client.send(f"p{number}", 300) for number in range(4)]
        for request in requests:
            await request.reached(10)
        cluster.lines[0].up.swallowing = cluster.lines[0].down.swallowing = True
        await cluster.kill("worker-1")
        await cluster.sees(1, 1, 5.0)
        assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}


async def test_a_line_flaps_for_a_minute(clusters: Clusters) -> None:
    """19: every second, in turn the client's, the worker's and the gateway's; 20 s here, a minute in the long run."""
    async with clusters() as cluster, cluster.client() as client:
        request = client.send("p", 3000)
        for second in range(20):
            await asyncio.sleep(1)
            [cluster.front, cluster.lines, cluster.up][second % 3][0].cut()
        assert await asyncio.wait_for(request.over(), 30) == "end"
        assert request.end["attempts"] == 1


async def test_bytes_come_one_by_one(clusters: Clusters) -> None:
    """21, on every line."""
    async with clusters() as cluster, cluster.client() as client:
        for proxy in (*cluster.lines, *cluster.up, *cluster.front):
            proxy.up.piece_bytes = proxy.down.piece_bytes = 1
        assert await client.send("p", 50).over() == "end"


@root
@pytest.mark.quick
async def test_a_link_that_loses_a_fifth_of_its_packets(clusters: Clusters) -> None:
    """14: 5 % and 20 %."""
    with linked(14) as link:
        async with clusters(worker_prefix=link.prefix, broker_host=link.here) as cluster, cluster.client() as client:
            for share in (0.05, 0.2):
                link.lose(share)
                requests = [client.send(f"p{share}{number}", 150) for number in range(3)]
                assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}
            assert link.out.lost + link.back.lost > 10
            link.heal()


@root
async def test_a_link_of_64_kbit(clusters: Clusters) -> None:
    """15: slower than the tokens come, and nothing is lost for it."""
    with linked(15) as link:
        async with clusters(worker_prefix=link.prefix, broker_host=link.here) as cluster, cluster.client() as client:
            link.rate(64_000)
            requests = [client.send(f"p{number}", 100) for number in range(2)]
            assert set(await asyncio.gather(*(request.over() for request in requests))) == {"end"}
            link.heal()


@root
@pytest.mark.parametrize(("out", "back"), [(True, True), (True, False), (False, True)])
async def test_a_link_is_down_for_half_a_minute(clusters: Clusters, out: bool, back: bool) -> None:
    """12, 13: the only worker; its stream goes on with it, or ends as one whose host, or every host, is gone."""
    with linked(12) as link:
        async with clusters(worker_prefix=link.prefix, broker_host=link.here) as cluster, cluster.client() as client:
            request = client.send("p", 300)
            await request.reached(10)
            link.partition(out=out, back=back)
            await cluster.sees(1, 0, 6.0)
            await asyncio.sleep(25)
            link.heal()
            await cluster.ready(TERMINAL_S)
            assert await asyncio.wait_for(request.over(), TERMINAL_S) in ("end", "WORKER_LOST", "NO_WORKERS")
            assert await client.send("q", 10).over() == "end"
