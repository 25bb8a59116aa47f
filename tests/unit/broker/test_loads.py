"""What is loaded where, and for whom an engine becomes idle, seen through the broker's core."""

from math import inf
from typing import Any

from broker.loads import DRAIN_S_MAX, STARVING_S
from common.protocol import (
    Engine,
    attempt_of,
)
from tests.unit.broker.fleet import GB, MS, Fleet, host
from tests.unit.broker.harness import claim_of, rid_of

# What is loaded where -----------------------------------------------------------------------------------------------


def test_an_engine_loads_one_model_at_a_time() -> None:
    f = Fleet(w1=host(cold="mn", slots=2))
    assert f.ask("a1", "m") == "w1"
    assert f.ask("b1", "n") == "-"
    assert f.ask("c1", "m") == "w1"  # it waits there as well as here
    f.begin("a1")
    assert f.where("b1") == "w1"
    assert f.loaded("w1") == "m n"


def test_a_load_that_came_to_nothing_makes_room_for_another() -> None:
    f = Fleet(w1=host(cold="mn"))
    f.ask("a1", "m")
    assert f.ask("b1", "n") == "-"
    f.cancel(rid_of("a1"))
    assert f.where("b1") == "w1"
    assert f.loaded("w1") == "n"


def test_a_cold_host_is_used_when_the_warm_ones_are_busy_for_long() -> None:
    f = Fleet(w1=host("m"), w2=host(cold="m"))
    f.teach("w1", token_ms=20, load_s=2)
    f.demand().output.add(2000)
    assert f.ask("a1") == "w1"
    places = [f.ask(f"a{number}") for number in range(2, 6)]
    assert "w2" in places
    assert places.count("w1") == 0


def test_a_short_wait_is_better_than_a_long_load() -> None:
    f = Fleet(w1=host("m"), w2=host(cold="m"))
    f.teach("w1", token_ms=10, load_s=60)
    f.demand().output.add(20)
    assert [f.ask(f"{client}1") for client in "abcd"] == ["w1", "-", "-", "-"]


def test_a_much_faster_host_with_room_is_loaded_though_a_slow_one_is_free() -> None:
    f = Fleet(w1=host("m"), w2=host(cold="m"))
    f.teach("w1", token_ms=200, load_s=2)
    f.teach("w2", token_ms=5, load_s=2)
    f.demand().output.add(500)
    for number in range(30):
        f.ask(f"a{number}")
        f.cancel(rid_of(f"a{number}"))
    assert f.loaded("w2") == ""
    f.pass_time(6)
    assert f.ask("b1") == "w2"


def test_what_is_busy_is_not_unloaded_for_another_model() -> None:
    f = Fleet(w1=host("m", cold="n", models_max=1))
    assert f.ask("a1", "m") == "w1"
    assert f.ask("b1", "n") == "-"
    f.finish("a1")
    assert f.where("b1") == "w1"
    assert f.loaded("w1") == "n"


def test_an_engines_memory_tells_what_fits_beside_what_is_busy() -> None:
    f = Fleet(w1=host("m", cold="nk", sizes={"m": 6, "n": 6, "k": 2}, memory_bytes=12 * GB))
    assert f.ask("a1", "m") == "w1"
    assert f.ask("b1", "n") == "-"
    assert f.ask("c1", "k") == "w1"
    f.begin("c1")
    assert f.where("b1") == "-"
    f.finish("a1", "c1")
    assert f.where("b1") == "w1"
    assert f.loaded("w1") == "k n"


def test_what_does_not_fit_at_all_is_loaded_alone() -> None:
    f = Fleet(w1=host("m", cold="n", sizes={"n": 100}, memory_bytes=12 * GB))
    assert f.ask("b1", "n") == "w1"
    assert f.loaded("w1") == "n"


def test_a_model_that_is_waited_for_is_not_unloaded() -> None:
    """Its request may run on another host only, which is away for the moment."""
    f = Fleet(rules=["client=a on host=w2"], w1=host("m", cold="n", models_max=1), w2=host("m"))
    f.bye(b"w2")
    assert f.ask("a1", "m") == "-"
    assert f.ask("b1", "n") == "-"
    f.pass_time(STARVING_S / 2)
    assert f.where("b1") == "-"
    f.pass_time(STARVING_S)
    assert f.where("b1") == "w1"


def test_of_two_idle_models_the_one_that_is_worth_less_is_unloaded() -> None:
    f = Fleet(w1=host("m", models_max=1, cold="k"), w2=host("n", cold="k", models_max=1))
    for number in range(10):
        f.ask(f"a{number}", "m")
        f.finish(f"a{number}")
    assert f.ask("k1", "k") == "w2"
    assert (f.loaded("w1"), f.loaded("w2")) == ("m", "k")


def test_what_was_used_longest_ago_is_unloaded_first() -> None:
    f = Fleet(w1=host("m", "n", cold="k", models_max=2), w2=host("p", cold="k", models_max=1))
    for model, times in (("n", 1), ("p", 3), ("m", 10)):
        for number in range(times):
            f.ask(f"{model}{number}", model)
            f.finish(f"{model}{number}")
            f.now += 0.1
    assert f.ask("k1", "k") == "w1"
    assert f.loaded("w1") == "k m"


def test_a_model_that_is_loaded_elsewhere_too_is_worth_less() -> None:
    f = Fleet(w1=host("n", cold="k", models_max=1), w2=host("m", cold="k", models_max=1), w3=host("m"))
    for number in range(4):
        f.ask(f"b{number}", "n")
        f.finish(f"b{number}")
        f.ask(f"a{number}", "m")
        f.finish(f"a{number}")
    assert f.ask("k1", "k") == "w2"


def test_a_second_request_goes_where_its_model_is_being_loaded() -> None:
    f = Fleet(w1=host(cold="m", slots=2), w2=host(cold="m", slots=2))
    assert f.ask("a1") == f.ask("b1") == "w1"


def test_a_request_waits_for_a_busy_runner_rather_than_for_one_that_is_being_loaded() -> None:
    f = Fleet(w1=host("m"), w2=host(cold="m", slots=2))
    f.teach("w1", token_ms=1, load_s=60)
    f.demand().output.add(100)
    f.ask("a1")
    f.runner("w2").rates.saw_load(60_000 * MS)
    f.policy.runners._loads(f.runner("w2"), b"other", f.now)
    f.server("w2").refresh()
    assert f.ask("b1") == "-"
    f.finish("a1")
    assert f.where("b1") == "w1"


# Draining -----------------------------------------------------------------------------------------------------------


def starving(**more: Any) -> Fleet:
    """All are busy with what is loaded there, w1 with m, and n waits for a host."""
    f = Fleet(**{"w1": host("m", cold="n", models_max=1, slots=2), **more})
    for worker, engine in f.hosts.items():
        model = engine.models[0].name.removesuffix(":latest")
        f.teach(worker, model, load_s=2)
        f.ask(f"{'a' if worker == 'w1' else 'x'}1", model, prompt_bytes=400 if worker == "w1" else 400_000)
    f.pass_time(10)
    assert f.ask("b1", "n") == "-"
    return f


def test_for_a_model_that_starves_an_engine_takes_nothing_else() -> None:
    f = starving()
    assert f.ask("a2", "m") == "w1"
    f.pass_time(STARVING_S + 2)
    assert f.ask("c1", "m") == "-"
    f.finish("a1")
    assert f.where("c1", "b1") == "- -"
    f.finish("a2")
    assert f.where("c1", "b1") == "- w1"
    assert f.loaded("w1") == "n"
    f.begin("b1")
    f.finish("b1")
    assert f.where("c1") == "w1"


def test_a_model_stays_for_some_time_at_least() -> None:
    f = Fleet(w1=host("m", cold="n", models_max=1, slots=2))
    f.teach("w1", load_s=30)
    f.ask("a1", "m")
    f.ask("b1", "n")
    f.pass_time(STARVING_S + 2)
    assert f.ask("a2", "m") == "w1"
    f.pass_time(90)
    assert f.ask("a3", "m") == "-"


def test_the_engine_that_is_idle_first_drains() -> None:
    f = starving(w2=host("k", cold="n", models_max=1))
    f.pass_time(STARVING_S + 2)
    assert f.server("w1").drains_for is f.demand("n")
    assert f.server("w2").drains_for is None


def test_an_engine_that_drains_for_one_model_takes_no_other() -> None:
    f = Fleet(w1=host("m", cold="nk", models_max=1))
    f.teach("w1", load_s=2)
    f.ask("a1", "m")
    f.pass_time(10)
    assert f.ask("k1", "k") == "-"
    f.pass_time(3)
    assert f.ask("b1", "n") == "-"
    f.pass_time(STARVING_S)
    assert f.server("w1").drains_for is f.demand("k")
    f.finish("a1")
    assert f.where("k1", "b1") == "w1 -"


def test_when_nobody_starves_any_more_the_engine_goes_on() -> None:
    f = starving()
    f.pass_time(STARVING_S + 2)
    assert f.ask("a2", "m") == "-"
    f.cancel(rid_of("b1"))
    assert f.server("w1").drains_for is None
    f.pass_time(1.5)
    assert f.where("a2") == "w1"


def test_an_engine_does_not_drain_for_ever() -> None:
    f = starving()
    f.pass_time(STARVING_S + 2)
    assert f.ask("a2", "m") == "-"
    f.pass_time(DRAIN_S_MAX / 2)
    assert f.where("a2") == "-"
    f.server("w1").drains_until = f.now
    assert not f.server("w1").drains(f.now)


def test_when_the_engine_that_drains_is_gone_another_does() -> None:
    f = starving(w2=host("k", cold="n", models_max=1))
    f.pass_time(STARVING_S + 2)
    f.bye(b"w1")
    assert f.server("w2").drains_for is f.demand("n")


def test_no_engine_drains_for_a_request_that_may_not_run_there() -> None:
    f = Fleet(rules=["client=b not host=w1"], w1=host("m", cold="n", models_max=1), w2=host(cold="n"))
    f.bye(b"w2")
    f.pass_time(10)
    f.ask("a1", "m")
    assert f.ask("b1", "n") == "-"
    f.pass_time(2 * STARVING_S)
    assert f.server("w1").drains_for is None


# Where a request may run --------------------------------------------------------------------------------------------


def test_a_pinned_request_has_its_model_loaded_where_it_may_be() -> None:
    f = Fleet(rules=["client=a on host=w2"], w1=host("m"), w2=host(cold="m"))
    assert f.ask("b1") == "w1"
    assert f.ask("a1") == "w2"


def test_a_pinned_request_that_would_wait_for_longer_than_a_load_takes() -> None:
    rules = ["client=a not host=w1"]
    f = Fleet(rules=rules, w1=host("m"), w2=host("m"), w3=host(cold="m"))
    for worker in ("w1", "w2"):
        f.teach(worker, token_ms=100, load_s=1)
    f.demand().output.add(1000)
    f.ask("a1")
    assert f.where("a1") == "w2"
    assert f.ask("a2") == "w3"


def test_a_faster_host_on_which_another_model_is_in_use_is_left_alone() -> None:
    f = Fleet(w1=host("m"), w2=host("n", cold="m", models_max=1))
    f.teach("w1", token_ms=200, load_s=2)
    f.teach("w2", token_ms=5, load_s=2)
    f.demand().output.add(500)
    for number in range(30):
        f.ask(f"a{number}")
        f.cancel(rid_of(f"a{number}"))
        f.ask(f"n{number}", "n")
        f.finish(f"n{number}")
    f.pass_time(6)
    assert f.ask("b1") == "w1"
    assert f.loaded("w2") == "n"


def test_as_many_models_are_unloaded_as_it_takes() -> None:
    f = Fleet(w1=host("m", "n", cold="k", sizes={"k": 9}, memory_bytes=12 * GB))
    assert f.ask("k1", "k") == "w1"
    assert f.loaded("w1") == "k"


def test_a_model_whose_other_hosts_drain_is_worth_what_its_clients_would_wait() -> None:
    f = Fleet(w1=host("m", cold="k", models_max=1), w2=host("m"), w3=host("n", cold="k", models_max=1))
    for number in range(30):
        f.ask(f"a{number}")
        f.finish(f"a{number}")
    f.engines(host("m"), peer=b"w2", draining=True)
    assert f.ask("k1", "k") == "w3"


def test_a_load_that_another_broker_began_ends_a_drain() -> None:
    f = starving(w1=host("m", cold="nk", models_max=1, slots=2))
    f.pass_time(STARVING_S + 2)
    assert f.server("w1").drains_for is f.demand("n")
    claims = [
        claim_of(rid_of("a1"), f.request(rid_of("a1")).attempt, digest="sha:m"),
        claim_of(rid_of("k1"), attempt_of(1, 7), digest="sha:k", model="k:latest"),
    ]
    f.core._window.open(f.now)
    f.worker("w1", f.hosts["w1"], claims=claims)
    assert f.where("a1", "k1") == "w1 w1"
    assert f.server("w1").drains_for is None


def test_a_model_is_loaded_where_it_fits() -> None:
    sizes = {"big": 10.0}
    small = host("m", cold=("big",), sizes=sizes, memory_bytes=6 * GB)
    f = Fleet(w1=small, w2=host(cold=("big",), sizes=sizes, memory_bytes=24 * GB))
    assert f.ask("a1", "big") == "w2"
    f.bye(b"w2")
    assert f.where("a1") == "w1", "better there than nowhere"


def test_to_become_idle_for_a_model_is_for_a_host_where_it_fits() -> None:
    sizes = {"big": 10.0}
    f = Fleet(
        w1=host("m", cold=("big",), sizes=sizes, memory_bytes=6 * GB),
        w2=host("n", cold=("big",), sizes=sizes, memory_bytes=12 * GB),
    )
    assert f.ask("a1", "m") == "w1"
    assert f.ask("b1", "n") == "w2"
    assert f.ask("c1", "big") == "-"
    f.pass_time(60)
    assert f.server("w2").drains(f.now)
    assert not f.server("w1").drains(f.now)


def test_an_engine_loads_one_model_at_a_time_even_of_unknown_sizes() -> None:
    f = Fleet(w1=host(cold="mn", sizes={"m": 0, "n": 0}))
    assert (f.ask("a1", "m"), f.ask("b1", "n")) == ("w1", "-")
    f.begin("a1")
    assert f.where("b1") == "w1"


def test_who_no_longer_drains_an_engine_does_not_end_anothers_drain() -> None:
    f = Fleet(w1=host("m", cold="nk", models_max=1, slots=2))
    f.teach("w1", load_s=1)
    f.ask("a1", "m")
    f.pass_time(10)
    f.ask("k1", "k")
    f.pass_time(STARVING_S + 1)
    server = f.server("w1")
    assert server.drains_for is f.demand("k")
    server.drains_until = server.drains_after = f.now
    f.ask("n1", "n")
    f.request(rid_of("n1")).accepted -= 2 * STARVING_S
    f.policy._dirty = {f.demand("n"): None}
    f.tick()
    assert server.drains_for is f.demand("n")
    f.cancel(rid_of("k1"))
    assert server.drains_for is f.demand("n")


def test_an_engine_that_drains_does_not_load_other_options_either() -> None:
    f = Fleet(w1=host("m", "p", cold="n", models_max=2, slots=2))
    f.teach("w1", load_s=1)
    f.ask("a1", "m")
    f.ask("p1", "p", variant="x")
    f.pass_time(10)
    f.ask("n1", "n")
    f.pass_time(STARVING_S + 1)
    assert f.server("w1").drains_for is f.demand("n")
    f.ask("p2", "p", variant="y")
    f.finish("p1")
    assert f.where("p2", "n1") == "- w1"


def test_where_only_busy_models_are_left_to_unload_nothing_is_loaded() -> None:
    """Whatever room there was thought to be: it is a quick estimate."""
    f = Fleet(w1=host("m", cold="n", models_max=1))
    f.ask("a1", "m")
    f.server("w1").room = inf
    assert f.ask("b1", "n") == "-"


def test_an_engine_is_not_idle_for_one_long_answer_again_and_again() -> None:
    f = starving()
    f.pass_time(STARVING_S + 1)
    server = f.server("w1")
    assert server.drains_for is f.demand("n")
    f.pass_time(DRAIN_S_MAX + 1)
    assert f.ask("a2", "m") == "w1"
    f.pass_time(DRAIN_S_MAX / 2)
    assert not server.drains(f.now)
    f.pass_time(DRAIN_S_MAX)
    assert server.drains(f.now)


def test_no_engine_drains_where_that_takes_too_long() -> None:
    f = Fleet(w1=host("m", cold="n", models_max=1, slots=2))
    f.teach("w1", load_s=1)
    f.ask("a1", "m", prompt_bytes=40_000_000)
    f.ask("b1", "n")
    f.pass_time(3 * STARVING_S)
    assert f.server("w1").drains_for is None


def test_a_full_slot_is_full_though_its_model_is_believed_to_be_gone() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1")
    f.engines(Engine(url="http://e1", up=False))
    f.engines(host(cold="m"))
    assert f.ask("b1") == "-"
    f.begin("a1")
    f.finish("a1")
    assert f.where("b1") == "w1"
