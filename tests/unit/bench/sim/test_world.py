"""The real core between simulated clients and hosts."""

from itertools import count
from typing import Any

import pytest
from msgspec.structs import replace

from bench.sim.figures import figures
from bench.sim.hosts import DEFAULT_HOSTS, HostSpec
from bench.sim.policies import POLICIES, FifoLate, plan
from bench.sim.workload import Ask, ModelSpec
from bench.sim.world import World
from broker.core import BrokerCore
from broker.scheduler import FirstCome, Scheduler
from broker.state import Request

SPEC = HostSpec(name="h", vram_gb=24, prefill_tps=1000, decode_tps=100, load_gbps=1, load_base_s=3)
UNIQUE = count(1000)
M5, M10, OTHER10 = ModelSpec("m5:latest", 5), ModelSpec("m10:latest", 10), ModelSpec("other10:latest", 10)


def ask(at_s: float, model: ModelSpec = M5, output: int = 11, *, client: str = "c", block: int | None = None) -> Ask:
    return Ask(at_s, client, model, 500, output, (next(UNIQUE) if block is None else block,))


def some(count: int, every_s: float = 1.0) -> list[Ask]:
    """Of three models and four clients."""
    models = (M5, M10, OTHER10)
    return [
        ask(every_s * number, models[number % 3], 50, client=f"c{number % 4}", block=number % 5)
        for number in range(count)
    ]


def test_a_request_through_the_core() -> None:
    outcome = World([ask(1.0)], [SPEC], FifoLate()).run()
    [job] = outcome.jobs
    assert [job.leased_at, job.first_at, job.end_at] == pytest.approx([1.0, 9.5, 9.6])
    assert not outcome.hosts[0].due() < float("inf")


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_everyone_and_the_same_each_time(policy: str) -> None:
    asks, hosts = some(60), [replace(SPEC, name=name) for name in ("a", "b")]

    def play() -> dict[str, Any]:
        found = figures(World(asks, hosts, POLICIES[policy](asks, hosts, 3)).run())
        return {key: value for key, value in found.items() if not key.startswith("decision_us")}

    once = play()
    assert once["completed"] == once["offered"] == 60
    assert once["shed"] == 0
    assert once == play()


def test_pushing_queues_in_the_host_and_late_binding_does_not() -> None:
    asks = [ask(0.0, output=101) for _ in range(6)]
    pushed = World(asks, [SPEC], POLICIES["warm-first"](asks, [SPEC], 0)).run()
    late = World(asks, [SPEC], FifoLate()).run()
    assert [job.leased_at for job in pushed.jobs] == [0.0] * 6
    assert [job.leased_at for job in late.jobs[:4]] == [0.0] * 4
    assert late.jobs[4].leased_at == min(job.end_at for job in late.jobs if job.end_at)
    # On a single host it is the same work, in the same order.
    assert [job.end_at for job in late.jobs] == pytest.approx([job.end_at for job in pushed.jobs])


def test_what_is_in_memory_is_told_with_the_next_poll() -> None:
    told: list[tuple[float, list[str]]] = []

    class Watching(FifoLate):
        def worker_changed(self, worker: Any, now: float) -> None:
            resident = [model.name for engine in worker.engines.values() for model in engine.models if model.resident]
            told.append((now, resident))

    World([ask(1.0), ask(40.0, M10), ask(80.0, OTHER10)], [SPEC], Watching()).run()
    # As Ollama's /api/ps, it names a model that is still being loaded.
    assert told == [
        (0.0, []),
        (2.0, ["m5:latest"]),
        (42.0, ["m10:latest", "m5:latest"]),
        (82.0, ["m10:latest", "other10:latest"]),
    ]


def test_a_model_that_no_gpu_holds_is_not_on_the_host() -> None:
    asks = [ask(0.0, M10), ask(0.0, M10), ask(0.0, M10)]
    hosts = [replace(SPEC, name="small", vram_gb=10), replace(SPEC, name="large")]
    outcome = World(asks, hosts, POLICIES["round-robin"](asks, hosts, 0)).run()
    assert {job.host.spec.name for job in outcome.jobs if job.host} == {"large"}


def test_what_the_core_refuses_is_shed() -> None:
    asks = [ask(0.0, output=1001) for _ in range(1010)]
    outcome = World(asks, [SPEC], FifoLate()).run()
    assert sum(job.shed for job in outcome.jobs) == 1010 - 4 - 1000  # four run, and a client may let 1000 wait
    assert sum(job.end_at is not None for job in outcome.jobs) == 1004


def test_streams_are_told_as_they_grow() -> None:
    seen: list[int] = []

    class Watching(FifoLate):
        def ended(self, request: Request, stats: Any, now: float) -> None:
            seen.append(request.events)
            assert stats.completion_tokens == 501
            assert stats.load_ns == pytest.approx(8e9)
            assert stats.prompt_ns == pytest.approx(0.5e9)
            assert stats.completion_ns == pytest.approx(5e9)

    World([ask(0.0, output=501)], [SPEC], Watching()).run()
    assert seen == [451]  # at 13 s, half a second before its end


def test_who_waits_for_ever_is_a_bug_of_the_scheduler() -> None:
    class Lazy(FifoLate):
        def place(self, state: Any, now: float) -> None:
            return None

    with pytest.raises(RuntimeError, match="1 requests wait for ever"):
        World([ask(0.0)], [SPEC], Lazy()).run()


def test_who_is_never_content_is_one_too() -> None:
    class Restless(FifoLate):
        def next_deadline(self) -> float:
            return 0.0

    with pytest.raises(RuntimeError, match="time stands still"):
        World([ask(0.0)], [SPEC], Restless()).run()


def test_the_oracle_keeps_models_apart() -> None:
    hosts = [replace(SPEC, name=name) for name in ("a", "b")]
    light = [ask(4.0 * second, M5) for second in range(100)]
    assert [len(where) for where in plan([*light, ask(400.0, M10)], hosts).values()] == [1, 1]
    heavy = [ask(second / 20, M5, 101) for second in range(2000)]
    assert plan(heavy, hosts) == {M5.name: {"a", "b"}}


def test_a_core_keeps_the_scheduler_it_is_given() -> None:
    given: Scheduler = FirstCome()
    world = World([], DEFAULT_HOSTS, given)
    assert isinstance(world._core, BrokerCore)
    assert world._core.scheduler is given
