"""The gateway's side of a request: contiguity, gaps, terminals, pauses."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code
from common.protocol import (
    Accepted,
    Ack,
    Beat,
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
    Stats,
    Submit,
    attempt_of,
)
from gateway.session import REPLAY_PATIENCE_S, Begins, Events, Output, Over, Phase, Stream, ToBroker, Waits

RID = b"r" * 16
A1, A2 = attempt_of(1, 7), attempt_of(2, 7)


def lines(start: int, n: int) -> bytes:
    return b"".join(b'{"n":%d}\n' % number for number in range(start, start + n))


class Driver:
    """A stream, and everything it let through to its client."""

    def __init__(self, **submit: Any) -> None:
        self.stream = Stream(
            Submit(rid=RID, client="c", ref="1", model="m", path="/api/generate", **submit), b"body", 0.0
        )
        self.seen: list[bytes] = []
        self.sent: list[Message] = []
        self.other: list[Output] = []
        self.take(self.stream.submission(0.0))

    def take(self, outputs: list[Output]) -> list[Output]:
        for output in outputs:
            if isinstance(output, Events):
                assert output.seq == len(self.seen)
                self.seen += [line.rstrip(b"\n") for line in output.lines()]
            elif isinstance(output, ToBroker):
                self.sent.append(output.message)
            else:
                self.other.append(output)
        return outputs

    def hear(self, message: Message, payload: bytes = b"", now: float = 1.0) -> list[Output]:
        return self.take(self.stream.handle(message, payload, now))

    def chunk(self, seq: int, n: int = 1, attempt: int = A1, now: float = 1.0) -> list[Output]:
        return self.hear(Chunk(rid=RID, attempt=attempt, seq=seq, n=n), lines(seq, n), now)

    def lease(self, attempt: int = A1) -> None:
        self.hear(Accepted(rid=RID))
        self.hear(Leased(rid=RID, attempt=attempt, worker="w1", engine="e"))

    def expect(self, n: int) -> None:
        assert self.seen == lines(0, n).splitlines()


def end(seq: int, attempt: int = A1) -> End:
    return End(rid=RID, attempt=attempt, seq=seq, stats=Stats(done_reason="stop"))


def test_a_request_from_submission_to_acknowledgement() -> None:
    driver = Driver()
    stream = driver.stream
    assert isinstance(driver.sent[0], Submit)
    driver.hear(Accepted(rid=RID))
    assert stream.phase is Phase.WAITING
    driver.hear(Queued(rid=RID, position=3, eta_ms=40))
    driver.hear(Leased(rid=RID, attempt=A1, worker="w1", engine="e"), now=2.0)
    driver.hear(Started(rid=RID, attempt=A1, status=200, content_type="application/x-ndjson"))
    driver.chunk(0, now=3.0)
    driver.chunk(1, 3)
    driver.hear(end(4))
    driver.expect(4)
    assert (stream.phase, stream.worker, stream.attempts) == (Phase.OVER, "w1", 1)
    assert (stream.leased_at, stream.first_event_at) == (2.0, 3.0)
    assert driver.other == [Waits(3, 40), Begins(200, "application/x-ndjson"), Over(end(4), b"")]
    assert driver.sent[1:] == [Ack(rid=RID)]
    assert stream.body == b""


def test_what_comes_after_the_terminal_is_only_acknowledged_again() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(end(0))
    driver.sent.clear()
    assert driver.hear(end(0)) == [ToBroker(Ack(rid=RID))]
    assert driver.chunk(0) == []
    assert driver.stream.submission(9.0) == []
    assert driver.stream.cancel("late") == []
    assert driver.stream.abandon(Code.NO_WORKERS, "late") == []


def test_repeats_and_strangers_are_dropped() -> None:
    driver = Driver()
    driver.lease(A2)
    driver.chunk(0, 2, A2)
    assert driver.chunk(0, 2, A2) == []
    assert driver.chunk(1, 1, A2) == []
    assert driver.chunk(2, 1, A1) == []
    assert driver.hear(Started(rid=RID, attempt=A1, status=200)) == []
    assert driver.hear(Lost(rid=RID, attempt=A1)) == []
    assert driver.hear(Gap(rid=RID, attempt=A1, top=9)) == []
    assert driver.hear(Leased(rid=RID, attempt=A1, worker="old", engine="e")) == []
    assert driver.hear(Beat()) == []
    assert driver.stream.worker == "w1"
    driver.expect(2)


def test_an_overlap_gives_only_its_new_lines() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0, 2)
    driver.chunk(1, 4)
    driver.expect(5)


def test_a_gap_is_asked_for_once_and_repaired() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0)
    driver.chunk(2)
    driver.chunk(3)
    assert driver.sent[1:] == [Replay(rid=RID, attempt=A1, start=1)]
    driver.chunk(1, 3)
    driver.chunk(4)
    driver.expect(5)


def test_a_replay_that_ends_short_is_followed_by_another() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(5)
    driver.chunk(0, 3)
    driver.chunk(6)
    assert driver.sent[1:] == [Replay(rid=RID, attempt=A1, start=0), Replay(rid=RID, attempt=A1, start=3)]


def test_a_lost_replay_is_asked_for_again_after_a_while() -> None:
    driver = Driver()
    driver.lease()
    assert driver.take(driver.stream.tick(9.0)) == []
    driver.chunk(1, now=10.0)
    assert driver.take(driver.stream.tick(10.0 + REPLAY_PATIENCE_S / 2)) == []
    again = driver.take(driver.stream.tick(10.0 + REPLAY_PATIENCE_S))
    assert again == [ToBroker(Replay(rid=RID, attempt=A1, start=0))]


def test_a_terminal_waits_for_the_events_before_it() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0)
    driver.hear(end(3))
    assert driver.sent[1:] == [Replay(rid=RID, attempt=A1, start=1)]
    assert driver.other == []
    driver.chunk(1)
    assert driver.other == []
    driver.chunk(2)
    driver.expect(3)
    assert driver.other == [Over(end(3), b"")]
    assert driver.sent[-1] == Ack(rid=RID)


def test_a_gap_notice_is_answered_by_a_replay() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0)
    assert driver.hear(Gap(rid=RID, attempt=A1, top=1)) == [ToBroker(Replay(rid=RID, attempt=A1, start=1))]


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.DEADLINE_EXCEEDED])
def test_what_the_broker_ended_itself_counts_at_once(code: Code) -> None:
    driver = Driver()
    driver.lease()
    failed = Failed(rid=RID, attempt=A1, code=code, message="", seq=5)
    assert driver.hear(failed)[0] == Over(failed, b"")


def test_another_failure_waits_for_its_events() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(Failed(rid=RID, attempt=A1, code=Code.BACKEND_ERROR, message="", seq=1), b"words")
    assert driver.other == []
    driver.chunk(0)
    assert isinstance(driver.other[0], Over)
    assert driver.other[0].payload == b"words"


def test_a_lost_attempt_waits_again_and_starts_once() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(Started(rid=RID, attempt=A1, status=200))
    driver.hear(Lost(rid=RID, attempt=A1))
    assert driver.stream.phase is Phase.WAITING
    driver.hear(Leased(rid=RID, attempt=A2, worker="w2", engine="e"), now=5.0)
    driver.hear(Started(rid=RID, attempt=A2, status=200))
    driver.chunk(0, 1, A2)
    driver.expect(1)
    assert (driver.stream.worker, driver.stream.attempts, driver.stream.leased_at) == ("w2", 2, 1.0)
    assert driver.other == [Begins(200, "")]


def test_cancelling_is_said_once_and_ends_with_whatever_comes_first() -> None:
    driver = Driver()
    driver.lease()
    assert driver.take(driver.stream.cancel("stop")) == [ToBroker(Cancel(rid=RID, attempt=A1, reason="stop"))]
    assert driver.stream.cancel("stop") == []
    driver.chunk(1)  # no replay for a request that is being stopped
    assert isinstance(driver.sent[-1], Cancel)
    assert driver.stream.submission(3.0) == [ToBroker(Cancel(rid=RID, attempt=A1, reason="stop"))]
    assert driver.hear(end(7))[0] == Over(end(7), b"")


def test_a_resubmission_says_what_is_known_and_what_time_is_left() -> None:
    driver = Driver(deadline_ms=5000)
    driver.hear(Accepted(rid=RID))
    driver.lease()
    driver.chunk(0, 2)
    (again,) = driver.stream.submission(2.0)
    assert isinstance(again, ToBroker)
    assert isinstance(again.message, Submit)
    assert (again.message.next_seq, again.message.attempt, again.payload) == (2, A1, b"body")
    assert (again.message.waited_ms, again.message.deadline_ms) == (2000, 3000)
    driver.hear(Accepted(rid=RID))
    assert driver.stream.phase is Phase.RUNNING


def test_a_stream_can_be_abandoned() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0)
    over, _ = driver.stream.abandon(Code.NO_WORKERS, "gone")
    assert isinstance(over, Over)
    assert (over.terminal.seq, driver.stream.phase) == (1, Phase.OVER)


def test_a_paused_stream_lets_events_go_and_asks_again() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0)
    assert driver.stream.unpause(1.0) == []
    driver.stream.pause()
    driver.chunk(1, 3)
    driver.hear(end(4))
    driver.expect(1)
    assert driver.take(driver.stream.unpause(2.0)) == [ToBroker(Replay(rid=RID, attempt=A1, start=1))]
    driver.chunk(1, 3)
    driver.expect(4)
    assert driver.other == [Over(end(4), b"")]


def test_unpausing_after_the_end_asks_for_nothing() -> None:
    driver = Driver()
    driver.lease()
    driver.stream.pause()
    driver.hear(end(0))
    assert driver.stream.unpause(2.0) == []


@given(st.data())
def test_whatever_is_lost_repeated_or_cut_the_client_sees_each_line_once_in_order(data: st.DataObject) -> None:
    """A worker that answers every replay truthfully, and a line that loses and repeats chunks at will."""
    total = data.draw(st.integers(0, 30))
    driver = Driver()
    driver.lease()
    now, sent = 1.0, 0
    while driver.stream.phase is not Phase.OVER:
        now += REPLAY_PATIENCE_S
        asked = [m for m in driver.sent if isinstance(m, Replay)]
        driver.sent = [m for m in driver.sent if not isinstance(m, Replay)]
        for replay in asked:
            if not data.draw(st.booleans(), label="replay lost"):
                n = data.draw(st.integers(1, total + 1))
                driver.chunk(replay.start, min(n, total - replay.start), now=now) if replay.start < total else None
                if replay.start + n >= total:
                    driver.hear(end(total), now=now)
        if sent < total:
            n = data.draw(st.integers(1, total - sent))
            if not data.draw(st.booleans(), label="chunk lost"):
                driver.chunk(sent, n, now=now)
            sent += n
        elif not data.draw(st.booleans(), label="end lost"):
            driver.hear(end(total), now=now)
        if data.draw(st.booleans(), label="client slow"):
            driver.stream.pause()
            driver.take(driver.stream.unpause(now))
        driver.take(driver.stream.tick(now + REPLAY_PATIENCE_S))
    driver.expect(total)
    assert len(driver.other) == 1
