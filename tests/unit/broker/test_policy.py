"""The right host, the right order: what the scheduler promises, seen through the broker's core.

Where a test needs rates they are taught as an engine would: by the statistics at the end of a request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from broker.core import RETRY_AFTER_MS
from broker.order import AGES_S
from broker.policy import AFFINITY_S_MAX, BLAMED_S, DRAIN_S_MAX, HORIZON_S, STARVING_S, Demand, Policy, Runner, Server
from broker.state import Phase, Request
from common.errors import Code
from common.prefix import chain
from common.protocol import (
    BESIDE_MAX,
    LIGHT,
    Assign,
    Cancel,
    End,
    Engine,
    Failed,
    Model,
    Queued,
    Stats,
    attempt_of,
    engine_name,
)
from tests.unit.broker.harness import Harness, claim_of, rid_of

GB = 10**9
MS = 10**6
"""In ns."""


def host(
    *resident: str,
    cold: Sequence[str] = (),
    sizes: Mapping[str, float] | None = None,
    slots: int = 1,
    url: str = "http://e1",
    **more: Any,
) -> Engine:
    """An engine on which some models are loaded and others are not, of 4 GB each unless said otherwise."""
    models = tuple(
        Model(
            name=f"{name}:latest",
            digest=f"sha:{name}",
            slots=slots,
            size_bytes=int((sizes or {}).get(name, 4) * GB),
            resident=name in resident,
        )
        for name in (*resident, *cold)
    )
    return Engine(url=url, models=models, **more)


class Fleet(Harness):
    """A harness whose requests are named: models and clients by a letter, requests by client and number."""

    def __init__(self, *, rules: Sequence[str] = (), labels: Sequence[str] = (), **hosts: Engine) -> None:
        super().__init__(rules=tuple(rules))
        self.gateway("g1")
        self.hosts = hosts
        for name, engine in hosts.items():
            self.worker(name, engine)

    @property
    def policy(self) -> Policy:
        assert isinstance(self.core.scheduler, Policy)
        return self.core.scheduler

    def ask(self, name: str, model: str = "m", *, text: str = "", **more: Any) -> str:
        """Client and number, as in `a1`; `text` has a block of its prompt for each letter. Where it is then."""
        if text:
            prefix, size = chain([letter.encode() * 512 for letter in text])
            more = {"prompt_bytes": size, "prefix": prefix, **more}
        self.submit(name, model=f"{model}:latest", client=name[0], **more)
        return self.where(name)

    def where(self, *names: str) -> str:
        """The hosts of these requests, - for one that waits, x for one that is over."""
        places = []
        for name in names:
            request = self.core.state.requests.get(rid_of(name))
            over = request is None or request.phase is Phase.ENDED
            places.append("x" if over or request is None else request.worker.name if request.worker else "-")
        return " ".join(places)

    def begin(self, name: str) -> None:
        """Its engine answers, so what had to be loaded is loaded; and its first event comes."""
        request = self.request(rid_of(name))
        assert request.worker is not None
        self.started(request.rid, request.attempt, peer=request.worker.peer)
        self.chunk(request.rid, request.attempt, peer=request.worker.peer)

    def finish(self, *names: str, **stats: Any) -> None:
        for name in names:
            request = self.request(rid_of(name))
            assert request.worker is not None
            peer = request.worker.peer
            self.from_worker(
                End(rid=request.rid, attempt=request.attempt, seq=request.events, stats=Stats(**stats)), peer=peer
            )
            self.ack(request.rid)

    def teach(
        self, worker: str, model: str = "m", *, token_ms: float = 0, read_ms: float = 0, load_s: float = 0
    ) -> None:
        """A request that is for this host alone tells how fast it is."""
        runner = self.runner(worker, model)
        if token_ms:
            runner.rates.saw_tokens(100, int(100 * token_ms * MS), 0)
        if read_ms:
            runner.rates.saw_prefill(1000, int(1000 * read_ms * MS))
        if load_s:
            runner.rates.saw_load(int(load_s * 1000 * MS))
        runner.server.refresh()

    def server(self, worker: str, url: str = "http://e1") -> Server:
        return self.policy._servers[worker, url]

    def runner(self, worker: str, model: str = "m") -> Runner:
        return self.server(worker).runners[f"sha:{model}"]

    def demand(self, model: str = "m") -> Demand:
        return self.policy._demands[f"{model}:latest"]

    def loaded(self, worker: str) -> str:
        return " ".join(sorted(digest.removeprefix("sha:") for digest in self.server(worker).loaded))

    def pass_time(self, seconds: float) -> None:
        self.wait(seconds, beating=(b"g1", *(name.encode() for name in self.core.state.workers)))


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
    f.teach("w2", token_ms=28)
    places = [f.ask(f"a{number}") for number in range(6)]
    assert places[:2] == ["w1", "w1"]
    assert "w2" in places[2:4]


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


def warm_on_w2(**more: Any) -> Fleet:
    """Both hosts are free, and w2 has read the beginning `abcd…`, of 100 blocks."""
    f = Fleet(w1=host("m", **more), w2=host("m", **more))
    for worker in ("w1", "w2"):
        f.teach(worker, token_ms=10, read_ms=2)
    for number in range(more.get("slots", 1)):
        assert f.ask(f"x{number}") == "w1" or more
    assert f.ask("a1", text=TEXT) == "w2"
    f.finish("x0", "a1")
    return f


TEXT = "".join(chr(0x4E00 + number) for number in range(34))


def test_a_conversation_goes_on_where_it_was() -> None:
    f = warm_on_w2()
    assert f.ask("a2", text=TEXT + "more") == "w2"
    assert f.ask("b1", text="else" + TEXT) == "w1"


def test_a_model_that_was_unloaded_has_read_nothing() -> None:
    f = warm_on_w2()
    f.engines(host(cold="m"), peer=b"w2")
    f.engines(host("m"), peer=b"w2")
    assert f.ask("a2", text=TEXT) == "w1"


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


def test_only_so_many_that_wait_for_their_host_are_passed_over() -> None:
    f = warm_on_w2()
    f.ask("a2", text=TEXT, output_max=100)
    for client in "bcde":
        assert f.ask(f"{client}1", text=TEXT, deadline_ms=50_000) == "-"
    assert f.ask("z1", text="short") == "-"
    f.finish("a2")
    assert f.where("b1", "c1", "z1") == "w2 - w1"


def test_what_should_have_been_in_the_cache_and_was_not_is_charged() -> None:
    f = warm_on_w2()
    f.ask("a2", text=TEXT)
    held = f.policy._prefixes._bytes[f.runner("w2")]
    tokens = 34 * 512 * 3 // 4
    f.finish("a2", prompt_tokens=tokens, prompt_ns=2 * tokens * MS)
    assert f.policy._prefixes._bytes[f.runner("w2")] <= 0.7 * held
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
    f.core.scheduler._loads(f.runner("w2"), b"other", f.now)  # type: ignore[attr-defined]
    f.server("w2").refresh()
    assert f.ask("b1") == "-"
    f.finish("a1")
    assert f.where("b1") == "w1"


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


# Draining -----------------------------------------------------------------------------------------------------------


def starving(**more: Any) -> Fleet:
    """All are busy with what is loaded there, w1 with m, and n waits for a host."""
    f = Fleet(**{"w1": host("m", cold="n", models_max=1, slots=2), **more})
    for worker, engine in f.hosts.items():
        model = engine.models[0].name.removesuffix(":latest")
        f.teach(worker, model, load_s=2)
        f.ask(f"{'a' if worker == 'w1' else 'x'}1", model, prompt_bytes=400 if worker == "w1" else 4_000_000)
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


# Clients ------------------------------------------------------------------------------------------------------------


def test_a_client_runs_no_more_at_once_than_it_may() -> None:
    f = Fleet(w1=host("m", "n", slots=4))
    assert f.ask("a1", running_max=2) == f.ask("a2", "n", running_max=2) == "w1"
    assert f.ask("a3", running_max=2) == "-"
    assert f.ask("b1") == "w1"
    f.finish("a2")
    assert f.where("a3") == "w1"
    assert f.ask("a4") == "w1"  # it was lifted


def test_one_clients_flood_leaves_slots_for_others() -> None:
    f = Fleet(w1=host("m", slots=4))
    f.teach("w1", token_ms=50)
    for number in range(12):
        f.ask(f"b{number}")
        f.finish(f"b{number}")
        f.now += 0.5
    for number in range(12):
        f.ask(f"a{number}")
    f.finish("a0", "a1")
    assert f.where(*(f"a{number}" for number in range(2, 12))).split().count("w1") < 4
    assert f.ask("b99") == "w1"


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
    f.finish("x1")
    assert f.where("b1", "a1") == "w1 -"
    f.pass_time(sum(AGES_S) + 1)
    f.ask("c1", priority="interactive")
    f.finish("b1")
    assert f.where("a1", "c1") == "w1 -"


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


def test_more_than_can_be_told_at_once_are_told_in_turns() -> None:
    f = Fleet(w1=host("m"))
    f.core.settings  # noqa: B018
    for number in range(7):
        f.ask(f"a{number}")
    f.submit("light", model=engine_name("w1", "http://e1"))
    names = [[o.request.submit.ref for o in f.policy.outlooks(f.now, 4)] for _ in range(3)]
    assert [len(some) for some in names] == [4, 4, 4]
    assert set(names[0]) | set(names[1]) == {f"a{number}" for number in range(1, 7)}
    assert len(list(f.policy.outlooks(f.now, 100))) == 6


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
    assert not f.policy._servers
    assert not f.policy._prefixes._held
    f.cancel(rid_of("a1"))
    f.cancel(rid_of("a2"))
    assert not f.policy._demands
    assert f.policy.next_deadline() > 1e30


def test_nothing_is_kept_of_an_engine_once_its_last_lease_has_ended() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1")
    f.engines(host("m", url="http://e2"))
    assert ("w1", "http://e1") in f.policy._servers
    f.finish("a1")
    assert list(f.policy._servers) == [("w1", "http://e2")]
    assert f.ask("a2") == "w1"


def test_a_model_that_was_deleted_is_forgotten_with_its_last_lease() -> None:
    f = Fleet(w1=host("m", "n"))
    f.ask("a1", "m")
    f.engines(host("n"))
    assert set(f.policy._demands) == {"m:latest", "n:latest"}
    f.finish("a1")
    assert set(f.policy._demands) == {"n:latest"}
    assert set(f.server("w1").runners) == {"sha:n"}


def test_names_that_are_made_up_are_forgotten() -> None:
    f = Fleet(w1=host("m"))
    f.core.settings = type(f.core.settings)(settle_s=1e9)
    assert f.ask("a1", "nowhere") == "-"
    f.cancel(rid_of("a1"))
    assert set(f.policy._demands) == {"m:latest"}


def test_a_model_gets_another_name() -> None:
    f = Fleet(w1=host("m"))
    renamed = Model(name="new:latest", digest="sha:m", resident=True, size_bytes=4 * GB)
    f.engines(Engine(url="http://e1", models=(renamed, *host("m").models)))
    f.ask("a1", "m")
    assert f.ask("b1", "new") == "-"
    f.finish("a1")
    assert f.where("b1") == "w1"
    f.engines(Engine(url="http://e1", models=(renamed,)))
    assert set(f.policy._demands) == {"new:latest"}


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


# And the rest ---------------------------------------------------------------------------------------------------------


def test_what_runs_beside_the_work_is_none_of_its_business() -> None:
    f = Fleet(w1=host("m"))
    assert f.ask("a1", light=True) == "w1"
    assert f.ask("b1") == "w1"
    f.begin("a1")
    f.finish("a1")
    assert (len(f.runner("w1").leases), f.server("w1").running) == (1, 1)


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


def test_of_a_short_beginning_it_cannot_be_seen_whether_it_was_there() -> None:
    f = Fleet(w1=host("m"))
    for number in range(3):
        f.ask(f"a{number}", text="a")
        f.finish(f"a{number}", prompt_tokens=128, prompt_ns=(500 if number else 128) * MS)
    assert f.runner("w1").rates.prefill_s(1000) == pytest.approx(1.0)
    assert f.policy._prefixes._bytes[f.runner("w1")] == 512


def test_what_is_said_of_a_prompt_whose_size_is_unknown_does_not_tell_how_long_tokens_are() -> None:
    f = Fleet(w1=host("m"))
    f.ask("a1")
    f.finish("a1", prompt_tokens=1000, prompt_ns=1000 * MS)
    assert f.demand().tokens_per_byte.n == 0
    assert f.demand().prompt.value == 1000


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
