"""The hardened protocols over real sockets: hostile and slow peers on one side, a recording application behind."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from gateway import protocols as module
from gateway.protocols import DefendedHttpProtocol, DefendedWebSocketProtocol, Limits, listener, protocols

App = Callable[[Any, Any, Any], Awaitable[None]]
P = TypeVar("P")
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
PATIENT = 3600.0  # a bound that must not be what ends a test


pytestmark = pytest.mark.timeout(30)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what shows only in the server's state."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


class Served:
    """A server on a free port, and what its connections are."""

    def __init__(self, port: int, state: ServerState) -> None:
        self.port = port
        self.state = state

    async def websocket(self) -> DefendedWebSocketProtocol:
        """The one WebSocket there is."""
        return await self._only(DefendedWebSocketProtocol)

    async def http(self) -> DefendedHttpProtocol:
        """The one HTTP connection there is."""
        return await self._only(DefendedHttpProtocol)

    async def _only(self, kind: type[P]) -> P:
        await until(lambda: any(isinstance(connection, kind) for connection in self.state.connections))
        (connection,) = self.state.connections
        assert isinstance(connection, kind)
        return connection

    async def emptied(self) -> None:
        await until(lambda: not self.state.connections)


@contextlib.asynccontextmanager
async def serving(app: App, **limits: Any) -> AsyncIterator[Served]:
    limits = {
        "stall_s": PATIENT,
        "request_s": PATIENT,
        "ping_interval_s": PATIENT,
        "stranger_bytes_max": 2**24,
    } | limits
    websocket, http = protocols(Limits(**limits))
    config = uvicorn.Config(app, http=http, ws=websocket, lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    sock = listener("127.0.0.1", 0)
    server = await asyncio.get_running_loop().create_server(
        lambda: http(config=config, server_state=state, app_state={}), sock=sock
    )
    served = Served(sock.getsockname()[1], state)
    try:
        yield served
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await served.emptied()
        await asyncio.gather(*state.tasks, return_exceptions=True)


class Recorder:
    """An application that accepts and records what it gets; `ended` is the disconnect's code."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] != "websocket.disconnect":
            self.messages.put_nowait(message.get("text", message.get("bytes")))
        self.ended.set_result(int(message["code"]))


class Peer:
    """A client of raw bytes that reads only when told."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()

    async def send(self, *parts: bytes) -> None:
        await self.loop.sock_sendall(self.sock, b"".join(parts))

    async def read(self, most: int = 65536) -> bytes:
        """Something, or nothing when the server has closed or reset the connection."""
        try:
            return await self.loop.sock_recv(self.sock, most)
        except ConnectionError:
            return b""

    async def read_exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = await self.read(length - len(data))
            assert more, "closed early"
            data += more
        return data

    async def read_all(self) -> bytes:
        data = b""
        while more := await self.read():
            data += more
        return data

    async def read_frame(self) -> tuple[int, bytes]:
        opcode, length = await self.read_exactly(2)
        if length == 126:
            (length,) = struct.unpack("!H", await self.read_exactly(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", await self.read_exactly(8))
        return opcode & 15, await self.read_exactly(length)

    async def upgrade(self, headers: str = "") -> bytes:
        await self.send(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + headers.encode() + b"\r\n"
        )
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            byte = await self.read(1)
            if not byte:
                break
            answer += byte
        return answer


@contextlib.asynccontextmanager
async def peer(served: Served, *, upgraded: bool = True, buffer: int | None = None) -> AsyncIterator[Peer]:
    with socket.socket() as sock:
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
        raw = Peer(sock)
        if upgraded:
            assert (await raw.upgrade()).startswith(b"HTTP/1.1 101 ")
        yield raw


def frame(opcode: int, data: bytes = b"", *, fin: bool = True, masked: bool = True) -> bytes:
    length = len(data)
    size = (
        bytes([length])
        if length < 126
        else b"\x7e" + struct.pack("!H", length)
        if length < 65536
        else b"\x7f" + struct.pack("!Q", length)
    )
    if not masked:
        return bytes([fin << 7 | opcode]) + size + data
    # A mask of zeros is a mask.
    return bytes([fin << 7 | opcode, size[0] | 0x80]) + size[1:] + bytes(4) + data


def close_code(answer: tuple[int, bytes]) -> int:
    assert answer[0] == CLOSE
    return int.from_bytes(answer[1][:2], "big")


@pytest.fixture
def largest_buffer(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of the write buffer after each write of the server."""
    sizes: list[int] = []
    write = module._Watched.write

    def recorded(self: Any, data: bytes) -> None:
        write(self, data)
        sizes.append(self.get_write_buffer_size())

    monkeypatch.setattr(module._Watched, "write", recorded)
    return sizes


# What works as before


async def test_messages_pass_both_ways() -> None:
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({**message, "type": "websocket.send"})

    async with serving(echo) as served, connect(f"ws://127.0.0.1:{served.port}/") as client:
        for message in ("", "grüße", b"", b"\xff" * 125, b"x" * 126, b"x" * 65535, "y" * 1_000_000):
            await client.send(message)
            assert await client.recv() == message
        assert client.protocol.extensions == []


async def test_a_batch_is_one_write_and_many_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [b"x" * length for length in (0, 1, 125, 126, 65535, 65536)]
    offered: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        offered.append(scope["extensions"])
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "batch": texts})
        await send({"type": "websocket.send", "batch": []})
        await send({"type": "websocket.send", "batch": [b"\xff", b"\xfe"], "binary": True})
        await receive()

    writes: list[bytes] = []
    write = module._Watched.write

    def recorded(self: Any, data: bytes) -> None:
        writes.append(data)
        write(self, data)

    monkeypatch.setattr(module._Watched, "write", recorded)
    async with serving(app) as served, connect(f"ws://127.0.0.1:{served.port}/") as client:
        assert [await client.recv() for _ in texts] == [text.decode() for text in texts]
        assert [await client.recv() for _ in range(2)] == [b"\xff", b"\xfe"]
    assert "weftline.batch" in offered[0]
    assert [len(data) for data in writes[1:4]] == [sum(map(len, texts)) + 3 * 2 + 2 * 4 + 10, 0, 2 * 3]


async def test_a_server_of_uvicorn_runs_on_the_classes() -> None:
    websocket, http = protocols(Limits())
    app = Recorder()
    server = uvicorn.Server(
        uvicorn.Config(app, http=http, ws=websocket, lifespan="off", log_config=None, timeout_graceful_shutdown=5)
    )
    sock = listener("127.0.0.1", 0)
    with contextlib.closing(sock):
        task = asyncio.create_task(server._serve([sock]))
        async with connect(f"ws://127.0.0.1:{sock.getsockname()[1]}/") as client:
            await client.send("hello")
            assert await app.messages.get() == "hello"
            server.should_exit = True
            with pytest.raises(ConnectionClosed):
                await client.recv()
            assert client.close_code == 1012
        await task


@pytest.mark.parametrize(("last", "code"), [(frame(CLOSE, b"\x03\xe8"), 1000), (frame(CLOSE), 1005), (b"", 1006)])
async def test_the_application_learns_how_the_peer_left(last: bytes, code: int) -> None:
    app = Recorder()
    async with serving(app) as served:
        async with peer(served) as client:
            await client.send(last)
            client.sock.shutdown(socket.SHUT_WR)
            await client.read_all()
        assert await app.ended == code


# Peers that do not read


async def test_a_peer_that_never_reads_is_cut() -> None:
    ended = asyncio.get_running_loop().create_future()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        with contextlib.suppress(OSError):
            while True:
                await send({"type": "websocket.send", "batch": [b"x" * 1000] * 16})
        ended.set_result((await receive())["code"])

    async with serving(app, stall_s=0.2) as served, peer(served, buffer=4096):
        assert await ended == 1006
        await served.emptied()


async def test_a_slow_peer_that_reads_is_kept() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        with contextlib.suppress(OSError):
            while True:
                await send({"type": "websocket.send", "bytes": bytes(16384)})

    async with serving(app) as served, peer(served, buffer=4096) as client:
        protocol = await served.websocket()
        await until(lambda: not protocol.writable.is_set())
        out = protocol._out
        for _ in range(5):
            flushed = out.flushed
            while out.flushed == flushed:
                await client.read()
                await asyncio.sleep(0)
            out._judge()
            assert not out.is_closing()
        out._judge()
        assert out.is_closing()


async def test_a_stream_over_http_that_is_never_read_is_cut() -> None:
    ended = asyncio.get_running_loop().create_future()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        disconnect = asyncio.ensure_future(receive())
        while not disconnect.done():
            await send({"type": "http.response.body", "body": bytes(16384), "more_body": True})
            await asyncio.sleep(0)
        ended.set_result((await disconnect)["type"])

    async with serving(app, stall_s=0.2) as served, peer(served, upgraded=False, buffer=4096) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await ended == "http.disconnect"
        await served.emptied()


async def fill(served: Served, send: Any) -> None:
    """Send until something waits in the transport, less than would pause writing."""
    protocol = await served.websocket()
    while protocol._out.get_write_buffer_size() == 0:
        await send({"type": "websocket.send", "bytes": bytes(1000)})
    assert protocol.writable.is_set()


async def test_a_close_that_the_peer_does_not_read_ends() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await fill(served, send)

    async with serving(app, stall_s=0.2) as served, peer(served, buffer=4096):
        await served.emptied()


async def test_a_server_can_shut_down_while_a_close_is_under_way() -> None:
    filled = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await fill(served, send)
        filled.set()
        assert (await receive())["code"] == 1000

    async with serving(app) as served, peer(served, buffer=4096) as client:
        protocol = await served.websocket()
        await filled.wait()
        await client.send(frame(CLOSE, b"\x03\xe8"))
        await until(protocol.transport.is_closing)
        protocol.shutdown()
        await client.read_all()
        await served.emptied()


async def test_sending_after_a_failure_says_that_the_peer_has_gone() -> None:
    raised: asyncio.Future[type[BaseException]] = asyncio.get_running_loop().create_future()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await fill(served, send)
        await receive()
        try:
            await send({"type": "websocket.send", "text": "late"})
        except OSError as error:
            raised.set_result(type(error))

    async with serving(app) as served, peer(served, buffer=4096) as client:
        await client.send(frame(TEXT, b"\xff"))
        assert (await raised).__name__ == "ClientDisconnected"


# Floods


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_a_flood_of_control_frames_is_closed(opcode: int, largest_buffer: list[int]) -> None:
    app = Recorder()
    async with serving(app, control_burst=50, control_per_s=0.001, stall_s=0.2) as served:
        async with peer(served, buffer=4096) as client:
            with contextlib.suppress(ConnectionError):
                await client.send(frame(opcode, bytes(125)) * 10_000)
            assert await app.ended == 1008
            await served.emptied()
        assert max(largest_buffer) < 65536


async def test_pongs_to_a_peer_that_does_not_read_do_not_pile_up(largest_buffer: list[int]) -> None:
    app = Recorder()
    async with serving(app, control_burst=10**9, stall_s=0.5) as served:
        async with peer(served, buffer=4096) as client:
            with contextlib.suppress(ConnectionError):
                while not app.ended.done():
                    await client.send(frame(PING, bytes(125)) * 1000)
            assert await app.ended == 1006
        assert max(largest_buffer) < 128 * 1024


async def test_the_latest_ping_is_answered_when_the_peer_reads_again() -> None:
    app = Recorder()
    async with serving(app, control_burst=10**9) as served, peer(served, buffer=4096) as client:
        protocol = await served.websocket()
        number = 0
        while protocol.writable.is_set() or protocol._pong is None:
            number += 1
            await client.send(frame(PING, b"%125d" % number))
            await asyncio.sleep(0)
        await client.send(frame(TEXT, b"all sent"))
        await app.messages.get()
        opcode, data = await client.read_frame()
        while opcode == PONG and int(data) < number:
            opcode, data = await client.read_frame()
        assert (opcode, int(data)) == (PONG, number)


async def test_a_flood_of_tiny_fragments_is_closed() -> None:
    app = Recorder()
    async with serving(app, control_burst=50, control_per_s=0.001) as served, peer(served) as client:
        await client.send(frame(TEXT, b"a", fin=False), frame(CONT, fin=False) * 100)
        assert close_code(await client.read_frame()) == 1008
        assert await app.ended == 1008


async def test_unread_messages_wait_as_bytes_and_keep_their_order() -> None:
    go = asyncio.Event()
    got: asyncio.Queue[str] = asyncio.Queue()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await go.wait()
        while (message := await receive())["type"] == "websocket.receive":
            got.put_nowait(message["text"])

    count = 20_000
    async with serving(app) as served, peer(served) as client:
        protocol = await served.websocket()
        sending = asyncio.create_task(client.send(*(frame(TEXT, b"%d" % number) for number in range(count))))
        await until(lambda: protocol.read_paused)
        assert protocol.queue.qsize() <= module.SLICE // 7
        go.set()
        assert [int(await got.get()) for _ in range(count)] == list(range(count))
        await sending


async def test_a_closing_application_still_sees_the_peers_close_behind_unread_messages() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        await send({"type": "websocket.close", "code": 1008})

    async with serving(app) as served, peer(served) as client:
        (await served.websocket()).close_timeout = PATIENT
        await client.send(frame(TEXT, b"hello") * 1000, frame(CLOSE, b"\x03\xe8"))
        assert close_code(await client.read_frame()) == 1008
        await served.emptied()


# Wrong frames


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(frame(TEXT, b"\xff"), 1007, id="invalid UTF-8"),
        pytest.param(frame(TEXT, b"\xc3", fin=False) + frame(CONT, b"("), 1007, id="invalid UTF-8 in fragments"),
        pytest.param(frame(CLOSE, b"\x03\xe8\xff"), 1007, id="invalid UTF-8 in a close"),
        pytest.param(frame(BINARY, bytes(1001)), 1009, id="too long"),
        pytest.param(frame(BINARY, bytes(600), fin=False) + frame(CONT, bytes(600)), 1009, id="too long in fragments"),
        pytest.param(b"\x82\xff" + b"\x7f" + b"\xff" * 7 + bytes(4), 1009, id="an announced 2^63 bytes"),
        pytest.param(frame(TEXT, b"hi", masked=False), 1002, id="unmasked"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 1002, id="not WebSocket"),
        pytest.param(frame(CONT, b"x"), 1002, id="continuation of nothing"),
        pytest.param(frame(TEXT, b"x", fin=False) + frame(TEXT, b"y"), 1002, id="message within a message"),
        pytest.param(frame(PING, bytes(126)), 1002, id="long ping"),
        pytest.param(frame(PING, fin=False), 1002, id="fragmented ping"),
        pytest.param(b"\xc1" + frame(TEXT, b"x")[1:], 1002, id="compressed, not agreed"),
        pytest.param(frame(CLOSE, b"\x03"), 1002, id="half a close code"),
    ],
)
async def test_a_wrong_frame_is_answered_with_its_code(sent: bytes, code: int) -> None:
    app = Recorder()
    async with serving(app, message_bytes_max=1000) as served, peer(served) as client:
        await client.send(sent)
        assert close_code(await client.read_frame()) == code
        assert await client.read() == b""
        assert await app.ended == code
        assert app.messages.empty()


async def test_a_wrong_message_with_a_close_behind_it_raises_nothing() -> None:
    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    app = Recorder()
    async with serving(app) as served, peer(served) as client:
        await client.send(frame(TEXT, b"\xff"), frame(CLOSE, b"\x03\xe8"))
        assert close_code(await client.read_frame()) == 1000
        assert await app.ended == 1007
        await served.emptied()
    assert raised == []


async def test_fragments_are_joined_with_pings_between() -> None:
    app = Recorder()
    async with serving(app) as served, peer(served) as client:
        text = "grüße, " * 20_000
        pieces = [text.encode()[start : start + 20] for start in range(0, len(text.encode()), 20)]
        assert len(pieces) > 4096
        await client.send(frame(TEXT, pieces[0], fin=False), frame(PING, b"p"))
        await client.send(*(frame(CONT, piece, fin=False) for piece in pieces[1:]), frame(CONT))
        assert await app.messages.get() == text
        assert await client.read_frame() == (PONG, b"p")
        await client.send(frame(BINARY, b"\xff", fin=False), frame(CONT, b"\xfe"))
        message = await app.messages.get()
        assert message == b"\xff\xfe"
        assert type(message) is bytes


# Keepalive


async def test_a_peer_without_pongs_is_cut() -> None:
    app = Recorder()
    async with serving(app, ping_interval_s=0.05, ping_timeout_s=0.05) as served, peer(served):
        assert await app.ended == 1006


async def test_an_idle_peer_with_pongs_outlives_the_bounds_of_a_request() -> None:
    app = Recorder()
    limits = {"ping_interval_s": 0.05, "ping_timeout_s": PATIENT, "request_s": 0.1}
    async with serving(app, **limits) as served, peer(served) as client:
        for _ in range(5):
            opcode, data = await client.read_frame()
            assert opcode == PING
            await client.send(frame(PONG, data))
        await client.send(frame(TEXT, b"still here"))
        assert await app.messages.get() == "still here"


async def test_a_pong_the_application_keeps_waiting_is_not_missed() -> None:
    read = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await read.wait()
        while (await receive())["type"] != "websocket.disconnect":
            pass

    async with serving(app, ping_timeout_s=PATIENT) as served, peer(served) as client:
        protocol = await served.websocket()
        protocol.send_keepalive_ping()
        _, data = await client.read_frame()
        await client.send(frame(TEXT, b"busy") * 10_000, frame(PONG, data))
        await until(lambda: protocol.read_paused)
        for _ in range(3):
            protocol.keepalive_timeout()
            assert not protocol.transport.is_closing()
        read.set()
        await until(lambda: protocol.pong_timer is None)


async def test_a_missing_pong_behind_a_long_message_is_waited_for() -> None:
    app = Recorder()
    async with serving(app, ping_timeout_s=PATIENT) as served, peer(served) as client:
        protocol = await served.websocket()
        before = protocol._received
        message = frame(BINARY, bytes(100_000))

        async def arrives(start: int, end: int) -> None:
            await client.send(message[start:end])
            await until(lambda: protocol._received == before + end)

        protocol.send_keepalive_ping()
        for start in range(0, 60_000, 20_000):
            await arrives(start, start + 20_000)
            protocol.keepalive_timeout()
            assert not protocol.transport.is_closing()
        protocol.keepalive_timeout()
        assert protocol.transport.is_closing()


# HTTP requests that do not end


async def ok(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize(
    "half",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HT", id="a request line"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\nX-", id="a header"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf", id="a body"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", id="chunks"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET", id="a second request"),
        pytest.param(b"\r\n\r\n", id="empty lines"),
    ],
)
async def test_half_a_request_is_cut(half: bytes) -> None:
    async with serving(ok, request_s=0.2) as served, peer(served, upgraded=False) as client:
        await client.send(half)
        answer = await client.read_all()
        assert answer.count(b"200 OK") == half.endswith(b"GET")
        await served.emptied()


async def test_a_slow_upload_is_kept_while_its_bytes_come() -> None:
    async with serving(ok, body_bytes_per_s=1.0) as served, peer(served, upgraded=False) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n" + bytes(1000))
        protocol = await served.http()
        await until(lambda: protocol._body_bytes == 1000)
        protocol._since -= PATIENT + 900  # it began so long ago; 1,000 bytes are worth 1,000 s more
        protocol._overdue()
        assert not protocol.transport.is_closing()
        protocol._since -= 200
        protocol._overdue()
        assert protocol.transport.is_closing()


async def test_an_upload_that_came_fast_is_not_kept_for_long_when_it_stops() -> None:
    async with serving(ok, body_bytes_per_s=1.0, body_credit_s=60.0) as served, peer(served, upgraded=False) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n" + bytes(1000))
        protocol = await served.http()
        await until(lambda: protocol._body_bytes == 1000)
        protocol._since -= PATIENT
        protocol._overdue()
        assert not protocol.transport.is_closing()
        protocol._since -= 61  # of 1,000 s it had to come, this many are left
        protocol._overdue()
        assert protocol.transport.is_closing()


async def test_an_upload_the_application_is_slow_to_take_is_kept() -> None:
    go = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await ok(scope, receive, send)

    async with serving(slow) as served, peer(served, upgraded=False) as client:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        sending = asyncio.create_task(client.send(head, bytes(1_000_000)))
        protocol = await served.http()
        await until(lambda: protocol.flow and protocol.flow.read_paused)
        protocol._since -= 1000 * PATIENT
        protocol._overdue()
        go.set()
        await sending
        assert (await client.read()).startswith(b"HTTP/1.1 200 OK")


async def test_a_body_after_its_answer_is_not_read_for_ever() -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with serving(refuse, request_s=0.2) as served, peer(served, upgraded=False) as client:
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await client.read()).startswith(b"HTTP/1.1 413")
        with contextlib.suppress(ConnectionError):
            while True:
                await client.send(b"1000\r\n", bytes(4096), b"\r\n")
        await served.emptied()


async def test_a_long_answer_is_not_a_long_request() -> None:
    finish = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await finish.wait()
        await ok(scope, receive, send)

    async with serving(slow) as served, peer(served, upgraded=False) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        protocol = await served.http()
        await until(lambda: protocol._timer is None)
        await client.send(b"\r\n")
        await until(lambda: protocol._timer is not None)
        protocol._since -= 2 * PATIENT
        protocol._overdue()
        finish.set()
        assert (await client.read()).startswith(b"HTTP/1.1 200 OK")


async def test_an_endless_head_is_refused() -> None:
    async with serving(ok, head_bytes_max=10_000) as served, peer(served, upgraded=False) as client:
        await client.send(b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 20_000)
        assert (await client.read_all()).startswith(b"HTTP/1.1 431 ")


async def test_a_head_too_large_for_the_websocket_parser_is_refused() -> None:
    async with serving(Recorder()) as served, peer(served, upgraded=False) as client:
        answer = await client.upgrade("".join(f"X-{number}: x\r\n" for number in range(200)))
        assert answer.startswith(b"HTTP/1.1 431 ")
        await served.emptied()


async def test_a_handshake_the_application_does_not_finish_is_cut() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["type"] == "websocket.disconnect"

    async with serving(app, request_s=0.2) as served, peer(served, upgraded=False) as client:
        assert await client.upgrade() == b""
        await served.emptied()


async def test_every_pipelined_request_learns_of_the_disconnect() -> None:
    gone: asyncio.Queue[str] = asyncio.Queue()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        gone.put_nowait((await receive())["type"])

    async with serving(app) as served:
        async with peer(served, upgraded=False) as client:
            await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
            protocol = await served.http()
            await until(lambda: protocol.pipeline)
        assert await gone.get() == "http.disconnect"
        await served.emptied()


async def test_a_pile_of_pipelined_requests_is_cut() -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving(never, pipeline_max=4) as served, peer(served, upgraded=False) as client:
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        assert await client.read() == b""
        await served.emptied()


# The listener


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    with contextlib.closing(listener("127.0.0.1", 0)) as sock:
        yield sock


def test_a_port_in_use_is_an_error_for_the_caller(bound: socket.socket) -> None:
    with pytest.raises(OSError, match=os.strerror(98)):
        listener("127.0.0.1", bound.getsockname()[1])


def test_the_send_buffer_stays_small(bound: socket.socket) -> None:
    # Linux doubles what it is asked for.
    with socket.create_connection(bound.getsockname()):
        bound.setblocking(True)
        accepted, _ = bound.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * module.SEND_BUFFER_BYTES
