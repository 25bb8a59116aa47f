"""A request as its gateway sees it: which events it has, what is missing, and when it is over.

Rules
-----
- Only the contiguous next event of the current attempt goes on to the client. Anything earlier is a repeat and is
  dropped; anything later is a gap and is asked for with `replay`, one at a time.
- A terminal counts only when the events before it have all been passed on; till then it is kept and the gap repaired.
  What the broker ended itself (cancelled, deadline) counts at once: there is nothing left to replay.
- `ack` follows the terminal, always, so that the worker can forget the request.
- While the client reads too slowly (`pause`), events are let go; `unpause` asks for them again. The worker has them.

A stream is pure: it is told messages and the time, and answers with `Output`s, which the shell carries out in order.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from common.errors import Code
from common.protocol import (
    Accepted,
    Ack,
    Cancel,
    Chunk,
    End,
    Failed,
    Gap,
    Leased,
    Lost,
    Message,
    Queued,
    Replay,
    Started,
    Submit,
    ordinal_of,
)

REPLAY_PATIENCE_S: Final = 1.0
"""A replay that brought nothing for so long is asked for again."""


class Phase(Enum):
    SUBMITTED = "submitted"
    WAITING = "waiting"
    RUNNING = "running"
    OVER = "over"


@dataclass(slots=True)
class ToBroker:
    """Send this to the broker."""

    message: Message
    payload: bytes = b""


@dataclass(slots=True)
class Waits:
    """The request waits in the queue."""

    position: int
    eta_ms: int | None


@dataclass(slots=True)
class Begins:
    """The engine answered; events follow."""

    status: int
    content_type: str


@dataclass(slots=True)
class Events:
    """New events, in order; `payload` is `n` lines of which the first `skip` are known already."""

    seq: int
    n: int
    payload: bytes
    skip: int = 0

    def lines(self) -> list[bytes]:
        """The new lines."""
        return self.payload.split(b"\n", self.n)[self.skip : self.n] if self.n > 1 else [self.payload]


@dataclass(slots=True)
class Over:
    """The terminal. `payload` is the engine's own words for a failure, where there are any."""

    terminal: End | Failed
    payload: bytes


Output = ToBroker | Waits | Begins | Events | Over

_AT_ONCE: Final = frozenset({Code.CANCELLED, Code.DEADLINE_EXCEEDED})


class Stream:
    """One request. `now` is monotonic; `*_at` attributes are when things were first seen."""

    def __init__(self, submit: Submit, body: bytes, now: float) -> None:
        self.submit = submit
        self.body = body
        self.phase = Phase.SUBMITTED
        self.attempt = 0
        self.next_seq = 0
        self.worker = ""
        self.submitted_at = now
        self.leased_at: float | None = None
        self.first_event_at: float | None = None
        self._begun = False
        self._paused = False
        self._cancelled: str | None = None
        self._terminal: Over | None = None
        self._replay_asked_at: float | None = None

    @property
    def attempts(self) -> int:
        """How many attempts it took so far."""
        return ordinal_of(self.attempt)

    def submission(self, now: float) -> list[Output]:
        """What to send first, and again after every break with the broker."""
        if self.phase is Phase.OVER:
            return []
        self._replay_asked_at = None
        if self._cancelled is not None:
            return [ToBroker(Cancel(rid=self.submit.rid, attempt=self.attempt, reason=self._cancelled))]
        waited = now - self.submitted_at
        deadline = self.submit.deadline_ms
        message = Submit(
            rid=self.submit.rid,
            client=self.submit.client,
            ref=self.submit.ref,
            model=self.submit.model,
            path=self.submit.path,
            method=self.submit.method,
            priority=self.submit.priority,
            deadline_ms=None if deadline is None else max(0, deadline - int(waited * 1000)),
            waited_ms=int(waited * 1000),
            attempt=self.attempt,
            next_seq=self.next_seq,
        )
        return [ToBroker(message, self.body)]

    def handle(self, message: Message, payload: bytes, now: float) -> list[Output]:
        """Take in a message about this request."""
        if self.phase is Phase.OVER:
            # The terminal crossed our `ack`, or was told again.
            return [ToBroker(Ack(rid=self.submit.rid))] if isinstance(message, End | Failed) else []
        match message:
            case Chunk():
                return self._on_chunk(message, payload, now)
            case Accepted():
                if self.phase is Phase.SUBMITTED:
                    self.phase = Phase.WAITING
            case Queued():
                return [Waits(message.position, message.eta_ms)]
            case Leased():
                if message.attempt >= self.attempt:
                    self.phase, self.attempt, self.worker = Phase.RUNNING, message.attempt, message.worker
                    self.leased_at = now if self.leased_at is None else self.leased_at
            case Started():
                if message.attempt == self.attempt and not self._begun:
                    self._begun = True
                    return [Begins(message.status, message.content_type)]
            case Lost():
                if message.attempt == self.attempt:
                    self.phase = Phase.WAITING
            case Gap():
                if message.attempt == self.attempt:
                    return self._ask_replay(now)
            case End() | Failed():
                return self._on_terminal(message, payload, now)
        return []

    def cancel(self, reason: str) -> list[Output]:
        """Stop the request; it ends with the broker's `failed` CANCELLED, or with whatever comes first."""
        if self.phase is Phase.OVER or self._cancelled is not None:
            return []
        self._cancelled = reason
        return [ToBroker(Cancel(rid=self.submit.rid, attempt=self.attempt, reason=reason))]

    def abandon(self, code: Code, message: str) -> list[Output]:
        """End the request from here: the broker is gone for good."""
        if self.phase is Phase.OVER:
            return []
        failed = Failed(rid=self.submit.rid, attempt=self.attempt, code=code, message=message, seq=self.next_seq)
        return self._finish(Over(failed, b""))

    def pause(self) -> None:
        """The client does not read: let events go, they come again."""
        self._paused = True

    def unpause(self, now: float) -> list[Output]:
        """The client reads again."""
        if not self._paused:
            return []
        self._paused = False
        return [] if self.phase is Phase.OVER else self._ask_replay(now)

    def tick(self, now: float) -> list[Output]:
        """Ask again for a replay that got lost."""
        if self._replay_asked_at is None or now - self._replay_asked_at < REPLAY_PATIENCE_S:
            return []
        self._replay_asked_at = None
        return self._ask_replay(now)

    def _on_chunk(self, chunk: Chunk, payload: bytes, now: float) -> list[Output]:
        if chunk.attempt != self.attempt or self._paused:
            return []
        skip = self.next_seq - chunk.seq
        if skip < 0:
            return self._ask_replay(now)
        if skip >= chunk.n:
            return []
        if self.first_event_at is None:
            self.first_event_at = now
        self._replay_asked_at = None
        self.next_seq = chunk.seq + chunk.n
        out: list[Output] = [Events(chunk.seq + skip, chunk.n, payload, skip)]
        if self._terminal is not None and self._terminal.terminal.seq <= self.next_seq:
            out += self._finish(self._terminal)
        return out

    def _on_terminal(self, terminal: End | Failed, payload: bytes, now: float) -> list[Output]:
        over = Over(terminal, payload)
        at_once = self._cancelled is not None or (isinstance(terminal, Failed) and terminal.code in _AT_ONCE)
        if at_once or terminal.seq <= self.next_seq:
            return self._finish(over)
        self._terminal = over
        return self._ask_replay(now)

    def _ask_replay(self, now: float) -> list[Output]:
        if self._paused or self._replay_asked_at is not None or self._cancelled is not None:
            return []
        self._replay_asked_at = now
        return [ToBroker(Replay(rid=self.submit.rid, attempt=self.attempt, start=self.next_seq))]

    def _finish(self, over: Over) -> list[Output]:
        self.phase = Phase.OVER
        self.body = b""
        self._terminal = self._replay_asked_at = None
        return [over, ToBroker(Ack(rid=self.submit.rid))]
