"""Which request goes where: first come, first served per model; warm hosts first, then the least busy.

The core asks `place` after anything that may have freed a slot or brought a request, and only takes decisions that hold
now: a request leaves the queue for a free slot, never for a promise. Another scheduler needs the same five methods.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from broker.state import Request, State, Worker


@dataclass(slots=True, frozen=True)
class Placement:
    """Run this request there."""

    request: Request
    worker: Worker
    engine: str
    digest: str


class Scheduler(Protocol):
    """Owns the queue. It never changes a request; the core moves it after a placement."""

    def add(self, request: Request) -> int:
        """A request waits; one that waited before gets its old place back, by its `order`. Returns its position."""

    def discard(self, request: Request) -> None:
        """A request waits no longer."""

    def place(self, state: State, now: float) -> Placement | None:
        """The next request that can run now, and where; it stays in the queue until discarded."""

    def waiting(self) -> Iterator[tuple[int, Request]]:
        """All waiting requests with their positions from 1, those that matter most first."""

    def __len__(self) -> int: ...


class WarmFirst:
    """The scheduler of this version: O(models waiting · hosts) a decision."""

    def __init__(self) -> None:
        self._queues: dict[str, OrderedDict[bytes, Request]] = {}
        self._size = 0

    def add(self, request: Request) -> int:
        queue = self._queues.setdefault(request.submit.model, OrderedDict())
        late = bool(queue) and next(reversed(queue.values())).order > request.order
        queue[request.rid] = request
        self._size += 1
        if not late:
            return len(queue)
        # It was taken from the front and comes back: what is older is still before it.
        behind = [rid for rid, other in queue.items() if other.order > request.order]
        for rid in behind:
            queue.move_to_end(rid)
        return len(queue) - len(behind)

    def discard(self, request: Request) -> None:
        queue = self._queues[request.submit.model]
        del queue[request.rid]
        self._size -= 1
        if not queue:
            del self._queues[request.submit.model]

    def place(self, state: State, now: float) -> Placement | None:
        heads = sorted((next(iter(queue.values())) for queue in self._queues.values()), key=lambda r: r.order)
        for request in heads:
            placement = self._best(request, state, now)
            if placement is not None:
                return placement
        return None

    def waiting(self) -> Iterator[tuple[int, Request]]:
        for queue in self._queues.values():
            yield from enumerate(queue.values(), 1)

    def __len__(self) -> int:
        return self._size

    def _best(self, request: Request, state: State, now: float) -> Placement | None:
        best: tuple[tuple[bool, bool, int, str, str], Placement] | None = None
        for worker, engine, model in state.offers(request.submit.model):
            if worker.draining or not worker.reachable or worker.paused_until > now:
                continue
            busy = worker.busy[engine.url, model.digest]
            if busy >= model.slots:
                continue
            # Where it has failed already only if there is nowhere else; names make ties repeatable.
            key = (
                worker.name in request.failed_on,
                not (model.resident or busy),
                sum(count for (url, _), count in worker.busy.items() if url == engine.url),
                worker.name,
                engine.url,
            )
            if best is None or key < best[0]:
                best = key, Placement(request, worker, engine.url, model.digest)
        return best[1] if best else None
