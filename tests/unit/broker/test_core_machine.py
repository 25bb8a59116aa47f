"""The promises of the broker core, kept whatever happens.

Hypothesis plays gateways that lose their line, choke and come back, workers that stream, fail, refuse, die and are
replaced, and the clock. Gateways and workers are small but honest: each follows its half of the wire's rules. After
every event the core's invariants are checked (by the harness), and what the peers hear is held against the promises:

- a chunk goes only to the gateway of its request, which assembles exactly the lines of one attempt, in order;
- the first terminal that counts stays the only one, and a terminal told again is the same;
- a worker never gets an assign beyond its slots; requests of a model are leased in the order they came;
- at the end, when everyone is back and time has passed, every request has its terminal and nothing is kept of any.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from broker.core import DEADLINES_SLACK
from broker.events import Effect, Forward, Overflowed, Received, Send, Side, Unreachable
from broker.state import Phase
from common import protocol
from common.errors import Code
from common.protocol import (
    Accepted,
    Ack,
    Assign,
    Beat,
    Bye,
    Cancel,
    Chunk,
    Claim,
    End,
    Engine,
    Failed,
    Gap,
    Hello,
    Leased,
    Lost,
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


def line(rid: bytes, attempt: int, seq: int) -> bytes:
    """The event that this attempt has at this place: no two are alike."""
    return b"%s %d %d\n" % (rid.hex().encode(), attempt, seq)


@dataclass
class Call:
    """A request as its gateway sees it."""

    submit: Submit
    attempt: int = 0
    lines: list[bytes] = field(default_factory=list)
    asking: bool = False
    """Something is missing: ask until events or the end come."""
    cancelled: bool = False
    told: list[Message] = field(default_factory=list)
    over: End | Failed | None = None
    acked: bool = False


@dataclass
class FakeGateway:
    name: str
    peer: bytes = b""
    deaf: bool = False
    calls: dict[bytes, Call] = field(default_factory=dict)


@dataclass
class Work:
    """A lease as its worker sees it."""

    attempt: int
    digest: str
    events: int = 0
    terminal: End | Failed | None = None


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


GONE = (Code.WORKER_LOST, Code.RESUME_GAP, Code.CANCELLED)
"""After a terminal whose events are missing, the words for "nobody has them any more"."""

CROSSED = (*GONE, Code.QUEUE_FULL, Code.MODEL_NOT_FOUND, Code.NO_WORKERS)
"""After a terminal that counts, the answers to what was on its way: a replay, a cancel, a submission made again."""

pick = st.integers(0, 7)
"""Chooses among what there is, by its remainder."""


def chosen(things: list[T], which: int) -> T:
    return things[which % len(things)]


away = st.sampled_from([0.05, 0.05, 1.5, 3.5])
"""Seconds without a line: the last is longer than the broker waits."""


class Fabric(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.h = Harness(settle_s=1.0, unserved_s=4.0, ack_s=20.0, queue_max=8)
        self.gateways: dict[str, FakeGateway] = {}
        self.workers: dict[str, FakeWorker] = {}
        self.peers: dict[bytes, FakeGateway | FakeWorker] = {}
        self.todo: list[tuple[bytes, Message, bytes]] = []
        self.limbo: list[tuple[bytes, Message, bytes]] = []
        """Said on a line that is broken now: it may still arrive, late."""
        self.numbers = 0

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
                    self.worker_hears(peer, effect.message)

    # Gateways ---------------------------------------------------------------------------------------------------------

    def gateway_hears(self, gateway: FakeGateway, message: Any, payload: bytes) -> None:
        if isinstance(message, Who):
            self.greet(gateway)
            return
        if isinstance(message, Snapshot | Beat):
            return
        assert message.rid in gateway.calls, f"{gateway.name} hears of a request that is not its own: {message}"
        call = gateway.calls[message.rid]
        match message:
            case Accepted() if call.over is not None:
                self.later(gateway.peer, Cancel(rid=message.rid))
            case Leased():
                assert message.attempt >= call.attempt
                if message.attempt > call.attempt:
                    assert not call.lines, "an attempt follows one that had streamed"
                    call.told, call.asking = [], False
                call.attempt = message.attempt
            case Lost():
                assert not call.lines, "what had streamed cannot wait again"
            case Chunk() if call.over is None and message.attempt == call.attempt:
                self.chunk_arrives(gateway, call, message, payload)
            case Gap() if call.over is None and message.attempt == call.attempt:
                self.ask(gateway, call)
            case End() | Failed():
                self.terminal_arrives(gateway, call, message)

    def chunk_arrives(self, gateway: FakeGateway, call: Call, chunk: Chunk, payload: bytes) -> None:
        lines = payload.splitlines(keepends=True)
        assert len(lines) == chunk.n
        assert lines == [line(chunk.rid, chunk.attempt, chunk.seq + i) for i in range(chunk.n)]
        if chunk.seq > len(call.lines):
            self.ask(gateway, call)
            return
        new = lines[len(call.lines) - chunk.seq :]
        call.lines += new
        call.asking = call.asking and not new
        if call.told:
            self.terminal_arrives(gateway, call, call.told[-1], again=True)

    def ask(self, gateway: FakeGateway, call: Call) -> None:
        if not call.cancelled:
            call.asking = True
            self.later(gateway.peer, Replay(rid=call.submit.rid, attempt=call.attempt, start=len(call.lines)))

    def terminal_arrives(self, gateway: FakeGateway, call: Call, message: Any, *, again: bool = False) -> None:
        if not again:
            if call.over is not None:
                # What we said before we heard the first is answered too.
                crossed = isinstance(message, Failed) and message.code in CROSSED
                assert message == call.over or crossed, "a second, different terminal"
                self.later(gateway.peer, Ack(rid=message.rid))
                return
            # Until one counts, the only other word is that its missing events are gone.
            lost = isinstance(message, Failed) and message.code in GONE
            assert not call.told or message == call.told[-1] or lost
            call.told.append(message)
        at_once = isinstance(message, Failed) and message.code in (Code.CANCELLED, Code.DEADLINE_EXCEEDED)
        if at_once or call.cancelled or message.seq <= len(call.lines):
            if isinstance(message, End):
                assert call.cancelled or len(call.lines) == message.seq
            if not call.acked:
                call.over = message
        elif call.over is None:
            self.ask(gateway, call)

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
                again = msgspec.structs.replace(call.submit, attempt=call.attempt, next_seq=len(call.lines))
                self.later(gateway.peer, again, b"body")

    def listening(self) -> list[FakeGateway]:
        return [gateway for gateway in self.gateways.values() if gateway.peer in self.peers]

    def calls(self) -> list[tuple[FakeGateway, Call]]:
        return [(gateway, call) for gateway in self.listening() for call in gateway.calls.values() if call.over is None]

    # Workers ----------------------------------------------------------------------------------------------------------

    def worker_hears(self, worker: FakeWorker, message: Any) -> None:
        match message:
            case Registered():
                worker.registration = message.registration
            case Assign():
                self.assign_arrives(worker, message)
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

    def assign_arrives(self, worker: FakeWorker, assign: Assign) -> None:
        core = self.h.core
        waiting = [r for r in core.state.requests.values() if r.phase is Phase.QUEUED]
        request = core.state.requests.get(assign.rid)
        if request is not None and request.attempt == assign.attempt:
            assert all(r.order > request.order for r in waiting if r.submit.model == assign.model), "out of turn"
        assert not worker.draining
        if assign.registration != worker.registration or worker.refuses:
            worker.refuses = max(0, worker.refuses - 1)
            self.later(worker.peer, Refused(rid=assign.rid, attempt=assign.attempt, reason="no"))
            return
        assert assign.rid not in worker.leases
        worker.leases[assign.rid] = Work(assign.attempt, assign.digest)
        assert sum(work.digest == assign.digest for _, work in worker.running()) <= worker.slots

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
        payload = b"".join(line(rid, work.attempt, seq) for seq in range(start, work.events))
        return Chunk(rid=rid, attempt=work.attempt, seq=start, n=work.events - start), payload

    def registration(self, worker: FakeWorker) -> Register:
        claims = (
            Claim(rid=rid, attempt=work.attempt, top=work.events, ended=work.terminal is not None)
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
        work.events += n
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
    )
    def submit(self, which: int, model: str, deadline_ms: int | None, times: int) -> None:
        gateway = chosen(self.listening(), which)
        for _ in range(times):
            number = self.number()
            rid = number.to_bytes(16, "big")
            submit = Submit(
                rid=rid, client="c", ref=str(number), model=model, path="/api/chat", deadline_ms=deadline_ms
            )
            gateway.calls[rid] = Call(submit)
            self.say(gateway.peer, submit, b"body")

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
            for rid, call in gateway.calls.items():
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
                    if call.asking:
                        self.ask(gateway, call)
            self.carry_out(self.h.tick())
            self.settle()

    # Rules: what should not -------------------------------------------------------------------------------------------

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
        assert len(self.h.core._deadlines) <= DEADLINES_SLACK
        assert not any(worker.leases for worker in self.online()), "a worker keeps what nobody will ask for"


TestFabric = Fabric.TestCase
TestFabric.settings = settings(
    max_examples=400,
    stateful_step_count=50,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
