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
from typing import Any

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
    Started,
    Stats,
    Submit,
    Superseded,
    Who,
)
from common.protocol import State as EnginesChanged
from tests.unit.broker.harness import Harness

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
    accepted: bool = False
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


pick = st.integers(0, 63)
"""Chooses among what there is, by its remainder."""


class Fabric(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.h = Harness(settle_s=1.0, unserved_s=4.0, ack_s=20.0, queue_max=8)
        self.gateways: dict[str, FakeGateway] = {}
        self.workers: dict[str, FakeWorker] = {}
        self.peers: dict[bytes, FakeGateway | FakeWorker] = {}
        self.todo: list[tuple[bytes, Message, bytes]] = []
        self.numbers = 0

    # The wire ---------------------------------------------------------------------------------------------------------

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def say(self, peer: bytes, message: Message, payload: bytes = b"") -> None:
        """Send to the broker, and let everyone answer until nobody has anything to say."""
        self.todo.append((peer, message, payload))
        rounds = 0
        while self.todo:
            rounds += 1
            assert rounds < 2000, "the peers and the broker talk without end"
            peer, message, payload = self.todo.pop(0)
            if peer not in self.peers:
                continue
            side = Side.GATEWAY if peer.startswith(b"g") else Side.WORKER
            frame = protocol.encode(message, payload)
            self.carry_out(self.h.feed(Received(side, peer, message, payload, frame)))

    def later(self, peer: bytes, message: Message, payload: bytes = b"") -> None:
        self.todo.append((peer, message, payload))

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

    def settle(self) -> None:
        """Let what was answered meanwhile be said."""
        if self.todo:
            self.say(*self.todo.pop(0))

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
            case Accepted():
                call.accepted = True
            case Leased():
                assert message.attempt >= call.attempt
                if message.attempt > call.attempt:
                    assert not call.lines, "an attempt follows one that had streamed"
                call.attempt = message.attempt
            case Lost():
                assert not call.lines, "what had streamed cannot wait again"
            case Started() | Chunk() | Gap() if call.over is None:
                assert message.attempt == call.attempt
                if isinstance(message, Chunk):
                    self.chunk_arrives(gateway, call, message, payload)
                elif isinstance(message, Gap) and message.top > len(call.lines):
                    self.ask_again(gateway, call)
            case End() | Failed():
                self.terminal_arrives(gateway, call, message)

    def chunk_arrives(self, gateway: FakeGateway, call: Call, chunk: Chunk, payload: bytes) -> None:
        lines = payload.splitlines(keepends=True)
        assert len(lines) == chunk.n
        assert lines == [line(chunk.rid, chunk.attempt, chunk.seq + i) for i in range(chunk.n)]
        if chunk.seq > len(call.lines):
            self.ask_again(gateway, call)
            return
        call.lines += lines[len(call.lines) - chunk.seq :]
        if call.told:
            self.terminal_arrives(gateway, call, call.told[-1], again=True)

    def ask_again(self, gateway: FakeGateway, call: Call) -> None:
        self.later(gateway.peer, Replay(rid=call.submit.rid, attempt=call.attempt, start=len(call.lines)))

    def terminal_arrives(self, gateway: FakeGateway, call: Call, message: Any, *, again: bool = False) -> None:
        if not again:
            if call.over is not None:
                cancelled_twice = call.cancelled and isinstance(message, Failed) and message.code is Code.CANCELLED
                assert message == call.over or cancelled_twice, "a second, different terminal"
                self.later(gateway.peer, Ack(rid=message.rid))
                return
            # Until one counts, the only other word is that its missing events are gone.
            lost = isinstance(message, Failed) and message.code in (Code.WORKER_LOST, Code.CANCELLED)
            assert not call.told or message == call.told[-1] or lost
            call.told.append(message)
        at_once = isinstance(message, Failed) and message.code in (Code.CANCELLED, Code.DEADLINE_EXCEEDED)
        if at_once or call.cancelled or message.seq <= len(call.lines):
            if isinstance(message, End):
                assert call.cancelled or len(call.lines) == message.seq
            if not call.acked:
                call.over = message
        elif call.over is None:
            self.ask_again(gateway, call)

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
        self.workers[name] = worker = FakeWorker(name, f"epoch-{self.number()}", slots)
        self.connect_worker(worker)

    def online(self) -> list[FakeWorker]:
        return [worker for worker in self.workers.values() if self.peers.get(worker.peer) is worker]

    def busy(self) -> list[tuple[FakeWorker, bytes, Work]]:
        return [(worker, rid, work) for worker in self.workers.values() for rid, work in worker.running()]

    # Rules: gateways and clients --------------------------------------------------------------------------------------

    @initialize(slots=st.integers(1, 3))
    def begin(self, slots: int) -> None:
        self.gateway_starts("g1")
        self.start_worker("w1", slots)

    @rule(name=st.sampled_from(["g1", "g2"]))
    def gateway_starts(self, name: str) -> None:
        """A gateway that was there has died: its successor has another name, and knows nothing of the calls."""
        if name in self.gateways:
            self.peers.pop(self.gateways[name].peer, None)
        self.gateways[name] = gateway = FakeGateway(f"{name}-{self.number()}")
        self.connect_gateway(gateway)

    @rule(which=pick)
    def gateway_loses_its_line(self, which: int) -> None:
        gateways = list(self.gateways.values())
        self.peers.pop(gateways[which % len(gateways)].peer, None)

    @rule(which=pick)
    def gateway_comes_back(self, which: int) -> None:
        gateways = list(self.gateways.values())
        self.connect_gateway(gateways[which % len(gateways)])

    @precondition(lambda self: self.listening())
    @rule(which=pick)
    def gateway_chokes(self, which: int) -> None:
        gateways = self.listening()
        gateways[which % len(gateways)].deaf = True

    @rule()
    def gateways_read_again(self) -> None:
        for gateway in self.gateways.values():
            gateway.deaf = False

    @precondition(lambda self: self.listening())
    @rule(which=pick)
    def gateway_leaves(self, which: int) -> None:
        gateways = self.listening()
        gateway = gateways[which % len(gateways)]
        self.say(gateway.peer, Bye())
        gateway.calls.clear()
        self.peers.pop(gateway.peer)

    @precondition(lambda self: self.listening())
    @rule(
        which=pick,
        model=st.sampled_from([*MODELS, "nowhere:latest"]),
        deadline_ms=st.sampled_from([None, None, None, 300, 4000]),
    )
    def submit(self, which: int, model: str, deadline_ms: int | None) -> None:
        gateways = self.listening()
        gateway = gateways[which % len(gateways)]
        number = self.number()
        rid = number.to_bytes(16, "big")
        submit = Submit(rid=rid, client="c", ref=str(number), model=model, path="/api/chat", deadline_ms=deadline_ms)
        gateway.calls[rid] = Call(submit)
        self.say(gateway.peer, submit, b"body")

    @precondition(lambda self: self.calls())
    @rule(which=pick)
    def cancel(self, which: int) -> None:
        calls = self.calls()
        gateway, call = calls[which % len(calls)]
        call.cancelled = True
        self.say(gateway.peer, Cancel(rid=call.submit.rid, attempt=call.attempt))

    @precondition(lambda self: self.calls())
    @rule(which=pick)
    def replay_asked(self, which: int) -> None:
        calls = self.calls()
        gateway, call = calls[which % len(calls)]
        if call.attempt and not call.cancelled:
            self.ask_again(gateway, call)
            self.settle()

    @rule()
    def acknowledge(self) -> None:
        for gateway in self.listening():
            for rid, call in gateway.calls.items():
                if call.over is not None and not call.acked:
                    call.acked = True
                    self.say(gateway.peer, Ack(rid=rid))

    # Rules: workers ---------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(["w1", "w2", "w3"]), slots=st.integers(1, 3))
    def worker_starts(self, name: str, slots: int) -> None:
        """A process of this name that was there is superseded, or had died."""
        self.start_worker(name, slots)

    @rule(which=pick)
    def worker_loses_its_line(self, which: int) -> None:
        workers = list(self.workers.values())
        self.peers.pop(workers[which % len(workers)].peer, None)

    @rule(which=pick, forgets=st.sets(pick, max_size=2))
    def worker_comes_back(self, which: int, forgets: set[int]) -> None:
        workers = list(self.workers.values())
        worker = workers[which % len(workers)]
        for index, rid in enumerate(list(worker.leases)):
            if index in forgets:
                del worker.leases[rid]
        self.connect_worker(worker)

    @precondition(lambda self: self.online())
    @rule(which=pick)
    def worker_leaves(self, which: int) -> None:
        workers = self.online()
        worker = workers[which % len(workers)]
        self.say(worker.peer, Bye())
        worker.leases.clear()
        self.peers.pop(worker.peer, None)

    @precondition(lambda self: self.online())
    @rule(which=pick, times=st.integers(1, 3))
    def worker_will_refuse(self, which: int, times: int) -> None:
        workers = self.online()
        workers[which % len(workers)].refuses = times

    @precondition(lambda self: self.online())
    @rule(which=pick, slots=st.integers(1, 3), draining=st.booleans())
    def worker_changes(self, which: int, slots: int, draining: bool) -> None:
        workers = self.online()
        worker = workers[which % len(workers)]
        worker.slots, worker.draining = slots, draining
        self.say(worker.peer, EnginesChanged(engines=(worker.engine,), draining=draining))

    @precondition(lambda self: self.busy())
    @rule(which=pick, n=st.integers(1, 4))
    def worker_streams(self, which: int, n: int) -> None:
        busy = self.busy()
        worker, rid, work = busy[which % len(busy)]
        start = work.events
        work.events += n
        self.say(worker.peer, *self.chunk_of(rid, work, start))

    @precondition(lambda self: self.busy())
    @rule(which=pick)
    def worker_ends(self, which: int) -> None:
        busy = self.busy()
        worker, rid, work = busy[which % len(busy)]
        work.terminal = End(rid=rid, attempt=work.attempt, seq=work.events, stats=Stats(done_reason="stop"))
        self.say(worker.peer, work.terminal)

    @precondition(lambda self: self.busy())
    @rule(which=pick, retryable=st.booleans())
    def worker_fails(self, which: int, retryable: bool) -> None:
        busy = self.busy()
        worker, rid, work = busy[which % len(busy)]
        work.terminal = Failed(
            rid=rid,
            attempt=work.attempt,
            seq=work.events,
            code=Code.BACKEND_ERROR,
            message="hiccup",
            retryable=retryable,
        )
        self.say(worker.peer, work.terminal)

    # Rules: time ------------------------------------------------------------------------------------------------------

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
            self.carry_out(self.h.tick())
            self.settle()

    # The end ----------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everyone comes back, works and waits: then nothing may be left."""
        self.gateways_read_again()
        for gateway in self.gateways.values():
            if gateway not in self.listening():
                self.connect_gateway(gateway)
        for worker in self.online():
            worker.draining, worker.refuses, worker.slots = False, 0, 3
            self.say(worker.peer, EnginesChanged(engines=(worker.engine,)))
        self.start_worker("last", 3)
        for _ in range(40):
            while self.busy():
                self.worker_ends(0)
                if not any(self.peers.get(worker.peer) is worker for worker, _, _ in self.busy()):
                    break
            for gateway, call in self.calls():
                if call.attempt:
                    self.ask_again(gateway, call)
            self.settle()
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
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
