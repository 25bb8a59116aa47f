"""The rules at the head of residency.py, against a backend whose loads end when the test says so."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from workers.embedded.engine import Completion, Final, Model, Piece
from workers.embedded.library import Library
from workers.embedded.residency import BUSY, WAITING_MAX, Residency
from workers.embedded.wire import ApiError, Message


def model(name: str, digest: str = "", size_bytes: int = 1) -> Model:
    return Model(
        name=name,
        digest=digest or name,
        size_bytes=size_bytes,
        modified_at="",
        family="f",
        parameter_size="1",
        quantization_level="",
        context_length=100,
    )


class FakeRunner:
    size_bytes = 1

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.alive = True
        self.closed = asyncio.Event()

    async def close(self) -> None:
        self.alive = False
        self.closed.set()

    async def render(self, messages: list[Message], *, truncate: bool) -> str:
        raise NotImplementedError

    def complete(self, request: Completion) -> AsyncGenerator[list[Piece] | Final, None]:
        raise NotImplementedError

    async def embed(self, texts: list[str], *, truncate: bool) -> tuple[list[list[float]], int]:
        raise NotImplementedError

    async def tokenize(self, text: str) -> list[int]:
        raise NotImplementedError

    async def detokenize(self, tokens: list[int]) -> str:
        raise NotImplementedError


@dataclass
class FakeBackend:
    label = "fake"
    models: dict[str, Model] = field(default_factory=dict)
    loaded_max: int = 2
    memory_bytes: int = 0
    library: Library | None = None
    slots_each: int = 1
    loads: list[str] = field(default_factory=list)
    runners: list[FakeRunner] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fails: str | None = None
    aborted: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def slots(self, model: Model) -> int:
        return self.slots_each

    def context_length(self, model: Model, num_ctx: int) -> int:
        return num_ctx or 100

    async def load(self, model: Model, context_length: int) -> FakeRunner:
        self.loads.append(model.name)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        if self.fails:
            raise ApiError(500, self.fails)
        self.runners.append(FakeRunner(context_length))
        return self.runners[-1]

    def inject(self, fault: bytes) -> list[Any]:
        raise NotImplementedError


@dataclass
class Holder:
    """A request that holds its slot until told otherwise."""

    residency: Residency
    model: Model
    num_ctx: int = 0
    keep_alive_s: float | None = None
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def start(self, group: asyncio.TaskGroup) -> "Holder":
        self.task = group.create_task(self._hold())
        return self

    async def _hold(self) -> None:
        async with self.residency.lease(self.model, self.num_ctx, self.keep_alive_s):
            self.granted.set()
            await self.done.wait()

    async def finish(self) -> None:
        assert self.task
        self.done.set()
        await self.task

    async def cancel(self) -> None:
        assert self.task
        self.task.cancel()
        await asyncio.wait([self.task])


@contextlib.asynccontextmanager
async def opened(backend: FakeBackend) -> AsyncIterator[tuple[Residency, asyncio.TaskGroup]]:
    residency = Residency(backend)
    async with asyncio.timeout(10), residency.open(), asyncio.TaskGroup() as group:
        yield residency, group
    assert all(runner.closed.is_set() for runner in backend.runners)


async def settle() -> None:
    """Let everything that can run, run: nothing here waits for anything but the loop."""
    for _ in range(20):
        await asyncio.sleep(0)


def state(residency: Residency, name: str) -> dict[str, Any]:
    return residency.slots()[name]


A, B, C = model("a:latest"), model("b:latest"), model("c:latest")


async def test_requests_beyond_the_slots_wait_in_order() -> None:
    async with opened(FakeBackend(slots_each=2)) as (residency, group):
        one, two, three, four = (Holder(residency, A).start(group) for _ in range(4))
        await one.granted.wait()
        await two.granted.wait()
        await settle()
        assert state(residency, A.name).items() >= {"loaded": True, "slots": 2, "busy": 2, "waiting": 2}.items()
        await one.finish()
        await three.granted.wait()
        assert not four.granted.is_set()
        await three.cancel()
        await four.granted.wait()
        await two.finish()
        await four.finish()
        assert state(residency, A.name) == {
            "loaded": True,
            "slots": 2,
            "busy": 0,
            "waiting": 0,
            "served": 4,
            "loads": 1,
            "evicted": 0,
            "evicted_busy": 0,
        }


async def test_the_queue_is_bounded() -> None:
    backend = FakeBackend()
    backend.gate.clear()
    async with opened(backend) as (residency, group):
        waiting = [Holder(residency, A).start(group) for _ in range(WAITING_MAX)]
        await settle()
        with pytest.raises(ApiError) as refused:
            async with residency.lease(A, 0, None):
                pass
        assert (refused.value.status, refused.value.message) == (503, BUSY)
        for holder in waiting:
            await holder.cancel()


async def test_names_of_one_file_share_a_runner() -> None:
    backend = FakeBackend(slots_each=2)
    alias = model("llama2:latest", digest=A.digest)
    async with opened(backend) as (residency, group):
        holders = [Holder(residency, alias).start(group), Holder(residency, A).start(group)]
        for holder in holders:
            await holder.granted.wait()
        assert backend.loads == ["llama2:latest"]
        assert [entry["name"] for entry in residency.ps()] == ["llama2:latest"]
        for holder in holders:
            await holder.finish()


async def test_another_context_reloads_once_the_running_requests_have_ended() -> None:
    backend = FakeBackend()
    async with opened(backend) as (residency, group):
        first = Holder(residency, A, 10).start(group)
        await first.granted.wait()
        second = Holder(residency, A, 20).start(group)
        await settle()
        assert not second.granted.is_set()
        assert len(backend.runners) == 1
        await first.finish()
        await second.granted.wait()
        assert [runner.context_length for runner in backend.runners] == [10, 20]
        assert backend.runners[0].closed.is_set()
        await second.finish()


async def test_keep_alive_zero_unloads_and_a_negative_one_stays() -> None:
    backend = FakeBackend()
    async with opened(backend) as (residency, _):
        async with residency.lease(A, 0, float("inf")):
            pass
        assert residency.ps()[0]["expires_at"] > "2262"
        async with residency.lease(A, 0, 0):
            assert state(residency, A.name)["loaded"]
        await backend.runners[0].closed.wait()
        assert residency.ps() == []


async def test_keep_alive_runs_out() -> None:
    backend = FakeBackend()
    async with opened(backend) as (residency, _):
        async with residency.lease(A, 0, 0.001):
            pass
        await backend.runners[0].closed.wait()


async def test_expire_waits_for_the_running_request() -> None:
    backend = FakeBackend()
    async with opened(backend) as (residency, group):
        holder = Holder(residency, A).start(group)
        await holder.granted.wait()
        residency.expire(A)
        await settle()
        assert not backend.runners[0].closed.is_set()
        await holder.finish()
        await backend.runners[0].closed.wait()


async def test_an_idle_model_leaves_for_another_the_shortest_keep_alive_first() -> None:
    backend = FakeBackend()
    async with opened(backend) as (residency, _):
        for wanted, keep_alive_s in ((A, 500), (B, 100), (C, None)):
            async with residency.lease(wanted, 0, keep_alive_s):
                pass
        assert {entry["name"] for entry in residency.ps()} == {A.name, C.name}
        assert [state(residency, one.name)["evicted"] for one in (A, B, C)] == [0, 1, 0]


async def test_what_does_not_fit_into_memory_makes_as_many_leave_as_it_takes() -> None:
    small, other, large, huge = (
        model(name, size_bytes=size) for name, size in (("s", 3), ("o", 4), ("l", 7), ("h", 99))
    )
    async with opened(FakeBackend(loaded_max=5, memory_bytes=10)) as (residency, _):
        for wanted, there in (
            (small, {"s"}),
            (other, {"s", "o"}),
            (large, {"l"}),
            (small, {"s", "l"}),
            (huge, {"h"}),
        ):
            async with residency.lease(wanted, 0, None):
                assert {entry["name"] for entry in residency.ps()} == there
        assert {name: entry["evicted"] for name, entry in residency.slots().items()} == {"s": 2, "o": 1, "l": 1, "h": 0}


async def test_a_busy_model_gets_nothing_new_and_leaves_when_its_requests_end() -> None:
    backend = FakeBackend(loaded_max=1, slots_each=2)
    async with opened(backend) as (residency, group):
        running = Holder(residency, A).start(group)
        await running.granted.wait()
        other = Holder(residency, B).start(group)
        await settle()
        late = Holder(residency, A).start(group)
        await settle()
        assert not other.granted.is_set()
        assert not late.granted.is_set()
        await running.finish()
        await other.granted.wait()
        assert backend.loads == [A.name, B.name]
        assert (state(residency, A.name)["evicted"], state(residency, A.name)["evicted_busy"]) == (1, 1)
        await other.finish()
        await late.granted.wait()
        await late.finish()


async def test_a_model_spared_by_a_cancelled_load_serves_on() -> None:
    backend = FakeBackend(loaded_max=1, slots_each=2)
    async with opened(backend) as (residency, group):
        running = Holder(residency, A).start(group)
        await running.granted.wait()
        other = Holder(residency, B).start(group)
        await settle()
        late = Holder(residency, A).start(group)
        await settle()
        await other.cancel()
        await late.granted.wait()
        await running.finish()
        await late.finish()
        assert backend.loads == [A.name]


async def test_a_load_nobody_waits_for_is_aborted() -> None:
    backend = FakeBackend()
    backend.gate.clear()
    async with opened(backend) as (residency, group):
        one, two = Holder(residency, A).start(group), Holder(residency, A).start(group)
        await settle()
        await one.cancel()
        await settle()
        assert backend.aborted == 0
        await two.cancel()
        await settle()
        assert backend.aborted == 1
        backend.gate.set()
        async with residency.lease(A, 0, None):
            assert backend.loads == [A.name, A.name]


async def test_a_failed_load_is_told_to_all_who_wait_and_tried_anew() -> None:
    backend = FakeBackend(fails="no memory")
    async with opened(backend) as (residency, _):
        with pytest.raises(ApiError, match="no memory"):
            async with residency.lease(A, 0, None):
                pass
        backend.fails = None
        async with residency.lease(A, 0, None):
            pass


async def test_a_dead_runner_is_replaced() -> None:
    backend = FakeBackend()
    async with opened(backend) as (residency, _):
        async with residency.lease(A, 0, None):
            backend.runners[0].alive = False
        assert residency.ps() == []
        async with residency.lease(A, 0, None):
            assert len(backend.runners) == 2
