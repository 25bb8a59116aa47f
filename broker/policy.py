"""Our scheduler: the right host, in the right order. Pure.

Theory of operation
-------------------
Every model has a line (broker/order.py): whose turn it is. Every model on an engine is a *runner*; it has slots, rates
(broker/rates.py), beginnings of prompts that it has read (broker/affinity.py), and is loaded or not. A request leaves
its line for a free slot of a loaded runner, the one where it would be finished first:

    finish = reading what is new of the prompt + writing the expected answer among the others that run there

It may wait for a busy runner that has most of its prompt, as long as that is expected to be quicker, and never longer
than reading it anew takes elsewhere.

Where no loaded runner has a free slot, another may be loaded. That is worth it if those that wait would wait longer, on
average, than the load takes and what it costs those whose model is unloaded for it. Rules of a load:

- one at a time on an engine;
- never where it would make the engine unload a model that is busy or waited for. What an engine holds is told by its
  `models_max` or `memory_bytes`; else it is tried once, and what was seen is learnt;
- where a model is loaded nowhere and its first request has waited STARVING_S, the cheapest engine takes no other
  requests until it is idle; but not before its busy models have been there for RESIDENT_LOADS times as long as they
  took to load.

Options that belong to loading (`Submit.variant`) are part of what is loaded: with other ones a runner counts as not
loaded, and as its own victim.

A decision looks at each loaded runner of one model once, and where none is free at each engine. Lines in which
something may have changed are `_dirty`; others are not looked at, but for once every LOOK_S, as estimates change.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from math import exp, inf, sqrt
from typing import Final

from broker.affinity import Prefixes
from broker.order import OUTPUT_WEIGHT, Entry, Line
from broker.rates import LOAD_S_MIN, NS, OUTPUT_TOKENS, PROMPT_TOKENS, TOKENS_PER_BYTE, Arrivals, Mean, Rates, Scale
from broker.rules import Rules
from broker.scheduler import Outlook, Placement, Scheduler, WarmFirst
from broker.state import Request, State, Worker
from common.protocol import Engine, Stats, Submit, names_engine

CANDIDATES_MAX: Final = 4
"""Requests of a line that are looked at while those before them wait for a host that is warm for them."""
KINDS_LOOK_MAX: Final = 64
"""Requests that are passed over because there was no room for one of their kind, to find one of another."""
AFFINITY_S_MAX: Final = 20.0
RESIDENT_LOADS: Final = 3.0
STARVING_S: Final = 15.0
DRAIN_S_MAX: Final = 120.0
HORIZON_S: Final = 60.0
"""How far ahead it counts that a model which is unloaded will be wanted again."""
ROOM_S: Final = 300.0
"""How long a model that takes nobody's place is expected to stay."""
BETTER_S: Final = 5.0
"""How often a faster engine is looked for while there are free slots."""
EVICTION_FACTOR: Final = 2.0
"""What is unloaded will be loaded again, where it drives out another."""
NOWHERE_S: Final = 1e6
"""What it is worth to load a model that is loaded nowhere."""
SPILL_S: Final = 1e4
"""What it is worth to load a model where it fits rather than where it doesn't."""
MEMORY_FACTOR: Final = 1.1
MODEL_MEMORY_BYTES: Final = 5e8
"""What a model takes in memory beside its size on disk: caches, and what is computed."""
BLAMED_S: Final = 12.0
"""What is seen to be unloaded so soon after a load was unloaded for it."""
LOOK_S: Final = 1.0
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


@dataclass(slots=True, eq=False)
class Runner:
    """A model on an engine, loaded or not.

    `used`: when it last began or ended something; `since`: when it was loaded. `token_s`, `full_token_s` and
    `prefill_s` are its rates as things stand: with what runs now, with all slots taken, and of a token read.
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
        return max(0.05, min(abs(lease.ends - now) for lease in self.leases.values()))

    def load_left_s(self, now: float) -> float:
        """Seconds until it is loaded, while it is being loaded."""
        return max(0.1, self.since + self.rates.load_s() - now) if self.loading else 0.0


@dataclass(slots=True, eq=False)
class Server:
    """An engine. `holds`: bytes of models it was seen to hold at once; `bursts`: more than it can.

    `reading_s`: how long it will read prompts, one after the other, as if it had begun none of them.
    `room`: bytes of a model that could be loaded if all that is idle were unloaded; 0 while one is being loaded.
    `drains_for`: until it has loaded that model it takes no other request, at most until then.
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
    holds: float = 0.0
    bursts: float = inf
    room: float = inf

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

    def drains(self, now: float) -> bool:
        """Whether it takes nothing, so that it becomes idle."""
        return self.drains_for is not None and self.drains_until > now

    def refresh(self) -> None:
        """Something has changed on which estimates rest."""
        busy, count = 0.0, 0
        for runner in self.loaded.values():
            rates = runner.rates
            runner.token_s = rates.token_s(self.running)
            runner.full_token_s = rates.token_s(max(self.running, runner.slots) - 1)
            runner.prefill_s = rates.prefill_s(1.0)
            if runner.leases:
                busy += runner.size
                count += 1
        if self.loading is not None or 0 < self.models_max <= count:
            self.room = 0.0
        elif not count:
            self.room = inf
        elif self.memory:
            room = (self.memory - MODEL_MEMORY_BYTES * (count + 1)) / MEMORY_FACTOR
            self.room = max(room, self.holds) - busy
        else:
            self.room = max(self.holds, self.bursts - 1) - busy


@dataclass(slots=True, eq=False)
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
    kinds: Counter[Hashable] = field(default_factory=Counter)
    """Of those that wait: what decides on which hosts they may run."""

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
        return self.prompt.of(PROMPT_TOKENS) * runner.prefill_s + self.output.of(OUTPUT_TOKENS) * runner.full_token_s

    def cold_service_s(self, runner: Runner) -> float:
        """The same of one that is not loaded, with its slots alone."""
        rates = runner.rates
        output_s = self.output.of(OUTPUT_TOKENS) * rates.token_s(max(runner.server.running + 1, runner.slots) - 1)
        return rates.prefill_s(self.prompt.of(PROMPT_TOKENS)) + output_s

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
            if runner.server.worker.available(now):
                slots += runner.slots
                capacity += runner.slots / self.service_s(runner)
                soonest = min(soonest, max(runner.load_left_s(now), runner.free_in(now)))
        self.slots, self.capacity, self.soonest = slots, capacity, now + soonest


@dataclass(slots=True)
class Option:
    """A runner on which a request could run. `finish_s` from now; `wait_s` of it until a slot is free."""

    runner: Runner
    finish_s: float
    wait_s: float = 0.0


class Policy(Scheduler):
    """See above."""

    def __init__(self, rules: Rules | None = None) -> None:
        self._rules = rules or Rules(())
        self._demands: dict[str, Demand] = {}
        self._servers: dict[tuple[str, str], Server] = {}
        self._fleet = Scale()
        self._prefixes: Prefixes[Runner] = Prefixes()
        self._beside = WarmFirst()
        self._beside_dirty = False
        self._dirty: dict[Demand, None] = {}
        self._waiting = 0
        self._running: dict[str, int] = {}
        self._running_max: dict[str, int] = {}
        self._doomed: dict[bytes, Request] = {}
        self._look_at = -inf
        self._told = 0

    # What happens -----------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        if _beside(request):
            self._beside.add(request, now)
            self._beside_dirty = True
            return
        submit = request.submit
        demand = self._demand(submit.model, now)
        if submit.running_max:
            self._running_max[submit.client] = submit.running_max
        else:
            self._running_max.pop(submit.client, None)
        if not self._waiting:
            self._look_at = now + LOOK_S
        self._waiting += 1
        was_empty = not len(demand.line)
        entry = demand.line.add(request, demand.cost(request, 0), now)
        entry.kind = self._rules.matching(submit.model, submit.client), submit.variant, tuple(sorted(request.failed_on))
        demand.kinds[entry.kind] += 1
        if not request.failures:
            demand.arrivals.add(now, entry.share)
        if was_empty or demand.patient or demand.line.is_first(entry):
            self._dirty[demand] = None

    def discard(self, request: Request) -> None:
        if _beside(request):
            self._beside.discard(request)
            return
        self._doomed.pop(request.rid, None)
        demand = self._demands[request.submit.model]
        entry = demand.line.discard(request)
        demand.kinds[entry.kind] -= 1
        if not demand.kinds[entry.kind]:
            del demand.kinds[entry.kind]
        self._waiting -= 1
        self._touch(demand)  # the next one may be another case
        if not len(demand.line):
            self._end_drain(demand)
            self._tidy(demand)

    def begun(self, request: Request, now: float) -> None:
        if _beside(request):
            return
        assert request.worker is not None
        submit = request.submit
        demand = self._demand(submit.model, now)
        runner = self._runner(request.worker, request.engine, request.digest)
        server = runner.server
        loads = not runner.serves(submit.variant)
        if loads:
            self._loads(runner, request.rid, now)
        if loads or submit.variant:
            runner.variant = submit.variant
        overlap = self._prefixes.overlap(runner, submit.prefix)
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
        self._prefixes.remember(runner, submit.prefix)
        self._running[submit.client] = self._running.get(submit.client, 0) + 1
        demand.line.begin(submit.client, cost, submit.weight)
        self._end_drain(demand)
        if loads and server.drains_for is not None:
            self._end_drain(server.drains_for)

    def started(self, request: Request, now: float) -> None:
        if _beside(request):
            return
        assert request.worker is not None
        runner = self._runner(request.worker, request.engine, request.digest)
        lease = runner.leases[request.rid]
        lease.started = True
        self._has_read(runner.server, lease)
        if runner.loading:
            self._has_loaded(runner, now)

    def ended(self, request: Request, stats: Stats | None, now: float) -> None:
        if _beside(request):
            self._beside_dirty = True
            return
        assert request.worker is not None
        demand = self._demand(request.submit.model, now)
        runner = self._runner(request.worker, request.engine, request.digest)
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
        self._running[lease.client] -= 1
        if not self._running[lease.client]:
            del self._running[lease.client]
        spent = lease.cost
        if stats is not None:
            spent = self._learn(demand, runner, request, lease, stats)
        elif not request.events:
            spent = 0.0
        demand.line.end(lease.client, lease.cost, spent)
        self._tidy(demand)
        server.refresh()
        if lease.client in self._running_max:
            self._touch_all()
        for served in runner.demands:
            self._touch(served)
        if not runner.leases:
            self._look_for_loads(server)
            if not runner.names:
                self._drop(runner)
                if not server.runners and server.url not in server.worker.engines:
                    del self._servers[server.worker.name, server.url]

    def worker_changed(self, worker: Worker, now: float) -> None:
        for engine in worker.engines.values():
            self._report(worker, engine, now)
        for key in [key for key in self._servers if key[0] == worker.name and key[1] not in worker.engines]:
            self._gone(key)
        self.look_again()

    def worker_gone(self, worker: Worker) -> None:
        for key in [key for key in self._servers if key[0] == worker.name]:
            self._gone(key)
        self.look_again()

    def look_again(self) -> None:
        self._beside_dirty = len(self._beside) > 0
        self._touch_all()

    # Decisions --------------------------------------------------------------------------------------------------------

    def place(self, state: State, now: float) -> Placement | None:
        if self._beside_dirty:
            found = self._beside.place(state, now)
            if found is not None:
                return found
            self._beside_dirty = False
        if self._waiting and now >= self._look_at:
            self._look_at = now + LOOK_S
            self._touch_all()
        while self._dirty:
            demand = next(iter(self._dirty))
            placement = self._place(demand, now)
            if placement is not None:
                return placement
            self._dirty.pop(demand, None)
        return None

    def _place(self, demand: Demand, now: float) -> Placement | None:
        demand.wants_load = demand.patient = False
        demand.look(now)
        service_s = demand.slots / demand.capacity if demand.capacity else 0.0

        def admits(client: str) -> bool:
            return self._admits(client) and not demand.line.hogs(client, demand.slots, service_s, now)

        with closing(demand.line.candidates(now, admits)) as candidates:
            waiting = 0
            full: set[Hashable] = set()
            for entry in islice(candidates, KINDS_LOOK_MAX):
                if entry.kind in full:
                    continue
                option = self._choose(demand, entry, now)
                if option is None:
                    full.add(entry.kind)
                    if len(full) == len(demand.kinds):
                        break
                elif option.wait_s <= 0:
                    server = option.runner.server
                    return Placement(entry.request, server.worker, server.url, option.runner.digest)
                else:
                    demand.patient = True
                    waiting += 1
                    if waiting == CANDIDATES_MAX:
                        break
        return None

    def _choose(self, demand: Demand, entry: Entry, now: float) -> Option | None:
        """Where the request should run: now, or (`wait_s` > 0) in a moment; None: nowhere for the time being."""
        request = entry.request
        submit = request.submit
        overlaps = self._prefixes.overlaps(submit.prefix) if submit.prefix else None
        fresh = whole = demand.prompt_tokens(request)
        output = demand.output_tokens(request)
        avoided = self._avoided(demand, request, now)
        free: Option | None = None
        busy: Option | None = None
        for runner in demand.loaded:
            worker = runner.server.worker
            if (
                not runner.serves(submit.variant)
                or runner.leaving
                or not worker.available(now)
                or runner.server.drains(now)
                or worker.name in avoided
                or not self._rules.allow(submit.model, submit.client, worker)
            ):
                continue
            if overlaps is not None:
                fresh = demand.prompt_tokens(request, overlaps[runner]) if runner in overlaps else whole
            finish_s = runner.server.reading_s + fresh * runner.prefill_s + output * runner.token_s
            load_s = runner.load_left_s(now)
            if len(runner.leases) < runner.slots:
                finish_s += load_s
                if free is None or finish_s < free.finish_s:
                    free = Option(runner, finish_s)
            else:
                wait_s = max(load_s, runner.free_in(now))
                finish_s += wait_s
                if busy is None or finish_s < busy.finish_s:
                    busy = Option(runner, finish_s, wait_s)
        if request.deadline is not None and self._too_late(demand, request, now):
            self._doomed[request.rid] = request
            return busy or Option(next(iter(demand.runners)), inf, inf)
        if free is not None:
            waits = self._patient(demand, entry, free, busy, now)
            if waits is not None:
                return waits
            if now >= demand.better_at:
                demand.better_at = now + BETTER_S
                return self._better(demand, free, submit.client, now) or free
            return free
        return self._load(demand, entry, busy, avoided, now)

    def _avoided(self, demand: Demand, request: Request, now: float) -> set[str]:
        """Where it failed, as long as there is another host, even a busy one: a broken host is always free."""
        failed_on, submit = request.failed_on, request.submit
        if failed_on and any(
            worker.name not in failed_on
            and worker.available(now)
            and self._rules.allow(submit.model, submit.client, worker)
            for worker in (runner.server.worker for runner in demand.runners)
        ):
            return failed_on
        return set()

    def _patient(self, demand: Demand, entry: Entry, free: Option, busy: Option | None, now: float) -> Option | None:
        """A busy runner that is worth waiting for though another is free."""
        if busy is None or busy.finish_s >= free.finish_s:
            return None
        if free.runner.loading:
            return busy  # nothing is lost as long as it isn't loaded
        prefix = entry.request.submit.prefix
        if self._prefixes.overlap(busy.runner, prefix) <= self._prefixes.overlap(free.runner, prefix):
            # It is just faster, and that for only so many of those that wait.
            each_s = demand.service_s(busy.runner) / busy.runner.slots
            if busy.finish_s + (len(demand.line) - 1) * each_s >= free.finish_s:
                return None
        if not entry.patient_until:
            entry.patient_until = now + min(free.finish_s - (busy.finish_s - busy.wait_s), AFFINITY_S_MAX)
        if now + busy.wait_s > entry.patient_until:
            return None
        self._look_at = min(self._look_at, entry.patient_until)
        return busy

    def _better(self, demand: Demand, free: Option, client: str, now: float) -> Option | None:
        """An engine with room on which the model would be served so much faster that loading it there is worth it."""
        arrivals = demand.arrivals.per_s(now)
        best_gain, best = 0.0, None
        for runner in demand.runners:
            server = runner.server
            if runner.loaded or runner.size > server.room or not server.worker.available(now) or server.drains(now):
                continue
            service_s, load_s = demand.cold_service_s(runner), runner.rates.load_s()
            saved_s = demand.service_s(free.runner) - service_s
            gain = arrivals * (ROOM_S - load_s) * saved_s - load_s
            if gain > best_gain and self._rules.allow(demand.name, client, server.worker):
                cost_s, _ = self._eviction(demand, runner, now)
                if not cost_s:
                    best_gain, best = gain, Option(runner, load_s + service_s)
        return best

    def _load(self, demand: Demand, entry: Entry, busy: Option | None, avoided: set[str], now: float) -> Option | None:
        """Where to load the model, if that is better than waiting."""
        submit = entry.request.submit
        concerned = self._rules.matching(submit.model, submit.client)
        special = bool(avoided or concerned) or not all(one.serves(submit.variant) for one in demand.loaded)
        best_gain, best = 0.0, None
        for runner in demand.runners:
            server = runner.server
            if runner.size > server.room or (runner.loaded and (runner.leases or runner.serves(submit.variant))):
                continue
            worker = server.worker
            if (
                not worker.available(now)
                or worker.name in avoided
                or not self._rules.allow(submit.model, submit.client, worker)
            ):
                continue
            cost_s, lasts_s = self._eviction(demand, runner, now)
            if cost_s == inf:
                continue
            load_s = runner.rates.load_s()
            service_s = demand.cold_service_s(runner)
            if busy is None:
                gain = NOWHERE_S - load_s - cost_s - service_s
            elif special:
                gain = busy.finish_s - load_s - cost_s - service_s
            else:
                gain = self._gain_s(demand, runner, load_s, service_s, lasts_s, now) - cost_s
            if gain > best_gain:
                best_gain, best = gain, Option(runner, load_s + service_s)
        if best is None:
            demand.wants_load = True
            if busy is None and now - entry.request.accepted > STARVING_S:
                self._drain_for(demand, submit, avoided, now)
        return best

    def _gain_s(
        self, demand: Demand, runner: Runner, load_s: float, service_s: float, lasts_s: float, now: float
    ) -> float:
        """How many seconds of waiting it saves all together to load one more runner of the model."""
        line, arrivals = demand.line, demand.arrivals.per_s(now)
        waiting = (
            line.pressure if lasts_s < ROOM_S else float(len(line))
        )  # where there is room it costs nobody anything
        last_s = max(0.0, demand.soonest - now) + max(0.0, waiting - 1) / demand.capacity
        more = runner.slots / service_s
        now_s = waiting * max(0.0, last_s - load_s) / 2 * more / (demand.capacity + more)
        each_s = demand.wait_s(arrivals, 0) - demand.wait_s(arrivals, runner.slots, more)
        later_s = arrivals * max(0.0, lasts_s - load_s) * each_s
        return now_s + later_s - max(0.0, load_s - last_s)

    def _eviction(self, demand: Demand, runner: Runner, now: float) -> tuple[float, float]:
        """What loading it costs the others on its engine, in seconds, and for how long it may stay.

        inf: it would unload what is busy or waited for.
        """
        server = runner.server
        if runner.loaded:
            return 0.0, HORIZON_S  # with other options: it takes its own place
        if server.drains(now):
            return (0.0 if server.drains_for is demand else inf), HORIZON_S
        size = runner.size + sum(other.size for other in server.loaded.values())
        count = len(server.loaded) + 1
        if server.fits(size, count):
            return server.spills_s(runner), ROOM_S
        # Ollama unloads idle models until the new one fits; most likely those that were used least recently.
        cost_s, back = server.spills_s(runner), 0.0
        idle = [other for other in server.loaded.values() if not other.leases]
        for victim in sorted(idle, key=lambda other: other.used):
            worth_s, again = self._worth(victim, now)
            cost_s, back = cost_s + worth_s, back + again
            size -= victim.size
            count -= 1
            if server.fits(size, count):
                return cost_s * EVICTION_FACTOR, min(HORIZON_S, 1 / back) if back else HORIZON_S
        return inf, 0.0

    def _worth(self, runner: Runner, now: float) -> tuple[float, float]:
        """How many seconds of waiting it costs all together that a model is no longer loaded there.

        And how often per second it will have to be loaded again, if it is loaded nowhere else.
        """
        cost_s = again = 0.0
        for demand in runner.demands:
            if len(demand.line):
                return inf, 0.0
            arrivals, load_s = demand.arrivals.per_s(now), runner.rates.load_s()
            if len(demand.loaded) > 1:
                demand.look(now)
                less = runner.slots / demand.service_s(runner)
                waits_s = demand.wait_s(arrivals, -runner.slots, -less) - demand.wait_s(arrivals, 0)
                cost_s += arrivals * HORIZON_S * waits_s
                # The busier the others are the sooner it is loaded again.
                cost_s += load_s * min(1.0, arrivals / max(demand.capacity - less, 1e-6))
            else:
                cost_s += (1 - exp(-arrivals * HORIZON_S)) * load_s * (1 + arrivals * load_s)
                again += arrivals
        return cost_s, again

    def _drain_for(self, demand: Demand, submit: Submit, avoided: set[str], now: float) -> None:
        """Let the engine become idle on which that takes least, so that a model can be loaded there."""
        if demand.drains is not None and demand.drains.drains(now):
            return
        best_s, best = inf, None
        for runner in demand.runners:
            server = runner.server
            if (
                server.loading is not None
                or server.drains(now)
                or not server.worker.available(now)
                or server.worker.name in avoided
                or not self._rules.allow(submit.model, submit.client, server.worker)
            ):
                continue
            busy = [other for other in server.loaded.values() if other.leases]
            if any(now - other.since < RESIDENT_LOADS * other.rates.load_s() for other in busy):
                continue
            idle_s = max((lease.ends - now for other in busy for lease in other.leases.values()), default=0.0)
            cost_s = max(0.0, idle_s) + runner.rates.load_s() + sum(other.rates.load_s() for other in busy)
            cost_s += server.spills_s(runner)
            if cost_s < best_s:
                best_s, best = cost_s, server
        if best is not None:
            self._end_drain(demand)
            demand.drains, best.drains_for, best.drains_until = best, demand, now + DRAIN_S_MAX

    def _end_drain(self, demand: Demand) -> None:
        if demand.drains is not None:
            demand.drains.drains_for = None
            demand.drains = None

    def _too_late(self, demand: Demand, request: Request, now: float) -> bool:
        """Whether it would miss its deadline even if it began now on the best host, as far as is known."""
        assert request.deadline is not None
        tokens = demand.prompt_tokens(request)
        overlaps = self._prefixes.overlaps(request.submit.prefix)
        least = inf
        for runner in demand.runners:
            load_s = runner.load_left_s(now) if runner.loaded else runner.rates.load_s()
            fresh = demand.prompt_tokens(request, overlaps[runner]) if runner in overlaps else tokens
            least = min(least, min(load_s, runner.rates.known_load_s()) + runner.rates.known_prefill_s(fresh))
        return least < inf and now + least > request.deadline

    def hopeless(self, now: float) -> Iterable[Request]:
        doomed, self._doomed = list(self._doomed.values()), {}
        return doomed

    # What waits -------------------------------------------------------------------------------------------------------

    def outlook(self, request: Request, now: float) -> Outlook:
        if _beside(request):
            return self._beside.outlook(request, now)
        demand = self._demands[request.submit.model]
        position = demand.line.position(demand.line.get(request))
        if not demand.capacity:
            return Outlook(request, position)
        return Outlook(request, position, max(0.0, demand.soonest - now) + (position - 1) / demand.capacity)

    def outlooks(self, now: float, limit: int) -> Iterable[Outlook]:
        size = len(self)
        # If there are more, in turns: each is told anew after a while.
        start = self._told % size if size > limit else 0
        self._told = start + limit
        told = list(islice(self, start, start + limit))
        if start + limit > size > limit:
            told += islice(self, start + limit - size)
        return [self.outlook(request, now) for request in told]

    def backlog_s(self, model: str, now: float) -> float | None:
        demand = self._demands.get(model)
        if demand is None or not demand.capacity:
            return None
        return max(0.0, demand.soonest - now) + len(demand.line) / demand.capacity

    def next_deadline(self) -> float:
        return self._look_at if self._waiting else inf

    def models(self) -> Collection[str]:
        return {*self._beside.models(), *(name for name, demand in self._demands.items() if len(demand.line))}

    def __iter__(self) -> Iterator[Request]:
        yield from self._beside
        for demand in self._demands.values():
            yield from demand.line

    def __len__(self) -> int:
        return len(self._beside) + self._waiting

    # Small change -----------------------------------------------------------------------------------------------------

    def _admits(self, client: str) -> bool:
        most = self._running_max.get(client)
        return most is None or self._running.get(client, 0) < most

    def _touch(self, demand: Demand) -> None:
        if len(demand.line):
            self._dirty[demand] = None
        else:
            self._dirty.pop(demand, None)

    def _touch_all(self) -> None:
        self._dirty.update((demand, None) for demand in self._demands.values() if len(demand.line))

    def _look_for_loads(self, server: Server) -> None:
        """There may be room now: lines that lack it are looked at."""
        for runner in server.runners.values():
            for demand in runner.demands:
                if demand.wants_load:
                    self._touch(demand)

    @staticmethod
    def _has_read(server: Server, lease: Lease) -> None:
        server.reading_s = max(0.0, server.reading_s - lease.reads_s) if server.running > 1 else 0.0
        lease.reads_s = 0.0

    def _loads(self, runner: Runner, rid: bytes, now: float) -> None:
        """Its engine loads it now for that request, and unloads others: the idle first, then those used longest ago."""
        server = runner.server
        self._prefixes.forget(runner)
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
        for demand in runner.demands:
            self._touch(demand)
        self._look_for_loads(server)

    def _set_loaded(self, runner: Runner, loaded: bool) -> None:
        runner.loaded = loaded
        runner.leaving = False
        if loaded:
            runner.server.loaded[runner.digest] = runner
        else:
            runner.server.loaded.pop(runner.digest, None)
            self._prefixes.forget(runner)
        for demand in runner.demands:
            if loaded:
                demand.loaded[runner] = None
            else:
                demand.loaded.pop(runner, None)

    def _demand(self, name: str, now: float) -> Demand:
        demand = self._demands.get(name)
        if demand is None:
            demand = self._demands[name] = Demand(name)
        return demand

    def _tidy(self, demand: Demand) -> None:
        """Forget a model that is nowhere."""
        if not demand.runners and demand.line.idle:
            self._demands.pop(demand.name, None)

    def _server(self, worker: Worker, url: str) -> Server:
        key = worker.name, url
        server = self._servers.get(key)
        if server is None:
            server = self._servers[key] = Server(worker, url)
        return server

    def _runner(self, worker: Worker, url: str, digest: str, slots: int = 1, size: int = 0) -> Runner:
        """The runner of that name; one of a lease that its engine does not speak of any more is made up."""
        server = self._server(worker, url)
        runner = server.runners.get(digest)
        if runner is None:
            runner = Runner(server, digest, slots, size, Rates(size, server.scale, self._fleet))
            server.runners[digest] = runner
        return runner

    def _name(self, runner: Runner, names: frozenset[str], now: float) -> None:
        """The model is called so, and no longer otherwise."""
        if names == runner.names:
            return
        for demand in runner.demands:
            if demand.name not in names:
                demand.runners.pop(runner, None)
                demand.loaded.pop(runner, None)
                self._tidy(demand)
        runner.names = names
        runner.demands = [self._demand(name, now) for name in sorted(names)]
        for demand in runner.demands:
            demand.runners[runner] = None
            if runner.loaded:
                demand.loaded[runner] = None

    def _drop(self, runner: Runner) -> None:
        """It is no more."""
        self._set_loaded(runner, False)
        self._name(runner, frozenset(), 0.0)
        if not runner.leases:
            runner.server.runners.pop(runner.digest, None)

    def _gone(self, key: tuple[str, str]) -> None:
        """An engine is no more; its leases may be ended later."""
        server = self._servers[key]
        if server.drains_for is not None:
            self._end_drain(server.drains_for)
        for runner in list(server.runners.values()):
            self._drop(runner)
        if not server.runners:
            del self._servers[key]

    def _report(self, worker: Worker, engine: Engine, now: float) -> None:
        """What a worker says of an engine."""
        server = self._server(worker, engine.url)
        server.worker, server.models_max, server.memory = worker, engine.models_max, float(engine.memory_bytes)
        names: dict[str, set[str]] = {}
        told = {model.digest: model.size_bytes for model in engine.models if engine.up and model.resident}
        server.holds = max(server.holds, float(sum(told.values())))
        # A report from before the engine made room for what it loads now shows models that are there no more.
        after = server.loading is None or server.loading.digest in told
        lost: list[Runner] = []
        for model in engine.models if engine.up else ():
            runner = self._runner(worker, engine.url, model.digest, model.slots, model.size_bytes)
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
                self._name(runner, frozenset(names[digest]), now)
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

    def _learn(self, demand: Demand, runner: Runner, request: Request, lease: Lease, stats: Stats) -> float:
        """Calibrate by what the engine says of a request; what it cost, in tokens."""
        rates, submit = runner.rates, request.submit
        if lease.loads and stats.load_ns * NS >= LOAD_S_MIN:
            rates.saw_load(stats.load_ns)
        rates.saw_tokens(stats.completion_tokens, stats.completion_ns, (lease.beside + runner.server.running) / 2)
        overlap = min(lease.overlap * demand.tokens_per_byte.of(TOKENS_PER_BYTE), stats.prompt_tokens)
        if stats.prompt_tokens:
            if overlap <= OVERLAP_SMALL * stats.prompt_tokens and (lease.alone or not rates.read):
                rates.saw_prefill(int(stats.prompt_tokens - overlap), stats.prompt_ns)
            elif overlap > OVERLAP_TOKENS_MIN and lease.alone:
                between = rates.prefill_s(stats.prompt_tokens - overlap / 2)
                if stats.prompt_ns * NS > between:
                    self._prefixes.missed(runner)
                    overlap = 0.0
                else:
                    self._prefixes.hit(runner)
            demand.prompt.add(stats.prompt_tokens - overlap)
            if submit.prompt_bytes:
                demand.tokens_per_byte.add(stats.prompt_tokens / submit.prompt_bytes)
        if stats.completion_tokens or submit.output_max == 0:  # nothing is written of what is embedded
            demand.output.add(stats.completion_tokens)
        return max(1.0, stats.prompt_tokens - overlap) + OUTPUT_WEIGHT * stats.completion_tokens


def _beside(request: Request) -> bool:
    """Whether it takes no slot."""
    return request.submit.light or names_engine(request.submit.model)
