"""Where requests go, and in which order."""

from msgspec.structs import replace

from broker.scheduler import FirstCome
from common.errors import Code
from common.protocol import (
    BESIDE_MAX,
    LIGHT,
    OPERATION,
    Assign,
    Engine,
    Failed,
    Model,
    Query,
    Snapshot,
    attempt_of,
    engine_name,
)
from tests.unit.broker.harness import Harness, claim_of, engine, rid_of

A1 = attempt_of(1, 7)


def fleet(*workers: str, slots: int = 1) -> Harness:
    """Hosts on which two models are loaded."""
    h = Harness()
    h.gateway("g1")
    for worker in workers:
        h.worker(worker, warm(slots=slots))
    return h


def warm(slots: int = 1) -> Engine:
    return engine("m:latest", "n:latest", slots=slots, resident=["m:latest", "n:latest"])


def where(h: Harness, name: str) -> str:
    worker = h.request(rid_of(name)).worker
    return worker.name if worker else "queue"


def test_first_come_first_served_per_model() -> None:
    h = fleet("w1")
    for name in ("r1", "r2", "r3"):
        h.submit(name)
    for name in ("r1", "r2", "r3"):
        assign = h.assigned()
        assert assign.rid == rid_of(name)
        h.end(assign.rid, assign.attempt, 0)


def test_a_full_model_does_not_hold_up_another() -> None:
    h = fleet("w1")
    h.submit("r1", model="m:latest")
    h.submit("r2", model="m:latest")
    h.submit("r3", model="n:latest")
    assert [where(h, name) for name in ("r1", "r2", "r3")] == ["w1", "queue", "w1"]


def test_a_host_that_comes_gets_what_waits_for_each_of_its_models() -> None:
    h = fleet("w1", slots=3)
    h.bye(b"w1")
    h.sent(b"w1")
    for name, model in (("r1", "n:latest"), ("r2", "m:latest"), ("r3", "n:latest")):
        h.submit(name, model=model)
    h.worker("w1", warm(slots=3))
    given = [assign.rid for assign in h.told(Assign, b"w1")]
    assert sorted(given) == [rid_of(name) for name in ("r1", "r2", "r3")]
    assert given.index(rid_of("r1")) < given.index(rid_of("r3"))


def test_what_comes_back_gets_its_old_place() -> None:
    h = fleet("w1", slots=2)
    for name in ("r1", "r2", "r3", "r4"):
        h.submit(name)
    first, second = h.told(Assign, b"w1")
    h.refused(second.rid, second.attempt)
    h.refused(first.rid, first.attempt)
    positions = {r.rid: h.core.scheduler.outlook(r, h.now).position for r in h.core.scheduler}
    assert positions == {rid_of(f"r{number}"): number for number in (1, 2, 3, 4)}


def test_add_tells_the_position() -> None:
    h = fleet("w1")
    requests = []
    for name in ("blocks", "r1", "r2", "r3"):
        h.submit(name)
        requests.append(h.request(rid_of(name)))
    queue = FirstCome()
    _, one, two, three = requests
    for request in (two, three, one):
        queue.add(request, h.now)
    assert [queue.outlook(request, h.now).position for request in (one, two, three)] == [1, 2, 3]
    queue.discard(two)
    assert list(queue) == [one, three]


def test_a_warm_host_comes_before_a_cold_one() -> None:
    h = fleet()
    h.worker("w1", engine("m:latest"))
    h.worker("w2", engine("m:latest", resident=["m:latest"]))
    h.submit("r1")
    assert where(h, "r1") == "w2"


def test_a_host_that_loads_the_model_already_counts_as_warm() -> None:
    h = fleet()
    h.worker("w1", engine("m:latest", slots=2))
    h.worker("w2", engine("m:latest", slots=2))
    h.submit("r1")
    h.submit("r2")
    assert where(h, "r1") == where(h, "r2") == "w1"


def test_among_equals_the_engine_with_less_to_do() -> None:
    h = fleet("w1", "w2")
    h.submit("r1", model="n:latest")
    h.submit("r2", model="m:latest")
    assert (where(h, "r1"), where(h, "r2")) == ("w1", "w2")


def test_where_it_failed_only_if_there_is_nowhere_else() -> None:
    h = fleet("w1", "w2")
    rid = h.submit("r1")
    h.failed(rid, h.assigned(b"w1").attempt, retryable=True, peer=b"w1")
    assert where(h, "r1") == "w2"
    h.failed(rid, h.assigned(b"w2").attempt, retryable=True, peer=b"w2")
    assert where(h, "r1") == "w1"


def test_aliases_share_their_digests_slots() -> None:
    h = Harness()
    h.gateway("g1")
    names = [Model(name=name, digest="sha:1") for name in ("m:latest", "alias:latest")]
    h.worker("w1", Engine(url="http://e1", models=tuple(names)))
    h.submit("r1", model="m:latest")
    h.submit("r2", model="alias:latest")
    assert [where(h, name) for name in ("r1", "r2")] == ["w1", "queue"]


def test_two_engines_of_a_host_have_their_own_slots() -> None:
    h = Harness()
    h.gateway("g1")
    h.worker("w1", engine("m:latest", url="http://e1"), engine("m:latest", url="http://e2"))
    h.submit("r1")
    h.submit("r2")
    assert [h.request(rid_of(name)).engine for name in ("r1", "r2")] == ["http://e1", "http://e2"]


def test_a_busy_model_is_not_evicted() -> None:
    """An engine that holds one model at once gets no request for another while it works."""
    h = Harness()
    h.gateway("g1")
    h.worker("w1", replace(engine("m:latest", "n:latest", slots=2), models_max=1))
    for name, model in (("r1", "m:latest"), ("r2", "n:latest"), ("r3", "m:latest")):
        h.submit(name, model=model)
    assert [where(h, name) for name in ("r1", "r2", "r3")] == ["w1", "queue", "w1"]
    for name in ("r1", "r3"):
        h.end(rid_of(name), h.request(rid_of(name)).attempt, 0)
    assert where(h, "r2") == "w1"


def test_a_light_request_waits_for_no_slot() -> None:
    h = fleet("w1")
    h.submit("r1")
    h.submit("r2")
    h.submit("asks", light=True)
    assert [where(h, name) for name in ("r1", "r2", "asks")] == ["w1", "queue", "w1"]
    assert [assign.digest for assign in h.told(Assign, b"w1")] == ["sha:m:latest", ""]
    assert h.core.state.workers["w1"].busy == {("http://e1", "sha:m:latest"): 1, ("http://e1", ""): 1}


def test_light_requests_have_a_bound_of_their_own() -> None:
    h = fleet("w1")
    names = [f"asks{number}" for number in range(BESIDE_MAX[LIGHT] + 2)]
    for name in names:
        h.submit(name, light=True)
    assert [where(h, name) for name in names] == ["w1"] * BESIDE_MAX[LIGHT] + ["queue"] * 2
    h.submit("r1")
    assert where(h, "r1") == "w1"


def test_a_light_request_goes_to_an_engine_that_is_full_of_busy_models() -> None:
    h = fleet()
    h.worker("w1", replace(engine("m:latest", "n:latest"), models_max=1))
    h.submit("asks", light=True)
    h.submit("r1")
    h.submit("asks too", model="n:latest", light=True)
    assert [where(h, name) for name in ("asks", "r1", "asks too")] == ["w1"] * 3


def test_a_light_request_is_still_one_for_a_broker_that_hears_of_it_from_its_worker() -> None:
    h = fleet()
    h.worker("w1", claims=[claim_of(rid_of("asks"), A1, digest="")])
    assert h.request(rid_of("asks")).submit.light


def test_operators_see_slots_only() -> None:
    h = fleet("w1")
    h.submit("asks", light=True)
    h.submit("r1")
    h.from_gateway(Query(id=1, what="hosts"))
    (snapshot,) = [snapshot for snapshot in h.told(Snapshot) if snapshot.id]
    assert snapshot.hosts[0].busy == {"http://e1": {"sha:m:latest": 1}}


def test_an_operation_goes_to_its_engine_beside_the_work_there() -> None:
    h = fleet()
    h.worker("w1", replace(engine("m:latest", "n:latest", url="http://e1"), models_max=1))
    h.worker("w2", engine("m:latest", url="http://e2"))
    h.submit("r1")
    names = [f"pull{number}" for number in range(BESIDE_MAX[OPERATION] + 1)]
    for name in names:
        h.submit(name, model=engine_name("w1", "http://e1"))
    h.submit("r2", model="n:latest")
    assert [where(h, name) for name in names] == ["w1"] * BESIDE_MAX[OPERATION] + ["queue"]
    assert [assign.digest for assign in h.told(Assign, b"w1")][1:] == [OPERATION] * BESIDE_MAX[OPERATION]
    h.submit("elsewhere", model=engine_name("w2", "http://e2"))
    assert where(h, "elsewhere") == "w2"


def test_an_operation_on_an_engine_that_is_nowhere() -> None:
    h = fleet("w1")
    h.submit("pull", model=engine_name("w9", "http://e9"))
    (failed,) = h.told(Failed)
    assert failed.code is Code.MODEL_NOT_FOUND


# What takes no slot, in its order -------------------------------------------------------------------------------------


def light(h: Harness, *names: str) -> list[str]:
    for name in names:
        h.submit(name, light=True)
    return [where(h, name) for name in names]


def test_positions_and_no_times() -> None:
    h = fleet("w1")
    names = [f"r{number}" for number in range(BESIDE_MAX[LIGHT] + 4)]
    assert light(h, *names)[-5:] == ["w1", "queue", "queue", "queue", "queue"]
    outlooks = [h.core.scheduler.outlook(request, h.now) for request in h.core.scheduler]
    assert [(o.request.submit.ref, o.position, o.eta_s) for o in outlooks[:2]] == [("r8", 1, None), ("r9", 2, None)]
    assert h.core.scheduler.models() == {"m:latest"}
    h.cancel(rid_of("r8"))
    h.end(rid_of("r0"), h.request(rid_of("r0")).attempt, 0)
    assert [where(h, name) for name in names[-3:]] == ["w1", "queue", "queue"]
    h.unreachable(b"w1")
    h.end(rid_of("r1"), h.request(rid_of("r1")).attempt, 0)
    assert where(h, names[-2]) == "queue"


def test_a_refusal_pauses_and_a_failure_goes_elsewhere() -> None:
    h = fleet("w1", "w2")
    assert light(h, "r1", "r2", "r3") == ["w1", "w2", "w1"]
    rid = rid_of("r3")
    h.refused(rid, h.request(rid).attempt)
    assert where(h, "r3") == "w2"
    h.failed(rid, h.request(rid).attempt, retryable=True, peer=b"w2")
    assert where(h, "r3") == "queue"
    h.wait(1.0)
    assert where(h, "r3") == "w1"
    h.failed(rid, h.request(rid).attempt, retryable=True)
    assert where(h, "r3") == "w1"


def test_when_the_first_is_gone_the_next_is_looked_at() -> None:
    """It may be another case: the first had failed where there is room."""
    h = fleet("w1", "w2")
    names = [f"r{number}" for number in range(2 * BESIDE_MAX[LIGHT])]
    light(h, *names, "first", "next")
    h.request(rid_of("first")).failed_on.add("w1")
    rid = next(rid_of(name) for name in names if where(h, name) == "w1")
    h.end(rid, h.request(rid).attempt, 0)
    assert where(h, "next") == "queue"
    h.cancel(rid_of("first"))
    assert where(h, "next") == "w1"
