"""What the broker believes of engines: what is in memory, how fast they are, what they have read."""

from typing import TYPE_CHECKING, Any

import pytest

from broker.runners import BLAMED_S, HORIZON_S, Demand
from common.protocol import (
    Assign,
    Cancel,
    End,
    Engine,
    Model,
    Stats,
    attempt_of,
)
from tests.unit.broker.fleet import GB, MS, TEXT, Fleet, host, warm_on_w2
from tests.unit.broker.harness import claim_of, rid_of

if TYPE_CHECKING:
    from broker.state import Request

# Where it is finished first ---------------------------------------------------------------------------------------


def test_what_an_engine_says_at_the_end_is_learnt() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    assert f.ask("a1", prompt_bytes=4000) == "w1"
    f.finish("a1", prompt_tokens=1000, prompt_ns=3000 * MS, completion_tokens=100, completion_ns=9000 * MS)
    runner, demand = f.runner("w1"), f.demand()
    assert runner.rates.token_s(0) == pytest.approx(0.09)
    assert runner.rates.prefill_s(1000) == pytest.approx(3.0)
    assert demand.prompt.value == 1000
    assert demand.output.value == 100
    assert demand.tokens_per_byte.value == 0.25


def test_what_a_load_took_is_learnt_of_the_request_it_was_for() -> None:
    f = Fleet(w1=host(cold="m", slots=2))
    f.ask("a1")
    f.ask("b1")
    f.finish("a1", load_ns=7000 * MS)
    f.finish("b1", load_ns=9000 * MS)
    assert f.runner("w1").rates.load_s() == pytest.approx(7.0)


def test_embedding_writes_nothing() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1", prompt_bytes=400, output_max=0)
    f.finish("a1", prompt_tokens=100, prompt_ns=100 * MS)
    assert f.demand().output.of(200.0) == 0.0
    assert f.demand().service_s(f.runner("w1")) == pytest.approx(0.1)


def test_a_request_without_a_hint_counts_by_its_body() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.teach("w1", token_ms=10, read_ms=2)
    f.teach("w2", token_ms=40, read_ms=0.1)
    assert f.ask("a1", body=b"x" * 40_000) == "w2"


# Beginnings that were read before ---------------------------------------------------------------------------------


def test_a_model_that_was_unloaded_has_read_nothing() -> None:
    f = warm_on_w2()
    f.engines(host(cold="m"), peer=b"w2")
    f.engines(host("m"), peer=b"w2")
    assert f.ask("a2", text=TEXT) == "w1"


def test_what_should_have_been_in_the_cache_and_was_not_is_charged() -> None:
    f = warm_on_w2()
    f.ask("a2", text=TEXT)
    held = f.policy.runners.prefixes._bytes[f.runner("w2")]
    tokens = 34 * 512 * 3 // 4
    f.finish("a2", prompt_tokens=tokens, prompt_ns=2 * tokens * MS)
    assert f.policy.runners.prefixes._bytes[f.runner("w2")] <= 0.7 * held
    f.ask("a3", text=TEXT)
    f.finish("a3", prompt_tokens=tokens, prompt_ns=100 * MS)
    assert f.runner("w2").rates.prefill_s(1.0) == pytest.approx(0.002)


def test_the_end_of_a_request_whose_model_was_unloaded_meanwhile_is_no_surprise() -> None:
    """Its engine was out of reach for a moment, so nothing is believed of its cache."""
    f = warm_on_w2()
    f.ask("a2", text=TEXT)
    f.engines(Engine(url="http://e1", up=False), peer=b"w2")
    f.engines(host("m"), peer=b"w2")
    tokens = 34 * 512 * 3 // 4
    f.finish("a2", prompt_tokens=tokens, prompt_ns=2 * tokens * MS)
    assert f.where("a2") == "x"


# What is loaded where -----------------------------------------------------------------------------------------------


def test_what_fits_is_learnt_from_what_an_engine_unloads() -> None:
    f = Fleet(w1=host("m", cold="n"))
    f.ask("b1", "n")
    f.begin("b1")
    assert f.loaded("w1") == "m n"
    f.engines(host("n", cold="m"))
    assert f.loaded("w1") == "n"
    assert f.server("w1").bursts == 8 * GB
    assert f.ask("a1", "m") == "-"
    f.finish("b1")
    assert f.where("a1") == "w1"
    assert f.loaded("w1") == "m"


def test_what_was_held_at_once_fits() -> None:
    f = Fleet(w1=host("m", cold="n"))
    f.ask("a1", "m")
    f.begin("a1")
    f.ask("b1", "n")
    f.begin("b1")
    assert f.server("w1").holds == 8 * GB
    f.finish("a1", "b1")
    f.pass_time(2 * BLAMED_S)
    f.engines(host("n", cold="m"))  # it was idle for long
    assert f.server("w1").bursts > 1e30
    f.ask("b2", "n")
    assert f.ask("a2", "m") == "w1"


def test_an_engine_that_unloads_what_is_idle_is_believed() -> None:
    f = Fleet(w1=host("m"), w2=host(cold="m"))
    f.engines(host(cold="m"))
    assert f.loaded("w1") == ""
    f.engines(host("m"), peer=b"w2")
    assert f.ask("a1") == "w2"


def test_a_load_that_an_engine_does_not_speak_of_yet_is_believed() -> None:
    f = Fleet(w1=host(cold="mn", models_max=1))
    f.ask("a1")
    f.engines(host(cold="mn", models_max=1))
    assert f.loaded("w1") == "m"
    f.engines(host("n", cold="m", models_max=1))  # which it is about to unload for it
    assert f.loaded("w1") == "m"


def test_what_was_unloaded_before_its_request_began_is_loaded_again() -> None:
    f = Fleet(w1=host("m", cold="n"))
    f.ask("a1", "m")
    f.engines(host(cold="mn"))
    assert f.loaded("w1") == "m"
    assert f.server("w1").loading is f.runner("w1")
    assert f.ask("b1", "n") == "-"
    f.begin("a1")
    assert f.where("b1") == "w1"


# Workers that come and go -------------------------------------------------------------------------------------------


def test_leases_that_are_claimed_after_a_restart_take_their_slots() -> None:
    f = Fleet()
    big = host("m", cold="n", sizes={"m": 40}, models_max=1)
    f.worker("w1", big, claims=[claim_of(rid_of("a1"), attempt_of(1, 7), 3, digest="sha:m")])
    assert f.where("a1") == "w1"
    runner = f.runner("w1")
    assert (len(runner.leases), runner.loading, runner.rates.size) == (1, b"", 40 * GB)
    assert f.ask("b1", "m") == "-"
    assert f.ask("c1", "n") == "-"
    f.from_worker(End(rid=rid_of("a1"), attempt=attempt_of(1, 7), seq=3, stats=Stats()))
    assert f.where("b1") == "w1"


def test_a_claimed_lease_that_has_not_begun_may_still_be_loading() -> None:
    f = Fleet()
    f.worker("w1", host(cold="mn"), claims=[claim_of(rid_of("a1"), attempt_of(1, 7), digest="sha:m")])
    assert f.server("w1").loading is f.runner("w1")
    assert f.ask("b1", "n") == "-"
    f.begin("a1")
    assert f.where("b1") == "w1"


def test_two_loads_that_are_claimed_at_once_are_no_surprise() -> None:
    f = Fleet()
    claims = [claim_of(rid_of(f"{m}1"), attempt_of(1, 7), digest=f"sha:{m}", model=f"{m}:latest") for m in "mn"]
    f.worker("w1", host(cold="mn", models_max=1), claims=claims)
    assert f.loaded("w1") == "m n"
    f.from_worker(End(rid=rid_of("m1"), attempt=attempt_of(1, 7), seq=0, stats=Stats()))
    f.from_worker(End(rid=rid_of("n1"), attempt=attempt_of(1, 7), seq=0, stats=Stats()))
    assert not any(runner.leases for runner in f.server("w1").runners.values())


def test_what_an_engine_will_unload_as_soon_as_it_is_idle_gets_nothing_more() -> None:
    """Another broker has made it load another model."""
    both = host("m", cold="n", models_max=1, slots=2)
    f = Fleet(w1=both)
    f.ask("a1", "m")
    attempt = f.request(rid_of("a1")).attempt
    claims = [
        claim_of(rid_of("a1"), attempt, digest="sha:m"),
        claim_of(rid_of("n1"), attempt_of(1, 7), digest="sha:n", model="n:latest"),
    ]
    f.worker("w1", both, claims=claims)
    assert f.ask("a2", "m") == "-"
    assert f.ask("n2", "n") == "w1"
    f.finish("a1")
    assert f.loaded("w1") == "n"
    assert f.where("a2") == "-"


def test_nothing_is_kept_of_a_host_that_is_gone() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.ask("a1", text="abcd" * 10)
    f.ask("a2", text="abcd" * 10)
    f.bye(b"w1")
    f.bye(b"w2")
    assert f.where("a1", "a2") == "- -"
    assert not f.policy.runners.servers
    assert not f.policy.runners.prefixes._held
    f.cancel(rid_of("a1"))
    f.cancel(rid_of("a2"))
    assert not f.policy.runners.demands
    assert f.policy.next_deadline() > 1e30


def test_nothing_is_kept_of_an_engine_once_its_last_lease_has_ended() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1")
    f.engines(host("m", url="http://e2"))
    assert "http://e1" in f.policy.runners.servers["w1"]
    f.finish("a1")
    assert list(f.policy.runners.servers["w1"]) == ["http://e2"]
    assert f.ask("a2") == "w1"


def test_a_model_that_was_deleted_is_forgotten_with_its_last_lease() -> None:
    f = Fleet(w1=host("m", "n"))
    f.ask("a1", "m")
    f.engines(host("n"))
    assert set(f.policy.runners.demands) == {"m:latest", "n:latest"}
    f.finish("a1")
    assert set(f.policy.runners.demands) == {"n:latest"}
    assert set(f.server("w1").runners) == {"sha:n"}


def test_names_that_are_made_up_are_forgotten() -> None:
    f = Fleet(w1=host("m"))
    f.core.settings = type(f.core.settings)(settle_s=1e9)
    assert f.ask("a1", "nowhere") == "-"
    f.cancel(rid_of("a1"))
    assert set(f.policy.runners.demands) == {"m:latest"}


def test_a_model_gets_another_name() -> None:
    f = Fleet(w1=host("m"))
    renamed = Model(name="new:latest", digest="sha:m", resident=True, size_bytes=4 * GB)
    f.engines(Engine(url="http://e1", models=(renamed, *host("m").models)))
    f.ask("a1", "m")
    assert f.ask("b1", "new") == "-"
    f.finish("a1")
    assert f.where("b1") == "w1"
    f.engines(Engine(url="http://e1", models=(renamed,)))
    assert set(f.policy.runners.demands) == {"new:latest"}


def test_an_engine_that_is_down_serves_nothing() -> None:
    f = Fleet(w1=host("m", url="http://e1"))
    f.engines(Engine(url="http://e1", up=False))
    assert f.ask("a1") == "-"
    f.engines(host("m"))
    assert f.where("a1") == "w1"


def test_assigns_name_the_engine_and_the_digest() -> None:
    f = Fleet(w1=host("m", url="http://e7"))
    f.ask("a1")
    (assign,) = f.told(Assign, b"w1")
    assert (assign.engine, assign.digest, assign.model) == ("http://e7", "sha:m", "m:latest")


def test_a_request_that_is_cancelled_costs_its_client_nothing_unless_it_had_begun() -> None:
    f = Fleet(w1=host("m", slots=2))
    f.ask("a1")
    f.ask("b1")
    f.begin("b1")
    f.cancel(rid_of("a1"))
    f.cancel(rid_of("b1"))
    counters = f.demand().line.counters()
    assert counters["b"] > counters["a"]
    assert [cancel.rid for cancel in f.told(Cancel, b"w1")] == [rid_of("a1"), rid_of("b1")]


def test_requests_that_wait_can_be_listed() -> None:
    f = Fleet(w1=host("m"))
    waiting: list[Request] = []
    for name in ("a1", "a2", "b1"):
        f.ask(name)
    waiting = list(f.policy)
    assert [request.submit.ref for request in waiting] == ["a2", "b1"]
    assert set(f.policy.models()) == {"m:latest"}


def test_waits_grow_with_the_load_and_shrink_with_slots() -> None:
    demand = Demand("m:latest")
    assert demand.wait_s(0.1, 0) == HORIZON_S / 2
    demand.slots, demand.capacity = 4, 2.0
    waits = [demand.wait_s(arrivals, 0) for arrivals in (0.0, 0.5, 1.0, 1.5, 1.9, 2.0, 5.0)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (0.0, HORIZON_S / 2)
    assert demand.wait_s(1.9, 4, 2.0) < demand.wait_s(1.9, 0) < demand.wait_s(1.9, -1, -0.1)
    assert demand.wait_s(0.1, -4, -2.0) == HORIZON_S / 2


def test_how_fast_an_engine_reads_is_learnt_of_what_it_read_alone_if_there_was_any() -> None:
    f = Fleet(w1=host("m", slots=2))
    for expected in (2.0, 2.0, 1.2):
        f.ask("a1", prompt_bytes=4000)
        if expected == 2.0:
            f.ask("b1", prompt_bytes=4000)
        took_ms = 2000 if not f.runner("w1").rates.read else 7000 if expected == 2.0 else 1200
        f.finish("a1", prompt_tokens=1000, prompt_ns=took_ms * MS)
        if expected == 2.0:
            f.cancel(rid_of("b1"))
        assert f.runner("w1").rates.prefill_s(1000) == pytest.approx(expected if expected == 2.0 else 1.6)


def test_of_a_short_beginning_it_cannot_be_seen_whether_it_was_there() -> None:
    f = Fleet(w1=host("m"))
    for number in range(3):
        f.ask(f"a{number}", text="a")
        f.finish(f"a{number}", prompt_tokens=128, prompt_ns=(500 if number else 128) * MS)
    assert f.runner("w1").rates.prefill_s(1000) == pytest.approx(1.0)
    assert f.policy.runners.prefixes._bytes[f.runner("w1")] == 512


def test_what_is_said_of_a_prompt_whose_size_is_unknown_does_not_tell_how_long_tokens_are() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1")
    f.finish("a1", prompt_tokens=1000, prompt_ns=1000 * MS)
    assert f.demand().tokens_per_byte.n == 0
    assert f.demand().prompt.value == 1000


# Between what the engine says of it -----------------------------------------------------------------------------------


def fleet(*resident: str, cold: tuple[str, ...] = ("m", "n"), **more: Any) -> Fleet:
    """One host with two slots a model."""
    cold = tuple(name for name in cold if name not in resident)
    return Fleet(w1=host(*resident, cold=cold, slots=2, **more))


def tell(f: Fleet, *resident: str, cold: tuple[str, ...] = ("m", "n"), **more: Any) -> None:
    """The worker says again what is in memory."""
    f.engines(host(*resident, cold=tuple(name for name in cold if name not in resident), slots=2, **more))


def test_what_is_unloaded_for_a_load_is_known_before_the_engine_says_it() -> None:
    f = fleet("m", memory_bytes=6 * GB)
    assert f.ask("a1", "n") == "w1"
    assert f.loaded("w1") == "n"
    tell(f, "m", memory_bytes=6 * GB)  # as it was when the worker asked
    assert f.loaded("w1") == "n"
    assert f.ask("a2", "m") == "-", "it would be loaded again, and drive the other out"
    f.begin("a1")
    tell(f, "n", memory_bytes=6 * GB)
    f.finish("a1")
    assert f.where("a2") == "w1"


def test_what_the_engine_holds_after_all_is_believed_again() -> None:
    f = fleet("m", memory_bytes=6 * GB)
    f.ask("a1", "n")
    tell(f, "m", "n", memory_bytes=6 * GB)  # it needs less than was thought
    assert f.loaded("w1") == "m n"
    f.begin("a1")
    assert f.ask("a2", "m") == "w1"


def test_what_an_engine_cannot_hold_is_learnt_where_both_models_are_always_wanted() -> None:
    """The engine takes the second model when the first is idle; what came for the first meanwhile waits in there."""
    f = fleet("m")
    f.ask("a1", "m")
    f.begin("a1")
    assert f.ask("b1", "n") == "w1", "it may hold both"
    assert f.ask("a2", "m") == "w1"
    f.finish("a1")
    f.begin("b1")
    assert f.server("w1").fits(8 * GB, 2), "what waits in the engine says nothing"
    tell(f, "n")
    assert not f.server("w1").fits(8 * GB, 2)
    assert f.ask("b2", "n") == "-", "the engine loads the first again as soon as the second is idle"
    f.finish("b1")
    assert f.loaded("w1") == "m"
    f.begin("a2")
    assert f.where("a2", "b2") == "w1 -"
    tell(f, "m")
    f.finish("a2")
    assert f.where("b2") == "w1"


def test_two_loads_come_one_after_the_other() -> None:
    """Two leases of a worker that was away, for models that are not in memory."""
    f = fleet("n")
    f.ask("a1", "n")
    f.ask("b1", "m")
    server = f.server("w1")
    tell(f)  # both were unloaded
    assert server.loading is f.runner("w1", "m")
    assert f.runner("w1", "n").loading
    f.begin("b1")
    assert server.loading is f.runner("w1", "n")
    f.begin("a1")
    assert server.loading is None


def test_a_load_goes_on_for_those_that_still_want_it() -> None:
    f = fleet()
    assert f.ask("a1", "m") == "w1"
    assert f.ask("a2", "m") == "w1"
    f.cancel(f.request(b"a1".ljust(16, b".")).rid)
    assert f.server("w1").loading is f.runner("w1", "m")
    f.cancel(f.request(b"a2".ljust(16, b".")).rid)
    assert f.server("w1").loading is None
    assert f.loaded("w1") == ""


def test_with_which_options_a_model_was_loaded_before_the_broker_came_is_not_known() -> None:
    f = Fleet(w1=host("m", slots=2), w2=host(cold=("m",), slots=2))
    assert f.ask("a1", variant="num_ctx=8192") == "w1"
    assert f.server("w1").loading is None
    assert f.ask("a2", variant="num_ctx=8192") == "w1"
    assert f.ask("a3", variant="num_ctx=4096") == "w2", "now it is"


def test_a_report_that_says_nothing_new_changes_nothing() -> None:
    f = Fleet(w1=host("m", cold="n"), w2=host("k"))
    for name, model in (("a", "m"), ("b", "n"), ("c", "k")):
        f.ask(f"{name}1", model)
        f.ask(f"{name}2", model)
    f.policy._dirty.clear()
    worker = f.core.state.workers["w1"]
    again, other = host("m", cold="n"), host("m", cold="n", models_max=2)
    f.policy.runners.report(worker, again, f.now)
    assert not f.policy.runners.report(worker, again, f.now)
    assert {demand.name for demand in f.policy.runners.report(worker, other, f.now)} == {"m:latest", "n:latest"}


def test_what_was_read_leaves_no_rest() -> None:
    """Floats that are added and taken away in another order: what is left looked like a prompt that is being read."""
    f = Fleet(w1=host("m", slots=8))
    f.teach("w1", token_ms=10, read_ms=1)
    f.ask("k1", prompt_bytes=400)
    f.begin("k1")
    for number in range(20):
        f.ask("a1", prompt_bytes=1234 + 37 * number)
        f.ask("b1", prompt_bytes=777 + 13 * number)
        f.begin("a1")
        f.begin("b1")
        assert f.server("w1").reading_s == 0
        f.finish("a1", "b1")


def test_what_answers_is_in_memory_whatever_was_said() -> None:
    f = Fleet(w1=host(cold="mn", slots=2, models_max=1))
    f.ask("a1", "m")
    f.engines(Engine(url="http://e1", up=False))
    f.engines(host(cold="mn", slots=2, models_max=1))
    assert f.ask("b1", "n") == "-"
    f.begin("a1")
    assert f.loaded("w1") == "m"
    assert f.where("b1") == "-"
    f.finish("a1")
    assert f.where("b1") == "w1"


def test_what_is_given_back_before_it_began_costs_nothing_nor_does_a_continuation() -> None:
    f = Fleet(w1=host("m"))
    f.submit("a1", model="m:latest", client="a", accepted=True, attempt=attempt_of(1, 7), lost=True, next_seq=5)
    f.pass_time(3)
    assert f.where("a1") == "w1"
    f.refused(rid_of("a1"), f.request(rid_of("a1")).attempt)
    assert f.demand().line.counters() == {"a": 0.0}


def test_a_model_that_takes_no_time_is_no_division_by_zero() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1", text="abcdefgh", output_max=0)
    f.cancel(rid_of("a1"))
    f.ask("a2", text="abcdefgh", output_max=0)
    f.finish("a2", prompt_tokens=500, prompt_ns=MS)
    assert f.ask("b1", text="abc", output_max=0) == "w1"
    assert f.ask("b2", text="abc", output_max=0) == "-"


def test_leases_that_end_after_their_worker_leave_nothing() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.ask("a1")
    request = f.request(rid_of("a1"))
    assert request.worker is not None
    f.policy.worker_gone(request.worker)
    assert len(f.policy.runners.servers) == 2
    f.policy.ended(request, None, f.now)
    assert len(f.policy.runners.servers) == 1
    f.policy.worker_changed(request.worker, f.now)
    f.policy.begun(request, f.now)


def test_an_engine_that_says_nonsense_gives_nobody_credit() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1")
    f.finish("a1", prompt_tokens=-(10**12), completion_tokens=-(10**12))
    assert f.demand().line.counters()["a"] >= 0
    assert f.demand().output.of(1.0) >= 0
    f.ask("b1")
    assert f.demand().line.counters()["b"] >= 0
