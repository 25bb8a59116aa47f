"""What the core asks of a scheduler, and the simplest one.

The core asks `place` after anything that may have freed a slot or brought a request, and only takes decisions that hold
now: a request leaves the queue for a free slot, never for a promise.
"""

from bisect import bisect, bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Protocol

from broker.state import Request, State, Worker
from common.protocol import BESIDE_MAX, LIGHT, Stats


@dataclass(slots=True, frozen=True)
class Placement:
    """Run this request there."""

    request: Request
    worker: Worker
    engine: str
    digest: str


@dataclass(slots=True, frozen=True)
class Outlook:
    """Where a waiting request stands: `position` from 1, and how long until it begins, if that can be told."""

    request: Request
    position: int
    eta_s: float | None = None


class Scheduler(Protocol):
    """Owns the queue. It never changes a request; the core moves it after a placement."""

    def add(self, request: Request, now: float) -> None:
        """A request waits, at its place by when it was accepted, so that one which waited before gets it back."""

    def discard(self, request: Request, turn_at: float | None = None) -> None:
        """A request waits no longer: its turn has come, at that time, or it is not wanted any more."""

    def place(self, state: State, now: float) -> Placement | None:
        """The next request that can run now, and where; it stays in the queue until discarded.

        None: none can, until something is told, or the time `next_deadline`.
        """

    def begun(self, request: Request, now: float) -> None:
        """A request has a lease, placed or claimed: `request.worker`, `engine` and `digest` say where."""

    def started(self, request: Request, now: float) -> None:
        """Its engine answered: the model is loaded."""

    def ended(self, request: Request, stats: Stats | None, now: float) -> None:
        """Its lease is about to end; `stats` are the engine's, if it ended well. `request.worker` still says where."""

    def worker_changed(self, worker: Worker, now: float) -> None:
        """A worker came, or says something else of its engines."""

    def worker_gone(self, worker: Worker) -> None:
        """A worker is lost; its leases may have ended or end later."""

    def look_again(self) -> None:
        """Workers may be used (again) or not: drained, refused, out of reach."""

    def hopeless(self, now: float) -> Iterable[Request]:
        """Waiting requests that cannot meet their deadline any more, as far as is known without a look at all."""

    def outlook(self, request: Request, now: float) -> Outlook:
        """Where one waiting request stands."""

    def backlog_s(self, model: str, now: float) -> float | None:
        """How long what waits for a model takes, if that can be told."""

    def next_deadline(self) -> float:
        """When `place` may find something though nothing was told; inf: never."""

    def models(self) -> Collection[str]:
        """For which something waits."""

    def __iter__(self) -> Iterator[Request]:
        """All waiting requests."""

    def __len__(self) -> int: ...


class FirstCome:
    """For what takes no slot: first come, first served, on the host with the fewest leases.

    O(models waiting · hosts) a decision.
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[str, bool], list[tuple[float, bytes, Request]]] = {}
        self._size = 0

    def add(self, request: Request, now: float) -> None:
        queue = self._queues.setdefault(_queue_of(request), [])
        entry = (request.accepted, request.rid, request)
        queue.insert(bisect(queue, entry), entry)
        self._size += 1

    def discard(self, request: Request, turn_at: float | None = None) -> None:
        queue = self._queues[_queue_of(request)]
        del queue[bisect_left(queue, (request.accepted, request.rid))]
        self._size -= 1
        if not queue:
            del self._queues[_queue_of(request)]

    def place(self, state: State, now: float) -> Placement | None:
        for _, _, request in sorted(queue[0] for queue in self._queues.values()):
            placement = self._best(request, state, now)
            if placement is not None:
                return placement
        return None

    def begun(self, request: Request, now: float) -> None:
        """Leases are counted by the state."""

    def started(self, request: Request, now: float) -> None:
        """Nothing is learnt."""

    def ended(self, request: Request, stats: Stats | None, now: float) -> None:
        """Nothing is learnt."""

    def worker_changed(self, worker: Worker, now: float) -> None:
        """`place` looks at the state."""

    def worker_gone(self, worker: Worker) -> None:
        """`place` looks at the state."""

    def look_again(self) -> None:
        """`place` looks at the state."""

    def hopeless(self, now: float) -> Iterable[Request]:
        return ()

    def outlook(self, request: Request, now: float) -> Outlook:
        return Outlook(request, bisect(self._queues[_queue_of(request)], (request.accepted, request.rid, request)))

    def backlog_s(self, model: str, now: float) -> float | None:
        return None

    def next_deadline(self) -> float:
        return inf

    def models(self) -> Collection[str]:
        return {model for model, _ in self._queues}

    def __iter__(self) -> Iterator[Request]:
        return (request for queue in self._queues.values() for _, _, request in queue)

    def __len__(self) -> int:
        return self._size

    def _best(self, request: Request, state: State, now: float) -> Placement | None:
        best: tuple[tuple[int, str, str], Placement] | None = None
        offers = [offer for offer in state.offers(request.submit.model) if offer[0].serves]
        if request.failed_on:
            # Not where it failed, as long as there is another, even a busy one: a broken host is always free.
            offers = [offer for offer in offers if offer[0].name not in request.failed_on] or offers
        for worker, engine, model in offers:
            digest = LIGHT if request.submit.light else model.digest
            if worker.paused_until > now or worker.busy[engine.url, digest] >= BESIDE_MAX[digest]:
                continue
            # Names make ties repeatable.
            key = sum(count for (url, _), count in worker.busy.items() if url == engine.url), worker.name, engine.url
            if best is None or key < best[0]:
                best = key, Placement(request, worker, engine.url, digest)
        return best[1] if best else None


def _queue_of(request: Request) -> tuple[str, bool]:
    """Light requests don't wait behind operations on the engine."""
    return request.submit.model, request.submit.light
