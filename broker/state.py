"""Requests, workers and gateways as the broker knows them, and the one function that moves a request.

Rules
-----
- The phase implies the container, and only `State.move` changes either:

      RECOVERING  leased under another broker: waits, until `claim_by`, for its worker's claim
      QUEUED      in the scheduler's queue, no worker
      LEASED      assigned to `request.worker`, no event seen yet: may be queued again without anyone noticing
      STREAMING   its worker has sent events: belongs to that attempt
      ENDED       the attempt's terminal is known and told; the worker keeps the replay buffer
      (removed)   acknowledged and beyond resuming, or over without a worker involved

- A lease takes one slot of (worker, engine url, model digest) from the move to LEASED until it leaves
  {LEASED, STREAMING}: a slot is free at the end of the work, not at the acknowledgement.
- A request has one gateway, or none and then a time `expires` at which it is given up; a gateway's `rids` are exactly
  its requests. `holder` names the one that has it or had it last.
- `refs` finds what a client may resume (`grace_ms` > 0) by (client, ref), and there is one of each.
- An attempt that is not `request.attempt` holds nothing: whatever comes from it is stale.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum

from common.protocol import OPERATION, End, Engine, Failed, Model, Submit, engine_name, names_engine, short_name


class Phase(Enum):
    RECOVERING = "recovering"
    QUEUED = "queued"
    LEASED = "leased"
    STREAMING = "streaming"
    ENDED = "ended"


RUNNING = frozenset({Phase.LEASED, Phase.STREAMING})

TRANSITIONS: dict[Phase | None, frozenset[Phase | None]] = {
    None: frozenset({Phase.RECOVERING, Phase.QUEUED, Phase.LEASED}),
    Phase.RECOVERING: frozenset({Phase.QUEUED, Phase.LEASED, Phase.ENDED, None}),
    Phase.QUEUED: frozenset({Phase.LEASED, None}),
    Phase.LEASED: frozenset({Phase.QUEUED, Phase.STREAMING, Phase.RECOVERING, Phase.ENDED, None}),
    Phase.STREAMING: frozenset({Phase.RECOVERING, Phase.ENDED, None}),
    Phase.ENDED: frozenset({Phase.RECOVERING, None}),
}
"""From → to; None is "not held by the broker"."""


NAMES_MAX = 10_000
"""Models that gateways are told of; more exist only if somebody makes names up."""
STORY_MAX = 32
"""Moves a request remembers: one that is refused and queued again for hours must not grow."""

Offer = tuple["Worker", Engine, Model]
_OPERATION = Model(name="", digest=OPERATION)


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
    labels: tuple[str, ...] = ()
    reachable: bool = True
    paused_until: float = 0.0
    rids: set[bytes] = field(default_factory=set)
    busy: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def serves(self) -> bool:
        """Whether it takes requests, if not at once."""
        return self.reachable and not self.draining


@dataclass(slots=True, eq=False)
class Request:
    """A job and where it is. `events` is how many exist, as far as was seen; `start` where its attempt begins.

    `accepted` is its place in the line. `attachment` counts how often it changed hands. `holder` is empty as long as
    only a worker has spoken of it. `body` is the payload of its next assign, dropped when events have come:
    `body_bytes` of the request's body and, if it continues, its events below `start`. `told` is when its gateway last
    heard of its terminal, or asked for what comes before it; `told_at` when its place in the line was looked at for it.
    `away` names a silent worker that has the events.
    """

    rid: bytes
    submit: Submit
    body: bytes
    gateway: Gateway | None
    accepted: float
    start: int = 0
    body_bytes: int = 0
    attachment: int = 0
    holder: str = ""
    expires: float | None = None
    deadline: float | None = None
    claim_by: float | None = None
    phase: Phase | None = None
    attempt: int = 0
    ordinal: int = 0
    failures: int = 0
    failed_on: set[str] = field(default_factory=set)
    worker: Worker | None = None
    away: str = ""
    engine: str = ""
    digest: str = ""
    events: int = 0
    terminal: End | Failed | None = None
    terminal_payload: bytes = b""
    told: float = 0.0
    told_position: int = 0
    told_at: float = 0.0
    told_begin: float | None = None
    story: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_MAX))

    def __repr__(self) -> str:
        return f"<request {self.rid.hex()[:8]} {self.submit.model} {' '.join(self.story)}>"


class State:
    """All records, and the indexes over them."""

    def __init__(self) -> None:
        self.requests: dict[bytes, Request] = {}
        self.refs: dict[tuple[str, str], Request] = {}
        self.gateways: dict[bytes, Gateway] = {}
        self.gateways_by_name: dict[str, Gateway] = {}
        self.workers: dict[str, Worker] = {}
        self.workers_by_peer: dict[bytes, Worker] = {}
        self.phases: Counter[Phase] = Counter()
        self.body_bytes = 0
        self._offers: dict[str, dict[tuple[str, str], Offer]] = {}
        self._offered: dict[str, list[tuple[str, str]]] = {}

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
            self._count(request, -1)
        if request.phase is None:
            self.requests[request.rid] = request
            self.hand_over(request, request.gateway)
            if request.submit.grace_ms:
                self.refs[request.submit.client, request.submit.ref] = request
            self.body_bytes += len(request.body)
        else:
            self.phases[request.phase] -= 1
        if to is Phase.LEASED:
            assert worker is not None
            request.worker, request.engine, request.digest = worker, engine, digest
            worker.rids.add(request.rid)
            self._count(request, +1)
        elif to is Phase.RECOVERING:
            self.part(request)
            request.terminal, request.terminal_payload = None, b""
        elif to is Phase.QUEUED:
            self.part(request)
            request.attempt = 0
        elif to is None:
            self.part(request)
            self.hand_over(request, None)
            del self.requests[request.rid]
            if request.submit.grace_ms:
                del self.refs[request.submit.client, request.submit.ref]
        if to is not None:
            self.phases[to] += 1
        if to in (Phase.STREAMING, Phase.ENDED, None):
            self.put_body(request, b"")
        request.story.append(f"{to.value if to else 'removed'}{f'@{worker.name}' if worker else ''}")
        request.phase = to

    def part(self, request: Request) -> None:
        """Request and worker have nothing to do with each other any more."""
        if request.worker is not None:
            request.worker.rids.discard(request.rid)
        request.worker, request.engine, request.digest = None, "", ""

    def hand_over(self, request: Request, gateway: Gateway | None) -> None:
        """The request is that gateway's now, or nobody's."""
        if request.gateway is not None:
            request.gateway.rids.discard(request.rid)
            request.gateway.gapped.discard(request.rid)
        request.gateway = gateway
        if gateway is not None:
            gateway.rids.add(request.rid)
            request.holder = gateway.name

    def put_body(self, request: Request, body: bytes) -> None:
        """The payload of the next assign."""
        self.body_bytes += len(body) - len(request.body)
        request.body = body

    def _count(self, request: Request, by: int) -> None:
        assert request.worker is not None
        key = (request.engine, request.digest)
        request.worker.busy[key] += by
        if not request.worker.busy[key]:
            del request.worker.busy[key]

    def index(self, worker: Worker) -> None:
        """Note what a worker offers; called whenever it or its engines have changed."""
        self.unindex(worker)
        offered = self._offered[worker.name] = []
        for engine in worker.engines.values():
            if engine.up:
                # What is done to its models is offered beside them, under a name that no model can have.
                operation = (engine_name(worker.name, engine.url), _OPERATION)
                for name, model in [operation, *((model.name, model) for model in engine.models)]:
                    self._offers.setdefault(name, {})[worker.name, engine.url] = worker, engine, model
                    offered.append((name, engine.url))

    def unindex(self, worker: Worker) -> None:
        """It offers nothing."""
        for name, url in self._offered.pop(worker.name, ()):
            offers = self._offers[name]
            offers.pop((worker.name, url), None)
            if not offers:
                del self._offers[name]

    def offers(self, model: str) -> Collection[Offer]:
        """Every engine that has the model, full or not, draining or not."""
        offers = self._offers.get(model)
        return offers.values() if offers else ()

    def models(self) -> tuple[str, ...]:
        """The names of all models that can be served now, sorted, and those that stand for engines."""
        return tuple(sorted(self._offers))

    def names(self) -> tuple[str, ...]:
        """The same as clients know them, embedding models last: who takes the first means one that answers."""
        models = [
            (next(iter(offers.values()))[2].embedding, short_name(name))
            for name, offers in self._offers.items()
            if not names_engine(name)
        ]
        return tuple(name for _, name in sorted(models)[:NAMES_MAX])

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
            self.validate_request(request)
        resumable = sum(1 for request in self.requests.values() if request.submit.grace_ms)
        check(resumable == len(self.refs), "requests that are gone can be resumed")
        check(len(self.gateways) == len(self.gateways_by_name), "a gateway is known by two routing ids")
        check(len(self.workers_by_peer) == len(self.workers), "a worker is known by two routing ids")
        anew = State()
        for worker in self.workers.values():
            anew.index(worker)
        check(anew._offers == self._offers, "the offers are not what the workers say")
        for gateway in self.gateways_by_name.values():
            check(all(rid in self.requests for rid in gateway.rids), f"gateway {gateway.name} holds a foreign request")
            check(self.gateways.get(gateway.peer) is gateway, f"gateway {gateway.name} is not found by its peer")
        for worker in self.workers.values():
            held = [self.requests[rid] for rid in worker.rids]
            busy = Counter((r.engine, r.digest) for r in held if r.phase in RUNNING)
            check(busy == worker.busy, f"worker {worker.name} counts {worker.busy}, holds {busy}")
            check(all(r.worker is worker for r in held), f"worker {worker.name} holds a foreign request")
            check(self.workers_by_peer.get(worker.peer) is worker, f"worker {worker.name} is not found by its peer")

    def validate_request(self, request: Request) -> None:
        """Check the rules for one record.

        Raises:
            InvariantError: a rule is broken.
        """
        gateway, worker = request.gateway, request.worker
        if gateway is None:
            check(request.expires is not None, f"{request!r} is nobody's, and for ever")
        else:
            check(request.rid in gateway.rids, f"{request!r} is not among its gateway's")
            check(request.holder == gateway.name, f"{request!r} has another holder than its gateway")
            check(self.gateways_by_name.get(gateway.name) is gateway, f"{request!r} has a dead gateway")
        check(worker is None or request.rid in worker.rids, f"{request!r} is not among its worker's")
        if request.phase in (Phase.QUEUED, Phase.RECOVERING):
            check(worker is None, f"{request!r} waits and has a worker")
        elif request.phase in RUNNING:
            check(worker is not None and self.workers.get(worker.name) is worker, f"{request!r} runs on a dead worker")
        check((request.terminal is not None) == (request.phase is Phase.ENDED), f"{request!r} and its terminal")
        check(request.phase is not Phase.QUEUED or not request.attempt, f"{request!r} waits and has an attempt")
        found = self.refs.get((request.submit.client, request.submit.ref))
        check(not request.submit.grace_ms or found is request, f"{request!r} cannot be resumed")


def check(holds: bool, story: str) -> None:
    """Raise `InvariantError` unless the rule holds."""
    if not holds:
        raise InvariantError(story)
