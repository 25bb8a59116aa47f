"""The broker's decisions: who holds a request, and what happens when anyone comes, goes or fails.

Theory of operation
-------------------
`handle(event, now)` and `tick(now)` return effects for the shell to carry out, in order. The core reads no clock, draws
no random numbers and touches no socket; `nonce` (32 random bits) is given to it at birth.

    submit ──> QUEUED ──leased──> LEASED ──first chunk──> STREAMING ──end/failed──> ENDED ──ack──> (kept) ──> (removed)
                ^ ^ ^               │                         │                     │
                │ │ └─ worker lost, refused, failed before    └─ worker lost: ENDED │
                │ │    the first event (at most 3 failures)                         │
                │ └──────── its gateway submits it again, to be continued ──────────┘
            RECOVERING ──claimed──> LEASED

Rules that keep the promises (those about the time before this broker: broker/recovery.py):

- **Every accepted request gets exactly one terminal** from its gateway, which decides by what it delivered. Here `_end`
  is the only place that ends an attempt; a failure marked `resubmit` asks the gateway whether it wants another.
- **`register` is the truth** about a worker's leases: what it does not claim is queued again, or lost if it had
  streamed; what it claims and nobody else knows of is taken up or cancelled; for each lease that stays the gateway
  hears `gap`. A worker that was taken for dead gets its lease back as long as no other attempt has taken its place.
- **Attempts are ordinals**; the next is one more than the highest known. A message of an attempt that holds no lease is
  dropped and answered with `cancel`.
- **`leased` goes to the gateway before `assign` goes to the worker**, so no event overtakes the news of its attempt.
- **`submit` is idempotent by rid.** A gateway that reconnects submits everything without a terminal again; what the
  core holds is told again, unless it does not go on from what the gateway has: then it is given up, and the request
  runs as submitted. A continuation is submitted the same way.
- **A body in parts stays at its gateway.** What the worker wants of it goes there, and each part back, through here;
  nothing of it is kept. Whatever is lost the worker asks for again.
- **The broker owns the resume timer.** A request whose client (`detach`) or gateway is gone runs on until `expires`;
  `attach` describes it to the gateway where its client came back, which takes it by submitting it with the next
  `attachment`. A gateway's word counts only for what is its own; of two that submit the same request the one with the
  higher `attachment` has it, and the other hears `detached`.
- A peer that is silent for three heartbeats is lost. A line that breaks is not: the peer comes back with `register` or
  `hello` under a new routing id, or the heartbeats run out. One that could not be sent something and still speaks is
  answered `who`: only a `register` or `hello` repairs what it missed.
"""

import heapq
from collections import Counter, deque
from math import inf, nextafter
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from broker.events import Effect, Event, Forward, Note, Overflowed, Received, Send, Side, Supply, Unreachable
from broker.policy import Policy
from broker.recovery import ATTACHES_MAX, Window, agrees, believes
from broker.rules import Rules
from broker.scheduler import Outlook, Scheduler
from broker.settings import BrokerSettings
from broker.state import RUNNING, Gateway, Phase, Request, State, Worker, check
from common.errors import Code
from common.protocol import (
    ATTEMPTS_MAX,
    BESIDE_MAX,
    BODY_BYTES_MAX,
    ERROR_TEXT_MAX,
    HEARTBEAT_INTERVAL_S,
    LIGHT,
    OPERATION,
    SILENCE_S,
    VERSION,
    Accepted,
    Ack,
    Admin,
    Assign,
    Attach,
    Attached,
    Beat,
    Bye,
    Cancel,
    Chunk,
    Claim,
    Detach,
    Detached,
    Drain,
    End,
    Error,
    Failed,
    Forgotten,
    Gap,
    Hello,
    Host,
    Job,
    Leased,
    Lost,
    Message,
    Part,
    Probe,
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
    Want,
    Who,
    attempt_of,
    names_engine,
    ordinal_of,
    short_name,
)
from common.protocol import State as EnginesChanged

if TYPE_CHECKING:
    from collections.abc import Callable

POSITIONS_INTERVAL_S: Final = 2.0
"""How often a client hears at most where its request stands."""
POSITIONS_STEP: Final = 25
POSITIONS_STEP_S: Final = 0.1
"""So many are told at a time, and so often, in turns: all of 10,000 at once would stall the broker for 0.2 s."""
UNACKNOWLEDGED_S: Final = 5.0
"""How often ended requests are looked through for those whose gateway does not acknowledge."""
RETRY_AFTER_MS: Final = 5_000
RETRY_AFTER_MS_MIN: Final = 1_000
RETRY_AFTER_MS_MAX: Final = 60_000
"""When whoever was refused should come again: that, or by what is known of the rates, within these bounds."""
ETA_NEWS_S: Final = 1.0
ETA_NEWS: Final = 0.25
"""What is told of a request's beginning is told again when it moved by so much: seconds, or of the time till then."""
REFUSED_PAUSE_S: Final = 0.25
"""A worker that refused an assign gets no other for so long: its own view of its slots must reach us first."""
SNAPSHOT_JOBS_MAX: Final = 1000
PEERS_MAX: Final = 10_000
"""Workers, and gateways; one more is turned away."""
FAILURE_BYTES_MAX: Final = 64 * 2**10
"""Kept of an engine's own words for a failure, until its gateway acknowledges."""
FAILURE_TEXT_MAX: Final = 2000
FAILURE_MODELS_MAX: Final = 1000
STALL_S: Final = 2 * HEARTBEAT_INTERVAL_S
"""A tick this late means that this process was stopped: it has heard nobody, so nobody counts as silent."""
TIMERS_SLACK: Final = 64
"""Entries of the heap of timers that may be of requests that are over, beside three for each there is."""
EPOCHS_MAX: Final = 10_000
"""Names of workers, and as many processes replaced by a newer one of their name: one that comes back must not win."""


class BrokerCore:
    """All decisions of one broker. Feed it events, carry out the effects, call `tick` at `next_deadline`."""

    def __init__(self, settings: BrokerSettings, *, nonce: int, now: float, scheduler: Scheduler | None = None) -> None:
        self.settings = settings
        self.state = State()
        self._rules = Rules(settings.rules)
        self.scheduler: Scheduler = Policy(self._rules) if scheduler is None else scheduler
        self.garbled = 0
        self._nonce = nonce
        self._window = Window(settings.recover_s, nonce, now)
        self._registrations = 0
        self._epochs: dict[str, str] = {}
        self._superseded: dict[str, None] = {}
        self._client_waiting: dict[str, int] = {}
        self._served: dict[str, float] = {}
        self._allowed: dict[tuple[str, str], float] = {}  # of what waits, when a host last was one that rules allow
        self._accepted = -inf
        self._timers: list[tuple[float, bytes]] = []
        self._kept: dict[bytes, None] = {}  # acknowledged requests that clients can resume, oldest first
        self._ticked = now
        self._next_beat = now
        self._positions: deque[tuple[float, bytes]] = deque()  # of what waits, when it was told, or came
        self._next_positions = now
        self._next_unacknowledged = now
        self._fleet_told: tuple[tuple[str, ...], int] = ((), 0)
        self._out: list[Effect] = []
        self._from_gateway: dict[type, Callable[[Gateway, Any, bytes, float], None]] = {
            Submit: self._on_submit,
            Cancel: self._on_cancel,
            Detach: self._on_detach,
            Attach: self._on_attach,
            Replay: self._on_replay,
            Ack: self._on_ack,
            Started: self._on_handed_over,
            Beat: self._nothing,
            Error: self._on_gateway_error,
            Bye: self._on_gateway_bye,
        }
        self._from_worker: dict[type, Callable[[Worker, Any, bytes, float], None]] = {
            Started: self._on_started,
            Forgotten: self._on_forgotten,
            Want: self._on_want,
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
                elif gateway_peer:
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
                if request is not None and request.gateway is not None:
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

        b"": nobody's at the moment; the worker keeps it. None: the attempt holds no lease of this worker, and `handle`
        has the answer.
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
            self.scheduler.started(request, now)
        top = chunk.seq + chunk.n
        if top > request.events:
            request.events = top
        return request.gateway.peer if request.gateway is not None else b""

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
            self._lose_worker(worker, "silent for three heartbeats", now, silent=True)
        for gateway in [g for g in self.state.gateways.values() if now - g.seen > SILENCE_S]:
            self._lose_gateway(gateway, "silent for three heartbeats", now)
        while self._timers and self._timers[0][0] <= now:
            at, rid = heapq.heappop(self._timers)
            request = self.state.requests.get(rid)
            if request is None:
                continue
            if request.deadline == at and request.phase is not Phase.ENDED:
                self._stop(request, Code.DEADLINE_EXCEEDED, "the request's deadline has passed", now)
            elif request.expires == at:
                self._stop(request, Code.CANCELLED, "its client did not come back", now)
            elif request.claim_by == at and request.phase is Phase.RECOVERING:
                self._unclaimed(request, now)
        if self._window.until <= now:
            self._close_window()
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_INTERVAL_S
            for gateway in self.state.gateways.values():
                while gateway.gapped:  # not sooner: it is behind, and each gap brings a replay
                    self._tell_gap(self.state.requests[gateway.gapped.pop()])
            for worker in self.state.workers.values():
                self._send(Side.WORKER, worker.peer, Beat())
            for gateway in self.state.gateways.values():
                self._send(Side.GATEWAY, gateway.peer, Beat())
            self._end_unserved(now)
            if now >= self._next_unacknowledged:
                self._next_unacknowledged = now + min(self.settings.ack_s, UNACKNOWLEDGED_S)
                for request in [r for r in self.state.requests.values() if r.phase is Phase.ENDED and not r.expires]:
                    if now - request.told > self.settings.ack_s:
                        self._forget(request, now)
            if len(self._timers) > 3 * len(self.state.requests) + TIMERS_SLACK:
                requests = self.state.requests.values()
                timers = {(at, r.rid) for r in requests for at in (r.deadline, r.expires, r.claim_by) if at is not None}
                self._timers = sorted(timers)
            if len(self._positions) > 3 * len(self.scheduler) + TIMERS_SLACK:
                self._positions = deque(position for position in self._positions if self._waits_since(*position))
        for worker in self.state.workers.values():
            if 0 < worker.paused_until <= now:
                worker.paused_until = 0.0
                self.scheduler.look_again()
        self._place(now)
        self._tell_positions(now)
        return out

    def next_deadline(self) -> float:
        """When `tick` should be called at the latest."""
        paused = [worker.paused_until for worker in self.state.workers.values() if worker.paused_until]
        held = [self._window.hold_until] if self._window.hold_until > self._ticked else []
        return min(
            self._next_beat,
            max(self._next_positions, self._positions[0][0] + POSITIONS_INTERVAL_S) if self._positions else inf,
            max(self._window.hold_until, self.scheduler.next_deadline()),
            *paused,
            *held,
            *(at for at, _ in self._timers[:1]),
        )

    def validate(self) -> None:
        """Check every invariant; used by tests after every event."""
        self.state.validate(self.scheduler)
        waiting = Counter(request.submit.client for request in self.scheduler)
        check(waiting == self._client_waiting, "the waiting of each client are miscounted")
        for rid in self._kept:
            kept = self.state.requests[rid]
            check(kept.phase is Phase.ENDED and kept.expires is not None, f"{kept!r} is kept for ever")

    # Gateways ---------------------------------------------------------------------------------------------------------

    def _gateway_says(self, event: Received, now: float) -> None:
        message = event.message
        if isinstance(message, Probe):
            self._send(Side.GATEWAY, event.peer, Beat())
            return
        if isinstance(message, Query):
            self._send(Side.GATEWAY, event.peer, self._snapshot(message, now))
            return
        if isinstance(message, Admin):
            self._on_admin(event.peer, message, now)
            return
        if isinstance(message, Hello):
            self._on_hello(event.peer, message, now)
            return
        gateway = self.state.gateways.get(event.peer)
        if gateway is not None:
            gateway.seen = now
            if not gateway.reachable and not isinstance(message, Bye):
                self._send(Side.GATEWAY, event.peer, Who())
            if isinstance(message, Chunk):
                self._on_handed_chunk(gateway, message, event.frame)
            elif isinstance(message, Part):
                self._on_part(gateway, message, event.frame)
            else:
                self._from_gateway[type(message)](gateway, message, event.payload, now)
        elif not isinstance(message, Bye):
            self._send(Side.GATEWAY, event.peer, Who())

    def _on_hello(self, peer: bytes, message: Hello, now: float) -> None:
        if not self._same_version(Side.GATEWAY, peer, message.version):
            return
        other = self.state.gateways.get(peer)
        if other is not None and other.name != message.name:
            self._lose_gateway(other, "took another name", now)
        gateway = self.state.gateways_by_name.get(message.name)
        if gateway is None and len(self.state.gateways) >= PEERS_MAX:
            self._turn_away(Side.GATEWAY, peer)
            return
        if gateway is None:
            self._meet(now)
            gateway = Gateway(name=message.name, peer=peer, seen=now)
            self._note("gateway connected", gateway=message.name)
        else:
            del self.state.gateways[gateway.peer]
            gateway.peer, gateway.seen, gateway.reachable = peer, now, True
        self.state.gateways[peer] = self.state.gateways_by_name[message.name] = gateway
        self._send(Side.GATEWAY, peer, self._snapshot(Query(id=0), now))

    def _on_admin(self, peer: bytes, message: Admin, now: float) -> None:
        worker = self.state.workers.get(message.target)
        if worker is None or message.action not in ("drain", "resume"):
            hosts = ", ".join(sorted(self.state.workers)) or "none"
            text = f"cannot {message.action} {message.target!r}; the hosts are: {hosts}"
            self._send(Side.GATEWAY, peer, Error(code=Code.NOT_FOUND, message=text[:ERROR_TEXT_MAX]))
            return
        worker.draining = message.action == "drain"
        self.scheduler.look_again()
        self._note("host told to " + message.action, worker=worker.name)
        self._send(Side.WORKER, worker.peer, Drain(on=worker.draining))
        self._send(Side.GATEWAY, peer, self._snapshot(Query(id=message.id, what="hosts"), now))

    def _on_submit(self, gateway: Gateway, submit: Submit, body: bytes, now: float) -> None:
        known = self.state.requests.get(submit.rid)
        rival = self.state.refs.get((submit.client, submit.ref)) if submit.grace_ms else None
        ordinal, failures, failed_on = ordinal_of(submit.attempt), 0, set[str]()
        if known is not None:
            if self._is_anothers(known, gateway, submit):
                return
            if submit.attachment < known.attachment:
                # It asked for the request meanwhile, and gets it: this is from before.
                self._tell_again(known, now)
                return
            self._take_from(known, gateway)
            if agrees(known, submit):
                self._take_back(known, gateway, submit, body, now)
                self._settle(submit.rid, now)
                return
            ordinal, failures, failed_on = max(ordinal, known.ordinal), known.failures, known.failed_on
            self._discard(known, now)
        elif rival is not None:
            if rival.expires is None:
                self._refuse_duplicate(gateway, submit, "a request with this id of this client is running")
                return
            self._tell(rival, Detached(rid=rival.rid))
            self._discard(rival, now)
        refusal = None if submit.accepted else self._refusal(submit, body, now)
        if refusal is not None:
            self._send(Side.GATEWAY, gateway.peer, refusal)
            return
        if submit.accepted and known is None:
            self._window.trace(now)
            self._window.hold(now)
        accepted = now - submit.waited_ms / 1000
        if not submit.waited_ms:
            # Those that come at one time by the clock, as in a burst, keep their order.
            accepted = self._accepted = max(accepted, nextafter(self._accepted, inf))
        continues = submit.lost and submit.next_seq > 0
        request = Request(
            rid=submit.rid,
            submit=submit,
            body=body,
            gateway=gateway,
            accepted=accepted,
            start=submit.next_seq if continues else 0,
            body_bytes=submit.body_bytes if continues else len(body),
            events=submit.next_seq,
            attachment=submit.attachment,
            ordinal=ordinal,
            failures=failures,
            failed_on=failed_on,
        )
        self._send(Side.GATEWAY, gateway.peer, Accepted(rid=submit.rid))
        self._set_timers(request, submit, now)
        if submit.attempt and not submit.lost:
            request.attempt = submit.attempt
            self.state.move(request, Phase.RECOVERING)
            if self._window.made_here(submit.attempt):
                self._unclaimed(request, now)
            else:
                request.claim_by = now + self.settings.recover_s
                heapq.heappush(self._timers, (request.claim_by, request.rid))
                self._settle(submit.rid, now)
        else:
            self._queue(request, now)
            self._place(now)
            if request.phase is Phase.QUEUED:
                self._tell_outlook(self.scheduler.outlook(request, now), now)
        self._attach_waiting(request, now)

    def _is_anothers(self, known: Request, gateway: Gateway, submit: Submit) -> bool:
        """Whether another gateway holds what this one submits; it hears so."""
        if known.gateway is gateway:
            return False
        if submit.attachment < known.attachment:
            self._send(Side.GATEWAY, gateway.peer, Detached(rid=submit.rid))
            return True
        if known.gateway is not None and submit.attachment == known.attachment:
            self._refuse_duplicate(gateway, submit, "another gateway holds a request of this rid")
            return True
        return False

    def _refuse_duplicate(self, gateway: Gateway, submit: Submit, text: str) -> None:
        taken = Failed(rid=submit.rid, attempt=submit.attempt, code=Code.DUPLICATE_ID, message=text)
        self._send(Side.GATEWAY, gateway.peer, taken)

    def _on_handed_over(self, gateway: Gateway, message: Started, payload: bytes, _: float) -> None:
        """What the gateway that had the request before knows of it: its body."""
        heir = self._heir(gateway, message)
        if heir is not None:
            self._send(Side.GATEWAY, heir.peer, message, payload)

    def _on_handed_chunk(self, gateway: Gateway, message: Chunk, frame: bytes) -> None:
        """And its events. Like a worker's they may be dropped on the way."""
        heir = self._heir(gateway, message)
        if heir is not None:
            self._out.append(Forward(heir.peer, message.rid, frame))

    def _on_part(self, gateway: Gateway, message: Part, frame: bytes) -> None:
        """A part of a body, for the worker that wants it."""
        request = self.state.requests.get(message.rid)
        if request is None or request.gateway is not gateway or request.attempt != message.attempt:
            return
        if request.worker is not None:
            self._out.append(Supply(request.worker.peer, frame))

    def _heir(self, gateway: Gateway, message: Started | Chunk) -> Gateway | None:
        """The gateway that has the request now, if it is another."""
        request = self.state.requests.get(message.rid)
        if request is None or request.gateway is gateway or message.attempt != request.attempt:
            return None
        return request.gateway

    def _take_from(self, request: Request, gateway: Gateway) -> None:
        """The request is this gateway's; another that had it hears so."""
        if request.gateway is not None and request.gateway is not gateway:
            self._send(Side.GATEWAY, request.gateway.peer, Detached(rid=request.rid))
        self.state.hand_over(request, gateway)

    def _take_back(self, request: Request, gateway: Gateway, submit: Submit, body: bytes, now: float) -> None:
        """A gateway submits again what is held here, and is told where it is."""
        known = request.submit
        request.submit = replace(
            submit,
            client=known.client,
            ref=known.ref,
            model=known.model,
            grace_ms=known.grace_ms,
            light=known.light,
        )
        request.attachment, request.told = submit.attachment, now
        self._unkeep(request)
        self._set_timers(request, submit, now)
        if submit.attempt == request.attempt:
            request.events = max(request.events, submit.next_seq)
        if request.phase is Phase.LEASED and not request.body and not request.events:
            request.body_bytes = len(body)  # it was claimed, and a claim brings no body
            self.state.put_body(request, body)
        self._tell_again(request, now)

    def _set_timers(self, request: Request, submit: Submit, now: float) -> None:
        if request.deadline is None and submit.deadline_ms is not None:
            # Said again it is the same: what remains of it. It has its place in the line by the first.
            request.deadline = now + submit.deadline_ms / 1000
            heapq.heappush(self._timers, (request.deadline, request.rid))
        away_ms = submit.absent_ms
        self._expire(request, None if away_ms is None else now + max(0, submit.grace_ms - away_ms) / 1000)

    def _expire(self, request: Request, at: float | None) -> None:
        """Give the request up at that time, unless somebody comes for it."""
        request.expires = at
        if at is not None:
            heapq.heappush(self._timers, (at, request.rid))

    def _unclaimed(self, request: Request, now: float) -> None:
        """No worker has the lease that the gateway knows of."""
        if self._can_start_anew(request):
            self._requeue(request, now)
            return
        text = "its worker did not come back after the broker's restart"
        failed = Failed(
            rid=request.rid,
            attempt=request.attempt,
            code=Code.WORKER_LOST,
            message=text,
            seq=request.events,
            resubmit=True,
        )
        self._end(request, failed, b"", now)

    def _meet(self, now: float) -> None:
        """A peer comes that was not there; if nobody was, it may have been with another broker, and others too."""
        if not self.state.gateways and not self.state.workers:
            self._window.open(now)

    def _close_window(self) -> None:
        """Whoever has not come back by now is gone."""
        self._window.traced = False
        for rid in list(self._window.disputed):
            self._settle(rid, self._ticked)
        self._window.tombstones.clear()
        for name, number in self._window.attaches.values():
            self._answer_attach(name, number)
        self._window.attaches.clear()

    def _refusal(self, submit: Submit, body: bytes, now: float) -> Failed | None:
        """Why a request is not accepted, if it isn't."""

        def failed(code: Code, message: str, **more: Any) -> Failed:
            return Failed(rid=submit.rid, attempt=submit.attempt, code=code, message=message, **more)

        settings = self.settings
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
                retry_after_ms=self._retry_after_ms(submit.model, now),
                retryable=True,
            )
        if not self._hoped_for(submit.model, now):
            return self._unserved(submit.rid, submit.model, submit.attempt)
        return None

    def _retry_after_ms(self, model: str, now: float) -> int:
        """When half of what waits for the model should be done."""
        backlog_s = self.scheduler.backlog_s(model, now)
        if backlog_s is None:
            return RETRY_AFTER_MS
        return int(min(max(backlog_s * 500, RETRY_AFTER_MS_MIN), RETRY_AFTER_MS_MAX))

    def _hoped_for(self, model: str, now: float) -> bool:
        """Whether a host has the model, or may have it again in a moment."""
        if self.state.offers(model):
            return True
        seen = self._served.get(model)
        if seen is not None and now - seen < self.settings.unserved_s:
            return True
        window = self._window
        return now - window.opened < self.settings.settle_s or (window.traced and now < window.until)

    def _unserved(self, rid: bytes, model: str, attempt: int) -> Failed:
        models = self.state.names()
        if not models:
            return Failed(
                rid=rid,
                attempt=attempt,
                code=Code.NO_WORKERS,
                message="no worker with a running engine is connected; `weftline doctor` tells more",
                retryable=True,
                retry_after_ms=RETRY_AFTER_MS,
            )
        return Failed(
            rid=rid,
            attempt=attempt,
            code=Code.MODEL_NOT_FOUND,
            message=f"model {short_name(model)!r} is on no host; there are: {', '.join(models[:50])}"[
                :FAILURE_TEXT_MAX
            ],
            models=models[:FAILURE_MODELS_MAX],
        )

    def _on_cancel(self, gateway: Gateway, message: Cancel, _: bytes, now: float) -> None:
        request = self.state.requests.get(message.rid)
        if request is None:
            # Ended and acknowledged, or a cancel sent again after a break: the gateway must hear an end.
            self._window.bury(message.rid, now)
            self._send(
                Side.GATEWAY,
                gateway.peer,
                Failed(rid=message.rid, attempt=message.attempt, code=Code.CANCELLED, message="cancelled"),
            )
        elif request.gateway is gateway or (request.gateway is None and request.holder in ("", gateway.name)):
            # Or nobody's: it was away, or its first word about what a worker claimed is that nobody wants it.
            self.state.hand_over(request, gateway)
            self._stop(request, Code.CANCELLED, message.reason or "cancelled", now)
        else:
            self._send(Side.GATEWAY, gateway.peer, Detached(rid=message.rid))

    def _on_detach(self, gateway: Gateway, message: Detach, _: bytes, now: float) -> None:
        request = self.state.requests.get(message.rid)
        if request is not None and request.gateway is gateway:
            if request.submit.grace_ms:
                self._expire(request, now + request.submit.grace_ms / 1000)
            else:
                self._stop(request, Code.CANCELLED, "its client is gone", now)

    def _on_attach(self, gateway: Gateway, message: Attach, _: bytes, now: float) -> None:
        request = self.state.refs.get((message.client, message.ref))
        if request is not None:
            self._attach(request, gateway, message.id, now)
        elif now < self._window.until and len(self._window.attaches) < ATTACHES_MAX:
            former = self._window.attaches.pop((message.client, message.ref), None)
            if former is not None and former != (gateway.name, message.id):
                self._answer_attach(*former)
            self._window.attaches[message.client, message.ref] = gateway.name, message.id
        else:
            self._answer_attach(gateway.name, message.id)

    def _answer_attach(self, name: str, number: int) -> None:
        """There is no such request."""
        gateway = self.state.gateways_by_name.get(name)
        if gateway is not None:
            self._send(Side.GATEWAY, gateway.peer, Attached(id=number))

    def _attach_waiting(self, request: Request, now: float) -> None:
        """A request became known: perhaps its client waits for it already."""
        if request.submit.grace_ms:
            name, number = self._window.attaches.pop((request.submit.client, request.submit.ref), ("", 0))
            gateway = self.state.gateways_by_name.get(name)
            if gateway is not None:
                self._attach(request, gateway, number, now)

    def _attach(self, request: Request, gateway: Gateway, number: int, now: float) -> None:
        """Describe the request; it changes hands when its gateway submits it with the next attachment."""
        attempt, start = request.attempt, 0
        if request.body and request.start:
            # A continuation that has not begun: its events go with the body, as those of an attempt that is over.
            attempt, start = attempt_of(request.ordinal - (request.phase in RUNNING), self._nonce), request.start
        submit = replace(
            request.submit,
            accepted=True,
            waited_ms=int((now - request.accepted) * 1000),
            deadline_ms=None if request.deadline is None else max(0, int((request.deadline - now) * 1000)),
            attempt=attempt,
            attachment=request.attachment + 1,
            absent_ms=None,
            lost=start > 0,
            next_seq=start,
            body_bytes=request.body_bytes,
        )
        self._send(Side.GATEWAY, gateway.peer, Attached(id=number, submit=submit), request.body)

    def _on_replay(self, gateway: Gateway, message: Replay, _: bytes, now: float) -> None:
        request = self.state.requests.get(message.rid)
        if request is not None and request.gateway is not gateway:
            return
        if request is not None and request.attempt == message.attempt and request.worker is not None:
            request.told = now
            self._send(Side.WORKER, request.worker.peer, message)
        elif request is None or (request.phase is Phase.ENDED and request.attempt == message.attempt):
            # Its worker died before all events had arrived, or is only away: then it is worth asking again. `seq` is
            # where the reader stands, so that the terminal counts.
            failed = Failed(
                rid=message.rid,
                attempt=message.attempt,
                code=Code.WORKER_LOST,
                message="events of this request were lost with their worker; what has arrived is all there is",
                seq=message.start,
                retryable=request is not None and request.away != "" and request.away not in self.state.workers,
                resubmit=request is not None,
            )
            self._send(Side.GATEWAY, gateway.peer, failed)

    def _on_ack(self, gateway: Gateway, message: Ack, _: bytes, now: float) -> None:
        request = self.state.requests.get(message.rid)
        if request is None or request.gateway is not gateway or request.phase is not Phase.ENDED:
            return
        if not request.submit.grace_ms:
            self._forget(request, now)
            return
        self._kept[request.rid] = None
        self._expire(request, now + request.submit.grace_ms / 1000)
        while len(self._kept) > self.settings.ended_max:
            self._forget(self.state.requests[next(iter(self._kept))], now)

    def _unkeep(self, request: Request) -> None:
        self._kept.pop(request.rid, None)

    def _on_gateway_error(self, gateway: Gateway, message: Error, _: bytes, now: float) -> None:
        self._note("gateway did not understand", gateway=gateway.name, reason=message.message)

    def _on_gateway_bye(self, gateway: Gateway, message: Bye, _: bytes, now: float) -> None:
        self._lose_gateway(gateway, "left", now, left=True)

    def _lose_gateway(self, gateway: Gateway, why: str, now: float, *, left: bool = False) -> None:
        """What its clients can resume waits for them, the rest for itself to come back; unless it said good-bye."""
        self._note("gateway lost", gateway=gateway.name, why=why, requests=len(gateway.rids))
        for rid in list(gateway.rids):
            request = self.state.requests[rid]
            grace_s = request.submit.grace_ms / 1000
            if left and not grace_s:
                self._discard(request, now)
                continue
            self.state.hand_over(request, None)
            if request.expires is None:
                self._expire(request, now + max(grace_s, 0 if left else self.settings.gateway_grace_s))
        del self.state.gateways[gateway.peer]
        del self.state.gateways_by_name[gateway.name]

    # Workers ----------------------------------------------------------------------------------------------------------

    def _worker_says(self, event: Received, now: float) -> None:
        message = event.message
        if isinstance(message, Probe):
            self._send(Side.WORKER, event.peer, Beat())
            return
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
        if message.epoch in self._superseded:
            self._send(Side.WORKER, peer, Superseded())
            return
        worker = self.state.workers.get(message.name)
        if worker is not None and worker.epoch != message.epoch:
            self._send(Side.WORKER, worker.peer, Superseded())
            self._lose_worker(worker, "superseded by a newer process of its name", now)
            worker = None
        if worker is None and len(self.state.workers) >= PEERS_MAX:
            self._turn_away(Side.WORKER, peer)
            return
        former = self._epochs.pop(message.name, message.epoch)
        self._epochs[message.name] = message.epoch
        if former != message.epoch:
            self._superseded[former] = None
        for known in (self._epochs, self._superseded):
            if len(known) > EPOCHS_MAX:
                del known[next(iter(known))]
        self._registrations += 1
        engines = {engine.url: engine for engine in message.engines}
        if worker is None:
            self._meet(now)
            worker = Worker(
                name=message.name,
                epoch=message.epoch,
                peer=peer,
                seen=now,
                registration=self._registrations,
                engines=engines,
                draining=message.draining,
                labels=message.labels,
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
                continue
            if request.phase is Phase.LEASED and self._can_start_anew(request):
                self._requeue(request, now)  # the assign was lost on the way: nobody failed
            elif request.phase in RUNNING:
                self._lose_lease(request, now)
            if request.phase is Phase.ENDED:
                self.state.part(request)  # its buffer is gone
        for claim in claims.values():
            self._on_claim(worker, claim, now)
        self._fleet_changed(worker, now)

    def _on_claim(self, worker: Worker, claim: Claim, now: float, *, spoken: bool = False) -> None:
        """A worker says that it holds this lease: believe it, take it up, or cancel it; `spoken`: its gateway has."""
        request = self.state.requests.get(claim.rid)
        if request is None and self._window.admits(claim, now):
            request = self._adopt(worker, claim, now)
        elif request is not None and claim.attempt == request.attempt and self._reunite(request, worker):
            self._tell_gap(request, claim.top)
        elif request is not None and believes(request, claim):
            self._take_up(request, worker, claim, now)
            self._tell_again(request, now)
        elif request is not None and not spoken and self._window.dispute(request, worker, claim, now):
            return
        else:
            request = None
        if request is None:
            self._send(Side.WORKER, worker.peer, Cancel(rid=claim.rid, attempt=claim.attempt, reason="no such lease"))
        elif (claim.ended or spoken) and request.phase in RUNNING:
            # Its terminal was told to nobody who lives, or who would listen: ask for it.
            replay = Replay(rid=claim.rid, attempt=claim.attempt, start=claim.top)
            self._send(Side.WORKER, worker.peer, replay)

    def _settle(self, rid: bytes, now: float) -> None:
        """The gateway of this request has spoken, or will not: decide on a claim that waited for it."""
        for worker, claim in self._window.disputed.pop(rid, {}).values():
            if self.state.workers.get(worker.name) is worker:
                self._on_claim(worker, claim, now, spoken=True)

    def _adopt(self, worker: Worker, claim: Claim, now: float) -> Request | None:
        """Take up a lease of which no gateway has spoken yet, for a while; unless a newer request has its id."""
        rival = self.state.refs.get((claim.client, claim.ref)) if claim.grace_ms else None
        if rival is not None:
            if rival.holder or claim.ended:
                return None
            self._discard(rival, now)
        submit = Submit(
            rid=claim.rid,
            client=claim.client,
            ref=claim.ref,
            model=claim.model,
            path=claim.path,
            method=claim.method,
            grace_ms=claim.grace_ms,
            accepted=True,
            light=claim.digest == LIGHT,
        )
        request = Request(rid=claim.rid, submit=submit, body=b"", gateway=None, accepted=now)
        self._window.trace(now)
        self._expire(request, now + max(claim.grace_ms / 1000, self.settings.recover_s))
        self._take_up(request, worker, claim, now)
        self._attach_waiting(request, now)
        return request

    def _reunite(self, request: Request, worker: Worker) -> bool:
        """Whether the claimed attempt is its worker's own: still, or again with a buffer of what has ended since."""
        terminal = request.terminal
        if request.worker is None and terminal is not None:
            if isinstance(terminal, Failed) and terminal.code is Code.WORKER_LOST:
                return False  # that was our own word for it
            request.worker = worker
            worker.rids.add(request.rid)
        return request.worker is worker

    def _take_up(self, request: Request, worker: Worker, claim: Claim, now: float) -> None:
        """The claimed attempt is the request's, instead of what was held before."""
        if request.phase is Phase.QUEUED:
            self._unqueue(request)
        elif request.worker is not None:
            self._cancel_lease(request)
        if request.phase in RUNNING:
            self.scheduler.ended(request, None, now)
        if request.phase in RUNNING or request.phase is Phase.ENDED:
            self.state.move(request, Phase.RECOVERING)
        same = claim.attempt == request.attempt
        request.events = max(request.events, claim.top) if same else claim.top
        request.attempt, request.ordinal = claim.attempt, ordinal_of(claim.attempt)
        self.state.move(request, Phase.LEASED, worker=worker, engine=claim.engine, digest=claim.digest)
        self.scheduler.begun(request, now)
        if claim.top:
            self.state.move(request, Phase.STREAMING)
            self.scheduler.started(request, now)

    def _on_engines(self, worker: Worker, message: EnginesChanged, _: bytes, now: float) -> None:
        worker.engines = {engine.url: engine for engine in message.engines}
        worker.draining = message.draining
        self._fleet_changed(worker, now)

    def _held(self, worker: Worker, rid: bytes, attempt: int) -> Request | None:
        """The running request this attempt belongs to; otherwise the attempt is stale and is cancelled."""
        request = self.state.requests.get(rid)
        if request is not None and request.attempt == attempt and request.worker is worker:
            return request
        self._stale(worker.peer, rid, attempt)
        return None

    def _stale(self, peer: bytes, rid: bytes, attempt: int) -> None:
        if peer in self.state.workers_by_peer:
            if self._window.waits(rid, attempt):
                return  # its worker has what it says, and is asked for it when it is the one that counts
            self._send(Side.WORKER, peer, Cancel(rid=rid, attempt=attempt, reason="no such lease"))
        else:
            self._send(Side.WORKER, peer, Who())

    def _on_started(self, worker: Worker, message: Started, payload: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is not None:
            if request.phase in RUNNING:
                self.scheduler.started(request, now)
            self._tell(request, message, payload)

    def _on_forgotten(self, worker: Worker, message: Forgotten, _: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is not None:
            self._tell(request, message)

    def _on_want(self, worker: Worker, message: Want, _: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is not None:
            self._tell(request, message)

    def _on_end(self, worker: Worker, message: End, _: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is not None:
            self._end(request, message, b"", now)

    def _on_failed(self, worker: Worker, message: Failed, payload: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is None:
            return
        again = message.retryable and request.digest != OPERATION  # who asked for an operation tries it again
        if again and message.seq == request.start and self._can_start_anew(request):
            self._retry(request, message, payload, now, lives=True)
        else:
            self._fail(request, message, payload[:FAILURE_BYTES_MAX], now)

    def _on_refused(self, worker: Worker, message: Refused, _: bytes, now: float) -> None:
        request = self._held(worker, message.rid, message.attempt)
        if request is not None and request.phase is Phase.LEASED:
            self._note("assign refused", worker=worker.name, rid=request.rid, reason=message.reason)
            worker.paused_until = now + REFUSED_PAUSE_S
            if self._can_start_anew(request):
                self._requeue(request, now)
            else:
                self._lose_lease(request, now)

    def _on_worker_error(self, worker: Worker, message: Error, _: bytes, now: float) -> None:
        self._note("worker did not understand", worker=worker.name, reason=message.message)

    def _on_worker_bye(self, worker: Worker, message: Bye, _: bytes, now: float) -> None:
        self._lose_worker(worker, "left", now)

    def _lose_worker(self, worker: Worker, why: str, now: float, *, silent: bool = False) -> None:
        self._note("worker lost", worker=worker.name, why=why, leases=sum(worker.busy.values()))
        for rid in list(worker.rids):
            request = self.state.requests[rid]
            if request.phase in RUNNING:
                self._lose_lease(request, now)
            if request.phase is Phase.ENDED:
                request.away = worker.name if silent else ""
                self.state.part(request)  # a gateway that lacks events hears so at its `replay`
        del self.state.workers[worker.name]
        del self.state.workers_by_peer[worker.peer]
        self._fleet_changed(worker, now)

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
        if self._can_start_anew(request):
            self._retry(request, lost, b"", now)
        else:
            self._fail(request, lost, b"", now)

    # Requests ---------------------------------------------------------------------------------------------------------

    def _queue(self, request: Request, now: float) -> None:
        if request.phase is Phase.LEASED:
            self.scheduler.ended(request, None, now)
        self.state.move(request, Phase.QUEUED)
        request.told_position, request.told_at = 0, now
        self._positions.append((now, request.rid))
        client = request.submit.client
        self._client_waiting[client] = self._client_waiting.get(client, 0) + 1
        self.scheduler.add(request, now)

    def _unqueue(self, request: Request, turn_at: float | None = None) -> None:
        self.scheduler.discard(request, turn_at)
        client = request.submit.client
        self._client_waiting[client] -= 1
        if not self._client_waiting[client]:
            del self._client_waiting[client]

    def _place(self, now: float) -> None:
        """Lease whatever can run now."""
        if now < self._window.hold_until:
            return
        while len(self.scheduler):
            placement = self.scheduler.place(self.state, now)
            if placement is None:
                hopeless = list(self.scheduler.hopeless(now))
                for request in hopeless:
                    text = "its deadline cannot be met: it would have passed before the first token"
                    self._stop(request, Code.DEADLINE_EXCEEDED, text, now)
                if hopeless:
                    continue
                return
            request, worker = placement.request, placement.worker
            self._unqueue(request, turn_at=now)
            self.state.move(request, Phase.LEASED, worker=worker, engine=placement.engine, digest=placement.digest)
            self.scheduler.begun(request, now)
            request.ordinal += 1
            request.attempt = attempt_of(request.ordinal, self._nonce)
            self._tell(request, self._leased(request))
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
                    client=submit.client,
                    ref=submit.ref,
                    method=submit.method,
                    path=submit.path,
                    grace_ms=submit.grace_ms,
                    start=request.start,
                    body_bytes=request.body_bytes if request.start else 0,
                    parted_bytes=submit.parted_bytes,
                ),
                request.body,
            )

    def _leased(self, request: Request) -> Leased:
        assert request.worker is not None
        return Leased(rid=request.rid, attempt=request.attempt, worker=request.worker.name, engine=request.engine)

    def _can_start_anew(self, request: Request) -> bool:
        """Whether nothing was seen of its attempt, and all is here to begin another."""
        waits = request.phase in (Phase.LEASED, Phase.RECOVERING)
        there = len(request.body) > 0 or request.submit.parted_bytes > 0
        return waits and request.events == request.start and there

    def _requeue(self, request: Request, now: float) -> None:
        """Back to its old place in the line; the gateway hears that the attempt is gone."""
        self._tell(request, Lost(rid=request.rid, attempt=request.attempt))
        self._queue(request, now)

    def _retry(self, request: Request, failure: Failed, payload: bytes, now: float, *, lives: bool = False) -> None:
        """An attempt failed before its first event: try elsewhere, at most ATTEMPTS_MAX times.

        After the last one its worker, if it lives, keeps the events that it was to continue: they may be resumed.
        """
        assert request.worker is not None
        if failure.code is not Code.SHUTTING_DOWN:
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
            if lives:
                self._cancel_lease(request)
            self._requeue(request, now)
        else:
            self._end(request, failure, payload, now)

    def _fail(self, request: Request, failure: Failed, payload: bytes, now: float) -> None:
        """An attempt failed: if another may do better, its gateway decides whether there is one."""
        again = False
        if failure.retryable and request.phase in RUNNING and request.worker is not None:
            if failure.code is not Code.SHUTTING_DOWN:
                request.failures += 1
            request.failed_on.add(request.worker.name)
            again = request.failures < ATTEMPTS_MAX and request.digest != OPERATION
        self._end(request, replace(failure, resubmit=again), payload, now)

    def _stop(self, request: Request, code: Code, message: str, now: float) -> None:
        """End a request from our side, wherever it is."""
        if request.terminal is None:
            self._tell(
                request,
                Failed(rid=request.rid, attempt=request.attempt, code=code, message=message, seq=request.events),
            )
        elif request.rid not in self._kept:
            self._tell(request, request.terminal, request.terminal_payload)
        self._discard(request, now)

    def _discard(self, request: Request, now: float) -> None:
        """Forget a request whatever its state; nobody is told but its worker."""
        if request.phase is Phase.QUEUED:
            self._unqueue(request)
        elif request.phase in RUNNING:
            self._cancel_lease(request)
        self._forget(request, now)

    def _cancel_lease(self, request: Request) -> None:
        assert request.worker is not None
        self._send(Side.WORKER, request.worker.peer, Cancel(rid=request.rid, attempt=request.attempt))

    def _end(self, request: Request, terminal: Failed | End, payload: bytes, now: float) -> None:
        """The attempt is over: tell the gateway, keep the terminal until it acknowledges."""
        if request.terminal is None:
            if request.phase in RUNNING:
                self.scheduler.ended(request, terminal.stats if isinstance(terminal, End) else None, now)
            self.state.move(request, Phase.ENDED)
            request.terminal, request.terminal_payload, request.told = terminal, payload, now
        elif type(terminal) is type(request.terminal) and terminal.seq == request.terminal.seq:
            # Said again with a replay; in our words it says whether there may be another attempt.
            terminal, payload = request.terminal, request.terminal_payload
        self._tell(request, terminal, payload)

    def _forget(self, request: Request, now: float) -> None:
        if request.phase is Phase.ENDED and request.worker is not None:
            self._send(Side.WORKER, request.worker.peer, Release(rid=request.rid))
        if request.phase in RUNNING:
            self.scheduler.ended(request, None, now)
        self._unkeep(request)
        self._window.bury(request.rid, now)
        self.state.move(request, None)

    def _end_unserved(self, now: float) -> None:
        """Give up on requests whose model has been gone for too long."""
        for model in self.state.models():
            self._served[model] = now
        for model in [m for m, seen in self._served.items() if now - seen > self.settings.unserved_s]:
            del self._served[model]
        hopeless = {model for model in self.scheduler.models() if not self._hoped_for(model, now)}
        for request in list(self.scheduler) if hopeless else ():
            if request.submit.model in hopeless:
                self._unqueue(request)
                self._tell(request, self._unserved(request.rid, request.submit.model, request.attempt))
                self._forget(request, now)
        if self.settings.rules:
            self._end_barred(now)

    def _end_barred(self, now: float) -> None:
        """Give up on requests to which the rules have left no host for too long."""
        before, self._allowed = self._allowed, {}
        for request in list(self.scheduler):
            model, client = request.submit.model, request.submit.client
            if request.submit.light or names_engine(model):
                continue
            if (model, client) not in self._allowed:
                offers = self.state.offers(model)
                some = not offers or any(self._rules.allow(model, client, worker) for worker, _, _ in offers)
                self._allowed[model, client] = now if some else before.get((model, client), request.accepted)
            if now - self._allowed[model, client] > self.settings.unserved_s:
                text = f"no host that the broker's rules allow has {short_name(model)!r}"
                self._stop(request, Code.NO_WORKERS, text, now)

    # Telling ----------------------------------------------------------------------------------------------------------

    def _tell(self, request: Request, message: Message, payload: bytes = b"") -> None:
        """Tell the request's gateway, if it has one."""
        if request.gateway is not None:
            self._send(Side.GATEWAY, request.gateway.peer, message, payload)

    def _tell_again(self, request: Request, now: float) -> None:
        """A gateway comes to it, or asks after a break: tell where its request is."""
        self._tell(request, Accepted(rid=request.rid))
        if request.phase is Phase.QUEUED:
            request.told_position = 0
            self._tell_outlook(self.scheduler.outlook(request, now), now)
            return
        # Also of what has ended: it may lack events, and asks for them by the attempt.
        if request.worker is not None:
            self._tell(request, self._leased(request))
        if request.terminal is not None:
            self._tell(request, request.terminal, request.terminal_payload)
        elif request.phase in RUNNING:
            self._tell_gap(request)

    def _tell_gap(self, request: Request, top: int = 0) -> None:
        self._tell(request, Gap(rid=request.rid, attempt=request.attempt, top=max(top, request.events)))

    def _waits_since(self, told_at: float, rid: bytes) -> Request | None:
        """The request, if it waits and was told then."""
        request = self.state.requests.get(rid)
        return request if request is not None and request.phase is Phase.QUEUED and request.told_at == told_at else None

    def _tell_positions(self, now: float) -> None:
        """Those that were not told for the longest time hear where they stand."""
        told = 0
        while now >= self._next_positions and told < POSITIONS_STEP and self._positions:
            told_at, rid = self._positions[0]
            if told_at + POSITIONS_INTERVAL_S > now:
                break
            self._positions.popleft()
            request = self._waits_since(told_at, rid)
            if request is not None:
                told += 1
                request.told_at = now
                self._positions.append((now, rid))
                self._tell_outlook(self.scheduler.outlook(request, now), now)
        if told:
            self._next_positions = now + POSITIONS_STEP_S

    def _tell_outlook(self, outlook: Outlook, now: float) -> None:
        request, eta_s = outlook.request, outlook.eta_s
        begin = None if eta_s is None else now + eta_s
        known = outlook.position == request.told_position and (begin is None) == (request.told_begin is None)
        if known and begin is not None and request.told_begin is not None and eta_s is not None:
            known = abs(begin - request.told_begin) <= max(ETA_NEWS_S, ETA_NEWS * eta_s)
        if not known:
            request.told_position, request.told_begin = outlook.position, begin
            eta_ms = None if eta_s is None else int(eta_s * 1000)
            self._tell(request, Queued(rid=request.rid, position=outlook.position, eta_ms=eta_ms))

    def _fleet_changed(self, worker: Worker, now: float) -> None:
        if self.state.workers.get(worker.name) is worker:
            self.state.index(worker)
            self.scheduler.worker_changed(worker, now)
        else:
            self.state.unindex(worker)
            self.scheduler.worker_gone(worker)
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
            if digest not in BESIDE_MAX:
                busy.setdefault(url, {})[digest] = count
        return Host(
            name=worker.name,
            engines=tuple(worker.engines.values()),
            busy=busy,
            kept=len(worker.rids) - sum(worker.busy.values()),
            draining=worker.draining,
            beat_age_ms=int((now - worker.seen) * 1000),
            epoch=worker.epoch,
            labels=worker.labels,
        )

    def _jobs(self, now: float) -> tuple[Job, ...]:
        jobs: list[Job] = []
        for request in self.state.requests.values():
            if request.phase is not Phase.ENDED and request.phase is not None and len(jobs) < SNAPSHOT_JOBS_MAX:
                waits = self.scheduler.outlook(request, now) if request.phase is Phase.QUEUED else None
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
                        position=waits.position if waits else 0,
                        eta_ms=int(waits.eta_s * 1000) if waits and waits.eta_s is not None else None,
                        priority=request.submit.priority,
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

    def _turn_away(self, side: Side, peer: bytes) -> None:
        self._send(side, peer, Error(code=Code.RATE_LIMITED, message=f"this broker serves at most {PEERS_MAX}"))
        self._note("peer turned away: there are too many", side=side.value)

    def _nothing(self, peer: Gateway | Worker, message: Message, payload: bytes, now: float) -> None:
        """A sign of life says nothing more."""

    def _send(self, side: Side, peer: bytes, message: Message, payload: bytes = b"") -> None:
        self._out.append(Send(side, peer, message, payload))

    def _note(self, event: str, **facts: Any) -> None:
        self._out.append(Note(event, facts))
