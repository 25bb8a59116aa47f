"""What the scheduler believes to be in an engine's memory, between what the engine says of it."""

from typing import Any

from broker.core import BrokerCore
from common.errors import Code
from common.protocol import Failed
from tests.unit.broker.test_policy import GB, Fleet, host

UNSERVED_S = 30.0


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


def barred(f: Fleet) -> list[Failed]:
    return [failed for failed in f.told(Failed) if failed.code is Code.NO_WORKERS]


def test_what_no_host_may_serve_is_not_kept_waiting_for_ever() -> None:
    f = Fleet(rules=("model=m on gpu=big",), w1=host("m", "n"))
    assert isinstance(f.core, BrokerCore)
    assert f.ask("a1", "m") == "-"
    assert f.ask("a2", "n") == "w1"
    f.ask("a3", "n")
    f.pass_time(UNSERVED_S - 2)
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
    f.pass_time(2 * UNSERVED_S)
    assert f.where("a2") == "-"
    f.bye(b"w1")
    f.pass_time(UNSERVED_S - 5)
    assert f.where("a1", "a2") == "- -"
    f.worker("w1", f.hosts["w1"])
    assert "w1" in f.where("a1", "a2")


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


def test_not_all_that_wait_wait_for_the_faster_host() -> None:
    f = Fleet(w1=host("m"), w2=host("m"))
    f.teach("w1", token_ms=25)
    f.teach("w2", token_ms=10)
    assert f.ask("a1") == "w2"
    assert f.ask("a2") == "-", "it will be done sooner where it cannot begin yet"
    f.ask("a3")
    assert f.where("a2", "a3") == "w1 -", "two would not"
