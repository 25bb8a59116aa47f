"""The worker's decisions, without a socket, an engine or a clock. `Rig.check` holds the invariants after every step."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from common import protocol
from common.errors import Code
from common.protocol import (
    BESIDE_MAX,
    CHUNK_BYTES_MAX,
    COUNT_MAX,
    LIGHT,
    OPERATION,
    PARTS_MAX,
    SILENCE_S,
    Assign,
    Beat,
    Bye,
    Cancel,
    Chunk,
    Claim,
    Drain,
    End,
    Engine,
    Error,
    Failed,
    Forgotten,
    Model,
    ModelOp,
    Part,
    Refused,
    Register,
    Registered,
    Release,
    Replay,
    Started,
    State,
    Stats,
    Superseded,
    Want,
    Who,
)
from workers import session as session_module
from workers.session import (
    EVENT_BYTES_MAX,
    EVENT_OVERHEAD_BYTES,
    FRAMES_PER_PUMP_MAX,
    LEASE_OVERHEAD_BYTES,
    NOTES_MAX,
    PART_PATIENCE_S,
    PART_PATIENCE_S_MAX,
    WANTS_MAX,
    Close,
    Drained,
    Effect,
    Give,
    Joined,
    Lease,
    LeaseState,
    Limits,
    Post,
    Probe,
    Report,
    Resume,
    Served,
    Session,
)
from workers.session import Superseded as SupersededEffect

URL = "http://127.0.0.1:11434"
OTHER = "http://127.0.0.1:11435"
ENGINES = (
    Engine(url=URL, models=(Model(name="m:latest", digest="d1", slots=2), Model(name="e:latest", digest="d2"))),
    Engine(url=OTHER, up=False, error="down", models=(Model(name="m:latest", digest="d1", slots=4),)),
)
NDJSON = "application/x-ndjson"
FINAL = (
    b'{"model":"m","response":"","done":true,"done_reason":"stop","total_duration":9,"load_duration":1,'
    b'"prompt_eval_count":3,"prompt_eval_duration":2,"eval_count":5,"eval_duration":6}\n'
)
STATS = Stats(
    done_reason="stop", prompt_tokens=3, completion_tokens=5, total_ns=9, load_ns=1, prompt_ns=2, completion_ns=6
)


def token(index: int) -> bytes:
    return b'{"response":"t%d","done":false}\n' % index


class Rig:
    """A session whose socket takes `room` more frames (None: all) and whose time is `now`."""

    def __init__(self, *, registered: bool = True, brokers: int = 1, **limits: Any) -> None:
        self.now = 100.0
        self.session = Session("gpu-1", "epoch", Limits(**limits), self.now, brokers=brokers)
        self.session.set_engines(ENGINES)
        self.room: int | None = None
        self.out: list[tuple[Any, bytes]] = []
        self.effects: list[Effect] = []
        if registered:
            self.pump()
            self.handle(Registered(registration=7))
            self.take()
            self.effects.clear()

    def offer(self, frame: bytes) -> bool:
        if self.room == 0:
            return False
        if self.room is not None:
            self.room -= 1
        self.out.append(protocol.from_worker.decode(frame))
        return True

    def pump(self) -> None:
        self._did(self.session.pump(self.offer, self.now))

    def pump_all(self) -> None:
        self.pump()
        while self.session.blocked:
            self.pump()

    def handle(self, message: Any, payload: bytes = b"", broker: int = 0) -> list[Effect]:
        """What a broker says, over the wire's own encoding."""
        decoded, body = protocol.to_worker.decode(protocol.encode(message, payload))
        return self._did(self.session.handle(decoded, body, self.now, broker=broker))

    def tick(self, now: float) -> list[Effect]:
        """The effects, but for the one that comes with every beat."""
        self.now = now
        effects = self._did(self.session.tick(now))
        self.effects = [effect for effect in self.effects if not isinstance(effect, Probe)]
        return [effect for effect in effects if not isinstance(effect, Probe)]

    def take(self) -> list[Any]:
        """Pump, and the messages that came out since the last time."""
        self.pump_all()
        out = [message for message, _ in self.out]
        self.out.clear()
        return out

    def assign(self, rid: bytes = b"r", attempt: int = 1, **changes: Any) -> Lease:
        [post] = self.handle(assign(rid, attempt, **changes), b"body")
        assert isinstance(post, Post)
        assert (post.body, post.prior) == (b"body", ())
        return post.lease

    def go_on(self, *prior: bytes, attempt: int = 2, **changes: Any) -> Lease:
        """A request that is continued here after these events."""
        changes = {"start": len(prior), "body_bytes": 4} | changes
        [post] = self.handle(assign(b"r", attempt, **changes), b"body" + b"".join(prior))
        assert isinstance(post, Post)
        assert (post.body, post.prior) == (b"body", prior)
        self.session.head(post.lease, 200, NDJSON, self.now)
        return post.lease

    def stream(self, rid: bytes = b"r", **changes: Any) -> Lease:
        lease = self.assign(rid, **changes)
        self.session.head(lease, 200, NDJSON, self.now)
        return lease

    def feed(self, lease: Lease, data: bytes) -> bool:
        go_on = self.session.feed(lease, data, self.now)
        self.check()
        return go_on

    def _did(self, effects: Sequence[Effect]) -> list[Effect]:
        self.effects += effects
        self.check()
        return list(effects)

    def check(self) -> None:
        s = self.session
        leases = list(s._leases.values())
        assert list(s._leases) == [lease.rid for lease in leases]
        assert s._bytes == sum(lease.size_bytes for lease in leases)
        assert s._busy == Counter((lease.engine, lease.digest) for lease in leases if lease.at_engine)
        assert set(s._ended) == {lease.rid for lease in leases if not lease.at_engine}
        assert set(s._paused) == {lease.rid for lease in leases if lease.paused}
        assert len(s._ready) == len(set(s._ready))
        assert set(s._ready) == {lease for lease in leases if lease.queued}
        for lease in leases:
            assert lease.state is not LeaseState.DROPPED
            if lease.upload is None:
                assert lease.queued == lease.has_more
            else:
                assert lease.at_engine
                assert lease.queued or not lease.has_more
                assert 0 <= lease.upload.under_way <= PARTS_MAX
            assert lease.base <= lease.sent <= lease.top
            assert (lease.terminal is not None) == (not lease.at_engine)
            unsent = lease.events[lease.sent - lease.base :]
            assert lease.unsent_bytes == sum(len(event) + EVENT_OVERHEAD_BYTES for event in unsent)
            own = LEASE_OVERHEAD_BYTES + len(lease.body) + len(lease.terminal_payload)
            assert lease.size_bytes == own + sum(len(event) + EVENT_OVERHEAD_BYTES for event in lease.events)
            assert len(lease.partial) <= EVENT_BYTES_MAX
            if lease.state is LeaseState.DELIVERED:
                assert lease.sent == lease.top
        kept = [lease.keep_until for lease in s._ended.values()]
        assert kept == sorted(kept)


def assign(rid: bytes = b"r", attempt: int = 1, **changes: Any) -> Assign:
    fields: dict[str, Any] = {
        "registration": 7,
        "engine": URL,
        "model": "m:latest",
        "digest": "d1",
        "path": "/api/generate",
        "client": "alice",
        "ref": "1",
    } | changes
    return Assign(rid=rid, attempt=attempt, **fields)


def started(lease: Lease, content_type: str = NDJSON) -> Started:
    return Started(rid=lease.rid, attempt=lease.attempt, status=200, content_type=content_type)


def claim(rid: bytes = b"r", *, top: int, ended: bool = False, **more: Any) -> Claim:
    """Of what `assign` assigned."""
    fields: dict[str, Any] = {"attempt": 1, "client": "alice", "ref": "1", "grace_ms": 0} | more
    return Claim(
        rid=rid, engine=URL, digest="d1", model="m:latest", path="/api/generate", top=top, ended=ended, **fields
    )


def chunk(lease: Lease, seq: int, n: int = 1) -> Chunk:
    return Chunk(rid=lease.rid, attempt=lease.attempt, seq=seq, n=n)


def state_of(lease: Lease) -> LeaseState:
    """A call, for a type checker would narrow the attribute and not see that it moves on."""
    return lease.state


# Registration ---------------------------------------------------------------------------------------------------------


def test_registers_first_and_sends_nothing_else_until_confirmed() -> None:
    rig = Rig(registered=False)
    assert rig.take() == [Register(name="gpu-1", epoch="epoch", engines=ENGINES)]
    rig.session.set_engines(())
    assert rig.take() == []
    assert rig.handle(Registered(registration=1)) == [Joined(1)]
    assert rig.take() == [State(engines=())]


def test_register_waits_for_the_socket() -> None:
    rig = Rig(registered=False)
    rig.room = 0
    rig.pump()
    assert rig.session.blocked
    rig.room = None
    assert len(rig.take()) == 1
    assert not rig.session.blocked


def test_unconfirmed_register_is_repeated_every_interval() -> None:
    rig = Rig(registered=False)
    rig.take()
    rig.tick(100.5)
    assert rig.take() == []
    rig.tick(101.0)
    assert [type(message) for message in rig.take()] == [Register]
    rig.handle(Registered(registration=1))
    rig.tick(102.0)
    assert rig.take() == [Beat()]


def test_one_register_answers_many_who() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0))
    rig.take()
    rig.feed(lease, token(1))
    rig.handle(Who())
    rig.handle(Who())
    assert rig.take() == [Register(name="gpu-1", epoch="epoch", engines=ENGINES, leases=(claim(top=2),))]
    rig.handle(Who())
    assert rig.take() == []
    rig.now += 1.0
    rig.handle(Who())
    assert [type(message) for message in rig.take()] == [Register]
    rig.handle(Registered(registration=8))
    assert rig.take() == [chunk(lease, 1)]


def test_claims_say_what_is_held_and_what_has_ended() -> None:
    rig = Rig()
    ended, running = rig.stream(b"a"), rig.stream(b"b")
    rig.feed(ended, FINAL)
    rig.session.eof(ended, rig.now)
    rig.feed(running, token(0) + token(1))
    rig.handle(Who())
    [register] = rig.take()
    assert register.leases == (claim(b"a", top=1, ended=True), claim(b"b", top=2))


def test_beats_carry_the_tops_of_streaming_leases() -> None:
    rig = Rig()
    done, running = rig.stream(b"a"), rig.stream(b"b")
    rig.feed(done, FINAL)
    rig.session.eof(done, rig.now)
    rig.feed(running, token(0))
    rig.take()
    rig.tick(101.0)
    assert rig.take() == [Beat()]


def test_silent_broker_is_lost_and_a_message_brings_it_back() -> None:
    rig = Rig()
    assert rig.tick(102.9) == []
    assert rig.tick(103.0) == [Report("the broker does not answer", {"silent_s": 3.0})]
    assert rig.session.registration is None
    assert rig.tick(104.0) == []
    rig.handle(Who())
    rig.handle(Registered(registration=8))
    assert rig.session.registration == 8


def test_leases_outlive_a_silent_broker_for_orphan_s_only() -> None:
    rig = Rig(orphan_s=10.0)
    running, ended = rig.stream(b"a"), rig.stream(b"b")
    rig.feed(ended, FINAL)
    rig.session.eof(ended, rig.now)
    rig.tick(103.0)
    rig.tick(104.0)
    assert rig.session.next_deadline() == 105.0
    rig.tick(109.9)
    assert rig.session.next_deadline() == 110.0
    assert len(list(rig.session._leases)) == 2
    effects = rig.tick(110.0)
    assert effects == [Report("no broker: leases cancelled", {"leases": 2, "silent_s": 10.0}), Close(running)]
    assert list(rig.session._leases) == []


def test_engines_are_told_when_they_change() -> None:
    rig = Rig()
    assert not rig.session.set_engines(ENGINES)
    assert rig.take() == []
    assert rig.session.set_engines(ENGINES[:1])
    assert rig.take() == [State(engines=ENGINES[:1])]


def test_superseded() -> None:
    assert Rig().handle(Superseded()) == [SupersededEffect()]


def test_the_broker_s_errors_are_reported() -> None:
    effects = Rig().handle(Error(code=Code.UNKNOWN_TYPE, message="what?"))
    assert effects == [Report("the broker did not understand", {"error": "what?"})]


def test_what_is_not_understood_is_answered() -> None:
    rig = Rig()
    rig.session.misunderstood("no such type")
    rig.handle(ModelOp(id=1, engine=URL, action="pull", model="m"))
    assert [message.code for message in rig.take()] == [Code.INVALID_MESSAGE, Code.UNKNOWN_TYPE]


def test_too_many_answers_end_in_a_new_register() -> None:
    rig = Rig()
    rig.room = 0
    for _ in range(NOTES_MAX + 1):
        rig.handle(assign(registration=1))
    rig.room = None
    assert [type(message) for message in rig.take()] == [Register, Refused]


def test_control_messages_wait_one_by_one() -> None:
    rig = Rig()
    rig.session.set_engines(())
    rig.tick(101.0)
    rig.session.misunderstood("a")
    rig.session.misunderstood("b")
    seen: list[type] = []
    for _ in range(5):
        rig.room = 0
        rig.pump()
        assert rig.session.blocked == (len(seen) < 4)
        rig.room = 1
        rig.pump()
        seen += [type(message) for message, _ in rig.out]
        rig.out.clear()
    assert seen == [State, Beat, Error, Error]


# Several brokers ------------------------------------------------------------------------------------------------------


def test_with_every_beat_the_other_brokers_are_asked_for_a_sign_of_life() -> None:
    rig = Rig()
    assert list(rig.session.tick(101.0)) == [Probe()]
    assert list(rig.session.tick(101.5)) == []


def hear_from(rig: Rig, seconds: int, *alive: int) -> list[Effect]:
    """Ticks at every heartbeat, each after a sign of life of those brokers."""
    effects: list[Effect] = []
    for _ in range(seconds):
        rig.now += 1.0
        for broker in alive:
            rig.handle(Beat(), broker=broker)
        effects += rig.tick(rig.now)
    return effects


def test_another_broker_is_told_everything_anew() -> None:
    rig = Rig(brokers=2)
    lease = rig.stream()
    rig.feed(lease, token(0) + token(1))
    rig.take()
    assert hear_from(rig, 3, 1)[-1] == Report("the broker does not answer", {"silent_s": 3.0})
    assert hear_from(rig, 1, 1) == [Served(1)]
    assert rig.take() == [Register(name="gpu-1", epoch="epoch", engines=ENGINES, leases=(claim(top=2),))]
    rig.feed(lease, token(2))
    assert rig.take() == []
    assert rig.handle(Registered(registration=3), broker=1) == [Joined(3)]
    assert rig.take() == [chunk(lease, 2)]


def test_the_word_of_a_broker_that_is_not_served_does_not_count() -> None:
    rig = Rig(brokers=2)
    lease = rig.stream()
    rig.take()
    for message in (Cancel(rid=b"r"), Release(rid=b"r"), Who(), Registered(registration=9), Superseded(), Drain()):
        assert rig.handle(message, broker=1) == []
    assert rig.handle(assign(b"s"), broker=1) == []
    assert rig.take() == []
    assert (state_of(lease), rig.session.registration) == (LeaseState.STREAMING, 7)


def test_orphans_wait_for_the_broker_that_takes_over() -> None:
    """The time without a broker begins anew with the one that lives."""
    rig = Rig(brokers=2, orphan_s=5.0)
    rig.stream()
    assert Served(1) in hear_from(rig, 4, 1)
    assert hear_from(rig, 2) == []
    rig.handle(Registered(registration=3), broker=1)
    assert hear_from(rig, 4, 1) == []
    assert rig.session.leases == 1


def test_after_bye_nobody_is_told_anything() -> None:
    rig = Rig(brokers=2)
    rig.session.shutdown(rig.now)
    assert rig.take()[-1] == Bye()
    assert Served(1) in hear_from(rig, int(SILENCE_S) + 1, 1)
    assert rig.take() == []


# Assigns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"registration": 6}, "earlier registration"),
        ({"engine": "http://nowhere"}, "no engine"),
        ({"engine": OTHER}, "does not answer"),
        ({"digest": "d9", "model": "x:latest"}, "does not have x:latest"),
    ],
)
def test_assigns_that_are_refused(changes: dict[str, Any], reason: str) -> None:
    rig = Rig()
    assert rig.handle(assign(**changes)) == []
    [refused] = rig.take()
    assert isinstance(refused, Refused)
    assert (refused.rid, refused.attempt) == (b"r", 1)
    assert reason in refused.reason


def test_slots_are_counted_per_engine_and_digest() -> None:
    rig = Rig()
    first = rig.stream(b"a")
    rig.assign(b"b")
    rig.assign(b"c", digest="d2", model="e:latest")
    rig.handle(assign(b"d"))
    [refused, _] = rig.take()
    assert "all slots for m:latest" in refused.reason
    rig.feed(first, FINAL)
    rig.session.eof(first, rig.now)
    rig.assign(b"d")  # free at the end, not at the release


def test_a_light_request_takes_no_slot_and_has_a_bound_of_its_own() -> None:
    rig = Rig()
    rig.session.set_engines((replace(ENGINES[0], models_max=1),))
    for number in range(BESIDE_MAX[LIGHT]):
        rig.assign(b"light%d" % number, digest=LIGHT)
    rig.assign(b"r")
    rig.take()
    rig.handle(assign(b"more", 1, digest=LIGHT), b"body")
    (refused,) = rig.take()
    assert refused.reason == f"{BESIDE_MAX[LIGHT]} requests of this kind run on {ENGINES[0].url}"


def test_an_operation_may_be_silent_for_as_long_as_a_load() -> None:
    rig = Rig(first_byte_s=600.0, silence_s=120.0, orphan_s=10_000.0)
    rig.session.set_engines((replace(ENGINES[0], models_max=1),))
    pull, chat = rig.stream(b"pull", digest=OPERATION), rig.stream(b"chat")
    for lease in (pull, chat):
        rig.feed(lease, b'{"status":"verifying sha256 digest"}\n')
    rig.take()
    start = rig.now
    rig.tick(start + 121)
    assert [lease.at_engine for lease in (pull, chat)] == [True, False]
    rig.tick(start + 601)
    assert not pull.at_engine


def test_an_operation_ends_with_success() -> None:
    rig = Rig()
    for rid, last, kind in ((b"a", b'{"status":"success"}\n', End), (b"b", b'{"status":"pulling"}\n', Failed)):
        lease = rig.stream(rid, digest=OPERATION)
        rig.feed(lease, last)
        rig.session.eof(lease, rig.now)
        assert isinstance(rig.take()[-1], kind)


USAGE = b'data: {"usage":{"prompt_tokens":2,"completion_tokens":3}}\n\n'
SSE_LINES = (b'data: {"choices":[]}\n', b"\n")


def stream_events(rig: Rig) -> Lease:
    lease = rig.assign()
    rig.session.head(lease, 200, "text/event-stream", rig.now)
    return lease


@pytest.mark.parametrize(
    ("last", "stats"),
    [
        (USAGE + b"data: [DONE]\n\n", Stats(prompt_tokens=2, completion_tokens=3)),
        (b"data: [DONE]\n\n", Stats()),
        (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', Stats()),
    ],
)
def test_events_are_sent_on_line_by_line(last: bytes, stats: Stats) -> None:
    rig = Rig()
    lease = stream_events(rig)
    rig.session.feed(lease, b"".join(SSE_LINES), rig.now)
    for piece in (last[:5], last[5:-1], last[-1:]):
        rig.session.feed(lease, piece, rig.now)
    rig.session.eof(lease, rig.now)
    rig.pump_all()
    assert b"".join(payload for message, payload in rig.out if isinstance(message, Chunk)) == b"".join(SSE_LINES) + last
    assert lease.events[:2] == list(SSE_LINES)
    end = rig.out[-1][0]
    assert (end.seq, end.stats) == (2 + last.count(b"\n"), stats)


@pytest.mark.parametrize("rest", [b"", b"data: {", b"\n", b"event: message_delta\n"])
def test_events_without_the_last_one_are_a_failure(rest: bytes) -> None:
    rig = Rig()
    lease = stream_events(rig)
    rig.session.feed(lease, b"".join(SSE_LINES) + rest, rig.now)
    rig.session.eof(lease, rig.now)
    failed = rig.take()[-1]
    assert (failed.code, failed.seq) == (Code.BACKEND_ERROR, 2 + rest.count(b"\n"))


def test_what_would_evict_a_busy_model_is_refused() -> None:
    """Brokers that disagree may both send work: the worker is the authority."""
    rig = Rig()
    rig.session.set_engines((replace(ENGINES[0], models_max=1),))
    first = rig.stream(b"a")
    rig.take()
    rig.handle(assign(b"b", digest="d2", model="e:latest"))
    [refused] = [message for message in rig.take() if isinstance(message, Refused)]
    assert "evict a busy model for e:latest" in refused.reason
    rig.assign(b"c")  # another slot of the model that is loaded
    rig.feed(first, FINAL)
    rig.session.eof(first, rig.now)
    rig.handle(Cancel(rid=b"c"))
    rig.assign(b"d", digest="d2", model="e:latest")  # nothing is busy any more


def test_draining_refuses_and_can_end() -> None:
    rig = Rig()
    assert rig.handle(Drain()) == [Drained(True)]
    rig.handle(assign())
    state, refused = rig.take()
    assert state == State(engines=ENGINES, draining=True)
    assert refused.reason == "the worker is draining"
    assert rig.handle(Drain(on=False)) == [Drained(False)]
    rig.assign()
    assert rig.take() == [State(engines=ENGINES)]


def test_a_drained_worker_finishes_what_it_has_and_says_so_when_it_registers() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.session.drain()
    rig.feed(lease, FINAL)
    rig.session.eof(lease, rig.now)
    messages = rig.take()
    assert messages[0] == State(engines=ENGINES, draining=True)
    assert isinstance(messages[-1], End)
    assert rig.session.leases == 1
    rig.handle(Release(rid=b"r"))
    assert rig.session.leases == 0
    rig.handle(Who())
    [register] = rig.take()
    assert register.draining


def test_a_worker_that_is_about_to_end_cannot_be_resumed() -> None:
    rig = Rig()
    rig.session.drain(for_good=True)
    assert rig.handle(Drain(on=False)) == [Drained(False)], "its next process may work again"
    rig.handle(assign())
    assert [type(message) for message in rig.take()] == [State, Refused]
    rig.session.drain()
    rig.handle(Drain(on=False))
    assert rig.session.draining


def test_the_same_attempt_twice_is_one() -> None:
    rig = Rig()
    rig.assign()
    assert rig.handle(assign()) == []
    assert rig.take() == []


def test_a_later_attempt_replaces_an_earlier_one_but_not_the_other_way_round() -> None:
    rig = Rig()
    old = rig.assign()
    close, post = rig.handle(assign(attempt=2))
    assert close == Close(old)
    assert isinstance(post, Post)
    assert rig.handle(assign(attempt=1)) == []
    [refused] = rig.take()
    assert refused.reason == "a later attempt of this request is here"
    assert state_of(old) is LeaseState.DROPPED


# Splitting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_lines_are_events_wherever_the_engine_s_pieces_end(size: int) -> None:
    rig = Rig()
    lease = rig.stream()
    lines = [token(0), b"\n", token(1), '{"response":"ü\\u2028"}\r\n'.encode(), FINAL]
    data = b"".join(lines)
    for index in range(0, len(data), size):
        assert rig.feed(lease, data[index : index + size])
    rig.session.eof(lease, rig.now)
    assert lease.events == lines
    assert rig.take()[-1] == End(rid=b"r", attempt=1, seq=5, stats=STATS)


def test_a_last_line_without_its_newline_is_an_event_and_gets_one() -> None:
    """What continues a stream counts its events by their newlines."""
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0) + FINAL[:-1])
    rig.session.eof(lease, rig.now)
    assert lease.events == [token(0), FINAL]
    assert rig.take() == [started(lease), chunk(lease, 0, 2), End(rid=b"r", attempt=1, seq=2, stats=STATS)]


@pytest.mark.parametrize("half", [FINAL[:-2], b'{"resp', b"plain text"])
def test_half_a_line_at_the_end_is_no_event(half: bytes) -> None:
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0) + half)
    rig.session.eof(lease, rig.now)
    assert lease.events == [token(0)]
    failed = rig.take()[-1]
    assert (failed.code, failed.seq, failed.retryable) == (Code.BACKEND_ERROR, 1, True)


@pytest.mark.parametrize("body", [FINAL, b'{"embeddings":[[0.5]],"prompt_eval_count":3}\n{"x":', b""])
def test_a_document_is_one_event(body: bytes) -> None:
    rig = Rig()
    lease = rig.assign()
    rig.session.head(lease, 200, "application/json; charset=utf-8", rig.now)
    for index in range(len(body)):
        rig.feed(lease, body[index : index + 1])
    rig.session.eof(lease, rig.now)
    rig.pump_all()
    assert b"".join(payload for message, payload in rig.out if isinstance(message, Chunk)) == body
    assert rig.out[-1][0] == End(rid=b"r", attempt=1, seq=bool(body), stats=STATS if body == FINAL else Stats())


def test_an_event_larger_than_a_frame_ends_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "EVENT_BYTES_MAX", 100)
    rig = Rig()
    growing, at_once, fine = rig.stream(b"a"), rig.stream(b"b"), rig.stream(b"c", digest="d2")
    assert rig.feed(growing, b"x" * 100)
    assert not rig.feed(growing, b"x")
    assert not rig.feed(at_once, b"x" * 100 + b"\n")
    assert rig.feed(fine, b"x" * 99 + b"\n" + b"x" * 99 + b"\n")
    failed = [message for message in rig.take() if isinstance(message, Failed)]
    assert [(f.rid, f.code, f.retryable, f.seq) for f in failed] == [
        (b"a", Code.TOO_LARGE, False, 0),
        (b"b", Code.TOO_LARGE, False, 0),
    ]


# Ends -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [b"", token(1), b"no json\n", b'{"done":"perhaps"}\n', b"\xff\n"])
def test_a_stream_without_its_last_line_failed(last: bytes) -> None:
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0) + last)
    rig.session.eof(lease, rig.now)
    failed = rig.take()[-1]
    assert (failed.code, failed.retryable, failed.seq) == (Code.BACKEND_ERROR, True, lease.top)
    assert "without a last line" in failed.message


def test_an_error_line_ends_the_stream_and_is_no_event() -> None:
    rig = Rig()
    lease = rig.stream()
    error = b'{"error":"model runner has unexpectedly stopped"}\n'
    assert not rig.feed(lease, token(0) + error + token(1))
    assert not rig.feed(lease, token(2))
    rig.session.eof(lease, rig.now)
    rig.pump_all()
    text = "model runner has unexpectedly stopped"
    assert rig.out == [
        (started(lease), b""),
        (chunk(lease, 0), token(0)),
        (Failed(rid=b"r", attempt=1, code=Code.BACKEND_ERROR, message=text, seq=1, retryable=True), error),
    ]


def test_error_line_alone_or_at_the_end() -> None:
    rig = Rig()
    first, rest = rig.stream(b"a"), rig.stream(b"b")
    assert not rig.feed(first, b'{"error":{"code":1}}\n')
    assert rig.feed(rest, b'{"error":"x"}')
    rig.session.eof(rest, rig.now)
    failed = [message for message in rig.take() if isinstance(message, Failed)]
    assert [f.message for f in failed] == ["the engine failed", "x"]


def test_an_error_key_within_a_line_is_content() -> None:
    rig = Rig()
    lease = rig.stream()
    line = b'{"message":{"tool_calls":[{"arguments":{"error":"no"}}]}}\n'
    assert rig.feed(lease, line)
    assert lease.events == [line]


@pytest.mark.parametrize(
    ("status", "body", "code", "retryable", "message"),
    [
        (404, b'{"error":"model \'m\' not found"}', Code.MODEL_NOT_FOUND, False, "model 'm' not found"),
        (400, b'{"error":{"message":"bad"}}', Code.INVALID_MESSAGE, False, "bad"),
        (403, b"", Code.INVALID_MESSAGE, False, f"the engine {URL} answered 403"),
        (429, b"[]", Code.BACKEND_ERROR, True, f"the engine {URL} answered 429"),
        (500, b'{"error":"option \\"seed\\" must be"}', Code.INVALID_MESSAGE, False, 'option "seed" must be'),
        (500, b'{"error":7}', Code.BACKEND_ERROR, True, f"the engine {URL} answered 500"),
        (503, b'{"error":"server busy"}', Code.BACKEND_ERROR, True, "server busy"),
        (301, b"\xff", Code.BACKEND_ERROR, True, f"the engine {URL} answered 301"),
        (500, b'{"error":"%b"}' % (b"x" * 3000), Code.BACKEND_ERROR, True, "x" * 2000),
    ],
)
def test_an_engine_s_refusal(status: int, body: bytes, code: Code, retryable: bool, message: str) -> None:
    rig = Rig()
    lease = rig.assign()
    rig.session.rejected(lease, status, body, rig.now)
    rig.pump_all()
    assert rig.out == [
        (Failed(rid=b"r", attempt=1, code=code, message=message, status=status, retryable=retryable), body)
    ]


def test_a_broken_connection_names_the_engine_and_follows_the_events() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0) + b"half a li")
    rig.session.broke(lease, "connection reset", rig.now)
    *_, last, failed = rig.take()
    assert last == chunk(lease, 0)
    assert failed.message == f"the engine {URL}: connection reset"
    assert (failed.code, failed.retryable, failed.seq) == (Code.BACKEND_ERROR, True, 1)


def test_what_comes_after_the_end_is_ignored() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.handle(Cancel(rid=b"r"))
    rig.session.head(lease, 200, NDJSON, rig.now)
    rig.session.rejected(lease, 500, b"", rig.now)
    rig.session.broke(lease, "x", rig.now)
    rig.session.eof(lease, rig.now)
    assert not rig.feed(lease, token(0))
    assert rig.take() == []


def test_an_illegal_move_tells_the_story() -> None:
    rig = Rig()
    lease = rig.stream()
    with pytest.raises(RuntimeError, match=r"lease 72 attempt 1 cannot go to DELIVERED; .*100.000 POSTED.*STREAMING"):
        rig.session._move(lease, LeaseState.DELIVERED, rig.now)


# Watchdogs and keeping ------------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_begin() -> None:
    rig = Rig(first_byte_s=2.5, silence_s=0.25)
    lease = rig.assign()
    rig.now += 2.0
    rig.handle(Beat())
    rig.session.head(lease, 200, NDJSON, rig.now)  # a head is no answer yet
    assert rig.tick(102.4) == []
    assert rig.session.next_deadline() == 102.5
    assert rig.tick(102.5) == [Close(lease)]
    failed = rig.take()[-1]
    assert (failed.code, failed.retryable) == (Code.BACKEND_ERROR, True)
    assert failed.message == f"the engine {URL} said nothing for 2.5 s"


def test_an_engine_that_falls_silent() -> None:
    rig = Rig(first_byte_s=2.5, silence_s=0.25)
    lease = rig.stream()
    rig.feed(lease, token(0))
    rig.now += 0.2
    rig.feed(lease, b"{")
    assert rig.session.next_deadline() == pytest.approx(100.45)
    assert rig.tick(100.44) == []
    assert rig.tick(100.46) == [Close(lease)]
    assert rig.take()[-1].message == f"the engine {URL} said nothing for 0.25 s"


def test_a_finished_lease_is_kept_for_keep_s() -> None:
    rig = Rig(keep_s=0.5)
    lease = rig.stream()
    rig.feed(lease, FINAL)
    rig.session.eof(lease, rig.now)
    rig.take()
    assert rig.session.next_deadline() == 100.5
    rig.tick(100.4)
    assert state_of(lease) is LeaseState.DELIVERED
    rig.tick(100.5)
    assert state_of(lease) is LeaseState.DROPPED


def test_next_deadline_is_the_beat_when_nothing_else_is() -> None:
    rig = Rig()
    assert rig.session.next_deadline() == 101.0
    rig.tick(103.0)
    assert rig.session.next_deadline() == 104.0


# Cancel, release, shutdown --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", [0, 1])
def test_cancel_closes_the_stream_and_silences_the_lease(attempt: int) -> None:
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0))
    assert rig.handle(Cancel(rid=b"r", attempt=attempt)) == [Close(lease)]
    assert rig.take() == []
    assert not rig.session._busy


def test_cancel_of_another_attempt_or_request_does_nothing() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.handle(Cancel(rid=b"r", attempt=2))
    rig.handle(Cancel(rid=b"x"))
    rig.handle(Release(rid=b"x"))
    assert rig.take() == [started(lease)]


def test_release_forgets_a_finished_lease_and_stops_a_running_one() -> None:
    rig = Rig()
    ended, running = rig.stream(b"a"), rig.stream(b"b")
    rig.feed(ended, FINAL)
    rig.session.eof(ended, rig.now)
    rig.take()
    assert rig.handle(Release(rid=b"a")) == []
    assert rig.handle(Release(rid=b"b")) == [Close(running)]
    assert rig.session._bytes == 0


def test_shutdown_fails_what_runs_then_says_bye() -> None:
    rig = Rig()
    ended, running = rig.stream(b"a"), rig.stream(b"b")
    rig.feed(ended, FINAL)
    rig.session.eof(ended, rig.now)
    rig.feed(running, token(0))
    rig.take()
    rig.feed(running, token(1))
    assert rig._did(rig.session.shutdown(rig.now)) == [Close(running)]
    for room in (0, 1, 1, 1, 0):
        rig.room = room
        rig.pump()
        assert not rig.session.left
    rig.room = None
    rig.handle(assign(b"c"))
    assert rig.take()[-1] == Bye()
    assert rig.session.left
    rig.tick(101.0)
    assert rig.take() == []


def test_shutdown_order() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0))
    rig.session.shutdown(rig.now)
    state, *_, last, failed, bye = rig.take()
    assert state == State(engines=ENGINES, draining=True), "or what fails would be assigned here again"
    assert last == chunk(lease, 0)
    assert (failed.code, failed.retryable, failed.seq) == (Code.SHUTTING_DOWN, True, 1)
    assert bye == Bye()


# Sending --------------------------------------------------------------------------------------------------------------


def test_each_line_leaves_at_once_and_lines_that_wait_leave_together() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0))
    assert rig.take() == [started(lease), chunk(lease, 0)]
    rig.room = 0
    rig.feed(lease, token(1))
    rig.pump()
    rig.feed(lease, token(2))
    rig.pump()
    assert rig.session.blocked
    rig.room = None
    rig.pump()
    assert rig.out == [(chunk(lease, 1, 2), token(1) + token(2))]


def test_a_chunk_has_a_bound_and_a_longer_line_travels_alone() -> None:
    rig = Rig()
    lease = rig.stream()
    short, long = b"s" * (CHUNK_BYTES_MAX // 2 - 1) + b"\n", b"l" * CHUNK_BYTES_MAX + b"\n"
    rig.feed(lease, short + short + b"\n" + long + short)
    assert rig.take() == [started(lease), chunk(lease, 0, 2), chunk(lease, 2), chunk(lease, 3), chunk(lease, 4)]


def test_leases_take_turns() -> None:
    rig = Rig()
    a, b = rig.stream(b"a"), rig.stream(b"b")
    line = b"x" * CHUNK_BYTES_MAX + b"\n"
    rig.feed(a, line * 3)
    rig.feed(b, line)
    assert rig.take() == [started(a), started(b), chunk(a, 0), chunk(b, 0), chunk(a, 1), chunk(a, 2)]


def test_a_pump_ends_after_its_share() -> None:
    rig = Rig()
    lease = rig.stream()
    line = b"x" * CHUNK_BYTES_MAX + b"\n"
    for _ in range(FRAMES_PER_PUMP_MAX):
        rig.feed(lease, line)
    rig.pump()
    assert len(rig.out) == FRAMES_PER_PUMP_MAX
    assert rig.session.blocked
    rig.pump()
    assert len(rig.out) == FRAMES_PER_PUMP_MAX + 1
    assert not rig.session.blocked


# Replay ---------------------------------------------------------------------------------------------------------------


def ended_lease(rig: Rig, tokens: int = 3) -> Lease:
    """A delivered lease of `tokens` tokens and the final line."""
    lease = rig.stream()
    rig.feed(lease, b"".join(token(index) for index in range(tokens)) + FINAL)
    rig.session.eof(lease, rig.now)
    rig.take()
    return lease


def test_replay_from_the_start_brings_everything_again() -> None:
    rig = Rig()
    lease = ended_lease(rig)
    for _ in range(2):
        rig.handle(Replay(rid=b"r", attempt=1, start=0))
        assert rig.take() == [started(lease), chunk(lease, 0, 4), lease.terminal]


def test_replay_of_the_terminal_alone_and_beyond() -> None:
    rig = Rig()
    lease = ended_lease(rig)
    rig.handle(Replay(rid=b"r", attempt=1, start=4))
    assert rig.take() == [lease.terminal]


def test_replay_keeps_its_credit() -> None:
    rig = Rig()
    lease = ended_lease(rig)
    rig.handle(Replay(rid=b"r", attempt=1, start=1, bytes_max=len(token(1)) + 1))
    assert rig.take() == [chunk(lease, 1), chunk(lease, 2)]  # the last event may go over it, and no terminal follows
    rig.handle(Replay(rid=b"r", attempt=1, start=3, bytes_max=1))
    assert rig.take() == [chunk(lease, 3), lease.terminal]


def test_replay_goes_before_fresh_events_under_refusals() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.feed(lease, token(0) + token(1))
    rig.take()
    rig.handle(Replay(rid=b"r", attempt=1, start=0))
    rig.room = 0
    rig.feed(lease, FINAL)
    rig.session.eof(lease, rig.now)
    for _ in range(5):
        rig.room = 0
        rig.pump()
        rig.room = 1
        rig.pump()
    assert rig.take() == [started(lease), chunk(lease, 0, 2), chunk(lease, 2), lease.terminal]
    rig.handle(Replay(rid=b"r", attempt=1, start=3))
    rig.room = 0
    rig.pump()
    assert rig.session.blocked
    rig.room = None
    assert rig.take() == [lease.terminal]


def test_replay_before_anything_was_sent() -> None:
    rig = Rig()
    lease = rig.assign()
    rig.handle(Replay(rid=b"r", attempt=1, start=0))
    assert rig.take() == []
    rig.session.head(lease, 200, NDJSON, rig.now)
    rig.handle(Replay(rid=b"r", attempt=1, start=0))
    rig.feed(lease, token(0))
    assert rig.take() == [started(lease), chunk(lease, 0)]


@pytest.mark.parametrize(("rid", "attempt"), [(b"x", 1), (b"r", 2)])
def test_of_what_is_not_here_everything_is_forgotten(rid: bytes, attempt: int) -> None:
    rig = Rig()
    rig.assign()
    rig.handle(Replay(rid=rid, attempt=attempt, start=5))
    assert rig.take() == [Forgotten(rid=rid, attempt=attempt, base=COUNT_MAX)]
    assert len(list(rig.session._leases)) == 1


def test_a_replay_of_what_is_no_longer_kept_hears_what_is() -> None:
    rig = Rig(lease_bytes_max=LEASE_OVERHEAD_BYTES + 1000)
    lease = rig.stream()
    for index in range(50):
        rig.feed(lease, token(index))
        rig.pump()
    assert lease.base > 0
    rig.take()
    assert rig.handle(Replay(rid=b"r", attempt=1, start=0)) == []
    assert rig.take() == [Forgotten(rid=b"r", attempt=1, base=lease.base)]
    assert state_of(lease) is LeaseState.STREAMING
    rig.handle(Replay(rid=b"r", attempt=1, start=lease.base))
    assert rig.take() == [chunk(lease, lease.base, 50 - lease.base)]


def test_a_replay_from_the_start_brings_the_body_of_what_can_be_resumed() -> None:
    """The gateway through which it is resumed needs it to have it continued."""
    rig = Rig()
    lease = rig.stream(grace_ms=60_000)
    rig.feed(lease, token(0))
    rig.pump_all()
    rig.handle(Replay(rid=b"r", attempt=1, start=0))
    rig.pump_all()
    assert rig.out == [
        (started(lease), b""),
        (chunk(lease, 0), token(0)),
        (started(lease), b"body"),
        (chunk(lease, 0), token(0)),
    ]


def test_of_what_cannot_be_resumed_no_body_is_kept() -> None:
    rig = Rig()
    lease = rig.stream()
    rig.handle(Replay(rid=b"r", attempt=1, start=0))
    rig.pump_all()
    assert lease.body == b""
    assert rig.out == [(started(lease), b"")]


def test_a_replay_refreshes_how_long_a_finished_lease_is_kept() -> None:
    rig = Rig(keep_s=0.5)
    lease, other = ended_lease(rig), rig.stream(b"b")
    rig.now += 0.25
    rig.feed(other, FINAL)
    rig.session.eof(other, rig.now)
    rig.now += 0.125
    rig.handle(Replay(rid=b"r", attempt=1, start=0))
    rig.take()
    assert rig.session.next_deadline() == 100.75
    rig.tick(100.75)
    assert (state_of(lease), state_of(other)) == (LeaseState.DELIVERED, LeaseState.DROPPED)
    rig.tick(100.875)
    assert state_of(lease) is LeaseState.DROPPED


# Continuations --------------------------------------------------------------------------------------------------------


def test_a_continuation_numbers_on_and_its_buffer_has_what_was_before() -> None:
    rig = Rig()
    lease = rig.go_on(token(0), token(1), grace_ms=60_000)
    assert (lease.top, lease.sent, lease.body) == (2, 2, b"body")
    rig.feed(lease, token(2) + FINAL)
    rig.session.eof(lease, rig.now)
    assert rig.take() == [started(lease), chunk(lease, 2, 2), End(rid=b"r", attempt=2, seq=4, stats=STATS)]
    rig.handle(Replay(rid=b"r", attempt=2, start=0))
    rig.pump_all()
    assert [payload for message, payload in rig.out if isinstance(message, Chunk)] == [
        token(0) + token(1) + token(2) + FINAL
    ]
    assert rig.out[0] == (started(lease), b"body")


def test_a_continuation_claims_what_it_began_with() -> None:
    rig = Rig()
    rig.go_on(token(0), token(1), grace_ms=60_000)
    rig.handle(Who())
    [register] = rig.take()
    assert register.leases == (claim(top=2, attempt=2, grace_ms=60_000),)
    rig.handle(Registered(registration=8))
    rig.tick(101.0)
    assert rig.take() == [Beat(), started(rig.session._leases[b"r"])]


@pytest.mark.parametrize("delivered", [b"", token(0), token(0) + token(1)[:-1], token(0) * 3])
def test_a_continuation_with_other_events_than_it_says_fails(delivered: bytes) -> None:
    """Refused it would be assigned again for ever."""
    rig = Rig()
    assert rig.handle(assign(start=2, body_bytes=4), b"body" + delivered) == []
    [failed] = rig.take()
    assert (failed.code, failed.seq, failed.retryable) == (Code.WORKER_LOST, 2, False)
    assert rig.session.leases == 0


def test_what_cannot_be_continued_ends_as_lost_and_elsewhere_would_too() -> None:
    rig = Rig()
    lease = rig.go_on(token(0))
    rig.session.cannot_continue(lease, "the engine answered 400", rig.now)
    failed = rig.take()[-1]
    assert (failed.code, failed.seq, failed.retryable) == (Code.WORKER_LOST, 1, False)
    assert "the engine answered 400" in failed.message
    rig.session.cannot_continue(lease, "again", rig.now)
    assert rig.take() == []


# Bounds ---------------------------------------------------------------------------------------------------------------

LINE = b"x" * 99 + b"\n"
COST = len(LINE) + EVENT_OVERHEAD_BYTES


def test_unsent_events_at_the_bound_stop_the_reading_until_they_left() -> None:
    rig = Rig(lease_bytes_max=10 * COST, silence_s=1.0)
    lease = rig.stream()
    rig.room = 0
    for _ in range(9):
        rig.feed(lease, LINE)
        assert not lease.paused
    rig.feed(lease, LINE)
    assert lease.paused
    rig.feed(lease, LINE)  # was on its way
    rig.effects.clear()
    rig.tick(102.0)  # and silence is now nobody's fault
    assert rig.effects == []
    rig.pump()
    assert lease.paused
    rig.room = None
    rig.pump()
    assert rig.effects == [Resume(lease)]
    assert not lease.paused
    assert rig.tick(102.9) == []
    assert sum(message.n for message in rig.take() if isinstance(message, Chunk)) == 11


def test_sent_events_fall_out_oldest_first_and_the_last_line_still_counts() -> None:
    rig = Rig(lease_bytes_max=LEASE_OVERHEAD_BYTES + 16 * COST)
    lease = rig.stream()
    for _ in range(40):
        assert rig.feed(lease, LINE)
        rig.pump()
        assert lease.size_bytes <= rig.session.limits.lease_bytes_max
    assert lease.top == 40
    assert not lease.paused
    assert 0 < len(lease.events) < 17
    rig.handle(Replay(rid=b"r", attempt=1, start=lease.base))
    rig.room = 0
    kept = lease.base
    for _ in range(20):
        rig.feed(lease, LINE)
    assert lease.base == kept  # what is being replayed stays


def test_the_worker_s_bound_drops_the_oldest_delivered_lease_first() -> None:
    rig = Rig(worker_bytes_max=3 * LEASE_OVERHEAD_BYTES + 20 * COST)
    old = ended_lease(rig, 0)
    running = rig.stream(b"b")
    for _ in range(15):
        rig.feed(running, LINE)
        rig.pump()
    newer = rig.stream(b"c")
    rig.feed(newer, FINAL)
    rig.session.eof(newer, rig.now)
    rig.take()
    assert state_of(old) is LeaseState.DELIVERED
    rig.feed(running, LINE * 32)
    assert state_of(old) is LeaseState.DROPPED
    assert state_of(newer) is LeaseState.DROPPED
    assert running.base > 0
    assert rig.session._bytes < rig.session.limits.worker_bytes_max


def test_at_the_worker_s_bound_all_stop_reading_until_there_is_room() -> None:
    rig = Rig(worker_bytes_max=2 * LEASE_OVERHEAD_BYTES + 20 * COST)
    a, b = rig.stream(b"a"), rig.stream(b"b")
    rig.room = 0
    rig.feed(a, LINE * 12)
    rig.feed(b, LINE * 12)
    assert b.paused
    rig.feed(a, LINE)
    assert a.paused
    rig.effects.clear()
    rig.room = None
    rig.pump()
    assert rig.effects == [Resume(b), Resume(a)]
    rig.room = 0
    rig.feed(a, LINE * 30)
    assert a.paused
    rig.handle(Cancel(rid=b"a"))
    assert not rig.session._paused
    assert state_of(a) is LeaseState.DROPPED


def test_one_finished_lease_is_enough_if_it_is_large() -> None:
    rig = Rig(worker_bytes_max=3 * LEASE_OVERHEAD_BYTES + 20 * COST)
    large = rig.stream(b"a")
    rig.feed(large, LINE * 15 + FINAL)
    rig.session.eof(large, rig.now)
    rig.take()
    small = rig.stream(b"b")
    rig.feed(small, FINAL)
    rig.session.eof(small, rig.now)
    rig.take()
    running = rig.stream(b"c")
    rig.feed(running, LINE * 10)
    assert state_of(large) is LeaseState.DROPPED
    assert state_of(small) is LeaseState.DELIVERED
    assert running.base == 0


# The promise ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_events_out_are_events_in_whatever_the_socket_refuses(data: st.DataObject) -> None:
    """Every lease's events come out once, in order, between `started` and one terminal; replays only repeat them."""
    rig = Rig(lease_bytes_max=50_000, worker_bytes_max=100_000)
    leases = [rig.stream(b"a"), rig.stream(b"b"), rig.stream(b"c", digest="d2", model="e:latest")]
    bodies = [
        b"".join([b"%d-%d\n" % (index, n) for n in range(data.draw(st.integers(0, 30)))]) + FINAL for index in range(3)
    ]
    left = dict(zip(leases, bodies, strict=True))
    seen: dict[bytes, list[bytes]] = {lease.rid: [] for lease in leases}
    ended: set[bytes] = set()
    begun: set[bytes] = set()

    def read_out() -> None:
        for message, payload in rig.out:
            match message:
                case Started():
                    begun.add(message.rid)
                case Chunk():
                    lines = payload.splitlines(keepends=True)
                    assert message.n == len(lines)
                    assert message.rid in begun
                    known = seen[message.rid]
                    assert message.seq <= len(known)
                    again = known[message.seq : message.seq + message.n]
                    assert lines[: len(again)] == again
                    known += lines[len(again) :]
                case End():
                    assert message.seq == len(seen[message.rid])
                    ended.add(message.rid)
        rig.out.clear()

    for _ in range(data.draw(st.integers(5, 60))):
        lease = data.draw(st.sampled_from(leases))
        match data.draw(st.sampled_from(["feed", "pump", "refuse", "replay"])):
            case "feed" if left[lease]:
                size = data.draw(st.integers(1, len(left[lease])))
                rig.feed(lease, left[lease][:size])
                left[lease] = left[lease][size:]
                if not left[lease]:
                    rig.session.eof(lease, rig.now)
            case "refuse":
                rig.room = data.draw(st.integers(0, 3))
                rig.pump()
            case "replay":
                start = data.draw(st.integers(0, len(seen[lease.rid])))
                rig.handle(Replay(rid=lease.rid, attempt=1, start=start, bytes_max=data.draw(st.integers(1, 99))))
            case _:
                rig.room = None
                rig.pump()
        read_out()
    rig.room = None
    for lease, rest in left.items():
        if rest:
            rig.feed(lease, rest)
            rig.session.eof(lease, rig.now)
    rig.pump_all()
    read_out()
    assert {rid: b"".join(lines) for rid, lines in seen.items()} == dict(zip([b"a", b"b", b"c"], bodies, strict=True))
    assert ended == begun == {b"a", b"b", b"c"}


# Bodies in parts ------------------------------------------------------------------------------------------------------

BODY = bytes(range(60))


class Upload:
    """A lease whose body comes in parts of 10 bytes."""

    def __init__(self, body: bytes = BODY, **limits: Any) -> None:
        self.rig = Rig(part_bytes=10, **limits)
        self.body = body
        [post] = self.rig.handle(assign(parted_bytes=len(body)))
        assert isinstance(post, Post)
        assert (post.body, post.parted_bytes) == (b"", len(body))
        self.lease = post.lease

    def wants(self) -> list[int]:
        """Where the parts begin that it asks for."""
        wanted = self.rig.take()
        assert all(isinstance(want, Want) and want.size == min(10, len(self.body) - want.offset) for want in wanted)
        return [want.offset for want in wanted]

    def part(self, offset: int, **changes: Any) -> list[bytes]:
        """A part comes; what the engine is given."""
        fields: dict[str, Any] = {"rid": b"r", "attempt": 1, "offset": offset} | changes
        message = Part(**fields)
        effects = self.rig.handle(message, self.body[offset : offset + 10])
        assert all(isinstance(effect, Give) and effect.lease is self.lease for effect in effects)
        return [effect.part for effect in effects if isinstance(effect, Give)]

    def taken(self) -> None:
        self.rig.session.taken(self.lease, self.rig.now)
        self.rig.check()


def test_a_large_body_is_asked_for_in_parts_as_the_engine_takes_it() -> None:
    upload = Upload(BODY[:55])
    assert upload.wants() == [0, 10, 20, 30], "so many at once"
    assert upload.part(0) == [BODY[:10]]
    assert upload.wants() == [], "the engine has not taken it"
    upload.taken()
    assert upload.wants() == [40]
    assert upload.part(20) == []
    assert upload.part(10) == [BODY[10:20], BODY[20:30]], "in order"
    upload.taken()
    upload.taken()
    assert upload.wants() == [50]
    for offset in (30, 40, 50):
        assert upload.part(offset) == [BODY[offset : min(offset + 10, 55)]]
        upload.taken()
    assert upload.wants() == []
    upload.rig.session.head(upload.lease, 200, NDJSON, upload.rig.now)
    upload.rig.feed(upload.lease, FINAL)
    upload.rig.session.eof(upload.lease, upload.rig.now)
    assert [type(message) for message in upload.rig.take()] == [Started, Chunk, End]


def test_what_is_no_part_that_was_asked_for_is_let_go() -> None:
    upload = Upload()
    upload.wants()
    assert upload.part(0, attempt=2) == []
    assert upload.part(0, rid=b"other") == []
    assert upload.part(5) == []
    assert upload.rig.handle(Part(rid=b"r", attempt=1, offset=0), b"short") == []
    assert upload.part(0) == [BODY[:10]]
    assert upload.part(0) == [], "it came twice"
    upload.rig.session.head(upload.lease, 200, NDJSON, upload.rig.now)
    upload.rig.feed(upload.lease, FINAL)
    upload.rig.session.eof(upload.lease, upload.rig.now)
    assert upload.part(10) == []
    upload.taken()
    other = upload.rig.assign(b"o")
    assert upload.rig.handle(Part(rid=b"o", attempt=1, offset=0), b"x" * 10) == []
    upload.rig.session.taken(other, upload.rig.now)


def test_a_part_that_does_not_come_is_asked_for_again() -> None:
    upload = Upload()
    upload.wants()
    upload.rig.now += 0.5
    upload.part(0)
    upload.taken()
    assert upload.wants() == [40]
    assert upload.rig.session.next_deadline() == 101.0
    upload.rig.tick(101.0)
    assert [want for want in upload.rig.take() if isinstance(want, Want)] == [
        Want(rid=b"r", attempt=1, offset=offset, size=10) for offset in (10, 20, 30)
    ]
    upload.rig.tick(101.5)
    assert upload.wants() == [40]


def test_what_is_to_be_asked_for_waits_for_the_socket() -> None:
    upload = Upload()
    upload.rig.room = 2
    upload.rig.pump()
    assert upload.rig.session.blocked
    upload.part(0)
    upload.rig.room = None
    assert upload.wants() == [0, 10, 20, 30]
    upload.rig.room = 0
    upload.rig.tick(upload.rig.now + PART_PATIENCE_S)
    for offset in (10, 20, 30):
        upload.part(offset)
    upload.rig.room = None
    assert [want for want in upload.rig.take() if isinstance(want, Want)] == [], "what came meanwhile is not asked for"


def test_a_slow_line_is_not_filled_with_what_is_under_way_on_it() -> None:
    upload = Upload()
    rig, asked = upload.rig, Counter[int]()
    line: list[tuple[float, int]] = []  # what is under way on it, and when it arrives: it takes 5 s for a part
    free_at = rig.now
    while len(asked) < len(BODY) / 10 or line:
        for want in rig.take():
            if isinstance(want, Want):
                asked[want.offset] += 1
                free_at = max(free_at, rig.now) + 5
                line.append((free_at, want.offset))
        rig.tick(rig.now + 0.5)
        rig.handle(Beat())
        while line and line[0][0] <= rig.now:
            if upload.part(line.pop(0)[1]):
                upload.taken()
    assert set(asked) == set(range(0, len(BODY), 10))
    assert asked.total() < 3 * len(asked)


def test_patience_ends_when_a_line_is_fast_again() -> None:
    upload = Upload(bytes(10 * 200))
    rig = upload.rig
    upload.wants()
    rig.now += 1000
    upload.part(0)
    assert rig.session._patience_s == PART_PATIENCE_S_MAX
    for offset in range(10, 10 * 200, 10):
        upload.taken()
        upload.wants()
        upload.part(offset)
    assert rig.session._patience_s == PART_PATIENCE_S


def test_a_part_that_was_not_asked_for_yet_is_not_taken() -> None:
    upload = Upload()
    upload.rig.room = 0
    assert upload.part(0) == []
    upload.rig.room = None
    assert upload.wants() == [0, 10, 20, 30]


def test_while_there_is_no_broker_nothing_is_asked_and_then_all_that_did_not_come() -> None:
    upload = Upload(orphan_s=100.0)
    upload.wants()
    for _ in range(WANTS_MAX + 5):
        upload.rig.tick(upload.rig.now + 1)
        assert not any(isinstance(message, Want) for message in upload.rig.take() if upload.rig.session._lost)
    upload.rig.handle(Registered(registration=8))
    assert upload.wants() == [0, 10, 20, 30]


def test_a_lease_whose_body_does_not_come_is_given_up() -> None:
    upload = Upload()
    rig = upload.rig
    upload.wants()
    for _ in range(int(PART_PATIENCE_S * (2**WANTS_MAX - 1))):
        assert not any(isinstance(message, Failed) for message in rig.take())
        rig.tick(rig.now + 1)
        rig.handle(Beat())
    failed = [message for message in rig.take() if isinstance(message, Failed)]
    assert [(f.code, f.retryable, f.seq) for f in failed] == [(Code.WORKER_LOST, True, 0)]
    assert Close(upload.lease) in rig.effects


def test_an_engine_that_takes_nothing_is_given_up_and_one_that_takes_is_not() -> None:
    upload = Upload(first_byte_s=10.0)
    rig = upload.rig
    upload.part(0)
    rig.handle(Beat())
    rig.now += 9
    rig.session.taken(upload.lease, rig.now)
    assert rig.session._watchdog_at(upload.lease) == rig.now + 10


def test_whoever_cancels_an_upload_leaves_nothing_of_it() -> None:
    upload = Upload()
    upload.part(0)
    assert upload.rig.handle(Cancel(rid=b"r", attempt=1)) == [Close(upload.lease)]
    assert upload.rig.take() == []
    assert upload.part(10) == []
    upload.rig.session.taken(upload.lease, upload.rig.now)
    assert upload.rig.take() == []
