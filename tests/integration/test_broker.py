"""The broker's shell: real sockets in front of the core, and the process around it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from broker import server
from broker.server import Broker
from broker.settings import BrokerSettings
from common import protocol, transport
from common.errors import Code, ProcessError, UsageError
from common.protocol import (
    Accepted,
    Ack,
    Assign,
    Beat,
    Bye,
    Cancel,
    Chunk,
    End,
    Engine,
    Error,
    Failed,
    Gap,
    Hello,
    Leased,
    Message,
    Model,
    Query,
    Register,
    Registered,
    Release,
    Replay,
    Snapshot,
    Started,
    Stats,
    Submit,
    Who,
    encode,
)
from common.transport import Socket
from tests.processes import started

M = TypeVar("M", bound=Message)
LOCAL = "tcp://127.0.0.1:*"
RID = b"request-16-bytes"
ENGINE = Engine(url="http://e", models=(Model(name="m:latest", digest="d"),))

pytestmark = pytest.mark.timeout(60)


class Peer:
    """One side of a link by hand; it keeps what it received until a test asks for it."""

    def __init__(self, address: str, decoder: protocol.Decoder) -> None:
        self._decoder = decoder
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self.socket = Socket("dealer", lambda _, frame: self._inbox.put_nowait(frame))
        self.socket.connect(address)

    def say(self, message: Message, payload: bytes = b"") -> None:
        self.socket.send(encode(message, payload))

    def say_raw(self, frame: bytes) -> None:
        self.socket.send(frame)

    async def frame(self, kind: type[Message]) -> bytes:
        """The next frame whose message is of this type; others before it are dropped."""
        while True:
            frame = await self._inbox.get()
            if isinstance(self._decoder.decode(frame)[0], kind):
                return frame

    async def hear(self, kind: type[M]) -> M:
        """The next message of this type."""
        message: M = self._decoder.decode(await self.frame(kind))[0]
        return message

    async def hears_next(self) -> Any:
        """The next message that is no beat."""
        while True:
            message, _ = self._decoder.decode(await self._inbox.get())
            if not isinstance(message, Beat):
                return message


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Broker]:
    """A broker on ports of its own."""
    broker = Broker(BrokerSettings(**{"gateways": LOCAL, "workers": LOCAL, "settle_s": 0.0, **settings}))
    stop = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(broker.run(stop))
            yield broker
            broker.core.validate()
            stop.set()
    finally:
        broker.close()


@asynccontextmanager
async def gateway(broker: Broker, name: str = "g1") -> AsyncIterator[Peer]:
    peer = Peer(broker.addresses.gateways, protocol.to_gateway)
    try:
        peer.say(Hello(name=name))
        await peer.hear(Snapshot)
        yield peer
    finally:
        peer.socket.close()


@asynccontextmanager
async def worker(broker: Broker, name: str = "w1") -> AsyncIterator[Peer]:
    peer = Peer(broker.addresses.workers, protocol.to_worker)
    try:
        peer.say(Register(name=name, epoch="e1", engines=(ENGINE,)))
        await peer.hear(Registered)
        yield peer
    finally:
        peer.socket.close()


@asynccontextmanager
async def streaming(broker: Broker) -> AsyncIterator[tuple[Peer, Peer, Assign]]:
    """A gateway, a worker, and a request between them that has been assigned."""
    async with gateway(broker) as g, worker(broker) as w:
        await g.hear(Snapshot)
        g.say(Submit(rid=RID, client="alice", ref="1", model="m:latest", path="/api/generate"), b'{"prompt":"hi"}')
        yield g, w, await w.hear(Assign)


# The way of a request -------------------------------------------------------------------------------------------------


async def test_a_request_goes_there_and_its_tokens_come_back() -> None:
    async with running() as broker, gateway(broker) as g, worker(broker) as w:
        assert (await g.hear(Snapshot)).models == ("m",)
        body = b'{"model":"m","prompt":"hi"}'
        g.say(Submit(rid=RID, client="alice", ref="1", model="m:latest", path="/api/generate"), body)
        assert await g.hears_next() == Accepted(rid=RID)
        leased = await g.hears_next()
        assert isinstance(leased, Leased)
        assign, payload = protocol.to_worker.decode(await w.frame(Assign))
        assert (assign.rid, assign.attempt, payload) == (RID, leased.attempt, body)

        begun = Started(rid=RID, attempt=assign.attempt, status=200, content_type="application/x-ndjson")
        w.say(begun)
        assert await g.hears_next() == begun
        for seq in range(50):
            frame = encode(Chunk(rid=RID, attempt=assign.attempt, seq=seq, n=1), b'{"response":"%d"}\n' % seq)
            w.say_raw(frame)
            assert await g.frame(Chunk) == frame, "a chunk crosses the broker byte by byte"
        end = End(rid=RID, attempt=assign.attempt, seq=50, stats=Stats(done_reason="stop", completion_tokens=50))
        w.say(end)
        assert await g.hears_next() == end

        replay = Replay(rid=RID, attempt=assign.attempt, start=49)
        g.say(replay)
        assert await w.hear(Replay) == replay
        g.say(Ack(rid=RID))
        assert await w.hear(Release) == Release(rid=RID)
        assert not broker.core.state.requests


async def test_a_stop_reaches_the_worker_and_both_sides_hear_of_it() -> None:
    async with running() as broker, streaming(broker) as (g, w, assign):
        g.say(Cancel(rid=RID))
        assert (await w.hear(Cancel)).attempt == assign.attempt
        assert (await g.hear(Failed)).code is Code.CANCELLED


async def test_a_deadline_that_came_after_the_last_look_at_the_clock_is_kept() -> None:
    async with running() as broker, streaming(broker) as (g, w, _):
        await w.hear(Beat)  # the next one is a second away, the deadline is not
        g.say(Submit(rid=RID[::-1], client="a", ref="2", model="m:latest", path="/api/chat", deadline_ms=100))
        failed = await g.hear(Failed)
        assert (failed.rid, failed.code) == (RID[::-1], Code.DEADLINE_EXCEEDED)
        assert not w.socket.broken.done()


async def test_a_worker_that_leaves_gives_its_lease_back() -> None:
    async with running() as broker, streaming(broker) as (g, w, first), worker(broker, "w2") as other:
        w.say(Bye())
        second = await other.hear(Assign)
        assert second.rid == RID
        assert protocol.ordinal_of(second.attempt) == protocol.ordinal_of(first.attempt) + 1
        assert (await g.hear(Leased)).attempt in (first.attempt, second.attempt)


async def test_anyone_admitted_may_ask_what_there_is() -> None:
    async with running() as broker, streaming(broker):
        peer = Peer(broker.addresses.gateways, protocol.to_gateway)
        try:
            peer.say(Query(id=7, what="requests"))
            snapshot = await peer.hear(Snapshot)
        finally:
            peer.socket.close()
        assert (snapshot.id, [job.rid for job in snapshot.jobs]) == (7, [RID])


# Peers that go wrong --------------------------------------------------------------------------------------------------


async def test_garbage_is_answered_and_nobody_else_suffers() -> None:
    async with running() as broker, streaming(broker) as (g, w, assign):
        for peer in (g, w):
            for garbage in (b"", b"\xff" * 40, b"\x00\x00\x00\x01\xc1", encode(Who())):
                peer.say_raw(garbage)
                assert (await peer.hear(Error)).code is Code.INVALID_MESSAGE
        assert broker.core.garbled == 8
        w.say_raw(frame := encode(Chunk(rid=RID, attempt=assign.attempt, seq=0, n=1), b"{}\n"))
        assert await g.frame(Chunk) == frame


async def test_whom_the_broker_does_not_know_is_asked_who_it_is() -> None:
    async with running() as broker:
        strangers = [
            (Peer(broker.addresses.gateways, protocol.to_gateway), Ack(rid=RID)),
            (Peer(broker.addresses.workers, protocol.to_worker), Chunk(rid=RID, attempt=1, seq=0, n=1)),
        ]
        try:
            for peer, message in strangers:
                peer.say(message)
                assert await peer.hears_next() == Who()
        finally:
            for peer, _ in strangers:
                peer.socket.close()


async def test_a_stale_chunk_is_answered_with_cancel() -> None:
    async with running() as broker, streaming(broker) as (_, w, assign):
        w.say(Chunk(rid=RID, attempt=assign.attempt + 1, seq=0, n=1), b"{}\n")
        cancel = await w.hear(Cancel)
        assert (cancel.rid, cancel.attempt) == (RID, assign.attempt + 1)


async def test_a_gateway_that_comes_back_on_a_new_line_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as broker, streaming(broker) as (g, w, assign):
        w.say(Chunk(rid=RID, attempt=assign.attempt, seq=0, n=3), b"{}\n{}\n{}\n")
        await g.frame(Chunk)
        g.socket.close()
        w.say(Chunk(rid=RID, attempt=assign.attempt, seq=3, n=1), b"lost\n")
        async with gateway(broker) as again:
            known = Submit(rid=RID, client="alice", ref="1", model="m:latest", path="/x")
            again.say(replace(known, accepted=True, attempt=assign.attempt, next_seq=3))
            assert (await again.hear(Leased)).attempt == assign.attempt
            assert (await again.hear(Gap)).attempt == assign.attempt
            w.say_raw(frame := encode(Chunk(rid=RID, attempt=assign.attempt, seq=4, n=1), b"{}\n"))
            while await again.frame(Chunk) != frame:
                pass


async def test_a_gateway_that_does_not_read_is_told_of_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are dropped at the bound, and no one else waits for it."""
    monkeypatch.setattr(server, "Socket", partial(Socket, hwm=1))
    monkeypatch.setitem(globals(), "Socket", partial(Socket, hwm=1))
    monkeypatch.setattr(transport, "OUTBOX_MESSAGES_MAX", 4)
    async with running() as broker, streaming(broker) as (g, w, assign):
        loop = asyncio.get_running_loop()
        loop.remove_reader(g.socket._fd)
        payload = b"x" * 200_000 + b"\n"
        seq = 0
        [known] = broker.core.state.gateways.values()
        async with worker(broker, "w2") as witness:
            while not known.gapped:
                w.say_raw(encode(Chunk(rid=RID, attempt=assign.attempt, seq=seq, n=1), payload))
                seq += 1
                witness.say(Ack(rid=RID))  # no message of a worker: answered at once, so the broker has turned over
                await witness.hear(Error)
        loop.add_reader(g.socket._fd, g.socket._turn)
        g.socket._look_later()
        gap = await g.hear(Gap)
        assert 0 < gap.top <= seq


async def test_two_names_on_one_line_do_not_end_the_broker() -> None:
    async with running() as broker, gateway(broker, "g1") as g, worker(broker, "w1") as w:
        g.say(Hello(name="g2"))
        w.say(Register(name="w2", epoch="e2", engines=(ENGINE,)))
        await w.hear(Registered)
        g.say(Bye())
        w.say(Bye())
        async with gateway(broker, "g3") as last:
            last.say(Query(id=1))
            assert (await last.hear(Snapshot)).workers in (0, 1)


async def test_a_bug_of_ours_ends_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    broker = Broker(BrokerSettings(gateways=LOCAL, workers=LOCAL))
    peer = Peer(broker.addresses.gateways, protocol.to_gateway)
    try:
        monkeypatch.setattr(broker.core, "handle", lambda *_: 1 / 0)
        peer.say(Hello(name="g1"))
        with pytest.raises(ZeroDivisionError):
            await broker.run(asyncio.Event())
    finally:
        peer.socket.close()
        broker.close()


# Starting and stopping ------------------------------------------------------------------------------------------------


async def test_it_says_where_it_listens_and_ends_with_stop() -> None:
    stop = asyncio.Event()
    heard: list[server.Addresses] = []

    def ready(addresses: server.Addresses) -> None:
        heard.append(addresses)
        stop.set()

    assert await server.run(BrokerSettings(gateways=LOCAL, workers=LOCAL), stop, on_ready=ready) == 0
    [addresses] = heard
    assert addresses.gateways != addresses.workers


@pytest.mark.parametrize("taken", ["gateways", "workers"])
async def test_a_port_in_use_is_a_sentence_and_leaves_nothing_open(taken: str) -> None:
    async with running() as broker:
        address = getattr(broker.addresses, taken)
        with pytest.raises(ProcessError, match=f"cannot bind {address}: .*another process"):
            Broker(BrokerSettings(**{"gateways": LOCAL, "workers": LOCAL, taken: address}))


async def test_an_exposed_port_needs_an_explicit_yes() -> None:
    settings = BrokerSettings(gateways=LOCAL, workers="tcp://0.0.0.0:*")
    with pytest.raises(UsageError, match=r"0\.0\.0\.0.*--insecure"):
        Broker(settings)
    Broker(BrokerSettings(gateways=LOCAL, workers="tcp://0.0.0.0:*", insecure=True)).close()


# The process ----------------------------------------------------------------------------------------------------------


def broker_process(*arguments: str, environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run `python -m broker` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environment or {})},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_0(number: signal.Signals) -> None:
    with started("broker", "--gateways", LOCAL, "--workers", LOCAL) as process:
        process.find("broker listening gateways=tcp://127.0.0.1:[0-9]+ workers=tcp://127.0.0.1:[0-9]+")
        process.signal(number)
        assert process.wait() == 0
        process.find("broker stopped")


def test_a_port_in_use_ends_the_process_with_1() -> None:
    with started("broker", "--gateways", LOCAL, "--workers", LOCAL) as process:
        address = process.find("gateways=(tcp://[0-9.:]+)").group(1)
        done = broker_process("--gateways", address, "--workers", LOCAL)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == f"weftline: cannot bind {address}: Address already in use. Is another process using the port?\n"
    )


def test_an_exposed_port_ends_the_process_with_2() -> None:
    done = broker_process("--gateways", "tcp://0.0.0.0:0", "--workers", LOCAL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("weftline: tcp://0.0.0.0:0 can be reached from other machines")


@pytest.mark.parametrize("argv", [("--gatewys", "x"), ("--log-level", "loud"), ("surplus",)])
def test_bad_usage_ends_the_process_with_2(argv: tuple[str, ...]) -> None:
    done = broker_process(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert argv[-1] in done.stderr or argv[0] in done.stderr


def test_a_bad_key_of_the_configuration_is_named_and_ends_the_process_with_2(tmp_path: Path) -> None:
    path = tmp_path / "weftline.toml"
    path.write_text("[broker]\nqueue_maxx = 5\n")
    for done in (broker_process("--config", str(path)), broker_process(environment={"WEFTLINE_CONFIG": str(path)})):
        assert done.returncode == 2
        assert f"{path}: [broker] has no setting 'queue_maxx'; did you mean 'queue_max'?" in done.stderr


def test_a_bad_environment_is_named_and_ends_the_process_with_2() -> None:
    done = broker_process(environment={"WEFTLINE_BROKER_ACK_S": "soon"})
    assert done.returncode == 2
    assert "WEFTLINE_BROKER_ACK_S is wrong" in done.stderr
