"""The benchmark of the HTTP APIs, in small: real processes, all ways; engines stand in for the other proxies."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from bench.fabric import BenchError
from bench.http import loads, measure, start_peers
from bench.http_figures import ADDED_STREAMS, LINES_PER_S_MIN
from bench.peers import Peer, free_port
from bench.streams import Load


class Engine(Peer):
    """Brings the right tokens, by itself."""

    name = "right"
    ready = "/api/version"
    model = "simulated"

    def installed(self) -> bool:
        return True

    async def install(self) -> None:
        raise AssertionError("it is installed")

    async def version(self) -> str:
        return "1"

    def command(self, folder: Path, engine_url: str, port: int, token: str) -> tuple[Sequence[str], Mapping[str, str]]:
        listen = ("--listen", f"127.0.0.1:{port}")
        place = {"PYTHONPATH": str(Path(__file__).parents[3])}
        return (sys.executable, "-m", "workers.embedded", "--simulated", "--sim-model", self.model, *listen), place


class Wrong(Engine):
    """Does not know the model."""

    name = "wrong"
    model = "other"


class Absent(Engine):
    name = "absent"

    def installed(self) -> bool:
        return False

    async def install(self) -> None:
        raise BenchError("there is no network")


async def test_a_small_benchmark(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    port = free_port()
    load = Load(name="small", streams=2, tokens=5, tokens_per_s=50, window_s=0.2, pause_s=0.001)
    async with contextlib.AsyncExitStack() as stack:
        kinds = (Engine, Wrong, Absent)
        peers = await start_peers(kinds, stack, tmp_path, f"http://127.0.0.1:{port}", install=True)
        assert peers.missing == {"absent": "there is no network"}
        found = await measure([load], 2, tmp_path / "data", peers, port)
    assert [f.way for f in found.figures] == ["direct", "right", "fabric", "direct, /v1", "fabric, /v1"]
    for f in found.figures:
        assert f.first_ms.n > 0
        assert 0 < f.first_ms.p50 <= f.first_ms.p99
        assert f.lines_per_s.median > 0
        if f.way.startswith("direct"):
            assert f.rss_mib is None
        else:
            assert f.rss_mib is not None
            assert f.rss_mib > 1
    assert found.others_cores >= 0
    assert list(peers.missing) == ["absent", "wrong"]
    assert "404" in peers.missing["wrong"]
    assert set(psutil.Process().children()) <= before  # every process has ended


@pytest.mark.parametrize("quick", [True, False])
def test_the_aims_can_be_judged_from_what_is_run(quick: bool) -> None:
    paced, each, full = loads(quick=quick)
    assert any(load.streams == ADDED_STREAMS and load.tokens_per_s == 50 for load in paced)
    assert all(load.streams * load.tokens_per_s > LINES_PER_S_MIN for load in each)
    assert bool(each) == (not quick)
    assert [load.tokens_per_s for load in full] == [0]
