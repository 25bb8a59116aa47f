"""The gateway's line to its brokers, without sockets: who is greeted, who listens to what, and what a break means."""

from typing import Any

import pytest
from msgspec.structs import replace

from common.errors import Code
from common.protocol import (
    HEARTBEAT_INTERVAL_S,
    SILENCE_S,
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
    Gap,
    Hello,
    Leased,
    Message,
    Probe,
    Queued,
    Replay,
    Snapshot,
    Started,
    Stats,
    Submit,
    Want,
    Who,
    attempt_of,
)
from common.standby import STEADY_S
from gateway import link as link_module
from gateway.link import PORTION_MESSAGES, Attachment, Link, Tell
from gateway.session import REPLAYS_FRUITLESS_MAX, Begins, Events, Moved, Output, Over, Stream, Waits, Wanted

A1 = attempt_of(1, 7)
BODY = b'{"prompt":"p"}'
LOST_S = 30.0


def rid_of(ref: str) -> bytes:
    return ref.encode().rjust(16, b"-")


class Client:
    """What one request's client was told."""

    def __init__(self) -> None:
        self.heard: list[Output] = []
        self.answers: list[tuple[Stream | None, Code | None]] = []
        self.there = True

    def hear(self, output: Output) -> None:
        self.heard.append(output)

    def answered(self, stream: Stream | None, code: Code | None) -> None:
        self.answers.append((stream, code))

    @property
    def code(self) -> Code:
        """With what its request failed."""
        (over,) = self.heard
        assert isinstance(over, Over)
        assert isinstance(over.terminal, Failed)
        return over.terminal.code


class Rig:
    """A link, connected unless told otherwise, and the time."""

    def __init__(self, *, brokers: int = 1, connected: bool = True) -> None:
        self.now = 100.0
        self.link = Link("g", brokers, self.now, lost_s=LOST_S)
        if connected:
            self.connect()

    def connect(self, broker: int = 0) -> list[Tell]:
        """`hello` and its answer; what is told upon it."""
        assert self.link.greeting
        self.link.greeted()
        return self.hear(Snapshot(models=("m",), workers=1), broker=broker)

    def hear(self, message: Message, payload: bytes = b"", broker: int = 0) -> list[Tell]:
        self.link.handle(broker, message, payload, self.now)
        return self.link.take()

    def told(self) -> list[Message]:
        """What is to be sent to the broker that is served, without signs of life."""
        tells = [tell for tell in self.link.take() if not isinstance(tell.message, Beat | Probe)]
        assert {tell.broker for tell in tells} <= {self.link.broker}
        return [tell.message for tell in tells]

    def submit(self, ref: str = "r", client: str = "c", **fields: Any) -> tuple[Stream, Client]:
        """A request, leased, and what its client hears."""
        who = Client()
        submit = Submit(rid=rid_of(ref), client=client, ref=ref, model="m", path="/api/generate", **fields)
        stream = self.link.submit(submit, BODY, who.hear, self.now)
        if self.link.connected:
            self.hear(Accepted(rid=rid_of(ref)))
            self.hear(Leased(rid=rid_of(ref), attempt=A1, worker="w", engine="e"))
        self.link.take()
        return stream, who

    def attach(self, ref: str = "r", *, wanted: int = 0) -> Client:
        who = Client()
        assert self.link.attach(self.attachment(who, ref, wanted))
        return who

    def attachment(self, who: Client, ref: str, wanted: int = 0) -> Attachment:
        return Attachment("c", ref, wanted, who.hear, who.answered, lambda: who.there)

    def accept(self, ref: str = "r", broker: int = 0) -> None:
        """The broker's answer to a submission; before it, nothing it says of the stream counts."""
        self.hear(Accepted(rid=rid_of(ref)), broker=broker)

    def chunk(self, seq: int, n: int = 1, ref: str = "r") -> list[Tell]:
        return self.hear(Chunk(rid=rid_of(ref), attempt=A1, seq=seq, n=n), lines(seq, n))

    def end(self, seq: int, ref: str = "r") -> list[Tell]:
        return self.hear(End(rid=rid_of(ref), attempt=A1, seq=seq, stats=Stats()))

    def pass_time(self, seconds: float, *alive: int) -> list[bool]:
        """Ticks at every heartbeat; those of `alive` say something before each. What the ticks answered."""
        changed: list[bool] = []
        for _ in range(round(seconds / HEARTBEAT_INTERVAL_S)):
            self.now += HEARTBEAT_INTERVAL_S
            for broker in alive:
                self.link.handle(broker, Beat(), b"", self.now)
            changed.append(self.link.tick(self.now))
        return changed

    def silence(self) -> None:
        """The broker says nothing until it counts as lost."""
        assert self.pass_time(SILENCE_S + 1)[-1]
        self.link.take()


def lines(start: int, n: int) -> bytes:
    return b"".join(b'{"n":%d}\n' % number for number in range(start, start + n))


def back(ref: str = "r", **fields: Any) -> Submit:
    """The request of a client that is back, as the broker hands it over."""
    values: dict[str, Any] = {"accepted": True, "attempt": A1, "attachment": 1} | fields
    return Submit(rid=rid_of(ref), client="c", ref=ref, model="m", path="/api/generate", **values)


# Greeting -------------------------------------------------------------------------------------------------------------


def test_hello_comes_first_and_the_snapshot_that_answers_it_connects() -> None:
    rig = Rig(connected=False)
    assert rig.link.greeting
    assert rig.link.hello() == Hello(name="g")
    rig.link.greeted()
    assert not rig.link.greeting
    assert not rig.link.connected
    fleet = Snapshot(models=("m",), workers=2)
    assert rig.hear(fleet) == []
    assert rig.link.connected
    assert rig.link.fleet == fleet


def test_what_was_asked_before_there_is_a_broker_is_asked_when_there_is_one() -> None:
    rig = Rig(connected=False)
    rig.submit("a")
    rig.submit("b")
    rig.attach("x")
    assert rig.link.take() == []
    tells = rig.connect()
    assert [type(tell.message) for tell in tells] == [Submit, Submit, Attach]
    assert [tell.payload for tell in tells] == [BODY, BODY, b""]


def test_another_snapshot_is_news_of_the_fleet_only() -> None:
    rig = Rig()
    rig.submit()
    assert rig.hear(Snapshot(models=("other",))) == []
    assert rig.link.fleet.models == ("other",)


def test_who_is_answered_by_hello_and_then_everything_is_submitted_again() -> None:
    rig = Rig()
    stream, _ = rig.submit("a")
    rig.submit("b")
    rig.chunk(0, 2, "a")
    rig.link.cancel(rig.submit("c")[0], "stop")
    rig.link.take()
    rig.hear(Who())
    assert rig.link.greeting
    submit, other, cancel = [tell.message for tell in rig.connect()]
    assert isinstance(submit, Submit)
    assert (submit.rid, submit.accepted, submit.attempt, submit.next_seq) == (stream.submit.rid, True, A1, 2)
    assert isinstance(other, Submit)
    assert cancel == Cancel(rid=rid_of("c"), attempt=A1, reason="stop")


def test_nothing_is_said_of_a_stream_to_a_broker_that_asked_who_speaks() -> None:
    """It was restarted: a replay of what it does not know yet would be answered WORKER_LOST."""
    rig = Rig()
    rig.submit()
    rig.chunk(2)
    assert rig.hear(Who()) == []
    rig.pass_time(2, 0)
    assert rig.told() == []
    assert [type(tell.message) for tell in rig.connect()] == [Submit]


def test_new_requests_are_taken_while_a_living_broker_is_greeted_again() -> None:
    rig = Rig(connected=False)
    assert not rig.link.accepts(rig.now), "whether there is one is not known"
    rig.connect()
    rig.hear(Who())
    assert rig.link.accepts(rig.now)
    rig.submit("new")
    assert rig.told() == []
    assert [tell.message.ref for tell in rig.connect() if isinstance(tell.message, Submit)] == ["new"]
    rig.silence()
    assert not rig.link.accepts(rig.now)


def test_what_is_over_is_not_submitted_again() -> None:
    rig = Rig()
    rig.submit()
    assert rig.end(0) == [Tell(0, Ack(rid=rid_of("r")))]
    assert rig.link.streams == 0
    rig.link.lost()
    assert rig.connect() == []


@pytest.mark.parametrize("message", [Beat(), Error(code=Code.UNKNOWN_TYPE, message="what?")])
def test_signs_of_life_change_nothing(message: Message) -> None:
    rig = Rig()
    _, client = rig.submit()
    assert rig.hear(message) == []
    assert client.heard == []


# Submitting again in portions -----------------------------------------------------------------------------------------


def again(rig: Rig, portion: list[Tell]) -> list[list[Message]]:
    """This portion and the following."""
    portions = [portion]
    while rig.link.resubmits:
        rig.link.resubmit(rig.now)
        portions.append(rig.link.take())
    return [[tell.message for tell in portion] for portion in portions]


def test_ten_thousand_streams_are_submitted_again_in_portions() -> None:
    rig = Rig()
    for number in range(10_000):
        rig.submit(str(number))
    rig.attach("resumed")
    rig.link.take()
    rig.link.lost()
    portions = again(rig, rig.connect())
    assert [len(portion) for portion in portions] == [PORTION_MESSAGES] * 50 + [1]
    refs = [message.ref for portion in portions for message in portion if isinstance(message, Submit | Attach)]
    assert refs == [*map(str, range(10_000)), "resumed"]


def test_large_requests_make_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PORTION_BYTES", 2 * len(BODY))
    rig = Rig()
    for number in range(5):
        rig.submit(str(number))
    rig.link.lost()
    assert [len(portion) for portion in again(rig, rig.connect())] == [2, 2, 1]


def test_what_waits_for_its_turn_is_not_spoken_of_before() -> None:
    """Its submission says it all; a broker that does not know it would end it."""
    rig = Rig()
    rig.link._portion = 1
    streams = [rig.submit(str(number), grace_ms=60_000)[0] for number in range(5)]
    rig.link.lost()
    portion = rig.connect()
    rig.chunk(2, ref="1")
    rig.link.cancel(streams[2], "stop")
    rig.link.park(streams[3], rig.now)
    rig.end(0, "4")
    assert rig.pass_time(2, 0) == [False, False]
    assert rig.told() == []
    messages = [message for (message,) in again(rig, portion)[:4]]
    assert [type(message) for message in messages] == [Submit, Submit, Cancel, Submit]
    assert isinstance(messages[3], Submit)
    assert messages[3].absent_ms == 2000
    assert not rig.link.resubmits, "the last one is over"


def test_what_was_over_while_it_waited_is_acknowledged() -> None:
    rig = Rig()
    rig.link._portion = 1
    for number in range(3):
        rig.submit(str(number))
    rig.link.lost()
    rig.connect()
    assert rig.end(0, "1") == [Tell(0, Ack(rid=rid_of("1")))]
    rig.hear(Detached(rid=rid_of("2")))
    assert not rig.link.resubmits
    assert rig.link.streams == 1


def test_a_break_between_two_portions_begins_anew() -> None:
    rig = Rig()
    rig.link._portion = 2
    for number in range(3):
        rig.submit(str(number))
    rig.link.lost()
    assert len(rig.connect()) == 2
    rig.link.lost()
    assert not rig.link.resubmits
    assert [len(portion) for portion in again(rig, rig.connect())] == [2, 1]


def test_questions_that_nobody_waits_for_are_not_asked_again() -> None:
    rig = Rig()
    client = rig.attach()
    rig.link.take()
    rig.link.lost()
    client.there = False
    assert rig.connect() == []
    assert rig.hear(Attached(id=1, submit=back())) == []


# Streams and who listens ----------------------------------------------------------------------------------------------


def test_a_client_hears_its_own_stream_until_it_is_over() -> None:
    rig = Rig()
    _, one = rig.submit("1")
    _, other = rig.submit("2")
    rig.hear(Queued(rid=rid_of("1"), position=1))
    rig.hear(Started(rid=rid_of("1"), attempt=A1, status=200, content_type="x"))
    rig.chunk(0, 2, "1")
    rig.end(2, "1")
    assert [type(output) for output in one.heard] == [Waits, Begins, Events, Over]
    assert other.heard == []
    assert rig.link.streams == 1


def test_a_terminal_that_is_said_again_is_acknowledged_again() -> None:
    rig = Rig()
    _, client = rig.submit()
    rig.end(0)
    assert rig.end(0) == [Tell(0, Ack(rid=rid_of("r")))]
    failed = Failed(rid=rid_of("r"), attempt=A1, code=Code.CANCELLED, message="")
    assert rig.hear(failed) == [Tell(0, Ack(rid=rid_of("r")))]
    assert [type(output) for output in client.heard] == [Over]


@pytest.mark.parametrize("message", [Accepted(rid=rid_of("r")), Chunk(rid=rid_of("r"), attempt=A1, seq=0, n=1)])
def test_what_runs_for_nobody_is_cancelled(message: Message) -> None:
    (tell,) = Rig().hear(message)
    assert tell.message == Cancel(rid=rid_of("r"), reason="its gateway does not know it")


def test_other_news_of_what_is_over_are_let_go() -> None:
    rig = Rig()
    assert rig.hear(Gap(rid=rid_of("r"), attempt=A1, top=3)) == []
    assert rig.hear(Detached(rid=rid_of("r"))) == []


def test_a_cancelled_stream_still_ends() -> None:
    rig = Rig()
    stream, client = rig.submit()
    rig.link.cancel(stream, "stop")
    assert rig.told() == [Cancel(rid=rid_of("r"), attempt=A1, reason="stop")]
    rig.hear(Failed(rid=rid_of("r"), attempt=A1, code=Code.CANCELLED, message=""))
    assert client.code is Code.CANCELLED


def test_a_forgotten_stream_is_cancelled_and_not_heard_of() -> None:
    rig = Rig()
    stream, client = rig.submit()
    rig.link.forget(stream, "gone")
    assert rig.told() == [Cancel(rid=rid_of("r"), attempt=A1, reason="gone")]
    rig.chunk(0)
    assert rig.hear(Failed(rid=rid_of("r"), attempt=A1, code=Code.CANCELLED, message="")) == [
        Tell(0, Ack(rid=rid_of("r")))
    ]
    assert client.heard == []
    rig.link.forget(stream, "gone")
    rig.link.park(stream, rig.now)
    assert rig.told() == [], "it is over"


def test_a_parked_stream_goes_on_for_nobody() -> None:
    rig = Rig()
    stream, client = rig.submit(grace_ms=60_000)
    rig.chunk(0)
    stream.pause()
    rig.chunk(1)
    rig.link.park(stream, rig.now)
    assert rig.told() == [Replay(rid=rid_of("r"), attempt=A1, start=1), Detach(rid=rid_of("r"))]
    rig.chunk(1, 2)
    assert stream.next_seq == 3, "so that it can be continued if its host dies"
    assert len(client.heard) == 1
    rig.now += 2.0
    rig.link.lost()
    (tell,) = rig.connect()
    assert isinstance(tell.message, Submit)
    assert tell.message.absent_ms == 2000
    rig.end(3)
    assert rig.link.streams == 0


def test_a_client_that_reads_again_gets_what_was_let_go() -> None:
    rig = Rig()
    stream, client = rig.submit()
    stream.pause()
    rig.chunk(0, 2)
    assert client.heard == []
    rig.link.unpause(stream, rig.now)
    assert rig.told() == [Replay(rid=rid_of("r"), attempt=A1, start=0)]


def test_revocation_stops_what_waits_for_these_clients() -> None:
    rig = Rig()
    parked, _ = rig.submit("1", client="alice")
    rig.submit("2", client="alice")
    others, _ = rig.submit("3", client="bob")
    rig.link.park(parked, rig.now)
    rig.link.park(others, rig.now)
    rig.link.take()
    rig.link.revoke({"alice", "carol"})
    # The other one has a connection, which hears of the revocation too.
    assert rig.told() == [Cancel(rid=rid_of("1"), attempt=A1, reason="this client was revoked")]


def test_a_sink_may_call_back_in() -> None:
    """A connection that can make nothing of an engine's line forgets the stream while it is being told of it."""
    rig = Rig()
    heard: list[Output] = []

    def sink(output: Output) -> None:
        heard.append(output)
        rig.link.forget(stream, "nonsense")

    submit = Submit(rid=rid_of("r"), client="c", ref="r", model="m", path="/api/generate")
    stream = rig.link.submit(submit, BODY, sink, rig.now)
    rig.accept()
    rig.hear(Leased(rid=rid_of("r"), attempt=A1, worker="w", engine="e"))
    rig.end(1)
    rig.chunk(0)
    assert [type(output) for output in heard] == [Events]
    assert rig.link.streams == 0


# Resuming -------------------------------------------------------------------------------------------------------------


def test_a_client_comes_back_to_this_gateway_for_a_parked_stream() -> None:
    rig = Rig()
    stream, _ = rig.submit()
    rig.chunk(0, 2)
    rig.link.park(stream, rig.now)
    rig.link.take()
    client = rig.attach(wanted=2)
    assert rig.told() == [Attach(id=1, client="c", ref="r")]
    (submit,) = [tell.message for tell in rig.hear(Attached(id=1, submit=back()))]
    assert isinstance(submit, Submit)
    assert (submit.attachment, submit.attempt, submit.next_seq, submit.lost) == (1, A1, 2, False)
    assert submit.absent_ms is None
    ((resumed, code),) = client.answers
    assert resumed is not None
    assert (code, resumed.wanted, resumed.submit.attachment) == (None, 2, 1)
    assert [type(output) for output in client.heard] == [Begins, Events], "they were here"
    assert resumed.body == BODY
    rig.accept()
    rig.hear(Leased(rid=rid_of("r"), attempt=A1, worker="w", engine="e"))
    assert rig.hear(Gap(rid=rid_of("r"), attempt=A1, top=2)) == []
    rig.end(2)
    assert [type(output) for output in client.heard] == [Begins, Events, Over]
    assert rig.link.streams == 0


def test_of_a_stream_that_kept_nothing_the_worker_tells() -> None:
    rig = Rig()
    rig.submit(migrate=False)
    rig.chunk(0, 2)
    client = rig.attach()
    rig.link.take()
    rig.hear(Attached(id=1, submit=back()))
    rig.accept()
    assert client.heard == []
    (replay,) = rig.hear(Gap(rid=rid_of("r"), attempt=A1, top=2))
    assert replay.message == Replay(rid=rid_of("r"), attempt=A1, start=0)


def test_what_goes_to_another_gateway_is_handed_over() -> None:
    """Its worker may die before it has told the other one."""
    rig, other = Rig(), Rig()
    rig.submit()
    for seq in range(3):
        rig.chunk(seq)
    client = other.attach(wanted=1)
    other.hear(Attached(id=1, submit=back()))
    other.accept()
    handed = rig.hear(Detached(rid=rid_of("r")))
    assert [type(tell.message) for tell in handed] == [Started, Chunk]
    for tell in handed:
        other.hear(tell.message, tell.payload)
    assert [type(output) for output in client.heard] == [Begins, Events]
    lost = Failed(rid=rid_of("r"), attempt=A1, code=Code.WORKER_LOST, message="", seq=3, resubmit=True)
    (again,) = other.hear(lost)
    assert isinstance(again.message, Submit)
    assert (again.message.lost, again.message.next_seq, again.payload) == (True, 3, BODY + lines(0, 3))


def test_the_one_who_listened_before_hears_that_it_moved() -> None:
    rig = Rig()
    stream, old = rig.submit()
    new = rig.attach()
    rig.hear(Attached(id=1, submit=back()))
    rig.link.take()
    assert old.heard == [Moved()]
    rig.accept()
    rig.chunk(0)
    assert len(new.heard) == 1
    rig.link.forget(stream, "gone")
    rig.link.park(stream, rig.now)
    assert rig.told() == [], "the stream is another one now"


def test_what_went_to_another_gateway_is_gone_from_here() -> None:
    rig = Rig()
    _, client = rig.submit()
    assert rig.hear(Detached(rid=rid_of("r"))) == []
    assert client.heard == [Moved()]
    assert rig.link.streams == 0


def test_the_room_of_what_went_elsewhere_is_free_again() -> None:
    rig = Rig()
    before = rig.link._histories.bytes_left
    rig.submit()
    rig.chunk(0)
    assert rig.link._histories.bytes_left == before - len(lines(0, 1))
    rig.hear(Detached(rid=rid_of("r")))
    assert rig.link._histories.bytes_left == before


def test_there_is_none() -> None:
    rig = Rig()
    client = rig.attach()
    rig.hear(Attached(id=1))
    assert client.answers == [(None, None)]
    assert client.heard == []


def test_a_continuation_that_waits_comes_with_its_events() -> None:
    rig = Rig()
    client = rig.attach(wanted=1)
    submit = back(lost=True, next_seq=2, body_bytes=len(BODY), continued=1)
    rig.link.take()
    (tell,) = rig.hear(Attached(id=1, submit=submit), BODY + lines(0, 2))
    assert tell.payload == BODY + lines(0, 2)
    begins, events = client.heard
    assert isinstance(begins, Begins)
    assert isinstance(events, Events)
    assert (events.seq, events.lines()) == (0, lines(0, 2).splitlines())
    (stream, _) = client.answers[0]
    assert stream is not None
    assert (stream.body, stream.next_seq, stream.continued) == (BODY, 2, 1)


def test_what_nobody_waits_for_any_more_does_not_change_hands() -> None:
    rig = Rig()
    _, old = rig.submit()
    client = rig.attach()
    rig.link.take()
    client.there = False
    assert rig.hear(Attached(id=1, submit=back())) == []
    assert (client.answers, old.heard) == ([], [])
    rig.chunk(0)
    assert len(old.heard) == 1


def test_an_answer_that_nobody_waits_for_is_let_go() -> None:
    """Its client asked, and was told in the meantime that there is no broker."""
    rig = Rig()
    client = rig.attach()
    rig.link.take()
    rig.silence()
    rig.pass_time(LOST_S)
    assert client.answers == [(None, Code.NO_WORKERS)]
    rig.connect()
    assert rig.hear(Attached(id=1, submit=back())) == []
    assert rig.link.streams == 0


def test_questions_are_asked_again_after_a_break_and_answered_once() -> None:
    rig = Rig()
    client = rig.attach()
    rig.link.take()
    rig.hear(Who())
    assert [tell.message for tell in rig.connect()] == [Attach(id=1, client="c", ref="r")]
    rig.hear(Attached(id=1, submit=back()))
    assert len(client.answers) == 1


def test_resumes_that_wait_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "ATTACHES_MAX", 2)
    rig = Rig(connected=False)
    one, _ = [rig.attach(ref) for ref in ("1", "2")]
    client = Client()
    assert not rig.link.attach(rig.attachment(client, "3"))
    one.there = False
    assert rig.link.attach(rig.attachment(client, "3")), "one that nobody waits for gives way"
    assert [tell.message for tell in rig.connect()] == [
        Attach(id=number, client="c", ref=str(number)) for number in (2, 3)
    ]


# Time -----------------------------------------------------------------------------------------------------------------


def test_a_beat_every_interval() -> None:
    rig = Rig()
    rig.pass_time(1, 0)
    assert rig.link.take() == [Tell(0, Beat())]
    assert rig.link.next_deadline() == rig.now + HEARTBEAT_INTERVAL_S
    assert not rig.link.tick(rig.now + 0.1)
    assert rig.link.take() == []


def test_only_the_broker_that_was_greeted_is_sent_beats_and_the_others_are_probed() -> None:
    rig = Rig(brokers=3, connected=False)
    rig.pass_time(1)
    assert rig.link.take() == [Tell(1, Probe()), Tell(2, Probe())]
    rig.connect()
    rig.pass_time(1)
    assert rig.link.take() == [Tell(1, Probe()), Tell(2, Probe()), Tell(0, Beat())]


def test_missing_events_are_asked_for_again() -> None:
    rig = Rig()
    rig.submit()
    rig.chunk(3)
    rig.pass_time(1, 0)
    assert rig.told() == [Replay(rid=rid_of("r"), attempt=A1, start=0)]


def test_time_without_a_broker_does_not_count_against_a_stream() -> None:
    rig = Rig()
    stream, client = rig.submit(migrate=False)
    rig.chunk(0)
    rig.chunk(2)
    rig.silence()
    rig.pass_time(LOST_S - SILENCE_S - 2)
    assert stream._replays_fruitless < SILENCE_S + 1
    rig.connect()
    rig.hear(Gap(rid=rid_of("r"), attempt=A1, top=3))
    rig.pass_time(REPLAYS_FRUITLESS_MAX - 1, 0)
    assert rig.link.streams == 1
    rig.pass_time(2, 0)
    assert isinstance(client.heard[-1], Over)


def test_a_silent_broker_is_greeted_again_and_told_nothing_meanwhile() -> None:
    rig = Rig()
    stream, _ = rig.submit()
    assert rig.pass_time(SILENCE_S, 0) == [False, False, False]
    rig.link.take()
    assert rig.pass_time(SILENCE_S + 1) == [False, False, False, True]
    assert rig.link.greeting
    assert not rig.link.connected
    assert rig.link.away(rig.now)
    rig.link.take()
    rig.link.cancel(stream, "stop")
    rig.link.park(stream, rig.now)
    assert rig.told() == []
    assert [tell.message for tell in rig.connect()] == [Cancel(rid=rid_of("r"), attempt=A1, reason="stop")]
    assert not rig.link.away(rig.now)


def test_without_any_broker_for_lost_s_requests_end() -> None:
    rig = Rig()
    _, client = rig.submit()
    waiting = rig.attach("other")
    rig.silence()
    rig.pass_time(LOST_S - SILENCE_S - 1)
    assert client.heard == []
    rig.pass_time(1)
    assert client.code is Code.NO_WORKERS
    assert waiting.answers == [(None, Code.NO_WORKERS)]
    assert rig.link.streams == 0
    assert rig.connect() == []


def test_what_can_be_resumed_is_waited_for_longer() -> None:
    """The broker may run it all the while, and only our line to it be down."""
    rig = Rig()
    rig.link._resume_s = 20.0
    _, plain = rig.submit("1")
    _, resumable = rig.submit("2", grace_ms=20_000)
    waiting = rig.attach("other")
    rig.silence()
    rig.pass_time(LOST_S - SILENCE_S)
    assert plain.code is Code.NO_WORKERS
    rig.pass_time(19)
    assert (resumable.heard, waiting.answers) == ([], [])
    rig.pass_time(2)
    assert resumable.code is Code.NO_WORKERS
    assert waiting.answers == [(None, Code.NO_WORKERS)]


def test_a_broker_that_speaks_and_never_answers_hello_is_none() -> None:
    rig = Rig()
    _, client = rig.submit()
    rig.link.lost()
    rig.pass_time(LOST_S + 1, 0)
    assert client.code is Code.NO_WORKERS


def test_another_broker_takes_over_and_hears_everything() -> None:
    rig = Rig(brokers=2)
    stream, client = rig.submit()
    rig.chunk(0, 2)
    assert rig.pass_time(5, 0, 1) == [False] * 5
    assert rig.pass_time(SILENCE_S + 1, 1)[-1]
    assert rig.link.broker == 1
    rig.link.take()
    assert rig.hear(Snapshot(), broker=0) == []
    assert not rig.link.connected, "the former's words count no more"
    (tell,) = rig.connect(1)
    assert tell.broker == 1
    assert isinstance(tell.message, Submit)
    assert (tell.message.next_seq, tell.message.attempt) == (2, A1)
    rig.hear(Chunk(rid=rid_of("r"), attempt=A1, seq=2, n=1), lines(2, 1), broker=0)
    rig.hear(Chunk(rid=rid_of("r"), attempt=A1, seq=2, n=1), lines(2, 1), broker=1)
    assert stream.next_seq == 2, "nor those from before it answered"
    rig.accept(broker=1)
    rig.hear(Chunk(rid=rid_of("r"), attempt=A1, seq=2, n=1), lines(2, 1), broker=1)
    assert stream.next_seq == 3
    assert len(client.heard) == 2


def test_the_line_goes_back_when_the_former_broker_is_steady() -> None:
    rig = Rig(brokers=2)
    rig.submit()
    rig.pass_time(SILENCE_S + 1, 1)
    rig.connect(1)
    assert rig.pass_time(STEADY_S, 0, 1) == [False] * 3
    assert rig.pass_time(1, 0, 1) == [True]
    assert rig.link.broker == 0
    assert not rig.link.connected
    rig.link.take()
    assert [type(tell.message) for tell in rig.connect(0)] == [Submit]


def test_a_process_that_was_stopped_gives_nothing_up() -> None:
    rig = Rig()
    _, client = rig.submit()
    rig.pass_time(3, 0)
    rig.now += 2 * LOST_S
    rig.link.tick(rig.now)
    assert client.heard == []
    assert rig.link.connected


# Bodies in parts ------------------------------------------------------------------------------------------------------


def test_what_is_wanted_of_a_body_goes_to_whoever_submitted_it() -> None:
    rig = Rig()
    _, who = rig.submit(parted_bytes=100)
    want = Want(rid=rid_of("r"), attempt=A1, offset=0, size=10)
    assert rig.hear(want) == []
    assert who.heard == [Wanted(A1, 0, 10)]
    assert rig.hear(replace(want, rid=rid_of("over"))) == [
        Tell(0, Cancel(rid=rid_of("over"), reason="its gateway does not know it"))
    ]


def test_a_body_in_parts_does_not_come_with_a_client_that_is_back() -> None:
    """It is where it was sent: without it the request goes on, but cannot run again."""
    rig = Rig()
    who = rig.attach()
    rig.link.take()
    rig.hear(Attached(id=1, submit=back(parted_bytes=100)))
    [(stream, _)] = who.answers
    assert stream is not None
    assert stream.submit.parted_bytes == 0
    rig.accept()
    rig.hear(Leased(rid=rid_of("r"), attempt=A1, worker="w", engine="e"))
    rig.hear(Failed(rid=rid_of("r"), attempt=A1, code=Code.WORKER_LOST, message="gone", resubmit=True))
    assert who.code is Code.WORKER_LOST
