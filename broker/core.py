"""The broker's decisions: who holds a request, and what happens when anyone comes, goes or fails.

Theory of operation
-------------------
`handle(event, now)` and `tick(now)` return effects for the shell to carry out, in order. The core reads no clock, draws
no random numbers and touches no socket; `nonce` (32 random bits) is given to it at birth.

    submit ──> QUEUED ──leased──> LEASED ──first chunk──> STREAMING ──end/failed──> ENDED ──ack──> (removed)
                  ^                 │                         │
                  └─ worker lost, refused, failed before      └─ worker lost: WORKER_LOST, the partial text stays
                     the first event (at most 3 failures)         with the client

Rules that keep the promises:

- **Every accepted request gets exactly one terminal.** `_end` is the only place that makes one, and it is made once:
  a request without a phase can't be ended again.
- **`register` is the truth** about a worker's leases: what it does not claim is queued again, or lost if it had
  streamed; what it claims and the core does not know is cancelled; for each lease both know the gateway hears `gap`.
- **A message of an attempt that holds no lease** is dropped and answered with `cancel`.
- **`leased` goes to the gateway before `assign` goes to the worker**, so no event overtakes the news of its attempt.
- **`submit` is idempotent by rid.** A gateway that reconnects submits everything without a terminal again; what the
  core still holds is told again, what it does not know starts anew unless events had been delivered.
- A peer that is silent for three heartbeats is lost. A line that breaks is not: the peer comes back with `register` or
  `hello` under a new routing id, or the heartbeats run out. One that could not be sent something and still speaks is
  answered `who`: only a `register` or `hello` repairs what it missed.
"""

import heapq
from typing import TYPE_CHECKING, Any, Final

from broker.events import Effect, Event, Forward, Note, Overflowed, Received, Send, Side, Unreachable
from broker.scheduler import Scheduler, WarmFirst
from broker.settings import BrokerSettings
from broker.state import RUNNING, Gateway, Phase, Request, State, Worker
from common.errors import Code
from common.protocol import (
    ATTEMPTS_MAX,
    BODY_BYTES_MAX,
    HEARTBEAT_INTERVAL_S,
    HEARTBEATS_MISSED_MAX,
    VERSION,
    Accepted,
    Ack,
    Assign,
    Beat,
    Bye,
    Cancel,
    Chunk,
    End,
    Error,
    Failed,
    Gap,
    Hello,
    Host,
    Job,
    Leased,
    Lost,
    Message,
    Query,
    Queued,
    Refused,
    Register,
    Registered,
    Release,
    Replay,
    Snapshot,
    Started,
    Submit,
    Superseded,
    Who,
    attempt_of,
    ordinal_of,
    short_name,
)
from common.protocol import State as EnginesChanged

if TYPE_CHECKING:
    from collections.abc import Callable

SILENCE_S: Final = HEARTBEAT_INTERVAL_S * HEARTBEATS_MISSED_MAX
POSITIONS_INTERVAL_S: Final = 2.0
POSITIONS_MAX: Final = 500
"""Positions told in one tick: recounting and telling all of 10,000 stalls the broker for 7 ms."""
REFUSED_PAUSE_S: Final = 0.25
"""A worker that refused an assign gets no other for so long: its own view of its slots must reach us first."""
SNAPSHOT_JOBS_MAX: Final = 1000
STALL_S: Final = 2 * HEARTBEAT_INTERVAL_S
"""A tick this late means that this process was stopped: it has heard nobody, so nobody counts as silent."""
DEADLINES_SLACK: Final = 64
"""Entries of the deadline heap that may be of requests that are over, beside as many as there are requests."""


class BrokerCore:
    """All decisions of one broker. Feed it events, carry out the effects, call `tick` at `next_deadline`."""

    def __init__(self, settings: BrokerSettings, *, nonce: int, now: float, scheduler: Scheduler | None = None) -> None:
        self.settings = settings
        self.state = State()
        self.scheduler = scheduler or WarmFirst()
        self.garbled = 0
        self._nonce = nonce
        self._started = now
        self._order = 0
        self._registrations = 0
        self._client_waiting: dict[str, int] = {}
        self._served: dict[str, float] = {}
        self._deadlines: list[tuple[float, bytes]] = []
        self._ticked = now
        self._next_beat = now
        self._next_positions = now + POSITIONS_INTERVAL_S
        self._fleet_told: tuple[tuple[str, ...], int] = ((), 0)
        self._out: list[Effect] = []
        self._from_gateway: dict[type, Callable[[Gateway, Any, bytes, float], None]] = {
            Submit: self._on_submit,
            Cancel: self._on_cancel,
            Replay: self._on_replay,
            Ack: self._on_ack,
            Beat: self._nothing,
            Error: self._on_gateway_error,
            Bye: self._on_gateway_bye,
        }
        self._from_worker: dict[type, Callable[[Worker, Any, bytes, float], None]] = {
            Started: self._on_started,
            End: self._on_end,
            Failed: self._on_failed,
            Refused: self._on_refused,
            EnginesChanged: self._on_engines,
            Beat: self._nothing,
            Error: self._on_worker_error,
            Bye: self._on_worker_bye,
        }

    # The entrances ----------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event."""
        self._out = out = list[Effect]()
        match event:
            case Received(side=Side.WORKER, message=Chunk()):
                gateway_peer = self.route(event.peer, event.message, now)
                if gateway_peer is None:
                    self._stale(event.peer, event.message.rid, event.message.attempt)
                else:
                    out.append(Forward(gateway_peer, event.message.rid, event.frame))
                return out
            case Received(side=Side.WORKER):
                self._worker_says(event, now)
                if isinstance(event.message, Beat):
                    return out
            case Received():
                self._gateway_says(event, now)
                if isinstance(event.message, Beat):
                    return out
            case Overflowed():
                request = self.state.requests.get(event.rid)
                if request is not None:
                    request.gateway.gapped.add(event.rid)
                return out
            case Unreachable(side=Side.WORKER):
                worker = self.state.workers_by_peer.get(event.peer)
                if worker is not None:
                    worker.reachable = False
            case Unreachable():
                gateway = self.state.gateways.get(event.peer)
                if gateway is not None:
                    gateway.reachable = False
            case _:  # Garbled
                self.garbled += 1
                self._send(event.side, event.peer, Error(code=Code.INVALID_MESSAGE, message=event.reason))
                self._note("message not understood", side=event.side.value, reason=event.reason)
        self._place(now)
        return out

    def route(self, peer: bytes, chunk: Chunk, now: float) -> bytes | None:
        """The hot path of `handle`: the gateway to which a worker's chunk goes on, its frame unchanged.

        None: the attempt holds no lease of this worker, and `handle` has the answer.
        """
        request = self.state.requests.get(chunk.rid)
        if request is None or request.attempt != chunk.attempt:
            return None
        worker = request.worker
        if worker is None or worker.peer != peer:
            return None
        worker.seen = now
        if request.phase is Phase.LEASED:
            self.state.move(request, Phase.STREAMING)
        top = chunk.seq + chunk.n
        if top > request.events:
            request.events = top
        return request.gateway.peer

    def tick(self, now: float) -> list[Effect]:
        """Do what time demands: heartbeats out, the silent declared lost, deadlines, positions."""
        self._out = out = list[Effect]()
        if now - self._ticked > STALL_S:
            for worker in self.state.workers.values():
                worker.seen = now
            for gateway in self.state.gateways.values():
                gateway.seen = now
        self._ticked = now
        for worker in [w for w in self.state.workers.values() if now - w.seen > SILENCE_S]:
            self._lose_worker(worker, "silent for three heartbeats", now)
        for gateway in [g for g in self.state.gateways.values() if now - g.seen > SILENCE_S]:
            self._lose_gateway(gateway, "silent for three heartbeats")
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, rid = heapq.heappop(self._deadlines)
            request = self.state.requests.get(rid)
            if request is not None and request.deadline == deadline and request.phase is not Phase.ENDED:
                self._stop(request, Code.DEADLINE_EXCEEDED, "the request's deadline has passed", now)
        for gateway in self.state.gateways.values():
            while gateway.gapped:
                self._tell_gap(self.state.requests[gateway.gapped.pop()])
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_INTERVAL_S
            for worker in self.state.workers.values():
                self._send(Side.WORKER, worker.peer, Beat())
            for gateway in self.state.gateways.values():
                self._send(Side.GATEWAY, gateway.peer, Beat())
            self._end_unserved(now)
            for request in [r for r in self.state.requests.values() if r.phase is Phase.ENDED]:
                if now - request.ended > self.settings.ack_s:
                    self._forget(request)
            if len(self._deadlines) > 2 * len(self.state.requests) + DEADLINES_SLACK:
                self._deadlines = [(r.deadline, r.rid) for r in self.state.requests.values() if r.deadline is not None]
                heapq.heapify(self._deadlines)
        for worker in self.state.workers.values():
            if worker.paused_until <= now:
                worker.paused_until = 0.0
        self._place(now)
        if now >= self._next_positions:
            self._next_positions = now + POSITIONS_INTERVAL_S
            self._tell_positions()
        return out

    def next_deadline(self) -> float:
        """When `tick` should be called at the latest."""
        paused = [worker.paused_until for worker in self.state.workers.values() if worker.paused_until]
        soonest = min([self._next_beat, self._next_positions, *paused])
        return min(soonest, self._deadlines[0][0]) if self._deadlines else soonest

    def validate(self) -> None:
        """Check every invariant; used by tests after every event."""
        self.state.validate(request for _, request in self.scheduler.waiting())

    # Gateways ---------------------------------------------------------------------------------------------------------

    def _gateway_says(self, event: Received, now: float) -> None:
        message = event.message
        if isinstance(message, Query):
            self._send(Side.GATEWAY, event.peer, self._snapshot(message, now))
            return
        if isinstance(message, Hello):
            self._on_hello(event.peer, message, now)
            return
        gateway = self.state.gateways.get(event.peer)
        handler = self._from_gateway.get(type(message))
        if handler is None:
            self._refuse_type(event)
        elif gateway is not None:
            gateway.seen = now
            if not gateway.reachable and not isinstance(message, Bye):
                self._send(Side.GATEWAY, event.peer, Who())
            handler(gateway, message, event.payload, now)
        elif not isinstance(message, Bye):
            self._send(Side.GATEWAY, event.peer, Who())

    def _on_hello(self, peer: bytes, message: Hello, now: float) -> None:
        if not self._same_version(Side.GATEWAY, peer, message.version):
            return
        other = self.state.gateways.get(peer)
        if other is not None and other.name != message.name:
            self._lose_gateway(other, "took another name")
        gateway = self.state.gateways_by_name.get(message.name)
        if gateway is None:
            gateway = Gateway(name=message.name, peer=peer, seen=now)
            self._note("gateway connected", gateway=message.name)
        else:
            del self.state.gateways[gateway.peer]
            gateway.peer, gateway.seen, gateway.reachable = peer, now, True
        self.state.gateways[peer] = self.state.gateways_by_name[message.name] = gateway
        self._send(Side.GATEWAY, peer, self._snapshot(Query(id=0), now))

    def _on_submit(self, gateway: Gateway, submit: Submit, body: bytes, now: float) -> None:
        known = self.state.requests.get(submit.rid)
        if known is not None:
            if known.gateway is gateway:
                self._tell_again(known)
            else:
                text = "another gateway holds a request of this rid"
                taken = Failed(rid=submit.rid, attempt=submit.attempt, code=Code.DUPLICATE_ID, message=text)
                self._send(Side.GATEWAY, gateway.peer, taken)
            return
        refusal = self._refusal(submit, body, now)
        if refusal is not None:
            self._send(Side.GATEWAY, gateway.peer, refusal)
            return
        self._order += 1
        request = Request(
            rid=submit.rid,
            submit=submit,
            body=body,
            gateway=gateway,
            accepted=now - submit.waited_ms / 1000,
            order=self._order,
            ordinal=ordinal_of(submit.attempt),
            deadline=None if submit.deadline_ms is None else now + submit.deadline_ms / 1000,
        )
        self._send(Side.GATEWAY, gateway.peer, Accepted(rid=submit.rid))
        position = self._queue(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.rid))
        self._place(now)
        if request.phase is Phase.QUEUED:
            self._tell_position(request, position)

    def _refusal(self, submit: Submit, body: bytes, now: float) -> Failed | None:
        """Why a request is not accepted, if it isn't."""

        def failed(code: Code, message: str, **more: Any) -> Failed:
            return Failed(rid=submit.rid, attempt=submit.attempt, code=code, message=message, **more)

        settings = self.settings
        if submit.next_seq > 0:
            return failed(
                Code.WORKER_LOST,
                "the broker restarted while this request was streaming; what has arrived is all there is",
                seq=submit.next_seq,
            )
        if len(body) > BODY_BYTES_MAX:
            return failed(Code.TOO_LARGE, f"the request is larger than {BODY_BYTES_MAX} bytes")
        if (
            len(self.scheduler) >= settings.queue_max
            or self._client_waiting.get(submit.client, 0) >= settings.queue_client_max
            or self.state.body_bytes + len(body) > settings.queue_bytes_max
        ):
            return failed(
                Code.QUEUE_FULL,
                f"{len(self.scheduler)} requests are waiting; try again later",
                retry_after_ms=5000,
                retryable=True,
            )
        if not self._hoped_for(submit.model, now):
            return self._unserved(submit.rid, submit.model, submit.attempt)
        return None

    def _hoped_for(self, model: str, now: float) -> bool:
        """Whether a host has the model, or may have it again in a moment."""
        if self.state.offers(model):
            return True
        seen = self._served.get(model)
        if seen is not None and now - seen < self.settings.unserved_s:
            return True
        return now - self._started < self.settings.settle_s

    def _unserved(self, rid: bytes, model: str, attempt: int) -> Failed:
        models = self.state.names()
        if not models:
            return Failed(
                rid=rid,
                attempt=attempt,
                code=Code.NO_WORKERS,
                message="no worker with a running engine is connected; `weftline doctor` tells more",
                retryable=True,
                retry_after_ms=5000,
            )
        return Failed(
            rid=rid,
            attempt=attempt,
            code=Code.MODEL_NOT_FOUND,
            message=f"model {short_name(model)!r} is on no host; there are: {', '.join(models[:50])}",
            models=models,
        )

    def _on_cancel(self, gateway: Gateway, message: Cancel, _: bytes, now: float) -> None:
        request = self.state.requests.get(message.rid)
        if request is None:
            # Ended and acknowledged, or a cancel sent again after a break: the gateway must hear an end.
            self._send(
                Side.GATEWAY,
                gateway.peer,
                Failed(rid=message.rid, attempt=message.attempt, code=Code.CANCELLED, message="cancelled"),
            )
        elif request.gateway is gateway:
            if request.phase is Phase.ENDED:
                self._tell_again(request)
            else:
                self._stop(request, Code.CANCELLED, message.reason or "cancelled", now)

    def _on_replay(self, gateway: Gateway, message: Replay, _: bytes, now: float) -> None:
        request = self.state.requests.get(message.rid)
        if request is None:
            # Its worker died after the terminal was told and before all events had arrived.
            lost = "events of this request were lost with their worker; what has arrived is all there is"
            failed = Failed(
                rid=message.rid, attempt=message.attempt, code=Code.WORKER_LOST, message=lost, seq=message.start
            )
            self._send(Side.GATEWAY, gateway.peer, failed)
        elif request.gateway is gateway and request.worker is not None and request.attempt == message.attempt:
            self._send(Side.WORKER, request.worker.peer, message)

    def _on_ack(self, gateway: Gateway, message: Ack, _: bytes, now: float) -> None:
        request = self.state.requests.get(message.rid)
        if request is not None and request.gateway is gateway and request.phase is Phase.ENDED:
            self._forget(request)

    def _on_gateway_error(self, gateway: Gateway, message: Error, _: bytes, now: float) -> None:
        self._note("gateway did not understand", gateway=gateway.name, reason=message.message)

    def _on_gateway_bye(self, gateway: Gateway, message: Bye, _: bytes, now: float) -> None:
        self._lose_gateway(gateway, "left")

    def _lose_gateway(self, gateway: Gateway, why: str) -> None:
        """Its clients are gone with it: cancel what they asked for."""
        self._note("gateway lost", gateway=gateway.name, why=why, requests=len(gateway.rids))
        for rid in list(gateway.rids):
            request = self.state.requests[rid]
            if request.phase in RUNNING:
                self._cancel_lease(request)
            elif request.phase is Phase.QUEUED:
                self._unqueue(request)
            self._forget(request)
        del self.state.gateways[gateway.peer]
        del self.state.gateways_by_name[gateway.name]

    # Workers ----------------------------------------------------------------------------------------------------------

    def _worker_says(self, event: Received, now: float) -> None:
        message = event.message
        if isinstance(message, Register):
            self._on_register(event.peer, message, now)
            return
        worker = self.state.workers_by_peer.get(event.peer)
        if worker is not None:
            worker.seen = now
            if not worker.reachable and not isinstance(message, Bye):
                self._send(Side.WORKER, event.peer, Who())
            self._from_worker[type(message)](worker, message, event.payload, now)
        elif not isinstance(message, Bye):
            self._send(Side.WORKER, event.peer, Who())

    def _on_register(self, peer: bytes, message: Register, now: float) -> None:
        if not self._same_version(Side.WORKER, peer, message.version):
            return
        other = self.state.workers_by_peer.get(peer)
        if other is not None and other.name != message.name:
            self._lose_worker(other, "took another name", now)
        worker = self.state.workers.get(message.name)
        if worker is not None and worker.epoch != message.epoch:
            self._send(Side.WORKER, worker.peer, Superseded())
            self._lose_worker(worker, "superseded by a newer process of its name", now)
            worker = None
        self._registrations += 1
        engines = {engine.url: engine for engine in message.engines}
        if worker is None:
            worker = Worker(
                name=message.name,
                epoch=message.epoch,
                peer=peer,
                seen=now,
                registration=self._registrations,
                engines=engines,
                draining=message.draining,
            )
            self._note("worker registered", worker=message.name, engines=len(engines))
        else:
            del self.state.workers_by_peer[worker.peer]
            worker.peer, worker.seen, worker.registration = peer, now, self._registrations
            worker.engines, worker.draining, worker.reachable = engines, message.draining, True
            self._note("worker registered again", worker=message.name, leases=len(message.leases))
        self.state.workers[worker.name] = self.state.workers_by_peer[peer] = worker
        self._send(Side.WORKER, peer, Registered(registration=worker.registration))
        claims = {claim.rid: claim for claim in message.leases}
        for rid in list(worker.rids):
            request = self.state.requests[rid]
            claim = claims.get(rid)
            if claim is not None and claim.attempt == request.attempt:
                del claims[rid]
                self._tell_gap(request, claim.top)
            elif request.phase in RUNNING:
                self._lose_lease(request, now)
            # An ended request whose buffer is gone: its gateway acknowledges, or runs into `ack_s`.
        for claim in claims.values():
            self._send(Side.WORKER, peer, Cancel(rid=claim.rid, attempt=claim.attempt, reason="no such lease"))
        self._fleet_changed(now)

    def _on_engines(self, worker: Worker, message: EnginesChanged, _: bytes, now: float) -> None:
        worker.engines = {engine.url: engine for engine in message.engines}
        worker.draining = message.draining
        self._fleet_changed(now)

    def _held(self, worker: Worker, rid: bytes, attempt: int) -> Request | None:
        """The running request this attempt belongs to; otherwise the attempt is stale and is cancelled."""
        request = self.state.requests.get(rid)
        if request is not None and request.attempt == attempt and request.worker is worker:
            return request
        self._stale(worker.peer, rid, attempt)
        return None

    def _stale(self, peer: bytes, rid: bytes, attempt: int) -> None:
        if peer in self.state.workers_by_peer:
            self._send(Side.WORKER, peer, Cancel(rid=rid, attempt=attempt, reason="no such lease"))
        else:
            self._send(Side.WORKER, peer, Who())

    def _on_started(self, worker: Worker, message: Started, _: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is not None and request.phase in RUNNING:
            self._send(Side.GATEWAY, request.gateway.peer, message)

    def _on_end(self, worker: Worker, message: End, _: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is not None:
            self._end(request, message, b"", now)

    def _on_failed(self, worker: Worker, message: Failed, payload: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is None:
            return
        if request.phase is Phase.LEASED and message.retryable and message.seq == 0:
            self._send(Side.WORKER, worker.peer, Cancel(rid=request.rid, attempt=request.attempt, reason="retried"))
            self._retry(request, message, payload, now)
        else:
            self._end(request, message, payload, now)

    def _on_refused(self, worker: Worker, message: Refused, _: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is not None and request.phase is Phase.LEASED:
            self._note("assign refused", worker=worker.name, rid=request.rid, reason=message.reason)
            worker.paused_until = now + REFUSED_PAUSE_S
            self._requeue(request)

    def _on_worker_error(self, worker: Worker, message: Error, _: bytes, now: float) -> None:
        self._note("worker did not understand", worker=worker.name, reason=message.message)

    def _on_worker_bye(self, worker: Worker, message: Bye, _: bytes, now: float) -> None:
        self._lose_worker(worker, "left", now)

    def _lose_worker(self, worker: Worker, why: str, now: float) -> None:
        self._note("worker lost", worker=worker.name, why=why, leases=sum(worker.busy.values()))
        for rid in list(worker.rids):
            request = self.state.requests[rid]
            if request.phase in RUNNING:
                self._lose_lease(request, now)
            # An ended request's buffer died with the worker: a gateway that lacks events hears so at its `replay`.
            if request.phase is Phase.ENDED:
                self._forget(request)
        del self.state.workers[worker.name]
        del self.state.workers_by_peer[worker.peer]
        self._fleet_changed(now)

    def _lose_lease(self, request: Request, now: float) -> None:
        """A lease died with its worker: wait again if nothing was seen of it, else it is over."""
        assert request.worker is not None
        name = request.worker.name
        lost = Failed(
            rid=request.rid,
            attempt=request.attempt,
            code=Code.WORKER_LOST,
            message=f"the worker {name!r} died after {request.events} events; what has arrived is all there is",
            seq=request.events,
            retryable=True,
        )
        if request.phase is Phase.LEASED:
            self._retry(request, lost, b"", now)
        else:
            self._end(request, lost, b"", now)

    # Requests ---------------------------------------------------------------------------------------------------------

    def _queue(self, request: Request) -> int:
        self.state.move(request, Phase.QUEUED)
        request.told_position = 0
        client = request.submit.client
        self._client_waiting[client] = self._client_waiting.get(client, 0) + 1
        return self.scheduler.add(request)

    def _unqueue(self, request: Request) -> None:
        self.scheduler.discard(request)
        client = request.submit.client
        self._client_waiting[client] -= 1
        if not self._client_waiting[client]:
            del self._client_waiting[client]

    def _place(self, now: float) -> None:
        """Lease whatever can run now."""
        while len(self.scheduler):
            placement = self.scheduler.place(self.state, now)
            if placement is None:
                return
            request, worker = placement.request, placement.worker
            self._unqueue(request)
            self.state.move(request, Phase.LEASED, worker=worker, engine=placement.engine, digest=placement.digest)
            request.ordinal += 1
            request.attempt = attempt_of(request.ordinal, self._nonce)
            self._send(Side.GATEWAY, request.gateway.peer, self._leased(request))
            submit = request.submit
            self._send(
                Side.WORKER,
                worker.peer,
                Assign(
                    rid=request.rid,
                    attempt=request.attempt,
                    registration=worker.registration,
                    engine=placement.engine,
                    model=submit.model,
                    digest=placement.digest,
                    method=submit.method,
                    path=submit.path,
                ),
                request.body,
            )

    def _leased(self, request: Request) -> Leased:
        assert request.worker is not None
        return Leased(rid=request.rid, attempt=request.attempt, worker=request.worker.name, engine=request.engine)

    def _requeue(self, request: Request) -> None:
        """Back to its old place in the line; the gateway hears that the attempt is gone."""
        self._send(Side.GATEWAY, request.gateway.peer, Lost(rid=request.rid, attempt=request.attempt))
        self._queue(request)

    def _retry(self, request: Request, failure: Failed, payload: bytes, now: float) -> None:
        """An attempt failed before its first event: try elsewhere, at most ATTEMPTS_MAX times."""
        assert request.worker is not None
        request.failures += 1
        request.failed_on.add(request.worker.name)
        self._note(
            "attempt failed",
            rid=request.rid,
            worker=request.worker.name,
            attempt=request.ordinal,
            reason=failure.message,
        )
        if request.failures < ATTEMPTS_MAX:
            self._requeue(request)
        else:
            self._end(request, failure, payload, now)

    def _stop(self, request: Request, code: Code, message: str, now: float) -> None:
        """End a request from our side, wherever it is."""
        if request.phase is Phase.QUEUED:
            self._unqueue(request)
        else:
            self._cancel_lease(request)
        failed = Failed(rid=request.rid, attempt=request.attempt, code=code, message=message, seq=request.events)
        self._send(Side.GATEWAY, request.gateway.peer, failed)
        self._forget(request)

    def _cancel_lease(self, request: Request) -> None:
        assert request.worker is not None
        self._send(Side.WORKER, request.worker.peer, Cancel(rid=request.rid, attempt=request.attempt))

    def _end(self, request: Request, terminal: Failed | End, payload: bytes, now: float) -> None:
        """The worker's side is over: tell the gateway, keep the terminal until it acknowledges."""
        if request.phase is not Phase.ENDED:
            self.state.move(request, Phase.ENDED)
            request.terminal, request.terminal_payload, request.ended = terminal, payload, now
        self._send(Side.GATEWAY, request.gateway.peer, terminal, payload)

    def _forget(self, request: Request) -> None:
        if request.phase is Phase.ENDED and request.worker is not None:
            self._send(Side.WORKER, request.worker.peer, Release(rid=request.rid))
        self.state.move(request, None)

    def _end_unserved(self, now: float) -> None:
        """Give up on requests whose model has been gone for too long."""
        for model in self.state.models():
            self._served[model] = now
        for model in [m for m, seen in self._served.items() if now - seen > self.settings.unserved_s]:
            del self._served[model]
        waiting = [request for _, request in self.scheduler.waiting()]
        hopeless = {model for model in {r.submit.model for r in waiting} if not self._hoped_for(model, now)}
        for request in waiting:
            if request.submit.model in hopeless:
                self._unqueue(request)
                failed = self._unserved(request.rid, request.submit.model, request.attempt)
                self._send(Side.GATEWAY, request.gateway.peer, failed)
                self._forget(request)

    # Telling ----------------------------------------------------------------------------------------------------------

    def _tell_again(self, request: Request) -> None:
        """A gateway asks after a break: tell where its request is."""
        peer = request.gateway.peer
        self._send(Side.GATEWAY, peer, Accepted(rid=request.rid))
        if request.phase is Phase.QUEUED:
            request.told_position = 0
            return
        # Also of what has ended: it may lack events, and asks for them by the attempt.
        self._send(Side.GATEWAY, peer, self._leased(request))
        if request.terminal is None:
            self._tell_gap(request)
        else:
            self._send(Side.GATEWAY, peer, request.terminal, request.terminal_payload)

    def _tell_gap(self, request: Request, top: int = 0) -> None:
        gap = Gap(rid=request.rid, attempt=request.attempt, top=max(top, request.events))
        self._send(Side.GATEWAY, request.gateway.peer, gap)

    def _tell_position(self, request: Request, position: int) -> None:
        if position != request.told_position:
            request.told_position = position
            self._send(Side.GATEWAY, request.gateway.peer, Queued(rid=request.rid, position=position))

    def _tell_positions(self) -> None:
        for told, (position, request) in enumerate(self.scheduler.waiting()):
            if told >= POSITIONS_MAX:
                return
            self._tell_position(request, position)

    def _fleet_changed(self, now: float) -> None:
        self.state.index_offers()
        fleet = self.state.models(), len(self.state.workers)
        for model in fleet[0]:
            self._served[model] = now
        if fleet != self._fleet_told:
            self._fleet_told = fleet
            snapshot = self._snapshot(Query(id=0), now)
            for gateway in self.state.gateways.values():
                self._send(Side.GATEWAY, gateway.peer, snapshot)

    def _snapshot(self, query: Query, now: float) -> Snapshot:
        state = self.state
        return Snapshot(
            id=query.id,
            what=query.what,
            models=state.names(),
            workers=len(state.workers),
            queued=len(self.scheduler),
            running=state.phases[Phase.LEASED] + state.phases[Phase.STREAMING],
            hosts=tuple(self._host(w, now) for w in state.workers.values()) if query.what == "hosts" else (),
            jobs=self._jobs(now) if query.what == "requests" else (),
        )

    def _host(self, worker: Worker, now: float) -> Host:
        busy: dict[str, dict[str, int]] = {}
        for (url, digest), count in worker.busy.items():
            busy.setdefault(url, {})[digest] = count
        return Host(
            name=worker.name,
            engines=tuple(worker.engines.values()),
            busy=busy,
            draining=worker.draining,
            beat_age_ms=int((now - worker.seen) * 1000),
            epoch=worker.epoch,
        )

    def _jobs(self, now: float) -> tuple[Job, ...]:
        positions = {request.rid: position for position, request in self.scheduler.waiting()}
        jobs: list[Job] = []
        for request in self.state.requests.values():
            if request.phase in (Phase.QUEUED, *RUNNING) and len(jobs) < SNAPSHOT_JOBS_MAX:
                jobs.append(
                    Job(
                        rid=request.rid,
                        client=request.submit.client,
                        ref=request.submit.ref,
                        model=short_name(request.submit.model),
                        state=request.phase.value,
                        age_ms=int((now - request.accepted) * 1000),
                        worker=request.worker.name if request.worker else "",
                        engine=request.engine,
                        attempt=request.ordinal,
                        events=request.events,
                        position=positions.get(request.rid, 0),
                    )
                )
        return tuple(jobs)

    # Small change -----------------------------------------------------------------------------------------------------

    def _same_version(self, side: Side, peer: bytes, version: int) -> bool:
        if version == VERSION:
            return True
        message = f"this broker speaks version {VERSION} of the wire, not {version}"
        self._send(side, peer, Error(code=Code.INVALID_MESSAGE, message=message))
        self._note("peer of another version", side=side.value, version=version)
        return False

    def _refuse_type(self, event: Received) -> None:
        self.garbled += 1
        name = type(event.message).__name__.lower()
        message = f"a {event.side.value} cannot send {name!r} to this broker"
        self._send(event.side, event.peer, Error(code=Code.UNKNOWN_TYPE, message=message))

    def _nothing(self, peer: Gateway | Worker, message: Message, payload: bytes, now: float) -> None:
        """A sign of life says nothing more."""

    def _send(self, side: Side, peer: bytes, message: Message, payload: bytes = b"") -> None:
        self._out.append(Send(side, peer, message, payload))

    def _note(self, event: str, **facts: Any) -> None:
        self._out.append(Note(event, facts))
