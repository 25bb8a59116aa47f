"""A gateway's side of the line to its brokers: every stream, who listens to it, and what a break means. Pure.

Theory of operation
-------------------
The shell hands in messages (`handle`) and the time (`tick`) and sends what `take` returns; what happens to a stream is
told to its sink at once. One of the brokers is served (common/standby.py). To it the gateway says `hello`, and once it
answered with a snapshot, submits again every stream that has no terminal: the broker may be another process now. That
goes in portions, each when the broker has taken the one before (`resubmit`): all at once could be more than a line
takes, and would cut it again and again. What else there is to say of a stream that waits for its turn is left out, as
its submission says it too.

A stream has one of three listeners:

    its client's connection     the sink given to `submit` or `attach`
    nobody for now              `park`: the client's line broke; the stream goes on, so that it can be continued on
                                another host, until the client comes back (`attach` here or at another gateway, then
                                the broker says `detached`), or the broker gives it up
    nobody any more             `forget`: it is cancelled, and only its terminal is waited for

Sinks must not raise; they may call back in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from common.errors import Code
from common.protocol import (
    HEARTBEAT_INTERVAL_S,
    Accepted,
    Ack,
    Attach,
    Attached,
    Beat,
    Cancel,
    Chunk,
    Detach,
    Detached,
    End,
    Error,
    Failed,
    Hello,
    Message,
    Probe,
    Snapshot,
    Submit,
    Want,
    Who,
)
from common.standby import Brokers
from gateway.session import Histories, Moved, Output, Over, Stream, ToBroker

ATTACHES_MAX: Final = 10_000
"""Resumes that wait for the broker's answer, on all connections; one more is told that there is no broker."""

PORTION_MESSAGES: Final = 200
PORTION_BYTES: Final = 8 * 2**20
"""What is submitted again at once after a break; the last message may exceed the bytes."""

Sink = Callable[[Output], None]
"""Hears everything about one stream that is for its client; the last is `Over` or `Moved`."""


@dataclass(slots=True, frozen=True)
class Tell:
    """Send this to the broker of that index."""

    broker: int
    message: Message
    payload: bytes = b""


@dataclass(slots=True, eq=False)
class Attachment:
    """A resume under way.

    `answered` hears the stream, or None if there is none, or the error that prevents it; `waits` says whether anybody
    still wants it.
    """

    client: str
    ref: str
    wanted: int
    sink: Sink
    answered: Callable[[Stream | None, Code | None], None]
    waits: Callable[[], bool]


class Link:
    """One per gateway process; `name` is unique per process start."""

    def __init__(
        self,
        name: str,
        brokers: int,
        now: float,
        *,
        lost_s: float,
        resume_s: float = 0.0,
        histories: Histories | None = None,
        portion: int = PORTION_MESSAGES,
    ) -> None:
        self.name = name
        self.connected = False
        self._met = False
        self.greeting = True
        """`hello` is to be sent, as soon as the broker takes it: then call `greeted`."""
        self.fleet = Snapshot()
        self._brokers = Brokers(brokers, now)
        self._count = brokers
        self._lost_s = lost_s
        self._resume_s = resume_s
        self._streams: dict[bytes, tuple[Stream, Sink]] = {}
        self._attachments: dict[int, Attachment] = {}
        self._due: dict[bytes | int, None] = {}  # streams and attachments of which the broker is still to hear again
        self._histories = histories or Histories()
        self._portion = portion
        self._number = 0
        self._welcome_due = True
        self._served_at = now
        self._beat_at = now
        self._out: list[Tell] = []

    @property
    def broker(self) -> int:
        """The index of the broker that is served."""
        return self._brokers.active

    @property
    def streams(self) -> int:
        """Requests without a terminal."""
        return len(self._streams)

    @property
    def waiting(self) -> int:
        """Those of them that no host had yet."""
        return sum(stream.leased_at is None for stream, _ in self._streams.values())

    @property
    def resubmits(self) -> bool:
        """Whether something waits to be submitted again: call `resubmit` when all that was told has been taken."""
        return bool(self._due)

    def take(self) -> list[Tell]:
        """What is to be sent, in order."""
        out, self._out = self._out, []
        return out

    # What the gateway wants -------------------------------------------------------------------------------------------

    def submit(self, submit: Submit, body: bytes, sink: Sink, now: float) -> Stream:
        """A new request."""
        stream = Stream(submit, body, now, histories=self._histories)
        self._streams[submit.rid] = stream, sink
        self._carry_out(stream, stream.submission(now))
        return stream

    def attach(self, attachment: Attachment) -> bool:
        """A client is back and wants its request; False: too many are waiting for the broker."""
        if len(self._attachments) >= ATTACHES_MAX:
            self._attachments = {number: old for number, old in self._attachments.items() if old.waits()}
            if len(self._attachments) >= ATTACHES_MAX:
                return False
        self._number += 1
        self._attachments[self._number] = attachment
        self._tell(Attach(id=self._number, client=attachment.client, ref=attachment.ref))
        return True

    def cancel(self, stream: Stream, reason: str) -> None:
        """Stop a stream; its `Over` still comes."""
        self._carry_out(stream, stream.cancel(reason))

    def unpause(self, stream: Stream, now: float) -> None:
        """A stream's client reads again."""
        self._carry_out(stream, stream.unpause(now))

    def park(self, stream: Stream, now: float) -> None:
        """The stream's client may come back."""
        if self._holds(stream):
            self._streams[stream.submit.rid] = stream, _deaf
            stream.absent_since = now
            self._carry_out(stream, stream.unpause(now))
            if stream.submit.rid not in self._due:
                self._tell(Detach(rid=stream.submit.rid))

    def forget(self, stream: Stream, reason: str) -> None:
        """Nobody listens to the stream any more: stop it, and hear nothing of it."""
        if self._holds(stream):
            self._streams[stream.submit.rid] = stream, _deaf
            self.cancel(stream, reason)

    def revoke(self, clients: set[str]) -> None:
        """Stop what waits for clients that may not come back."""
        for stream, _ in list(self._streams.values()):
            if stream.submit.client in clients and stream.absent_since is not None:
                self.cancel(stream, "this client was revoked")

    # What the broker says ---------------------------------------------------------------------------------------------

    def handle(self, broker: int, message: Message, payload: bytes, now: float) -> None:
        """Take in a message of a broker; a snapshot that answers a query is not for here."""
        self._brokers.hear(broker, now)
        if broker != self._brokers.active:
            return
        if self.connected:
            self._served_at = now
        match message:
            case Beat() | Error():
                pass
            case Who():
                self.lost()  # it would not know what is spoken of
            case Snapshot():
                self.fleet = message
                if self._welcome_due:
                    self._welcome_due = False
                    self._welcomed(now)
            case Attached():
                self._on_attached(message, payload, now)
            case _:
                rid: bytes = message.rid  # type: ignore[attr-defined]
                entry = self._streams.get(rid)
                if entry is None:
                    self._on_foreign(message, rid)
                elif isinstance(message, Detached):
                    del self._streams[rid]
                    self._due.pop(rid, None)
                    for handed, body in entry[0].hand_over():
                        self._tell(handed, body)
                    entry[0].forget_history()
                    entry[1](Moved())
                else:
                    self._carry_out(entry[0], entry[0].handle(message, payload, now))

    def lost(self) -> None:
        """The line is down: greet again."""
        self.connected = False
        self.greeting = self._welcome_due = True
        self._due.clear()

    def resubmit(self, now: float) -> None:
        """Tell the broker of the next portion of what it may not know."""
        size = 0
        for _ in range(min(self._portion, len(self._due))):
            key = next(iter(self._due))
            del self._due[key]
            if isinstance(key, int):
                attachment = self._attachments.get(key)
                if attachment is not None and attachment.waits():
                    self._tell(Attach(id=key, client=attachment.client, ref=attachment.ref))
                else:
                    self._attachments.pop(key, None)
            else:
                stream, _ = self._streams[key]
                submission = stream.submission(now)
                size += sum(len(output.payload) for output in submission if isinstance(output, ToBroker))
                self._carry_out(stream, submission)
            if size >= PORTION_BYTES:
                return

    def greeted(self) -> None:
        """`hello` was sent."""
        self.greeting = False

    def tick(self, now: float) -> bool:
        """Do what time demands; True if another broker is served from now on, or none answers."""
        changed = self._brokers.choose(now)
        if changed or (self.connected and not self._brokers.lives(self._brokers.active, now)):
            changed = True
            self.lost()
        if not self.connected and now - self._served_at > self._lost_s:
            self._give_up(now - self._served_at)
        if now >= self._beat_at:
            self._beat_at = now + HEARTBEAT_INTERVAL_S
            self._out += [Tell(i, Probe()) for i in range(self._count) if i != self.broker]
            if not self.greeting:
                self._out.append(Tell(self.broker, Beat()))
            for stream, _ in list(self._streams.values()) if self.connected else ():
                if stream.submit.rid not in self._due:
                    self._carry_out(stream, stream.tick(now))
        return changed

    def away(self, now: float) -> bool:
        """Whether the broker has not answered for three heartbeats."""
        return not self.connected and not self._brokers.lives(self._brokers.active, now)

    def heard_at(self, broker: int) -> float:
        """When that broker was last heard of; -inf if never."""
        return self._brokers.heard_at(broker)

    def accepts(self, now: float) -> bool:
        """Whether a new request may be submitted: now, or as soon as the broker, which lives, was greeted again."""
        return self.connected or (self._met and self._brokers.lives(self._brokers.active, now))

    def next_deadline(self) -> float:
        """When `tick` should be called at the latest."""
        return self._beat_at

    def hello(self) -> Hello:
        """What `greeting` wants sent."""
        return Hello(name=self.name)

    def _welcomed(self, now: float) -> None:
        self.connected = self._met = True
        self._served_at = now
        self._due = dict.fromkeys([*self._streams, *self._attachments])
        self.resubmit(now)

    def _on_attached(self, message: Attached, payload: bytes, now: float) -> None:
        attachment = self._attachments.pop(message.id, None)
        submit = message.submit
        if attachment is None:
            return
        if submit is None:
            attachment.answered(None, None)
        elif attachment.waits():
            # Only now it changes hands: a client that has gone on to another gateway must not lose it there.
            former, _ = self._streams.get(submit.rid, (None, None))
            body, events = payload[: submit.body_bytes], payload[submit.body_bytes :]
            submit = replace(submit, parted_bytes=0)  # if it was in parts, they are where it came from
            stream = Stream(submit, body, now, histories=self._histories, wanted=attachment.wanted, events=events)
            if former is not None:
                self._streams[submit.rid][1](Moved())
            self._streams[submit.rid] = stream, attachment.sink
            self._due.pop(submit.rid, None)
            self._carry_out(stream, stream.submission(now))
            attachment.answered(stream, None)
            self._carry_out(stream, stream.seed())
            if former is not None:
                self._carry_out(stream, stream.take_over(former, now))
                former.forget_history()

    def _on_foreign(self, message: Message, rid: bytes) -> None:
        """Of a request that is over here."""
        if isinstance(message, End | Failed):
            self._tell(Ack(rid=rid))
        elif isinstance(message, Accepted | Chunk | Want):
            # Given up here while there was no broker.
            self._tell(Cancel(rid=rid, reason="its gateway does not know it"))

    def _give_up(self, away_s: float) -> None:
        """What can be resumed runs on without us: that waits as much longer as it could be resumed."""
        text = f"the broker has not answered for {away_s:.0f} s"
        for stream, _ in list(self._streams.values()):
            if away_s > self._lost_s + stream.submit.grace_ms / 1000:
                self._carry_out(stream, stream.abandon(Code.NO_WORKERS, text))
        for number in list(self._attachments) if away_s > self._lost_s + self._resume_s else ():
            self._attachments.pop(number).answered(None, Code.NO_WORKERS)

    def _holds(self, stream: Stream) -> bool:
        entry = self._streams.get(stream.submit.rid)
        return entry is not None and entry[0] is stream

    def _carry_out(self, stream: Stream, outputs: list[Output]) -> None:
        rid = stream.submit.rid
        for output in outputs:
            if type(output) is ToBroker:
                if rid not in self._due:
                    self._tell(output.message, output.payload)
                continue
            _, sink = self._streams[rid]  # looked up anew: the last one may have been the reason to forget it
            if type(output) is Over:
                del self._streams[rid]
                self._due.pop(rid, None)
            sink(output)

    def _tell(self, message: Message, payload: bytes = b"") -> None:
        # What is said while there is no broker is said again when there is: every stream knows where it stands.
        if self.connected:
            self._out.append(Tell(self._brokers.active, message, payload))


def _deaf(_: Output) -> None:
    """The sink of a stream nobody listens to."""
