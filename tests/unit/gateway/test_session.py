"""The gateway's side of a request: contiguity, gaps, terminals, pauses, other attempts, resumed streams."""

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from common import protocol
from common.errors import Code
from common.protocol import (
    ATTEMPTS_MAX,
    BODY_BYTES_MAX,
    COUNT_MAX,
    Accepted,
    Ack,
    Assign,
    Beat,
    Cancel,
    Chunk,
    End,
    Engine,
    Failed,
    Forgotten,
    Gap,
    Leased,
    Lost,
    Message,
    Model,
    Queued,
    Registered,
    Replay,
    Started,
    State,
    Stats,
    Submit,
    Want,
    attempt_of,
)
from gateway import session
from gateway.session import (
    HAND_OVER_PATIENCE,
    REPLAY_PATIENCE_S,
    REPLAYS_FRUITLESS_MAX,
    Begins,
    Events,
    Histories,
    Output,
    Over,
    Phase,
    Stream,
    ToBroker,
    Waits,
    Wanted,
)
from workers.session import Limits, Post, Session

RID = b"r" * 16
A1, A2, A3 = (attempt_of(ordinal, 7) for ordinal in (1, 2, 3))
BODY = b'{"model":"m","prompt":"p"}'


def lines(start: int, n: int) -> bytes:
    return b"".join(b'{"n":%d}\n' % number for number in range(start, start + n))


class Driver:
    """A stream, and everything it let through to its client; with `resumed` arguments, one of a client that is back."""

    def __init__(
        self, body: bytes = BODY, *, path: str = "/api/generate", resumed: dict[str, Any] | None = None, **submit: Any
    ) -> None:
        message = Submit(rid=RID, client="c", ref="1", model="m", path=path, accepted=resumed is not None, **submit)
        self.histories = Histories()
        self.stream = Stream(message, body, 0.0, histories=self.histories, **(resumed or {}))
        self.seen: list[bytes] = []
        self.sent: list[Message] = []
        self.payloads: list[bytes] = []
        self.other: list[Output] = []
        self.take(self.stream.submission(0.0) if resumed is None else self.stream.seed())

    def take(self, outputs: list[Output]) -> list[Output]:
        for output in outputs:
            if isinstance(output, Events):
                assert output.seq == len(self.seen)
                self.seen += [line.rstrip(b"\n") for line in output.lines()]
            elif isinstance(output, ToBroker):
                self.sent.append(output.message)
                self.payloads.append(output.payload)
            else:
                self.other.append(output)
        return outputs

    def hear(self, message: Message, payload: bytes = b"", now: float = 1.0) -> list[Output]:
        if self.stream.phase is Phase.OVER:
            return []  # its link has forgotten it
        return self.take(self.stream.handle(message, payload, now))

    def chunk(self, seq: int, n: int = 1, attempt: int = A1, now: float = 1.0) -> list[Output]:
        return self.hear(Chunk(rid=RID, attempt=attempt, seq=seq, n=n), lines(seq, n), now)

    def lease(self, attempt: int = A1) -> None:
        self.hear(Accepted(rid=RID))
        self.hear(Leased(rid=RID, attempt=attempt, worker="w1", engine="e"))

    def fail(self, seq: int, attempt: int = A1, code: Code = Code.WORKER_LOST, *, again: bool = True) -> Failed:
        failed = Failed(rid=RID, attempt=attempt, code=code, message=f"of {attempt >> 32}", seq=seq, resubmit=again)
        self.hear(failed)
        return failed

    def submitted(self) -> tuple[Submit, bytes]:
        """What was said last, a submission and its payload."""
        message, payload = self.sent[-1], self.payloads[-1]
        assert isinstance(message, Submit)
        return message, payload

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


def test_what_is_over_cannot_be_cancelled() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(end(0))
    assert driver.stream.cancel("late") == []


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


def test_a_replay_that_ends_short_is_followed_by_another_after_a_while() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(5)
    driver.chunk(0, 3, now=2.0)
    driver.chunk(6)
    assert driver.sent[1:] == [Replay(rid=RID, attempt=A1, start=0)], "the rest of it may be on its way"
    driver.take(driver.stream.tick(2.0 + REPLAY_PATIENCE_S))
    assert driver.sent[2:] == [Replay(rid=RID, attempt=A1, start=3)]


def test_a_replay_whose_credit_is_used_up_is_followed_by_another_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Replay", lambda **fields: Replay(**fields, bytes_max=len(lines(0, 3))))
    driver = Driver()
    driver.lease()
    driver.chunk(7)
    driver.chunk(0, 2)
    assert [type(message) for message in driver.sent[1:]] == [Replay]
    driver.chunk(2, 1)
    assert [message.start for message in driver.sent[1:] if isinstance(message, Replay)] == [0, 3]
    driver.chunk(3, 5)
    driver.expect(8)
    assert len(driver.sent) == 3, "nothing is missing any more"


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
    assert driver.hear(Gap(rid=RID, attempt=A1, top=1)) == []
    assert driver.hear(Gap(rid=RID, attempt=A1, top=2)) == [ToBroker(Replay(rid=RID, attempt=A1, start=1))]


LAST = b'{"done":true}\n'


def test_several_replays_bring_what_is_missing_before_a_terminal_that_is_sent_once() -> None:
    """More than one replay's 4 MiB is missing when the terminal comes; nobody says it again."""
    pair = Pair()
    line = b'{"response":"%b"}\n' % (b"x" * 2**16)
    pair.lets_through = False
    for _ in range(150):
        pair.feed(line)
    pair.feed(LAST)
    pair.lets_through = True
    pair.eof()
    assert [type(output) for output in pair.driver.other] == [Begins, Over]
    starts = [message.start for message in pair.driver.sent if isinstance(message, Replay)]
    assert len(starts) == 3
    assert pair.driver.seen == [line[:-1]] * 150 + [LAST[:-1]]


def test_a_line_beyond_a_replays_credit() -> None:
    pair = Pair()
    long = b'{"response":"%b"}\n' % (b"x" * (5 * 2**20))
    pair.lets_through = False
    pair.feed(long + long + long)
    pair.lets_through = True
    pair.feed(LAST)
    pair.eof()
    assert [len(line) for line in pair.driver.seen] == [len(long) - 1] * 3 + [len(LAST) - 1]
    assert pair.driver.stream.phase is Phase.OVER


def test_what_the_worker_has_forgotten_ends_in_a_gap() -> None:
    pair = Pair(lease_bytes_max=4096)
    pair.lets_through = False
    for _ in range(100):
        pair.feed(lines(0, 1))
    pair.lets_through = True
    pair.feed(LAST)
    assert isinstance(pair.driver.other[-1], Over)
    assert isinstance(pair.driver.other[-1].terminal, Failed)
    assert pair.driver.other[-1].terminal.code is Code.RESUME_GAP


def test_a_last_line_without_its_newline_can_be_continued() -> None:
    pair = Pair()
    pair.feed(lines(0, 1) + lines(1, 1)[:-1])
    pair.eof()
    submit, payload = pair.driver.submitted()
    assert (submit.next_seq, payload) == (2, BODY + lines(0, 2))


# Replays that bring nothing -------------------------------------------------------------------------------------------


def wait_in_vain(driver: Driver, now: float) -> float:
    """All the replays a stream has patience for, but for the last."""
    for _ in range(REPLAYS_FRUITLESS_MAX - 1):
        now += REPLAY_PATIENCE_S
        assert [type(output) for output in driver.take(driver.stream.tick(now))] == [ToBroker]
    return now + REPLAY_PATIENCE_S


def test_replays_that_never_bring_anything_lose_the_host() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0)
    driver.chunk(2, now=1.0)
    now = wait_in_vain(driver, 1.0)
    driver.take(driver.stream.tick(now))
    submit, payload = driver.submitted()
    assert (submit.lost, submit.attempt, submit.next_seq, payload) == (True, A1, 1, BODY + lines(0, 1))
    assert driver.stream.tick(now + 100) == [], "it waits in the queue now"
    assert driver.other == []


def test_and_where_it_cannot_run_again_the_request_ends_and_is_stopped() -> None:
    driver = Driver(migrate=False)
    driver.lease()
    driver.chunk(0)
    driver.chunk(2, now=1.0)
    now = wait_in_vain(driver, 1.0)
    over, ack, cancel = driver.take(driver.stream.tick(now))
    assert isinstance(over, Over)
    assert isinstance(over.terminal, Failed)
    assert (over.terminal.code, over.terminal.seq) == (Code.WORKER_LOST, 1)
    assert "asked for 30 times" in over.terminal.message
    assert ack == ToBroker(Ack(rid=RID))
    assert isinstance(cancel, ToBroker)
    assert isinstance(cancel.message, Cancel)


def test_it_is_not_run_again_for_ever() -> None:
    driver = Driver()
    driver.lease(attempt_of(ATTEMPTS_MAX, 7))
    driver.hear(Gap(rid=RID, attempt=driver.stream.attempt, top=3))
    driver.take(driver.stream.tick(wait_in_vain(driver, 1.0)))
    assert isinstance(driver.other[-1], Over)


@pytest.mark.parametrize("progress", ["chunk", "submission", "another attempt"])
def test_progress_renews_the_patience(progress: str) -> None:
    driver = Driver()
    driver.lease()
    driver.hear(Gap(rid=RID, attempt=A1, top=9))
    now = wait_in_vain(driver, 1.0)
    match progress:
        case "chunk":
            driver.chunk(0, now=now)
        case "submission":
            driver.take(driver.stream.submission(now))
            driver.take(driver.stream.tick(now))
        case _:
            driver.lease(A2)
            driver.hear(Gap(rid=RID, attempt=A2, top=9), now=now)
    now = wait_in_vain(driver, now)
    assert driver.other == []
    driver.take(driver.stream.tick(now))
    assert len(driver.other) == 0, "it runs again"
    assert driver.stream.phase is Phase.WAITING


# Another attempt ------------------------------------------------------------------------------------------------------


def test_a_lost_request_of_which_nothing_came_runs_again_from_the_start() -> None:
    driver = Driver(migrate=False)
    driver.lease()
    driver.fail(0)
    submit, payload = driver.submitted()
    assert (submit.lost, submit.attempt, submit.next_seq, submit.continued) == (True, A1, 0, 0)
    assert (submit.accepted, submit.body_bytes, payload) == (True, len(BODY), BODY)
    assert driver.stream.phase is Phase.WAITING
    driver.lease(A2)
    driver.chunk(0, 1, A2)
    driver.hear(end(1, A2))
    driver.expect(1)
    assert driver.other == [Over(end(1, A2), b"")]
    assert driver.stream.continued == 0


def test_a_lost_stream_is_continued_from_what_it_passed_on() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(Started(rid=RID, attempt=A1, status=200))
    driver.chunk(0, 2)
    driver.chunk(1, 2)  # one of them is known
    driver.fail(3)
    submit, payload = driver.submitted()
    assert (submit.lost, submit.attempt, submit.next_seq, submit.continued) == (True, A1, 3, 1)
    assert (submit.body_bytes, payload) == (len(BODY), BODY + lines(0, 3))
    for stale in (Chunk(rid=RID, attempt=A1, seq=3, n=1), Started(rid=RID, attempt=A1, status=200)):
        assert driver.hear(stale, lines(3, 1)) == [], "of the attempt that is over"
    driver.fail(3)
    driver.hear(Leased(rid=RID, attempt=A1, worker="w1", engine="e"))
    assert driver.stream.phase is Phase.WAITING
    driver.lease(A2)
    driver.hear(Started(rid=RID, attempt=A2, status=200))
    driver.chunk(3, 2, A2)
    driver.hear(end(5, A2))
    driver.expect(5)
    assert driver.other == [Begins(200, ""), Over(end(5, A2), b"")]
    assert (driver.stream.continued, driver.stream.attempts) == (1, 2)


def test_a_failure_that_may_be_retried_waits_for_its_events_first() -> None:
    driver = Driver()
    driver.lease()
    driver.fail(2)
    assert isinstance(driver.sent[-1], Replay)
    driver.chunk(0, 2)
    assert driver.submitted()[0].next_seq == 2
    driver.expect(2)


def test_the_events_of_a_dead_host_are_lost_with_it() -> None:
    """The broker's answer to the replay, if the worker died before all was passed on: `seq` is where the reader is."""
    driver = Driver()
    driver.lease()
    driver.chunk(0)
    driver.fail(5)
    driver.fail(1)
    assert driver.submitted()[0].next_seq == 1


def test_a_host_that_comes_back_to_life_goes_on() -> None:
    """It was taken for dead, and has the events that were still missing: its stream is not broken off."""
    driver = Driver()
    driver.lease()
    driver.fail(2)
    driver.hear(Leased(rid=RID, attempt=A1, worker="w1", engine="e"))
    driver.chunk(0, 4)
    driver.hear(end(4))
    driver.expect(4)
    assert driver.other == [Over(end(4), b"")]


def test_an_end_that_waits_survives_being_told_of_its_lease_again() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(end(2))
    driver.lease()
    driver.chunk(0, 2)
    assert driver.other == [Over(end(2), b"")]


def test_an_end_that_waits_is_not_the_next_attempts() -> None:
    """A broker that restarted found nobody with the first attempt, of which nothing had been passed on."""
    driver = Driver()
    driver.lease()
    driver.hear(end(2))
    driver.lease(A2)
    assert driver.take(driver.stream.tick(9.0)) == [], "what the first attempt had the second has not yet"
    driver.chunk(0, 3, A2)
    driver.hear(end(2))
    assert driver.other == []
    driver.hear(end(3, A2))
    assert driver.other == [Over(end(3, A2), b"")]


def test_the_history_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HISTORY_BYTES_MAX", len(lines(0, 5)))
    driver = Driver()
    driver.lease()
    driver.chunk(0, 5)
    driver.fail(5)
    assert driver.submitted()[1] == BODY + lines(0, 5)
    driver.lease(A2)
    driver.chunk(5, 1, A2)
    driver.chunk(6, 1, A2)
    failed = driver.fail(7, A2)
    assert driver.other == [Over(failed, b"")]


def test_all_histories_of_a_gateway_have_a_bound_together() -> None:
    """The one that finds no room ends with its host; what is over gives its room back."""
    one, other = Driver(), Driver()
    room = one.histories.bytes_left
    one.histories.bytes_left = len(lines(0, 5))
    other.stream._histories = one.histories
    for driver in (one, other):
        driver.lease()
        driver.chunk(0, 3)
    failed = other.fail(3)
    assert other.other == [Over(failed, b"")]
    assert one.histories.bytes_left == len(lines(3, 2))
    one.fail(3)
    assert one.submitted()[1] == BODY + lines(0, 3)
    one.lease(A2)
    one.chunk(3, 1, A2)
    one.hear(end(4, A2))
    assert one.histories.bytes_left == len(lines(0, 5)) < room


@pytest.mark.parametrize(
    "message",
    [
        Leased(rid=RID, attempt=A2, worker="w2", engine="e"),
        Lost(rid=RID, attempt=A1),
        Failed(rid=RID, attempt=A2, code=Code.BACKEND_ERROR, message="", seq=0),
        End(rid=RID, attempt=A2, seq=1, stats=Stats()),
        Forgotten(rid=RID, attempt=A1, base=9),
    ],
)
def test_what_a_broker_says_of_what_it_held_before_does_not_count(message: Message) -> None:
    """It was frozen, and began anew meanwhile what this stream has the beginning of."""
    driver = Driver()
    driver.lease()
    driver.chunk(0, 2)
    driver.take(driver.stream.submission(1.0))
    assert driver.hear(message) == []
    assert driver.hear(Chunk(rid=RID, attempt=A2, seq=2, n=1), b"other\n") == []
    driver.lease()
    driver.chunk(2)
    driver.expect(3)


def test_a_submission_that_is_refused_ends() -> None:
    driver = Driver()
    refused = Failed(rid=RID, attempt=0, code=Code.QUEUE_FULL, message="full")
    driver.hear(refused)
    assert driver.other == [Over(refused, b"")]


def test_what_is_handed_over_is_cut_between_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHUNK_BYTES_MAX", len(lines(0, 2)))
    driver, heir = Driver(), Driver(resumed={"wanted": 1}, body=b"", attempt=A1)
    driver.lease()
    for seq in range(5):
        driver.chunk(seq)
    handed = driver.stream.hand_over()
    assert [(m.seq, m.n) for m, _ in handed if isinstance(m, Chunk)] == [(0, 2), (2, 2), (4, 1)]
    for message, payload in handed:
        heir.hear(message, payload)
    heir.expect(5)
    assert heir.stream.body == BODY


@pytest.mark.parametrize("why", ["nothing came", "no lines", "not kept", "it waits for another attempt"])
def test_what_cannot_be_handed_over(why: str) -> None:
    driver = Driver(migrate=why != "not kept")
    driver.lease()
    if why == "no lines":
        driver.stream.handle(Chunk(rid=RID, attempt=A1, seq=0, n=1), b'{"embeddings":[]}', 1.0)
    elif why != "nothing came":
        driver.chunk(0)
    if why == "it waits for another attempt":
        driver.fail(1)
    assert driver.stream.hand_over() == []


def test_what_a_continuation_has_already_is_kept_though_there_is_no_room() -> None:
    resumed = {"events": lines(0, 2)}
    driver = Driver(resumed=resumed, attempt=A1, lost=True, next_seq=2, continued=1)
    assert driver.histories.bytes_left == session.HISTORIES_BYTES_MAX - len(lines(0, 2))
    driver.expect(2)
    driver.take(driver.stream.submission(1.0))
    assert driver.submitted()[1] == BODY + lines(0, 2)


@pytest.mark.parametrize("base", [1, 2])
def test_news_of_an_attempt_that_was_left_behind_are_let_go(base: int) -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0)
    driver.fail(1)
    assert driver.hear(Forgotten(rid=RID, attempt=A1, base=base)) == []
    driver.lease(A2)
    driver.chunk(1, 1, A2)
    driver.expect(2)


def too_long() -> bytes:
    return BODY[:-1] + b',"system":"%b"}' % (b"x" * (BODY_BYTES_MAX - len(BODY) - 20))


@pytest.mark.parametrize(
    ("body", "submit"),
    [
        (BODY, {"migrate": False}),
        (BODY, {"continued": ATTEMPTS_MAX - 1}),
        (BODY, {"path": "/v1/chat/completions"}),
        (BODY[:-1] + b',"format":"json"}', {}),
        (too_long(), {}),
        (b"", {}),
    ],
    ids=["not wanted", "too often", "objection", "format", "too long", "no body"],
)
def test_what_cannot_be_continued_ends_with_its_host(body: bytes, submit: dict[str, Any]) -> None:
    driver = Driver(body, **submit)
    driver.lease()
    driver.chunk(0, 3)
    failed = driver.fail(3)
    driver.expect(3)
    assert driver.other == [Over(failed, b"")]
    assert driver.sent[1:] == [Ack(rid=RID)]


LAST = b'{"done":true,"done_reason":"stop","prompt_eval_count":3,"eval_count":2}\n'
STATS = Stats(done_reason="stop", prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize("seq", [0, 3], ids=["of which the broker knew", "the broker knew less"])
@pytest.mark.parametrize("migrate", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_what_has_its_last_line_is_complete_whatever_became_of_its_host(seq: int, migrate: bool, again: bool) -> None:
    driver = Driver(migrate=migrate)
    driver.lease()
    driver.hear(Chunk(rid=RID, attempt=A1, seq=0, n=3), lines(0, 2) + LAST)
    driver.fail(seq, again=again)
    assert driver.other == [Over(End(rid=RID, attempt=A1, seq=3, stats=STATS), b"")]
    assert driver.sent[-1] == Ack(rid=RID)


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
    assert (again.message.next_seq, again.message.attempt, again.payload) == (2, A1, BODY)
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


def test_what_a_replay_brought_during_a_pause_is_asked_for_at_once() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(Gap(rid=RID, attempt=A1, top=4))
    driver.stream.pause()
    driver.chunk(0, 4)
    assert driver.take(driver.stream.unpause(1.1)) == [ToBroker(Replay(rid=RID, attempt=A1, start=0))]
    assert driver.take(driver.stream.unpause(1.1)) == [], "it was not paused"


def test_unpausing_after_the_end_asks_for_nothing() -> None:
    driver = Driver()
    driver.lease()
    driver.stream.pause()
    driver.hear(end(0))
    assert driver.stream.unpause(2.0) == []


# A worker that answers ------------------------------------------------------------------------------------------------


class Pair:
    """A worker's session and a gateway's stream, and a broker that only passes on; it lets go what `lets_through` says.

    What the worker says of its lease by itself it says once: the terminal too.
    """

    def __init__(self, body: bytes = BODY, **limits: Any) -> None:
        self.now = 0.0
        self.worker = Session("w", "epoch", Limits(**limits), self.now)
        self.worker.set_engines((Engine(url="e", models=(Model(name="m", digest="d"),)),))
        self.driver = Driver(body)
        self.lets_through = True
        self._replays = 0
        self.worker.pump(lambda _: True, self.now)
        self.worker.handle(Registered(registration=1), b"", self.now)
        self.driver.lease()
        assign = Assign(rid=RID, attempt=A1, registration=1, engine="e", model="m", digest="d", path="/api/generate")
        (post,) = self.worker.handle(assign, body, self.now)
        assert isinstance(post, Post)
        self.lease = post.lease
        self.worker.head(self.lease, 200, "application/x-ndjson", self.now)
        self.pump()

    def feed(self, data: bytes) -> None:
        self.worker.feed(self.lease, data, self.now)
        self.pump()

    def eof(self) -> None:
        self.worker.eof(self.lease, self.now)
        self.pump()

    def pump(self) -> None:
        """Carry everything that waits, and all it leads to."""
        while True:
            frames: list[bytes] = []
            self.worker.pump(partial(_take, frames), self.now)
            for frame in frames:
                message, payload = protocol.from_worker.decode(frame)
                if self.lets_through and not isinstance(message, State):
                    if isinstance(message, Failed):
                        message = replace(message, resubmit=message.retryable)
                    self.driver.hear(message, payload, self.now)
            asked, self._replays = self._replays, sum(isinstance(message, Replay) for message in self.driver.sent)
            for replay in [message for message in self.driver.sent if isinstance(message, Replay)][asked:]:
                self.worker.handle(replay, b"", self.now)
            if not frames and asked == self._replays:
                return


def _take(frames: list[bytes], frame: bytes) -> bool:
    frames.append(frame)
    return True


def test_the_blank_line_that_ends_the_last_event_may_come_alone() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(Chunk(rid=RID, attempt=A1, seq=0, n=1), b"data: [DONE]\n")
    driver.hear(Chunk(rid=RID, attempt=A1, seq=1, n=1), b"\n")
    driver.fail(2)
    assert driver.other == [Over(End(rid=RID, attempt=A1, seq=2, stats=Stats()), b"")]


@pytest.mark.parametrize("code", [Code.WORKER_LOST, Code.MODEL_NOT_FOUND, Code.NO_WORKERS])
def test_that_it_could_not_be_continued_is_not_why_it_broke(code: Code) -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0, 3)
    cause = driver.fail(3, code=Code.BACKEND_ERROR)
    driver.lease(A2)
    driver.fail(3, A2, code, again=False)
    assert driver.other == [Over(cause, b"")]


@pytest.mark.parametrize(("events", "code"), [(4, Code.WORKER_LOST), (3, Code.BACKEND_ERROR)])
def test_what_broke_it_last_is_told(events: int, code: Code) -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0, 3)
    driver.fail(3)
    driver.lease(A2)
    if events > 3:
        driver.chunk(3, 1, A2)
    last = driver.fail(events, A2, code, again=False)
    assert driver.other == [Over(last, b"")]


def test_a_request_that_waits_to_be_continued_says_so_to_the_next_broker() -> None:
    driver = Driver(deadline_ms=9000)
    driver.lease()
    driver.chunk(0, 3)
    driver.fail(3)
    first = driver.submitted()
    driver.take(driver.stream.submission(4.0))
    submit, payload = driver.submitted()
    assert payload == first[1]
    assert (submit.lost, submit.next_seq, submit.waited_ms, submit.deadline_ms) == (True, 3, 4000, 5000)


def test_a_stopped_request_is_not_continued() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(0, 3)
    driver.stream.cancel("stop")
    failed = driver.fail(3)
    assert driver.other == [Over(failed, b"")]


# Resumed streams ------------------------------------------------------------------------------------------------------


def test_a_resumed_stream_begins_anew_for_its_sink_to_drop_what_is_known() -> None:
    driver = Driver(b"", resumed={"wanted": 3}, attempt=A1)
    driver.lease()
    assert driver.stream.phase is Phase.RUNNING
    driver.hear(Gap(rid=RID, attempt=A1, top=5))
    assert driver.sent == [Replay(rid=RID, attempt=A1, start=0)]
    driver.hear(Started(rid=RID, attempt=A1, status=200), BODY)
    assert driver.stream.body == BODY
    driver.chunk(0, 5)
    driver.fail(5)
    assert driver.submitted()[1] == BODY + lines(0, 5)


def test_another_body_is_not_taken() -> None:
    driver = Driver()
    driver.lease()
    driver.hear(Started(rid=RID, attempt=A1, status=200), b"another")
    assert driver.stream.body == BODY


@pytest.mark.parametrize("had", [0, 2])
def test_what_its_client_has_no_other_attempt_may_bring(had: int) -> None:
    """Its host dies before the replay came: another text would not go on from the three events the client has."""
    driver = Driver(resumed={"wanted": 3}, attempt=A1)
    driver.lease()
    if had:
        driver.chunk(0, had)
    (again,) = driver.stream.submission(2.0)
    assert isinstance(again, ToBroker)
    assert isinstance(again.message, Submit)
    assert (again.message.next_seq, again.message.lost) == (3, False), "nor may a broker that knows nothing start it"
    failed = driver.fail(had)
    assert driver.other == [Over(failed, b"")]


@pytest.mark.parametrize("asked", [1, 9])
def test_what_its_client_has_may_still_be_handed_over(asked: int) -> None:
    """Its worker is lost, and the line of the gateway where it was before is slow."""
    driver = Driver(b"", resumed={"wanted": 3}, attempt=A1, attachment=1)
    driver.lease()
    driver.fail(4)
    for second in range(asked):
        assert driver.sent[-1] == Replay(rid=RID, attempt=A1, start=0)
        driver.fail(0)
        driver.take(driver.stream.tick(1.0 + (second + 1) * REPLAY_PATIENCE_S))
    assert driver.other == []
    driver.hear(Started(rid=RID, attempt=A1, status=200), BODY)
    driver.chunk(0, 4)
    submit, payload = driver.submitted()
    assert (submit.lost, submit.next_seq, payload) == (True, 4, BODY + lines(0, 4))


def test_it_is_not_waited_for_for_ever() -> None:
    driver = Driver(b"", resumed={"wanted": 3}, attempt=A1, attachment=1)
    driver.lease()
    driver.fail(4)
    for second in range(HAND_OVER_PATIENCE):
        driver.fail(0)
        assert driver.other == []
        driver.take(driver.stream.tick(1.0 + (second + 1) * REPLAY_PATIENCE_S))
    failed = driver.fail(0)
    assert driver.other == [Over(failed, b"")]


def test_a_client_that_has_all_there_is_hears_why_it_broke_at_once() -> None:
    driver = Driver(resumed={"wanted": 3}, attempt=A1)
    driver.lease()
    failed = driver.fail(3, again=False)
    assert driver.other == [Over(failed, b"")]
    assert driver.sent == [Ack(rid=RID)]


def test_a_resumed_stream_whose_client_has_nothing_may_run_again() -> None:
    driver = Driver(resumed={"wanted": 0}, attempt=A1)
    driver.lease()
    driver.fail(0)
    assert driver.submitted()[0].lost


def test_where_the_beginning_is_forgotten_it_starts_where_the_worker_can() -> None:
    driver = Driver(resumed={"wanted": 4}, attempt=A1)
    driver.lease()
    driver.hear(Gap(rid=RID, attempt=A1, top=6))
    out = driver.hear(Forgotten(rid=RID, attempt=A1, base=2))
    assert out == [ToBroker(Replay(rid=RID, attempt=A1, start=2))]
    (events,) = driver.stream.handle(Chunk(rid=RID, attempt=A1, seq=2, n=4), lines(2, 4), 1.0)
    assert isinstance(events, Events)
    assert (events.seq, events.n) == (2, 4)
    failed = driver.fail(6)
    assert driver.other == [Over(failed, b"")], "without its beginning it can't be continued"


@pytest.mark.parametrize(("wanted", "base"), [(4, 5), (0, 1), (4, COUNT_MAX), (2**53, COUNT_MAX)])
def test_what_is_forgotten_and_not_known_is_a_gap(wanted: int, base: int) -> None:
    driver = Driver(resumed={"wanted": wanted}, attempt=A1)
    driver.lease()
    driver.hear(Gap(rid=RID, attempt=A1, top=6))
    over, ack, cancel = driver.hear(Forgotten(rid=RID, attempt=A1, base=base))
    assert isinstance(over, Over)
    assert isinstance(over.terminal, Failed)
    assert over.terminal.code is Code.RESUME_GAP
    assert ack == ToBroker(Ack(rid=RID))
    assert isinstance(cancel, ToBroker)
    assert isinstance(cancel.message, Cancel)
    assert driver.stream.phase is Phase.OVER


def test_what_was_forgotten_after_it_had_come_is_no_gap() -> None:
    driver = Driver()
    driver.lease()
    driver.chunk(1)
    driver.chunk(0, 3)
    assert driver.hear(Forgotten(rid=RID, attempt=A1, base=2)) == []
    assert driver.hear(Forgotten(rid=RID, attempt=A2, base=9)) == [], "of another attempt"
    driver.hear(end(3))
    driver.expect(3)
    assert driver.other == [Over(end(3), b"")]


def test_a_continuation_that_waits_has_its_events_from_the_start() -> None:
    resumed = {"wanted": 2, "events": lines(0, 3)}
    driver = Driver(resumed=resumed, attempt=A1, lost=True, next_seq=3, continued=1)
    driver.expect(3)
    assert driver.other == [Begins(200, "application/x-ndjson")]
    assert driver.stream.submission(1.0)[0] == ToBroker(
        replace(driver.stream.submit, waited_ms=1000, body_bytes=len(BODY)), BODY + lines(0, 3)
    )
    driver.lease(A2)
    driver.hear(Started(rid=RID, attempt=A2, status=200))
    driver.chunk(3, 1, A2)
    driver.fail(4, A2)
    submit, payload = driver.submitted()
    assert (submit.next_seq, submit.continued, payload) == (4, 2, BODY + lines(0, 4))
    driver.lease(A3)
    driver.hear(end(4, A3))
    assert driver.other == [Begins(200, "application/x-ndjson"), Over(end(4, A3), b"")]


def test_how_long_its_client_has_been_away_is_said() -> None:
    driver = Driver()
    driver.stream.absent_since = 3.0
    driver.take(driver.stream.submission(5.5))
    assert driver.submitted()[0].absent_ms == 2500


def test_a_terminal_of_an_attempt_whose_lease_was_not_heard_of_counts() -> None:
    """A gateway that was cut off hears of the end first, and must not answer for an attempt it thinks is current."""
    driver = Driver()
    driver.hear(Accepted(rid=RID))
    driver.hear(Failed(rid=RID, attempt=A2, code=Code.WORKER_LOST, message="", resubmit=True))
    submit, _ = driver.submitted()
    assert (submit.attempt, submit.lost) == (A2, True)
    ended = Driver()
    ended.hear(Accepted(rid=RID))
    ended.hear(end(2, A2))
    assert [m for m in ended.sent if isinstance(m, Replay)] == [Replay(rid=RID, attempt=A2, start=0)]
    ended.chunk(0, 2, A2)
    assert ended.stream.phase is Phase.OVER


def test_a_resumed_stream_waits_for_a_worker_that_is_only_away() -> None:
    """It has the only copy. `retryable` says that it may come back; when it does not, this is the end."""
    away = Failed(rid=RID, attempt=A1, code=Code.WORKER_LOST, message="", retryable=True, resubmit=True)
    submit = Submit(rid=RID, client="c", ref="1", model="m", path="/api/generate", accepted=True, attempt=A1)
    stream = Stream(submit, b"", 0.0, histories=Histories(), wanted=1)
    assert stream.handle(end(2), b"", 1.0) == [ToBroker(Replay(rid=RID, attempt=A1, start=0))]
    assert stream.handle(away, b"", 1.0) == []
    assert stream.tick(1.0 + REPLAY_PATIENCE_S) == [ToBroker(Replay(rid=RID, attempt=A1, start=0))]
    gone = replace(away, retryable=False)
    [over, acked] = stream.handle(gone, b"", 3.0)
    assert isinstance(over, Over)
    assert (over.terminal.code if isinstance(over.terminal, Failed) else None) is Code.WORKER_LOST
    assert acked == ToBroker(Ack(rid=RID))


# The promise ----------------------------------------------------------------------------------------------------------


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
                driver.chunk(replay.start, min(n, total - replay.start), now=now)
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


# Bodies in parts ------------------------------------------------------------------------------------------------------


def want(offset: int, attempt: int = A1) -> Want:
    return Want(rid=RID, attempt=attempt, offset=offset, size=10)


def test_what_is_wanted_of_a_body_in_parts_is_asked_of_whoever_has_it() -> None:
    driver = Driver(b"", parted_bytes=100)
    assert driver.submitted() == (replace(driver.stream.submit, body_bytes=0), b"")
    assert driver.hear(want(0)) == [], "of what was before the submission"
    driver.lease()
    assert driver.hear(want(90)) == [Wanted(A1, 90, 10)]
    assert driver.hear(want(100)) == [], "beyond its end"
    assert driver.hear(want(0, A2)) == [], "of another attempt"
    driver.hear(Lost(rid=RID, attempt=A1))
    assert driver.hear(want(0)) == [], "the attempt is over"


def test_a_body_in_parts_can_run_again_but_not_be_continued() -> None:
    driver = Driver(b"", parted_bytes=100)
    driver.lease()
    driver.fail(0)
    assert driver.submitted()[0].lost
    driver.lease(A2)
    driver.chunk(0, 2, A2)
    failed = driver.fail(2, A2)
    assert driver.other[-1] == Over(failed, b"")


def test_nothing_is_wanted_of_a_body_that_was_sent() -> None:
    driver = Driver()
    driver.lease()
    assert driver.hear(want(0)) == []
