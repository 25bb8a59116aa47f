"""The real broker core between simulated clients and hosts, under a virtual clock.

Everything the core hears and says goes through `handle` and `tick`, as in a live broker: a gateway that submits and
acknowledges, a worker for each host that registers, beats every second, says every 2 s what its engine has in memory
if that has changed, and answers an `assign` with `started`, chunks and `end`. Messages take no time. Of a stream
that goes on the core hears once a second. Whatever waits when the last request has come is served to its end.
"""

import heapq
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

import msgspec

from bench.sim.hosts import Host, HostSpec, Job
from bench.sim.workload import Ask, ModelSpec
from broker.core import BrokerCore
from broker.events import Effect, Received, Send, Side
from broker.scheduler import Scheduler
from broker.settings import BrokerSettings
from common.protocol import (
    HEARTBEAT_INTERVAL_S,
    Ack,
    Assign,
    Beat,
    Chunk,
    End,
    Engine,
    Failed,
    Hello,
    Leased,
    Message,
    Model,
    Queued,
    Register,
    Started,
    Stats,
    Submit,
)
from common.protocol import State as EnginesChanged

POLL_BEATS: Final = 2
"""A worker asks its engine every 2 s what is in memory."""
GATEWAY: Final = b"gateway"
URL: Final = "http://127.0.0.1:11434"
DRAIN_S: Final = 30.0
"""What was served so long after the last request came counts as served while there was a load."""
SAMPLE_BEATS: Final = 15
QUIET_S_MAX: Final = 600.0
STEPS_MAX: Final = 10_000
"""A scheduler that starts nothing for so long though all hosts are idle, or wants so much at one instant, is wrong."""


@dataclass(slots=True)
class Sample:
    """At an instant: what each client has had so far, in weighted tokens that were computed, and who waits."""

    served: Counter[str]
    backlogged: frozenset[str]


@dataclass(slots=True)
class Outcome:
    """What came of it. `delivered`: weighted tokens, cached or not, each client got within the loaded time, `end_s`."""

    jobs: list[Job]
    hosts: list[Host]
    end_s: float
    samples: list[Sample] = field(default_factory=list)
    delivered: Counter[str] = field(default_factory=Counter)
    computing_s: float = 0.0
    cache_blocks: int = 0
    """Of all hosts together, at most."""
    decisions_us: list[float] = field(default_factory=list)


class World:
    """One run. Use `run`."""

    def __init__(self, asks: Sequence[Ask], hosts: Sequence[HostSpec], scheduler: Scheduler) -> None:
        self.jobs = [Job(number, ask) for number, ask in enumerate(asks)]
        self.hosts = [Host(spec) for spec in hosts]
        self.outcome = Outcome(self.jobs, self.hosts, asks[-1].at_s + DRAIN_S if asks else 0.0)
        self._core = BrokerCore(BrokerSettings(settle_s=0.0), nonce=1, now=0.0, scheduler=scheduler)
        self._models = sorted({ask.model for ask in asks}, key=lambda model: model.name)
        self._peers = {host.spec.name.encode(): host for host in self.hosts}
        self._told: dict[str, tuple[str, ...]] = {}
        self._due: list[tuple[float, int, Host]] = []
        self._order = count()
        self._planned: dict[str, float] = {}
        """When each host's next moment is; what else `_due` says of it is out of date."""
        self._open: dict[int, Job] = {}
        self._computed: Counter[str] = Counter()
        self._delivered: Counter[str] = Counter()
        """Of requests that ended, by client: weighted tokens computed, and delivered."""
        self._closed = False
        self._now = 0.0

    def run(self) -> Outcome:
        """Play it to its end.

        Raises:
            RuntimeError: requests wait, and nothing will ever happen again; or the core is never content.
        """
        self._say(Side.GATEWAY, GATEWAY, Hello(name="sim"))
        for peer, host in self._peers.items():
            self._say(Side.WORKER, peer, Register(name=host.spec.name, epoch="1", engines=(self._engine(host),)))
        arrivals = iter(self.jobs)
        arrival = next(arrivals, None)
        beats = 0
        quiet_since, steps = 0.0, 0
        while arrival is not None or self._open:
            arrives = arrival.ask.at_s if arrival else math.inf
            happens = self._due[0][0] if self._due else math.inf
            beat = (beats + 1) * HEARTBEAT_INTERVAL_S
            tick = self._core.next_deadline()
            now = max(self._now, min(arrives, happens, beat, tick))
            steps = steps + 1 if now == self._now else 0
            if steps > STEPS_MAX + len(self.jobs):
                raise RuntimeError(
                    f"time stands still: at {now} s the core wants to be called at {tick}, again and again"
                )
            self._now = now
            if now in (arrives, happens):
                quiet_since = now
            if happens <= now:
                due, _, host = heapq.heappop(self._due)
                if due == self._planned[host.spec.name]:
                    self._planned[host.spec.name] = math.inf
                    self._step(host)
            elif beat <= now:
                beats += 1
                self._beat(beats)
                if arrival is None and now - quiet_since > QUIET_S_MAX and not self._due:
                    raise RuntimeError(f"{len(self._open)} requests wait for ever: {list(self._core.scheduler)[:3]}")
            elif tick <= now:
                self._decide(None)
            elif arrival is not None:
                self._submit(arrival)
                arrival = next(arrivals, None)
        if not self._closed:
            self._close()
        return self.outcome

    # What happens -----------------------------------------------------------------------------------------------------

    def _submit(self, job: Job) -> None:
        ask = job.ask
        self._open[job.number] = job
        submit = Submit(
            rid=job.number.to_bytes(16, "big"),
            client=ask.client,
            ref=str(job.number),
            model=ask.model.name,
            path="/api/generate",
            prompt_bytes=4 * ask.prompt_tokens,
            prefix=ask.prefix(),
        )
        self._say(Side.GATEWAY, GATEWAY, submit, b"{}")

    def _step(self, host: Host) -> None:
        """A host's next moment."""
        peer = host.spec.name.encode()
        for job, ended in host.step(self._now):
            rid = job.number.to_bytes(16, "big")
            if ended:
                del self._open[job.number]
                self._computed[job.ask.client] += job.ask.cost - job.hit
                self._delivered[job.ask.client] += job.ask.cost
                self._say(Side.WORKER, peer, End(rid=rid, attempt=job.attempt, seq=job.events, stats=_stats(job)))
            else:
                job.events = 1
                self._say(Side.WORKER, peer, Started(rid=rid, attempt=job.attempt, status=200))
                self._say(Side.WORKER, peer, Chunk(rid=rid, attempt=job.attempt, seq=0, n=1))
        self._watch(host)

    def _watch(self, host: Host) -> None:
        due = host.due()
        if due != self._planned.get(host.spec.name):
            self._planned[host.spec.name] = due
            if due < math.inf:
                heapq.heappush(self._due, (due, next(self._order), host))

    def _beat(self, beats: int) -> None:
        """A second has passed."""
        self._say(Side.GATEWAY, GATEWAY, Beat())
        for peer, host in self._peers.items():
            self._say(Side.WORKER, peer, Beat())
            for job, written in host.written(self._now):
                if written > job.events:
                    rid = job.number.to_bytes(16, "big")
                    chunk = Chunk(rid=rid, attempt=job.attempt, seq=job.events, n=written - job.events)
                    job.events = written
                    self._say(Side.WORKER, peer, chunk)
            if beats % POLL_BEATS == 0 and self._told[host.spec.name] != tuple(host.loaded):
                self._say(Side.WORKER, peer, EnginesChanged(engines=(self._engine(host),)))
        if self._now <= self.outcome.end_s:
            if beats % SAMPLE_BEATS == 0:
                self._sample()
        elif not self._closed:
            self._close()

    def _engine(self, host: Host) -> Engine:
        """As a worker tells it; models that the host cannot hold are not on its disk."""
        self._told[host.spec.name] = tuple(host.loaded)
        return Engine(
            url=URL,
            models_max=host.spec.models_max,
            memory_bytes=int(host.spec.vram_gb * 1e9),
            models=tuple(self._model(host, model) for model in self._models if host.spec.fits(model)),
        )

    def _model(self, host: Host, model: ModelSpec) -> Model:
        size = int(model.size_gb * 1e9)
        resident = model.name in host.loaded
        running = {"name": model.name, "digest": model.digest, "size": size, "size_vram": size} if resident else None
        return Model(
            name=model.name,
            digest=model.digest,
            slots=host.spec.slots,
            size_bytes=size,
            resident=resident,
            running=msgspec.json.encode(running) if running else b"",
        )

    # The core ---------------------------------------------------------------------------------------------------------

    def _say(self, side: Side, peer: bytes, message: Message, payload: bytes = b"") -> None:
        self._decide(Received(side, peer, message, payload, b""))

    def _decide(self, event: Received | None) -> None:
        """Give the core something, and carry out what it answers; what that leads to in it as well."""
        events = deque([event])
        while events:
            event = events.popleft()
            counts = bool(len(self._core.scheduler)) or (event is not None and type(event.message) is Submit)
            start = time.thread_time_ns()
            effects = self._core.tick(self._now) if event is None else self._core.handle(event, self._now)
            if counts and (event is None or not isinstance(event.message, (Beat, Chunk))):
                self.outcome.decisions_us.append((time.thread_time_ns() - start) / 1000)
            for effect in effects:
                ack = self._carry_out(effect)
                if ack is not None:
                    events.append(Received(Side.GATEWAY, GATEWAY, ack, b"", b""))

    def _carry_out(self, effect: Effect) -> Ack | None:
        if not isinstance(effect, Send):
            return None
        message: Any = effect.message
        if isinstance(message, Assign):
            job = self._job(message.rid)
            job.attempt = message.attempt
            host = self._peers[effect.peer]
            host.take(job, self._now)
            self._watch(host)
        elif isinstance(message, Leased):
            self._job(message.rid).leased_at = self._now
        elif isinstance(message, Queued):
            job = self._job(message.rid)
            if job.told_eta_s is None and job.ask.at_s == self._now and message.eta_ms is not None:
                job.told_eta_s = message.eta_ms / 1000
        elif isinstance(message, Failed):
            job = self._job(message.rid)
            assert job.host is None, f"{message} of a request that runs"
            job.shed = True
            del self._open[job.number]
            return Ack(rid=message.rid)
        elif isinstance(message, End):
            return Ack(rid=message.rid)
        return None

    def _job(self, rid: bytes) -> Job:
        return self.jobs[int.from_bytes(rid, "big")]

    # Measuring --------------------------------------------------------------------------------------------------------

    def _running(self) -> Iterator[tuple[Job, int]]:
        """Who has had its first token and goes on, with how many of them."""
        return ((job, written) for host in self.hosts for job, written in host.written(self._now))

    def _sample(self) -> None:
        blocks = sum(host.cache_blocks(entry.model) for host in self.hosts for entry in host.loaded.values())
        self.outcome.cache_blocks = max(self.outcome.cache_blocks, blocks)
        served = self._computed.copy()
        for job, written in self._running():
            served[job.ask.client] += job.ask.prompt_tokens - job.hit + 2 * written
        waiting = frozenset(job.ask.client for job in self._open.values() if job.begun_at is None)
        self.outcome.samples.append(Sample(served, waiting))

    def _close(self) -> None:
        """The time is over in which fairness and use are measured."""
        self._closed = True
        self.outcome.delivered = self._delivered.copy()
        for job, written in self._running():
            self.outcome.delivered[job.ask.client] += job.ask.prompt_tokens + 2 * written
        self.outcome.computing_s = sum(host.computing_s for host in self.hosts)
        self.outcome.end_s = self._now


def _stats(job: Job) -> Stats:
    """As Ollama's last line says it: its load_duration is the wait for the model, in the host's line too."""
    assert job.first_at is not None
    assert job.begun_at is not None
    assert job.end_at is not None
    return Stats(
        done_reason="stop",
        prompt_tokens=job.ask.prompt_tokens,
        completion_tokens=job.ask.output_tokens,
        total_ns=int((job.end_at - job.arrived_at) * 1e9),
        load_ns=int((job.loaded_at - job.arrived_at) * 1e9),
        prompt_ns=int((job.first_at - job.begun_at) * 1e9),
        completion_ns=int((job.end_at - job.first_at) * 1e9),
    )
