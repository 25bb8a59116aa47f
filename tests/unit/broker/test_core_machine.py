"""The promises of the broker core, kept whatever happens.

Hypothesis plays gateways that lose their line, choke and come back, clients that resume, workers that stream, fail,
refuse, die and are replaced, brokers that die and forget everything, and the clock. Gateways and workers are small but
honest: each follows its half of the wire's rules. After every event the core's invariants are checked (by the harness),
and what the peers hear is held against the promises:

- a chunk goes only to the gateway of its request, and the client gets every event once, in order, each following from
  all those before: whichever worker sends it has the same events below;
- every request gets one terminal, and what ends with `end` is complete;
- a worker never gets an assign beyond its slots, but for leases about which the broker has not decided yet; requests
  of a model are leased in the order they came;
- at the end, when everyone is back and time has passed, every request has its terminal and nothing is kept of any.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from broker.core import TIMERS_SLACK
from broker.events import Effect, Forward, Overflowed, Received, Send, Side, Unreachable
from broker.order import AGES_S, PATIENCE_S, PRIORITIES
from broker.state import Phase, Request
from common import protocol
from common.errors import Code
from common.protocol import (
    Accepted,
    Ack,
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
    End,
    Engine,
    Failed,
    Gap,
    Hello,
    Leased,
    Message,
    Model,
    Refused,
    Register,
    Registered,
    Release,
    Replay,
    Snapshot,
    Stats,
    Submit,
    Superseded,
    Who,
)
from common.protocol import State as EnginesChanged
from tests.unit.broker.harness import Harness

T = TypeVar("T")
MODELS = ("a:latest", "b:latest")
URL = "http://e"


GRACE_MS = 6000
BODY = b"body\n"


def line(rid: bytes, attempt: int, seq: int) -> bytes:
    """The event that this attempt has at this place: no two are alike."""
    return b"%s %d %d\n" % (rid.hex().encode(), attempt, seq)


@dataclass
class Client:
    """Who wants a request: what it has of it, wherever its gateways are."""

    rid: bytes
    has: list[bytes] = field(default_factory=list)


@dataclass
class Call:
    """A request as a gateway sees it."""

    client: Client
    submit: Submit
    body: bytes
    attempt: int = 0
    lines: list[bytes] = field(default_factory=list)
    wanted: int = 0
    """What its client had when it came here: less than that is no base for a continuation."""
    accepted: bool = False
    lost: bool = False
    top: int = 0
    cancelled: bool = False
    absent_at: float | None = None
    terminal: End | Failed | None = None
    over: End | Failed | None = None
    over_at: float = inf
    acked: bool = False

    def take(self, seq: int, lines: list[bytes]) -> None:
        """Events from `seq` on, some of them new."""
        for at, event in enumerate(lines, seq):
            for known in (self.lines, self.client.has):
                assert at >= len(known) or known[at] == event, "two texts are mixed"
            if at == len(self.lines):
                self.lines.append(event)
            if at == len(self.client.has):
                self.client.has.append(event)


@dataclass
class FakeGateway:
    name: str
    peer: bytes = b""
    deaf: bool = False
    calls: dict[bytes, Call] = field(default_factory=dict)
    attaches: dict[int, Client] = field(default_factory=dict)


@dataclass
class Work:
    """A lease as its worker sees it."""

    assign: Assign
    lines: list[bytes]
    terminal: End | Failed | None = None

    @property
    def events(self) -> int:
        return len(self.lines)

    @property
    def attempt(self) -> int:
        return self.assign.attempt


@dataclass
class FakeWorker:
    name: str
    epoch: str
    slots: int
    peer: bytes = b""
    registration: int = 0
    refuses: int = 0
    draining: bool = False
    leases: dict[bytes, Work] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        models = (Model(name=name, digest=f"sha:{name}", slots=self.slots) for name in MODELS)
        return Engine(url=URL, models=tuple(models))

    def running(self) -> list[tuple[bytes, Work]]:
        return [(rid, work) for rid, work in self.leases.items() if work.terminal is None]


pick = st.integers(0, 7)
"""Chooses among what there is, by its remainder."""


def chosen(things: list[T], which: int) -> T:
    return things[which % len(things)]


away = st.sampled_from([0.05, 0.05, 1.5, 3.5])
"""Seconds without a line: the last is longer than the broker waits."""


class Fabric(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.h = self.broker(100.0, 1)
        self.gateways: dict[str, FakeGateway] = {}
        self.workers: dict[str, FakeWorker] = {}
        self.peers: dict[bytes, FakeGateway | FakeWorker] = {}
        self.todo: list[tuple[bytes, Message, bytes]] = []
        self.limbo: list[tuple[bytes, Message, bytes]] = []
        """Said on a line that is broken now: it may still arrive, late."""
        self.numbers = 0

    def broker(self, now: float, nonce: int) -> Harness:
        bounds: dict[str, Any] = {"queue_max": 8, "ended_max": 3}
        times: dict[str, Any] = {
            "settle_s": 1.0,
            "unserved_s": 4.0,
            "ack_s": 20.0,
            "recover_s": 3.0,
            "gateway_grace_s": 5.0,
        }
        return Harness(nonce=nonce, now=now, **bounds, **times)

    # The wire ---------------------------------------------------------------------------------------------------------

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def say(self, peer: bytes, message: Message, payload: bytes = b"") -> None:
        self.later(peer, message, payload)
        self.settle()

    def later(self, peer: bytes, message: Message, payload: bytes = b"") -> None:
        self.todo.append((peer, message, payload))

    def settle(self) -> None:
        """Let everyone answer until nobody has anything to say."""
        rounds = 0
        while self.todo:
            rounds += 1
            assert rounds < 2000, "the peers and the broker talk without end"
            peer, message, payload = self.todo.pop(0)
            if peer in self.peers:
                self.arrive(peer, message, payload)
            else:
                self.limbo.append((peer, message, payload))

    def arrive(self, peer: bytes, message: Message, payload: bytes) -> None:
        side = Side.GATEWAY if peer.startswith(b"g") else Side.WORKER
        self.carry_out(self.h.feed(Received(side, peer, message, payload, protocol.encode(message, payload))))

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Forward):
                gateway = self.peers.get(effect.peer)
                assert effect.peer.startswith(b"g")
                if isinstance(gateway, FakeGateway) and gateway.deaf:
                    effects += self.h.feed(Overflowed(effect.peer, effect.rid))
                elif isinstance(gateway, FakeGateway):
                    message, payload = protocol.to_gateway.decode(effect.frame)
                    self.gateway_hears(gateway, message, payload)
            elif isinstance(effect, Send):
                peer = self.peers.get(effect.peer)
                if peer is None or (isinstance(peer, FakeGateway) and peer.deaf):
                    effects += self.h.feed(Unreachable(effect.side, effect.peer))
                elif isinstance(peer, FakeGateway):
                    assert effect.side is Side.GATEWAY
                    self.gateway_hears(peer, effect.message, effect.payload)
                else:
                    assert effect.side is Side.WORKER
                    self.worker_hears(peer, effect.message, effect.payload)

    # Gateways ---------------------------------------------------------------------------------------------------------

    def gateway_hears(self, gateway: FakeGateway, message: Any, payload: bytes) -> None:
        match message:
            case Who():
                self.greet(gateway)
                return
            case Snapshot() | Beat():
                return
            case Attached():
                self.attached_arrives(gateway, message, payload)
                return
        call = gateway.calls.get(message.rid)
        if call is None or call.over is not None:
            assert not isinstance(message, Chunk) or call is not None, f"{gateway.name} hears of another's: {message}"
            if isinstance(message, End | Failed):
                self.later(gateway.peer, Ack(rid=message.rid))
            elif isinstance(message, Accepted):
                self.later(gateway.peer, Cancel(rid=message.rid))
            return
        match message:
            case Accepted():
                call.accepted = True
            case Detached():
                del gateway.calls[message.rid]
            case Leased() if message.attempt > call.attempt or (message.attempt == call.attempt and not call.lost):
                call.attempt, call.lost = message.attempt, False
            case Chunk() if message.attempt == call.attempt and not call.lost:
                self.chunk_arrives(gateway, call, message, payload)
            case Gap() if message.attempt == call.attempt:
                call.top = max(call.top, message.top)
                self.ask(gateway, call)
            case End() | Failed():
                self.terminal_arrives(gateway, call, message)

    def attached_arrives(self, gateway: FakeGateway, message: Attached, payload: bytes) -> None:
        client = gateway.attaches.pop(message.id, None)
        submit = message.submit
        if submit is None or client is None or message.id % 7 == 0:
            return  # the last: its client has gone on
        gateway.calls.pop(submit.rid, None)
        assert client.rid == submit.rid
        body, events = payload[: submit.body_bytes], payload[submit.body_bytes :].splitlines(keepends=True)
        assert len(events) == submit.next_seq
        call = Call(client, submit, body, submit.attempt, wanted=len(client.has), accepted=True, lost=submit.lost)
        call.take(0, events)
        gateway.calls[submit.rid] = call
        self.later(gateway.peer, *self.submission(call))

    def chunk_arrives(self, gateway: FakeGateway, call: Call, chunk: Chunk, payload: bytes) -> None:
        lines = payload.splitlines(keepends=True)
        assert len(lines) == chunk.n
        call.body = call.body or BODY  # a replay from the beginning brings it with `started`
        call.top = max(call.top, chunk.seq + chunk.n)
        if chunk.seq > len(call.lines):
            self.ask(gateway, call)
            return
        call.take(chunk.seq, lines)
        if call.terminal is not None:
            self.terminal_arrives(gateway, call, call.terminal)

    def ask(self, gateway: FakeGateway, call: Call) -> None:
        if len(call.lines) < call.top and not call.cancelled and not call.lost:
            self.later(gateway.peer, Replay(rid=call.submit.rid, attempt=call.attempt, start=len(call.lines)))

    def terminal_arrives(self, gateway: FakeGateway, call: Call, message: End | Failed) -> None:
        failed = isinstance(message, Failed)
        again = isinstance(message, Failed) and message.resubmit
        if message.attempt > call.attempt:
            call.attempt, call.lost, call.terminal, call.top = message.attempt, False, None, len(call.lines)
        if 0 < message.attempt < call.attempt or (again and call.lost):
            return
        at_once = isinstance(message, Failed) and message.code in (Code.CANCELLED, Code.DEADLINE_EXCEEDED)
        if not (at_once or call.cancelled or message.seq <= len(call.lines)):
            call.terminal, call.top = message, max(call.top, message.seq)
            self.ask(gateway, call)
            return
        assert failed or call.cancelled or len(call.lines) == message.seq
        has_body = call.body and len(call.lines) >= call.wanted
        if again and not call.cancelled and has_body:
            call.lost, call.terminal, call.top = True, None, len(call.lines)
            self.later(gateway.peer, *self.submission(call))
        else:
            call.over, call.over_at = message, self.h.now

    def submission(self, call: Call) -> tuple[Submit, bytes]:
        absent_ms = None if call.absent_at is None else int((self.h.now - call.absent_at) * 1000)
        submit = msgspec.structs.replace(
            call.submit,
            accepted=call.accepted,
            attempt=call.attempt,
            lost=call.lost,
            next_seq=len(call.lines) if call.lost else max(len(call.lines), call.wanted),
            body_bytes=len(call.body),
            absent_ms=absent_ms,
        )
        return submit, b"".join([call.body, *(call.lines if call.lost else ())])

    def start_gateway(self, name: str) -> None:
        """One that was there has died; its successor has another name, and knows nothing of the calls."""
        if name in self.gateways:
            self.peers.pop(self.gateways[name].peer, None)
        self.gateways[name] = gateway = FakeGateway(f"{name}-{self.number()}")
        self.connect_gateway(gateway)

    def connect_gateway(self, gateway: FakeGateway) -> None:
        self.peers.pop(gateway.peer, None)
        gateway.peer, gateway.deaf = b"g%d" % self.number(), False
        self.peers[gateway.peer] = gateway
        self.greet(gateway)
        self.settle()

    def greet(self, gateway: FakeGateway) -> None:
        """Say hello, and everything again that has no terminal."""
        self.later(gateway.peer, Hello(name=gateway.name))
        for rid, call in gateway.calls.items():
            if call.over is None and call.cancelled:
                self.later(gateway.peer, Cancel(rid=rid, attempt=call.attempt))
            elif call.over is None:
                self.later(gateway.peer, *self.submission(call))
        for number, client in gateway.attaches.items():
            self.later(gateway.peer, Attach(id=number, client="c", ref=client.rid.hex()))

    def listening(self) -> list[FakeGateway]:
        return [gateway for gateway in self.gateways.values() if gateway.peer in self.peers]

    def calls(self) -> list[tuple[FakeGateway, Call]]:
        return [(gateway, call) for gateway in self.listening() for call in gateway.calls.values() if call.over is None]

    # Workers ----------------------------------------------------------------------------------------------------------

    def worker_hears(self, worker: FakeWorker, message: Any, payload: bytes) -> None:
        match message:
            case Registered():
                worker.registration = message.registration
            case Assign():
                self.assign_arrives(worker, message, payload)
            case Cancel():
                work = worker.leases.get(message.rid)
                if work is not None and message.attempt in (0, work.attempt):
                    del worker.leases[message.rid]
            case Release():
                worker.leases.pop(message.rid, None)
            case Replay():
                self.replay(worker, message)
            case Who():
                self.later(worker.peer, self.registration(worker))
            case Superseded():
                self.peers.pop(worker.peer, None)
                worker.leases.clear()

    def assign_arrives(self, worker: FakeWorker, assign: Assign, payload: bytes) -> None:
        core = self.h.core
        waiting = [r for r in core.state.requests.values() if r.phase is Phase.QUEUED]
        request = core.state.requests.get(assign.rid)
        fresh = request is not None and self.h.now - request.accepted < AGES_S[PRIORITIES["normal"]]
        if request is not None and request.attempt == assign.attempt and fresh:
            kind = assign.model, request.submit.client, request.failed_on
            behind = [r for r in waiting if (r.submit.model, r.submit.client, r.failed_on) == kind]
            assert all(_turn(r) > _turn(request) for r in behind), "out of turn"
        assert not worker.draining
        if assign.registration != worker.registration or worker.refuses:
            worker.refuses = max(0, worker.refuses - 1)
            self.later(worker.peer, Refused(rid=assign.rid, attempt=assign.attempt, reason="no"))
            return
        held = worker.leases.get(assign.rid)
        assert held is None or held.attempt < assign.attempt
        events = payload[assign.body_bytes :].splitlines(keepends=True) if assign.start else []
        assert len(events) == assign.start
        assert payload.startswith(BODY)
        beside = [(rid, work) for rid, work in worker.running() if work.assign.digest == assign.digest]
        taken = [rid for rid, work in beside if rid != assign.rid and not core._window.waits(rid, work.attempt)]
        assert len(taken) < worker.slots
        if len(beside) >= worker.slots:  # it runs what is disputed, too
            self.later(worker.peer, Refused(rid=assign.rid, attempt=assign.attempt, reason="no"))
            return
        worker.leases[assign.rid] = Work(assign, events)

    def replay(self, worker: FakeWorker, message: Replay) -> None:
        work = worker.leases.get(message.rid)
        if work is None or work.attempt != message.attempt:
            gap = Failed(
                rid=message.rid, attempt=message.attempt, code=Code.RESUME_GAP, message="gone", seq=message.start
            )
            self.later(worker.peer, gap)
            return
        if work.events > message.start:
            self.later(worker.peer, *self.chunk_of(message.rid, work, message.start))
        if work.terminal is not None:
            self.later(worker.peer, work.terminal)

    def chunk_of(self, rid: bytes, work: Work, start: int) -> tuple[Chunk, bytes]:
        payload = b"".join(work.lines[start:])
        return Chunk(rid=rid, attempt=work.attempt, seq=start, n=work.events - start), payload

    def registration(self, worker: FakeWorker) -> Register:
        claims = (
            Claim(
                rid=rid,
                attempt=work.attempt,
                engine=work.assign.engine,
                digest=work.assign.digest,
                client=work.assign.client,
                ref=work.assign.ref,
                model=work.assign.model,
                path=work.assign.path,
                grace_ms=work.assign.grace_ms,
                top=work.events,
                ended=work.terminal is not None,
            )
            for rid, work in worker.leases.items()
        )
        return Register(
            name=worker.name,
            epoch=worker.epoch,
            engines=(worker.engine,),
            leases=tuple(claims),
            draining=worker.draining,
        )

    def connect_worker(self, worker: FakeWorker) -> None:
        self.peers.pop(worker.peer, None)
        worker.peer = b"w%d" % self.number()
        self.peers[worker.peer] = worker
        self.say(worker.peer, self.registration(worker))

    def start_worker(self, name: str, slots: int) -> None:
        """One that was there is superseded, or had died."""
        self.workers[name] = worker = FakeWorker(name, f"epoch-{self.number()}", slots)
        self.connect_worker(worker)

    def stream(self, worker: FakeWorker, rid: bytes, work: Work, n: int) -> None:
        start = work.events
        work.lines += [line(rid, work.attempt, seq) for seq in range(start, start + n)]
        self.say(worker.peer, *self.chunk_of(rid, work, start))

    def end(self, worker: FakeWorker, rid: bytes, work: Work) -> None:
        work.terminal = End(rid=rid, attempt=work.attempt, seq=work.events, stats=Stats(done_reason="stop"))
        self.say(worker.peer, work.terminal)

    def online(self) -> list[FakeWorker]:
        return [worker for worker in self.workers.values() if self.peers.get(worker.peer) is worker]

    def busy(self) -> list[tuple[FakeWorker, bytes, Work]]:
        return [(worker, rid, work) for worker in self.workers.values() for rid, work in worker.running()]

    # Rules: what should happen ----------------------------------------------------------------------------------------

    @initialize(slots=st.integers(1, 3))
    def begin(self, slots: int) -> None:
        self.start_gateway("g1")
        self.start_gateway("g2")
        self.start_worker("w1", slots)
        self.start_worker("w2", slots)

    @precondition(lambda self: self.listening())
    @rule(
        which=pick,
        model=st.sampled_from([*MODELS, *MODELS, *MODELS, "nowhere:latest"]),
        deadline_ms=st.sampled_from([None, None, None, None, 300, 4000]),
        times=st.integers(1, 4),
        grace_ms=st.sampled_from([0, GRACE_MS]),
    )
    def submit(self, which: int, model: str, deadline_ms: int | None, times: int, grace_ms: int) -> None:
        gateway = chosen(self.listening(), which)
        for _ in range(times):
            number = self.number()
            rid = number.to_bytes(16, "big")
            submit = Submit(
                rid=rid,
                client="c",
                ref=rid.hex(),
                model=model,
                path="/api/chat",
                deadline_ms=deadline_ms,
                grace_ms=grace_ms,
            )
            call = Call(Client(rid), submit, BODY)
            gateway.calls[rid] = call
            self.say(gateway.peer, *self.submission(call))

    @precondition(lambda self: self.busy())
    @rule(n=st.integers(1, 4))
    def all_stream(self, n: int) -> None:
        for worker, rid, work in self.busy():
            self.stream(worker, rid, work, n)

    @precondition(lambda self: self.busy())
    @rule(which=pick, n=st.integers(1, 4))
    def one_streams(self, which: int, n: int) -> None:
        self.stream(*chosen(self.busy(), which), n)

    @precondition(lambda self: self.busy())
    @rule(which=pick)
    def one_ends(self, which: int) -> None:
        self.end(*chosen(self.busy(), which))

    @precondition(lambda self: self.busy())
    @rule(which=pick, retryable=st.booleans())
    def one_fails(self, which: int, retryable: bool) -> None:
        worker, rid, work = chosen(self.busy(), which)
        work.terminal = Failed(
            rid=rid,
            attempt=work.attempt,
            seq=work.events,
            code=Code.BACKEND_ERROR,
            message="hiccup",
            retryable=retryable,
        )
        self.say(worker.peer, work.terminal)

    @precondition(lambda self: self.calls())
    @rule(which=pick)
    def cancel(self, which: int) -> None:
        gateway, call = chosen(self.calls(), which)
        call.cancelled = True
        self.say(gateway.peer, Cancel(rid=call.submit.rid, attempt=call.attempt))

    @rule()
    def acknowledge(self) -> None:
        for gateway in self.listening():
            for rid, call in list(gateway.calls.items()):
                if call.over is not None and not call.acked:
                    call.acked = True
                    self.say(gateway.peer, Ack(rid=rid))

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.0, 3.5]))
    def time_passes(self, seconds: float) -> None:
        end = self.h.now + seconds
        beat_at = self.h.now
        while self.h.now < end:
            self.h.now = min(end, max(self.h.core.next_deadline(), self.h.now + 0.01))
            if self.h.now >= beat_at:
                beat_at = self.h.now + 1.0
                for peer in list(self.peers):
                    self.say(peer, Beat())
                for gateway, call in self.calls():
                    self.ask(gateway, call)
            self.carry_out(self.h.tick())
            self.settle()

    def resumable(self) -> list[tuple[FakeGateway, Call]]:
        calls = [(gateway, call) for gateway in self.gateways.values() for call in gateway.calls.values()]
        return [
            (gateway, call)
            for gateway, call in calls
            # One that comes back later is too late, and hears so; unless a broker that knows nothing finds an attempt
            # that was left behind, of a host that was away all the while.
            if call.submit.grace_ms and not call.cancelled and self.h.now - call.over_at < call.submit.grace_ms / 1000
        ]

    @precondition(lambda self: any(call.over is None for _, call in self.resumable()))
    @rule(which=pick)
    def clients_line_breaks(self, which: int) -> None:
        gateway, call = chosen([(g, c) for g, c in self.resumable() if c.over is None], which)
        if call.absent_at is None:
            call.absent_at = self.h.now
            self.say(gateway.peer, Detach(rid=call.submit.rid))

    @precondition(lambda self: self.resumable() and self.listening())
    @rule(which=pick, where=pick)
    def client_comes_back(self, which: int, where: int) -> None:
        """Perhaps before its gateway knows that it had gone, perhaps after the end, perhaps of a gateway that died."""
        _, call = chosen(self.resumable(), which)
        gateway, number = chosen(self.listening(), where), self.number()
        gateway.attaches[number] = call.client
        self.say(gateway.peer, Attach(id=number, client="c", ref=call.submit.ref))

    # Rules: what should not -------------------------------------------------------------------------------------------

    @rule(order=st.permutations(["g1", "g2", "w1", "w2"]), notice=st.integers(0, 4), seconds=away)
    def broker_dies(self, order: list[str], notice: int, seconds: float) -> None:
        """Another takes its place and knows nothing; its peers notice in any order, some only with their next beat."""
        self.h = self.broker(self.h.now, self.number())
        for name in order[:notice]:
            peer: FakeGateway | FakeWorker = self.gateways.get(name) or self.workers[name]
            if self.peers.get(peer.peer) is peer:
                self.say(peer.peer, Beat())
        self.time_passes(seconds)

    @precondition(lambda self: self.resumable())
    @rule(which=pick, where=pick, seconds=away, restart=st.booleans())
    def gateway_dies_and_its_client_goes_elsewhere(self, which: int, where: int, seconds: float, restart: bool) -> None:
        gateway, call = chosen(self.resumable(), which)
        self.start_gateway(next(name for name, other in self.gateways.items() if other is gateway))
        if restart:
            self.h = self.broker(self.h.now, self.number())
        self.time_passes(seconds)
        if self.listening():
            other, number = chosen(self.listening(), where), self.number()
            other.attaches[number] = call.client
            self.say(other.peer, Attach(id=number, client="c", ref=call.submit.ref))

    @rule(which=pick, trouble=st.sampled_from(["line", "line", "choke", "choke", "bye", "death"]))
    def gateway_trouble(self, which: int, trouble: str) -> None:
        gateway = chosen(list(self.gateways.values()), which)
        match trouble:
            case "line":
                self.peers.pop(gateway.peer, None)
            case "choke":
                gateway.deaf = True
            case "bye" | "death":
                if trouble == "bye":
                    self.say(gateway.peer, Bye())
                self.start_gateway(next(name for name, other in self.gateways.items() if other is gateway))

    @rule(which=pick, reconnects=st.booleans())
    def gateway_recovers(self, which: int, reconnects: bool) -> None:
        gateway = chosen(list(self.gateways.values()), which)
        gateway.deaf = False
        if reconnects:
            self.connect_gateway(gateway)

    @rule(
        which=pick,
        trouble=st.sampled_from(["line", "line", "line", "refuse", "change", "bye", "death"]),
        slots=st.integers(1, 3),
        draining=st.booleans(),
    )
    def worker_trouble(self, which: int, trouble: str, slots: int, draining: bool) -> None:
        worker = chosen(list(self.workers.values()), which)
        match trouble:
            case "line":
                self.peers.pop(worker.peer, None)
            case "refuse":
                worker.refuses = slots
            case "change":
                worker.slots, worker.draining = slots, draining
                self.say(worker.peer, EnginesChanged(engines=(worker.engine,), draining=draining))
            case "bye":
                worker.leases.clear()
                self.say(worker.peer, Bye())
                self.peers.pop(worker.peer, None)
            case "death":
                self.start_worker(worker.name, slots)

    @rule(which=pick, forgets=st.sets(st.integers(0, 2)))
    def worker_recovers(self, which: int, forgets: set[int]) -> None:
        worker = chosen(list(self.workers.values()), which)
        for index, rid in enumerate(list(worker.leases)):
            if index in forgets:
                del worker.leases[rid]
        self.connect_worker(worker)

    @precondition(lambda self: self.busy())
    @rule(which=pick, n=st.integers(0, 3), ends=st.booleans(), drops=st.booleans(), seconds=away)
    def work_goes_on_unseen(self, which: int, n: int, ends: bool, drops: bool, seconds: float) -> None:
        """A worker's line breaks while it works; what it said meanwhile is lost, or arrives when it is back."""
        worker, rid, work = chosen(self.busy(), which)
        self.peers.pop(worker.peer, None)
        if n:
            self.stream(worker, rid, work, n)
        if ends:
            self.end(worker, rid, work)
        if drops:
            self.limbo.clear()
        self.time_passes(seconds)
        self.connect_worker(worker)

    @precondition(lambda self: self.busy())
    @rule(which=pick, n=st.integers(0, 3), ends=st.booleans(), chokes=st.booleans(), seconds=away)
    def work_goes_on_unheard(self, which: int, n: int, ends: bool, chokes: bool, seconds: float) -> None:
        """The gateways hear nothing of what a worker does."""
        gateways = self.listening()
        for gateway in gateways:
            gateway.deaf = True
            if not chokes:
                self.peers.pop(gateway.peer)
        worker, rid, work = chosen(self.busy(), which)
        if n:
            self.stream(worker, rid, work, n)
        if ends:
            self.end(worker, rid, work)
        self.time_passes(seconds)
        for gateway in gateways:
            gateway.deaf = False
            if not chokes:
                self.connect_gateway(gateway)

    @precondition(lambda self: self.limbo)
    @rule()
    def an_old_line_delivers(self) -> None:
        self.arrive(*self.limbo.pop(0))
        self.settle()

    # The end ----------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everyone comes back, works and waits: then nothing may be left."""
        for gateway in self.gateways.values():
            gateway.deaf = False
            if gateway not in self.listening():
                self.connect_gateway(gateway)
        for worker in self.online():
            worker.draining, worker.refuses, worker.slots = False, 0, 3
            self.say(worker.peer, EnginesChanged(engines=(worker.engine,)))
        self.start_worker("last", 3)
        for _ in range(40):
            for worker, rid, work in self.busy():
                if worker in self.online():
                    self.end(worker, rid, work)
            self.acknowledge()
            self.time_passes(1.0)
            if not self.calls() and not self.h.core.state.requests:
                break
        for _, call in self.calls():
            assert call.over is not None, f"no terminal: {call}"
        assert self.h.empty, self.h.core.state.requests
        assert len(self.h.core._timers) <= TIMERS_SLACK
        assert not any(worker.leases for worker in self.online()), "a worker keeps what nobody will ask for"


TestFabric = Fabric.TestCase
TestFabric.settings = settings(
    max_examples=400,
    stateful_step_count=50,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def _turn(request: Request) -> tuple[float, float, bytes]:
    due = request.accepted + PATIENCE_S
    return due if request.deadline is None else min(due, request.deadline), request.accepted, request.rid
