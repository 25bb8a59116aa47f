"""What the broker believes of engines: which models are in memory, how busy, how fast. Pure.

Theory of operation
-------------------
Every model on an engine is a *runner*: it has slots, rates (broker/rates.py), beginnings of prompts that it has read
(broker/affinity.py), and is loaded or not. What is asked of an engine decides what it has in memory, so that follows
from the leases (`begin`, `started`, `end`), and what its worker reports every few seconds corrects it (`report`):

- A load begins with a request for a model that is not in memory, and is over when the engine answers one for it.
- To make room an engine unloads what is idle, what was used longest ago first. How much it holds is told by its
  `models_max` or `memory_bytes`; else it is learnt from what was in memory at once, and what was unloaded after a load.
- Options that belong to loading (`Submit.variant`) are part of what is loaded: with other ones a runner counts as not
  loaded, and as its own victim.
- The durations of its answers calibrate the rates, and tell whether it still had the beginning of a prompt.

What is known of the requests for a model, whichever engine serves them, is its `Demand`.
"""

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Final

from broker.affinity import Prefixes
from broker.order import OUTPUT_WEIGHT, Line
from broker.rates import LOAD_S_MIN, NS, OUTPUT_TOKENS, PROMPT_TOKENS, TOKENS_PER_BYTE, Arrivals, Mean, Rates, Scale
from broker.state import Request, Worker
from common.protocol import Engine, Stats

SERVICE_S_MIN: Final = 1e-3
READING_S_MIN: Final = 1e-6
"""Less is what is left over where floats are added and taken away again."""
HORIZON_S: Final = 60.0
"""How far ahead is looked: what does not settle by then is not waited for."""
SPILL_S: Final = 1e4
"""What it is worth to load a model where it fits rather than where it doesn't."""
MEMORY_FACTOR: Final = 1.1
MODEL_MEMORY_BYTES: Final = 5e8
"""What a model takes in memory beside its size on disk: caches, and what is computed."""
BLAMED_S: Final = 12.0
"""What is seen to be unloaded so soon after a load was unloaded for it."""
OVERLAP_SMALL: Final = 0.2
"""The share of a prompt up to which it hardly matters whether it was there: it tells how fast the rest was read."""
OVERLAP_TOKENS_MIN: Final = 256
"""Of less it can't be seen whether it was read from the cache."""


@dataclass(slots=True, eq=False)
class Lease:
    """A request on a runner. `cost` is what its client was charged, `ends` when it should end.

    `reads_s`: how long reading its prompt takes; 0 once that is done. `alone`: nothing else was read meanwhile.
    """

    client: str
    cost: float
    ends: float
    overlap: int
    beside: int
    loads: bool
    reads_s: float = 0.0
    alone: bool = False
    started: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Runner:
    """A model on an engine, loaded or not.

    `used`: when it last began or ended something; `since`: when it was loaded. `token_s`, `full_token_s` and
    `prefill_s` are its rates as things stand: with what runs now, with all slots taken, and of a token read. `harm_s`:
    by how much a token of one more makes all that run on the engine later, together.
    """

    server: "Server"
    digest: str
    slots: int
    size: int
    rates: Rates
    demands: "list[Demand]" = field(default_factory=list)
    names: frozenset[str] = frozenset()
    loaded: bool = False
    variant: str | None = None
    since: float = -inf
    used: float = -inf
    loading: bytes = b""
    leaving: bool = False
    """Another is loaded, and this one is unloaded for it as soon as it is idle."""
    leases: dict[bytes, Lease] = field(default_factory=dict)
    token_s: float = 0.0
    full_token_s: float = 0.0
    prefill_s: float = 0.0
    harm_s: float = 0.0

    @property
    def writes(self) -> bool:
        """Whether it answers somebody: then it is in memory."""
        return any(lease.started for lease in self.leases.values())

    def serves(self, variant: str) -> bool:
        """Whether it is loaded with these options; with which it was loaded before it was seen nobody knows."""
        return self.loaded and self.variant in (None, variant)

    def free_in(self, now: float) -> float:
        """Seconds until a slot is free; one that should be since long is not expected before as long again."""
        if len(self.leases) < self.slots:
            return 0.0
        soonest = inf
        for lease in self.leases.values():
            left = abs(lease.ends - now)
            if left < soonest:
                soonest = left
        return max(0.05, soonest)

    def load_left_s(self, now: float) -> float:
        """Seconds until it is loaded, while it is being loaded."""
        return max(0.1, self.since + self.rates.load_s() - now) if self.loading else 0.0


@dataclass(slots=True, eq=False, repr=False)
class Server:
    """An engine. `holds`: bytes of models it was seen to hold at once; `bursts`: more than it can.

    `reading_s`: how long it will read prompts, one after the other, as if it had begun none of them.
    `room`: bytes of a model that could be loaded if all that is idle were unloaded; negative: none, not even one
    whose size is not known.
    `drains_for`: until it has loaded that model it takes no other request, at most until then, and so again not before
    `drains_after`.
    """

    worker: Worker
    url: str
    models_max: int = 0
    memory: float = 0.0
    scale: Scale = field(default_factory=Scale)
    runners: dict[str, Runner] = field(default_factory=dict)
    loaded: dict[str, Runner] = field(default_factory=dict)
    running: int = 0
    reading_s: float = 0.0
    loading: Runner | None = None
    drains_for: "Demand | None" = None
    drains_until: float = -inf
    drains_after: float = -inf
    holds: float = 0.0
    bursts: float = inf
    room: float = inf
    known: bool = False
    """Its worker speaks of it."""
    pictured: Hashable = None
    """What was believed after the last report."""

    def fits(self, size: float, count: int) -> bool:
        """Whether it can hold so many models of so many bytes together, as far as is known."""
        if count == 1:
            return True
        if 0 < self.models_max < count:
            return False
        if size <= self.holds:
            return True
        if self.memory:
            return size * MEMORY_FACTOR + MODEL_MEMORY_BYTES * count <= self.memory
        return size < self.bursts

    def spills_s(self, runner: Runner) -> float:
        """What it costs that a model is larger than the memory, so that the CPU has to run a part of it."""
        needed = runner.size * MEMORY_FACTOR + MODEL_MEMORY_BYTES
        return SPILL_S if 0 < self.memory < needed else 0.0

    def demands(self) -> "dict[Demand, None]":
        """Of the models that it has."""
        return dict.fromkeys(demand for runner in self.runners.values() for demand in runner.demands)

    def picture(self) -> Hashable:
        """All of which a report may say something new."""
        models = [
            (one.digest, one.loaded, one.loading, one.slots, one.size, one.names) for one in self.runners.values()
        ]
        worker = self.worker
        known = worker, worker.registration, worker.serves, self.models_max, self.memory, self.holds, self.bursts
        return *known, tuple(models)

    def drains(self, now: float) -> bool:
        """Whether it takes nothing, so that it becomes idle."""
        return self.drains_for is not None and self.drains_until > now

    def refresh(self) -> None:
        """Something has changed on which estimates rest."""
        busy, count = 0.0, 0
        for runner in self.loaded.values():
            rates = runner.rates
            runner.token_s = rates.token_s(self.running)
            runner.harm_s = self.running and (runner.token_s - rates.token_s(self.running - 1)) * self.running
            runner.full_token_s = rates.token_s(max(self.running, runner.slots) - 1)
            runner.prefill_s = rates.prefill_s(1.0)
            if runner.leases:
                busy += runner.size
                count += 1
        if self.loading is not None or 0 < self.models_max <= count:
            self.room = -1.0
        elif not count:
            self.room = inf
        elif self.memory:
            room = (self.memory - MODEL_MEMORY_BYTES * (count + 1)) / MEMORY_FACTOR
            self.room = max(room, self.holds) - busy
        else:
            self.room = max(self.holds, self.bursts - 1) - busy


@dataclass(slots=True, eq=False, repr=False)
class Demand:
    """What is known of the requests for a model.

    `capacity`, requests per second of what is loaded, and `soonest`, when a slot of it is free, are of the last look.
    """

    name: str
    arrivals: Arrivals = field(default_factory=Arrivals)
    line: Line = field(default_factory=Line)
    output: Mean = field(default_factory=Mean)
    prompt: Mean = field(default_factory=Mean)
    tokens_per_byte: Mean = field(default_factory=Mean)
    runners: dict[Runner, None] = field(default_factory=dict)
    loaded: dict[Runner, None] = field(default_factory=dict)
    slots: int = 0
    capacity: float = 0.0
    soonest: float = inf
    wants_load: bool = False
    patient: bool = False
    """Somebody waits for a busy runner, which another that waits may change."""
    better_at: float = -inf
    drains: Server | None = None

    def prompt_tokens(self, request: Request, overlap: int = 0) -> float:
        """What of its prompt is to be read where so many bytes of it were read before."""
        size = request.submit.prompt_bytes or len(request.body)
        return max(1.0, (size - overlap) * self.tokens_per_byte.of(TOKENS_PER_BYTE))

    def output_tokens(self, request: Request) -> float:
        expected = self.output.of(OUTPUT_TOKENS)
        return expected if request.submit.output_max is None else min(expected, request.submit.output_max)

    def cost(self, request: Request, overlap: int) -> float:
        return self.prompt_tokens(request, overlap) + OUTPUT_WEIGHT * self.output_tokens(request)

    def service_s(self, runner: Runner) -> float:
        """How long an average request takes on a runner whose slots are all taken."""
        output_s = self.output.of(OUTPUT_TOKENS) * runner.full_token_s
        return max(SERVICE_S_MIN, self.prompt.of(PROMPT_TOKENS) * runner.prefill_s + output_s)

    def cold_service_s(self, runner: Runner) -> float:
        """The same of one that is not loaded, with its slots alone."""
        rates = runner.rates
        output_s = self.output.of(OUTPUT_TOKENS) * rates.token_s(max(runner.server.running + 1, runner.slots) - 1)
        return max(SERVICE_S_MIN, rates.prefill_s(self.prompt.of(PROMPT_TOKENS)) + output_s)

    def wait_s(self, arrivals: float, slots: int, capacity: float = 0.0) -> float:
        """How long a request waits on average, with so many slots more (or less) than are loaded.

        After Sakasegawa's approximation for many servers; at most half the horizon, for what does not settle.
        """
        slots += self.slots
        capacity += self.capacity
        if slots <= 0 or capacity <= 0:
            return HORIZON_S / 2
        load = arrivals / capacity
        if load >= 1:
            return HORIZON_S / 2
        power: float = load ** (sqrt(2 * (slots + 1)) - 1)
        return min(power / (capacity * (1 - load)), HORIZON_S / 2)

    def look(self, now: float) -> None:
        """See what serves it."""
        capacity, soonest, slots = 0.0, inf, 0
        for runner in self.loaded:
            worker = runner.server.worker
            if worker.serves:
                slots += runner.slots
                capacity += runner.slots / self.service_s(runner)
                soonest = min(soonest, max(runner.load_left_s(now), runner.free_in(now), worker.paused_until - now))
        self.slots, self.capacity, self.soonest = slots, capacity, now + soonest

    def end_drain(self) -> None:
        """The engine that was to become idle for it takes other requests again."""
        if self.drains is not None and self.drains.drains_for is self:
            self.drains.drains_for = None
        self.drains = None


class Runners:
    """All of them, by engine and by model."""

    def __init__(self) -> None:
        self.demands: dict[str, Demand] = {}
        self.servers: dict[str, dict[str, Server]] = {}
        """By worker and URL."""
        self.prefixes: Prefixes[Runner] = Prefixes()
        self._scale = Scale()

    def demand(self, name: str) -> Demand:
        """Of that model, which may be new."""
        demand = self.demands.get(name)
        if demand is None:
            demand = self.demands[name] = Demand(name)
        return demand

    def tidy(self, demand: Demand) -> None:
        """Forget a model that is nowhere."""
        if not demand.runners and demand.line.idle:
            self.demands.pop(demand.name, None)

    def _server(self, worker: Worker, url: str) -> Server:
        servers = self.servers.setdefault(worker.name, {})
        server = servers.get(url)
        if server is None:
            server = servers[url] = Server(worker, url)
        return server

    def _forget(self, server: Server) -> None:
        servers = self.servers[server.worker.name]
        del servers[server.url]
        if not servers:
            del self.servers[server.worker.name]

    def runner(self, worker: Worker, url: str, digest: str, slots: int = 1, size: int = 0) -> Runner:
        """The runner of that name; one of a lease that its engine does not speak of any more is made up."""
        server = self._server(worker, url)
        runner = server.runners.get(digest)
        if runner is None:
            runner = Runner(server, digest, slots, size, Rates(size, server.scale, self._scale))
            server.runners[digest] = runner
        return runner

    # Leases -----------------------------------------------------------------------------------------------------------

    def begin(self, request: Request, now: float) -> Lease:
        """A request has a lease, for which its client is charged."""
        assert request.worker is not None
        submit = request.submit
        demand = self.demand(submit.model)
        runner = self.runner(request.worker, request.engine, request.digest)
        server = runner.server
        loads = not runner.serves(submit.variant)
        if loads:
            self._loads(runner, request.rid, now)
            server.drains_after = -inf
        if loads or submit.variant:
            runner.variant = submit.variant
        overlap = self.prefixes.overlap(runner, submit.prefix)
        cost = demand.cost(request, overlap)
        lease = Lease(submit.client, cost, now, overlap, server.running, loads)
        runner.leases[request.rid] = lease
        token_s = runner.rates.token_s(server.running)
        server.running += 1
        server.refresh()
        lease.reads_s = demand.prompt_tokens(request, overlap) * runner.prefill_s
        lease.alone = not server.reading_s
        if server.reading_s:
            for other in server.loaded.values():
                for beside in other.leases.values():
                    beside.alone = beside.alone and not beside.reads_s
        server.reading_s += lease.reads_s
        run_s = server.reading_s + demand.output_tokens(request) * token_s
        lease.ends = now + runner.load_left_s(now) + run_s
        runner.used = now
        self.prefixes.remember(runner, submit.prefix)
        demand.line.begin(submit.client, cost, submit.weight)
        demand.end_drain()
        if loads and server.drains_for is not None:
            server.drains_for.end_drain()
        return lease

    def started(self, request: Request, now: float) -> Runner | None:
        """Its engine answers; the runner whose load that ends."""
        assert request.worker is not None
        runner = self.runner(request.worker, request.engine, request.digest)
        lease = runner.leases[request.rid]
        lease.started = True
        self._has_read(runner.server, lease)
        if runner.loaded and not runner.loading:
            return None
        if runner.names and not runner.loaded:
            self._set_loaded(runner, True)  # whatever its worker said meanwhile: it answers
        self._has_loaded(runner, now)
        return runner

    def end(self, request: Request, stats: Stats | None, now: float) -> tuple[Lease, Runner]:
        """A lease is over; its client is charged what the request took."""
        assert request.worker is not None
        demand = self.demand(request.submit.model)
        runner = self.runner(request.worker, request.engine, request.digest)
        lease = runner.leases.pop(request.rid)
        server = runner.server
        self._has_read(server, lease)
        server.running -= 1
        runner.used = now
        if runner.loading == request.rid:
            if stats is None and runner.leases:
                runner.loading = next(iter(runner.leases))
            else:
                if stats is None:
                    self._set_loaded(runner, False)  # as far as is known; its engine will say
                self._has_loaded(runner, now)
        if runner.leaving and not runner.leases:
            self._set_loaded(runner, False)
        spent = lease.cost
        if stats is not None:
            spent = self._learn(demand, runner, request, lease, stats)
        elif request.events <= request.start:
            spent = 0.0
        demand.line.end(lease.client, lease.cost, spent)
        self.tidy(demand)
        server.refresh()
        if not runner.leases and not runner.names:
            self._drop(runner)
            if not server.runners and not server.known:
                self._forget(server)
        return lease, runner

    def _learn(self, demand: Demand, runner: Runner, request: Request, lease: Lease, stats: Stats) -> float:
        """Calibrate by what the engine says of a request; what it cost, in tokens."""
        rates, submit = runner.rates, request.submit
        written = max(0, stats.completion_tokens)
        if lease.loads and stats.load_ns * NS >= LOAD_S_MIN:
            rates.saw_load(stats.load_ns)
        rates.saw_tokens(written, stats.completion_ns, (lease.beside + runner.server.running) / 2)
        overlap = min(lease.overlap * demand.tokens_per_byte.of(TOKENS_PER_BYTE), stats.prompt_tokens)
        if stats.prompt_tokens > 0:
            if overlap <= OVERLAP_SMALL * stats.prompt_tokens and (lease.alone or not rates.read):
                rates.saw_prefill(int(stats.prompt_tokens - overlap), stats.prompt_ns)
            elif overlap > OVERLAP_TOKENS_MIN and lease.alone:
                between = rates.prefill_s(stats.prompt_tokens - overlap / 2)
                if stats.prompt_ns * NS > between:
                    self.prefixes.missed(runner)
                    overlap = 0.0
                else:
                    self.prefixes.hit(runner)
            demand.prompt.add(stats.prompt_tokens - overlap)
            if submit.prompt_bytes:
                demand.tokens_per_byte.add(stats.prompt_tokens / submit.prompt_bytes)
        if written or submit.output_max == 0:  # nothing is written of what is embedded
            demand.output.add(written)
        return max(1.0, stats.prompt_tokens - overlap) + OUTPUT_WEIGHT * written

    @staticmethod
    def _has_read(server: Server, lease: Lease) -> None:
        left_s = server.reading_s - lease.reads_s
        server.reading_s = left_s if server.running > 1 and left_s > READING_S_MIN else 0.0
        lease.reads_s = 0.0

    def _loads(self, runner: Runner, rid: bytes, now: float) -> None:
        """Its engine loads it now for that request, and unloads others: the idle first, then those used longest ago."""
        server = runner.server
        self.prefixes.forget(runner)
        self._set_loaded(runner, True)
        runner.since, runner.loading = now, rid
        if server.loading is None:
            server.loading = runner
        size, count = sum(other.size for other in server.loaded.values()), len(server.loaded)
        others = [other for other in server.loaded.values() if other is not runner]
        for other in sorted(others, key=lambda other: (len(other.leases) > 0, other.used)):
            if server.fits(size, count):
                break
            size -= other.size
            count -= 1
            if other.leases:
                other.leaving = True
            else:
                self._set_loaded(other, False)

    def _has_loaded(self, runner: Runner, now: float) -> None:
        server = runner.server
        runner.loading = b""
        server.loading = next((other for other in server.loaded.values() if other.loading), None)
        if server.loading is None:
            for other in server.loaded.values():
                other.leaving = False
        if runner.loaded:
            runner.since = now
            # What is busy was not unloaded for it.
            held = sum(other.size for other in server.loaded.values() if other is runner or other.writes)
            server.holds = max(server.holds, held)
        server.refresh()

    def _set_loaded(self, runner: Runner, loaded: bool) -> None:
        runner.loaded = loaded
        runner.leaving = False
        if loaded:
            runner.server.loaded[runner.digest] = runner
        else:
            runner.server.loaded.pop(runner.digest, None)
            self.prefixes.forget(runner)
        for demand in runner.demands:
            if loaded:
                demand.loaded[runner] = None
            else:
                demand.loaded.pop(runner, None)

    # What workers say -------------------------------------------------------------------------------------------------

    def report(self, worker: Worker, engine: Engine, now: float) -> Collection[Demand]:
        """What a worker says of an engine; its models, if that is anything new."""
        server = self._server(worker, engine.url)
        demands = server.demands()
        server.known = True
        server.worker, server.models_max, server.memory = worker, engine.models_max, float(engine.memory_bytes)
        names: dict[str, set[str]] = {}
        told = {model.digest: model.size_bytes for model in engine.models if engine.up and model.resident}
        server.holds = max(server.holds, float(sum(told.values())))
        # A report from before the engine made room for what it loads now shows models that are there no more.
        after = server.loading is None or server.loading.digest in told
        lost: list[Runner] = []
        for model in engine.models if engine.up else ():
            runner = self.runner(worker, engine.url, model.digest, model.slots, model.size_bytes)
            runner.slots, runner.size = model.slots, model.size_bytes
            runner.rates.resize(model.size_bytes)
            names.setdefault(model.digest, set()).add(model.name)
            if model.resident:
                if not runner.loaded and after:
                    runner.since, runner.variant = now, None
                    self._set_loaded(runner, True)
            elif runner.loaded and not runner.loading and not runner.writes:
                self._set_loaded(runner, False)
                lost.append(runner)
        for digest, runner in list(server.runners.items()):
            if digest in names:
                self._name(runner, frozenset(names[digest]))
            else:
                self._drop(runner)
        if lost and any(now - runner.since < BLAMED_S for runner in server.loaded.values()):
            # Something was unloaded for what was loaded a moment ago: together they were too much.
            together = sum(told.values()) + sum(runner.size for runner in lost)
            server.bursts = max(server.holds + 1, min(server.bursts, float(together)))
        for runner in lost:
            if runner.leases:  # they wait in the engine until it is loaded again
                self._loads(runner, next(iter(runner.leases)), now)
        server.refresh()
        before, server.pictured = server.pictured, server.picture()
        return demands | server.demands() if server.pictured != before else ()

    def gone(self, worker: Worker, but: Collection[str] = ()) -> Collection[Demand]:
        """Engines of a worker, all but these, are no more; their models. Their leases may be ended later."""
        demands: dict[Demand, None] = {}
        for server in [one for url, one in self.servers.get(worker.name, {}).items() if url not in but]:
            demands |= server.demands()
            server.known = False
            if server.drains_for is not None:
                server.drains_for.end_drain()
            for runner in list(server.runners.values()):
                self._drop(runner)
            if not server.runners:
                self._forget(server)
        return demands

    def _name(self, runner: Runner, names: frozenset[str]) -> None:
        """The model is called so, and no longer otherwise."""
        if names == runner.names:
            return
        for demand in runner.demands:
            if demand.name not in names:
                demand.runners.pop(runner, None)
                demand.loaded.pop(runner, None)
                self.tidy(demand)
        runner.names = names
        runner.demands = [self.demand(name) for name in sorted(names)]
        for demand in runner.demands:
            demand.runners[runner] = None
            if runner.loaded:
                demand.loaded[runner] = None

    def _drop(self, runner: Runner) -> None:
        """It is no more."""
        self._set_loaded(runner, False)
        self._name(runner, frozenset())
        if not runner.leases:
            runner.server.runners.pop(runner.digest, None)
