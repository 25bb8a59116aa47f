"""The worker's HTTP over real sockets: what it hands on, what it keeps, what it calls broken."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from workers.http import HEAD_BYTES_MAX, BrokenError, Connection, HttpClient, RequestError

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


class Heard:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.status = 0
        self.content_type = ""
        self.pieces: list[bytes] = []
        self.connection: Connection | None = None
        self.arrived = asyncio.Event()
        self.pause_at_once = False

    def head(self, status: int, content_type: str, connection: Connection) -> None:
        self.status, self.content_type, self.connection = status, content_type, connection

    def body(self, data: bytes) -> None:
        self.pieces.append(data)
        self.arrived.set()
        if self.pause_at_once:
            assert self.connection is not None
            self.connection.pause()

    @property
    def text(self) -> bytes:
        return b"".join(self.pieces)


@asynccontextmanager
async def engine(peer: Peer) -> AsyncIterator[HttpClient]:
    """A client of a server that does what `peer` says with each connection."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/prefix/", 5.0)
    try:
        yield client
    finally:
        client.close()
        server.close()


async def request(reader: asyncio.StreamReader) -> bytes:
    """Read a request whose body is b"body"."""
    return await reader.readuntil(b"\r\n\r\nbody")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def post(client: HttpClient, heard: Heard) -> None:
    await client.request("POST", "/api/generate", b"body", heard)


async def test_a_request_says_what_engines_expect_and_lines_come_as_they_were_sent() -> None:
    requests: list[bytes] = []

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await request(reader))
        writer.write(CHUNKED + chunk(b"one\n") + chunk(b"two\n") + b"0\r\n\r\n")
        await reader.read()

    async with engine(peer) as client:
        heard = Heard()
        await post(client, heard)
    assert (heard.status, heard.content_type) == (200, "application/x-ndjson")
    assert heard.pieces == [b"one\ntwo\n"], "what was read together is handed on together"
    head = requests[0].split(b"\r\n")
    assert head[0] == b"POST /prefix/api/generate HTTP/1.1"
    assert {b"content-type: application/json", b"accept-encoding: identity", b"content-length: 4"} <= set(head)


async def test_a_connection_is_kept_for_the_next_request() -> None:
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await request(reader)
            writer.write(OK + b"content-length: 2\r\n\r\nok")

    async with engine(peer) as client:
        for _ in range(3):
            heard = Heard()
            await post(client, heard)
            assert heard.text == b"ok"
    assert connections == 1


async def test_an_engine_that_closes_between_requests_is_dialled_again() -> None:
    """Also when its close crosses the next request: nothing was answered, so nothing was begun."""
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request(reader)
        writer.write(OK + b"content-length: 2\r\n\r\nok")
        if connections == 1:
            await request(reader)  # the second request is read, and not answered

    async with engine(peer) as client:
        for _ in range(2):
            heard = Heard()
            await post(client, heard)
            assert heard.text == b"ok"
    assert connections == 2


async def test_a_body_may_end_with_the_connection() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(OK + b"\r\nall of it")

    async with engine(peer) as client:
        heard = Heard()
        await post(client, heard)
        assert heard.text == b"all of it"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed the connection"),
        (CHUNKED + chunk(b"half"), "closed the connection"),
        (OK + b"content-length: 10\r\n\r\nhalf", "closed the connection"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (CHUNKED + b"zz\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"x" * (HEAD_BYTES_MAX + 200_000), "a head or trailer of more than"),
    ],
)
async def test_what_is_no_complete_answer_is_broken(answer: bytes, words: str) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer)
        await writer.drain()

    async with engine(peer) as client:
        with pytest.raises(BrokenError, match=words):
            await post(client, Heard())


class Buggy(Heard):
    """A sink that raises `error` when it hears `at`."""

    def __init__(self, at: str, error: Exception) -> None:
        super().__init__()
        self._at, self._error = at, error

    def head(self, status: int, content_type: str, connection: Connection) -> None:
        super().head(status, content_type, connection)
        if self._at == "head":
            raise self._error

    def body(self, data: bytes) -> None:
        super().body(data)
        if self._at == "body":
            raise self._error


@pytest.mark.parametrize("at", ["head", "body"])
@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("a bug")])
@pytest.mark.parametrize("kept", [False, True])
async def test_a_bug_in_the_sink_comes_out_as_itself(at: str, error: Exception, kept: bool) -> None:
    """Taken for a broken connection, the request would be tried elsewhere, and the bug with it."""
    left = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if kept:
            await request(reader)
            writer.write(OK + b"content-length: 2\r\n\r\nok")
        await request(reader)
        writer.write(CHUNKED + chunk(b"line\n"))
        assert await reader.read() == b""
        left.set()

    async with engine(peer) as client:
        if kept:
            await post(client, Heard())
        with pytest.raises(type(error)) as caught:
            await post(client, Buggy(at, error))
        assert caught.value is error
        assert not isinstance(error, RequestError)
        await left.wait()  # and the engine works for nobody


async def test_nobody_there_is_broken() -> None:
    async with engine(lambda *_: asyncio.sleep(0)) as client:
        pass
    with pytest.raises(BrokenError):
        await post(client, Heard())


@pytest.mark.parametrize(("method", "path"), [("POST", "api"), ("POST", "/a b"), ("POST", "/\r\nx: y"), ("P OST", "/")])
async def test_nothing_can_be_smuggled_into_the_request_line(method: str, path: str) -> None:
    async with engine(lambda *_: asyncio.sleep(0)) as client:
        with pytest.raises(RequestError, match="not "):
            await client.request(method, path, b"", Heard())


async def test_cancelling_closes_the_connection() -> None:
    left = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED + chunk(b"line\n"))
        assert await reader.read() == b""
        left.set()

    async with engine(peer) as client:
        heard = Heard()
        task = asyncio.create_task(post(client, heard))
        await heard.arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await left.wait()


async def test_a_paused_connection_reads_on_when_told_and_can_be_kept() -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request(reader)
            writer.write(CHUNKED + chunk(b"first"))
            await reader.readexactly(1)
            writer.write(chunk(b"second") + b"0\r\n\r\n")

    async with engine(peer) as client:
        for _ in range(2):
            heard = Heard()
            heard.pause_at_once = True
            task = asyncio.create_task(post(client, heard))
            await heard.arrived.wait()
            assert heard.connection is not None
            heard.connection._transport.write(b"!")
            heard.arrived.clear()
            heard.connection.resume()
            await task
            assert heard.pieces == [b"first", b"second"]


# Bodies in parts, and answers without one -----------------------------------------------------------------------------


class Flow:
    """A body of `count` parts of `size` bytes; remembers how many were taken. `held`: the rest does not come."""

    def __init__(self, count: int, size: int, *, held: int | None = None) -> None:
        self.size = count * size
        self.asked = 0
        self.were_taken = 0
        self._part = b"x" * size
        self._held = held
        self.waits = asyncio.Event()

    async def next(self) -> bytes:
        if self.asked == self._held:
            self.waits.set()
            await asyncio.Event().wait()
        self.asked += 1
        return self._part

    def taken(self) -> None:
        self.were_taken += 1


def length(head: bytes) -> int:
    [value] = [line for line in head.split(b"\r\n") if line.startswith(b"content-length: ")]
    return int(value.removeprefix(b"content-length: "))


async def test_a_body_in_parts_goes_as_fast_as_the_engine_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, full = asyncio.Event(), asyncio.Event()
    pause_writing = Connection.pause_writing

    def pause(connection: Connection) -> None:
        pause_writing(connection)
        full.set()

    monkeypatch.setattr(Connection, "pause_writing", pause)
    size = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal size
        size = length(await reader.readuntil(b"\r\n\r\n"))
        await reads.wait()
        await reader.readexactly(size)
        writer.write(OK + b"content-length: 2\r\n\r\nok")

    async with engine(peer) as client:
        heard, flow = Heard(), Flow(100, 2**20)
        posting = asyncio.create_task(client.request("POST", "/api/chat", flow, heard))
        await full.wait()
        assert flow.asked == flow.were_taken + 1 < 100, "the engine reads nothing, and its socket holds little"
        reads.set()
        await posting
    assert (heard.text, size, flow.were_taken) == (b"ok", 100 * 2**20, 100)


async def test_a_connection_is_kept_after_a_body_in_parts() -> None:
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await reader.readexactly(length(await reader.readuntil(b"\r\n\r\n")))
            writer.write(OK + b"content-length: 2\r\n\r\nok")

    async with engine(peer) as client:
        await client.request("POST", "/api/chat", Flow(3, 10), Heard())
        await post(client, Heard())
        assert connections == 1
        await client.request("POST", "/api/chat", Flow(3, 10), Heard())
        assert connections == 2, "on a kept one it could break, and its parts are gone"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno", b""])
async def test_an_engine_need_not_read_a_body_to_its_end(answer: bytes) -> None:
    left = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(length(await reader.readuntil(b"\r\n\r\n")) // 2)
        writer.write(answer)
        if answer:
            assert await reader.read() == b""
        left.set()

    async with engine(peer) as client:
        heard, flow = Heard(), Flow(10, 10, held=5)
        posting = asyncio.create_task(client.request("POST", "/api/chat", flow, heard))
        await flow.waits.wait()
        if answer:
            await posting
            assert (heard.status, heard.text) == (413, b"no")
        else:
            with pytest.raises(BrokenError):
                await posting
        await left.wait()


async def test_a_bug_in_what_brings_the_parts_comes_out_as_itself() -> None:
    class Broken(Flow):
        async def next(self) -> bytes:
            raise KeyError("a bug")

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with engine(peer) as client:
        with pytest.raises(KeyError):
            await client.request("POST", "/api/chat", Broken(1, 1), Heard())


@pytest.mark.parametrize("more", [b"", b"content-length: 70\r\n"])
async def test_an_answer_to_head_has_no_body_whatever_it_says(more: bytes) -> None:
    left = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\n%b\r\n" % more)
        assert await reader.read() == b""
        left.set()

    async with engine(peer) as client:
        heard = Heard()
        await client.request("HEAD", "/api/blobs/x", b"", heard)
        assert (heard.status, heard.pieces) == (404, [])
        await left.wait()
