"""Schedulers to compare with: what other routers do.

Those that *push* give each request to a host at once, whether or not it has a slot; the host's own queue does the rest.
The others bind late. All keep the order in which requests came; none tells a time.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from bench.sim.hosts import Host, HostSpec, memory_gb
from bench.sim.workload import Ask
from broker import scheduler
from broker.policy import Policy
from broker.scheduler import Placement, Scheduler
from broker.state import Offer, Request, State, Worker

IMBALANCE_MIN: Final = 64
IMBALANCE_RATIO: Final = 1.5
MATCH_MIN: Final = 0.3
"""SGLang's cache_aware: its defaults (balance_abs_threshold, balance_rel_threshold, cache_threshold)."""
INDEX_MAX: Final = 200_000
PLANNED_LOAD_MAX: Final = 0.4


class InOrder(scheduler.FirstCome):
    """First come, first served for each model; a subclass says where."""

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer | None:
        """One of the hosts that have the model; None: wait."""
        raise NotImplementedError

    def _best(self, request: Request, state: State, now: float) -> Placement | None:
        offers = [offer for offer in state.offers(request.submit.model) if not offer[0].draining]
        chosen = self.choose(request, offers) if offers else None
        return chosen and Placement(request, chosen[0], chosen[1].url, chosen[2].digest)


def leases(worker: Worker) -> int:
    """What a router knows of a host's load: the requests it gave it that have not ended."""
    return sum(worker.busy.values())


def least(offers: Iterable[Offer]) -> Offer:
    """The host with the fewest leases."""
    return min(offers, key=lambda offer: (leases(offer[0]), offer[0].name))


def warm(offer: Offer) -> bool:
    """Whether the model is in memory there, or about to be."""
    worker, engine, model = offer
    return model.resident or worker.busy[engine.url, model.digest] > 0


class Random(InOrder):
    """Any host (Open WebUI)."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer:
        return self._rng.choice(offers)


class RoundRobin(InOrder):
    """One after the other, each model for itself."""

    def __init__(self) -> None:
        super().__init__()
        self._turns: dict[str, int] = {}

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer:
        turn = self._turns[request.submit.model] = self._turns.get(request.submit.model, -1) + 1
        return offers[turn % len(offers)]


class LeastConnections(InOrder):
    """The host with the fewest requests."""

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer:
        return least(offers)


class PowerOfTwo(Random):
    """Of two hosts the one with fewer requests (Ray Serve)."""

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer:
        return least(self._rng.sample(offers, min(2, len(offers))))


class WeightedShuffle(Random):
    """Any host, the faster the likelier (LiteLLM's simple-shuffle with weights)."""

    def __init__(self, rng: random.Random, weights: dict[str, float]) -> None:
        super().__init__(rng)
        self._weights = weights

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer:
        return self._rng.choices(offers, [self._weights[offer[0].name] for offer in offers])[0]


class CacheAware(InOrder):
    """Where most of the prompt was read before, unless the load is out of balance (SGLang's cache_aware)."""

    def __init__(self) -> None:
        super().__init__()
        self._index: OrderedDict[tuple[str, bytes], set[str]] = OrderedDict()

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer:
        chosen = self._balanced(request, offers)
        for beginning in request.submit.prefix:
            key = request.submit.model, beginning
            self._index.setdefault(key, set()).add(chosen[0].name)
            self._index.move_to_end(key)
        while len(self._index) > INDEX_MAX:
            self._index.popitem(last=False)
        return chosen

    def _balanced(self, request: Request, offers: Sequence[Offer]) -> Offer:
        loads = [leases(offer[0]) for offer in offers]
        if max(loads) - min(loads) > IMBALANCE_MIN and max(loads) > IMBALANCE_RATIO * min(loads):
            return least(offers)
        prefix = request.submit.prefix
        for length in range(len(prefix), int(MATCH_MIN * len(prefix)), -1):
            readers = self._index.get((request.submit.model, prefix[length - 1]), ())
            if found := [offer for offer in offers if offer[0].name in readers]:
                return least(found)
        return least(offers)


class WarmFirst(InOrder):
    """Of the hosts that have the model in memory, or else of all, the one with the fewest requests."""

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer:
        return least([offer for offer in offers if warm(offer)] or offers)


class FifoLate(InOrder):
    """As warm-first, but a request leaves the queue only for a free slot, and no host gets more models than it says."""

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer | None:
        free = [offer for offer in offers if self._free(offer)]
        return least([offer for offer in free if warm(offer)] or free) if free else None

    def _free(self, offer: Offer) -> bool:
        worker, engine, model = offer
        busy = worker.busy[engine.url, model.digest]
        full = 0 < engine.models_max <= len(worker.busy)
        return busy < model.slots and bool(busy or not full)


class Oracle(FifoLate):
    """Knows beforehand what will be asked, and keeps each model only on as few hosts as that takes."""

    def __init__(self, asks: Sequence[Ask], hosts: Sequence[HostSpec]) -> None:
        super().__init__()
        self._plan = plan(asks, hosts)

    def choose(self, request: Request, offers: Sequence[Offer]) -> Offer | None:
        return super().choose(request, [offer for offer in offers if offer[0].name in self._plan[request.submit.model]])


def plan(asks: Sequence[Ask], hosts: Sequence[HostSpec]) -> dict[str, set[str]]:
    """On which hosts each model is, so that none computes for more than 40 % of the time, if that can be.

    Greedy, and without knowing of caches: the heaviest models first, each where it leaves most time; then, as long as a
    host has too much to do, what it does most of goes to one more. A model for which there is no room left goes on the
    largest host, where it takes turns.
    """
    models = {ask.model.name: ask.model for ask in asks}
    fleet = {host.name: Host(host) for host in hosts}
    seconds = max(asks[-1].at_s, 1.0) if asks else 1.0
    read, written = Counter[str](), Counter[str]()
    for ask in asks:
        read[ask.model.name] += ask.prompt_tokens
        written[ask.model.name] += ask.output_tokens
    work = {
        name: {
            host.spec.name: max(host.load(model, read[name] / seconds, written[name] / seconds), 1e-9)
            for host in fleet.values()
            if host.spec.fits(model)
        }
        for name, model in models.items()
    }
    room = {host.name: host.vram_gb for host in hosts}
    where: dict[str, set[str]] = {}

    def shares(host: str) -> dict[str, float]:
        """How much of its time each model takes it: all hosts of a model spend as much on it."""
        return {
            model: 1 / sum(1 / work[model][other] for other in sorted(having))
            for model, having in where.items()
            if host in having
        }

    def put(model: str) -> bool:
        having = where.get(model, set())
        able = [host for host in work[model] if host not in having and room[host] >= memory_gb(models[model])]
        if not able:
            return False
        host = min(able, key=lambda host: (sum(shares(host).values()) + work[model][host], host))
        room[host] -= memory_gb(models[model])
        where[model] = having | {host}
        return True

    for name in sorted(work, key=lambda name: (-min(work[name].values()), name)):
        if not put(name):
            where[name] = {max(work[name], key=lambda host: (fleet[host].spec.vram_gb, host))}
    while True:
        taken = {host: shares(host) for host in fleet}
        busy = [host for host in fleet if sum(taken[host].values()) > PLANNED_LOAD_MAX]
        busy.sort(key=lambda host: -sum(taken[host].values()))
        heaviest = (model for host in busy for model in sorted(taken[host], key=lambda name: -taken[host][name]))
        if not any(put(model) for model in heaviest):
            return where


Make = Callable[[Sequence[Ask], Sequence[HostSpec], int], Scheduler]
"""Of what will be asked, the hosts and a seed."""

POLICIES: Final[dict[str, Make]] = {
    "weftline": lambda asks, hosts, seed: Policy(),
    "random": lambda asks, hosts, seed: Random(random.Random(seed)),
    "round-robin": lambda asks, hosts, seed: RoundRobin(),
    "least-connections": lambda asks, hosts, seed: LeastConnections(),
    "power-of-two": lambda asks, hosts, seed: PowerOfTwo(random.Random(seed)),
    "weighted-shuffle": lambda asks, hosts, seed: WeightedShuffle(
        random.Random(seed), {host.name: host.decode_tps for host in hosts}
    ),
    "cache-aware": lambda asks, hosts, seed: CacheAware(),
    "warm-first": lambda asks, hosts, seed: WarmFirst(),
    "fifo-late": lambda asks, hosts, seed: FifoLate(),
    "oracle": lambda asks, hosts, seed: Oracle(asks, hosts),
}
