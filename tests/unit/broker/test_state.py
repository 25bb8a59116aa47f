"""The records: only the moves of the table, and a check that finds every broken rule."""

from collections.abc import Callable

import pytest

from broker.state import STORY_MAX, TRANSITIONS, InvariantError, Phase, Request, State
from common.protocol import Engine, Model
from tests.unit.broker.harness import Harness, engine


@pytest.fixture
def h() -> Harness:
    """r1 streams on w1, r2 and r3 wait."""
    harness = Harness()
    harness.gateway("g1")
    harness.worker("w1")
    for name in ("r1", "r2", "r3"):
        harness.submit(name, grace_ms=1000 if name == "r3" else 0)
    assign = harness.assigned()
    harness.chunk(assign.rid, assign.attempt)
    return harness


def pick(h: Harness, phase: Phase) -> Request:
    return next(request for request in h.core.state.requests.values() if request.phase is phase)


def test_an_illegal_move_tells_the_story(h: Harness) -> None:
    request = pick(h, Phase.STREAMING)
    with pytest.raises(InvariantError, match=r"m:latest queued leased@w1 streaming> cannot become Phase\.QUEUED"):
        h.core.state.move(request, Phase.QUEUED)


def test_every_phase_can_be_left_and_reached() -> None:
    reached = {to for targets in TRANSITIONS.values() for to in targets}
    assert reached == set(Phase) | {None} == set(TRANSITIONS)
    assert all(TRANSITIONS.values())


def test_a_story_is_bounded(h: Harness) -> None:
    request = pick(h, Phase.QUEUED)
    for _ in range(STORY_MAX):
        h.core.state.move(request, Phase.LEASED, worker=h.core.state.workers["w1"])
        h.core.state.move(request, Phase.QUEUED)
    assert len(request.story) == STORY_MAX


def test_only_engines_that_are_up_offer_models(h: Harness) -> None:
    h.engines(engine("m:latest", url="http://e1", slots=1), engine("n:latest", url="http://e2", up=False))
    state = h.core.state
    assert state.models() == ("@w1 http://e1", "m:latest")
    assert state.names() == ("m",)
    assert [(w.name, e.url, m.name) for w, e, m in state.offers("m:latest")] == [("w1", "http://e1", "m:latest")]
    assert not state.offers("n:latest")


def test_clients_are_told_models_that_answer_before_those_that_only_embed(h: Harness) -> None:
    models = (
        Model(name="all-minilm:latest", digest="e", embedding=True),
        Model(name="llama2:latest", digest="l"),
        Model(name="llama2:13b", digest="b"),
    )
    h.engines(Engine(url="http://e1", models=models))
    assert h.core.state.names() == ("llama2", "llama2:13b", "all-minilm")


def _drop_from_queue(state: State, queue: list[Request]) -> None:
    queue.pop()


def _queue_twice(state: State, queue: list[Request]) -> None:
    queue.append(queue[0])


def _miscount_phases(state: State, queue: list[Request]) -> None:
    state.phases[Phase.QUEUED] += 1


def _miscount_bytes(state: State, queue: list[Request]) -> None:
    state.body_bytes += 1


def _disown(state: State, queue: list[Request]) -> None:
    state.gateways_by_name["g1"].rids.discard(queue[0].rid)


def _lose_gateway(state: State, queue: list[Request]) -> None:
    state.gateways_by_name.clear()


def _lose_worker(state: State, queue: list[Request]) -> None:
    state.workers.clear()


def _give_worker(state: State, queue: list[Request]) -> None:
    queue[0].worker = state.workers["w1"]


def _give_worker_with_rid(state: State, queue: list[Request]) -> None:
    queue[0].worker = state.workers["w1"]
    queue[0].worker.rids.add(queue[0].rid)


def _leave_attempt(state: State, queue: list[Request]) -> None:
    queue[0].attempt = 7


def _rename_holder(state: State, queue: list[Request]) -> None:
    queue[0].holder = "g9"


def _abandon(state: State, queue: list[Request]) -> None:
    state.hand_over(queue[0], None)


def _lose_ref(state: State, queue: list[Request]) -> None:
    state.refs["alice", "r3"] = queue[0]


def _foreign_ref(state: State, queue: list[Request]) -> None:
    state.refs["alice", "gone"] = queue[0]


def _forget_terminal(state: State, queue: list[Request]) -> None:
    [streaming] = [request for request in state.requests.values() if request.phase is Phase.STREAMING]
    state.move(streaming, Phase.ENDED)


def _foreign_gateway_rid(state: State, queue: list[Request]) -> None:
    state.gateways_by_name["g1"].rids.add(b"foreign")


def _second_gateway_peer(state: State, queue: list[Request]) -> None:
    state.gateways[b"old"] = state.gateways[b"g1"]


def _second_worker_peer(state: State, queue: list[Request]) -> None:
    state.workers_by_peer[b"old"] = state.workers_by_peer[b"w1"]


def _stale_offers(state: State, queue: list[Request]) -> None:
    state.workers["w1"].engines.clear()


def _move_gateway(state: State, queue: list[Request]) -> None:
    state.gateways[b"g2"] = state.gateways.pop(b"g1")


def _move_worker(state: State, queue: list[Request]) -> None:
    state.workers_by_peer[b"w2"] = state.workers_by_peer.pop(b"w1")


def _miscount_slots(state: State, queue: list[Request]) -> None:
    state.workers["w1"].busy.clear()


def _hold_foreign(state: State, queue: list[Request]) -> None:
    state.workers["w1"].rids.add(queue[0].rid)


@pytest.mark.parametrize(
    ("corrupt", "story"),
    [
        (_drop_from_queue, "not the set of queued"),
        (_queue_twice, "queued twice"),
        (_miscount_phases, "phases are miscounted"),
        (_miscount_bytes, "bytes are miscounted"),
        (_disown, "not among its gateway's"),
        (_lose_gateway, "dead gateway"),
        (_lose_worker, "dead worker"),
        (_give_worker, "not among its worker's"),
        (_give_worker_with_rid, "waits and has a worker"),
        (_forget_terminal, "and its terminal"),
        (_leave_attempt, "waits and has an attempt"),
        (_rename_holder, "another holder"),
        (_abandon, "nobody's, and for ever"),
        (_lose_ref, "cannot be resumed"),
        (_foreign_ref, "that are gone can be resumed"),
        (_foreign_gateway_rid, "g1 holds a foreign request"),
        (_second_gateway_peer, "gateway is known by two"),
        (_second_worker_peer, "worker is known by two"),
        (_stale_offers, "offers"),
        (_move_gateway, "g1 is not found by its peer"),
        (_move_worker, "w1 is not found by its peer"),
        (_miscount_slots, "w1 counts"),
        (_hold_foreign, "w1 holds a foreign request"),
    ],
)
def test_validate_finds_what_is_broken(h: Harness, corrupt: Callable[[State, list[Request]], None], story: str) -> None:
    queue = list(h.core.scheduler)
    h.core.state.validate(queue)
    corrupt(h.core.state, queue)
    with pytest.raises(InvariantError, match=story):
        h.core.state.validate(queue)
