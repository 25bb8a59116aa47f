"""Pulls at first use: which requests wait for one, and how they end; with a broker that says what it is told to."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.errors import Code, FabricError
from common.protocol import End, Engine, Failed, Host, Stats, Submit
from gateway import autopull
from gateway.autopull import AutoPull, Waiter
from gateway.session import Events, Histories, Over, Stream
from gateway.settings import GatewaySettings

HOSTS = tuple(Host(name=name, engines=(Engine(url="http://e"),)) for name in ("a", "b"))


class Broker:
    """What stands for the lines to the broker: a fleet, and operations that are ended by hand."""

    def __init__(self) -> None:
        self.connected = True
        self.fleet = SimpleNamespace(models=(), workers=2)
        self.hosts: tuple[Host, ...] | FabricError = HOSTS
        self.operations: dict[str, Callable[[Any], None]] = {}
        self.forgotten = 0

    async def query(self, what: str) -> Any:
        if isinstance(self.hosts, FabricError):
            raise self.hosts
        return SimpleNamespace(hosts=self.hosts)

    def operate(self, *, model: str, sink: Callable[[Any], None], **_: Any) -> Any:
        self.operations[model[1]] = sink
        return SimpleNamespace(name=model[1])

    def forget(self, stream: Any) -> None:
        self.forgotten += 1

    def end(self, host: str, code: Code | None = None) -> None:
        if code is None:
            over = End(rid=b"r" * 16, attempt=1, seq=1, stats=Stats())
        else:
            over = cast("Any", Failed(rid=b"r" * 16, attempt=1, code=code, message="no such file", status=404))
        self.operations[host](Over(over, b""))


class Audit:
    """What stands for the registry."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write_audit(self, **row: Any) -> None:
        self.rows.append(row)


class Asked:
    """A request whose model nobody has, and what it hears."""

    def __init__(self, pulls: AutoPull, model: str = "m:latest", *, told: bool = True, **submit: Any) -> None:
        message = Submit(rid=b"s" * 16, client=submit.pop("client", "alice"), ref="1", model=model, path="/p", **submit)
        self.stream = Stream(message, b"{}", asyncio.get_running_loop().time(), histories=Histories())
        self.submitted: list[int | None] = []
        self.refusal: FabricError | None = None
        self.lines: list[dict[str, Any]] = []
        self.over: asyncio.Future[Failed] = asyncio.get_running_loop().create_future()
        self.again = asyncio.Event()
        self.waiter = Waiter(
            pulls,
            token="t",
            size=10,
            submit=self._submit,
            sink=lambda over: self.over.set_result(cast("Failed", over.terminal)),
            tell=self.lines.append if told else None,
        )

    def _submit(self, deadline_ms: int | None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(deadline_ms)
        self.again.set()

    def take(self, code: Code = Code.MODEL_NOT_FOUND, **more: Any) -> bool:
        return self.waiter.take(self.stream, Failed(rid=b"s" * 16, attempt=0, code=code, message="no", **more))


@contextlib.asynccontextmanager
async def pulling(broker: Broker, audit: Audit, **settings: Any) -> AsyncIterator[AutoPull]:
    pulls = AutoPull(
        GatewaySettings(**{"auto_pull": ("*",), **settings}), cast("Any", broker), store=cast("Any", audit)
    )
    running = asyncio.create_task(pulls.run())
    await asyncio.sleep(0)
    try:
        yield pulls
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def audit() -> Audit:
    return Audit()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it looks into what has no event
            await asyncio.sleep(0.001)


async def test_what_a_pull_cannot_mend(broker: Broker, audit: Audit) -> None:
    async with pulling(broker, audit) as pulls:
        assert not Asked(pulls).take(status=404), "the engine's own words"
        assert not Asked(pulls).take(Code.QUEUE_FULL)
        assert not Asked(pulls, light=True).take()
        ended = Asked(pulls)
        assert not ended.waiter.take(ended.stream, End(rid=b"s" * 16, attempt=1, seq=1, stats=Stats()))
        begun = Asked(pulls)
        begun.stream.next_seq = 1
        assert not begun.take(), "something was delivered"
        broker.connected = False
        assert not Asked(pulls).take(Code.NO_WORKERS), "nobody knows what the fleet has"
        broker.connected, broker.fleet.workers = True, 0
        assert not Asked(pulls).take(Code.NO_WORKERS)
        assert pulls.under_way(lambda _: True) == []
        broker.fleet.workers = 1
        assert Asked(pulls).take(Code.NO_WORKERS), "a fleet whose hosts have no model at all"


async def test_patterns(broker: Broker, audit: Audit) -> None:
    async with pulling(broker, audit, auto_pull=("llama3.2:*", "nomic-embed-text")) as pulls:
        assert pulls.may("llama3.2:3b")
        assert pulls.may("nomic-embed-text:latest")
        assert not pulls.may("nomic-embed-text:v1")
        assert not pulls.may("evil.example/x/llama3.2:3b")
    async with pulling(broker, audit, auto_pull=()) as pulls:
        assert not pulls.may("llama3.2:3b")


async def test_a_request_waits_once_and_what_is_left_of_its_deadline_is_kept(broker: Broker, audit: Audit) -> None:
    async with pulling(broker, audit) as pulls:
        asked, other = Asked(pulls, deadline_ms=60_000), Asked(pulls)
        assert asked.take()
        assert other.take()
        await until(lambda: len(broker.operations) == 2)
        broker.end("a")
        broker.fleet.models = ("m",)
        await asked.again.wait()
        await other.again.wait()
        (left,) = asked.submitted
        assert left is not None
        assert 0 < left <= 60_000
        assert other.submitted == [None]
        assert not asked.take(), "then it is told"
        late = Asked(pulls)
        assert late.take(), "the model is there, and the pull goes on on the other host"
        await late.again.wait()
        broker.end("b")
        await until(lambda: bool(audit.rows))
    assert [row["outcome"] for row in audit.rows] == ["success"]


async def test_a_model_that_is_listed_already_was_there_before_the_broker_said_no(broker: Broker, audit: Audit) -> None:
    broker.fleet.models = ("m",)
    async with pulling(broker, audit) as pulls:
        asked = Asked(pulls)
        assert asked.take()
        await until(lambda: len(broker.operations) == 2)
        broker.operations["a"](Events(0, 1, b'{"status":"pulling manifest"}'))
        await until(lambda: pulls.under_way(lambda _: True)[0]["status"] == "pulling manifest")
        assert not asked.submitted, "it waits for a host that has pulled it"
        broker.end("a", Code.MODEL_NOT_FOUND)
        broker.end("b")
        await asked.again.wait()
        await until(lambda: bool(audit.rows))
    assert audit.rows[0]["outcome"] == "failed on 1 of 2 engines: a: no such file"


async def test_a_host_that_is_slow_to_list_its_model(broker: Broker, audit: Audit) -> None:
    async with pulling(broker, audit) as pulls:
        asked = Asked(pulls)
        assert asked.take()
        await until(lambda: len(broker.operations) == 2)
        broker.end("a")
        broker.end("b")
        await until(lambda: bool(audit.rows))
        assert not asked.submitted
        broker.fleet.models = ("m",)
        await asked.again.wait()
        await until(lambda: not pulls.under_way(lambda _: True))


async def test_a_request_that_finds_no_broker_afterwards(broker: Broker, audit: Audit) -> None:
    async with pulling(broker, audit) as pulls:
        asked = Asked(pulls)
        asked.refusal = FabricError(Code.NO_WORKERS, "the broker is away")
        assert asked.take()
        await until(lambda: len(broker.operations) == 2)
        broker.fleet.models = ("m",)
        broker.end("a")
        failed = await asked.over
        assert (failed.code, failed.message, failed.retry_after_ms) == (
            Code.NO_WORKERS,
            "the broker is away",
            autopull.RETRY_AFTER_MS,
        )


@pytest.mark.parametrize("hosts", [FabricError(Code.NO_WORKERS, "it does not answer"), ()])
async def test_without_a_host_nothing_is_pulled(broker: Broker, audit: Audit, hosts: Any) -> None:
    broker.hosts = hosts
    async with pulling(broker, audit) as pulls:
        asked, again = Asked(pulls), Asked(pulls)
        assert asked.take()
        failed = await asked.over
        assert failed.code is Code.NO_WORKERS
        assert failed.message.startswith("model 'm' cannot be pulled: ")
        assert again.take()
        assert again.waiter.leave(), "before it was told"
        assert not again.waiter.leave()
        assert pulls.under_way(lambda _: True) == []
    assert not again.over.done()
    assert audit.rows == []


async def test_who_cannot_be_told_waits_no_longer_than_either_bound(broker: Broker, audit: Audit) -> None:
    async with pulling(broker, audit, auto_pull_s=0.01) as pulls:
        late = Asked(pulls, told=False, deadline_ms=60_000)
        assert late.take()
        assert (await late.over).code is Code.NO_WORKERS
    async with pulling(broker, audit) as pulls:
        late = Asked(pulls, told=False, deadline_ms=10)
        assert late.take()
        assert (await late.over).code is Code.DEADLINE_EXCEEDED


async def test_a_revocation_stops_what_nobody_else_waits_for(broker: Broker, audit: Audit) -> None:
    async with pulling(broker, audit) as pulls:
        mine, shared, other = Asked(pulls, "mine"), Asked(pulls, "shared"), Asked(pulls, "shared", client="bob")
        assert all([mine.take(), shared.take(), other.take()])
        await until(lambda: len(broker.operations) == 2)
        mine.waiter.leave()
        shared.waiter.leave()
        pulls.revoke({"carol"}, {"another"})
        assert len(pulls.under_way(lambda _: True)) == 2
        pulls.revoke({"alice"}, set())
        assert [pull["model"] for pull in pulls.under_way(lambda _: True)] == ["shared"]
        await until(lambda: broker.forgotten == 2)
        other.waiter.leave()
        pulls.revoke(set(), {"t"})
        await until(lambda: broker.forgotten == 4)
    assert {row["outcome"] for row in audit.rows} == {"stopped: nobody waited for it any more"}


async def test_a_gateway_that_ends_takes_nobody_in(broker: Broker, audit: Audit) -> None:
    async with pulling(broker, audit) as pulls:
        waits = Asked(pulls)
        assert waits.take()
        await until(lambda: len(broker.operations) == 2)
    assert broker.forgotten == 2
    waits.waiter.leave()
    asked = Asked(pulls)
    assert asked.take()
    assert (await asked.over).code is Code.SHUTTING_DOWN
