"""The HTTP APIs: the same streams straight at the engine, through other proxies and through the fabric, in one run.

The manner is that of `bench.streams`: the ways take turns in short runs. All have the same client: a kept connection a
stream, on which a token was fetched before anything counts, so that a proxy's line to the engine is there too.
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from bench import fabric
from bench.clients import OLLAMA, OPENAI, Way
from bench.fabric import BenchError, Fabric
from bench.figures import Run, others_cores
from bench.http_figures import HttpFigures, http_aims, http_figures, http_report
from bench.peers import PEERS, Nginx, Peer, Running, ensure, free_port
from bench.streams import RUN_S_MAX, RUNS_MAX, Load, run
from common.process import process_error

DIRECT: Final = {OLLAMA.path: "direct", OPENAI.path: "direct, /v1"}
FABRIC: Final = {OLLAMA.path: "fabric", OPENAI.path: "fabric, /v1"}
BETWEEN: Final = ("gateway", "broker", "worker")
FAST: Final = (Nginx.name,)
"""Peers that can bring the lines of a load that offers more than the aim, each by itself."""


def loads(*, quick: bool) -> tuple[list[Load], list[Load], list[Load]]:
    """What is run, by fabric: paced loads, which measure latency; one that offers more than the aim, line by line (not
    if `quick`); and one at full speed, where the engine writes as many lines at once as are ready.
    """

    def paced(streams: int, tokens: int, tokens_per_s: float, window_s: float) -> Load:
        return Load(
            name=f"{streams} at {tokens_per_s:g}/s",
            streams=streams,
            tokens=tokens,
            tokens_per_s=tokens_per_s,
            window_s=0.5 if quick else window_s,
            pause_s=0.005,
        )

    # Alone, a stream is short: many first tokens are needed.
    several = [paced(1, 2, 50, 0.8), paced(16, 15, 50, 0.8), paced(50, 15 if quick else 30, 50, 1.5)]
    full = Load(
        name="16 at full speed",
        streams=16,
        tokens=500,
        tokens_per_s=0,
        window_s=0.5 if quick else 0.8,
        # The slowest proxy takes seconds for its first streams: all first tokens count.
        warm_up_s=1.0,
        firsts_of_warm_up=True,
    )
    return several[2:] if quick else several, [] if quick else [paced(64, 100, 500, 1.0)], [full]


@dataclass(slots=True)
class Peers:
    """Those that take part, and why the others do not, by name; `versions` of all that are installed."""

    present: list[tuple[Peer, Running]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def only(self, names: Sequence[str]) -> "Peers":
        """Those of these names; who is left out is told to all."""
        return replace(self, present=[(peer, running) for peer, running in self.present if peer.name in names])

    def leave_out(self, name: str, why: BenchError) -> None:
        """It can't be had or started, or brought what it should not."""
        self.present = [(peer, running) for peer, running in self.present if peer.name != name]
        self.missing[name] = str(why)
        print(f"{name} is left out: {why}", file=sys.stderr, flush=True)


async def start_peers(
    kinds: Sequence[type[Peer]], stack: contextlib.AsyncExitStack, folder: Path, engine_url: str, *, install: bool
) -> Peers:
    """Those that can be installed, or are, and start; they end with `stack`. The engine need not be there yet."""
    peers = Peers()
    for kind in kinds:
        peer = kind()
        try:
            await ensure(peer, install=install)
            peers.versions[peer.name] = await peer.version()
            print(f"starting {peer.name}", file=sys.stderr, flush=True)
            running = await stack.enter_async_context(peer.running(folder / peer.name, engine_url))
        except BenchError as error:
            peers.leave_out(peer.name, error)
        else:
            peers.present.append((peer, running))
    return peers


def ways_to(target: Fabric, peers: Peers) -> list[Way]:
    """All ways to the engine of `target`, API by API: direct, the peers, the fabric."""
    gateway_url = target.gateway_url.replace("ws://", "http://")
    found: list[Way] = []
    for api in (OLLAMA, OPENAI):
        direct = DIRECT[api.path]
        found.append(Way(direct, target.engine_url, api))
        found += [
            Way(peer.name, running.url, api, running.token, (peer.name,), direct)
            for peer, running in peers.present
            if peer.api is api
        ]
        found.append(Way(FABRIC[api.path], gateway_url, api, target.token, BETWEEN, direct))
    return found


async def run_way(way: Way, load: Load, target: Fabric) -> Run:
    """One run of one way. Raises BenchError."""
    try:
        async with asyncio.timeout((RUNS_MAX + 1) * RUN_S_MAX), way.opened(load.streams) as generate:
            async with asyncio.TaskGroup() as first:
                for _ in range(load.streams):
                    first.create_task(generate(1))
            return await run(load, generate, target)
    except OSError as error:
        raise BenchError(f"no answer from {way.name}: {error or 'it takes too long'}") from None
    except BaseExceptionGroup as group:
        why = process_error(group)
        if why is None:
            raise
        raise BenchError(str(why)) from None


@dataclass(slots=True, frozen=True)
class Measured:
    """What was found at loads of one speed, and how many cores others kept busy meanwhile."""

    figures: list[HttpFigures]
    others_cores: float


async def measure(loads: Sequence[Load], rounds: int, folder: Path, peers: Peers, engine_port: int) -> Measured:
    """Run all ways at loads of one speed on one fabric.

    A peer that fails is left out from then on.

    Raises:
        BenchError: the fabric did not start, or a stream, direct or through it, was not what it should be.
    """
    found: list[HttpFigures] = []
    runs: list[Run] = []
    if not loads:
        return Measured(found, 0.0)
    slots = max(load.streams for load in loads)
    async with fabric.running(
        folder, tokens_per_s=loads[0].tokens_per_s, slots=slots, engine_port=engine_port
    ) as target:
        processes = target.processes | {peer.name: running.processes for peer, running in peers.present}
        target = replace(target, processes=processes)
        for load in loads:
            results: list[dict[str, Run]] = []
            for number in range(1, rounds + 1):
                print(f"HTTP, {load.name}, round {number} of {rounds}", file=sys.stderr, flush=True)
                results.append({})
                for way in ways_to(target, peers):
                    try:
                        results[-1][way.name] = await run_way(way, load, target)
                    except BenchError as error:
                        if way.name not in peers.versions:
                            raise
                        peers.leave_out(way.name, error)
                    else:
                        runs.append(results[-1][way.name])
                    for peer, running in peers.present:
                        if peer.name == way.name:
                            await running.settled()
            found += http_figures(load.name, load.streams, ways_to(target, peers), results)
    return Measured(found, others_cores(runs))


async def bench(*, quick: bool) -> dict[str, Any]:
    """Run everything. The result is for `report`, and for a file. Raises BenchError.

    `others_cores` is how many cores processes that are not ours kept busy, at its highest of the loads.
    """
    rounds = 1 if quick else 3
    groups = loads(quick=quick)
    engine_port = free_port()  # the same for every fabric, so that peers start once
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weftline-bench-")))
        peers = await start_peers(PEERS, stack, folder, f"http://127.0.0.1:{engine_port}", install=not quick)
        paced, each, full = [
            await measure(group, rounds, folder, among, engine_port)
            for group, among in zip(groups, (peers, peers.only(FAST), peers), strict=True)
        ]
    fast = [*each.figures, *full.figures]
    return {
        "others_cores": max(group.others_cores for group in (paced, each, full)),
        "rounds": rounds,
        "loads": [load for group in groups for load in group],
        "paced": paced.figures,
        "fast": fast,
        "versions": peers.versions,
        "missing": peers.missing,
        "aims": http_aims(paced.figures, fast, FABRIC[OLLAMA.path]),
    }


def report(result: dict[str, Any]) -> str:
    """What `bench` found, for people."""
    return http_report(result["paced"], result["fast"], result["aims"], result["versions"], result["missing"])
