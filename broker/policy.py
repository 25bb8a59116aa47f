"""Our scheduler: the right host, in the right order. Pure.

Theory of operation
-------------------
Every model has a line (broker/order.py): whose turn it is. Every model on an engine is a runner (broker/runners.py). A
request leaves its line for a free slot of a loaded runner, the one where it costs least time, it and others together:

    finish = reading what is new of the prompt + writing the expected answer among the others that run there
    cost   = finish + by how much that makes the answers of those others later

It may wait for a busy runner that is expected to finish it sooner than the free one, most often as it has most of its
prompt; never longer than was expected to be saved when it began to wait. Those behind it may go elsewhere meanwhile.
Where no loaded runner has a free slot, another may be loaded (broker/loads.py).

A decision looks at each loaded runner of one model once, and where none is free at each engine. Lines in which
something may have changed are `_dirty`; others are not looked at, but for once every LOOK_S, as estimates change.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from math import inf
from typing import Final

from broker.loads import Option, Usable, best_load, better
from broker.order import Entry
from broker.rules import Rules
from broker.runners import Demand, Runner, Runners, Server
from broker.scheduler import FirstCome, Outlook, Placement, Scheduler
from broker.state import Request, State, Worker
from common.protocol import Stats, names_engine

LOOKS_MAX: Final = 64
"""In one decision: requests that are found to wait for their host, and kinds for which there is none."""
KINDS_MAX: Final = 256
OTHERS: Final = "others"
"""The kind of requests that come when there are so many already."""
WAITS_LOOK_MAX: Final = 4
"""Of those that wait for their host so many are looked at anew each time, the others when it may have changed."""
AFFINITY_S_MAX: Final = 20.0
"""How long a request waits at most for a busy runner while another is free."""
BETTER_S: Final = 5.0
"""How often a faster engine is looked for while there are free slots."""
LOOK_S: Final = 1.0
LOOK_PARTS: Final = 10
"""In so many parts all lines are looked at."""


class Policy(Scheduler):
    """See above."""

    def __init__(self, rules: Rules | None = None) -> None:
        self._rules = rules or Rules(())
        self.runners = Runners()
        self._beside = FirstCome()
        self._beside_dirty = False
        self._dirty: dict[Demand, None] = {}
        self._lines: dict[Demand, None] = {}
        """In which something waits; those first that were not looked at for the longest time."""
        self._waiting = 0
        self._running: dict[str, int] = {}
        self._running_max: dict[str, int] = {}
        self._doomed: dict[bytes, Request] = {}
        self._look_at = -inf

    # What happens -----------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        if _beside(request):
            self._beside.add(request, now)
            self._beside_dirty = True
            return
        submit = request.submit
        demand = self.runners.demand(submit.model)
        known_max = self._running_max.get(submit.client)
        # What comes back only knows the limit of before.
        if submit.running_max != (known_max or 0) and not (request.ordinal and known_max is not None):
            self._running_max[submit.client] = submit.running_max
            self._park(submit.client)
        if not self._lines:
            self._look_at = now + LOOK_S
        self._lines.setdefault(demand)
        self._waiting += 1
        kind: Hashable = (
            self._rules.matching(submit.model, submit.client),
            submit.variant,
            tuple(sorted(request.failed_on)),
        )
        if kind not in demand.line.kinds and len(demand.line.kinds) >= KINDS_MAX:
            kind = OTHERS
        parked = self._is_at_limit(submit.client)
        entry = demand.line.add(request, demand.cost(request, 0), kind=kind, parked=parked)
        if not request.ordinal:
            demand.arrivals.add(now, entry.share)
        if demand.patient or demand.line.is_first(entry):
            self._dirty[demand] = None

    def discard(self, request: Request, turn_at: float | None = None) -> None:
        if _beside(request):
            self._beside.discard(request, turn_at)
            self._beside_dirty = True  # the next one may be another case
            return
        self._doomed.pop(request.rid, None)
        demand = self.runners.demands[request.submit.model]
        demand.line.discard(request, turn_at)
        self._waiting -= 1
        if not len(demand.line):
            del self._lines[demand]
            demand.end_drain()
            self.runners.tidy(demand)
        self._touch(demand)
        self._forget_limit(request.submit.client)

    def begun(self, request: Request, now: float) -> None:
        if not _beside(request):
            client = self.runners.begin(request, now).client
            self._running[client] = self._running.get(client, 0) + 1
            if client in self._running_max:
                self._park(client)

    def started(self, request: Request, now: float) -> None:
        if not _beside(request):
            loaded = self.runners.started(request, now)
            if loaded is not None:
                self._touch(*loaded.demands)
                self._look_for_loads(loaded.server)

    def ended(self, request: Request, stats: Stats | None, now: float) -> None:
        if _beside(request):
            self._beside_dirty = True
            return
        lease, runner = self.runners.end(request, stats, now)
        self._running[lease.client] -= 1
        if not self._running[lease.client]:
            del self._running[lease.client]
        if lease.client in self._running_max:
            self._park(lease.client)
            self._forget_limit(lease.client)
        self._touch(*runner.demands)
        if not runner.leases:
            self._look_for_loads(runner.server)

    def worker_changed(self, worker: Worker, now: float) -> None:
        for engine in worker.engines.values():
            self._touch(*self.runners.report(worker, engine, now))
        self._touch(*self.runners.gone(worker, but=worker.engines))
        self._beside_dirty = True

    def worker_gone(self, worker: Worker) -> None:
        self._touch(*self.runners.gone(worker))
        self._beside_dirty = True

    def look_again(self) -> None:
        self._beside_dirty = True
        self._dirty |= self._lines

    # Decisions --------------------------------------------------------------------------------------------------------

    def place(self, state: State, now: float) -> Placement | None:
        if self._beside_dirty:
            found = self._beside.place(state, now)
            if found is not None:
                return found
            self._beside_dirty = False
        if self._lines and now >= self._look_at:
            parts = min(LOOK_PARTS, len(self._lines))
            self._look_at = now + LOOK_S / parts
            for demand in list(islice(self._lines, -(-len(self._lines) // parts))):
                del self._lines[demand]
                self._lines[demand] = self._dirty[demand] = None
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
        full: set[Hashable] = set()
        waiting = nowhere = 0
        with closing(demand.line.candidates(now, full)) as candidates:
            for entry in candidates:
                if waiting >= WAITS_LOOK_MAX and now < entry.look_at and _is_busy(entry.waits_for):
                    continue
                if nowhere >= LOOKS_MAX and not any(one.serves(entry.request.submit.variant) for one in demand.loaded):
                    full.add(entry.kind)
                    continue
                option = self._choose(demand, entry, now)
                if option is None:
                    full.add(entry.kind)
                    nowhere += 1
                    if len(full) == len(demand.line.kinds):
                        break
                elif option.wait_s <= 0:
                    server = option.runner.server
                    return Placement(entry.request, server.worker, server.url, option.runner.digest)
                else:
                    demand.patient = True
                    entry.waits_for, entry.look_at = option.runner, now + LOOK_S
                    waiting += 1
                    if waiting == LOOKS_MAX:
                        break
        return None

    def _choose(self, demand: Demand, entry: Entry, now: float) -> Option | None:
        """Where the request should run: now, or (`wait_s` > 0) in a moment; None: nowhere for the time being."""
        request = entry.request
        submit = request.submit
        overlaps = self.runners.prefixes.overlaps(submit.prefix) if submit.prefix else None
        fresh = whole = demand.prompt_tokens(request)
        output = demand.output_tokens(request)
        avoided = self._avoided(demand, request, now)

        def usable(worker: Worker) -> bool:
            return (
                worker.serves and worker.name not in avoided and self._rules.allow(submit.model, submit.client, worker)
            )

        free: Option | None = None
        busy: Option | None = None
        least_s = inf
        for runner in demand.loaded:
            server = runner.server
            if not runner.serves(submit.variant) or runner.leaving or server.drains(now) or not usable(server.worker):
                continue
            if overlaps is not None:
                fresh = demand.prompt_tokens(request, overlaps[runner]) if runner in overlaps else whole
            finish_s = server.reading_s + fresh * runner.prefill_s + output * runner.token_s
            load_s, pause_s = runner.load_left_s(now), server.worker.paused_until - now
            if len(runner.leases) < runner.slots and pause_s <= 0:
                finish_s += load_s
                cost_s = finish_s + output * runner.harm_s
                if cost_s < least_s:
                    least_s, free = cost_s, Option(runner, finish_s)
            else:
                wait_s = max(load_s, pause_s, runner.free_in(now))
                finish_s += wait_s
                if busy is None or finish_s < busy.finish_s:
                    busy = Option(runner, finish_s, wait_s)
        if request.deadline is not None and self._too_late(demand, request, usable, now):
            self._doomed[request.rid] = request
            return busy or Option(next(iter(demand.runners)), inf, inf)
        if free is not None:
            waits = self._patient(demand, entry, free, busy, now)
            if waits is not None:
                return waits
            if now >= demand.better_at:
                demand.better_at = now + BETTER_S
                return better(demand, free, usable, now) or free
            return free
        special = bool(avoided or self._rules.matching(submit.model, submit.client))
        special = special or not all(runner.serves(submit.variant) for runner in demand.loaded)
        return best_load(demand, request, busy, special, usable, now)

    def _avoided(self, demand: Demand, request: Request, now: float) -> set[str]:
        """Where it failed, as long as there is another host, even a busy one: a broken host is always free."""
        failed_on, submit = request.failed_on, request.submit
        if failed_on and any(
            worker.name not in failed_on and worker.serves and self._rules.allow(submit.model, submit.client, worker)
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
        if self.runners.prefixes.overlap(busy.runner, prefix) <= self.runners.prefixes.overlap(free.runner, prefix):
            # It is just faster, and that for only so many of those that wait.
            each_s = demand.service_s(busy.runner) / busy.runner.slots
            if busy.finish_s + (len(demand.line) - 1) * each_s >= free.finish_s:
                return None
        if not entry.patient_until:
            entry.patient_until = now + min(free.finish_s - (busy.finish_s - busy.wait_s), AFFINITY_S_MAX)
        return busy if now + busy.wait_s <= entry.patient_until else None

    def _too_late(self, demand: Demand, request: Request, usable: Usable, now: float) -> bool:
        """Whether it would miss its deadline even on the best host that it may use, as far as is known."""
        assert request.deadline is not None
        tokens = demand.prompt_tokens(request)
        overlaps = self.runners.prefixes.overlaps(request.submit.prefix)
        least = inf
        for runner in filter(lambda one: usable(one.server.worker), demand.runners):
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
        demand = self.runners.demands[request.submit.model]
        position = demand.line.position(demand.line.get(request))
        if not demand.capacity:
            return Outlook(request, position)
        return Outlook(request, position, max(0.0, demand.soonest - now) + (position - 1) / demand.capacity)

    def backlog_s(self, model: str, now: float) -> float | None:
        demand = self.runners.demands.get(model)
        if demand is None or not demand.capacity:
            return None
        return max(0.0, demand.soonest - now) + len(demand.line) / demand.capacity

    def next_deadline(self) -> float:
        return self._look_at if self._lines else inf

    def models(self) -> Collection[str]:
        return {*self._beside.models(), *(demand.name for demand in self._lines)}

    def __iter__(self) -> Iterator[Request]:
        yield from self._beside
        for demand in self._lines:
            yield from demand.line

    def __len__(self) -> int:
        return len(self._beside) + self._waiting

    # Small change -----------------------------------------------------------------------------------------------------

    def _is_at_limit(self, client: str) -> bool:
        most = self._running_max.get(client, 0)
        return 0 < most <= self._running.get(client, 0)

    def _park(self, client: str) -> None:
        """Its requests have no turn as long as it is at its limit."""
        parked = self._is_at_limit(client)
        changed = [demand for demand in self._lines if demand.line.park(client, parked)]
        if not parked:
            self._touch(*changed)

    def _forget_limit(self, client: str) -> None:
        """It will be told with its next request."""
        if client not in self._running_max or client in self._running:
            return
        if not any(demand.line.waits(client) for demand in self._lines):
            del self._running_max[client]

    def _touch(self, *demands: Demand) -> None:
        for demand in demands:
            if len(demand.line):
                self._dirty[demand] = None
            else:
                self._dirty.pop(demand, None)

    def _look_for_loads(self, server: Server) -> None:
        """There may be room now: lines that lack it are looked at."""
        for runner in server.runners.values():
            self._touch(*(demand for demand in runner.demands if demand.wants_load))


def _beside(request: Request) -> bool:
    """Whether it takes no slot."""
    return request.submit.light or names_engine(request.submit.model)


def _is_busy(runner: Runner | None) -> bool:
    return runner is not None and runner.loaded and len(runner.leases) >= runner.slots
