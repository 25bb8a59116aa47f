"""Broker cores, workers' and gateways' pure sessions in one process, under a virtual clock, and everything goes wrong.

The world is a heap of (time, number, what to do) and one seeded random number generator, so that a seed tells the whole
story. Lines between parts behave as ZeroMQ over TCP does: in order per connection, each connection at its own pace, and
when one breaks, what was under way on it is lost and the peer comes back under another routing id.

What is checked:

- after every event of a broker the records it touched, every CHECK_ALL events all of them (`validate`);
- every event a client gets is the next one of its own request (the text of an event names request and seq);
- every request of a client that stays gets exactly one terminal, and after an end it has all events;
- once all is healed and every window has passed, nobody holds anything: no record, lease, stream or busy slot.

In a world of single faults (`storm=False`: the next fault comes when the last has healed) no request of a client that
resumes may end in anything but its end.
"""

import heapq
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Final

from broker.core import BrokerCore
from broker.events import Effect, Event, Forward, Overflowed, Received, Send, Side, Supply, Unreachable
from broker.settings import BrokerSettings
from common import protocol
from common.errors import Code
from common.protocol import Chunk, End, Engine, Failed, Message, Model, Part, Submit, encode
from gateway.link import Attachment, Link
from gateway.session import Events, Moved, Output, Over, Stream, Wanted
from workers.session import Close, Give, Lease, Limits, Post, Probe, Resume, Served, Session
from workers.session import Effect as WorkerEffect

CHECK_ALL: Final = 1_000
MODELS: Final = ("m:latest", "n:latest")
SLOTS: Final = 3
PART_BYTES: Final = 12
"""Of the bodies that come in parts, so that they have several."""
IN_FLIGHT_MAX: Final = 60
"""Messages under way on one line and direction; beyond it a dealer keeps its own and a broker drops chunks."""
GRACE_S: Final = 20.0
HEAL_S: Final = 14.0
"""Longer than a broker waits for claims and a gateway's requests for their gateway."""
PATIENCE_S: Final = 200.0
ALLOWED: Final = frozenset({Code.WORKER_LOST, Code.BACKEND_ERROR, Code.NO_WORKERS, Code.MODEL_NOT_FOUND})


class Violation(AssertionError):
    """A promise was broken; the text says which, and at what time."""


def line_of(ref: str, seq: int, tokens: int) -> bytes:
    """Event `seq` of a request for so many tokens; the last one has `done`."""
    if seq == tokens:
        return b'{"response":"","done":true,"done_reason":"stop","eval_count":%d}\n' % tokens
    return b'{"response":"%s.%d","done":false}\n' % (ref.encode(), seq)


@dataclass(slots=True, eq=False)
class Wish:
    """A client's request and what it has of it. `gateway` is where its line is, None while it is down."""

    ref: str
    model: str
    tokens: int
    resume: bool
    next: int = 0
    terminal: str = ""
    gateway: "GatewayNode | None" = None
    stream: Stream | None = None
    wanted: int = 0
    lines: int = 0
    """How often its line was made; what an earlier one still brings is not heard."""
    stopped: bool = False
    gone: bool = False
    parted: bytes = b""
    """Its body, if it is fetched in parts."""


class Line:
    """A dealer's connection to a broker's router; of each way it knows the last delivery and how many are under way."""

    def __init__(self, world: "World", node: "GatewayNode | WorkerNode", broker: "BrokerNode") -> None:
        self.world, self.node, self.broker = world, node, broker
        self.open = False
        self.peer = b""
        self._last = {True: 0.0, False: 0.0}
        self._flying = {True: 0, False: 0}
        self._pace = world.rng.uniform(0.0002, 0.004)
        self.dial()

    def dial(self) -> None:
        self.world.after(self.world.rng.uniform(0.01, 0.5), self._connect)

    def _connect(self) -> None:
        if self.open or not self.node.alive:
            return
        if not self.broker.alive:
            self.dial()
            return
        self.open = True
        self.peer = b"%d" % next(self.world.peers)
        self._flying = {True: 0, False: 0}
        self.broker.lines[self.peer] = self

    def cut(self) -> None:
        """The connection breaks: what is under way is lost, and the dealer dials again."""
        if self.open:
            self.open = False
            self.broker.lines.pop(self.peer, None)
            if self.node.alive:
                self.dial()

    def stall(self, duration_s: float) -> None:
        """Nothing arrives for a while, then everything."""
        until = self.world.now + duration_s
        self._last = {way: max(last, until) for way, last in self._last.items()}

    def full(self, *, up: bool) -> bool:
        return self._flying[up] >= IN_FLIGHT_MAX

    def send(self, message: Message, payload: bytes, *, up: bool) -> None:
        at = max(self._last[up], self.world.now + self.world.rng.expovariate(1 / self._pace))
        self._last[up] = at
        self._flying[up] += 1
        self.world.at(at, partial(self._arrive, self.peer, message, payload, up))

    def _arrive(self, peer: bytes, message: Message, payload: bytes, up: bool) -> None:
        if not self.open or peer != self.peer:
            self.world.figures["messages lost with a line"] += 1
            return
        node = self.broker if up else self.node
        if node.frozen_until > self.world.now or node.held:
            node.hold(partial(self._arrive, peer, message, payload, up))
            return
        self._flying[up] -= 1
        if up:
            self.broker.hear(self, message, payload)
        else:
            self.node.hear(self.broker.index, message, payload)


class Node:
    """A process: alive or not, frozen or not; `life` tells a restarted one from its predecessor."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.alive = True
        self.frozen_until = 0.0
        self.held: list[Callable[[], None]] = []
        self.life = 0

    def soon(self, at: float, act: Callable[[], None]) -> None:
        """Do it then, unless this process has died."""
        life = self.life

        def run() -> None:
            if self.life == life and self.alive:
                if self.frozen_until > self.world.now:
                    self.world.at(self.frozen_until, run)
                else:
                    act()

        self.world.at(at, run)

    def freeze(self, duration_s: float) -> None:
        self.frozen_until = self.world.now + duration_s

    def hold(self, act: Callable[[], None]) -> None:
        """What arrives at a frozen process is read in order when it thaws."""
        if not self.held:
            self.soon(self.frozen_until, self._thaw)
        self.held.append(act)

    def _thaw(self) -> None:
        held, self.held = self.held, []
        for act in held:
            act()

    def crash(self, back_in_s: float) -> None:
        if self.alive:
            self.alive = False
            self.life += 1
            self.stopped()
            self.world.after(back_in_s, self._revive)

    def _revive(self) -> None:
        self.alive = True
        self.frozen_until = 0.0
        self.held = []
        self.born()

    def stopped(self) -> None:
        raise NotImplementedError

    def born(self) -> None:
        raise NotImplementedError


class BrokerNode(Node):
    def __init__(self, world: "World", index: int) -> None:
        super().__init__(world)
        self.index = index
        self.lines: dict[bytes, Line] = {}
        self.born()

    def born(self) -> None:
        settings = BrokerSettings(settle_s=5.0, recover_s=10.0, gateway_grace_s=10.0, ack_s=30.0)
        self.core = BrokerCore(settings, nonce=self.world.rng.getrandbits(32), now=self.world.now)
        self._tick()

    def stopped(self) -> None:
        for line in list(self.lines.values()):
            line.cut()

    def hear(self, line: Line, message: Message, payload: bytes) -> None:
        side = Side.GATEWAY if isinstance(line.node, GatewayNode) else Side.WORKER
        if type(message) is Chunk:
            peer = self.core.route(line.peer, message, self.world.now)
            self._check(message.rid)
            if peer is not None:
                if peer:
                    self._forward(peer, message.rid, (message, payload))
                return
        frame: Any = (message, payload)  # the core only hands it on
        self._feed(Received(side, line.peer, message, payload, frame))

    def _tick(self) -> None:
        self._carry_out(self.core.tick(self.world.now))
        due = max(self.world.now + 0.01, min(self.core.next_deadline(), self.world.now + 0.25))
        self.soon(due, self._tick)

    def _feed(self, event: Event) -> None:
        self._carry_out(self.core.handle(event, self.world.now))

    def _carry_out(self, effects: list[Effect]) -> None:
        touched = set()
        for effect in effects:
            if isinstance(effect, Forward):
                frame: Any = effect.frame
                self._forward(effect.peer, effect.rid, frame)
            elif isinstance(effect, Supply):
                part: Any = effect.frame
                line = self.lines.get(effect.peer)
                if line is None:
                    effects += self.core.handle(Unreachable(Side.WORKER, effect.peer), self.world.now)
                elif line.full(up=False) or self.world.rng.random() < self.world.drop:
                    self.world.figures["parts dropped"] += 1
                else:
                    line.send(*part, up=False)
            elif isinstance(effect, Send):
                touched.add(getattr(effect.message, "rid", b""))
                line = self.lines.get(effect.peer)
                if line is None:
                    effects += self.core.handle(Unreachable(effect.side, effect.peer), self.world.now)
                else:
                    line.send(effect.message, effect.payload, up=False)
        for rid in sorted(touched):
            self._check(rid)
        self.world.checked += 1
        if self.world.checked % CHECK_ALL == 0:
            self.core.validate()

    def _forward(self, peer: bytes, rid: bytes, frame: tuple[Message, bytes]) -> None:
        line = self.lines.get(peer)
        if line is None:
            self._feed(Unreachable(Side.GATEWAY, peer))
        elif line.full(up=False) or self.world.rng.random() < self.world.drop:
            self.world.figures["chunks dropped"] += 1
            self._feed(Overflowed(peer, rid))
        else:
            line.send(*frame, up=False)

    def _check(self, rid: bytes) -> None:
        request = self.core.state.requests.get(rid)
        if request is not None:
            self.core.state.validate_request(request)


class WorkerNode(Node):
    def __init__(self, world: "World", name: str) -> None:
        super().__init__(world)
        self.name = name
        self.lines = [Line(world, self, broker) for broker in world.brokers]
        self.born()

    def born(self) -> None:
        limits = Limits(
            first_byte_s=30,
            silence_s=15,
            orphan_s=30,
            keep_s=40,
            lease_bytes_max=64 * 2**10,
            part_bytes=PART_BYTES,
        )
        epoch = f"{self.world.rng.getrandbits(128):032x}"
        self.session = Session(self.name, epoch, limits, self.world.now, brokers=len(self.lines))
        models = tuple(Model(name=name, digest=name, slots=SLOTS, resident=True) for name in MODELS)
        self.session.set_engines((Engine(url="http://e", models=models),))
        self.broker = 0
        self.work: dict[Lease, int] = {}
        """What the engine does, by lease: a number that tells a paused run from its continuation."""
        self.bodies: dict[Lease, tuple[bytearray, list[bytes], int]] = {}
        """Of those that come in parts: what the engine has, the parts it is given, and how many bytes it is to have."""
        for line in self.lines:
            line.dial()
        self._tick()

    def stopped(self) -> None:
        for line in self.lines:
            line.cut()
        self.work.clear()
        self.bodies.clear()

    def hear(self, broker: int, message: Any, payload: bytes) -> None:
        self._carry_out(self.session.handle(message, payload, self.world.now, broker=broker))
        self.pump()

    def pump(self) -> None:
        self._carry_out(self.session.pump(self._offer, self.world.now))
        if self.session.blocked:
            self.soon(self.world.now + 0.02, self.pump)

    def _offer(self, frame: bytes) -> bool:
        line = self.lines[self.broker]
        if not line.open or line.full(up=True):
            return False
        line.send(*protocol.from_worker.decode(frame), up=True)
        return True

    def _tick(self) -> None:
        self._carry_out(self.session.tick(self.world.now))
        self.pump()
        self.soon(max(self.world.now + 0.02, min(self.session.next_deadline(), self.world.now + 1)), self._tick)

    def _carry_out(self, effects: Iterable[WorkerEffect]) -> None:
        for effect in effects:
            match effect:
                case Post(lease, _, _, parted_bytes) if parted_bytes:
                    self.work[lease] = 0
                    self.bodies[lease] = bytearray(), [], parted_bytes
                case Give(lease, part):
                    if lease in self.bodies:
                        parts = self.bodies[lease][1]
                        parts.append(part)
                        if len(parts) == 1:
                            self._read(lease)
                case Post(lease, body, prior):
                    job = json.loads(body)
                    self.work[lease] = 0
                    self.soon(
                        self.world.now + self.world.rng.uniform(0.001, 0.05), partial(self._begin, lease, job, prior)
                    )
                case Close(lease):
                    self.work.pop(lease, None)
                    self.bodies.pop(lease, None)
                case Resume(lease):
                    if lease in self.work:
                        self._generate(lease, self._jobs[lease])
                case Served(broker):
                    self.broker = broker
                case Probe():
                    for index, line in enumerate(self.lines):
                        if index != self.broker and line.open:
                            line.send(protocol.Probe(), b"", up=True)
                case _:
                    pass

    @property
    def _jobs(self) -> dict[Lease, dict[str, Any]]:
        return self.world.jobs

    def _read(self, lease: Lease) -> None:
        """The engine reads a part of a body, which takes a while."""
        self.soon(self.world.now + self.world.rng.expovariate(1 / 0.02), partial(self._was_read, lease))

    def _was_read(self, lease: Lease) -> None:
        if lease not in self.bodies:
            return
        body, parts, size = self.bodies[lease]
        body += parts.pop(0)
        self.session.taken(lease, self.world.now)
        if len(body) == size:
            del self.bodies[lease]
            self.world.figures["bodies in parts"] += 1
            self._begin(lease, json.loads(body), ())
        elif parts:
            self._read(lease)
        self.pump()

    def _begin(self, lease: Lease, job: dict[str, Any], prior: tuple[bytes, ...]) -> None:
        if lease not in self.work:
            return
        for seq, line in enumerate(prior):
            if line != line_of(job["prompt"], seq, job["tokens"]):
                raise Violation(f"event {seq} of {job['prompt']} came to its continuation as {line!r}")
        self._jobs[lease] = job
        fate = self.world.rng.random()
        if fate < self.world.engine_faults:
            del self.work[lease]
            if fate < self.world.engine_faults / 2:
                self.session.rejected(lease, 500, b"{}", self.world.now)
            else:
                self.session.broke(lease, "reset", self.world.now)
            self.pump()
            return
        self.session.head(lease, 200, "application/x-ndjson", self.world.now)
        self._generate(lease, job)
        self.pump()

    def _generate(self, lease: Lease, job: dict[str, Any]) -> None:
        """A burst of lines, then the next."""
        if lease not in self.work:
            return
        rng = self.world.rng
        if rng.random() < self.world.engine_faults / 10:
            del self.work[lease]
            self.session.eof(lease, self.world.now)
            self.pump()
            return
        first, last = lease.top, job["tokens"]
        burst = min(rng.randint(1, 4), last + 1 - first)
        data = b"".join(line_of(job["prompt"], seq, last) for seq in range(first, first + burst))
        go_on = self.session.feed(lease, data, self.world.now)
        if go_on and lease.top > last:
            del self.work[lease]
            self.session.eof(lease, self.world.now)
        elif not go_on:
            self.work.pop(lease, None)
        elif not lease.paused:
            self.soon(self.world.now + rng.expovariate(1 / 0.02), partial(self._generate, lease, job))
        self.pump()


class GatewayNode(Node):
    def __init__(self, world: "World", index: int) -> None:
        super().__init__(world)
        self.index = index
        self.lines = [Line(world, self, broker) for broker in world.brokers]
        self.born()

    def born(self) -> None:
        name = f"g{self.index}-{self.world.rng.getrandbits(32):08x}"
        # A portion so small that breaks fall between two, too.
        self.link = Link(name, len(self.lines), self.world.now, lost_s=60.0, portion=self.world.rng.choice([1, 3, 200]))
        for line in self.lines:
            line.dial()
        self._tick()

    def stopped(self) -> None:
        for line in self.lines:
            line.cut()
        for wish in [wish for wish in self.world.open if wish.gateway is self]:
            self.world.drop_line(wish, told=False)

    def hear(self, broker: int, message: Message, payload: bytes) -> None:
        if isinstance(message, protocol.Snapshot) and message.id:
            return
        self.link.handle(broker, message, payload, self.world.now)
        self.flush()

    def flush(self) -> None:
        for tell in self.link.take():
            line = self.lines[tell.broker]
            if line.open:
                line.send(tell.message, tell.payload, up=True)
            elif tell.broker == self.link.broker and not isinstance(tell.message, protocol.Beat | protocol.Probe):
                self.link.lost()

    def supply(self, part: Part, payload: bytes) -> None:
        """Send a part of a body, a little later: it has to be read."""
        self.soon(self.world.now + self.world.rng.expovariate(1 / 0.005), partial(self._supply, part, payload))

    def _supply(self, part: Part, payload: bytes) -> None:
        line = self.lines[self.link.broker]
        if line.open:
            line.send(part, payload, up=True)

    def _tick(self) -> None:
        self.link.tick(self.world.now)
        line = self.lines[self.link.broker]
        if self.link.greeting and line.open:
            line.send(self.link.hello(), b"", up=True)
            self.link.greeted()
        elif self.link.resubmits:
            self.link.resubmit(self.world.now)
        self.flush()
        quick = self.link.greeting or self.link.resubmits
        pause = 0.05 if quick else max(0.01, self.link.next_deadline() - self.world.now)
        self.soon(self.world.now + pause, self._tick)


@dataclass
class World:
    """One story. `requests` are made over `duration_s`; `run` plays it to its end and raises `Violation`."""

    seed: int
    requests: int = 400
    storm: bool = True
    now: float = 0.0
    figures: Counter[str] = field(default_factory=Counter)
    checked: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self.peers = count(1)
        self.jobs: dict[Lease, dict[str, Any]] = {}
        self.open: dict[Wish, None] = {}
        self.duration_s = self.requests / (40 if self.storm else 4)
        self.drop = self.rng.choice([0.0, 0.01, 0.1])
        self.engine_faults = self.rng.choice([0.0, 0.02, 0.1]) if self.storm else 0.0
        self.brokers = [BrokerNode(self, index) for index in range(self.rng.choice([1, 1, 2]))]
        self.workers = [WorkerNode(self, f"w{number}") for number in range(self.rng.randint(2, 5))]
        self.gateways = [GatewayNode(self, number) for number in range(self.rng.randint(1, 3))]

    # Time -------------------------------------------------------------------------------------------------------------

    def at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time, next(self._numbers), act))

    def after(self, duration_s: float, act: Callable[[], None]) -> None:
        self.at(self.now + duration_s, act)

    def _play(self, until: float, enough: Callable[[], bool] = lambda: False) -> None:
        while self._heap and self._heap[0][0] <= until and not enough():
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self.now = max(self.now, until) if not enough() else self.now

    def run(self) -> Counter[str]:
        """Play it."""
        self._play(3.0)  # everyone has found everyone
        for number in range(self.requests):
            self.at(self.now + self.rng.uniform(0, self.duration_s), partial(self._wish, number))
        self.after(self.rng.expovariate(1.0), self._fault)
        self._play(self.now + self.duration_s)
        self._healing = True
        self._play(self.now + PATIENCE_S, lambda: not self.open and self.now > self.duration_s + HEAL_S)
        if self.open:
            wish = next(iter(self.open))
            raise Violation(f"at {self.now:.3f}: {len(self.open)} requests have no terminal, {wish.ref} among them")
        self._play(self.now + 2 * GRACE_S + 60)
        for broker in self.brokers:
            broker.core.validate()
            self._empty(f"broker {broker.index}", broker.core.state.requests)
        for worker in self.workers:
            self._empty(f"{worker.name}'s engine", worker.work)
            if worker.session.leases:
                raise Violation(f"{worker.name} keeps {worker.session.leases} leases for ever")
        for gateway in self.gateways:
            if gateway.link.streams:
                raise Violation(f"gateway {gateway.index} keeps {gateway.link.streams} streams for ever")
        return self.figures

    def _empty(self, name: str, what: object) -> None:
        if what:
            raise Violation(f"{name} holds for ever: {what!r:.500}")

    # Faults -----------------------------------------------------------------------------------------------------------

    _healing = False

    def _fault(self) -> None:
        if self._healing:
            return
        rng = self.rng
        kinds: list[tuple[str, Callable[[], None]]] = [
            ("broker killed", lambda: rng.choice(self.brokers).crash(rng.uniform(0.1, 3))),
            ("worker killed", lambda: rng.choice(self.workers).crash(rng.uniform(0.2, 5))),
            ("gateway killed", lambda: rng.choice(self.gateways).crash(rng.uniform(0.2, 5))),
            ("worker frozen", lambda: rng.choice(self.workers).freeze(rng.uniform(0.5, 8))),
            ("broker frozen", lambda: rng.choice(self.brokers).freeze(rng.uniform(0.5, 5))),
            ("gateway frozen", lambda: rng.choice(self.gateways).freeze(rng.uniform(0.5, 5))),
            ("line cut", lambda: self._some_line().cut()),
            ("line stalled", lambda: self._some_line().stall(rng.uniform(0.1, 6))),
            ("client's line cut", self._cut_client),
        ]
        name, act = rng.choice(kinds)
        self.figures[name] += 1
        act()
        self.after(rng.expovariate(1 / 0.7) if self.storm else HEAL_S, self._fault)

    def _some_line(self) -> Line:
        lines = [worker.lines for worker in self.workers] + [gateway.lines for gateway in self.gateways]
        return self.rng.choice(self.rng.choice(lines))

    def _cut_client(self) -> None:
        connected = [wish for wish in self.open if wish.gateway is not None]
        for wish in self.rng.sample(connected, min(3, len(connected))):
            self.drop_line(wish, told=True)

    # Clients ----------------------------------------------------------------------------------------------------------

    def _wish(self, number: int) -> None:
        rng = self.rng
        wish = Wish(f"r{number}", rng.choice(MODELS), rng.randint(1, 25), rng.random() < 0.8 or not self.storm)
        if not wish.resume or rng.random() < 0.1:
            wish.resume, wish.parted = False, rng.choice([b"", self._body(wish)])
        self.open[wish] = None
        self.figures["requests"] += 1
        self._send(wish)
        if self.storm and rng.random() < 0.05:
            self.after(rng.expovariate(1 / 0.2), partial(self._stop, wish))
        if self.storm and rng.random() < 0.05:
            self.after(rng.expovariate(1 / 0.2), partial(self.drop_line, wish, told=True))

    def _somewhere(self) -> GatewayNode | None:
        return self.rng.choice([g for g in self.gateways if g.alive and g.link.connected] or [None])

    def _send(self, wish: Wish) -> None:
        gateway = self._somewhere()
        if gateway is None:
            self.after(0.2, partial(self._send, wish))
            return
        submit = Submit(
            rid=self.rng.randbytes(16),
            client="c",
            ref=wish.ref,
            model=wish.model,
            path="/api/generate",
            grace_ms=int(GRACE_S * 1000) if wish.resume else 0,
            parted_bytes=len(wish.parted),
        )
        body = b"" if wish.parted else self._body(wish)
        wish.gateway, wish.wanted, wish.lines = gateway, 0, wish.lines + 1
        wish.stream = gateway.link.submit(submit, body, partial(self._hear, wish, wish.lines), self.now)
        gateway.flush()

    def _body(self, wish: Wish) -> bytes:
        job = {"model": wish.model, "prompt": wish.ref, "tokens": wish.tokens, "stream": True}
        return json.dumps(job).encode()

    def drop_line(self, wish: Wish, *, told: bool) -> None:
        """The client's line breaks; its gateway is `told`, unless it died."""
        if wish.terminal or wish.gateway is None:
            return
        gateway, stream = wish.gateway, wish.stream
        wish.gateway = wish.stream = None
        wish.lines += 1
        if told and stream is not None:
            if wish.resume:
                gateway.link.park(stream, self.now)
            else:
                gateway.link.forget(stream, "the client is gone")
            gateway.flush()
        if wish.resume:
            self.after(self.rng.uniform(0.05, 4), partial(self._come_back, wish))
        else:
            self._over(wish, "left")

    def _come_back(self, wish: Wish) -> None:
        if wish.terminal or wish.gateway is not None:
            return
        gateway = self._somewhere()
        if gateway is None:
            self.after(0.2, partial(self._come_back, wish))
            return
        wish.gateway, wish.stream, wish.wanted, wish.lines = gateway, None, wish.next, wish.lines + 1
        self.figures["resumes"] += 1
        attachment = Attachment(
            "c",
            wish.ref,
            wish.wanted,
            partial(self._hear, wish, wish.lines),
            partial(self._answered, wish, gateway, wish.lines),
            partial(self._waits, wish, wish.lines),
        )
        if not gateway.link.attach(attachment):
            raise Violation("no room for an attachment")
        gateway.flush()

    def _waits(self, wish: Wish, line: int) -> bool:
        return wish.lines == line and not wish.terminal

    def _answered(self, wish: Wish, gateway: GatewayNode, line: int, stream: Stream | None, code: Code | None) -> None:
        if not self._waits(wish, line):
            return
        if stream is not None:
            wish.stream = stream
        elif code is None and wish.next == 0:
            self.figures["sent again"] += 1
            self.after(0.001, partial(self._send_again, wish, line))
        else:
            self._over(wish, "NOT_FOUND" if code is None else code.value)

    def _send_again(self, wish: Wish, line: int) -> None:
        if wish.lines == line and not wish.terminal:
            self._send(wish)

    def _stop(self, wish: Wish) -> None:
        if wish.gateway is not None and wish.stream is not None and not wish.terminal:
            wish.stopped = True
            wish.gateway.link.cancel(wish.stream, "stopped")
            wish.gateway.flush()

    def _hear(self, wish: Wish, line: int, output: Output) -> None:
        if wish.lines != line or wish.terminal:
            return
        match output:
            case Events():
                self._read(wish, output)
            case Wanted(attempt, offset, size):
                assert wish.gateway is not None
                assert wish.stream is not None
                if self.rng.random() >= self.drop:
                    part = Part(rid=wish.stream.submit.rid, attempt=attempt, offset=offset)
                    wish.gateway.supply(part, wish.parted[offset : offset + size])
            case Moved():
                raise Violation(f"at {self.now:.3f}: {wish.ref} moved away from its only client")
            case Over(terminal):
                if isinstance(terminal, End):
                    if wish.next != wish.tokens + 1 and not wish.stopped:
                        raise Violation(f"at {self.now:.3f}: {wish.ref} ended at {wish.next} of {wish.tokens + 1}")
                    self._over(wish, "end")
                else:
                    self._failed(wish, terminal)

    def _read(self, wish: Wish, events: Events) -> None:
        for seq, text in enumerate(events.lines(), events.seq):
            if seq < wish.next:
                if seq >= wish.wanted:
                    raise Violation(f"at {self.now:.3f}: event {seq} of {wish.ref} came twice")
            elif seq > wish.next:
                raise Violation(f"at {self.now:.3f}: {wish.ref} got event {seq} instead of {wish.next}")
            else:
                wish.next += 1
            self.figures["events"] += 1
            if text.rstrip(b"\n") + b"\n" != line_of(wish.ref, seq, wish.tokens):
                raise Violation(f"at {self.now:.3f}: event {seq} of {wish.ref} is {text!r}")

    def _failed(self, wish: Wish, failed: Failed) -> None:
        if failed.code is Code.DUPLICATE_ID and wish.resume:
            # It did arrive the first time: ask for it again.
            wish.gateway = wish.stream = None
            self.after(0.1, partial(self._come_back, wish))
            return
        if failed.code is Code.NO_WORKERS and failed.retryable and not wish.next:
            # Its gateway could not see the broker that has the workers: refused, with the time to come again.
            self.figures["refused for now"] += 1
            wish.gateway = wish.stream = None
            self.after(1.0, partial(self._send, wish))
            return
        if failed.code is Code.CANCELLED and wish.stopped:
            self._over(wish, "stopped")
        elif failed.code in ALLOWED:
            self._over(wish, failed.code.value)
            if not self.storm and wish.resume:
                raise Violation(f"at {self.now:.3f}: {wish.ref} ended in {failed.code.value}: {failed.message}")
        else:
            raise Violation(f"at {self.now:.3f}: {wish.ref} ended in {failed.code.value}: {failed.message}")

    def _over(self, wish: Wish, terminal: str) -> None:
        if not self.storm and terminal == "NOT_FOUND":
            raise Violation(f"at {self.now:.3f}: {wish.ref}, of which {wish.next} events had come, was not found")
        wish.terminal = terminal
        self.figures[f"ended: {terminal}"] += 1
        del self.open[wish]


__all__ = ["Violation", "World", "encode"]
