"""`python -m bench.sim.cost`: what a decision costs the broker's core, with many hosts and a long queue."""

import random
import sys
import time
import tracemalloc
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
import typer

from bench.sim.figures import percentile
from bench.sim.hosts import DEFAULT_HOSTS
from bench.sim.policies import POLICIES
from broker.core import POSITIONS_STEP_S, BrokerCore
from broker.events import Effect, Received, Send, Side
from broker.settings import BrokerSettings
from common import process
from common.command import run_command
from common.errors import UsageError
from common.protocol import (
    Ack,
    Assign,
    Beat,
    Chunk,
    End,
    Engine,
    Hello,
    Message,
    Model,
    Register,
    Started,
    State,
    Stats,
    Submit,
)

SIZES: Final = ((64, 10_000), (1_000, 100_000))
AIMS_US: Final = {SIZES[0]: 200, SIZES[1]: 2_000}
MODELS: Final = 50
RESIDENT: Final = 2
SLOTS: Final = 4
CLIENTS: Final = 500
DECISIONS: Final = 2_000
TRACED: Final = 2_000
MEASURED: Final = tuple(name for name in POLICIES if name != "oracle")
"""The oracle knows nothing of what is asked here."""
TICKS: Final = 100
"""Ten seconds of them."""
URL: Final = "http://127.0.0.1:11434"
STATS: Final = Stats(
    prompt_tokens=1000,
    completion_tokens=200,
    total_ns=4_200_000_000,
    prompt_ns=200_000_000,
    completion_ns=4_000_000_000,
)


class Crowd:
    """A core with hosts that each have all models on disk and two in memory, and with clients that ask for any."""

    def __init__(self, policy: str, hosts: int, queued: int, seed: int, running_max: int = 0) -> None:
        self._running_max = running_max
        self._rng = random.Random(seed)
        self._now = 0.0
        self._number = 0
        self._hosts = hosts
        self._running: list[Assign] = []
        self._peers: dict[bytes, bytes] = {}
        settings = BrokerSettings(settle_s=0.0, queue_max=4 * queued, queue_client_max=4 * queued)
        fleet = [msgspec.structs.replace(DEFAULT_HOSTS[0], name=f"h{number}") for number in range(hosts)]
        self.core = BrokerCore(settings, nonce=1, now=0.0, scheduler=POLICIES[policy]([], fleet, seed))
        self._gateway(Hello(name="g"))
        for number in range(hosts):
            engine = _engine(number)
            self._worker(b"h%d" % number, Register(name=f"h{number}", epoch="1", engines=(engine,)))
        # A policy that pushes never has a queue: then it is only as long as all slots twice over.
        while len(self.core.scheduler) < queued and self._number < queued + 4 * hosts * RESIDENT * SLOTS:
            self.submit()

    def submit(self) -> float:
        """Another request; the CPU time the core took for it, in us."""
        self._number += 1
        submit = Submit(
            rid=self._number.to_bytes(16, "big"),
            client=f"client{self._rng.randrange(CLIENTS)}",
            ref=str(self._number),
            model=f"m{self._rng.randrange(MODELS)}:latest",
            path="/api/chat",
            prompt_bytes=4000,
            running_max=self._running_max,
            prefix=tuple(self._rng.randbytes(8) for _ in range(7)),
        )
        return self._gateway(submit, b"{}")

    def end(self) -> float:
        """Some request ends, which frees a slot; the CPU time, in us."""
        index = self._rng.randrange(len(self._running))
        self._running[index], self._running[-1] = self._running[-1], self._running[index]
        assign = self._running.pop()
        peer = self._peers.pop(assign.rid)
        took_us = self._worker(peer, End(rid=assign.rid, attempt=assign.attempt, seq=1, stats=STATS))
        self._gateway(Ack(rid=assign.rid))
        return took_us

    def report(self) -> float:
        """A worker says again what its engine has; the CPU time, in us."""
        number = self._rng.randrange(self._hosts)
        return self._worker(b"h%d" % number, State(engines=(_engine(number),)))

    def tick(self) -> float:
        """What time demands, positions too; the CPU time, in us. All others beat meanwhile."""
        self._gateway(Beat())
        for number in range(self._hosts):
            self._worker(b"h%d" % number, Beat())
        self._now += POSITIONS_STEP_S
        start = time.thread_time_ns()
        effects = self.core.tick(self._now)
        return self._took(start, effects)

    def _gateway(self, message: Message, payload: bytes = b"") -> float:
        return self._handle(Received(Side.GATEWAY, b"g", message, payload, b""))

    def _worker(self, peer: bytes, message: Message) -> float:
        return self._handle(Received(Side.WORKER, peer, message, b"", b""))

    def _handle(self, event: Received) -> float:
        self._now += 1e-6  # all of it together stays below what makes a silent peer a lost one
        start = time.thread_time_ns()
        effects = self.core.handle(event, self._now)
        return self._took(start, effects)

    def _took(self, start: int, effects: Sequence[Effect]) -> float:
        took_us = (time.thread_time_ns() - start) / 1000
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, Assign):
                assign = effect.message
                self._running.append(assign)
                self._peers[assign.rid] = effect.peer
                self._worker(effect.peer, Started(rid=assign.rid, attempt=assign.attempt, status=200))
                self._worker(effect.peer, Chunk(rid=assign.rid, attempt=assign.attempt, seq=0, n=1))
        return took_us


def _engine(host: int) -> Engine:
    return Engine(url=URL, models_max=RESIDENT, models=tuple(_model(model, host) for model in range(MODELS)))


def _model(number: int, host: int) -> Model:
    return Model(
        name=f"m{number}:latest",
        digest=f"sha256:m{number}",
        slots=SLOTS,
        size_bytes=5 * 10**9,
        resident=(number - RESIDENT * host) % MODELS < RESIDENT,
    )


def measure(
    policy: str, hosts: int, queued: int, *, running_max: int = 0, decisions: int = DECISIONS, seed: int = 0
) -> dict[str, Any]:
    """Percentiles in us of CPU time, and what a waiting request takes beside its body, in bytes."""
    crowd = Crowd(policy, hosts, queued, seed, running_max)
    waiting = len(crowd.core.scheduler)
    calls = {"submit": crowd.submit, "end": crowd.end, "report": crowd.report}
    rounds = [{what: call() for what, call in calls.items()} for _ in range(decisions)]
    taken = {what: sorted(times[what] for times in rounds) for what in calls}
    ticks = sorted(crowd.tick() for _ in range(TICKS))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        count = len(crowd.core.scheduler)
        for _ in range(TRACED):
            crowd.submit()
        added = len(crowd.core.scheduler) - count
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    return {
        "policy": policy,
        "hosts": hosts,
        "queued": waiting,
        **{f"{what}_us_p{at}": percentile(times, at) for what, times in taken.items() for at in (50, 99)},
        "tick_us_p50": percentile(ticks, 50),
        "tick_us_max": ticks[-1],
        "bytes_per_queued": round(held / added) if added else None,
    }


def cost(
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(MEASURED)}.")] = "weftline",
    hosts: Annotated[int | None, typer.Option(min=1, help="[64, then 1000]")] = None,
    queued: Annotated[int | None, typer.Option(min=1, help="[10,000, then 100,000]")] = None,
    running: Annotated[int, typer.Option(min=0, help="What each client may have running at once; 0: any number.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: a list.")] = False,
) -> int:
    """Measure what a submit, an end that frees a slot and a worker's report cost, while many requests wait."""
    if policy not in MEASURED:
        raise UsageError(f"there is no policy {policy!r} to measure; there are: {', '.join(MEASURED)}")
    sizes = SIZES if hosts is None and queued is None else ((hosts or SIZES[0][0], queued or SIZES[0][1]),)
    process.collect_rarely()  # as the broker does
    results = [measure(policy, *size, running_max=running) for size in sizes]
    if json:
        print(msgspec.json.format(msgspec.json.encode(results)).decode())
        return 0
    for size, result in zip(sizes, results, strict=True):
        aim = f" (aim: {AIMS_US[size]} us)" if size in AIMS_US else ""
        print(f"{policy}, {result['hosts']} hosts, {result['queued']} requests waiting{aim}:")
        for what in ("submit", "end", "report"):
            print(f"  {what:6} p50 {result[what + '_us_p50']:7.0f} us   p99 {result[what + '_us_p99']:7.0f} us")
        print(f"  tick   p50 {result['tick_us_p50']:7.0f} us   max {result['tick_us_max']:7.0f} us")
        print(f"  memory {result['bytes_per_queued']} bytes a waiting request")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(cost, argv, name="python -m bench.sim.cost")


if __name__ == "__main__":
    sys.exit(main())
