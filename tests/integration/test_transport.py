"""Sockets over TCP on loopback, under both event loops: nothing is lost silently, nothing blocks, nothing grows."""

import asyncio
import select
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import zmq

from common import transport
from common.errors import ProcessError
from common.process import loop_factory
from common.protocol import FRAME_BYTES_MAX
from common.transport import DRAIN_MAX, Sent, Socket

LOCAL = "tcp://127.0.0.1:*"
PATIENCE_S = 30.0

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["default", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a test's coroutine on this kind of loop, with one time-out around it."""
    factory = asyncio.new_event_loop if request.param == "default" else loop_factory()

    def run(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(test, PATIENCE_S))

    return run


class Box:
    """Collects what a socket receives, by peer, and lets a test wait for it."""

    def __init__(self) -> None:
        self.frames: dict[bytes, list[bytes]] = defaultdict(list)
        self.order: list[tuple[bytes, bytes]] = []
        self._grown = asyncio.Event()

    def __call__(self, peer: bytes, frame: bytes) -> None:
        self.frames[peer].append(frame)
        self.order.append((peer, frame))
        self._grown.set()

    async def until(self, count: int) -> list[bytes]:
        """Wait until so many frames have come, and return all."""
        while len(self.order) < count:
            self._grown.clear()
            await self._grown.wait()
        return [frame for _, frame in self.order]

    async def peer_of(self, frame: bytes) -> bytes:
        """Wait for this frame and return who sent it."""
        while not any(other == frame for _, other in self.order):
            self._grown.clear()
            await self._grown.wait()
        return next(peer for peer, other in self.order if other == frame)


async def becomes(condition: Callable[[], object]) -> None:
    """Ask again and again: libzmq's own threads tell nobody what they did. The test's time-out is the bound."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def waiting(socket: Socket) -> int:
    """Messages in all outboxes."""
    return sum(len(outbox.frames) for outbox in socket._outboxes.values())


@asynccontextmanager
async def router(address: str = LOCAL, **options: Any) -> AsyncIterator[tuple[Socket, Box, str]]:
    box = Box()
    socket = Socket("router", box, **options)
    try:
        yield socket, box, socket.bind(address)
    finally:
        socket.close()


@asynccontextmanager
async def dealer(address: str, name: bytes = b"hello") -> AsyncIterator[tuple[Socket, Box]]:
    """A connected DEALER that has said its name."""
    box = Box()
    socket = Socket("dealer", box)
    try:
        socket.connect(address)
        assert socket.send(name) is Sent.OK
        yield socket, box
    finally:
        socket.close()


@asynccontextmanager
async def raw(kind: int, address: str, **options: int) -> AsyncIterator["zmq.Socket[bytes]"]:
    """A peer that follows none of our rules; it may refuse to read."""
    socket = transport._context().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    for name, value in options.items():
        socket.setsockopt(getattr(zmq, name), value)
    try:
        socket.connect(address)
        yield socket
    finally:
        socket.close()


def test_frames_arrive_once_and_in_order_both_ways(run: Run) -> None:
    async def test() -> None:
        async with router() as (server, inbox, address), dealer(address) as (client, outbox):
            peer = await inbox.peer_of(b"hello")
            asked = [b"%d" % number for number in range(2500)]
            for frame in asked:
                assert client.send(frame) is Sent.OK
                assert server.send(frame, peer) is Sent.OK
            assert (await inbox.until(2501))[1:] == asked
            assert await outbox.until(2500) == asked
            assert waiting(server) == waiting(client) == 0

    run(test())


def test_a_burst_beyond_one_turn_arrives_whole(run: Run) -> None:
    """The descriptor is edge-triggered: what one turn leaves is announced by nobody."""

    async def test() -> None:
        async with router() as (_, inbox, address), raw(zmq.DEALER, address) as peer:
            count = 3 * DRAIN_MAX + 7
            peer.send(b"first")
            await inbox.until(1)
            for number in range(count):
                peer.send(b"%d" % number)
            assert (await inbox.until(1 + count))[1:] == [b"%d" % number for number in range(count)]

    run(test())


def test_a_batch_is_announced_after_its_frames(run: Run) -> None:
    async def test() -> None:
        seen: list[int] = []
        box = Box()
        done = asyncio.Event()

        def on_batch() -> None:
            seen.append(len(box.order))
            if len(box.order) == 10:
                done.set()

        server = Socket("router", box, on_batch=on_batch)
        try:
            async with raw(zmq.DEALER, server.bind(LOCAL)) as peer:
                for number in range(10):
                    peer.send(b"%d" % number)
                await done.wait()
        finally:
            server.close()
        assert seen[-1] == 10
        assert seen == sorted(seen)

    run(test())


def test_a_flood_does_not_keep_another_socket_from_its_turn(run: Run) -> None:
    async def test() -> None:
        turns: list[str] = []
        greeted, heard = asyncio.Event(), asyncio.Event()

        def hear(who: str, frame: bytes) -> None:
            turns.append(who)
            (heard if frame == b"y" else greeted).set()

        busy = Socket("router", lambda _, frame: hear("busy", frame))
        quiet = Socket("router", lambda _, frame: hear("quiet", frame))
        try:
            async with raw(zmq.DEALER, busy.bind(LOCAL)) as noisy, raw(zmq.DEALER, quiet.bind(LOCAL)) as calm:
                for peer in (noisy, calm):
                    peer.send(b"hello")
                    await greeted.wait()
                    greeted.clear()
                turns.clear()
                for _ in range(3 * DRAIN_MAX):
                    noisy.send(b"x")
                calm.send(b"y")
                for socket in (busy, quiet):  # both have something before either gets its turn
                    assert select.select([socket._fd], [], [], PATIENCE_S)[0]
                await heard.wait()
        finally:
            busy.close()
            quiet.close()
        assert turns.index("quiet") <= DRAIN_MAX

    run(test())


# Peers that do not read -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def stalled(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator["Stalled"]:
    """A ROUTER with a peer that does not read, so that neither libzmq nor the kernel takes another frame for it."""
    monkeypatch.setattr(transport, "OUTBOX_MESSAGES_MAX", 20)
    monkeypatch.setattr(transport, "RESERVE_MESSAGES", 5)
    inbox = Box()
    server = Socket("router", inbox, hwm=5)
    server._socket.setsockopt(zmq.SNDBUF, 4096)
    try:
        address = server.bind(LOCAL)
        async with raw(zmq.DEALER, address, RCVHWM=5, RCVBUF=4096) as mute:
            mute.send(b"I do not read")
            peer = await inbox.peer_of(b"I do not read")
            sent = unmoved = 0
            while unmoved < 40:  # nothing has left in so many attempts
                waited = waiting(server)
                while server.send(b"%06d" % sent + b"x" * 16_384, peer, droppable=True) is Sent.OK:
                    sent += 1
                unmoved = unmoved + 1 if waiting(server) == waited else 0
                await asyncio.sleep(transport.FLUSH_INTERVAL_S)
            server.discard()
            yield Stalled(server, inbox, address, peer, mute, sent - transport.OUTBOX_MESSAGES_MAX)
    finally:
        server.close()


@dataclass
class Stalled:
    server: Socket
    inbox: Box
    address: str
    peer: bytes
    mute: "zmq.Socket[bytes]"
    taken: int
    """Frames on their way, numbered from 0."""


def test_what_a_slow_peer_cannot_take_waits_and_then_follows_in_order(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with stalled(monkeypatch) as s:
            tail = [b"tail %d" % number for number in range(10)]
            for frame in tail:
                assert s.server.send(frame, s.peer) is Sent.OK
            assert waiting(s.server) == 10
            got: list[bytes] = []

            def took_all() -> bool:
                if s.mute.poll(0):
                    got.append(s.mute.recv())
                return got[-1:] == tail[-1:]

            await becomes(took_all)
            assert [int(frame[:6]) for frame in got[:-10]] == list(range(s.taken))
            assert got[-10:] == tail
            await becomes(lambda: s.server.send(b"and on", s.peer) is Sent.OK and not waiting(s.server))

    run(test())


def test_chunks_at_the_bound_are_dropped_and_do_not_cost_a_peer_its_control_frames(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with stalled(monkeypatch) as s:
            for _ in range(20):
                assert s.server.send(b"chunk", s.peer, droppable=True) is Sent.OK
            assert s.server.send(b"chunk", s.peer, droppable=True) is Sent.FULL
            for number in range(5):
                assert s.server.send(b"control %d" % number, s.peer) is Sent.OK
                assert s.server.send(b"chunk", s.peer, droppable=True) is Sent.FULL
            assert waiting(s.server) == 25
            got: list[bytes] = []

            def took_all() -> bool:
                if s.mute.poll(0):
                    got.append(s.mute.recv())
                return got[-1:] == [b"control 4"]

            await becomes(took_all)
            assert got[s.taken :] == [b"chunk"] * 20 + [b"control %d" % number for number in range(5)]

    run(test())


def test_who_cannot_take_its_control_frames_is_gone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with stalled(monkeypatch) as s:
            for _ in range(25):
                assert s.server.send(b"control", s.peer) is Sent.OK
            assert s.server.send(b"chunk", s.peer, droppable=True) is Sent.FULL
            assert s.server.send(b"control", s.peer) is Sent.GONE
            assert waiting(s.server) == 0

    run(test())


def test_the_outbox_is_bounded_in_bytes_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with stalled(monkeypatch) as s:
            monkeypatch.setattr(transport, "OUTBOX_BYTES_MAX", 20_000)
            monkeypatch.setattr(transport, "RESERVE_BYTES", 1_000)
            assert s.server.send(b"x" * 10_000, s.peer, droppable=True) is Sent.OK
            assert s.server.send(b"x" * 10_001, s.peer, droppable=True) is Sent.FULL
            assert s.server.send(b"x" * 10_000, s.peer, droppable=True) is Sent.OK
            assert s.server.send(b"x" * 1_000, s.peer) is Sent.OK
            assert s.server.send(b"x", s.peer) is Sent.GONE

    run(test())


def test_a_stalled_peer_holds_up_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with stalled(monkeypatch) as s, dealer(s.address) as (client, outbox):
            other = await s.inbox.peer_of(b"hello")
            assert s.server.send(b"stuck", s.peer) is Sent.OK
            for number in range(200):
                assert s.server.send(b"%d" % number, other) is Sent.OK
                assert client.send(b"%d" % number) is Sent.OK
                await outbox.until(number + 1)
            await s.inbox.until(202)
            assert waiting(s.server) == 1

    run(test())


def test_a_send_that_fails_does_not_swallow_the_news_of_a_frame(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """libzmq takes in what happened during any call, also one that ends in EAGAIN, and announces it no more."""

    async def test() -> None:
        async with stalled(monkeypatch) as s, raw(zmq.DEALER, s.address) as other:
            other.send(b"first")
            await s.inbox.peer_of(b"first")
            other.send(b"second")
            assert select.select([s.server._fd], [], [], PATIENCE_S)[0]
            time.sleep(0.02)  # noqa: ASYNC251 - for some 3,000,000 CPU ticks libzmq takes in nothing new
            assert s.server.send(b"too much", s.peer) is Sent.OK
            assert waiting(s.server) == 1
            await s.inbox.peer_of(b"second")

    run(test())


def test_what_waits_for_a_peer_that_left_is_let_go(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with stalled(monkeypatch) as s:
            assert s.server.send(b"too late", s.peer) is Sent.OK
            s.mute.close()
            await becomes(lambda: waiting(s.server) == 0)
            assert s.server.send(b"anyone?", s.peer) is Sent.GONE

    run(test())


def test_an_unknown_peer_is_gone_not_ignored(run: Run) -> None:
    async def test() -> None:
        async with router() as (server, _, _):
            assert server.send(b"hello?", b"\x00nope") is Sent.GONE
            assert server.send(b"hello?", b"\x00nope", droppable=True) is Sent.GONE
            assert waiting(server) == 0

    run(test())


def test_without_a_broker_a_dealer_is_offered_nothing_and_keeps_little(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "OUTBOX_MESSAGES_MAX", 2)
    monkeypatch.setattr(transport, "RESERVE_MESSAGES", 1)

    async def test() -> None:
        async with router() as (first, _, address):
            first.close()
            client = Socket("dealer", Box())
            try:
                client.connect(address)
                assert not client.offer(b"now or never")
                assert [client.send(b"later") for _ in range(4)] == [Sent.OK] * 3 + [Sent.GONE]
                assert client.send(b"later") is Sent.OK
                assert not client.offer(b"before what waits")
                client.discard()
                assert waiting(client) == 0
            finally:
                client.close()

    run(test())


# Peers that make no sense ---------------------------------------------------------------------------------------------


def test_a_message_of_several_parts_is_garbage_and_not_fatal(run: Run) -> None:
    async def test() -> None:
        async with router() as (server, inbox, address), raw(zmq.DEALER, address) as peer:
            peer.send_multipart([b"one", b"two", b"three"])
            peer.send(b"fine")
            assert await inbox.until(2) == [b"", b"fine"]
            assert not server.broken.done()

    run(test())


def test_a_peer_with_another_kind_of_socket_is_not_fatal(run: Run) -> None:
    async def test() -> None:
        async with router() as (_, inbox, address), raw(zmq.REQ, address) as asker:
            asker.send(b"a REQ puts an empty part before it")
            assert await inbox.until(1) == [b""]
            async with dealer(address):
                await inbox.peer_of(b"hello")

    run(test())


def test_an_oversize_message_costs_its_sender_the_line_and_nobody_else(run: Run) -> None:
    async def test() -> None:
        async with (
            router() as (server, inbox, address),
            dealer(address) as (client, _),
            raw(zmq.DEALER, address) as huge,
        ):
            huge.send(b"I am")
            await inbox.peer_of(b"I am")
            monitor = huge.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            huge.send(b"x" * (FRAME_BYTES_MAX + 1))
            await becomes(lambda: monitor.poll(0))
            huge.disable_monitor()
            monitor.close()
            client.send(b"still here")
            await inbox.peer_of(b"still here")
            assert max(len(frame) for _, frame in inbox.order) < 100
            assert not server.broken.done()

    run(test())


def test_the_largest_message_passes(run: Run) -> None:
    async def test() -> None:
        async with router() as (_, inbox, address), dealer(address) as (client, _):
            await inbox.peer_of(b"hello")
            client.send(b"x" * FRAME_BYTES_MAX)
            assert len((await inbox.until(2))[1]) == FRAME_BYTES_MAX

    run(test())


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x00"])
def test_bytes_that_are_no_zmtp_are_not_fatal(run: Run, noise: bytes) -> None:
    async def test() -> None:
        async with router() as (_, inbox, address):
            host, port = address.removeprefix("tcp://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(noise)
            await writer.drain()
            async with dealer(address):
                await inbox.peer_of(b"hello")
            writer.close()
            await writer.wait_closed()

    run(test())


# Breaks and ends ------------------------------------------------------------------------------------------------------


def test_a_dealer_comes_back_to_a_router_that_restarts_on_its_port(run: Run) -> None:
    async def test() -> None:
        async with router() as (server, inbox, address), dealer(address) as (client, outbox):
            before = await inbox.peer_of(b"hello")
            server.send(b"one", before)
            await outbox.until(1)
            server.close()
            await becomes(lambda: not client.offer(b"into the void"))
            async with router(address) as (again, inbox_again, _):
                client.send(b"back")
                peer = await inbox_again.peer_of(b"back")
                assert again.send(b"two", peer) is Sent.OK
                assert await outbox.until(2) == [b"one", b"two"]

    run(test())


def test_a_bug_in_the_receiver_is_told_to_the_owner(run: Run) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        reported: list[Any] = []
        loop.set_exception_handler(lambda _, context: reported.append(context.get("exception")))

        def buggy(peer: bytes, frame: bytes) -> None:
            raise KeyError("a bug of ours")

        server = Socket("router", buggy)
        try:
            async with dealer(server.bind(LOCAL)):
                with pytest.raises(KeyError, match="a bug of ours"):
                    await server.broken
        finally:
            server.close()
        assert [type(error) for error in reported] == [KeyError]

    run(test())


def test_closing_ends_everything_at_once_and_twice_is_once(run: Run) -> None:
    async def test() -> None:
        box = Box()
        server = Socket("router", box)
        server.bind(LOCAL)
        server.close()
        server.close()
        assert server.broken.cancelled()

    run(test())


def test_a_receiver_may_close_its_socket(run: Run) -> None:
    async def test() -> None:
        heard: list[bytes] = []
        closed = asyncio.Event()

        def hear(peer: bytes, frame: bytes) -> None:
            heard.append(frame)
            server.close()
            closed.set()

        server = Socket("router", hear)
        async with raw(zmq.DEALER, server.bind(LOCAL)) as peer:
            assert peer.poll(5000, zmq.POLLOUT)
            for frame in (b"last", b"never heard"):
                peer.send(frame)
            await closed.wait()
        assert heard == [b"last"]

    run(test())


def test_a_port_in_use_is_a_sentence(run: Run) -> None:
    async def test() -> None:
        async with router() as (_, _, address):
            with pytest.raises(ProcessError, match=rf"cannot bind {address}: .*another process using the port\?"):
                async with router(address):
                    pass

    run(test())


@pytest.mark.parametrize("address", ["tcp://203.0.113.7:0", "tcp://127.0.0.1", "nonsense"])
def test_an_address_that_cannot_be_bound_is_a_sentence(run: Run, address: str) -> None:
    async def test() -> None:
        with pytest.raises(ProcessError, match=f"cannot bind {address}: ") as caught:
            async with router(address):
                pass
        assert "another process" not in str(caught.value)

    run(test())


def test_an_address_that_cannot_be_dialled_is_a_sentence(run: Run) -> None:
    async def test() -> None:
        with pytest.raises(ProcessError, match="tcp://HOST:PORT"):
            async with dealer("not an address"):
                pass

    run(test())


def test_ipv6_works_where_the_machine_has_it(run: Run) -> None:
    async def test() -> None:
        try:
            async with router("tcp://[::1]:*") as (_, inbox, address), dealer(address):
                await inbox.peer_of(b"hello")
        except ProcessError as error:
            pytest.skip(str(error))

    run(test())


def test_a_line_that_a_frame_too_large_ended_can_be_dialled_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        with monkeypatch.context() as small:
            small.setattr(transport, "FRAME_BYTES_MAX", 1000)
            inbox, heard = Box(), Box()
            client = Socket("dealer", heard)
        server = Socket("router", inbox)
        try:
            client.connect(server.bind(LOCAL))
            client.send(b"hello")
            await inbox.until(1)
            [(peer, _)] = inbox.order
            server.send(b"x" * 2000, peer)
            server.send(b"never read", peer)
            while server.send(b"gone?", peer) is not Sent.GONE:  # noqa: ASYNC110 - libzmq tells nobody
                await asyncio.sleep(0.01)
            client.dial_again()
            client.send(b"hello again")
            await inbox.until(2)
            server.send(b"welcome", inbox.order[1][0])
            assert await heard.until(1) == [b"welcome"]
        finally:
            client.close()
            server.close()

    run(test())
