"""Requests, workers and gateways as the broker knows them, and the one function that moves a request.

Rules
-----
- The phase implies the container, and only `State.move` changes either:

      QUEUED      in the scheduler's queue, no worker
      LEASED      assigned to `request.worker`, no event seen yet: may be queued again without anyone noticing
      STREAMING   its worker has sent events: belongs to that attempt for good
      ENDED       the terminal is known and told; the worker keeps the replay buffer until the gateway's `ack`
      (removed)   acknowledged, or over without a worker involved

- A lease takes one slot of (worker, engine url, model digest) from the move to LEASED until it leaves
  {LEASED, STREAMING}: a slot is free at the end of the work, not at the acknowledgement.
- A request has exactly one gateway, and a gateway's `rids` are exactly its requests.
- An attempt that is not `request.attempt` holds nothing: whatever comes from it is stale.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from common.protocol import Engine, Message, Model, Submit, short_name


class Phase(Enum):
    QUEUED = "queued"
    LEASED = "leased"
    STREAMING = "streaming"
    ENDED = "ended"


RUNNING = frozenset({Phase.LEASED, Phase.STREAMING})

TRANSITIONS: dict[Phase | None, frozenset[Phase | None]] = {
    None: frozenset({Phase.QUEUED}),
    Phase.QUEUED: frozenset({Phase.LEASED, None}),
    Phase.LEASED: frozenset({Phase.QUEUED, Phase.STREAMING, Phase.ENDED, None}),
    Phase.STREAMING: frozenset({Phase.ENDED, None}),
    Phase.ENDED: frozenset({None}),
}
"""From → to; None is "not held by the broker"."""


STORY_MAX = 32
"""Moves a request remembers: one that is refused and queued again for hours must not grow."""

Offer = tuple["Worker", Engine, Model]


class InvariantError(AssertionError):
    """The broker's own state is wrong: a bug, and the process must not go on as if it weren't."""


@dataclass(slots=True, eq=False)
class Gateway:
    """A gateway process; `name` is unique per process start, `peer` changes with every reconnection."""

    name: str
    peer: bytes
    seen: float
    reachable: bool = True
    rids: set[bytes] = field(default_factory=set)
    gapped: set[bytes] = field(default_factory=set)
    """Requests of which a chunk was dropped on the way to this gateway."""


@dataclass(slots=True, eq=False)
class Worker:
    """A worker process. `busy` counts its leases by (engine url, model digest)."""

    name: str
    epoch: str
    peer: bytes
    seen: float
    registration: int
    engines: dict[str, Engine]
    draining: bool = False
    reachable: bool = True
    paused_until: float = 0.0
    rids: set[bytes] = field(default_factory=set)
    busy: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class Request:
    """A job and where it is. `order` is its place in the line; `events` how many its worker has sent."""

    rid: bytes
    submit: Submit
    body: bytes
    gateway: Gateway
    accepted: float
    order: int
    deadline: float | None = None
    phase: Phase | None = None
    attempt: int = 0
    ordinal: int = 0
    failures: int = 0
    failed_on: set[str] = field(default_factory=set)
    worker: Worker | None = None
    engine: str = ""
    digest: str = ""
    events: int = 0
    terminal: Message | None = None
    terminal_payload: bytes = b""
    ended: float = 0.0
    told_position: int = 0
    story: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_MAX))

    def __repr__(self) -> str:
        return f"<request {self.rid.hex()[:8]} {self.submit.model} {' '.join(self.story)}>"


class State:
    """All records, and the indexes over them."""

    def __init__(self) -> None:
        self.requests: dict[bytes, Request] = {}
        self.gateways: dict[bytes, Gateway] = {}
        self.gateways_by_name: dict[str, Gateway] = {}
        self.workers: dict[str, Worker] = {}
        self.workers_by_peer: dict[bytes, Worker] = {}
        self.phases: Counter[Phase] = Counter()
        self.body_bytes = 0
        self._offers: dict[str, list[Offer]] = {}

    def move(
        self,
        request: Request,
        to: Phase | None,
        *,
        worker: Worker | None = None,
        engine: str = "",
        digest: str = "",
    ) -> None:
        """Move a request to another phase and so to another container; `worker`, `engine`, `digest` with LEASED.

        Raises:
            InvariantError: there is no such transition; the text tells the request's story.
        """
        if to not in TRANSITIONS[request.phase]:
            raise InvariantError(f"{request!r} cannot become {to}")
        if request.phase in RUNNING and to not in RUNNING:
            assert request.worker is not None
            self._count(request, -1)
            if to is not Phase.ENDED:
                request.worker.rids.discard(request.rid)
        if request.phase is None:
            self.requests[request.rid] = request
            request.gateway.rids.add(request.rid)
            self.body_bytes += len(request.body)
        else:
            self.phases[request.phase] -= 1
        if to is Phase.LEASED:
            assert worker is not None
            request.worker, request.engine, request.digest = worker, engine, digest
            worker.rids.add(request.rid)
            self._count(request, +1)
        elif to is Phase.QUEUED:
            request.worker, request.engine, request.digest, request.attempt = None, "", "", 0
        elif to is None:
            if request.worker is not None:
                request.worker.rids.discard(request.rid)
            request.gateway.rids.discard(request.rid)
            request.gateway.gapped.discard(request.rid)
            del self.requests[request.rid]
        if to is not None:
            self.phases[to] += 1
        if to is not Phase.QUEUED and to is not Phase.LEASED:
            self.body_bytes -= len(request.body)
            request.body = b""
        request.story.append(f"{to.value if to else 'removed'}{f'@{worker.name}' if worker else ''}")
        request.phase = to

    def _count(self, request: Request, by: int) -> None:
        assert request.worker is not None
        key = (request.engine, request.digest)
        request.worker.busy[key] += by
        if not request.worker.busy[key]:
            del request.worker.busy[key]

    def index_offers(self) -> None:
        """Find again who offers what; called whenever workers or their engines have changed."""
        self._offers = {}
        for worker in self.workers.values():
            for engine in worker.engines.values():
                if engine.up:
                    for model in engine.models:
                        self._offers.setdefault(model.name, []).append((worker, engine, model))

    def offers(self, model: str) -> Sequence[Offer]:
        """Every engine that has the model, full or not, draining or not."""
        return self._offers.get(model, ())

    def models(self) -> tuple[str, ...]:
        """The names of all models that can be served now, sorted."""
        return tuple(sorted(self._offers))

    def names(self) -> tuple[str, ...]:
        """The same as clients know them, embedding models last: who takes the first means one that answers."""
        offers = sorted(self._offers.items(), key=lambda item: (item[1][0][2].embedding, short_name(item[0])))
        return tuple(short_name(name) for name, _ in offers)

    def validate(self, queued: Iterable[Request]) -> None:
        """Check every rule of this module; `queued` is what the scheduler holds.

        Raises:
            InvariantError: a rule is broken.
        """
        queue = list(queued)
        check(len(queue) == len({request.rid for request in queue}), "a request is queued twice")
        check(
            {request.rid for request in queue} == {r.rid for r in self.requests.values() if r.phase is Phase.QUEUED},
            "the queue is not the set of queued requests",
        )
        check(
            +self.phases == Counter(request.phase for request in self.requests.values()),
            "phases are miscounted",
        )
        check(
            self.body_bytes == sum(len(request.body) for request in self.requests.values()),
            "the bodies' bytes are miscounted",
        )
        for request in self.requests.values():
            check(request.rid in request.gateway.rids, f"{request!r} is not among its gateway's")
            check(self.gateways_by_name.get(request.gateway.name) is request.gateway, f"{request!r} has a dead gateway")
            if request.phase is Phase.QUEUED:
                check(request.worker is None and not request.attempt, f"{request!r} waits and has a worker")
            elif request.phase in RUNNING:
                check(
                    request.worker is not None and self.workers.get(request.worker.name) is request.worker,
                    f"{request!r} runs on a dead worker",
                )
                check(request.terminal is None, f"{request!r} runs and has ended")
            else:
                check(request.terminal is not None, f"{request!r} ended without a terminal")
        check(len(self.gateways) == len(self.gateways_by_name), "a gateway is known by two routing ids")
        check(len(self.workers_by_peer) == len(self.workers), "a worker is known by two routing ids")
        offers = self._offers
        self.index_offers()
        check(offers == self._offers, "the offers are not what the workers say")
        for gateway in self.gateways_by_name.values():
            check(all(rid in self.requests for rid in gateway.rids), f"gateway {gateway.name} holds a foreign request")
            check(self.gateways.get(gateway.peer) is gateway, f"gateway {gateway.name} is not found by its peer")
        for worker in self.workers.values():
            held = [self.requests[rid] for rid in worker.rids]
            busy = Counter((r.engine, r.digest) for r in held if r.phase in RUNNING)
            check(busy == worker.busy, f"worker {worker.name} counts {worker.busy}, holds {busy}")
            check(all(r.worker is worker for r in held), f"worker {worker.name} holds a foreign request")
            check(self.workers_by_peer.get(worker.peer) is worker, f"worker {worker.name} is not found by its peer")


def check(holds: bool, story: str) -> None:
    """Raise `InvariantError` unless the rule holds."""
    if not holds:
        raise InvariantError(story)
