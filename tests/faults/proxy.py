"""A TCP proxy that makes a line as bad as a test wants it, live, on the event loop of the test.

What it can do to a line: hold bytes back (`stalled`: what a partition looks like to TCP, which loses nothing), delay
them, rate them, tear them into pieces, swallow them (`swallowing`: the far end of a half-open connection), cut it with
a reset, at once or in mid-frame (`cut_after`), and refuse new ones. Each direction has its own knobs.

Bounds. A direction of a connection holds at most HELD_BYTES_MAX; then its reader pauses, so TCP slows the sender as a
full network would.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, cast

HELD_BYTES_MAX: Final = 256 * 2**10
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 s: `close` sends a reset (socket(7))."""


@dataclass(slots=True)
class Direction:
    """How bytes travel one way. Changing a knob counts from the next byte on; `Proxy.apply` wakes what is held."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """0 is as fast as it goes."""
    piece_bytes: int = 0
    """Bytes per write, each sent by itself; 0 is as they come."""
    stalled: bool = False
    swallowing: bool = False
    cut_after: int | None = None
    """So many bytes more in this direction, over all its connections, then a reset."""
    bytes: int = 0
    """Passed on so far."""

    @property
    def plain(self) -> bool:
        """Nothing is done to the bytes."""
        return not (
            self.delay_s
            or self.bytes_per_s
            or self.piece_bytes
            or self.stalled
            or self.swallowing
            or self.cut_after is not None
        )


@dataclass(slots=True)
class Proxy:
    """Listens on `port` (0: a free one, then in `port`) and connects to `host`:`target`."""

    target: int
    port: int = 0
    host: str = "127.0.0.1"
    up: Direction = field(default_factory=Direction)
    """From those who dial in."""
    down: Direction = field(default_factory=Direction)
    connections: "set[_Connection]" = field(default_factory=set)
    accepted: int = 0
    _server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Reset every connection and stop listening."""
        if self._server is not None:
            self._server.close()
            self._server = None
        connections = list(self.connections)
        self.cut()
        if connections:
            await asyncio.wait([connection.closed for connection in connections], timeout=5)

    def cut(self) -> None:
        """Reset every connection now."""
        for connection in list(self.connections):
            connection.reset()

    async def refuse(self) -> None:
        """Refuse new connections, until `accept`."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        if self._server is None:
            await self.open()

    def stall(self, *, up: bool = True, down: bool = True) -> None:
        """Hold everything back that travels these ways, until `heal`."""
        self.up.stalled, self.down.stalled = up, down

    def apply(self) -> None:
        """The knobs have been turned: look again at what is held back."""
        for connection in list(self.connections):
            connection.wake()

    def heal(self) -> None:
        """A perfect line again. A connection of which bytes were swallowed is reset: its stream has a hole."""
        for direction in (self.up, self.down):
            direction.delay_s = direction.bytes_per_s = direction.piece_bytes = 0
            direction.stalled = direction.swallowing = False
            direction.cut_after = None
        for connection in list(self.connections):
            if connection.swallowed:
                connection.reset()
        self.apply()


@contextlib.asynccontextmanager
async def proxied(target: int, *, port: int = 0) -> AsyncIterator[Proxy]:
    """A proxy for the length of a block."""
    proxy = Proxy(target, port)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()


class _Connection(asyncio.Protocol):
    """Both halves of one proxied connection: this is the near one; `far` is the one that was dialled for it."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.swallowed = False
        self.near: asyncio.Transport | None = None
        self.far: asyncio.Transport | None = None
        self.upward = _Half(self, proxy.up)
        self.downward = _Half(self, proxy.down)
        self._dialling: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.near = self.downward.sink = self.upward.source = cast("asyncio.Transport", transport)
        _no_delay(self.near)
        self.near.pause_reading()
        self.proxy.connections.add(self)
        self.proxy.accepted += 1
        self._dialling = asyncio.get_running_loop().create_task(self._dial())

    async def _dial(self) -> None:
        try:
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: _Far(self), self.proxy.host, self.proxy.target
            )
        except OSError:
            self.reset()
            return
        self.far = self.upward.sink = self.downward.source = transport
        _no_delay(transport)
        if self.closed.done():
            transport.abort()
        elif self.near is not None:
            self.near.resume_reading()

    def data_received(self, data: bytes) -> None:
        self.upward.push(data)

    def pause_writing(self) -> None:
        self.downward.full(True)

    def resume_writing(self) -> None:
        self.downward.full(False)

    def connection_lost(self, error: Exception | None) -> None:
        self.near = None
        self.upward.end(error)

    def wake(self) -> None:
        self.upward.flush()
        self.downward.flush()

    def reset(self) -> None:
        """Reset both sides."""
        for transport in (self.near, self.far):
            if transport is not None:
                raw = transport.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                transport.abort()
        self._over()

    def _over(self) -> None:
        self.upward.stop()
        self.downward.stop()
        if self._dialling is not None and self.far is None:
            self._dialling.cancel()
        self.proxy.connections.discard(self)
        if not self.closed.done():
            self.closed.set_result(None)


class _Far(asyncio.Protocol):
    """What was dialled for a connection."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def data_received(self, data: bytes) -> None:
        self._connection.downward.push(data)

    def pause_writing(self) -> None:
        self._connection.upward.full(True)

    def resume_writing(self) -> None:
        self._connection.upward.full(False)

    def connection_lost(self, error: Exception | None) -> None:
        self._connection.far = None
        self._connection.downward.end(error)


class _Half:
    """One direction of one connection: what it holds, and when the next of it may go."""

    def __init__(self, connection: _Connection, knobs: Direction) -> None:
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self._connection = connection
        self._knobs = knobs
        self._held: deque[tuple[float, bytes]] = deque()
        self.held_bytes = 0
        self._paused = False
        self._sink_full = False
        self._free_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._ended: Exception | bool = False

    def push(self, data: bytes) -> None:
        if self._knobs.plain and not self._held:
            self._write(data)
            return
        if self._knobs.swallowing:
            self._connection.swallowed = True
            return
        due = asyncio.get_running_loop().time() + self._knobs.delay_s
        self._held.append((due, data))
        self.held_bytes += len(data)
        self._press()
        self.flush()

    def full(self, sink_full: bool) -> None:
        """The sink takes no more, or takes it again."""
        self._sink_full = sink_full
        self._press()
        if not sink_full:
            self.flush()

    def flush(self) -> None:
        """Send what may go; come back for the rest when it is due."""
        loop, knobs = asyncio.get_running_loop(), self._knobs
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._held and not knobs.stalled and not self._sink_full:
            due, data = self._held[0]
            due = max(due, self._free_at) if knobs.bytes_per_s else due
            now = loop.time()
            if due > now:
                self._timer = loop.call_at(due, self.flush)
                break
            size = len(data)
            if knobs.bytes_per_s:
                size = min(size, max(1, int(knobs.bytes_per_s / 50)))
                self._free_at = max(self._free_at, now) + size / knobs.bytes_per_s
            if knobs.piece_bytes:
                size = min(size, knobs.piece_bytes)
            self._held[0] = due, data[size:]
            if size == len(data):
                self._held.popleft()
            self.held_bytes -= size
            if not self._write(data[:size]):
                return
        self._press()
        if not self._held and self._ended is not False:
            self._close()

    def end(self, error: Exception | None) -> None:
        """The source has closed: so does the sink, after what is held; a reset is a reset on the other side too."""
        self.source = None
        self._ended = error if error is not None else True
        if error is not None and not self._knobs.stalled and not self._knobs.swallowing:
            self._connection.reset()
        elif not self._held:
            self._close()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._held.clear()
        self.source = self.sink = None

    def _close(self) -> None:
        # A partition or a black hole tells nobody of the end either; healing does.
        if self._knobs.stalled or self._knobs.swallowing:
            self._connection.swallowed = True
            return
        if self.sink is not None and not self.sink.is_closing():
            self.sink.close()
        self._connection._over()

    def _write(self, data: bytes) -> bool:
        """Pass bytes on; False: that was the last of the connection."""
        knobs = self._knobs
        if knobs.cut_after is not None:
            data, knobs.cut_after = data[: knobs.cut_after], knobs.cut_after - len(data)
        if self.sink is not None and data and not self.sink.is_closing():
            knobs.bytes += len(data)
            self.sink.write(data)
        if knobs.cut_after is not None and knobs.cut_after <= 0:
            knobs.cut_after = None
            # Written is not sent: the bytes before the cut go first.
            asyncio.get_running_loop().call_soon(self._connection.reset)
            self._held.clear()
            return False
        return True

    def _press(self) -> None:
        """Read on, or not."""
        wanted = self.held_bytes >= HELD_BYTES_MAX or self._sink_full
        if wanted != self._paused and self.source is not None and not self.source.is_closing():
            self._paused = wanted
            if wanted:
                self.source.pause_reading()
            else:
                self.source.resume_reading()


def _no_delay(transport: asyncio.Transport) -> None:
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
