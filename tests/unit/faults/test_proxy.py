"""The proxy does to a line what it says, and nothing while it is not told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.faults.proxy import HELD_BYTES_MAX, Proxy, proxied

SOON_S = 0.2
"""Long enough for loopback to bring what is coming."""


class Echo:
    """A server that sends back what it gets and knows how its connections ended."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.grown = asyncio.Event()
        self.ends: asyncio.Queue[type[BaseException] | None] = asyncio.Queue(100)
        self.reading = asyncio.Event()
        self.reading.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end: type[BaseException] | None = None
        try:
            while data := await reader.read(65536):
                self.got += data
                self.grown.set()
                await self.reading.wait()
                writer.write(data)
        except ConnectionError as error:
            end = type(error)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            self.ends.put_nowait(end)

    async def until(self, size: int) -> None:
        while len(self.got) < size:
            self.grown.clear()
            await self.grown.wait()


class Line:
    """An echo server behind a proxy, and one connection to it."""

    def __init__(self, echo: Echo, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.echo, self.proxy, self.reader, self.writer = echo, proxy, reader, writer

    async def silent(self) -> bool:
        """Nothing comes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SOON_S):
                await self.reader.read(1)
                return False
        return True


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    async with server, proxied(server.sockets[0].getsockname()[1]) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        yield Line(echo, proxy, reader, writer)
        echo.reading.set()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        proxy.cut()


async def test_what_is_sent_arrives_in_both_directions(line: Line) -> None:
    data = bytes(range(256)) * 4000
    line.writer.write(data)
    assert await line.reader.readexactly(len(data)) == data
    assert (line.proxy.up.bytes, line.proxy.down.bytes) == (len(data), len(data))


async def test_a_close_goes_through(line: Line) -> None:
    line.writer.write(b"x")
    assert await line.reader.readexactly(1) == b"x"
    line.writer.close()
    assert await line.echo.ends.get() is None
    assert not line.proxy.connections or await asyncio.wait([c.closed for c in line.proxy.connections])


async def test_a_cut_is_a_reset_on_both_sides(line: Line) -> None:
    line.writer.write(b"x")
    assert await line.reader.readexactly(1) == b"x"
    line.proxy.cut()
    with pytest.raises(ConnectionResetError):
        await line.reader.read(1)
    assert await line.echo.ends.get() is ConnectionResetError


async def test_a_cut_in_mid_frame_lets_so_many_bytes_pass(line: Line) -> None:
    line.proxy.up.cut_after = 3
    line.writer.write(b"abcdef")
    assert await line.echo.ends.get() is ConnectionResetError
    assert bytes(line.echo.got) == b"abc"


async def test_a_stall_holds_back_and_loses_nothing(line: Line) -> None:
    line.proxy.stall()
    line.writer.write(b"abc")
    assert await line.silent()
    assert not line.echo.got
    line.proxy.heal()
    assert await line.reader.readexactly(3) == b"abc"


async def test_a_stall_one_way_lets_the_other_pass(line: Line) -> None:
    line.proxy.stall(up=False)
    line.writer.write(b"abc")
    await line.echo.until(3)
    assert await line.silent()
    line.proxy.heal()
    assert await line.reader.readexactly(3) == b"abc"


async def test_what_is_swallowed_is_gone_and_healing_resets(line: Line) -> None:
    line.proxy.up.swallowing = True
    line.writer.write(b"abc")
    assert await line.silent()
    line.proxy.heal()
    assert await line.echo.ends.get() is ConnectionResetError
    assert not line.echo.got


async def test_a_half_open_line_does_not_tell_of_its_end(line: Line) -> None:
    line.writer.write(b"x")
    assert await line.reader.readexactly(1) == b"x"
    line.proxy.up.swallowing = line.proxy.down.swallowing = True
    line.writer.close()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(line.echo.ends.get(), SOON_S)
    line.proxy.heal()
    assert await line.echo.ends.get() is ConnectionResetError


async def test_bytes_are_delayed_and_stay_in_order(line: Line) -> None:
    line.proxy.up.delay_s = 0.05
    began = asyncio.get_running_loop().time()
    for number in range(20):
        line.writer.write(bytes([number]))
        await asyncio.sleep(0)
    assert await line.reader.readexactly(20) == bytes(range(20))
    assert asyncio.get_running_loop().time() - began >= 0.05


async def test_bytes_are_rated(line: Line) -> None:
    line.proxy.up.bytes_per_s = 20_000
    began = asyncio.get_running_loop().time()
    line.writer.write(bytes(4000))
    await line.reader.readexactly(4000)
    assert asyncio.get_running_loop().time() - began >= 0.15, "4000 bytes at 20,000 a second, less the first piece"


async def test_bytes_come_one_by_one(line: Line) -> None:
    line.proxy.up.piece_bytes = 1
    line.writer.write(bytes(range(200)))
    assert await line.reader.readexactly(200) == bytes(range(200))
    assert line.proxy.up.bytes == 200


async def test_what_it_holds_is_bounded(line: Line) -> None:
    """A stalled line slows its sender, which sees a full network."""
    line.proxy.stall()
    line.writer.write(bytes(64 * 2**20))
    assert await line.silent()
    (connection,) = line.proxy.connections
    assert connection.upward.held_bytes < 2 * HELD_BYTES_MAX
    line.proxy.cut()


async def test_a_slow_far_end_slows_the_near_one(line: Line) -> None:
    line.echo.reading.clear()
    line.writer.write(bytes(64 * 2**20))
    assert await line.silent()
    assert line.proxy.up.bytes < 32 * 2**20
    line.proxy.cut()


async def test_it_refuses_and_accepts_again(line: Line) -> None:
    await line.proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", line.proxy.port)
    await line.proxy.accept()
    _, writer = await asyncio.open_connection("127.0.0.1", line.proxy.port)
    writer.close()
    await writer.wait_closed()


async def test_nobody_behind_it_is_a_reset() -> None:
    server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with proxied(port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
