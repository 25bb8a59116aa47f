"""Whether a model is worth loading, and where. Pure.

Where no loaded runner has a free slot, another may be loaded. That is worth it if those that wait would wait longer,
all together, than the load takes and what it costs those whose model is unloaded for it. Rules of a load:

- one at a time on an engine;
- never where it would make the engine unload a model that is busy or waited for. Where it isn't known what an engine
  holds it is tried once, and what was seen is learnt;
- where a model is loaded nowhere and its first request has waited STARVING_S, the cheapest engine takes no other
  requests until it is idle; but not before its busy models have been there for RESIDENT_LOADS times as long as they
  took to load, and not for more than DRAIN_S_MAX in twice that time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf
from typing import Final

from broker.runners import HORIZON_S, Demand, Runner
from broker.state import Request, Worker

RESIDENT_LOADS: Final = 3.0
STARVING_S: Final = 15.0
DRAIN_S_MAX: Final = 120.0
ROOM_S: Final = 300.0
"""How long a model that takes nobody's place is expected to stay."""
EVICTION_FACTOR: Final = 2.0
"""What is unloaded will be loaded again, where it drives out another."""
NOWHERE_S: Final = 1e6
"""What it is worth to load a model that is loaded nowhere."""

Usable = Callable[[Worker], bool]
"""Whether the request may run there."""


@dataclass(slots=True)
class Option:
    """A runner on which a request could run. `finish_s` from now; `wait_s` of it until a slot is free."""

    runner: Runner
    finish_s: float
    wait_s: float = 0.0


def best_load(
    demand: Demand, request: Request, busy: Option | None, special: bool, usable: Usable, now: float
) -> Option | None:
    """Where to load the model, if that is better than to wait for the best of those that are busy.

    `special`: not every loaded runner would do for this request, so only its own waiting counts.
    """
    variant = request.submit.variant
    best_gain, best = 0.0, None
    for runner in demand.runners:
        server = runner.server
        if runner.size > server.room or runner.leases or (runner.loaded and runner.serves(variant)):
            continue
        if not usable(server.worker) or server.worker.paused_until > now:
            continue
        cost_s, lasts_s = _eviction(demand, runner, now)
        if cost_s == inf:
            continue
        load_s = runner.rates.load_s()
        service_s = demand.cold_service_s(runner)
        if busy is None:
            gain = NOWHERE_S - load_s - cost_s - service_s
        elif special:
            gain = busy.finish_s - load_s - cost_s - service_s
        else:
            gain = _gain_s(demand, runner, load_s, service_s, lasts_s, now) - cost_s
        if gain > best_gain:
            best_gain, best = gain, Option(runner, load_s + service_s)
    if best is None:
        demand.wants_load = True
        if busy is None and now - request.accepted > STARVING_S:
            _drain_for(demand, usable, now)
    return best


def better(demand: Demand, free: Option, usable: Usable, now: float) -> Option | None:
    """An engine with room on which the model would be served so much faster that loading it there is worth it."""
    arrivals = demand.arrivals.per_s(now)
    best_gain, best = 0.0, None
    for runner in demand.runners:
        server = runner.server
        if runner.loaded or runner.leases or runner.size > server.room or not usable(server.worker):
            continue
        service_s, load_s = demand.cold_service_s(runner), runner.rates.load_s()
        saved_s = demand.service_s(free.runner) - service_s
        gain = arrivals * (ROOM_S - load_s) * saved_s - load_s
        if gain > best_gain:
            cost_s, _ = _eviction(demand, runner, now)
            if not cost_s:
                best_gain, best = gain, Option(runner, load_s + service_s)
    return best


def _gain_s(demand: Demand, runner: Runner, load_s: float, service_s: float, lasts_s: float, now: float) -> float:
    """How many seconds of waiting it saves all together to load one more runner of the model."""
    line, arrivals = demand.line, demand.arrivals.per_s(now)
    # Where there is room it costs nobody anything, so a client's tenth request counts as its first.
    waiting = line.pressure if lasts_s < ROOM_S else float(len(line))
    last_s = max(0.0, demand.soonest - now) + max(0.0, waiting - 1) / demand.capacity
    more = runner.slots / service_s
    now_s = waiting * max(0.0, last_s - load_s) / 2 * more / (demand.capacity + more)
    each_s = demand.wait_s(arrivals, 0) - demand.wait_s(arrivals, runner.slots, more)
    later_s = arrivals * max(0.0, lasts_s - load_s) * each_s
    return now_s + later_s - max(0.0, load_s - last_s)


def _eviction(demand: Demand, runner: Runner, now: float) -> tuple[float, float]:
    """What loading it costs the others on its engine, in seconds, and for how long it may stay.

    inf: it would unload what is busy or waited for.
    """
    server = runner.server
    if server.drains(now):
        return (0.0 if server.drains_for is demand else inf), HORIZON_S
    if runner.loaded:
        return 0.0, HORIZON_S  # with other options: it takes its own place
    size = runner.size + sum(other.size for other in server.loaded.values())
    count = len(server.loaded) + 1
    if server.fits(size, count):
        return server.spills_s(runner), ROOM_S
    # Ollama unloads idle models until the new one fits; most likely those that were used least recently.
    cost_s, back = server.spills_s(runner), 0.0
    idle = [other for other in server.loaded.values() if not other.leases]
    for victim in sorted(idle, key=lambda other: other.used):
        worth_s, again = _worth(victim, now)
        cost_s, back = cost_s + worth_s, back + again
        size -= victim.size
        count -= 1
        if server.fits(size, count):
            return cost_s * EVICTION_FACTOR, min(HORIZON_S, 1 / back) if back else HORIZON_S
    return inf, 0.0


def _worth(runner: Runner, now: float) -> tuple[float, float]:
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


def _drain_for(demand: Demand, usable: Usable, now: float) -> None:
    """Let the engine become idle on which that takes least, so that a model can be loaded there."""
    if demand.drains is not None and demand.drains.drains(now):
        return
    best_s, best = inf, None
    for runner in demand.runners:
        server = runner.server
        if server.loading is not None or now < server.drains_after or not usable(server.worker):
            continue
        busy = [other for other in server.loaded.values() if other.leases]
        if any(now - other.since < RESIDENT_LOADS * other.rates.load_s() for other in busy):
            continue
        idle_s = max((lease.ends - now for other in busy for lease in other.leases.values()), default=0.0)
        if idle_s > DRAIN_S_MAX:
            continue
        cost_s = max(0.0, idle_s) + runner.rates.load_s() + sum(other.rates.load_s() for other in busy)
        cost_s += server.spills_s(runner)
        if cost_s < best_s:
            best_s, best = cost_s, server
    if best is not None:
        demand.end_drain()
        demand.drains, best.drains_for, best.drains_until = best, demand, now + DRAIN_S_MAX
        best.drains_after = best.drains_until + DRAIN_S_MAX
