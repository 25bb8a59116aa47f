"""Random faults for as long as wanted: `python -m tests.faults.random --minutes N --seed S`; the seed decides them all.

One broker, two gateways, three workers with an engine each, and resuming clients that stream without a pause. Every few
seconds something breaks: a process is killed with -9 and started again, or stopped for a while (SIGSTOP), a line is
cut, held or slowed. Two faults may overlap. In the end all is healed, every request is waited for, and the histories
are checked. The figures are printed, as JSON on stdout and in words on stderr; status 0 means that nothing was lost,
duplicated, disordered or foreign, that each request had exactly one terminal, that none was broken off but those whose
gateway and worker died together, and that engines are idle and memory is back.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from weftline_client import AsyncClient, Reconnect

from tests.faults.client import LibraryClient, Request, Requester
from tests.faults.cluster import Cluster
from tests.faults.proxy import Proxy

EVERY_S: Final = (1.0, 5.0)
"""Between two faults."""
DOWN_S: Final = (0.0, 4.0)
"""How long what was killed stays dead: a supervisor may be slow."""
STALL_S: Final = (0.2, 30.0)
STOP_S: Final = (0.5, 10.0)
TOKENS: Final = (50, 400)
PACE: Final = 100.0
OVERLAP_MAX: Final = 2
TERMINAL_S: Final = 60.0
"""I1 says 10 s after healing; more is waited for, so that a late terminal is told from none, and both are told."""
WARM_S: Final = 5.0
MEMORY_S: Final = 90.0
"""Workers keep what ended for 60 s, for clients that come back for it; only then can memory be back."""
GROWTH_MAX: Final = 0.10
GROWTH_BYTES: Final = 10 * 2**20
"""Below it memory of a young process is noise."""


@dataclass(slots=True)
class Outcome:
    """What is known beside the histories. Durations in s, memory in bytes: the most that a part of each kind had."""

    seed: int
    minutes: float
    clients: int
    killed: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    last_terminal_s: float = 0.0
    without_terminal: int = 0
    engines_idle: bool = True
    memory_back_s: float = 0.0
    memory_before: dict[str, int] = field(default_factory=dict)
    memory_after: dict[str, int] = field(default_factory=dict)
    descriptors_before: dict[str, int] = field(default_factory=dict)
    descriptors_after: dict[str, int] = field(default_factory=dict)

    @property
    def memory_back(self) -> bool:
        return all(
            after <= max(self.memory_before[kind] * (1 + GROWTH_MAX), self.memory_before[kind] + GROWTH_BYTES)
            for kind, after in self.memory_after.items()
        )


class Chaos:
    """Breaks a cluster, at most OVERLAP_MAX things at a time, and mends each after a while."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self._broken: set[str] = set()
        self._menders: set[asyncio.Task[None]] = set()
        self.killed: dict[str, int] = {}

    async def run(self, minutes: float) -> None:
        """Break things for so long; what is still broken then is for `heal`."""
        until = time.monotonic() + minutes * 60
        try:
            while (left := until - time.monotonic()) > 0:
                await asyncio.sleep(min(left, self._rng.uniform(*EVERY_S)))
                for mender in [task for task in self._menders if task.done()]:
                    self._menders.discard(mender)
                    mender.result()
                if len(self._broken) < OVERLAP_MAX:
                    await self._break()
        finally:
            for mender in self._menders:
                mender.cancel()
            await asyncio.gather(*self._menders, return_exceptions=True)

    async def _break(self) -> None:
        rng, cluster = self._rng, self._cluster
        # All is drawn before anything is looked at, so that a seed means the same however things went.
        what = rng.choices(("kill", "stop", "cut", "stall", "slow"), (6, 1, 2, 2, 1))[0]
        part = rng.choice([name for name in cluster.parts if what == "kill" or not name.startswith("engine")])
        line, way = rng.choice(self._lines()), rng.choice(((True, True), (True, False), (False, True)))
        down_s, stall_s, stop_s = rng.uniform(*DOWN_S), rng.uniform(*STALL_S), rng.uniform(*STOP_S)
        cut_after = rng.choice((None, rng.randrange(1, 2000)))
        target = part if what in ("kill", "stop") else line[0]
        if target in self._broken:
            return
        if what == "kill":
            self._broken.add(target)
            kind = target.split("-")[0]
            self.killed[kind] = self.killed.get(kind, 0) + 1
            await cluster.kill(target)
            self._later(target, down_s, cluster.parts[target].start)
        elif what == "stop":
            cluster.freeze(target)
            self._later(target, stop_s, partial(_at_once, cluster.thaw, target))
        elif what == "cut":
            cluster.fault("cut", target, after=cut_after)
            if cut_after is None:
                line[1].cut()
            else:
                line[1].down.cut_after = cut_after
        else:
            cluster.fault(what, target, up=way[0], down=way[1], s=round(stall_s, 1))
            if what == "stall":
                line[1].stall(up=way[0], down=way[1])
            else:
                line[1].down.delay_s = line[1].up.delay_s = 0.3
                line[1].down.bytes_per_s = 20_000
            self._later(target, stall_s, partial(_at_once, line[1].heal))

    def _lines(self) -> list[tuple[str, Proxy]]:
        cluster = self._cluster
        return [
            (f"{name}-line-{number}", proxy)
            for name, proxies in (("worker", cluster.lines), ("gateway", cluster.up), ("client", cluster.front))
            for number, proxy in enumerate(proxies, 1)
        ]

    def _later(self, target: str, delay_s: float, mend: Callable[[], Awaitable[None]]) -> None:
        async def mended() -> None:
            await asyncio.sleep(delay_s)
            await mend()
            self._broken.discard(target)

        self._broken.add(target)
        self._menders.add(asyncio.create_task(mended()))


async def _at_once(mend: Callable[..., None], *arguments: str) -> None:
    """What takes no time, as something to await."""
    mend(*arguments)


class Load:
    """Clients that each have one stream, and begin the next when it is over."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._stop = asyncio.Event()
        self.requests: set[Request] = set()
        self.refused = 0
        self._number = 0

    async def stream(self, client: Requester) -> None:
        while not self._stop.is_set():
            self._number += 1
            request = client.send(f"prompt {self._number}", self._rng.randint(*TOKENS), seed=self._rng.randrange(1000))
            self.requests.add(request)
            terminal = await request.over()
            self.requests.discard(request)
            if terminal != "end" and not request.words:
                # Refused, or ended before it began; a hurry to ask again would only flood.
                self.refused += 1
                await asyncio.sleep(0.2)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stop.set()


async def run(minutes: float, seed: int, clients: int, folder: Path) -> tuple[dict[str, Any], bool]:
    """The figures, and whether everything held."""
    rng = random.Random(seed)
    outcome = Outcome(seed, minutes, clients)
    cluster = Cluster(folder, workers=3, gateways=2, tokens_per_s=PACE, slots=8)
    async with cluster.running(), contextlib.AsyncExitStack() as stack:
        load = Load(random.Random(rng.random()))
        chaos = Chaos(cluster, random.Random(rng.random()))
        requesters: list[Requester] = []
        for number in range(clients):
            # Half of them see each event that crosses the line, half of them are what users have.
            if number % 2 == 0:
                wire = cluster.client(rng=random.Random(rng.random()))
                requesters.append(await stack.enter_async_context(wire))
            else:
                requesters.append(await stack.enter_async_context(_library(cluster, number)))
        streams = [asyncio.create_task(load.stream(requester)) for requester in requesters]
        try:
            await asyncio.sleep(WARM_S)
            outcome.memory_before, outcome.descriptors_before = _usage(cluster)
            await chaos.run(minutes)
            await cluster.heal()
            healed_at = time.monotonic()
            load.stop()
            await asyncio.wait(streams, timeout=TERMINAL_S)
            outcome.last_terminal_s = time.monotonic() - healed_at
            outcome.without_terminal = len(load.requests)
            for task in streams:
                if task.done():
                    task.result()
            with contextlib.suppress(AssertionError):
                await cluster.idle()
            outcome.engines_idle = not any([await cluster.busy(number) for number in range(1, cluster.workers + 1)])
            began = time.monotonic()
            while True:
                outcome.memory_after, outcome.descriptors_after = _usage(cluster)
                outcome.memory_back_s = time.monotonic() - began
                if outcome.memory_back or outcome.memory_back_s > MEMORY_S:
                    break
                await asyncio.sleep(1)
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        outcome.killed, outcome.refused = chaos.killed, load.refused
    # After the clients have left: a request they left is one without a terminal, and counted in `left`.
    report = cluster.check()
    held = (
        report.ok
        and not report.left
        and report.broken_off <= report.died_together
        and outcome.engines_idle
        and outcome.memory_back
    )
    facts = {name: getattr(outcome, name) for name in outcome.__slots__}
    return {"held": held, **facts, "memory_back": outcome.memory_back, **report.figures()}, held


def _library(cluster: Cluster, number: int) -> LibraryClient:
    """The published client; each keeps to one gateway, and comes back to it."""
    client = AsyncClient.from_config(
        cluster.config,
        server_url=cluster.urls[number // 2 % len(cluster.urls)],
        reconnect=Reconnect(tries_max=1000, time_max_s=600, delay_max_s=2),
    )
    return LibraryClient(client, cluster.record)


def _usage(cluster: Cluster) -> tuple[dict[str, int], dict[str, int]]:
    memory: dict[str, int] = {}
    descriptors: dict[str, int] = {}
    for name, (rss, count) in cluster.usage().items():
        kind = name.split("-")[0]
        memory[kind] = max(memory.get(kind, 0), rss)
        descriptors[kind] = max(descriptors.get(kind, 0), count)
    return memory, descriptors


def words(figures: dict[str, Any]) -> str:
    """The figures for people."""
    kills = ", ".join(f"{count} of {kind}" for kind, count in sorted(figures["killed"].items())) or "none"
    terminals = ", ".join(f"{count} {kind}" for kind, count in figures["terminals"].items())
    lines = [
        f"seed {figures['seed']}, {figures['minutes']:g} minutes: {'held' if figures['held'] else 'DID NOT HOLD'}",
        f"kills survived: {kills}; all faults: {json.dumps(figures['faults'])}",
        f"requests {figures['requests']}, events checked {figures['events']}, recovered {figures['recovered']}",
        f"lost {figures['lost']}, duplicated {figures['duplicated']}, disordered {figures['disordered']}, "
        f"foreign {figures['foreign']}",
        f"terminals: {terminals}; missing {figures['terminals_missing'] + figures['left']}, "
        f"double {figures['terminals_double']}",
        f"broken off {figures['broken_off']}, of which gateway and worker died together: {figures['died_together']}",
        f"migrated {figures['migrated']}, made twice {figures['made_again']} of {figures['made']} events",
        f"last terminal {figures['last_terminal_s']:.1f} s after healing; engines idle: {figures['engines_idle']}",
        f"memory before {figures['memory_before']}, after {figures['memory_after']}, "
        f"back: {figures['memory_back']} ({figures['memory_back_s']:.0f} s)",
        *figures["findings"][:20],
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run it and print the figures; 0 if everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.random", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where logs and histories go; kept")
    arguments = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weftline-faults-")))
        figures, held = asyncio.run(run(arguments.minutes, arguments.seed, arguments.clients, folder))
    print(words(figures), file=sys.stderr)
    print(json.dumps(figures, default=str))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
