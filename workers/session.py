"""What a worker decides: its leases, their replay buffers, its registration. Pure: `now` is passed in.

Rules
1. The worker that holds a lease owns its events: all of them from seq 0, until the broker says `release`, or `keep_s`
   after the end and the last replay. What is lost on the way others ask for again with `replay`. A request that is
   continued here brings the events it has, so that a client can resume it from here as well.
2. Per lease everything leaves in order: `started`, every event once, then `end` or `failed`. A frame the socket
   refuses stays where it is; nothing overtakes it. A replay goes before fresh events, so that the reader, who takes
   only the next seq, has no reason to ask again.
3. A terminal is decided once. Then the engine's work is over and its slot is free; only the buffer remains.
4. After `cancel` nothing more is sent for the lease.
5. Registration is the truth: events leave only under a confirmed registration, and an `assign` that carries another
   registration's number is refused. What was assigned before and is not in the `register`, the broker requeues.
6. Bounds. Events of a lease count up to `lease_bytes_max`, those of all leases up to `worker_bytes_max`. At the bound
   go, in this order: finished leases that were delivered, oldest first (only at the worker's bound); events that were
   sent, oldest first. If what was not sent reaches the bound by itself, the engine is not read until it has left.
   An unfinished line counts beside them, up to EVENT_BYTES_MAX. A `replay` of what went is answered `forgotten`.
7. One broker is served at a time (common/standby.py). To another one the worker registers anew, with all it holds.
8. A large body comes in parts: the worker wants up to PARTS_MAX of them at once, asks again for what does not come in
   time, and gives the lease up when it has asked WANTS_MAX times for one. In time is within twice what parts took
   lately, and each time twice as long: parts that only wait on a slow line must not be sent again and again, which
   would leave it ever less room for what is new. A part counts among those until the engine has taken it, so that a
   lease holds no more of its body than so many, whatever its size.
9. A worker that drains takes nothing new, lets finish what runs, and leaves when its buffers have been released.

Theory of operation
`handle` takes a message, `feed` and its kin what an engine does, `tick` the time; each returns the effects the shell
carries out. `pump` offers frames to the socket until one is refused. The shell reads the engine line by line:

    go_on = session.feed(lease, data, now); effects = session.pump(socket.offer, now)

so a line leaves in the turn of the event loop that read it. Leases that have something to send stand in one queue and
take turns, a frame each; who is in it is decided in one place, `_queue`.

A lease's states, moved by `_move` only:

    POSTED ──> STREAMING ──> ENDED ──> DELIVERED ──> DROPPED
       └───────────────────────^                        ^ from every state: cancel, release, keep_s, a bound
    POSTED      the request is with the engine, no head yet       takes a slot
    STREAMING   a 2xx head came; events may follow                takes a slot
    ENDED       the terminal is decided, not yet sent
    DELIVERED   the terminal was handed to the socket; kept for replays
    DROPPED     forgotten: in no container
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice, takewhile
from typing import Any, Final

import msgspec

from common import protocol
from common.errors import Code
from common.ollama import NDJSON, SSE, UNREADABLE, document, last_line
from common.protocol import (
    BESIDE_MAX,
    BODY_BYTES_MAX,
    CHUNK_BYTES_MAX,
    COUNT_MAX,
    HEARTBEAT_INTERVAL_S,
    HEARTBEATS_MISSED_MAX,
    OPERATION,
    PART_BYTES_MAX,
    PARTS_MAX,
    Chunk,
    Claim,
    End,
    Engine,
    Failed,
    Forgotten,
    Message,
    Refused,
    Started,
    Stats,
    Want,
    encode,
)
from common.standby import Brokers

EVENT_BYTES_MAX: Final = BODY_BYTES_MAX
"""One event must fit into one frame."""
EVENT_OVERHEAD_BYTES: Final = 48
"""What an event costs in memory beside its own bytes, so that a flood of tiny lines is bounded too."""
LEASE_OVERHEAD_BYTES: Final = 2048
"""The same for a lease."""
TRIM_FRACTION: Final = 8
"""At its bound a buffer is cut by an eighth, so that cutting is rare."""
COUNTED_MAX: Final = 8
"""Lines from the end on which the counts of SSE are looked for."""
FRAMES_PER_PUMP_MAX: Final = 64
"""After a long silence of the broker there may be much to send: heartbeats and other leases must get their turn."""
NOTES_MAX: Final = 1000
"""Answers that wait for the socket. Beyond it they are dropped and the worker registers anew, which says it all."""
PART_PATIENCE_S: Final = 1.0
PART_PATIENCE_S_MAX: Final = 30.0
"""A part of a body is waited for so long at least, and at most, before it is asked for again the first time …"""
WANTS_MAX: Final = 5
"""… and it is asked for so many times in all; while there is no broker nothing is asked."""
PATIENCE_KEPT: Final = 0.9
"""Of a patience that turned out to be too long, with every part that comes."""
ERROR_TEXT_MAX: Final = 2000
ASKED_WRONGLY: Final = ('option "', "invalid format:")
"""How the 500 begins with which Ollama answers a request that no engine could serve (handleScheduleError, FromMap)."""


class LeaseState(Enum):
    POSTED = auto()
    STREAMING = auto()
    ENDED = auto()
    DELIVERED = auto()
    DROPPED = auto()


_MOVES: Final = {
    LeaseState.POSTED: {LeaseState.STREAMING, LeaseState.ENDED, LeaseState.DROPPED},
    LeaseState.STREAMING: {LeaseState.ENDED, LeaseState.DROPPED},
    LeaseState.ENDED: {LeaseState.DELIVERED, LeaseState.DROPPED},
    LeaseState.DELIVERED: {LeaseState.DROPPED},
    LeaseState.DROPPED: set(),
}
_AT_ENGINE: Final = {LeaseState.POSTED, LeaseState.STREAMING}


@dataclass(slots=True)
class _Replay:
    """Events `next` … `until`-1 are to be sent again, up to `bytes_left` bytes of them, and `started` first."""

    next: int
    until: int
    bytes_left: int
    started: bool


@dataclass(slots=True)
class _Asked:
    """A part that is to come. It was asked for `times` times, first at `since` and last `at`; None: it is to be now."""

    size: int
    since: float = 0.0
    at: float | None = None
    times: int = 0


@dataclass(slots=True)
class _Upload:
    """A body of `size` bytes that comes in parts, on its way to the engine.

    Those below `frontier` were asked for: they are `asked`, or `came` and wait for one before them, or are given to the
    engine in order. Of these it has not taken `given` parts; the next begins at `next`.
    """

    size: int
    next: int = 0
    frontier: int = 0
    given: int = 0
    asked: dict[int, _Asked] = field(default_factory=dict)
    came: dict[int, bytes] = field(default_factory=dict, repr=False)

    @property
    def due(self) -> bool:
        """Whether something is to be asked for."""
        return any(asked.at is None for asked in self.asked.values())

    def to_ask_again(self, patience_s: float) -> Iterable[tuple[float, int, _Asked]]:
        """When parts are to be asked for again, where they begin, and they."""
        for offset, asked in self.asked.items():
            if asked.at is not None:
                yield asked.at + patience_s * 2 ** (asked.times - 1), offset, asked

    @property
    def under_way(self) -> int:
        """Parts that are to come, and those that the engine has not taken."""
        return len(self.asked) + len(self.came) + self.given


@dataclass(slots=True, eq=False)
class Lease:
    """One attempt of one request. `events[i]` has seq `base + i`; `sent` is the next seq that was never sent.

    `body` is kept for a request that can be resumed: the gateway that it is resumed through needs it to continue it.
    `upload` is the body if it comes in parts, as long as the engine works for it.
    """

    rid: bytes
    attempt: int
    engine: str
    digest: str
    model: str
    method: str
    path: str
    client: str
    ref: str
    grace_ms: int
    body: bytes
    base: int
    sent: int
    heard_at: float
    upload: _Upload | None = None
    state: LeaseState = LeaseState.POSTED
    story: list[tuple[float, LeaseState]] = field(default_factory=list)
    by_lines: bool = False
    flowing: bool = False
    paused: bool = False
    queued: bool = False
    started: Started | None = None
    started_sent: bool = False
    events: list[bytes] = field(default_factory=list, repr=False)
    last: bytes = b""
    partial: bytearray = field(default_factory=bytearray, repr=False)
    size_bytes: int = 0
    unsent_bytes: int = 0
    replay: _Replay | None = None
    terminal: End | Failed | None = None
    terminal_payload: bytes = b""
    keep_until: float = 0.0

    @property
    def top(self) -> int:
        """The seq of the next event to come: so many exist."""
        return self.base + len(self.events)

    @property
    def at_engine(self) -> bool:
        """Whether the engine works for it: it takes a slot."""
        return self.state in _AT_ENGINE

    @property
    def has_more(self) -> bool:
        """Whether anything waits to be sent."""
        return (
            self.sent < self.base + len(self.events)
            or self.replay is not None
            or (self.started is not None and not self.started_sent)
            or self.state is LeaseState.ENDED
            or (self.upload is not None and self.upload.due)
        )


# Effects --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Post:
    """Post the body to the lease's engine and feed back what comes; with `prior` events, continue them.

    With `parted_bytes` the body is not here, but so long: it follows in `Give`s.
    """

    lease: Lease
    body: bytes
    prior: tuple[bytes, ...] = ()
    parted_bytes: int = 0


@dataclass(slots=True, frozen=True)
class Give:
    """Post the next part of the lease's body, and say when the engine has `taken` it."""

    lease: Lease
    part: bytes


@dataclass(slots=True, frozen=True)
class Close:
    """Close the lease's HTTP stream now: the engine stops."""

    lease: Lease


@dataclass(slots=True, frozen=True)
class Resume:
    """The lease's buffer has room again: read on."""

    lease: Lease


@dataclass(slots=True, frozen=True)
class Joined:
    """The broker confirmed the registration."""

    registration: int


@dataclass(slots=True, frozen=True)
class Served:
    """Another broker is served from now on, by its index in the list."""

    broker: int


@dataclass(slots=True, frozen=True)
class Probe:
    """Ask the other brokers for a sign of life: send each a `probe`."""


@dataclass(slots=True, frozen=True)
class Drained:
    """An operator drained this worker (`on`) or resumed it: keep it in mind beyond a restart."""

    on: bool


@dataclass(slots=True, frozen=True)
class Superseded:
    """A newer process has this worker's name: end."""


@dataclass(slots=True, frozen=True)
class Report:
    """Something an operator should read."""

    event: str
    facts: dict[str, object]


Effect = Post | Give | Close | Resume | Joined | Served | Probe | Drained | Superseded | Report
Offer = Callable[[bytes], bool]


@dataclass(slots=True, frozen=True, kw_only=True)
class Limits:
    """The bounds of `WorkerSettings`, seconds and bytes."""

    first_byte_s: float = 600.0
    silence_s: float = 120.0
    lease_bytes_max: int = 32 * 2**20
    worker_bytes_max: int = 256 * 2**20
    orphan_s: float = 60.0
    keep_s: float = 90.0
    part_bytes: int = PART_BYTES_MAX


class Session:
    """All leases of one worker process and its registration with the broker it serves."""

    def __init__(
        self, name: str, epoch: str, limits: Limits, now: float, *, brokers: int = 1, labels: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.labels = labels
        self.epoch = epoch
        self.limits = limits
        self.engines: tuple[Engine, ...] = ()
        self.registration: int | None = None
        self.draining = False
        self.blocked = False
        """The last `pump` left frames behind: pump again soon."""
        self.left = False
        """`bye` was sent after everything else."""
        self._brokers = Brokers(brokers, now)
        self._leases: dict[bytes, Lease] = {}
        self._ended: dict[bytes, Lease] = {}  # ENDED and DELIVERED, in the order they ended
        self._busy: Counter[tuple[str, str]] = Counter()  # leases at the engine by (engine url, digest)
        self._slots: dict[tuple[str, str], int] = {}
        self._up: dict[str, bool] = {}
        self._models_max: dict[str, int] = {}
        self._ready: deque[Lease] = deque()
        self._paused: dict[bytes, Lease] = {}
        self._bytes = 0
        self._patience_s = PART_PATIENCE_S
        self._notes: deque[bytes] = deque()
        self._effects: list[Effect] = []
        self._heard_at = now
        self._lost = False
        self._asked_at: float | None = None  # when the register went out that nothing has confirmed
        self._register_due = True
        self._state_due = False
        self._beat_due = False
        self._beat_at = now + HEARTBEAT_INTERVAL_S
        self._retiring = False
        self._leaving = False

    # The broker's messages --------------------------------------------------------------------------------------------

    def handle(self, message: protocol.ToWorker, payload: bytes, now: float, *, broker: int = 0) -> Sequence[Effect]:
        """Take a message of a broker."""
        self._brokers.hear(broker, now)
        if broker != self._brokers.active:
            return ()
        self._heard_at = now
        self._lost = False
        match message:
            case protocol.Assign():
                self._assign(message, payload, now)
            case protocol.Cancel():
                lease = self._leases.get(message.rid)
                if lease is not None and message.attempt in (0, lease.attempt):
                    self._drop(lease, now)
            case protocol.Release():
                lease = self._leases.get(message.rid)
                if lease is not None:
                    self._drop(lease, now)
            case protocol.Replay():
                self._replay(message, now)
            case protocol.Part():
                self._part(message, payload, now)
            case protocol.Registered():
                self.registration, self._asked_at = message.registration, None
                self._effects.append(Joined(message.registration))
            case protocol.Who():
                # Every message the broker did not expect is answered `who`: one register answers them all.
                self.registration = None
                if self._asked_at is None or now - self._asked_at >= HEARTBEAT_INTERVAL_S:
                    self._register_due = True
            case protocol.Drain():
                self.draining, self._state_due = message.on or self._retiring, True
                self._effects.append(Drained(message.on))
            case protocol.Superseded():
                self._effects.append(Superseded())
            case protocol.ModelOp():
                self._note(protocol.Error(code=Code.UNKNOWN_TYPE, message="this worker does not manage models"))
            case protocol.Error():
                self._effects.append(Report("the broker did not understand", {"error": message.message}))
        return self._taken()  # a `beat` was a sign of life, taken above

    def misunderstood(self, text: str) -> None:
        """The broker sent what is no message: tell it."""
        self._note(protocol.Error(code=Code.INVALID_MESSAGE, message=text))

    def set_engines(self, engines: tuple[Engine, ...]) -> bool:
        """Take what the engines are now; True if that is news, which the broker is then told."""
        if engines == self.engines:
            return False
        self.engines = engines
        self._up = {engine.url: engine.up for engine in engines}
        self._models_max = {engine.url: engine.models_max for engine in engines if engine.models_max}
        self._slots = {(engine.url, model.digest): model.slots for engine in engines for model in engine.models}
        self._state_due = True
        return True

    def heard_at(self, broker: int) -> float:
        """When that broker was last heard of; -inf if never."""
        return self._brokers.heard_at(broker)

    @property
    def leases(self) -> int:
        """Requests it works on or keeps events of."""
        return len(self._leases)

    def drain(self, *, for_good: bool = False) -> None:
        """Take nothing more, until an operator says otherwise; `for_good`: the process ends when no lease is left."""
        self.draining = self._state_due = True
        self._retiring = self._retiring or for_good

    def shutdown(self, now: float) -> Sequence[Effect]:
        """Take nothing more and fail what runs; once `pump` has sent all, and then `bye`, `left` is true."""
        self.drain(for_good=True)
        self._leaving = True
        for lease in list(self._leases.values()):
            if lease.at_engine:
                self._fail(lease, Code.SHUTTING_DOWN, "the worker is shutting down", now, retryable=True)
                self._effects.append(Close(lease))
        return self._taken()

    def _assign(self, message: protocol.Assign, body: bytes, now: float) -> None:
        held = self._leases.get(message.rid)
        if held is not None and held.attempt == message.attempt:
            return
        reason = self._objection(message, held, now)
        if reason:
            self._note(Refused(rid=message.rid, attempt=message.attempt, reason=reason))
            return
        prior: list[bytes] = []
        if message.start:
            body, delivered = body[: message.body_bytes], body[message.body_bytes :]
            prior = [line + b"\n" for line in delivered.split(b"\n")[:-1]]
            if len(prior) != message.start:
                # Refused it would be assigned again, and again.
                text = f"a continuation of {message.start} events came with {len(prior)}"
                failed = Failed(
                    rid=message.rid, attempt=message.attempt, code=Code.WORKER_LOST, message=text, seq=message.start
                )
                self._note(failed)
                return
        kept = body if message.grace_ms else b""
        lease = Lease(
            rid=message.rid,
            attempt=message.attempt,
            engine=message.engine,
            digest=message.digest,
            model=message.model,
            method=message.method,
            path=message.path,
            client=message.client,
            ref=message.ref,
            grace_ms=message.grace_ms,
            body=kept,
            base=0,
            sent=message.start,
            heard_at=now,
            upload=_Upload(message.parted_bytes) if message.parted_bytes else None,
            events=prior,
            size_bytes=LEASE_OVERHEAD_BYTES + len(kept) + sum(map(len, prior)) + EVENT_OVERHEAD_BYTES * len(prior),
            story=[(now, LeaseState.POSTED)],
        )
        self._leases[lease.rid] = lease
        self._busy[lease.engine, lease.digest] += 1
        self._bytes += lease.size_bytes
        self._effects.append(Post(lease, body, tuple(prior), message.parted_bytes))
        if lease.upload is not None:
            self._want(lease, lease.upload)

    def _objection(self, message: protocol.Assign, held: Lease | None, now: float) -> str:
        """Why an assign can't be carried out, or nothing."""
        if message.registration != self.registration:
            return "the assign belongs to an earlier registration"
        if held is not None:
            if held.attempt > message.attempt:
                return "a later attempt of this request is here"
            self._drop(held, now)  # the broker has given it up
        if self.draining:
            return "the worker is draining"
        if message.engine not in self._up:
            return f"there is no engine {message.engine}"
        if not self._up[message.engine]:
            return f"the engine {message.engine} does not answer"
        slot = message.engine, message.digest
        if message.digest in BESIDE_MAX:
            most = BESIDE_MAX[message.digest]
            return "" if self._busy[slot] < most else f"{most} requests of this kind run on {message.engine}"
        if slot not in self._slots:
            return f"the engine {message.engine} does not have {message.model}"
        if self._busy[slot] >= self._slots[slot]:
            return f"all slots for {message.model} on {message.engine} are taken"
        busy = {digest for engine, digest in self._busy if engine == message.engine and digest not in BESIDE_MAX}
        if message.digest not in busy and len(busy) >= self._models_max.get(message.engine, len(busy) + 1):
            return f"{message.engine} would have to evict a busy model for {message.model}"
        return ""

    def _replay(self, message: protocol.Replay, now: float) -> None:
        lease = self._leases.get(message.rid)
        base = lease.base if lease is not None and lease.attempt == message.attempt else COUNT_MAX
        if lease is None or base > message.start:
            self._note(Forgotten(rid=message.rid, attempt=message.attempt, base=base))
            return
        lease.replay = _Replay(message.start, lease.sent, message.bytes_max, started=message.start == 0)
        if lease.keep_until:
            self._keep(lease, now)
        self._queue(lease)

    def _part(self, message: protocol.Part, payload: bytes, now: float) -> None:
        """A part of a body came: give the engine what is next."""
        lease = self._leases.get(message.rid)
        upload = lease.upload if lease is not None and lease.attempt == message.attempt else None
        asked = upload.asked.get(message.offset) if upload is not None else None
        if lease is None or upload is None or asked is None or not asked.times or asked.size != len(payload):
            return  # it came twice, too late, or is not what was asked for
        patience_s = max(2 * (now - asked.since), PATIENCE_KEPT * self._patience_s, PART_PATIENCE_S)
        self._patience_s = min(patience_s, PART_PATIENCE_S_MAX)
        del upload.asked[message.offset]
        upload.came[message.offset] = payload
        while (part := upload.came.pop(upload.next, None)) is not None:
            upload.next += len(part)
            upload.given += 1
            self._effects.append(Give(lease, part))

    def taken(self, lease: Lease, now: float) -> None:
        """The engine has taken a part of the lease's body: it may want another."""
        if lease.upload is not None:
            lease.heard_at = now
            lease.upload.given -= 1
            self._want(lease, lease.upload)

    def _want(self, lease: Lease, upload: _Upload) -> None:
        """Ask for as many parts as may be on their way."""
        while upload.frontier < upload.size and upload.under_way < PARTS_MAX:
            size = min(self.limits.part_bytes, upload.size - upload.frontier)
            upload.asked[upload.frontier] = _Asked(size)
            upload.frontier += size
            self._queue(lease)

    def _ask_again(self, lease: Lease, upload: _Upload, now: float) -> None:
        """For the parts that did not come; or give the lease up."""
        for at, offset, asked in upload.to_ask_again(self._patience_s):
            if now < at:
                continue
            if asked.times >= WANTS_MAX:
                text = f"the request's bytes from {offset} on were asked for {WANTS_MAX} times and did not come"
                self._fail(lease, Code.WORKER_LOST, text, now, retryable=True)
                self._effects.append(Close(lease))
                return
            asked.at = None
            self._queue(lease)

    def _keep(self, lease: Lease, now: float) -> None:
        """From now on for `keep_s`; the one that is kept longest stands last."""
        lease.keep_until = now + self.limits.keep_s
        if self._ended.pop(lease.rid, None) is not None:
            self._ended[lease.rid] = lease

    # What an engine does ----------------------------------------------------------------------------------------------

    def head(self, lease: Lease, status: int, content_type: str, now: float) -> None:
        """A 2xx head came."""
        if lease.state is not LeaseState.POSTED:
            return
        self._move(lease, LeaseState.STREAMING, now)
        lease.by_lines = content_type.partition(";")[0].strip() in (NDJSON, SSE)
        lease.started = Started(rid=lease.rid, attempt=lease.attempt, status=status, content_type=content_type)
        self._queue(lease)

    def rejected(self, lease: Lease, status: int, body: bytes, now: float) -> None:
        """The engine answered with an error; `body` is its answer. A 4xx is an answer, not a failure to retry."""
        if lease.state is not LeaseState.POSTED:
            return
        text = _error_text(body) or f"the engine {lease.engine} answered {status}"
        code, retryable = Code.BACKEND_ERROR, True
        if status == 404:
            code, retryable = Code.MODEL_NOT_FOUND, False
        elif (400 <= status < 500 and status != 429) or (status == 500 and text.startswith(ASKED_WRONGLY)):
            code, retryable = Code.INVALID_MESSAGE, False
        self._fail(lease, code, text, now, retryable=retryable, status=status, payload=body)

    def feed(self, lease: Lease, data: bytes, now: float) -> bool:
        """A piece of the body came. False: the lease wants no more, close the stream."""
        if lease.state is not LeaseState.STREAMING:
            return False
        lease.heard_at = now
        lease.flowing = True
        end = data.rfind(b"\n") + 1 if lease.by_lines else 0
        if end:
            head = data if end == len(data) else data[:end]
            if lease.partial:
                lease.partial += head
                head = bytes(lease.partial)
                lease.partial.clear()
            if not self._take_lines(lease, head, now):
                return False
        if end != len(data):
            lease.partial += data[end:]
            if len(lease.partial) > EVENT_BYTES_MAX:
                return self._too_large(lease, now)
        return True

    def eof(self, lease: Lease, now: float) -> None:
        """The body is complete."""
        if lease.state is not LeaseState.STREAMING:
            return
        if lease.partial:
            rest = bytes(lease.partial)
            lease.partial.clear()
            if lease.by_lines:
                # Half a line is no event: a continuation could not be told from it.
                rest = rest + b"\n" if last_line(rest) else b""
            if rest and not self._take(lease, [rest], rest, now):
                return
        final = last_line(lease.last) if lease.by_lines else document(lease.last)
        if lease.by_lines and not (final and final.done):
            text = f"the engine {lease.engine} ended its answer without a last line"
            self._fail(lease, Code.BACKEND_ERROR, text, now, retryable=True)
            return
        if lease.last.startswith(b"data:"):
            # The event that counts comes shortly before the last one.
            counted = (line for line in map(last_line, reversed(lease.events[-COUNTED_MAX:])) if line and line.usage)
            final = next(counted, final)
        stats = final.stats() if final else Stats()
        self._finish(lease, End(rid=lease.rid, attempt=lease.attempt, seq=lease.top, stats=stats), b"", now)

    def cannot_continue(self, lease: Lease, why: str, now: float) -> None:
        """The lease was to be continued, and its engine or what was delivered does not allow it."""
        if lease.at_engine:
            text = f"the stream broke with its host and cannot be continued: {why}; what has arrived is all there is"
            self._fail(lease, Code.WORKER_LOST, text, now, retryable=False)

    def broke(self, lease: Lease, error: str, now: float) -> None:
        """The connection to the engine could not be made, or broke."""
        if lease.at_engine:
            self._fail(lease, Code.BACKEND_ERROR, f"the engine {lease.engine}: {error}", now, retryable=True)

    def _take_lines(self, lease: Lease, head: bytes, now: float) -> bool:
        if head.find(b"\n") == len(head) - 1:
            lines = [head]
        else:
            lines = [line + b"\n" for line in head.split(b"\n")]
            lines.pop()
        return self._take(lease, lines, head, now)

    def _take(self, lease: Lease, events: list[bytes], data: bytes, now: float) -> bool:
        """Append events, which are `data` together; False if they end the lease."""
        size = len(data)
        if size > EVENT_BYTES_MAX and max(map(len, events)) > EVENT_BYTES_MAX:
            return self._too_large(lease, now)
        refusal = b""
        if _ERROR_PREFIX in data:  # seldom, and then perhaps within a text
            refusal = next(filter(_is_error, events), b"")
            if refusal:
                del events[events.index(refusal) :]
                size = sum(map(len, events))
        if events:
            if events[-1] != b"\n":
                lease.last = events[-1]
            elif len(events) > 1:
                lease.last = events[-2]  # a blank line ends an event of SSE
            lease.events += events
            size += EVENT_OVERHEAD_BYTES * len(events)
            lease.size_bytes += size
            lease.unsent_bytes += size
            self._bytes += size
            self._queue(lease)
            self._bound(lease, now)
        if refusal:
            text = _error_text(refusal) or "the engine failed"
            self._fail(lease, Code.BACKEND_ERROR, text, now, retryable=True, payload=refusal)
        return not refusal

    def _too_large(self, lease: Lease, now: float) -> bool:
        text = f"the engine sent an event of more than {EVENT_BYTES_MAX} bytes"
        self._fail(lease, Code.TOO_LARGE, text, now, retryable=False)
        return False

    def _fail(
        self,
        lease: Lease,
        code: Code,
        text: str,
        now: float,
        *,
        retryable: bool,
        status: int = 0,
        payload: bytes = b"",
    ) -> None:
        failed = Failed(
            rid=lease.rid,
            attempt=lease.attempt,
            code=code,
            message=text[:ERROR_TEXT_MAX],
            seq=lease.top,
            status=status,
            retryable=retryable,
        )
        self._finish(lease, failed, payload, now)

    def _finish(self, lease: Lease, terminal: End | Failed, payload: bytes, now: float) -> None:
        lease.terminal, lease.terminal_payload = terminal, payload
        lease.size_bytes += len(payload)
        self._bytes += len(payload)
        lease.partial.clear()
        self._keep(lease, now)
        self._move(lease, LeaseState.ENDED, now)
        self._queue(lease)

    # States and bounds ------------------------------------------------------------------------------------------------

    def _move(self, lease: Lease, state: LeaseState, now: float) -> None:
        """The only place where a lease changes state, and with it its containers."""
        if state not in _MOVES[lease.state]:
            story = ", ".join(f"{at:.3f} {was.name}" for at, was in lease.story)
            raise RuntimeError(
                f"lease {lease.rid.hex()} attempt {lease.attempt} cannot go to {state.name}; its story: {story}"
            )
        if lease.at_engine and state not in _AT_ENGINE:
            slot = lease.engine, lease.digest
            self._busy[slot] -= 1
            if not self._busy[slot]:
                del self._busy[slot]
            lease.paused = False
            lease.upload = None
            self._paused.pop(lease.rid, None)
        lease.state = state
        lease.story.append((now, state))
        if state is LeaseState.ENDED:
            self._ended[lease.rid] = lease
        elif state is LeaseState.DROPPED:
            self._ended.pop(lease.rid, None)
            del self._leases[lease.rid]
            if lease.queued:
                lease.queued = False
                self._ready.remove(lease)
            self._bytes -= lease.size_bytes

    def _drop(self, lease: Lease, now: float) -> None:
        if lease.at_engine:
            self._effects.append(Close(lease))
        self._move(lease, LeaseState.DROPPED, now)

    def _queue(self, lease: Lease) -> None:
        if not lease.queued:
            lease.queued = True
            self._ready.append(lease)

    def _bound(self, lease: Lease, now: float) -> None:
        """After events came: keep the bounds, by forgetting what may be forgotten or else by not reading on."""
        limits = self.limits
        if lease.size_bytes > limits.lease_bytes_max:
            self._trim(lease, lease.size_bytes - limits.lease_bytes_max + limits.lease_bytes_max // TRIM_FRACTION)
        if self._bytes > limits.worker_bytes_max:
            self._trim_all(now)
        if not lease.paused and not self._has_room(lease):
            lease.paused = True
            self._paused[lease.rid] = lease

    def _has_room(self, lease: Lease) -> bool:
        return lease.unsent_bytes < self.limits.lease_bytes_max and self._bytes < self.limits.worker_bytes_max

    def _trim_all(self, now: float) -> None:
        target = self.limits.worker_bytes_max - self.limits.worker_bytes_max // TRIM_FRACTION
        for lease in [lease for lease in self._ended.values() if not lease.has_more]:
            if self._bytes <= target:
                return
            self._move(lease, LeaseState.DROPPED, now)
        for lease in self._leases.values():
            if self._bytes <= target:
                return
            self._trim(lease, self._bytes - target)

    def _trim(self, lease: Lease, excess: int) -> None:
        """Forget the oldest events that were sent and are not being sent again, `excess` bytes if there are so many."""
        keep = lease.sent if lease.replay is None else min(lease.sent, lease.replay.next)
        count = freed = 0
        while freed < excess and lease.base + count < keep:
            freed += len(lease.events[count]) + EVENT_OVERHEAD_BYTES
            count += 1
        del lease.events[:count]
        lease.base += count
        lease.size_bytes -= freed
        self._bytes -= freed

    # Sending ----------------------------------------------------------------------------------------------------------

    def pump(self, offer: Offer, now: float) -> Sequence[Effect]:
        """Offer frames until one is refused, nothing is left or others must get their turn; then `blocked` says so."""
        self.blocked = not (self._send_notes(offer, now) and self._send_leases(offer, now) and self._send_bye(offer))
        if self._paused:
            self._resume(now)
        return self._taken()

    def _send_notes(self, offer: Offer, now: float) -> bool:
        """What is said for the worker as a whole. False: refused."""
        if self._register_due:
            if not offer(encode(self._register())):
                return False
            self._register_due = self._state_due = self._beat_due = False
            self._asked_at = now
        if self.registration is None:
            return True
        if self._state_due:
            if not offer(encode(protocol.State(engines=self.engines, draining=self.draining))):
                return False
            self._state_due = False
        if self._beat_due:
            if not offer(encode(protocol.Beat())):
                return False
            self._beat_due = False
        while self._notes:
            if not offer(self._notes[0]):
                return False
            self._notes.popleft()
        return True

    def _register(self) -> protocol.Register:
        claims = tuple(
            Claim(
                rid=lease.rid,
                attempt=lease.attempt,
                engine=lease.engine,
                digest=lease.digest,
                client=lease.client,
                ref=lease.ref,
                model=lease.model,
                path=lease.path,
                method=lease.method,
                grace_ms=lease.grace_ms,
                top=lease.top,
                ended=not lease.at_engine,
            )
            for lease in self._leases.values()
        )
        return protocol.Register(
            name=self.name,
            epoch=self.epoch,
            engines=self.engines,
            leases=claims,
            draining=self.draining,
            labels=self.labels,
        )

    def _send_bye(self, offer: Offer) -> bool:
        if self._leaving and self.registration is not None:
            self.left = offer(encode(protocol.Bye()))
            if self.left:
                self.registration = None
            return self.left
        return True

    def _send_leases(self, offer: Offer, now: float) -> bool:
        """What leases have to say, a frame each in turn. False: refused, or more than fits in one turn."""
        if self.registration is None:
            return True
        ready = self._ready
        for _ in range(FRAMES_PER_PUMP_MAX):
            if not ready:
                return True
            lease = ready[0]
            if not self._send_next(lease, offer, now):
                return False
            if lease.has_more:
                ready.rotate(-1)
            else:
                lease.queued = False
                ready.popleft()
        return not ready

    def _send_next(self, lease: Lease, offer: Offer, now: float) -> bool:
        """Offer the one frame that is next in the lease's order. False: refused."""
        if lease.replay is not None:
            return self._send_replay(lease, lease.replay, offer)
        if lease.started is not None and not lease.started_sent:
            lease.started_sent = offer(encode(lease.started))
            return lease.started_sent
        if lease.sent < lease.top:
            count, payload = self._cut(lease, lease.sent, lease.top, CHUNK_BYTES_MAX)
            if not offer(
                encode(Chunk(rid=lease.rid, attempt=lease.attempt, seq=lease.sent, n=count), payload),
            ):
                return False
            lease.sent += count
            lease.unsent_bytes -= len(payload) + EVENT_OVERHEAD_BYTES * count
            return True
        if lease.upload is not None:
            return self._send_wants(lease, lease.upload, offer, now)
        if not self._send_terminal(lease, offer):
            return False
        self._move(lease, LeaseState.DELIVERED, now)
        return True

    def _send_wants(self, lease: Lease, upload: _Upload, offer: Offer, now: float) -> bool:
        for offset, asked in upload.asked.items():
            if asked.at is None:
                if not offer(encode(Want(rid=lease.rid, attempt=lease.attempt, offset=offset, size=asked.size))):
                    return False
                asked.since = asked.since if asked.times else now
                asked.at, asked.times = now, asked.times + 1
        return True

    def _send_replay(self, lease: Lease, replay: _Replay, offer: Offer) -> bool:
        if replay.started and lease.started_sent and lease.started is not None:
            if not offer(encode(lease.started, lease.body)):
                return False
            replay.started = False
            return True
        if replay.next < replay.until and replay.bytes_left > 0:
            bytes_max = min(CHUNK_BYTES_MAX, replay.bytes_left)
            count, payload = self._cut(lease, replay.next, replay.until, bytes_max)
            if not offer(encode(Chunk(rid=lease.rid, attempt=lease.attempt, seq=replay.next, n=count), payload)):
                return False
            replay.next += count
            replay.bytes_left -= len(payload)
            return True
        if lease.state is LeaseState.DELIVERED and replay.next >= lease.top and not self._send_terminal(lease, offer):
            return False
        lease.replay = None
        return True

    def _send_terminal(self, lease: Lease, offer: Offer) -> bool:
        assert lease.terminal is not None  # an ENDED lease has one
        return offer(encode(lease.terminal, lease.terminal_payload))

    def _cut(self, lease: Lease, start: int, stop: int, bytes_max: int) -> tuple[int, bytes]:
        """How many events from seq `start` fit into `bytes_max`, one at least, and they."""
        events, first, last = lease.events, start - lease.base, stop - lease.base
        if last - first == 1:
            return 1, events[first]
        size, index = len(events[first]), first + 1
        while index < last:
            size += len(events[index])
            if size > bytes_max:
                break
            index += 1
        return index - first, b"".join(events[first:index])

    def _resume(self, now: float) -> None:
        if self._bytes >= self.limits.worker_bytes_max:
            self._trim_all(now)
        for lease in [lease for lease in self._paused.values() if self._has_room(lease)]:
            lease.paused = False
            lease.heard_at = now  # the silence was ours
            del self._paused[lease.rid]
            self._effects.append(Resume(lease))

    def _note(self, message: Message) -> None:
        if len(self._notes) >= NOTES_MAX:
            self._notes.clear()
            self._register_due = True
        self._notes.append(encode(message))

    # Time -------------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """When `tick` has something to do, if nothing happens before; it may find that there is nothing."""
        deadlines = [self._beat_at]
        if not self._lost:
            deadlines.append(self._lost_at)
        elif self._leases:
            deadlines.append(self._heard_at + self.limits.orphan_s)
        deadlines += [self._watchdog_at(lease) for lease in self._leases.values() if lease.at_engine]
        for lease in self._leases.values():
            if lease.upload is not None:
                deadlines += [at for at, *_ in lease.upload.to_ask_again(self._patience_s)]
        deadlines += [lease.keep_until for lease in islice(self._ended.values(), 1)]
        return min(deadlines)

    def tick(self, now: float) -> Sequence[Effect]:
        """Do what is due."""
        if self._brokers.choose(now):
            self.registration = self._asked_at = None
            self._heard_at, self._lost = now, False
            self._effects.append(Served(self._brokers.active))
            self._beat_at = now
        if not self._lost and now >= self._lost_at:
            self._lost = True
            self.registration = None
            self._effects.append(Report("the broker does not answer", {"silent_s": round(now - self._heard_at, 1)}))
        if self._lost and self._leases and now >= self._heard_at + self.limits.orphan_s:
            facts: dict[str, object] = {"leases": len(self._leases), "silent_s": round(now - self._heard_at, 1)}
            self._effects.append(Report("no broker: leases cancelled", facts))
            for lease in list(self._leases.values()):
                self._drop(lease, now)
        if now >= self._beat_at:
            self._beat_at = now + HEARTBEAT_INTERVAL_S
            self._effects.append(Probe())
            if self.registration is None:
                self._register_due = not self.left
            else:
                self._beat_due = True
        for lease in list(self._leases.values()):
            if lease.at_engine and now >= self._watchdog_at(lease):
                silent = self._watchdog_at(lease) - lease.heard_at
                text = f"the engine {lease.engine} said nothing for {silent:g} s"
                self._fail(lease, Code.BACKEND_ERROR, text, now, retryable=True)
                self._effects.append(Close(lease))
            if lease.upload is not None:
                self._ask_again(lease, lease.upload, now)
        for lease in list(takewhile(lambda lease: now >= lease.keep_until, self._ended.values())):
            self._drop(lease, now)
        return self._taken()

    @property
    def _lost_at(self) -> float:
        return self._heard_at + HEARTBEATS_MISSED_MAX * HEARTBEAT_INTERVAL_S

    def _watchdog_at(self, lease: Lease) -> float:
        if lease.paused:
            return float("inf")  # the silence is ours
        # An operation may be silent for long: to check what was pulled takes minutes.
        flowing = lease.flowing and lease.digest != OPERATION
        return lease.heard_at + (self.limits.silence_s if flowing else self.limits.first_byte_s)

    def _taken(self) -> Sequence[Effect]:
        if not self._effects:
            return ()
        effects, self._effects = self._effects, []
        return effects


# What is read of an engine's answers ----------------------------------------------------------------------------------

_ERROR_PREFIX: Final = b'{"error"'


class _Error(msgspec.Struct):
    """`{"error": "text"}` of Ollama, `{"error": {"message": "text"}}` of its OpenAI side."""

    error: Any = None


_error_decoder = msgspec.json.Decoder(_Error)


def _is_error(line: bytes) -> bool:
    return line.startswith(_ERROR_PREFIX)


def _error_text(body: bytes) -> str:
    try:
        error = _error_decoder.decode(body).error
    except UNREADABLE:
        return ""
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) else ""
