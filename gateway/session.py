"""A request as its gateway sees it: which events it has, what is missing, and when it is over.

Rules
-----
- Only the contiguous next event of the current attempt goes on to the client. Anything earlier is a repeat and is
  dropped; anything later is a gap and is asked for with `replay`, one at a time, until all that is known to exist has
  come.
- A terminal counts only when the events before it have all been passed on; till then it is kept and the gap repaired.
  What the broker ended itself (cancelled, deadline) counts at once: there is nothing left to replay.
- A failure that may be retried (`resubmit`) is not the end if the request can run again: from the start if nothing has
  arrived, else as a continuation. For that the stream keeps the events it passed on, up to HISTORY_BYTES_MAX; without
  them, or if the job cannot be continued (common/continuation.py), the failure is the terminal.
- A stream whose last line has come is complete, whatever became of its host: a failure after it is an end.
- What was said before a submission counts no more: until the broker has answered it with `accepted`, it may speak of
  what it held before, of an attempt that does not go on from what this stream has.
- `ack` follows the terminal, always, so that the worker can forget the request.
- While the client reads too slowly (`pause`), events are let go; `unpause` asks for them again. The worker has them.
- A stream that was resumed starts again at event 0, so that it has all it needs to continue; what its client has
  already (below `wanted`) is for its sink to drop. If the worker has forgotten the beginning, it starts where the
  worker can, and if that is beyond `wanted`, it ends in RESUME_GAP. As long as it has not all that its client has, it
  can't run again: another text would not go on from the client's. Is its worker lost before that, it waits for what the
  former gateway hands over, whose line may be slow.
- A body in parts stays here, with whoever submitted the stream (`Wanted`); it is not kept for a continuation.
- Where REPLAYS_FRUITLESS_MAX replays brought nothing, the host counts as lost, whatever the broker thinks of it.

A stream is pure: it is told messages and the time, and answers with `Output`s, which the shell carries out in order.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Final

from msgspec.structs import replace

from common.continuation import objection
from common.errors import Code
from common.ollama import NDJSON, LastLine, last_line
from common.protocol import (
    ATTEMPTS_MAX,
    BODY_BYTES_MAX,
    CHUNK_BYTES_MAX,
    COUNT_MAX,
    Accepted,
    Ack,
    Cancel,
    Chunk,
    End,
    Failed,
    Forgotten,
    Gap,
    Leased,
    Lost,
    Message,
    Queued,
    Replay,
    Started,
    Submit,
    Want,
    ordinal_of,
)

REPLAY_PATIENCE_S: Final = 1.0
"""A replay that brought nothing for so long is asked for again."""
REPLAYS_FRUITLESS_MAX: Final = 30
"""After so many in a row nobody has the events, or nobody gets them through."""
HAND_OVER_PATIENCE: Final = 15
"""After so many a resumed stream whose worker is lost no longer expects its events from the gateway that had it."""
HISTORY_BYTES_MAX: Final = 4 * 2**20
"""Events kept of a stream so that it can be continued; a longer one ends with its host."""
HISTORIES_BYTES_MAX: Final = 512 * 2**20
"""The same for all streams of a gateway: one that finds no room ends with its host."""


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
class Wanted:
    """The worker asks for `size` bytes of the body from `offset` on: send them as a `part` of this attempt."""

    attempt: int
    offset: int
    size: int


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


@dataclass(slots=True)
class Moved:
    """The client came back elsewhere, or through another stream: nothing more comes here."""


class Histories:
    """The room that the streams of a gateway share for their histories."""

    def __init__(self, bytes_max: int = HISTORIES_BYTES_MAX) -> None:
        self.bytes_left = bytes_max


Output = ToBroker | Waits | Wanted | Begins | Events | Over | Moved

_AT_ONCE: Final = frozenset({Code.CANCELLED, Code.DEADLINE_EXCEEDED})
_NOWHERE: Final = frozenset({Code.WORKER_LOST, Code.NO_WORKERS, Code.MODEL_NOT_FOUND})
"""What a continuation ends with that no host could take up."""


class Stream:
    """One request. `now` is monotonic; `*_at` attributes are when things were first seen.

    `body` may be empty for a stream that was resumed: it comes with the replay; or for one whose body stays with its
    submitter, to be fetched in parts (`submit.parted_bytes`). `events` are those that a waiting
    continuation has already (`submit.next_seq` of them). One that goes on elsewhere is told to `forget_history`.
    """

    def __init__(
        self,
        submit: Submit,
        body: bytes,
        now: float,
        *,
        histories: Histories,
        wanted: int = 0,
        events: bytes = b"",
    ) -> None:
        self.submit = submit
        self.body = body
        self.phase = Phase.WAITING if submit.accepted else Phase.SUBMITTED
        self.attempt = submit.attempt
        self.next_seq = submit.next_seq
        self.wanted = min(wanted, COUNT_MAX - 1)  # a worker that has nothing of it forgot what is below COUNT_MAX
        self.continued = submit.continued
        self.worker = ""
        self.submitted_at = now - submit.waited_ms / 1000
        self.leased_at: float | None = None
        self.first_event_at: float | None = None
        self.absent_since: float | None = None
        self._begun = False
        self._awaits = False
        self._paused = False
        self._cancelled: str | None = None
        self._lost = submit.lost
        self._terminal: Over | None = None
        self._cause: Over | None = None  # why it is being continued
        self._top = submit.next_seq
        self._replay_asked_at: float | None = None
        self._replay_bytes = 0
        self._replays_fruitless = 0
        self._newest = events  # the last of these lines is the newest
        self._histories = histories
        self._history: list[bytes] | None = [events] if submit.migrate else None
        self._history_bytes = len(events)
        histories.bytes_left -= len(events)  # whether there is room or not: it waits for a host that continues it

    @property
    def attempts(self) -> int:
        """How many attempts it took so far."""
        return ordinal_of(self.attempt)

    def submission(self, now: float) -> list[Output]:
        """What to send first, and again after every break with the broker."""
        self._replay_asked_at = None
        self._replays_fruitless = 0
        if self._cancelled is not None:
            return [self._cancellation(self._cancelled)]
        self._awaits = True
        waited_ms = int((now - self.submitted_at) * 1000)
        deadline = self.submit.deadline_ms
        continues = self._lost and self.next_seq > 0
        message = replace(
            self.submit,
            deadline_ms=None if deadline is None else max(0, deadline - waited_ms + self.submit.waited_ms),
            waited_ms=waited_ms,
            accepted=self.phase is not Phase.SUBMITTED,
            attempt=self.attempt,
            lost=self._lost,
            # What its client has no other attempt may bring, though it has not come here again yet.
            next_seq=self.next_seq if self._lost else max(self.next_seq, self.wanted),
            body_bytes=len(self.body),
            continued=self.continued,
            absent_ms=None if self.absent_since is None else int((now - self.absent_since) * 1000),
        )
        return [ToBroker(message, b"".join([self.body, *(self._history or ())]) if continues else self.body)]

    def seed(self) -> list[Output]:
        """What a resumed stream has from the start: the events of a continuation that waits."""
        if not self._lost or not self.next_seq:
            return []
        self._begun = True
        return [Begins(200, NDJSON), Events(0, self.next_seq, b"".join(self._history or ()))]

    def handle(self, message: Message, payload: bytes, now: float) -> list[Output]:
        """Take in a message about this request."""
        return [] if self._awaits and self._is_from_before(message) else self._take_in(message, payload, now)

    def take_over(self, former: "Stream", now: float) -> list[Output]:
        """Go on from what the stream has that this one takes the place of, here in this gateway."""
        out: list[Output] = []
        for message, payload in former.hand_over():
            out += self._take_in(message, payload, now)
        return out

    def _take_in(self, message: Message, payload: bytes, now: float) -> list[Output]:
        match message:
            case Chunk():
                return self._on_chunk(message, payload, now)
            case Accepted():
                self._awaits = False
                if self.phase is Phase.SUBMITTED:
                    self.phase = Phase.WAITING
            case Queued():
                return [Waits(message.position, message.eta_ms)]
            case Leased():
                self._on_leased(message, now)
            case Started():
                if message.attempt == self.attempt and not self._lost:
                    self.body = self.body or payload
                    if not self._begun:
                        self._begun = True
                        return [Begins(message.status, message.content_type)]
            case Lost():
                if message.attempt == self.attempt:
                    self.phase, self._lost = Phase.WAITING, True
            case Want():
                if message.attempt == self.attempt and not self._lost and message.offset < self.submit.parted_bytes:
                    return [Wanted(message.attempt, message.offset, message.size)]
            case Gap():
                if message.attempt == self.attempt:
                    self._top = max(self._top, message.top)
                    return self._ask_replay(now)
            case Forgotten():
                if message.attempt == self.attempt and not self._lost:
                    return self._on_forgotten(message, now)
            case End() | Failed():
                return self._on_terminal(message, payload, now)
        return []

    def _is_from_before(self, message: Message) -> bool:
        """Whether it is no answer to the submission: that is `accepted`, or the end of what was submitted."""
        if isinstance(message, End | Failed):
            return self._cancelled is None and message.attempt not in (0, self.attempt)
        return not isinstance(message, Accepted)

    def cancel(self, reason: str) -> list[Output]:
        """Stop the request; it ends with the broker's `failed` CANCELLED, or with whatever comes first."""
        if self.phase is Phase.OVER or self._cancelled is not None:
            return []
        self._cancelled = reason
        return [self._cancellation(reason)]

    def abandon(self, code: Code, message: str) -> list[Output]:
        """End the request from here: the broker is gone for good."""
        return self._finish(Over(self._failure(code, message), b""))

    def pause(self) -> None:
        """The client does not read: let events go, they come again."""
        self._paused = True

    def unpause(self, now: float) -> list[Output]:
        """The client reads again."""
        if self._paused:
            self._paused = False
            self._replay_asked_at = None  # what it brought meanwhile was let go
        return self._ask_replay(now)

    def tick(self, now: float) -> list[Output]:
        """Ask for what is missing, again if a replay brought nothing. Call it only while there is a broker."""
        if self._replay_asked_at is not None:
            if now - self._replay_asked_at < REPLAY_PATIENCE_S:
                return []
            self._replay_asked_at = None
            self._replays_fruitless += 1
            if self._replays_fruitless >= REPLAYS_FRUITLESS_MAX:
                return self._on_fruitless(now)
        return self._ask_replay(now)

    def hand_over(self) -> list[tuple[Message, bytes]]:
        """What it has, for the stream that takes its place at another gateway or here.

        That one asks the worker too; but a worker may die before it has answered, and then only this can be continued.
        """
        rid, attempt = self.submit.rid, self.attempt
        if self._lost or self._history is None or not self.next_seq:
            return []
        handed: list[tuple[Message, bytes]] = [
            (Started(rid=rid, attempt=attempt, status=200, content_type=NDJSON), self.body)
        ]
        seq, pieces, size = 0, list[bytes](), 0
        for index, piece in enumerate(self._history, 1):
            pieces.append(piece)
            size += len(piece)
            if size >= CHUNK_BYTES_MAX or index == len(self._history):
                payload = b"".join(pieces)
                n = payload.count(b"\n")
                handed.append((Chunk(rid=rid, attempt=attempt, seq=seq, n=n), payload))
                seq, pieces, size = seq + n, [], 0
        return handed if seq == self.next_seq else []  # else it is no stream of lines

    def _on_leased(self, leased: Leased, now: float) -> None:
        """Also after every break, for the attempt that is known."""
        newer = leased.attempt > self.attempt
        if not newer and (leased.attempt < self.attempt or self._lost):
            return
        self.phase, self.worker = Phase.RUNNING, leased.worker
        self.leased_at = now if self.leased_at is None else self.leased_at
        terminal = self._terminal.terminal if self._terminal is not None else None
        if newer:
            self._advance(leased.attempt)
        elif isinstance(terminal, Failed) and terminal.resubmit:
            self._terminal = None  # the host that came back to life was taken for dead

    def _advance(self, attempt: int) -> None:
        """A later attempt is spoken of: nothing of the former counts any more."""
        self.attempt, self._lost, self._terminal = attempt, False, None
        self._top, self._replay_asked_at, self._replays_fruitless = self.next_seq, None, 0

    def _on_chunk(self, chunk: Chunk, payload: bytes, now: float) -> list[Output]:
        if chunk.attempt != self.attempt or self._lost:
            return []
        end = chunk.seq + chunk.n
        if end > self._top:
            self._top = end
        if self._paused:
            return []
        skip = self.next_seq - chunk.seq
        if skip < 0:
            return self._ask_replay(now)
        if skip >= chunk.n:
            return []
        if self.first_event_at is None:
            self.first_event_at = now
        self.next_seq = end
        if payload != b"\n":  # what ends an event of SSE says nothing
            self._newest = payload
        self._replays_fruitless = 0
        events = Events(chunk.seq + skip, chunk.n, payload, skip)
        if self._history is not None:
            self._remember(payload if not skip else b"\n".join([*events.lines(), b""]))
        out: list[Output] = [events]
        if self._replay_asked_at is not None:
            self._replay_bytes -= len(payload)
            self._replay_asked_at = now if self.next_seq < self._top and self._replay_bytes > 0 else None
        if self._terminal is not None and self._terminal.terminal.seq <= self.next_seq:
            out += self._conclude(self._terminal, now)
        elif self.next_seq < self._top:
            out += self._ask_replay(now)
        return out

    def _remember(self, payload: bytes) -> None:
        assert self._history is not None
        self._history_bytes += len(payload)
        self._histories.bytes_left -= len(payload)
        self._history.append(payload)
        if self._history_bytes > HISTORY_BYTES_MAX or self._histories.bytes_left < 0:
            self.forget_history()

    def forget_history(self) -> None:
        """From now on it can't be continued; for one that goes on elsewhere."""
        self._histories.bytes_left += self._history_bytes
        self._history, self._history_bytes = None, 0

    def _on_forgotten(self, forgotten: Forgotten, now: float) -> list[Output]:
        if forgotten.base <= self.next_seq:
            return self._ask_replay(now)
        if forgotten.base <= self.wanted:
            self.forget_history()
            self.next_seq, self._replay_asked_at = forgotten.base, None
            return self._ask_replay(now)
        text = f"the events from {max(self.next_seq, self.wanted)} on are no longer kept"
        failed = self._failure(Code.RESUME_GAP, text)
        return [*self._finish(Over(failed, b"")), self._cancellation(text)]

    def _on_fruitless(self, now: float) -> list[Output]:
        text = f"the events from {self.next_seq} on were asked for {REPLAYS_FRUITLESS_MAX} times and did not come"
        failed = self._failure(Code.WORKER_LOST, text, resubmit=self.attempts < ATTEMPTS_MAX)
        out = self._conclude(Over(failed, b""), now)
        return [*out, self._cancellation(text)] if self.phase is Phase.OVER else out

    def _failure(self, code: Code, text: str, *, resubmit: bool = False) -> Failed:
        """An end that this side decides."""
        seq, rid = self.next_seq, self.submit.rid
        return Failed(rid=rid, attempt=self.attempt, code=code, message=text, seq=seq, resubmit=resubmit)

    def _cancellation(self, reason: str) -> ToBroker:
        return ToBroker(Cancel(rid=self.submit.rid, attempt=self.attempt, reason=reason))

    def _on_terminal(self, terminal: End | Failed, payload: bytes, now: float) -> list[Output]:
        if terminal.attempt > self.attempt:
            self._advance(terminal.attempt)  # its `leased` was lost on the way
        again = isinstance(terminal, Failed) and terminal.resubmit
        if 0 < terminal.attempt < self.attempt or (again and self._lost):
            return []  # of an attempt that was left behind
        if self._is_away(terminal) and not self._can_run_again():
            return []  # its worker has the only copy, and may come back: `tick` goes on asking for a while
        over = Over(terminal, payload)
        at_once = self._cancelled is not None or (isinstance(terminal, Failed) and terminal.code in _AT_ONCE)
        if at_once:
            return self._finish(over)
        if terminal.seq <= self.next_seq:
            return self._conclude(over, now)
        if isinstance(terminal, Failed) and not again and terminal.seq <= self.wanted:
            return self._finish(over)  # the client has all there is, and nothing will follow
        self._terminal, self._top = over, max(self._top, terminal.seq)
        return self._ask_replay(now)

    def _is_away(self, terminal: End | Failed) -> bool:
        """Whether this is not the end that is waited for, only the news that its events cannot be had now."""
        return (
            self._terminal is not None
            and isinstance(terminal, Failed)
            and terminal.code is Code.WORKER_LOST
            and terminal.resubmit
            and terminal.retryable
        )

    def _conclude(self, over: Over, now: float) -> list[Output]:
        """All events before the terminal have been passed on: is it the end?"""
        failed = over.terminal
        last = self._last_line() if isinstance(failed, Failed) else None
        if last is not None:
            end = End(rid=failed.rid, attempt=failed.attempt, seq=self.next_seq, stats=last.stats())
            return self._finish(Over(end, b""))
        if self._expects_hand_over(failed):
            self._terminal, self._top = self._terminal or over, max(self._top, self.wanted)
            return self._ask_replay(now)
        if not (isinstance(failed, Failed) and failed.resubmit and self._can_run_again()):
            cause = self._cause
            nowhere = isinstance(failed, Failed) and failed.code in _NOWHERE
            if cause is not None and cause.terminal.seq == self.next_seq and nowhere:
                over = cause  # that it could not be continued is not why it broke
            return self._finish(over)
        self._cause = over
        self._lost, self._terminal, self._replay_asked_at = True, None, None
        self._top = self.next_seq
        self.phase = Phase.WAITING
        self.continued += self.next_seq > 0
        return self.submission(now)

    def _expects_hand_over(self, terminal: End | Failed) -> bool:
        """Whether what its client has, and the lost worker had, may still come from the gateway where it was before."""
        return (
            isinstance(terminal, Failed)
            and terminal.code is Code.WORKER_LOST
            and terminal.resubmit
            and self.submit.attachment > 0
            and self.next_seq < self.wanted
            and self._replays_fruitless < HAND_OVER_PATIENCE
        )

    def _last_line(self) -> LastLine | None:
        """The line that says that the answer is complete, if it has come."""
        last = last_line(self._newest)
        return last if last is not None and last.done else None

    def _can_run_again(self) -> bool:
        if not (self.body or self.submit.parted_bytes) or self.next_seq < self.wanted:
            return False
        if self.next_seq == 0:
            return True
        return (
            bool(self.body)
            and self._history is not None
            and self.continued < ATTEMPTS_MAX - 1
            and len(self.body) + self._history_bytes <= BODY_BYTES_MAX
            and not objection(self.submit.path, self.body)
        )

    def _ask_replay(self, now: float) -> list[Output]:
        if (
            self.next_seq >= self._top
            or self._paused
            or self._lost
            or self._replay_asked_at is not None
            or self._cancelled is not None
        ):
            return []
        self._replay_asked_at = now
        replay = Replay(rid=self.submit.rid, attempt=self.attempt, start=self.next_seq)
        self._replay_bytes = replay.bytes_max
        return [ToBroker(replay)]

    def _finish(self, over: Over) -> list[Output]:
        self.phase = Phase.OVER
        self.body = self._newest = b""
        self.forget_history()
        self._terminal = self._replay_asked_at = None
        return [over, ToBroker(Ack(rid=self.submit.rid))]
