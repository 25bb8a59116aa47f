"""The right host, in the right order: what the scheduler promises, seen through the broker's core."""

from unittest.mock import Mock

import pytest

from broker import policy
from broker.core import RETRY_AFTER_MS, BrokerCore
from broker.order import AGES_S
from broker.policy import AFFINITY_S_MAX, KINDS_MAX, LOOKS_MAX, WAITS_LOOK_MAX
from common.errors import Code
from common.protocol import (
    BESIDE_MAX,
    LIGHT,
    Failed,
    Queued,
)
from tests.unit.broker.fleet import TEXT, Fleet, host, warm_on_w2
from tests.unit.broker.harness import rid_of

# Where it is finished first ---------------------------------------------------------------------------------------


def test_a_faster_host_comes_first() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.teach("w1", token_ms=15)
    f.teach("w2", token_ms=10)
    assert f.ask("a1") == "w2"
    assert f.ask("b1") == "w1"


def test_one_that_is_so_much_faster_that_it_is_worth_waiting_is_waited_for() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.teach("w1", token_ms=50)
    f.teach("w2", token_ms=10)
    assert f.ask("a1") == "w2"
    assert f.ask("b1") == "-"
    f.finish("a1")
    assert f.where("b1") == "w2"


def test_a_host_is_the_slower_the_more_runs_there() -> None:
    f = Fleet(w1=host("m", slots=4), w2=host("m", slots=4))
    f.teach("w1", token_ms=20)
    f.teach("w2", token_ms=33)
    places = [f.ask(f"a{number}") for number in range(6)]
    assert places[:2] == ["w1", "w1"]
    assert "w2" in places[2:4]


def test_by_how_much_others_would_be_slowed_counts() -> None:
    """w1 would still write it sooner, but the three that run there would each be later."""
    f = Fleet(w1=host("m", slots=4), w2=host("m", slots=4))
    f.teach("w1", token_ms=10)
    for number in range(3):
        f.core.state.workers["w2"].draining = True
        assert f.ask(f"x{number}") == "w1"
    f.core.state.workers["w2"].draining = False
    f.teach("w2", token_ms=18)
    runner, other = f.runner("w1"), f.runner("w2")
    each_s = runner.rates.token_s(3) - runner.rates.token_s(2)
    assert runner.harm_s == pytest.approx(3 * each_s)
    assert other.harm_s == 0
    assert runner.token_s < other.token_s < runner.token_s + runner.harm_s
    assert f.ask("a1") == "w2"


def test_a_host_that_reads_faster_gets_long_prompts_and_one_that_writes_faster_long_answers() -> None:
    f = Fleet(w1=host("m", slots=4), w2=host("m", slots=4))
    f.teach("w1", token_ms=10, read_ms=2)
    f.teach("w2", token_ms=40, read_ms=0.1)
    assert f.ask("a1", prompt_bytes=40_000, output_max=10) == "w2"
    assert f.ask("b1", prompt_bytes=40, output_max=1000) == "w1"


def test_what_is_still_to_be_read_on_a_host_counts() -> None:
    f = Fleet(w1=host("m", slots=4), w2=host("m", slots=4))
    for worker in ("w1", "w2"):
        f.teach(worker, token_ms=10, read_ms=1)
    first = f.ask("a1", prompt_bytes=400_000)
    second = f.ask("b1", prompt_bytes=4_000)
    assert {first, second} == {"w1", "w2"}
    assert f.ask("c1", prompt_bytes=4_000) == second
    f.begin("a1")
    assert f.ask("d1", prompt_bytes=4_000) == first


# Beginnings that were read before ---------------------------------------------------------------------------------


def test_a_conversation_goes_on_where_it_was() -> None:
    f = warm_on_w2()
    assert f.ask("a2", text=TEXT + "more") == "w2"
    assert f.ask("b1", text="else" + TEXT) == "w1"


def test_a_request_waits_for_the_host_that_has_its_prompt_if_that_is_quicker() -> None:
    f = warm_on_w2()
    assert f.ask("a2", text=TEXT, output_max=100) == "w2"
    assert f.ask("a3", text=TEXT) == "-"
    assert f.ask("b1", text="short") == "w1"
    f.finish("a2")
    assert f.where("a3") == "w2"


def test_it_waits_no_longer_than_reading_it_anew_takes() -> None:
    f = warm_on_w2()
    f.ask("a2", text=TEXT, output_max=100)
    assert f.ask("a3", text=TEXT) == "-"
    f.pass_time(AFFINITY_S_MAX + 2)
    assert f.where("a3") == "w1"


def test_it_does_not_wait_where_that_takes_longer() -> None:
    f = warm_on_w2()
    f.ask("a2", text=TEXT, output_max=100_000)
    f.demand().output.add(100_000)
    f.finish("a2")
    f.ask("a3", text=TEXT)
    assert f.ask("a4", text=TEXT) == "w1"


def test_those_that_wait_for_their_host_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are, nor their own client's."""
    f = warm_on_w2()
    f.ask("a2", text=TEXT, output_max=100)
    for number in range(2 * WAITS_LOOK_MAX):
        assert f.ask(f"b{number}", text=TEXT, deadline_ms=50_000) == "-"
    looks = Mock(wraps=f.policy._choose)
    monkeypatch.setattr(f.policy, "_choose", looks)
    assert f.ask("z1", text="short") == "w1"
    assert looks.call_count == WAITS_LOOK_MAX + 2, "and the first again, when no slot was left"
    f.finish("z1")
    assert f.ask("b99", text="short") == "w1"
    f.finish("a2", "b99")
    assert f.where("b0", "b1") == "w2 -"


def test_a_decision_looks_for_a_host_for_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "LOOKS_MAX", WAITS_LOOK_MAX - 1)
    f = warm_on_w2()
    f.ask("a2", text=TEXT, output_max=100)
    for number in range(WAITS_LOOK_MAX - 1):
        assert f.ask(f"b{number}", text=TEXT, deadline_ms=50_000) == "-"
    assert f.ask("z1", text="short") == "-"
    f.finish("a2")
    assert f.where("b0", "z1") == "w2 w1"


# Options with which a model is loaded -------------------------------------------------------------------------------


def test_other_options_load_a_model_anew_once_it_is_idle() -> None:
    f = Fleet(w1=host("m", slots=2))
    assert f.ask("a1", variant="num_ctx=8192") == "w1"  # with what it was loaded nobody knows
    assert f.ask("b1") == "-"
    assert f.ask("c1", variant="num_ctx=8192") == "w1"
    f.finish("a1")
    assert f.where("b1") == "-"
    f.finish("c1")
    assert f.where("b1") == "w1"
    assert f.runner("w1").variant == ""
    assert f.server("w1").loading is f.runner("w1")


def test_other_options_go_to_another_host() -> None:
    f = Fleet(w1=host("m", slots=2), w2=host(cold="m", slots=2))
    f.ask("a1", variant="num_ctx=8192")
    assert f.ask("b1", variant="num_ctx=4096") == "w2"
    assert f.ask("c1", variant="num_ctx=8192") == "w1"
    assert f.ask("d1", variant="num_ctx=4096") == "w2"


def test_one_that_waits_for_its_options_holds_up_nobody_else() -> None:
    f = Fleet(w1=host("m", slots=3))
    f.ask("a1", variant="num_ctx=8192")
    assert f.ask("b1", variant="num_ctx=4096") == "-"
    assert f.ask("c1", variant="num_ctx=8192") == "w1"


# Where a request may run --------------------------------------------------------------------------------------------


def test_rules_keep_models_and_clients_on_hosts_and_off_them() -> None:
    rules = ["model=m on host=w2", "client=b not host=w1"]
    f = Fleet(rules=rules, w1=host("m", "n"), w2=host("m", "n"))
    assert f.ask("a1", "m") == "w2"
    assert f.ask("a2", "m") == "-"
    assert f.ask("b1", "n") == "w2"
    assert f.ask("b2", "n") == "-"
    assert f.ask("a3", "n") == "w1"


def test_one_that_waits_for_its_only_host_holds_up_nobody_else() -> None:
    f = Fleet(rules=["client=a on host=w1"], w1=host("m"), w2=host("m", slots=3))
    assert f.ask("a1") == "w1"
    assert f.ask("a2") == "-"
    assert f.ask("b1") == f.ask("c1") == "w2"
    assert f.where("a2") == "-"


def test_where_there_is_no_room_for_any_kind_all_wait() -> None:
    f = Fleet(rules=["client=a on host=w1"], w1=host("m"), w2=host("m"))
    f.ask("a1")
    f.ask("b1")
    assert [f.ask(name) for name in ("a2", "c1", "d1")] == ["-"] * 3
    f.finish("b1")
    assert f.where("a2", "c1", "d1") == "- w2 -"
    f.finish("a1")
    assert sorted(f.where("a2", "d1").split()) == ["-", "w1"]


def test_not_where_it_failed_as_long_as_there_is_another() -> None:
    f = Fleet(w1=host("m"), w2=host(cold="m"))
    f.ask("a1")
    rid = rid_of("a1")
    f.failed(rid, f.request(rid).attempt, retryable=True)
    assert f.where("a1") == "w2"
    f.failed(rid, f.request(rid).attempt, retryable=True, peer=b"w2")
    assert f.where("a1") == "w1"


def test_what_failed_waits_for_the_host_that_is_left() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.ask("b1")
    f.ask("a1")
    rid, other = rid_of("a1"), {"w1": "b1", "w2": "b1"}[f.where("b1")]
    f.failed(rid, f.request(rid).attempt, retryable=True, peer=f.where("a1").encode())
    assert f.where("a1") == "-"
    place = f.where(other)
    f.finish(other)
    assert f.where("a1") == place


def test_a_host_that_drains_or_is_out_of_reach_gets_nothing() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.unreachable(b"w1")
    f.engines(host("m"), peer=b"w2", draining=True)
    assert f.ask("a1") == "-"
    f.engines(host("m"), peer=b"w2")
    assert f.where("a1") == "w2"


def test_a_host_that_is_given_nothing_for_a_moment_is_waited_for() -> None:
    """It is busy rather than gone: nothing is unloaded elsewhere for a quarter of a second."""
    f = Fleet(w1=host("m"), w2=host("n", cold="m", models_max=1))
    f.ask("n1", "n")
    f.finish("n1")
    f.ask("a1")
    f.refused(rid_of("a1"), f.request(rid_of("a1")).attempt)
    assert f.where("a1") == "-"
    assert f.loaded("w2") == "n"
    assert f.demand().slots == 1
    f.pass_time(0.5)
    assert f.where("a1") == "w1"


def test_requests_that_are_refused_are_no_new_ones() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1")
    before = f.demand().arrivals.per_s(f.now)
    for _ in range(10):
        f.refused(rid_of("a1"), f.request(rid_of("a1")).attempt)
        f.pass_time(0.5)
    assert f.where("a1") == "w1"
    assert 0 < f.demand().arrivals.per_s(f.now) <= before


def test_those_for_whom_there_is_no_host_hold_up_nobody_however_many_they_are() -> None:
    f = Fleet(rules=["client=p* on host=w1", "client=q on host=w2"], w1=host("m"), w2=host("m"))
    for number in range(2 * LOOKS_MAX):
        f.submit(f"r{number}", client=f"p{number}", model="m:latest")
    assert f.ask("q1") == "w2"


def test_a_request_that_failed_does_not_hold_up_the_others_of_its_client() -> None:
    f = Fleet(w1=host("m", slots=3), w2=host("m"))
    f.ask("a1")
    f.ask("x1")
    rid, other = rid_of("a1"), {"w1": "w2", "w2": "w1"}[f.where("a1")]
    assert other == "w2"
    f.failed(rid, f.request(rid).attempt, retryable=True)
    assert f.where("a1", "x1") == "- w2"
    assert f.ask("a2") == "w1"


# Clients ------------------------------------------------------------------------------------------------------------


def test_a_client_runs_no_more_at_once_than_it_may() -> None:
    f = Fleet(w1=host("m", "n", slots=4))
    assert f.ask("a1", running_max=2) == f.ask("a2", "n", running_max=2) == "w1"
    assert f.ask("a3", running_max=2) == "-"
    assert f.ask("b1") == "w1"
    f.finish("a2")
    assert f.where("a3") == "w1"
    assert f.ask("a4") == "w1"  # it was lifted


def test_many_clients_at_their_limits_are_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    f = Fleet(w1=host("m", "n", slots=40))
    for number in range(20):
        for model in "mnm":
            f.submit(
                f"{model}{number}.{len(f.core.state.requests)}",
                client=f"c{number}",
                model=f"{model}:latest",
                running_max=1,
            )
    assert len(f.runner("w1").leases) == 20
    looks = Mock(wraps=f.policy._choose)
    monkeypatch.setattr(f.policy, "_choose", looks)
    assert f.ask("z1") == f.ask("z2", "n") == "w1"
    assert looks.call_count == 2
    first = next(iter(f.runner("w1").leases))
    f.end(first, f.request(first).attempt, 0)
    assert (len(f.runner("w1", "n").leases), looks.call_count) == (2, 3), "its client's next, for whichever model"


def test_a_limit_that_is_raised_or_lifted_holds_at_once() -> None:
    f = Fleet(w1=host("m", slots=10))
    assert [f.ask(f"a{number}", running_max=1) for number in range(4)] == ["w1", "-", "-", "-"]
    assert f.ask("a4", running_max=2) == "-"
    assert f.where("a1", "a2") == "w1 -"
    assert f.ask("a5") == "w1"
    assert f.where("a2", "a3", "a4") == "w1 w1 w1"


def test_what_comes_back_does_not_bring_back_the_limit_of_before() -> None:
    f = Fleet(w1=host("m", slots=10))
    f.ask("a1", running_max=4)
    f.ask("a2", running_max=1)
    f.refused(rid_of("a1"), f.request(rid_of("a1")).attempt)
    f.pass_time(1)
    assert f.where("a1", "a2").split().count("w1") == 1
    assert f.policy._running_max == {"a": 1}


def test_many_different_options_hold_up_nobody() -> None:
    f = Fleet(w1=host("m", slots=3))
    f.ask("x1", variant="same")
    for number in range(2 * LOOKS_MAX):
        f.submit(f"v{number}", client="v", model="m:latest", variant=str(number), priority="interactive")
    assert f.ask("z1", variant="same") == "w1"
    for number in range(2 * LOOKS_MAX, KINDS_MAX):
        f.submit(f"v{number}", client="v", model="m:latest", variant=str(number), priority="interactive")
    assert f.ask("y1", variant="another") == "-"
    assert f.ask("y2", variant="a third") == "-"
    assert len(f.demand().line.kinds) == KINDS_MAX + 1, "all that come now are of one kind"


def test_limits_are_kept_as_long_as_something_waits_or_runs() -> None:
    f = Fleet(w1=host("m"))
    f.ask("x1")
    f.ask("a1", running_max=1)
    f.ask("a2", running_max=1)
    f.cancel(rid_of("a1"))
    assert f.policy._running_max == {"a": 1}
    f.finish("x1")
    f.finish("a2")
    assert f.policy._running_max == {}
    f.ask("x2")
    f.ask("b1", running_max=1)
    f.cancel(rid_of("b1"))
    assert f.policy._running_max == {}


def test_what_waits_runs_by_turns() -> None:
    f = Fleet(w1=host("m"))
    for name in ("a1", "a2", "a3", "a4", "b1", "b2"):
        f.ask(name)
    order = []
    while running := [name for name in ("a1", "a2", "a3", "a4", "b1", "b2") if f.where(name) == "w1"]:
        order += running
        f.finish(*running)
    assert order[:5] == ["a1", "b1", "a2", "b2", "a3"]


def test_priorities_and_ageing() -> None:
    f = Fleet(w1=host("m"))
    f.ask("x1")
    f.ask("a1", priority="batch")
    f.ask("b1", priority="interactive")
    f.now += 1
    f.finish("x1")
    assert f.where("b1", "a1") == "w1 -"
    f.pass_time(sum(AGES_S) + 1)
    f.ask("c1")
    f.finish("b1")
    assert f.where("a1", "c1") == "w1 -", "nothing interactive came before it since it was raised once"


# Deadlines ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_met_is_shed_once_it_is_known() -> None:
    f = Fleet(w1=host("m"))
    f.teach("w1", read_ms=2)
    f.sent()
    assert f.ask("a1", prompt_bytes=40_000, deadline_ms=5_000) == "x"
    (failed,) = f.told(Failed)
    assert failed.code is Code.DEADLINE_EXCEEDED
    assert f.ask("a2", prompt_bytes=4_000, deadline_ms=5_000) == "w1"


def test_nothing_is_shed_on_priors() -> None:
    f = Fleet(w1=host(cold="m", sizes={"m": 80}))
    assert f.ask("a1", prompt_bytes=4_000_000, deadline_ms=5_000) == "w1"


def test_a_load_that_takes_too_long_is_reason_to_shed() -> None:
    f = Fleet(w1=host(cold="m"))
    f.teach("w1", load_s=20)
    assert f.ask("a1", deadline_ms=5_000) == "x"
    assert f.ask("a2", deadline_ms=25_000) == "w1"


def test_a_host_that_it_may_not_use_does_not_give_hope() -> None:
    f = Fleet(rules=["client=a on host=w2"], w1=host("m"), w2=host(cold="m"))
    f.teach("w2", load_s=20)
    f.ask("a1", deadline_ms=10_000)
    f.tick()
    assert f.where("a1") == "x"
    assert f.ask("b1", deadline_ms=10_000) == "w1"


def test_what_was_read_before_need_not_be_read_again() -> None:
    f = warm_on_w2()
    assert f.ask("a2", text=TEXT, deadline_ms=3_000) == "w2"
    assert f.ask("b1", text="else" + TEXT, deadline_ms=3_000) == "x"


def test_those_behind_one_that_is_shed_are_placed() -> None:
    f = Fleet(w1=host("m"))
    f.teach("w1", read_ms=2)
    f.ask("x1")
    f.ask("a1", prompt_bytes=40_000, deadline_ms=22_000)
    f.ask("b1", prompt_bytes=400)
    f.pass_time(5)
    f.finish("x1")
    assert f.where("a1", "b1") == "x w1"


def test_one_that_leaves_while_it_is_to_be_shed_is_forgotten() -> None:
    f = Fleet(w1=host("m"))
    f.teach("w1", read_ms=2)
    f.ask("x1")
    f.ask("a1", prompt_bytes=40_000, deadline_ms=22_000)
    f.now += 5
    f.policy._doomed[rid_of("a1")] = f.request(rid_of("a1"))
    f.cancel(rid_of("a1"))
    assert not f.policy._doomed


def test_a_deadline_for_a_model_that_is_nowhere_is_kept() -> None:
    f = Fleet(w1=host("m"))
    f.bye(b"w1")
    assert f.ask("a1", deadline_ms=2_000) == "-"
    f.pass_time(3)
    assert f.where("a1") == "x"


# What is told -------------------------------------------------------------------------------------------------------


def told(f: Fleet) -> dict[str, tuple[int, int | None]]:
    return {message.rid.rstrip(b".").decode(): (message.position, message.eta_ms) for message in f.told(Queued)}


def test_who_waits_hears_its_place_and_when_it_begins() -> None:
    f = Fleet(w1=host("m"))
    f.teach("w1", token_ms=50, read_ms=1)
    f.demand().output.add(100)
    f.demand().prompt.add(400)
    f.sent()
    f.ask("a1", prompt_bytes=1600)
    for name in ("b1", "c1"):
        f.ask(name, prompt_bytes=1600)
    first = told(f)
    assert {name: place for name, (place, _) in first.items()} == {"b1": 1, "c1": 2}
    assert first["b1"][1] == pytest.approx(5400, rel=0.1)
    assert first["c1"][1] == pytest.approx(10800, rel=0.1)
    f.pass_time(1)
    f.finish("a1")
    f.pass_time(2.5)
    (news,) = [told(f)["c1"]]
    assert news[0] == 1
    assert news[1] is not None
    assert news[1] < 6000


def test_of_a_model_that_is_loaded_nowhere_only_the_place_is_told() -> None:
    f = Fleet(w1=host("m", cold="n", models_max=1))
    f.ask("a1", "m")
    f.sent()
    f.ask("b1", "n")
    assert told(f) == {"b1": (1, None)}


def test_who_is_refused_hears_when_half_of_what_waits_is_done() -> None:
    f = Fleet(w1=host("m", cold="n", models_max=1))
    f.core.settings = type(f.core.settings)(queue_client_max=2)
    f.teach("w1", token_ms=100, read_ms=1)
    f.demand().output.add(100)
    f.demand().prompt.add(1)
    for number in range(3):
        f.ask(f"a{number}", prompt_bytes=4)
    f.sent()
    f.ask("a9")
    (refusal,) = f.told(Failed)
    assert refusal.code is Code.QUEUE_FULL
    assert refusal.retry_after_ms == pytest.approx(15_000, rel=0.1)
    for number in range(2):
        f.ask(f"b{number}", "n")
    f.ask("b9", "n")
    (refusal,) = f.told(Failed)
    assert refusal.retry_after_ms == RETRY_AFTER_MS
    assert f.policy.backlog_s("unknown:latest", f.now) is None


# And the rest ---------------------------------------------------------------------------------------------------------


def test_what_runs_beside_the_work_is_none_of_its_business() -> None:
    f = Fleet(w1=host("m"))
    assert f.ask("a1", light=True) == "w1"
    assert f.ask("b1") == "w1"
    f.begin("a1")
    f.finish("a1")
    assert (len(f.runner("w1").leases), f.server("w1").running) == (1, 1)


def test_what_the_rules_leave_no_host_is_given_up() -> None:
    f = Fleet(rules=["client=a on host=w2"], w1=host("m"))
    assert f.ask("a1") == "-"
    for number in range(BESIDE_MAX[LIGHT] + 1):
        f.ask(f"l{number}", light=True)
    f.sent()
    f.pass_time(f.core.settings.unserved_s + 3)
    (failed,) = f.told(Failed)
    assert (failed.rid, failed.code) == (rid_of("a1"), Code.NO_WORKERS)
    assert f.where("a1", f"l{BESIDE_MAX[LIGHT]}") == "x -"


def barred(f: Fleet) -> list[Failed]:
    return [failed for failed in f.told(Failed) if failed.code is Code.NO_WORKERS]


def test_what_no_host_may_serve_is_not_kept_waiting_for_ever() -> None:
    f = Fleet(rules=("model=m on gpu=big",), w1=host("m", "n"))
    assert isinstance(f.core, BrokerCore)
    assert f.ask("a1", "m") == "-"
    assert f.ask("a2", "n") == "w1"
    f.ask("a3", "n")
    f.pass_time(f.core.settings.unserved_s - 2)
    f.ask("b1", "m", light=True)
    assert f.where("a1", "a3") == "- -"
    assert not barred(f)
    f.pass_time(5)
    assert f.where("a1", "a3") == "x -"
    (failed,) = barred(f)
    assert "rules" in failed.message


def test_who_waits_for_a_host_that_the_rules_allow_waits_from_when_it_went() -> None:
    f = Fleet(rules=("model=m on host=w1",), w1=host("m"), w2=host("m"))
    f.ask("a1", "m")
    assert f.ask("a2", "m") == "-"
    f.pass_time(2 * f.core.settings.unserved_s)
    assert f.where("a2") == "-"
    f.bye(b"w1")
    f.pass_time(f.core.settings.unserved_s - 5)
    assert f.where("a1", "a2") == "- -"
    f.worker("w1", f.hosts["w1"])
    assert "w1" in f.where("a1", "a2")


def test_not_all_that_wait_wait_for_the_faster_host() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.teach("w1", token_ms=25)
    f.teach("w2", token_ms=10)
    assert f.ask("a1") == "w2"
    assert f.ask("a2") == "-", "it will be done sooner where it cannot begin yet"
    f.ask("a3")
    assert f.where("a2", "a3") == "w1 -", "two would not"
