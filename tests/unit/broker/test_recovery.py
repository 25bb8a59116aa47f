"""What outlives a broker, a gateway, a worker or a client's line. The harness checks invariants after each event."""

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from broker import core, recovery
from broker.events import Forward
from broker.state import Phase
from common import protocol
from common.errors import Code, ProtocolError
from common.protocol import (
    Accepted,
    Assign,
    Attached,
    Cancel,
    Chunk,
    Detached,
    Drain,
    End,
    Error,
    Failed,
    Gap,
    Leased,
    Lost,
    Queued,
    Registered,
    Release,
    Replay,
    Snapshot,
    Started,
    Stats,
    Submit,
    Superseded,
    attempt_of,
    ordinal_of,
)
from tests.unit.broker.harness import NONCE, Harness, claim_of, engine, rid_of

FORMER = 0xDEAD
"""The nonce of a broker before this one."""
FIRST = attempt_of(1, FORMER)
SECOND = attempt_of(2, FORMER)
R1 = rid_of("r1")
BEATING = (b"g1", b"g2", b"w1", b"w2")


@pytest.fixture
def fresh() -> Harness:
    """A broker that has just started; g1 and g2 have said hello, and it knows nothing."""
    h = Harness(settle_s=5.0)
    h.gateway("g1")
    h.gateway("g2")
    h.tick()
    h.sent(b"g1")
    return h


@pytest.fixture
def h() -> Harness:
    """A broker with a past of its own: g1, g2 and w1 (one slot), and no window open any more."""
    harness = Harness()
    harness.gateway("g1")
    harness.gateway("g2")
    harness.worker("w1")
    harness.wait(10.5, beating=BEATING[:3])
    for peer in BEATING:
        harness.sent(peer)
    return harness


def resubmit(h: Harness, name: str = "r1", *, peer: bytes = b"g1", **more: Any) -> bytes:
    """A gateway submits again what a broker before this one had accepted and leased."""
    return h.submit(name, peer=peer, **{"accepted": True, "attempt": FIRST, **more})


def continuation(h: Harness, attempt: int, next_seq: int = 3, **more: Any) -> bytes:
    """g1 has so many events of an attempt that is over, and wants the request to go on from there."""
    body = b"body" + b"{}\n" * next_seq
    return resubmit(h, attempt=attempt, lost=True, next_seq=next_seq, body=body, body_bytes=4, **more)


def running(h: Harness, name: str = "r1", *, events: int = 3, **more: Any) -> Assign:
    """g1's request, leased to w1, with so many events."""
    h.submit(name, **more)
    assign = h.assigned()
    if events:
        h.chunk(assign.rid, assign.attempt, 0, events)
    h.sent(b"g1")
    return assign


def finished(h: Harness, name: str = "r1", **more: Any) -> Assign:
    """g1's request, ended after three events and acknowledged."""
    assign = running(h, name, **{"grace_ms": 60_000, **more})
    h.end(assign.rid, assign.attempt, 3)
    h.ack(assign.rid)
    h.sent(b"g1")
    h.sent(b"w1")
    return assign


def attached(h: Harness, peer: bytes = b"g2", *, wanted: int = 0) -> Submit:
    """The one answer to this gateway's attach, which it submits, as its client has `wanted` events of it."""
    [(message, payload)] = [(m, payload) for m, payload in h._sent.pop(peer) if isinstance(m, Attached)]
    submit = message.submit
    assert submit is not None
    h.from_gateway(replace(submit, next_seq=submit.next_seq if submit.lost else wanted), payload, peer)
    return submit


def attach(h: Harness, ref: str = "r1", *, peer: bytes = b"g2", wanted: int = 0) -> Submit:
    """A client has come back to this gateway, which takes its request over."""
    h.sent(peer)
    h.attach(ref, peer=peer)
    return attached(h, peer, wanted=wanted)


def phase(h: Harness, rid: bytes = R1) -> Phase | None:
    return h.request(rid).phase


def worker_of(h: Harness, rid: bytes = R1) -> str:
    worker = h.request(rid).worker
    return worker.name if worker else ""


# The claim and the resubmission ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("claims_first", [True, False])
def test_a_stream_goes_on_when_its_worker_and_its_gateway_are_back(fresh: Harness, claims_first: bool) -> None:
    claim = claim_of(R1, FIRST, 5)
    if claims_first:
        fresh.worker("w1", claims=[claim])
    resubmit(fresh, next_seq=3)
    if not claims_first:
        assert fresh.sent(b"g1") == [Accepted(rid=R1)]
        assert phase(fresh) is Phase.RECOVERING
        fresh.worker("w1", claims=[claim])
    sent = [message for message in fresh.sent(b"g1") if not isinstance(message, Snapshot)]
    leased = Leased(rid=R1, attempt=FIRST, worker="w1", engine="http://e1")
    assert sent == [Accepted(rid=R1), leased, Gap(rid=R1, attempt=FIRST, top=5)]
    assert fresh.told(Cancel, b"w1") == []
    assert phase(fresh) is Phase.STREAMING
    assert fresh.core.state.workers["w1"].busy == {("http://e1", "sha:m:latest"): 1}
    frame = fresh.chunk(R1, FIRST, 5)
    assert fresh.sent(b"g1") == [frame]


def test_a_lease_that_was_not_claimed_starts_anew_when_the_window_has_passed(fresh: Harness) -> None:
    fresh.worker("w1")
    resubmit(fresh, body=b"the body")
    fresh.wait(9.9, beating=BEATING[:3])
    assert fresh.told(Assign, b"w1") == []
    fresh.sent(b"g1")
    fresh.wait(0.2, beating=BEATING[:3])
    [assign] = fresh.told(Assign, b"w1")
    assert ordinal_of(assign.attempt) == 2
    assert Lost(rid=R1, attempt=FIRST) in fresh.sent(b"g1")


def test_one_that_had_streamed_asks_its_gateway_instead(fresh: Harness) -> None:
    fresh.worker("w1")
    resubmit(fresh, next_seq=7)
    fresh.wait(10.1, beating=BEATING[:3])
    [failed] = fresh.told(Failed)
    assert (failed.code, failed.attempt, failed.seq, failed.resubmit) == (Code.WORKER_LOST, FIRST, 7, True)
    assert fresh.told(Assign, b"w1") == []


def test_each_request_has_the_whole_window_for_its_claim(fresh: Harness) -> None:
    fresh.wait(9, beating=BEATING[:2])
    resubmit(fresh)
    fresh.wait(9, beating=BEATING[:2])
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 1)])
    assert phase(fresh) is Phase.STREAMING


def test_a_lease_of_this_brokers_own_that_it_has_forgotten_waits_for_nobody(h: Harness) -> None:
    assign = running(h)
    h.wait(15, beating=[b"g2", b"w1"])
    assert h.empty, "its gateway was away for too long"
    h.gateway("g1")
    resubmit(h, attempt=assign.attempt, next_seq=3)
    [failed] = h.told(Failed)
    assert (failed.code, failed.resubmit) == (Code.WORKER_LOST, True)


def test_a_standby_that_has_been_up_for_long_recovers_like_a_new_broker() -> None:
    h = Harness(settle_s=5.0)
    h.wait(100)
    h.gateway("g1")
    h.gateway("g2")
    h.attach("r1")
    assert h.sent(b"g2") == [], "whoever has it is on its way"
    waits = resubmit(h, "waits", attempt=0)
    h.wait(3, beating=BEATING[:2])
    assert h.told(Failed) == [], "there may be workers yet"
    h.worker("w1", claims=[claim_of(R1, FIRST, 5)])
    resubmit(h, next_seq=5)
    assert phase(h) is Phase.STREAMING
    assert phase(h, waits) is Phase.QUEUED


def test_a_gateways_trace_of_another_broker_opens_the_window_again(h: Harness) -> None:
    resubmit(h, "other")
    h.worker("w2", claims=[claim_of(R1, FIRST, 5)])
    assert phase(h) is Phase.STREAMING


def test_a_claim_that_no_gateway_comes_for_is_given_up(fresh: Harness) -> None:
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 5), claim_of(rid_of("r2"), FIRST, 5, grace_ms=30_000)])
    fresh.sent(b"w1")
    fresh.wait(10.1, beating=BEATING[:3])
    assert fresh.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=FIRST)]
    fresh.wait(20, beating=BEATING[:3])
    assert fresh.told(Cancel, b"w1") == [Cancel(rid=rid_of("r2"), attempt=FIRST)]
    assert fresh.empty


def test_what_ended_while_the_broker_was_away_is_asked_for(fresh: Harness) -> None:
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 5, ended=True)])
    assert fresh.told(Replay, b"w1") == [Replay(rid=R1, attempt=FIRST, start=5)]
    end = fresh.end(R1, FIRST, 5)
    assert fresh.core.state.workers["w1"].busy == {}, "the slot is free"
    resubmit(fresh, next_seq=3)
    assert fresh.told(End) == [end]


def test_claims_beyond_the_slots_are_counted_and_nothing_is_placed_before_they_are_done(fresh: Harness) -> None:
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 1), claim_of(rid_of("r2"), FIRST, 1)])
    waits = resubmit(fresh, "r3", attempt=0)
    fresh.wait(2, beating=BEATING[:3])
    fresh.end(R1, FIRST)
    assert phase(fresh, waits) is Phase.QUEUED
    fresh.end(rid_of("r2"), FIRST)
    assert phase(fresh, waits) is Phase.LEASED


def test_a_claimed_lease_without_events_gets_its_body_from_the_gateway(fresh: Harness) -> None:
    """So that it can be tried elsewhere; without, its gateway is asked."""
    fresh.worker("w1", claims=[claim_of(R1, FIRST), claim_of(rid_of("r2"), FIRST)])
    resubmit(fresh, body=b"the body")
    resubmit(fresh, "r2", body=b"")
    fresh.sent(b"g1")
    fresh.worker("w2")
    fresh.wait(2, beating=(*BEATING[:2], b"w2"))
    fresh.sent(b"w2")
    fresh.bye(b"w1")
    assert fresh.payloads(b"w2") == [b"the body"]
    assert [(failed.rid, failed.resubmit) for failed in fresh.told(Failed)] == [(rid_of("r2"), True)]


def test_a_claim_that_is_behind_its_reader_is_not_begun_again(fresh: Harness) -> None:
    """The reader has three events of an attempt of which its worker knows none: another start would mix two texts."""
    resubmit(fresh, next_seq=3)
    fresh.worker("w1", claims=[claim_of(R1, FIRST)])
    assert phase(fresh) is Phase.LEASED
    fresh.sent(b"g1")
    fresh.bye(b"w1")
    [failed] = fresh.told(Failed)
    assert (failed.seq, failed.resubmit) == (3, True)


def test_a_worker_that_claims_and_then_refuses_has_lost_it(fresh: Harness) -> None:
    fresh.worker("w1", claims=[claim_of(R1, FIRST)])
    resubmit(fresh, body=b"")
    fresh.refused(R1, FIRST)
    assert [failed.resubmit for failed in fresh.told(Failed)] == [True]


# Which attempt counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("w1", "w2"), ("w2", "w1")])
def test_the_highest_attempt_claimed_wins(fresh: Harness, order: tuple[str, str]) -> None:
    attempts = {"w1": FIRST, "w2": SECOND}
    for worker in order:
        fresh.worker(worker, claims=[claim_of(R1, attempts[worker], 4)])
    assert (worker_of(fresh), fresh.request(R1).attempt) == ("w2", SECOND)
    assert fresh.told(Cancel, b"w1") == [
        Cancel(rid=R1, attempt=FIRST, reason="" if order[0] == "w1" else "no such lease")
    ]
    assert fresh.core.state.workers["w1"].busy == {}


def test_one_that_has_ended_gives_way_to_a_higher_one_too(fresh: Harness) -> None:
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 4, ended=True)])
    fresh.end(R1, FIRST, 4)
    fresh.worker("w2", claims=[claim_of(R1, SECOND, 6)])
    assert (worker_of(fresh), phase(fresh)) == ("w2", Phase.STREAMING)
    assert fresh.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=FIRST)]


@pytest.mark.parametrize("claims_first", [True, False])
def test_at_a_tie_the_one_the_gateway_names(fresh: Harness, claims_first: bool) -> None:
    other = attempt_of(1, FORMER + 1)
    if claims_first:
        fresh.worker("w1", claims=[claim_of(R1, FIRST, 4)])
        resubmit(fresh, attempt=other)
    else:
        resubmit(fresh, attempt=other)
        fresh.worker("w1", claims=[claim_of(R1, FIRST, 4)])
    assert phase(fresh) is Phase.RECOVERING
    assert [cancel.attempt for cancel in fresh.told(Cancel, b"w1")] == [FIRST]
    fresh.worker("w2", claims=[claim_of(R1, other, 4)])
    assert (worker_of(fresh), fresh.request(R1).attempt) == ("w2", other)


@pytest.mark.parametrize("claims_first", [True, False])
def test_an_attempt_the_gateway_was_told_is_lost_does_not_count(fresh: Harness, claims_first: bool) -> None:
    def submit() -> None:
        resubmit(fresh, lost=True, next_seq=2, body=b"bodyevents", body_bytes=4)

    if not claims_first:
        submit()
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 4)])
    if claims_first:
        submit()
    assert FIRST in [cancel.attempt for cancel in fresh.told(Cancel, b"w1")]
    fresh.wait(2, beating=BEATING[:3])
    assert fresh.request(R1).attempt == attempt_of(2, NONCE)


@pytest.mark.parametrize("claims_first", [True, False])
def test_a_later_attempt_is_believed_as_long_as_nothing_was_passed_on(fresh: Harness, claims_first: bool) -> None:
    """The former broker's word of it did not reach the gateway."""
    if claims_first:
        fresh.worker("w1", claims=[claim_of(R1, SECOND, 4)])
        resubmit(fresh)
    else:
        resubmit(fresh)
        fresh.worker("w1", claims=[claim_of(R1, SECOND, 4)])
    assert (fresh.request(R1).attempt, phase(fresh)) == (SECOND, Phase.STREAMING)
    assert fresh.told(Gap)[-1] == Gap(rid=R1, attempt=SECOND, top=4)


@pytest.mark.parametrize("claims_first", [True, False])
def test_a_later_attempt_that_does_not_follow_from_what_was_passed_on_is_cancelled(
    fresh: Harness, claims_first: bool
) -> None:
    if claims_first:
        fresh.worker("w1", claims=[claim_of(R1, SECOND, 9)])
        resubmit(fresh, next_seq=3)
    else:
        resubmit(fresh, next_seq=3)
        fresh.worker("w1", claims=[claim_of(R1, SECOND, 9)])
    assert [cancel.attempt for cancel in fresh.told(Cancel, b"w1")] == [SECOND]
    assert (phase(fresh), fresh.request(R1).attempt) == (Phase.RECOVERING, FIRST)
    fresh.worker("w2", claims=[claim_of(R1, FIRST, 5)])
    assert worker_of(fresh) == "w2"


@pytest.mark.parametrize("held", ["queued", "leased"])
def test_a_higher_claim_takes_the_place_of_what_has_not_begun(fresh: Harness, held: str) -> None:
    resubmit(fresh, attempt=0)
    fresh.worker("w2")
    if held == "leased":
        fresh.wait(2, beating=(*BEATING[:2], b"w2"))
    assert phase(fresh).value == held  # type: ignore[union-attr]
    fresh.sent(b"w2")
    fresh.worker("w1", claims=[claim_of(R1, SECOND, 4)])
    assert (worker_of(fresh), fresh.request(R1).attempt) == ("w1", SECOND)
    assert len(fresh.told(Cancel, b"w2")) == (held == "leased")
    assert fresh.core._client_waiting == {}


@pytest.mark.parametrize("ordinal", [1, 2])
def test_between_our_attempt_and_another_brokers_the_gateway_decides(h: Harness, ordinal: int) -> None:
    """We were frozen, and woke to a submission of long ago; meanwhile it ran with another broker."""
    theirs = attempt_of(ordinal, FORMER)
    ours = running(h, events=1)
    h.sent(b"w1")
    h.worker("w2", claims=[claim_of(R1, theirs, 5, ended=True)])
    assert h.told(Cancel, b"w2") == [], "it may have the only copy"
    resubmit(h, attempt=theirs, next_seq=3)
    assert [m.attempt for m in h.told(Cancel, b"w1")] == [ours.attempt]
    assert (worker_of(h), phase(h), h.request(R1).attempt) == ("w2", Phase.STREAMING, theirs)
    assert h.told(Cancel, b"w2") == []
    assert h.core._window.disputed == {}


def test_a_claim_waits_however_often_we_have_tried_meanwhile(h: Harness) -> None:
    """And however often it is made: a cancel would be for the only copy."""
    assign = running(h, events=0)
    claims = [claim_of(R1, FIRST, 5, ended=True)]
    h.worker("w2", engine("n:latest"), claims=claims)
    for _ in range(2):
        h.failed(R1, assign.attempt, retryable=True)
        assign = h.assigned()
        h.worker("w2", engine("n:latest"), claims=claims)
    assert ordinal_of(assign.attempt) == 3
    assert h.told(Cancel, b"w2") == []
    resubmit(h, attempt=FIRST, next_seq=3)
    assert (worker_of(h), h.request(R1).attempt) == ("w2", FIRST)


def test_a_claim_that_waits_may_go_on(h: Harness) -> None:
    """What it says meanwhile goes to nobody; it is asked for when its gateway has spoken."""
    running(h, events=1)
    h.worker("w2", claims=[claim_of(R1, FIRST, 2)])
    h.chunk(R1, FIRST, 2, 3, peer=b"w2")
    h.end(R1, FIRST, 5, peer=b"w2")
    assert h.told(Cancel, b"w2") == []
    h.sent(b"w2")
    resubmit(h, attempt=FIRST, next_seq=2)
    assert (worker_of(h), h.request(R1).attempt) == ("w2", FIRST)
    assert [replay.start for replay in h.sent(b"w2") if isinstance(replay, Replay)] == [2]


def test_of_several_claims_that_wait_one_counts_and_the_others_are_cancelled(h: Harness) -> None:
    running(h, events=1)
    h.worker("w2", claims=[claim_of(R1, FIRST, 2)])
    h.worker("w3", claims=[claim_of(R1, SECOND, 4)])
    resubmit(h, attempt=FIRST, next_seq=2)
    assert (worker_of(h), h.request(R1).attempt) == ("w2", FIRST)
    assert [m.attempt for m in h.told(Cancel, b"w3")] == [SECOND]


def test_a_gateway_that_followed_us_has_the_others_cancelled(h: Harness) -> None:
    ours = running(h, events=1)
    h.worker("w2", claims=[claim_of(R1, FIRST, 5)])
    resubmit(h, attempt=ours.attempt, next_seq=1)
    assert [m.attempt for m in h.told(Cancel, b"w2")] == [FIRST]
    assert (worker_of(h), h.request(R1).attempt) == ("w1", ours.attempt)


def test_a_claim_whose_worker_is_gone_is_decided_for_nobody(h: Harness) -> None:
    running(h, events=1)
    h.worker("w2", claims=[claim_of(R1, FIRST, 5)])
    h.bye(b"w2")
    resubmit(h, attempt=FIRST, next_seq=3)
    assert phase(h) is Phase.RECOVERING


def test_claims_that_wait_have_a_bound(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "DISPUTED_MAX", 0)
    running(h, events=1)
    h.worker("w2", claims=[claim_of(R1, FIRST, 5)])
    assert [m.attempt for m in h.told(Cancel, b"w2")] == [FIRST]


def test_a_gateway_that_followed_another_broker_knows_better(h: Harness) -> None:
    assign = running(h, events=0)
    resubmit(h, attempt=SECOND, next_seq=5)
    assert h.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=assign.attempt)]
    assert phase(h) is Phase.RECOVERING
    h.worker("w2", claims=[claim_of(R1, SECOND, 6)])
    assert phase(h) is Phase.STREAMING


def test_what_waits_here_gives_way_to_an_attempt_that_delivered_elsewhere(h: Harness) -> None:
    """Here it failed before its first event; with another broker the same attempt went on, and its reader has five."""
    assign = running(h, events=0)
    h.wait(3.5, beating=[b"g1", b"g2"])
    assert phase(h) is Phase.QUEUED
    resubmit(h, attempt=assign.attempt, next_seq=5)
    assert phase(h) is Phase.ENDED, "an attempt of ours that no worker has"
    assert [failed.seq for failed in h.told(Failed)] == [5]


def test_the_next_attempt_is_one_more_than_the_highest_known(fresh: Harness) -> None:
    fresh.worker("w1", claims=[claim_of(R1, attempt_of(4, FORMER), 9)])
    resubmit(fresh, lost=True, next_seq=3, body=b"bodyevents", body_bytes=4)
    fresh.wait(2, beating=BEATING[:3])
    assert ordinal_of(fresh.request(R1).attempt) == 5


# Register is the truth ------------------------------------------------------------------------------------------------


def test_a_cancel_that_was_lost_is_said_again_to_the_claim(h: Harness) -> None:
    assign = running(h)
    h.cancel(R1)
    h.sent(b"w1")
    h.worker("w1", claims=[claim_of(R1, assign.attempt, 5)])
    assert h.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=assign.attempt, reason="no such lease")]


def test_the_same_while_the_window_is_open(fresh: Harness) -> None:
    """Of what the broker ended itself no claim is taken up, whoever named the attempt."""
    fresh.worker("w1", engine("m:latest", slots=2), claims=[claim_of(R1, FIRST, 5)])
    resubmit(fresh)
    fresh.cancel(R1)
    own = running(fresh, "r2", events=1)
    fresh.cancel(own.rid)
    fresh.core._window.tombstones.discard(own.rid)
    fresh.sent(b"w1")
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 5), claim_of(own.rid, own.attempt, 5)])
    assert len(fresh.told(Cancel, b"w1")) == 2
    assert fresh.empty


def test_a_lost_assign_is_no_failure(h: Harness) -> None:
    assign = running(h, events=0)
    for _ in range(5):
        h.worker("w1")
    assert (h.request(R1).failures, h.request(R1).failed_on) == (0, set())
    assert ordinal_of(h.request(R1).attempt) == ordinal_of(assign.attempt) + 5


def test_a_worker_that_was_taken_for_dead_gets_its_lease_back_while_nobody_has_another(h: Harness) -> None:
    """Broker and peers were cut off from each other: neither the gateway nor anybody else has heard of the death."""
    assign = running(h, grace_ms=60_000)
    h.wait(4, beating=[b"g2"])
    assert phase(h) is Phase.ENDED
    h.gateway("g1")
    h.worker("w1", claims=[claim_of(R1, assign.attempt, 8)])
    assert (phase(h), worker_of(h)) == (Phase.STREAMING, "w1")
    resubmit(h, attempt=assign.attempt, next_seq=3)
    assert h.told(Gap)[-1].top == 8
    assert h.told(Failed) == []


def test_a_paused_worker_finds_its_attempt_fenced(h: Harness) -> None:
    assign = running(h)
    h.wait(4, beating=[b"g1", b"g2"])
    continuation(h, assign.attempt)
    h.sent(b"w1")
    h.worker("w1", claims=[claim_of(R1, assign.attempt, 30)])
    assert h.told(Cancel, b"w1")[0].attempt == assign.attempt
    assert h.request(R1).attempt != assign.attempt


def test_a_death_that_was_final_is_not_taken_back(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "ATTEMPTS_MAX", 1)
    assign = running(h)
    h.bye(b"w1")
    assert [failed.resubmit for failed in h.told(Failed)] == [False]
    h.worker("w1", claims=[claim_of(R1, assign.attempt, 8)])
    assert h.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=assign.attempt, reason="no such lease")]


def test_the_buffer_of_an_ended_request_comes_back_with_its_worker(h: Harness) -> None:
    assign = running(h)
    h.end(R1, assign.attempt, 3)
    h.bye(b"w1")
    h.worker("w1", claims=[claim_of(R1, assign.attempt, 3, ended=True)])
    replay = h.replay(R1, assign.attempt, 1)
    assert replay in h.sent(b"w1")
    h.worker("w2", claims=[claim_of(R1, assign.attempt, 3, ended=True)])
    assert h.told(Cancel, b"w2") != [], "only one can have it"


def test_a_superseded_process_stays_so(h: Harness) -> None:
    h.worker("w1", epoch="e2", peer=b"w1-new")
    h.sent(b"w1")
    h.worker("w1", epoch="e1")
    assert h.sent(b"w1") == [Superseded()]
    assert h.core.state.workers["w1"].epoch == "e2"


def test_also_one_that_was_lost_before_its_successor_came(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    h.bye(b"w1")
    h.worker("w1", epoch="e2", peer=b"w1-new")
    h.worker("w1", epoch="e1")
    assert h.told(Superseded, b"w1") == [Superseded()]
    monkeypatch.setattr(core, "EPOCHS_MAX", 1)
    h.worker("w1", epoch="e3", peer=b"w1-newer")
    h.worker("w1", epoch="e1")
    assert h.told(Registered, b"w1") != [], "as many are remembered, and no more"


# Cancels and tombstones -----------------------------------------------------------------------------------------------


def test_a_late_claim_of_what_was_cancelled_is_cancelled_too(fresh: Harness) -> None:
    fresh.cancel(R1)
    assert [failed.code for failed in fresh.told(Failed)] == [Code.CANCELLED]
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 5)])
    assert fresh.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=FIRST, reason="no such lease")]
    assert fresh.empty


def test_a_cancel_after_the_claim_is_the_gateways_first_word(fresh: Harness) -> None:
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 5)])
    fresh.cancel(R1)
    assert [failed.code for failed in fresh.told(Failed)] == [Code.CANCELLED]
    assert fresh.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=FIRST)]


@pytest.mark.parametrize("how", ["cancel", "deadline", "detach"])
def test_what_ends_while_it_waits_for_its_claim_leaves_a_tombstone(fresh: Harness, how: str) -> None:
    resubmit(fresh, deadline_ms=500 if how == "deadline" else None)
    if how == "cancel":
        fresh.cancel(R1)
    elif how == "detach":
        fresh.detach(R1)
    else:
        fresh.wait(1, beating=BEATING[:2])
    assert [failed.rid for failed in fresh.told(Failed)] == [R1]
    fresh.worker("w1", claims=[claim_of(R1, FIRST, 5)])
    assert [cancel.attempt for cancel in fresh.told(Cancel, b"w1")] == [FIRST]
    assert fresh.empty


def test_tombstones_are_bounded_and_go_with_the_window(fresh: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "TOMBSTONES_MAX", 2)
    for name in ("a", "b", "c"):
        fresh.cancel(rid_of(name))
    assert fresh.core._window.tombstones == {rid_of("a"), rid_of("b")}
    fresh.wait(10.5, beating=BEATING[:2])
    assert fresh.core._window.tombstones == set()


def test_who_comes_back_to_cancel_is_heard_if_it_was_the_last(h: Harness) -> None:
    assign = running(h, grace_ms=60_000)
    h.wait(4, beating=[b"g2", b"w1"])
    h.gateway("g1")
    h.cancel(R1, peer=b"g2")
    assert (phase(h), h.sent(b"g2")[-1]) == (Phase.STREAMING, Detached(rid=R1))
    h.cancel(R1)
    assert [failed.code for failed in h.told(Failed)] == [Code.CANCELLED]
    assert Cancel(rid=R1, attempt=assign.attempt) in h.sent(b"w1")


# Terminals ------------------------------------------------------------------------------------------------------------


def test_a_terminal_said_again_with_a_replay_is_told_in_the_words_of_the_first(h: Harness) -> None:
    """A worker does not know whether there may be another attempt; `resubmit` must not get lost with the repeat."""
    assign = running(h)
    failed = h.failed(R1, assign.attempt, retryable=True, seq=3, payload=b"words")
    h.replay(R1, assign.attempt, 1)
    h.failed(R1, assign.attempt, retryable=True, seq=3, payload=b"words")
    assert h.sent(b"g1") == [replace(failed, resubmit=True)] * 2
    gap = h.failed(R1, assign.attempt, code=Code.RESUME_GAP, seq=1)
    assert h.sent(b"g1") == [gap]
    assert h.request(R1).terminal == replace(failed, resubmit=True)


def test_a_terminal_without_resume_is_kept_until_the_acknowledgement_only(h: Harness) -> None:
    assign = running(h)
    h.end(R1, assign.attempt, 3)
    h.ack(R1, peer=b"g2")
    assert phase(h) is Phase.ENDED
    h.ack(R1)
    assert h.empty


# Detach, attach, and the resume timer ---------------------------------------------------------------------------------


def test_a_client_that_does_not_come_back_is_given_up_down_to_the_worker(h: Harness) -> None:
    assign = running(h, grace_ms=2000)
    h.detach(R1)
    h.wait(1.9, beating=BEATING[:3])
    frame = h.chunk(R1, assign.attempt, 3)
    assert frame in h.sent(b"g1"), "meanwhile its gateway goes on receiving it"
    h.wait(0.2, beating=BEATING[:3])
    assert Cancel(rid=R1, attempt=assign.attempt) in h.sent(b"w1")
    assert [(f.code, f.message) for f in h.told(Failed)] == [(Code.CANCELLED, "its client did not come back")]
    assert h.empty


def test_a_client_that_cannot_resume_is_given_up_at_once(h: Harness) -> None:
    assign = running(h)
    h.detach(R1, peer=b"g2")
    h.detach(rid_of("unknown"))
    assert phase(h) is Phase.STREAMING
    h.detach(R1)
    assert h.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=assign.attempt)]
    assert h.empty


def test_attach_hands_the_request_over(h: Harness) -> None:
    assign = running(h, grace_ms=60_000, deadline_ms=90_000, body=b"the body")
    h.detach(R1)
    h.now += 1.5
    submit = attach(h, wanted=2)
    assert (submit.rid, submit.attempt, submit.attachment) == (R1, assign.attempt, 1)
    assert (submit.waited_ms, submit.deadline_ms, submit.accepted, submit.next_seq) == (1500, 88_500, True, 0)
    assert h.sent(b"g1") == [Detached(rid=R1)]
    accepted, leased, gap = h.sent(b"g2")
    assert (accepted, type(leased), gap.top) == (Accepted(rid=R1), Leased, 3)
    frame = h.chunk(R1, assign.attempt, 3)
    assert (h.sent(b"g1"), h.sent(b"g2")) == ([], [frame])
    h.wait(65, beating=BEATING[:3])
    assert phase(h) is Phase.STREAMING, "the timer stopped"
    h.end(R1, assign.attempt, 4)
    assert attach(h, peer=b"g1").attachment == 2


def test_attach_alone_changes_nothing(h: Harness) -> None:
    """Its client may have gone on to another gateway before the answer came."""
    running(h, grace_ms=2000)
    h.detach(R1)
    h.attach("r1")
    assert h.sent(b"g1") == []
    h.wait(2.1, beating=BEATING[:3])
    assert h.empty


def test_a_stream_that_was_continued_meanwhile_is_handed_over_all_the_same(h: Harness) -> None:
    """The client has two of the three events from which its former gateway had it continued."""
    assign = running(h, grace_ms=60_000)
    h.attach("r1")
    h.worker("w2")
    h.bye(b"w1")
    continuation(h, assign.attempt, grace_ms=60_000)
    attached(h, wanted=2)
    assert [type(message) for message in h.sent(b"g2")] == [Accepted, Leased, Gap]
    assert (worker_of(h), h.request(R1).start) == ("w2", 3)


def test_the_body_goes_along_as_long_as_it_is_here(h: Harness) -> None:
    running(h, events=0, grace_ms=60_000, body=b"the body")
    h.sent(b"g2")
    h.attach("r1")
    assert h.payloads(b"g2")[0] == b"the body"


def test_the_word_of_a_former_holder_counts_no_more(h: Harness) -> None:
    assign = running(h, grace_ms=60_000)
    attach(h)
    h.sent(b"g1")
    h.replay(R1, assign.attempt)
    h.detach(R1)
    h.cancel(R1)
    assert h.sent(b"w1") == []
    assert h.sent(b"g1") == [Detached(rid=R1)]
    assert h.request(R1).expires is None
    h.end(R1, assign.attempt, 3)
    h.ack(R1)
    assert R1 not in h.core._kept
    resubmit(h, attempt=assign.attempt)
    assert h.sent(b"g1") == [Detached(rid=R1)]


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("order", [(b"g1", b"g2"), (b"g2", b"g1")])
def test_of_two_gateways_the_higher_attachment_has_it(
    fresh: Harness, order: tuple[bytes, bytes], claimed: bool
) -> None:
    """g2 attached to it under a broker before this one, and g1 has not heard."""
    if claimed:
        fresh.worker("w1", claims=[claim_of(R1, FIRST, 5, grace_ms=60_000)])
    for peer in order:
        resubmit(fresh, peer=peer, grace_ms=60_000, attachment=int(peer == b"g2"))
    gateway = fresh.request(R1).gateway
    assert gateway is not None
    assert gateway.name == "g2"
    assert fresh.told(Detached, b"g1") == [Detached(rid=R1)]
    assert fresh.told(Detached, b"g2") == []


def test_of_two_with_the_same_attachment_the_first(fresh: Harness) -> None:
    resubmit(fresh)
    resubmit(fresh, peer=b"g2")
    assert [failed.code for failed in fresh.told(Failed, b"g2")] == [Code.DUPLICATE_ID]


def test_a_gateways_own_submission_from_before_its_attach_changes_nothing(h: Harness) -> None:
    assign = running(h, grace_ms=60_000)
    attach(h, peer=b"g1")
    h.sent(b"g1")
    resubmit(h, attempt=assign.attempt, grace_ms=60_000, absent_ms=59_000)
    assert [type(message) for message in h.sent(b"g1")] == [Accepted, Leased, Gap]
    assert (h.request(R1).attachment, h.request(R1).expires) == (1, None)


def test_a_resubmission_says_how_long_the_client_has_been_away(fresh: Harness) -> None:
    resubmit(fresh, "r1", grace_ms=3000, absent_ms=2000)
    resubmit(fresh, "r2", grace_ms=3000, absent_ms=9000)
    fresh.tick()
    assert [failed.rid for failed in fresh.told(Failed)] == [rid_of("r2")]
    fresh.wait(1.1, beating=BEATING[:2])
    assert [failed.rid for failed in fresh.told(Failed)] == [R1]


@pytest.mark.parametrize("who", ["worker", "gateway"])
def test_an_attach_before_the_request_is_known_waits_for_it(fresh: Harness, who: str) -> None:
    fresh.attach("r1", 1)
    fresh.attach("r1", 1)  # said again after a break
    assert fresh.sent(b"g2") == []
    if who == "worker":
        fresh.worker("w1", claims=[claim_of(R1, FIRST, 5, grace_ms=60_000)])
    else:
        resubmit(fresh, grace_ms=60_000)
    submit = attached(fresh)
    assert (submit.rid, submit.attempt) == (R1, FIRST)
    assert not fresh.core._window.attaches


def test_an_attach_that_waits_is_answered_none_at_the_windows_end(fresh: Harness) -> None:
    fresh.attach("r1", 1)
    fresh.attach("r2", 2, peer=fresh.gateway("g3"))
    resubmit(fresh, "other")
    resubmit(fresh, "r1")  # cannot be resumed
    fresh.bye(b"g3")
    fresh.wait(9.5, beating=BEATING[:2])
    assert fresh.told(Attached, b"g2") == []
    fresh.wait(1, beating=BEATING[:2])
    assert fresh.told(Attached, b"g2") == [Attached(id=1)]


def test_attaches_that_wait_are_bounded_one_for_each_request(fresh: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "ATTACHES_MAX", 2)
    fresh.attach("r1", 1)
    fresh.attach("r1", 2)
    assert fresh.told(Attached, b"g2") == [Attached(id=1)], "its client asks again elsewhere"
    fresh.attach("r2", 3)
    fresh.attach("r3", 4)
    assert fresh.told(Attached, b"g2") == [Attached(id=4)]


def test_an_unknown_request_is_not_waited_for_when_nothing_can_come(h: Harness) -> None:
    h.attach("r1", 1)
    running(h, "r2")
    h.attach("r2", 2)
    assert h.sent(b"g2") == [Attached(id=1), Attached(id=2)], "one that does not resume is none either"


def test_attach_to_a_request_that_waits_for_its_claim(fresh: Harness) -> None:
    """Its worker has the events. If it never comes, the new reader must not get another text: nobody has the first."""
    resubmit(fresh, grace_ms=60_000, next_seq=3, body=b"the body")
    submit = attach(fresh, wanted=3)
    assert (submit.attempt, submit.next_seq) == (FIRST, 0)
    fresh.wait(10.1, beating=BEATING[:2])
    [failed] = fresh.told(Failed, b"g2")
    assert (failed.code, failed.seq) == (Code.WORKER_LOST, 3)


def test_a_request_of_the_same_id_is_refused_while_the_first_has_its_client(h: Harness) -> None:
    running(h, grace_ms=60_000)
    h.submit("r2", ref="r1", grace_ms=60_000)
    assert [(f.rid, f.code) for f in h.told(Failed)] == [(rid_of("r2"), Code.DUPLICATE_ID)]
    h.submit("r3", ref="r1", client="bob", grace_ms=60_000)
    assert h.told(Failed) == []


def test_and_takes_its_place_when_the_client_had_gone(h: Harness) -> None:
    assign = running(h, grace_ms=60_000)
    h.detach(R1)
    rid = h.submit("r2", ref="r1", grace_ms=60_000, peer=b"g2")
    assert h.sent(b"g1") == [Detached(rid=R1)]
    assert Cancel(rid=R1, attempt=assign.attempt) in h.sent(b"w1")
    assert list(h.core.state.requests) == [rid]
    h.wait(61, beating=BEATING[:3])
    assert list(h.core.state.requests) == [rid], "the timer was the other's"


@pytest.mark.parametrize("live", [True, False])
def test_of_two_claims_with_the_same_id_the_one_that_runs(fresh: Harness, live: bool) -> None:
    old = claim_of(rid_of("old"), FIRST, 3, ref="x", grace_ms=60_000, ended=True)
    new = claim_of(rid_of("new"), FIRST, 3, ref="x", grace_ms=60_000)
    first, second = (new, old) if live else (old, new)
    fresh.worker("w1", claims=[first])
    fresh.worker("w2", claims=[second])
    assert list(fresh.core.state.requests) == [new.rid]
    assert old.rid in [cancel.rid for peer in (b"w1", b"w2") for cancel in fresh.told(Cancel, peer)]


def test_a_claim_gives_way_to_the_request_that_a_gateway_has_under_its_id(fresh: Harness) -> None:
    resubmit(fresh, "new", ref="x", grace_ms=60_000)
    fresh.worker("w1", claims=[claim_of(rid_of("old"), FIRST, 3, ref="x", grace_ms=60_000)])
    assert list(fresh.core.state.requests) == [rid_of("new")]


# Gateways that die ----------------------------------------------------------------------------------------------------


def test_a_request_outlives_its_gateway_for_its_clients_grace_or_for_its_own(h: Harness) -> None:
    h.worker("w1", engine("m:latest", slots=2))
    running(h, "r1", events=1, grace_ms=20_000)
    running(h, "r2", events=1)
    h.sent(b"w1")
    h.wait(3.1, beating=[b"g2", b"w1"])
    assert not h.core.state.gateways_by_name.get("g1")
    h.wait(9.5, beating=[b"g2", b"w1"])
    assert h.told(Cancel, b"w1") == []
    h.wait(1, beating=[b"g2", b"w1"])
    assert [cancel.rid for cancel in h.told(Cancel, b"w1")] == [rid_of("r2")]
    h.wait(10, beating=[b"g2", b"w1"])
    assert [cancel.rid for cancel in h.told(Cancel, b"w1")] == [R1]


def test_a_gateway_that_says_goodbye_leaves_only_what_can_be_resumed(h: Harness) -> None:
    h.worker("w1", engine("m:latest", slots=2))
    running(h, "r1", events=1, grace_ms=60_000)
    plain = running(h, "r2", events=1)
    h.bye(b"g1")
    assert h.told(Cancel, b"w1") == [Cancel(rid=plain.rid, attempt=plain.attempt)]
    assert attach(h).rid == R1


def test_a_clients_time_does_not_start_again_with_its_gateways_death(h: Harness) -> None:
    running(h, grace_ms=5000)
    h.detach(R1)
    h.wait(5.1, beating=[b"g2", b"w1"])
    assert h.empty


def test_nobodys_events_stay_with_the_worker(h: Harness) -> None:
    assign = running(h, grace_ms=60_000)
    h.bye(b"g1")
    h.chunk(R1, assign.attempt, 3)
    assert h.effects == []
    h.started(R1, assign.attempt)
    assert h.effects == []
    h.overflowed(R1)
    h.end(R1, assign.attempt, 4)
    attach(h)
    assert [type(message) for message in h.sent(b"g2")] == [Accepted, Leased, End]
    assert h.replay(R1, assign.attempt, peer=b"g2") in h.sent(b"w1")


# Ended requests -------------------------------------------------------------------------------------------------------


def test_an_ended_request_can_be_resumed_until_its_time_is_over(h: Harness) -> None:
    assign = finished(h)
    h.wait(59, beating=BEATING[:3])
    assert attach(h).attempt == assign.attempt
    assert h.sent(b"g2")[-1].seq == 3
    h.wait(5, beating=BEATING[:3])
    h.ack(R1, peer=b"g2")
    h.wait(59, beating=BEATING[:3])
    assert h.told(Release, b"w1") == []
    h.sent(b"g2")
    h.wait(2, beating=BEATING[:3])
    assert h.told(Release, b"w1") == [Release(rid=R1)]
    told = [message for message in h.sent(b"g2") if isinstance(message, End | Failed)]
    assert told == [], "its gateway has had its terminal"
    assert h.empty


def test_ended_requests_are_bounded(h: Harness) -> None:
    h.core.settings = replace(h.core.settings, ended_max=2)
    for name in ("r1", "r2", "r3"):
        finished(h, name)
    assert list(h.core.state.requests) == [rid_of("r2"), rid_of("r3")]


def test_a_kept_request_whose_worker_died_has_nothing_to_replay(h: Harness) -> None:
    assign = finished(h)
    h.bye(b"w1")
    attach(h)
    assert [m.seq for m in h.sent(b"g2") if isinstance(m, End)] == [3]
    h.replay(R1, assign.attempt, 0, peer=b"g2")
    assert [failed.code for failed in h.told(Failed, b"g2")] == [Code.WORKER_LOST]


def test_an_unacknowledged_end_is_told_once_more_when_its_client_is_given_up(h: Harness) -> None:
    assign = running(h, grace_ms=2000)
    h.detach(R1)
    end = h.end(R1, assign.attempt, 3)
    h.wait(2.1, beating=BEATING[:3])
    assert h.told(End) == [end, end]
    assert h.empty


# Continuations --------------------------------------------------------------------------------------------------------


def test_a_stream_whose_host_died_is_continued_on_another(h: Harness) -> None:
    assign = running(h)
    h.worker("w2")
    h.bye(b"w1")
    [failed] = h.told(Failed)
    assert failed.resubmit
    continuation(h, assign.attempt)
    [(next_assign, payload)] = h._sent.pop(b"w2")[-1:]
    assert (next_assign.start, next_assign.body_bytes, payload) == (3, 4, b"body{}\n{}\n{}\n")
    assert ordinal_of(next_assign.attempt) == ordinal_of(assign.attempt) + 1
    assert [type(message) for message in h.sent(b"g1") if not isinstance(message, Snapshot)] == [Accepted, Leased]
    frame = h.chunk(R1, next_assign.attempt, 3, peer=b"w2")
    assert h.sent(b"g1") == [frame]
    assert h.request(R1).body == b""


def test_a_failing_host_is_avoided_and_its_buffer_let_go(h: Harness) -> None:
    assign = running(h)
    h.failed(R1, assign.attempt, retryable=True, seq=3)
    h.sent(b"w1")
    h.worker("w2", engine("m:latest", slots=1))
    h.submit("blocks")
    h.end(rid_of("blocks"), h.request(rid_of("blocks")).attempt, 0)
    continuation(h, assign.attempt)
    assert worker_of(h) == "w2"
    assert Release(rid=R1) in h.sent(b"w1")


def test_a_continuation_that_fails_before_its_first_event_is_tried_again_with_all_of_it(h: Harness) -> None:
    assign = running(h)
    h.failed(R1, assign.attempt, retryable=True, seq=3)
    continuation(h, assign.attempt)
    second = h.told(Assign, b"w1")[-1]
    h.failed(R1, second.attempt, retryable=True, seq=3)
    [(third, payload)] = h._sent.pop(b"w1")[-1:]
    assert (third.start, payload) == (3, b"body{}\n{}\n{}\n")


def test_failures_are_bounded_over_all_continuations(h: Harness) -> None:
    assign = running(h)
    h.failed(R1, assign.attempt, retryable=True, seq=3)
    for expected in (True, False):
        h.sent(b"g1")
        continuation(h, assign.attempt)
        assign = h.told(Assign, b"w1")[-1]
        h.chunk(R1, assign.attempt, 3)
        h.failed(R1, assign.attempt, retryable=True, seq=4)
        assert [failed.resubmit for failed in h.told(Failed)] == [expected]


def test_leaving_is_no_failure(h: Harness) -> None:
    assign = running(h)
    h.failed(R1, assign.attempt, retryable=True, seq=3, code=Code.SHUTTING_DOWN)
    assert [failed.resubmit for failed in h.told(Failed)] == [True]
    assert h.request(R1).failures == 0
    rid = h.submit("r2")
    h.failed(rid, h.told(Assign, b"w1")[-1].attempt, retryable=True, code=Code.SHUTTING_DOWN)
    assert h.request(rid).failures == 0


def test_a_continuation_submitted_again_is_the_same_one(h: Harness) -> None:
    assign = running(h)
    h.bye(b"w1")
    for _ in range(3):
        continuation(h, assign.attempt)
    assert (phase(h), len(h.core.scheduler)) == (Phase.QUEUED, 1)
    h.sent(b"g1")
    continuation(h, assign.attempt, 5)
    assert h.request(R1).start == 5, "what the gateway has decides"


def test_a_terminal_told_twice_brings_one_continuation(h: Harness) -> None:
    """The gateway reconnects just when it was asked: it hears the failure again, and its answer is on its way."""
    assign = running(h)
    h.worker("w2")
    h.bye(b"w1")
    resubmit(h, attempt=assign.attempt, next_seq=3)
    assert [failed.resubmit for failed in h.told(Failed)] == [True, True]
    continuation(h, assign.attempt)
    attempt = h.request(R1).attempt
    continuation(h, assign.attempt)
    assert (h.request(R1).attempt, worker_of(h)) == (attempt, "w2")


def test_the_answer_of_a_gateway_counts_more_than_the_worker_that_is_back(h: Harness) -> None:
    assign = running(h)
    h.bye(b"w1")
    h.worker("w1", claims=[claim_of(R1, assign.attempt, 9)])
    assert phase(h) is Phase.STREAMING
    continuation(h, assign.attempt)
    assert [cancel.attempt for cancel in h.told(Cancel, b"w1")] == [assign.attempt]
    assert ordinal_of(h.request(R1).attempt) == 2


@pytest.mark.parametrize("leased", [False, True])
def test_attach_to_a_continuation_that_has_not_begun_carries_its_events(h: Harness, leased: bool) -> None:
    assign = running(h, grace_ms=60_000)
    h.bye(b"w1")
    continuation(h, assign.attempt, grace_ms=60_000)
    if leased:
        h.worker("w2")
    h.sent(b"g2")
    h.attach("r1")
    [(_, payload)] = h._sent[b"g2"]
    submit = attached(h)
    assert (submit.lost, submit.next_seq, submit.body_bytes, payload) == (True, 3, 4, b"body{}\n{}\n{}\n")
    assert ordinal_of(submit.attempt) == 1, "the attempt that these are of is over"
    sent = h.sent(b"g2")
    assert [type(message) for message in sent] == ([Accepted, Leased, Gap] if leased else [Accepted, Queued])
    assert not leased or sent[1].attempt > submit.attempt
    assert (phase(h), h.request(R1).start) == (Phase.LEASED if leased else Phase.QUEUED, 3)


def test_a_waiting_continuation_survives_a_restart(fresh: Harness) -> None:
    fresh.worker("w1")
    continuation(fresh, FIRST)
    fresh.wait(2, beating=BEATING[:3])
    assert (phase(fresh), fresh.request(R1).start) == (Phase.LEASED, 3)


def test_one_submitted_again_without_events_starts_from_the_beginning(fresh: Harness) -> None:
    fresh.worker("w1")
    resubmit(fresh, lost=True, body=b"the body", body_bytes=8)
    fresh.wait(2, beating=BEATING[:3])
    [assign] = fresh.told(Assign, b"w1")
    assert (assign.start, assign.body_bytes) == (0, 0)


# The waiting line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("r1", "r2", "r3"), ("r3", "r1", "r2"), ("r2", "r3", "r1")])
def test_who_waited_longest_goes_first_whichever_gateway_comes_first(fresh: Harness, order: tuple[str, ...]) -> None:
    waited = {"r1": 9000, "r2": 6000, "r3": 3000}
    fresh.worker("w1")
    for name in order:
        resubmit(fresh, name, attempt=0, waited_ms=waited[name], peer=b"g1" if name == "r2" else b"g2")
        fresh.now += 0.4
        fresh.tick()
    assert fresh.told(Assign, b"w1") == [], "the others may be older"
    fresh.wait(1, beating=BEATING[:3])
    for name in ("r1", "r2", "r3"):
        assign = fresh.told(Assign, b"w1")[-1]
        assert assign.rid == rid_of(name)
        fresh.end(assign.rid, assign.attempt, 0)


def test_the_hold_is_short_and_only_once(fresh: Harness) -> None:
    fresh.worker("w1", engine("m:latest", slots=9))
    fresh.wait(5, beating=BEATING[:3])
    resubmit(fresh, attempt=0)
    until = fresh.now + recovery.HOLD_S
    new = fresh.submit("new")
    fresh.wait(recovery.HOLD_S - 0.3, beating=BEATING[:3])
    assert phase(fresh, new) is Phase.QUEUED
    assert fresh.core.next_deadline() <= until
    fresh.wait(0.3, beating=BEATING[:3])
    assert phase(fresh, new) is Phase.LEASED
    again = resubmit(fresh, "r2", attempt=0)
    assert phase(fresh, again) is Phase.LEASED
    fresh.wait(10, beating=BEATING[:3])
    late = resubmit(fresh, "r3", attempt=0)
    assert phase(fresh, late) is Phase.LEASED


def test_a_gateway_that_was_away_holds_nobody_up(h: Harness) -> None:
    """Only a broker that has just met its peers may lack the oldest requests."""
    assert phase(h, resubmit(h, attempt=0)) is Phase.LEASED


def test_what_was_accepted_is_not_refused(fresh: Harness) -> None:
    fresh.core.settings = replace(fresh.core.settings, queue_max=0)
    resubmit(fresh, attempt=0, model="unknown:latest")
    accepted, queued = fresh.sent(b"g1")
    assert (accepted, queued.rid, queued.position) == (Accepted(rid=R1), R1, 1)


def test_nor_given_up_before_its_host_could_be_back(fresh: Harness) -> None:
    resubmit(fresh, attempt=0)
    fresh.wait(9.5, beating=BEATING[:2])
    assert fresh.told(Failed) == []
    fresh.wait(2, beating=BEATING[:2])
    assert [failed.code for failed in fresh.told(Failed)] == [Code.NO_WORKERS]


def test_a_resubmission_cannot_change_what_a_request_is(h: Harness) -> None:
    running(h)
    waits = h.submit("r2", grace_ms=60_000)
    h.submit("r2", model="other:latest", client="mallory", ref="x", grace_ms=0)
    submit = h.request(waits).submit
    assert (submit.model, submit.client, submit.ref, submit.grace_ms) == ("m:latest", "alice", "r2", 60_000)


def test_timers_of_finished_requests_do_not_pile_up(h: Harness) -> None:
    assign = running(h, grace_ms=600_000)
    for _ in range(500):
        h.detach(R1)
        h.now += 0.001
    h.wait(1.5, beating=BEATING[:3])
    assert len(h.core._timers) <= 3
    assert h.request(R1).attempt == assign.attempt


# Operators, and peers of another version ------------------------------------------------------------------------------


def test_a_host_is_drained_and_resumed(h: Harness) -> None:
    assign = running(h)
    h.admin("drain", "w1")
    [snapshot] = h.sent(b"g1")
    assert (snapshot.id, [host.draining for host in snapshot.hosts]) == (9, [True])
    assert h.sent(b"w1") == [Drain(on=True)]
    waits = h.submit("r2")
    h.end(R1, assign.attempt, 3)
    assert phase(h, waits) is Phase.QUEUED
    h.admin("resume", "w1")
    drain, assign = h.sent(b"w1")
    assert (drain, assign.rid) == (Drain(on=False), waits)


@pytest.mark.parametrize(("action", "target"), [("drain", "w9"), ("dance", "w1")])
def test_a_wish_that_cannot_be_is_answered_with_the_hosts_there_are(h: Harness, action: str, target: str) -> None:
    h.admin(action, target)
    [error] = h.sent(b"g1")
    assert isinstance(error, Error)
    assert error.code is Code.NOT_FOUND
    assert error.message.endswith("the hosts are: w1")


def test_unknown_types_are_no_message_and_unknown_fields_are_nothing() -> None:
    """What the shell makes `Garbled` of is answered with an error (test_core); a new field passes unseen."""
    header = msgspec.msgpack.encode({"t": "attach", "id": 1, "client": "a", "ref": "r", "novelty": [1]})
    frame = len(header).to_bytes(4, "big") + header
    assert protocol.from_gateway.decode(frame)[0] == protocol.Attach(id=1, client="a", ref="r")
    header = header.replace(b"attach", b"attack")
    with pytest.raises(ProtocolError):
        protocol.from_gateway.decode(len(header).to_bytes(4, "big") + header)


@pytest.mark.parametrize("say", [Harness.from_gateway, Harness.from_worker])
def test_a_probe_is_answered_and_changes_nothing(say: Any) -> None:
    h = Harness()
    say(h, protocol.Probe(), peer=b"x")
    assert h.sent(b"x") == [protocol.Beat()]
    assert not h.core.state.gateways
    assert not h.core.state.workers


def test_an_end_of_a_former_attempt_is_stale(h: Harness) -> None:
    assign = running(h)
    h.bye(b"w1")
    h.worker("w2")
    continuation(h, assign.attempt)
    h.worker("w1")
    h.sent(b"w1")
    end = End(rid=R1, attempt=assign.attempt, seq=9, stats=Stats())
    for stale in (end, protocol.Forgotten(rid=R1, attempt=assign.attempt, base=2)):
        h.sent(b"g1")
        h.from_worker(stale)
        assert h.told(Cancel, b"w1") == [Cancel(rid=R1, attempt=assign.attempt, reason="no such lease")]
        assert h.sent(b"g1") == []


# Handing over ---------------------------------------------------------------------------------------------------------


def test_what_a_gateway_hands_over_goes_to_the_one_that_has_the_request(h: Harness) -> None:
    assign = running(h, events=2, grace_ms=60_000)
    attach(h)
    h.sent(b"g2")
    started = Started(rid=R1, attempt=assign.attempt, status=200)
    chunk = Chunk(rid=R1, attempt=assign.attempt, seq=0, n=2)
    h.from_gateway(started, b"body", peer=b"g1")
    assert h.sent(b"g2") == [started]
    h.from_gateway(chunk, b"{}\n{}\n", peer=b"g1")
    assert [(effect.peer, effect.rid) for effect in h.effects if isinstance(effect, Forward)] == [(b"g2", R1)]


def test_nobody_is_told_what_is_of_another_attempt_or_his_own(h: Harness) -> None:
    assign = running(h, events=2)
    for attempt, peer in ((assign.attempt, b"g1"), (SECOND, b"g2")):
        h.from_gateway(Started(rid=R1, attempt=attempt, status=200), peer=peer)
        h.from_gateway(Chunk(rid=R1, attempt=attempt, seq=0, n=1), b"{}\n", peer=peer)
        assert not [effect for effect in h.effects if isinstance(effect, Forward)]
    h.from_gateway(Chunk(rid=rid_of("none"), attempt=SECOND, seq=0, n=1), b"{}\n")
    assert h.told(Started) == []
