"""What the broker decides, event by event. Invariants are checked by the harness after each."""

import pytest
from msgspec.structs import replace

from broker import core
from broker.events import Forward, Received, Send, Side
from broker.state import Phase
from common import protocol
from common.errors import Code, ProtocolError
from common.protocol import (
    HEARTBEAT_INTERVAL_S,
    Accepted,
    Assign,
    Beat,
    Cancel,
    Detached,
    Error,
    Failed,
    Forgotten,
    Gap,
    Hello,
    Leased,
    Lost,
    Queued,
    Register,
    Registered,
    Release,
    Snapshot,
    Started,
    Superseded,
    Who,
    attempt_of,
    ordinal_of,
)
from tests.unit.broker.harness import NONCE, Harness, claim_of, engine, rid_of


@pytest.fixture
def h() -> Harness:
    """A gateway g1, a worker w1 with one slot for `m:latest`, and nothing said that was not read."""
    harness = Harness()
    harness.gateway("g1")
    harness.worker("w1")
    harness.sent(b"g1")
    harness.sent(b"w1")
    return harness


def running(h: Harness, name: str = "r1", *, peer: bytes = b"w1", events: int = 1) -> Assign:
    """Submit a request that is leased at once and has streamed `events`."""
    h.submit(name)
    assign = h.assigned(peer)
    if events:
        h.chunk(assign.rid, assign.attempt, 0, events, peer=peer)
    h.sent(b"g1")
    return assign


def positions(h: Harness, peer: bytes = b"g1") -> list[tuple[bytes, int]]:
    return [(queued.rid, queued.position) for queued in h.told(Queued, peer)]


# The way of a request -------------------------------------------------------------------------------------------------


def test_a_request_is_accepted_leased_and_assigned_in_this_order(h: Harness) -> None:
    rid = h.submit("r1", body=b'{"prompt": "hi"}')
    sends = [(effect.side, type(effect.message)) for effect in h.effects if isinstance(effect, Send)]
    assert sends == [(Side.GATEWAY, Accepted), (Side.GATEWAY, Leased), (Side.WORKER, Assign)]
    assert h.sent(b"g1")[1] == Leased(rid=rid, attempt=attempt_of(1, NONCE), worker="w1", engine="http://e1")
    assert h.effects[-1] == Send(
        Side.WORKER,
        b"w1",
        Assign(
            rid=rid,
            attempt=attempt_of(1, NONCE),
            registration=1,
            engine="http://e1",
            model="m:latest",
            digest="sha:m:latest",
            path="/api/generate",
            client="alice",
            ref="r1",
        ),
        b'{"prompt": "hi"}',
    )


def test_events_cross_in_order_and_the_chunk_unchanged(h: Harness) -> None:
    assign = running(h, events=0)
    started = h.started(assign.rid, assign.attempt)
    frame = h.chunk(assign.rid, assign.attempt, 0, 2, payload=b"{}\n{}\n")
    end = h.end(assign.rid, assign.attempt, 2)
    assert h.sent(b"g1") == [started, frame, end]


def test_a_request_is_remembered_until_its_terminal_is_acknowledged(h: Harness) -> None:
    assign = running(h)
    h.end(assign.rid, assign.attempt)
    assert h.request(assign.rid).phase is Phase.ENDED
    h.ack(assign.rid)
    assert h.told(Release, b"w1") == [Release(rid=assign.rid)]
    assert h.empty


def test_the_slot_is_free_at_the_end_not_at_the_acknowledgement(h: Harness) -> None:
    first = running(h)
    second = h.submit("r2")
    assert h.told(Assign, b"w1") == []
    h.end(first.rid, first.attempt)
    assert h.assigned().rid == second


def test_an_ack_counts_only_after_the_terminal_and_from_the_owner(h: Harness) -> None:
    assign = running(h)
    h.ack(assign.rid)
    assert h.request(assign.rid).phase is Phase.STREAMING
    h.end(assign.rid, assign.attempt)
    h.ack(assign.rid, peer=h.gateway("g2"))
    assert h.request(assign.rid).phase is Phase.ENDED
    h.ack(rid_of("unheard of"))


def test_an_unacknowledged_terminal_is_let_go_after_ack_s(h: Harness) -> None:
    assign = running(h)
    h.end(assign.rid, assign.attempt)
    h.sent(b"w1")
    h.wait(61 + core.UNACKNOWLEDGED_S, beating=[b"g1", b"w1"])
    assert h.told(Release, b"w1") == [Release(rid=assign.rid)]
    assert h.empty


def test_an_engines_answer_travels_with_the_failure_and_again_when_asked(h: Harness) -> None:
    h.submit("r1")
    assign = h.assigned()
    h.sent(b"g1")
    failed = h.failed(assign.rid, assign.attempt, status=404, payload=b'{"error":"no such model"}')
    assert h.payloads(b"g1") == [b'{"error":"no such model"}']
    h.submit("r1")
    assert h.effects[-1] == Send(Side.GATEWAY, b"g1", failed, b'{"error":"no such model"}')


# Waiting --------------------------------------------------------------------------------------------------------------


def test_who_waits_is_told_the_position_once_and_again_when_it_changes(h: Harness) -> None:
    first = running(h)
    second, third = h.submit("r2"), h.submit("r3")
    assert positions(h) == [(second, 1), (third, 2)]
    h.wait(3, beating=[b"g1", b"w1"])
    assert h.told(Queued) == []
    h.end(first.rid, first.attempt)
    h.wait(3, beating=[b"g1", b"w1"])
    assert positions(h)[-1] == (third, 1)


def test_positions_are_told_to_a_bounded_number_at_a_time(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "POSITIONS_STEP", 2)
    first = running(h)
    for number in range(2, 7):
        h.submit(f"r{number}")
    h.end(first.rid, first.attempt)
    h.sent(b"g1")
    start = h.now
    h.now = start + core.POSITIONS_INTERVAL_S - 0.01
    h.tick()
    assert h.told(Queued) == []
    h.now = start + core.POSITIONS_INTERVAL_S
    h.tick()
    assert [(queued.rid[:2], queued.position) for queued in h.told(Queued)] == [(b"r3", 1), (b"r4", 2)]
    h.now += core.POSITIONS_STEP_S / 2
    h.tick()
    assert h.told(Queued) == []
    h.now += core.POSITIONS_STEP_S / 2
    h.tick()
    assert [(queued.rid[:2], queued.position) for queued in h.told(Queued)] == [(b"r5", 3), (b"r6", 4)]


def test_however_they_came_so_many_positions_are_told_at_a_time(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "POSITIONS_STEP", 2)
    running(h)
    for number in range(2, 42):
        h.submit(f"r{number}")
        h.now += 0.01
    h.sent(b"g1")
    request = h.request(rid_of("r2"))
    start, told = h.now, []
    while h.now < start + 3:
        h.now = max(h.core.next_deadline(), h.now + 0.01)
        before = sum(one.told_at == h.now for one in h.core.state.requests.values())
        h.tick()
        told.append(sum(one.told_at == h.now for one in h.core.state.requests.values()) - before)
    assert request.told_at > start
    assert max(told) == 2
    assert sum(told) <= 2 * ((3 - 1.6) / core.POSITIONS_STEP_S + 2)


def test_who_asks_again_hears_its_place_at_once(h: Harness) -> None:
    running(h)
    h.submit("r2")
    h.sent(b"g1")
    h.submit("r2", accepted=True)
    assert positions(h) == [(rid_of("r2"), 1)]


def test_what_is_submitted_again_is_what_it_was(h: Harness) -> None:
    """A request that waits for a slot does not become one that takes none."""
    running(h)
    rid = h.submit("r2")
    h.submit("r2", accepted=True, light=True)
    assert not h.request(rid).submit.light
    h.cancel(rid)
    assert not len(h.core.scheduler)


def test_what_came_and_went_is_not_kept_to_be_told(h: Harness) -> None:
    running(h)
    h.submit("r2")
    for number in range(3, 1000):
        h.submit(f"r{number}")
        h.cancel(rid_of(f"r{number}"))
        h.ack(rid_of(f"r{number}"))
    h.wait(1, beating=[b"g1", b"w1"])
    assert len(h.core._positions) == 1


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    h = Harness(queue_max=1)
    h.gateway("g1")
    h.worker("w1")
    running(h)
    h.submit("r2")
    rid = h.submit("r3")
    [failed] = h.told(Failed)
    assert (failed.rid, failed.code) == (rid, Code.QUEUE_FULL)
    assert core.RETRY_AFTER_MS_MIN <= (failed.retry_after_ms or 0) <= core.RETRY_AFTER_MS_MAX


def test_one_client_cannot_fill_the_queue_and_its_place_comes_back() -> None:
    h = Harness(queue_client_max=1)
    h.gateway("g1")
    h.worker("w1")
    running(h)
    waits = h.submit("r2", client="alice")
    h.submit("r3", client="alice")
    assert [failed.code for failed in h.told(Failed)] == [Code.QUEUE_FULL]
    h.submit("r4", client="bob")
    assert h.told(Failed) == []
    h.cancel(waits)
    h.sent(b"g1")
    h.submit("r5", client="alice")
    assert h.told(Failed) == []


def test_bodies_are_bounded_together_and_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "BODY_BYTES_MAX", 100)
    h = Harness(queue_bytes_max=150)
    h.gateway("g1")
    h.worker("w1")
    first = running(h, events=0)
    h.submit("big", body=b"x" * 101)
    h.submit("r2", body=b"x" * 100)
    h.submit("r3", body=b"x" * 60)
    assert [(failed.rid, failed.code) for failed in h.told(Failed)] == [
        (rid_of("big"), Code.TOO_LARGE),
        (rid_of("r3"), Code.QUEUE_FULL),
    ]
    h.end(first.rid, first.attempt)  # r2 is leased and starts to stream: its body can be let go
    h.chunk(rid_of("r2"), h.assigned().attempt)
    h.sent(b"g1")
    h.submit("r3", body=b"x" * 60)
    assert h.told(Failed) == []


# Models that are not there --------------------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_with_those_there_are(h: Harness) -> None:
    rid = h.submit("r1", model="gpt-9:latest")
    [failed] = h.sent(b"g1")
    assert (failed.rid, failed.code, failed.models) == (rid, Code.MODEL_NOT_FOUND, ("m",))
    assert "gpt-9" in failed.message


def test_without_workers_it_is_no_workers() -> None:
    h = Harness()
    h.gateway("g1")
    h.submit("r1")
    [failed] = h.sent(b"g1")
    assert (failed.code, failed.retryable) == (Code.NO_WORKERS, True)


def test_a_young_broker_waits_for_its_workers() -> None:
    h = Harness(settle_s=5.0)
    h.gateway("g1")
    rid = h.submit("r1")
    assert [type(message) for message in h.sent(b"g1")] == [Accepted, Queued]
    h.wait(1, beating=[b"g1"])
    h.worker("w1")
    assert h.assigned().rid == rid


def test_a_request_gives_up_on_a_model_that_stays_away(h: Harness) -> None:
    h.bye(b"w1")
    h.worker("w2", engine("other:latest"))
    lonely = h.submit("r1")
    h.submit("r2", model="other:latest")
    busy = h.submit("r3", model="other:latest")
    h.wait(29, beating=[b"g1", b"w2"])
    assert h.told(Failed) == []
    h.wait(3, beating=[b"g1", b"w2"])
    [failed] = h.told(Failed)
    assert (failed.rid, failed.code, failed.models) == (lonely, Code.MODEL_NOT_FOUND, ("other",))
    assert h.request(busy).phase is Phase.QUEUED


def test_a_model_that_comes_back_in_time_serves_who_waited(h: Harness) -> None:
    h.engines(engine("m:latest", up=False))
    rid = h.submit("r1")
    h.wait(20, beating=[b"g1", b"w1"])
    h.engines(engine("m:latest"))
    assert h.assigned().rid == rid


# Cancel and deadline --------------------------------------------------------------------------------------------------


def test_cancelling_a_waiting_request_ends_it(h: Harness) -> None:
    running(h)
    rid = h.submit("r2")
    h.sent(b"g1")
    h.cancel(rid, reason="the user stopped it")
    [failed] = h.sent(b"g1")
    assert (failed.code, failed.message) == (Code.CANCELLED, "the user stopped it")
    assert rid not in h.core.state.requests


@pytest.mark.parametrize("events", [0, 3])
def test_cancelling_a_running_request_reaches_the_worker_and_frees_the_slot(h: Harness, events: int) -> None:
    assign = running(h, events=events)
    waits = h.submit("r2")
    h.sent(b"g1")
    h.cancel(assign.rid)
    cancel, following = h.sent(b"w1")
    assert cancel == Cancel(rid=assign.rid, attempt=assign.attempt)
    assert following.rid == waits
    failed = h.sent(b"g1")[0]
    assert (failed.code, failed.attempt, failed.seq) == (Code.CANCELLED, assign.attempt, events)


def test_a_cancel_that_crossed_the_end_gets_the_end(h: Harness) -> None:
    assign = running(h)
    end = h.end(assign.rid, assign.attempt)
    h.sent(b"g1")
    h.cancel(assign.rid)
    assert h.sent(b"g1") == [end]
    assert h.told(Release, b"w1") == [Release(rid=assign.rid)]
    assert h.empty


def test_a_gateway_that_missed_everything_can_still_ask_for_it(h: Harness) -> None:
    """Without the attempt it could not ask for the events that it lacks."""
    assign = running(h, events=2)
    end = h.end(assign.rid, assign.attempt, 2)
    peer = h.gateway("g1", peer=b"g1-again")
    h.submit("r1", peer=peer)
    leased = Leased(rid=assign.rid, attempt=assign.attempt, worker="w1", engine="http://e1")
    assert h.sent(peer) == [Accepted(rid=assign.rid), leased, end]


def test_a_cancel_of_what_nobody_knows_is_answered_with_an_end(h: Harness) -> None:
    h.cancel(rid_of("forgotten"))
    [failed] = h.sent(b"g1")
    assert (failed.rid, failed.code) == (rid_of("forgotten"), Code.CANCELLED)


def test_another_gateway_cannot_cancel(h: Harness) -> None:
    assign = running(h)
    h.cancel(assign.rid, peer=h.gateway("g2"))
    assert h.request(assign.rid).phase is Phase.STREAMING
    assert h.sent(b"g2") == [Detached(rid=assign.rid)], "nothing more will come to it"


def test_a_deadline_ends_a_request_wherever_it_is(h: Harness) -> None:
    runs = h.submit("r1", deadline_ms=1500)
    waits = h.submit("r2", deadline_ms=1200)
    patient = h.submit("r3", deadline_ms=60_000)
    h.sent(b"g1")
    assert h.core.next_deadline() <= h.now + 1.2
    h.wait(1.6, beating=[b"g1", b"w1"])
    assert [(failed.rid, failed.code) for failed in h.told(Failed)] == [
        (waits, Code.DEADLINE_EXCEEDED),
        (runs, Code.DEADLINE_EXCEEDED),
    ]
    sent = h.sent(b"w1")
    assert Cancel(rid=runs, attempt=attempt_of(1, NONCE)) in sent
    assert [message.rid for message in sent if isinstance(message, Assign)] == [runs, patient]


def test_a_deadline_does_not_touch_what_has_ended(h: Harness) -> None:
    rid = h.submit("r1", deadline_ms=500)
    h.end(rid, h.assigned().attempt, 0)
    h.sent(b"g1")
    h.wait(1, beating=[b"g1", b"w1"])
    assert h.told(Failed) == []


def test_a_deadline_of_an_earlier_submission_does_not_count(h: Harness) -> None:
    rid = h.submit("r1", deadline_ms=500)
    h.bye(b"g1")
    h.gateway("g1")
    h.submit("r1", deadline_ms=60_000)
    h.sent(b"g1")
    h.wait(1, beating=[b"g1", b"w1"])
    assert h.told(Failed) == []
    assert rid in h.core.state.requests


def test_deadlines_of_finished_requests_are_not_kept_for_days(h: Harness) -> None:
    for number in range(500):
        rid = h.submit(f"r{number}", deadline_ms=10**9)
        h.cancel(rid)
    stays = h.submit("stays", deadline_ms=10**9)
    h.wait(2, beating=[b"g1", b"w1"])
    assert [rid for _, rid in h.core._timers] == [stays]


# Workers that fail ----------------------------------------------------------------------------------------------------


def test_a_failure_before_the_first_event_is_retried_on_another_host(h: Harness) -> None:
    rid = h.submit("r1")
    h.worker("w2")
    h.sent(b"g1")
    first = h.assigned(b"w1")
    h.failed(rid, first.attempt, retryable=True)
    second = h.assigned(b"w2")
    assert (ordinal_of(first.attempt), ordinal_of(second.attempt)) == (1, 2)
    lost, leased = h.sent(b"g1")
    assert lost == Lost(rid=rid, attempt=first.attempt)
    assert (leased.worker, leased.attempt) == ("w2", second.attempt)


def test_three_failures_are_the_end(h: Harness) -> None:
    rid = h.submit("r1", body=b"again and again")
    for _ in range(2):
        h.failed(rid, h.assigned().attempt, retryable=True)
    assert h.told(Failed) == []
    h.sent(b"w1")
    last = h.failed(rid, attempt_of(3, NONCE), retryable=True, payload=b"cuda error")
    assert h.told(Failed) == [last]
    assert h.request(rid).terminal_payload == b"cuda error"
    assert h.sent(b"w1") == [], "it may have been a continuation, and its events can be resumed"


def test_every_attempt_gets_the_body(h: Harness) -> None:
    rid = h.submit("r1", body=b"again")
    first = h.request(rid).attempt
    assert h.payloads(b"w1") == [b"again"]
    h.failed(rid, first, retryable=True)
    assert h.payloads(b"w1") == [b"", b"again"]


def test_the_buffer_of_an_attempt_that_is_tried_again_is_let_go_first(h: Harness) -> None:
    rid = h.submit("r1")
    first = h.assigned()
    h.failed(rid, first.attempt, retryable=True)
    assert [(type(message), message.attempt) for message in h.sent(b"w1")] == [
        (Cancel, first.attempt),
        (Assign, attempt_of(2, NONCE)),
    ]


def test_an_engines_answer_is_final(h: Harness) -> None:
    rid = h.submit("r1")
    failed = h.failed(rid, h.assigned().attempt, retryable=False)
    assert h.told(Failed) == [failed]
    assert h.request(rid).phase is Phase.ENDED


@pytest.mark.parametrize("events", [0, 2])
def test_a_failure_after_events_asks_the_gateway_whether_it_goes_on(h: Harness, events: int) -> None:
    """Also if the events were lost on the way: `seq` says that there were some."""
    assign = running(h, events=events)
    failed = h.failed(assign.rid, assign.attempt, retryable=True, seq=2)
    assert h.sent(b"g1") == [replace(failed, resubmit=True)]
    assert h.request(assign.rid).phase is Phase.ENDED


def test_a_refused_assign_goes_back_to_its_place_and_the_worker_gets_a_pause(h: Harness) -> None:
    refused = h.submit("r1")
    behind = h.submit("r2")
    assign = h.assigned()
    h.sent(b"g1")
    h.refused(refused, assign.attempt)
    assert h.sent(b"g1") == [Lost(rid=refused, attempt=assign.attempt)]
    assert h.told(Assign, b"w1") == []
    assert h.request(refused).failures == 0
    assert h.core.next_deadline() == h.now + core.REFUSED_PAUSE_S
    h.tick()
    assert h.told(Assign, b"w1") == []
    h.wait(0.3)
    assert [m.rid for m in h.sent(b"w1") if isinstance(m, Assign)] == [refused]
    assert h.request(behind).phase is Phase.QUEUED
    assert h.core.next_deadline() > h.now, "a pause that is over asks for no more ticks"


def test_a_refusal_too_late_changes_nothing(h: Harness) -> None:
    assign = running(h, events=1)
    h.refused(assign.rid, assign.attempt)
    h.refused(rid_of("unheard of"), 7)
    assert h.request(assign.rid).phase is Phase.STREAMING


def test_a_worker_dies_before_the_first_event_and_nobody_notices(h: Harness) -> None:
    rid = h.submit("r1")
    h.worker("w2")
    h.sent(b"g1")
    h.bye(b"w1")
    assert h.assigned(b"w2").rid == rid
    assert [type(m) for m in h.sent(b"g1")] == [Lost, Snapshot, Leased]


def test_a_worker_dies_in_mid_stream_and_the_client_is_told(h: Harness) -> None:
    assign = running(h, events=5)
    h.worker("w2")
    h.sent(b"g1")
    h.wait(4, beating=[b"g1", b"w2"])
    [failed] = h.told(Failed)
    assert (failed.code, failed.seq, failed.attempt) == (Code.WORKER_LOST, 5, assign.attempt)
    assert failed.resubmit
    h.ack(assign.rid)
    assert h.empty


def test_with_the_worker_dies_the_buffer_and_a_replay_says_so(h: Harness) -> None:
    assign = running(h, events=5)
    h.end(assign.rid, assign.attempt, 5)
    h.bye(b"w1")
    h.sent(b"g1")
    h.replay(assign.rid, assign.attempt, 3)
    [failed] = h.sent(b"g1")
    assert (failed.code, failed.seq, failed.resubmit) == (Code.WORKER_LOST, 3, True)


def test_the_heartbeats_of_three_intervals_decide(h: Harness) -> None:
    h.wait(3, beating=[b"g1"])
    assert "w1" in h.core.state.workers
    h.wait(1.1, beating=[b"g1"])
    assert "w1" not in h.core.state.workers
    assert "g1" in h.core.state.gateways_by_name


def test_a_broker_that_was_stopped_itself_declares_nobody_lost(h: Harness) -> None:
    assign = running(h)
    h.now += 60
    h.tick()
    assert h.request(assign.rid).phase is Phase.STREAMING
    assert "g1" in h.core.state.gateways_by_name
    h.wait(4)
    assert not h.core.state.workers
    assert not h.core.state.gateways


def test_beats_go_out_every_second(h: Harness) -> None:
    h.wait(5, beating=[b"g1", b"w1"])
    assert 4 <= len(h.told(Beat, b"g1")) <= 6
    assert 4 <= len(h.told(Beat, b"w1")) <= 6


# Leases and who holds them --------------------------------------------------------------------------------------------


def test_a_message_of_a_dead_attempt_is_dropped_and_cancelled(h: Harness) -> None:
    rid = h.submit("r1")
    old = h.assigned()
    h.failed(rid, old.attempt, retryable=True)
    h.sent(b"w1")
    h.sent(b"g1")
    for say in (h.chunk, h.started, h.end, h.failed):
        say(rid, old.attempt)
        assert h.sent(b"g1") == []
        assert h.sent(b"w1") == [Cancel(rid=rid, attempt=old.attempt, reason="no such lease")]


def test_another_worker_cannot_speak_for_a_lease(h: Harness) -> None:
    assign = running(h)
    h.worker("w2")
    h.sent(b"w2")
    h.sent(b"g1")
    h.chunk(assign.rid, assign.attempt, 1, peer=b"w2")
    h.end(assign.rid, assign.attempt, peer=b"w2")
    assert h.sent(b"g1") == []
    assert h.sent(b"w2") == [Cancel(rid=assign.rid, attempt=assign.attempt, reason="no such lease")] * 2
    assert h.request(assign.rid).phase is Phase.STREAMING


def test_nobody_speaks_for_a_request_that_waits(h: Harness) -> None:
    running(h)
    waits = h.submit("r2")
    h.sent(b"g1")
    h.chunk(waits, 0)
    assert h.sent(b"g1") == []


def test_whom_the_broker_does_not_know_is_asked(h: Harness) -> None:
    h.chunk(rid_of("r1"), 1, peer=b"w9")
    h.end(rid_of("r1"), 1, peer=b"w9")
    h.submit("r1", peer=b"g9")
    h.bye(b"w9")
    h.bye(b"g9")
    assert h.sent(b"w9") == [Who(), Who()]
    assert h.sent(b"g9") == [Who()]


def test_a_replay_after_the_end_brings_the_head_too(h: Harness) -> None:
    assign = running(h)
    h.end(assign.rid, assign.attempt)
    h.sent(b"g1")
    started = Started(rid=assign.rid, attempt=assign.attempt, status=200)
    h.from_worker(started, b"the request's body")
    assert h.payloads(b"g1") == [b"the request's body"]
    forgotten = Forgotten(rid=assign.rid, attempt=assign.attempt, base=4)
    h.from_worker(forgotten)
    assert h.sent(b"g1") == [forgotten]


def test_an_end_said_again_is_told_again_and_frees_nothing_twice(h: Harness) -> None:
    assign = running(h)
    end = h.end(assign.rid, assign.attempt)
    assert h.end(assign.rid, assign.attempt) == end
    assert h.sent(b"g1") == [end, end]


# Registration ---------------------------------------------------------------------------------------------------------


def test_a_worker_that_comes_back_keeps_what_it_claims(h: Harness) -> None:
    assign = running(h, events=3)
    h.worker("w1", peer=b"w1-again", claims=[claim_of(assign.rid, assign.attempt, 5)])
    assert h.sent(b"w1-again") == [Registered(registration=2)]
    assert h.sent(b"g1") == [Gap(rid=assign.rid, attempt=assign.attempt, top=5)]
    h.chunk(assign.rid, assign.attempt, 5, peer=b"w1-again")
    assert len(h.sent(b"g1")) == 1
    h.chunk(assign.rid, assign.attempt, 6, peer=b"w1")
    assert h.sent(b"g1") == [], "the old line is dead"
    assert h.sent(b"w1") == [Who()]


def test_a_lease_a_worker_does_not_claim_is_placed_again_or_lost(h: Harness) -> None:
    h.worker("w1", engine("m:latest", slots=2))
    streamed = running(h, "r1", events=2)
    unseen = running(h, "r2", events=0)
    h.worker("w1", engine("m:latest", slots=2), peer=b"w1-again")
    [registered, assign] = h.sent(b"w1-again")
    assert (assign.rid, assign.registration) == (unseen.rid, registered.registration)
    sent = h.sent(b"g1")
    assert Lost(rid=unseen.rid, attempt=unseen.attempt) in sent
    assert [(f.rid, f.code, f.seq) for f in sent if isinstance(f, Failed)] == [(streamed.rid, Code.WORKER_LOST, 2)]


def test_what_a_worker_claims_and_the_broker_does_not_know_is_cancelled(h: Harness) -> None:
    assign = running(h)
    h.wait(10, beating=[b"g1", b"w1"])
    stale = [claim_of(rid_of("unknown"), attempt_of(1, 9)), claim_of(assign.rid, assign.attempt + 1)]
    h.worker("w1", claims=stale)
    assert [(m.rid, m.attempt) for m in h.told(Cancel, b"w1")] == [(stale[0].rid, stale[0].attempt)]
    h.wait(11, beating=[b"g1", b"w1"])  # the other could be another broker's: its gateway would have said so by now
    assert [(m.rid, m.attempt) for m in h.told(Cancel, b"w1")] == [(stale[1].rid, stale[1].attempt)]


def test_an_ended_request_survives_its_workers_return(h: Harness) -> None:
    assign = running(h)
    h.end(assign.rid, assign.attempt)
    h.sent(b"g1")
    h.worker("w1", peer=b"w1-again", claims=[claim_of(assign.rid, assign.attempt, 1, ended=True)])
    assert h.sent(b"g1") == [Gap(rid=assign.rid, attempt=assign.attempt, top=1)]
    h.worker("w1", peer=b"w1-thrice")
    assert h.request(assign.rid).phase is Phase.ENDED
    h.ack(assign.rid)
    assert h.empty


def test_the_newest_process_of_a_name_wins(h: Harness) -> None:
    rid = h.submit("r1")
    h.assigned()
    h.worker("w1", epoch="e2", peer=b"w1-new")
    assert h.sent(b"w1") == [Superseded()]
    registered, assign = h.sent(b"w1-new")
    assert (assign.rid, assign.registration) == (rid, registered.registration)
    h.chunk(rid, assign.attempt, peer=b"w1")
    assert h.sent(b"w1") == [Who()]


def test_a_peer_that_takes_another_name_leaves_the_old_one(h: Harness) -> None:
    rid = h.submit("r1")
    h.worker("other", peer=b"w1")
    assert list(h.core.state.workers) == ["other"]
    assert h.request(rid).worker is h.core.state.workers["other"]
    h.gateway("gother", peer=b"g1")
    assert list(h.core.state.gateways_by_name) == ["gother"]
    assert h.request(rid).gateway is None
    h.bye(b"w1")
    h.bye(b"g1")


@pytest.mark.parametrize(
    "message", [Hello(name="g", version=99), Register(name="w", epoch="e", engines=(), version=99)]
)
def test_another_version_is_told_so_and_not_let_in(message: Hello | Register) -> None:
    h = Harness()
    (h.from_gateway if isinstance(message, Hello) else h.from_worker)(message, peer=b"x")
    [error] = h.sent(b"x")
    assert isinstance(error, Error)
    assert "version 1 " in error.message
    assert h.notes() == ["peer of another version"]
    assert not h.core.state.workers
    assert not h.core.state.gateways


def test_gateways_hear_when_the_fleet_changes_and_only_then(h: Harness) -> None:
    h.gateway("g2")
    h.engines(engine("m:latest", "n:latest"))
    for gateway in (b"g1", b"g2"):
        [snapshot] = h.sent(gateway)
        assert (snapshot.models, snapshot.workers) == (("m", "n"), 1)
    h.engines(engine("m:latest", "n:latest", slots=4))
    assert h.sent(b"g1") == []
    h.bye(b"w1")
    [snapshot] = h.sent(b"g1")
    assert (snapshot.models, snapshot.workers) == ((), 0)


def test_a_draining_worker_gets_no_lease_but_keeps_what_runs(h: Harness) -> None:
    assign = running(h)
    h.engines(engine("m:latest", slots=2), draining=True)
    waits = h.submit("r2")
    assert h.told(Assign, b"w1") == []
    h.end(assign.rid, assign.attempt)
    assert h.request(waits).phase is Phase.QUEUED
    h.engines(engine("m:latest", slots=2))
    assert h.assigned().rid == waits


# Gateways that come and go --------------------------------------------------------------------------------------------


def test_a_gateway_that_comes_back_is_told_where_its_requests_are(h: Harness) -> None:
    assign = running(h, events=4)
    waits = h.submit("r2")
    peer = h.gateway("g1", peer=b"g1-again")
    h.submit("r1", peer=peer)
    h.submit("r2", peer=peer)
    leased = Leased(rid=assign.rid, attempt=assign.attempt, worker="w1", engine="http://e1")
    gap = Gap(rid=assign.rid, attempt=assign.attempt, top=4)
    *told, queued = h.sent(peer)
    assert told == [Accepted(rid=assign.rid), leased, gap, Accepted(rid=waits)]
    assert isinstance(queued, Queued)
    assert (queued.rid, queued.position) == (waits, 1)
    frame = h.chunk(assign.rid, assign.attempt, 4)
    assert h.effects == [Forward(peer, assign.rid, frame)]


def test_a_gateway_that_leaves_takes_its_requests_with_it(h: Harness) -> None:
    runs = running(h, "r1")
    h.submit("r2")
    h.bye(b"g1")
    assert h.sent(b"w1") == [Cancel(rid=runs.rid, attempt=runs.attempt)]
    assert h.empty


def test_the_ended_requests_of_a_gateway_that_falls_silent_outlive_it_for_a_while(h: Harness) -> None:
    assign = running(h)
    h.end(assign.rid, assign.attempt)
    h.sent(b"w1")
    h.wait(4.1 + 9, beating=[b"w1"])
    assert h.told(Release, b"w1") == []
    h.wait(1, beating=[b"w1"])
    assert h.told(Release, b"w1") == [Release(rid=assign.rid)]
    assert h.empty
    assert not h.core.state.gateways


def test_a_rid_of_another_gateway_is_refused(h: Harness) -> None:
    assign = running(h)
    h.submit("r1", peer=h.gateway("g2"))
    [failed] = h.sent(b"g2")
    assert (failed.rid, failed.code) == (assign.rid, Code.DUPLICATE_ID)
    assert h.sent(b"g1") == []


# Gaps and replays -----------------------------------------------------------------------------------------------------


def test_a_replay_goes_to_the_worker_that_holds_the_attempt(h: Harness) -> None:
    assign = running(h, events=3)
    replay = h.replay(assign.rid, assign.attempt, 1)
    assert h.sent(b"w1") == [replay]
    h.end(assign.rid, assign.attempt, 3)
    replay = h.replay(assign.rid, assign.attempt, 1)
    assert h.sent(b"w1") == [replay]
    frame = h.chunk(assign.rid, assign.attempt, 1, 2)
    assert h.sent(b"g1")[-1] == frame


def test_a_replay_by_another_or_of_another_attempt_goes_nowhere(h: Harness) -> None:
    assign = running(h)
    waits = h.submit("r2")
    h.sent(b"g1")
    h.replay(assign.rid, assign.attempt, peer=h.gateway("g2"))
    h.replay(assign.rid, assign.attempt + 1)
    h.replay(waits, 0)
    assert h.sent(b"w1") == h.sent(b"g1") == h.sent(b"g2") == []


def test_chunks_dropped_on_the_way_are_told_as_one_gap(h: Harness) -> None:
    assign = running(h, events=2)
    for seq in (2, 3):
        h.chunk(assign.rid, assign.attempt, seq)
        h.overflowed(assign.rid)
    h.overflowed(rid_of("just removed"))
    h.sent(b"g1")
    h.now += HEARTBEAT_INTERVAL_S
    h.tick()
    assert h.told(Gap) == [Gap(rid=assign.rid, attempt=assign.attempt, top=4)]
    h.tick()
    assert h.told(Gap) == []


def test_a_gap_of_a_request_that_went_is_not_told(h: Harness) -> None:
    assign = running(h)
    h.overflowed(assign.rid)
    h.cancel(assign.rid)
    h.tick()
    assert h.told(Gap) == []


# Peers that can't be reached, or make no sense ------------------------------------------------------------------------


def test_an_unreachable_worker_gets_nothing_until_it_registers_again(h: Harness) -> None:
    h.unreachable(b"w1")
    rid = h.submit("r1")
    assert h.request(rid).phase is Phase.QUEUED
    h.from_worker(Beat())
    assert h.sent(b"w1") == [Who()]
    h.worker("w1")
    assert h.assigned().rid == rid
    h.from_worker(Beat())
    assert h.sent(b"w1") == []


def test_a_gateway_that_missed_a_message_is_asked_and_told_again(h: Harness) -> None:
    h.unreachable(b"g1")
    h.from_gateway(Beat())
    assert h.sent(b"g1") == [Who()]
    h.gateway("g1")
    h.from_gateway(Beat())
    assert h.sent(b"g1") == []


def test_the_line_of_a_stranger_may_break(h: Harness) -> None:
    h.unreachable(b"g9")
    h.unreachable(b"w9")
    assert h.effects == []


def test_garbage_is_answered_and_counted(h: Harness) -> None:
    h.garbled(b"g1")
    h.garbled(b"w9")
    assert h.core.garbled == 2
    assert h.sent(b"g1") == h.sent(b"w9") == [Error(code=Code.INVALID_MESSAGE, message="not a map")]


@pytest.mark.parametrize("peer", [b"g1", b"w1"])
def test_a_peers_complaint_is_noted_and_not_answered(h: Harness, peer: bytes) -> None:
    side = Side.GATEWAY if peer == b"g1" else Side.WORKER
    h.feed(Received(side, peer, Error(code=Code.INVALID_MESSAGE, message="what?"), b"", b""))
    assert h.sent(peer) == []
    assert len(h.notes()) == 1


# What operators see ---------------------------------------------------------------------------------------------------


def test_anyone_may_ask_for_a_snapshot(h: Harness) -> None:
    running(h)
    h.submit("r2")
    snapshot = h.query(peer=b"g-stranger")
    assert snapshot == Snapshot(id=7, what="fleet", models=("m",), workers=1, queued=1, running=1)


def test_the_hosts_are_shown_with_their_leases(h: Harness) -> None:
    running(h)
    h.worker("w2", draining=True)
    first, second = h.query("hosts").hosts
    assert (first.name, first.busy, first.draining) == ("w1", {"http://e1": {"sha:m:latest": 1}}, False)
    assert (second.name, second.busy, second.draining) == ("w2", {}, True)
    h.now += 0.5
    assert h.query("hosts").hosts[0].beat_age_ms == 500


def test_the_requests_are_shown_with_their_place(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = running(h, "r0")
    h.end(ended.rid, ended.attempt)
    runs = running(h, "r1", events=2)
    waits = h.submit("r2")
    one, two = h.query("requests").jobs
    assert (one.rid, one.state, one.worker, one.attempt, one.events) == (runs.rid, "streaming", "w1", 1, 2)
    assert (two.rid, two.state, two.position, two.worker, two.model) == (waits, "queued", 1, "", "m")
    monkeypatch.setattr(core, "SNAPSHOT_JOBS_MAX", 1)
    assert len(h.query("requests").jobs) == 1


def test_numbers_at_the_edge_of_the_wire_can_be_told_again(h: Harness) -> None:
    """What the wire admits must not become what it can't encode: the harness encodes every effect."""
    top, last = 2**53 - 1, 2**62 - 1
    rid = h.submit("r1", attempt=last, lost=True, waited_ms=top, deadline_ms=top, attachment=top)
    assign = h.assigned()
    assert ordinal_of(assign.attempt) == ordinal_of(last) + 1
    h.chunk(rid, assign.attempt, top, top)
    h.overflowed(rid)
    h.tick()
    h.query("requests")
    assert h.request(rid).events == 2 * top
    with pytest.raises(ProtocolError):
        protocol.from_worker.decode(protocol.encode(protocol.Chunk(rid=rid, attempt=1, seq=2**64 - 1, n=1)))


# What somebody makes up -----------------------------------------------------------------------------------------------


def test_there_is_an_end_to_the_names_that_gateways_are_told(h: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.state.NAMES_MAX", 3)
    monkeypatch.setattr("broker.core.FAILURE_MODELS_MAX", 2)
    h.gateway()
    h.worker("w1", engine("a", "b", "c", "d"))
    assert h.query().models == ("a", "b", "c")
    h.sent()
    h.submit("x", model="nobody has it")
    [failed] = h.sent()
    assert (failed.models, len(failed.message) <= 2000) == (("a", "b"), True)


def test_a_failures_own_words_are_kept_up_to_a_bound(h: Harness) -> None:
    h.gateway()
    h.worker()
    rid = h.submit()
    attempt = h.core.state.requests[rid].attempt
    h.failed(rid, attempt, payload=b"x" * (2 * core.FAILURE_BYTES_MAX), retryable=False)
    assert len(h.core.state.requests[rid].terminal_payload) == core.FAILURE_BYTES_MAX


@pytest.mark.parametrize("side", [Side.WORKER, Side.GATEWAY])
def test_one_peer_too_many_is_turned_away(h: Harness, monkeypatch: pytest.MonkeyPatch, side: Side) -> None:
    monkeypatch.setattr("broker.core.PEERS_MAX", 2)
    come = h.worker if side is Side.WORKER else h.gateway
    known = h.core.state.workers if side is Side.WORKER else h.core.state.gateways_by_name
    while len(known) < 2:
        come(f"p{len(known)}")
    before = list(known)
    come("too many")
    assert list(known) == before
    come(before[-1])  # who is known may always come back
    assert sorted(known) == sorted(before)


# Bodies in parts ------------------------------------------------------------------------------------------------------


def test_what_a_worker_wants_of_a_body_goes_to_its_gateway_and_the_part_comes_back(h: Harness) -> None:
    rid = h.submit("r1", body=b"", parted_bytes=5000)
    assign = h.assigned()
    assert (assign.parted_bytes, h.core.state.body_bytes) == (5000, 0)
    h.sent(b"g1")
    assert h.want(rid, assign.attempt, 1000) in h.sent(b"g1")
    frame = h.part(rid, assign.attempt, 1000)
    assert h.sent(b"w1") == [frame], "unchanged"


def test_a_part_goes_nowhere_but_to_the_attempt_it_is_for(h: Harness) -> None:
    rid = h.submit("r1", body=b"", parted_bytes=5000)
    attempt = h.assigned().attempt
    h.gateway("g2")
    h.part(rid, attempt, peer=b"g2")
    h.part(rid, attempt + 1)
    h.part(rid_of("unheard of"), attempt)
    h.refused(rid, attempt)
    h.part(rid, 0)
    assert h.sent(b"w1") == []
    h.want(rid, attempt)
    assert [type(message) for message in h.sent(b"w1")] == [Cancel], "it holds no lease"


def test_a_body_in_parts_is_there_for_another_attempt(h: Harness) -> None:
    """Its gateway has it: a request whose worker died before its first event runs elsewhere."""
    rid = h.submit("r1", body=b"", parted_bytes=5000)
    first = h.assigned()
    h.bye(b"w1")
    h.worker("w2")
    again = h.assigned(b"w2")
    assert (again.rid, again.parted_bytes) == (rid, 5000)
    assert again.attempt > first.attempt
    h.chunk(rid, again.attempt, peer=b"w2")
    h.sent(b"g1")
    h.bye(b"w2")
    [failed] = h.told(Failed)
    assert (failed.code, failed.resubmit, failed.seq) == (Code.WORKER_LOST, True, 1)


def test_an_upload_goes_on_when_the_broker_was_restarted() -> None:
    h = Harness(nonce=NONCE + 1)
    attempt = attempt_of(1, NONCE)
    rid = rid_of("r1")
    h.worker("w1", claims=[claim_of(rid, attempt)])
    h.sent(b"w1")
    h.want(rid, attempt)
    assert h.sent(b"w1") == [], "it waits for its gateway, which is not here yet"
    h.gateway("g1")
    h.submit("r1", body=b"", parted_bytes=5000, accepted=True, attempt=attempt)
    h.sent(b"g1")
    assert h.want(rid, attempt, 7) in h.sent(b"g1")
    frame = h.part(rid, attempt, 7)
    assert h.sent(b"w1") == [frame]
    h.bye(b"w1")
    assert h.told(Lost) == [Lost(rid=rid, attempt=attempt)], "it can run anew"
