"""uvicorn's HTTP and WebSocket protocols, made to survive peers that stall, trickle or flood.

What each bound defends against, and what happens at it:

    stall_s             A peer takes nothing of what waits for it, or never lets a close finish: aborted. WebSocket
                        keepalive does not see this, for its ping waits behind the blocked write. A slow peer that
                        takes something in every such period is kept.
    request_s           No complete request head, or a WebSocket handshake not finished, in this time: aborted. A body
                        gets a second more for every `body_bytes_per_s` that arrive, so a slow upload is kept and a
                        trickle is not (the rule of Apache's mod_reqtimeout), but no more than `body_credit_s` ahead:
                        else what came fast could be held, incomplete, for hours.
    head_bytes_max      A longer request head: 431. The parser has no bound of its own.
    pipeline_max        More requests waiting on one connection: aborted. Nobody pipelines.
    ping_interval_s     Keepalive. A pong missing after `ping_timeout_s`: aborted, unless bytes moved meanwhile, for the
    ping_timeout_s      ping or the pong may be behind a long message.
    message_bytes_max   A longer message: closed with 1009. Until the application trusts the peer, the bound is
    stranger_bytes_max  this one: a thousand strangers must not get 20 GB to fill.
    control_burst       Pings, pongs and tiny fragments cost work and never reach the application. More than the burst
    control_per_s       beyond this rate: closed with 1008.

While a peer does not read, only the latest of its pings is remembered (RFC 6455 §5.5.3 allows it): pongs can't pile up.
Input is parsed in slices, no further than the application has read: one read of 256 KiB can hold 40,000 messages, each
a hundred times its size as an object. Fragments are joined as they come, so their number costs no memory.
permessage-deflate is off: it costs 50 KiB per connection, and bombs would have to be defused.

On top, many messages leave in one write: where the scope's extensions name `weftline.batch`, an application may send
`{"type": "websocket.send", "batch": [bytes, ...], "binary": bool, "trusted": bool}`; each item is one message, text
ones in UTF-8. `trusted` says that from now on the peer may send long messages.
"""

import asyncio
import re
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import OPEN

BATCH: Final = "weftline.batch"
SLICE: Final = 4096
BODY_SLICE: Final = 64 * 1024
# A fragment this small, and not a message's last, is no way to send anything.
TINY: Final = 16
SEND_BUFFER_BYTES: Final = 64 * 1024
BACKLOG: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of a connection; see the module's docstring."""

    stall_s: float = 10.0
    request_s: float = 10.0
    body_bytes_per_s: float = 4096.0
    body_credit_s: float = 60.0
    head_bytes_max: int = 64 * 1024
    pipeline_max: int = 16
    ping_interval_s: float = 5.0
    ping_timeout_s: float = 5.0
    message_bytes_max: int = 16 * 1024 * 1024
    stranger_bytes_max: int = 64 * 1024
    control_burst: int = 200
    control_per_s: float = 20.0


def protocols(
    limits: Limits,
) -> tuple[type["DefendedWebSocketProtocol"], type["DefendedHttpProtocol"]]:
    """The classes for uvicorn's `ws=` and `http=`, bound to `limits`."""
    bound = {"limits": limits}
    websocket = type("WebSocketProtocol", (DefendedWebSocketProtocol,), bound)
    http = type("HttpProtocol", (DefendedHttpProtocol,), bound)
    return websocket, http


def listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket for uvicorn's `serve(sockets=[...])`; port 0 takes a free one. The caller closes it.

    The small send buffer, inherited by the sockets it accepts, lets a stalled peer be seen: in the kernel's growing
    buffers 4 MB, five minutes of tokens, vanish into a peer that reads nothing. It must hold a segment of the loopback
    device (64 KiB), else every write of more waits for a delayed acknowledgement: 16 MiB took 9.8 s with 16 KiB.

    Raises:
        OSError: the address can't be resolved, or is in use.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class _Watched:
    """A transport that is aborted when its peer takes nothing for `stall_s` while it should.

    It should from `watch` to `unwatch`, and from `close` on: a close waits for what is still buffered.
    """

    __slots__ = ("_inner", "_loop", "_mark", "_stall_s", "_timer", "_written", "get_write_buffer_size", "is_closing")

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop, stall_s: float) -> None:
        self._inner = inner
        self._loop = loop
        self._stall_s = stall_s
        self._timer: asyncio.TimerHandle | None = None
        self._mark = 0
        self._written = 0
        self.is_closing = inner.is_closing
        self.get_write_buffer_size = inner.get_write_buffer_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._inner.write(data)

    def close(self) -> None:
        self._inner.close()
        self.watch()

    @property
    def flushed(self) -> int:
        """Bytes the kernel has taken so far."""
        return self._written - self.get_write_buffer_size()

    def watch(self) -> None:
        if self._timer is None:
            self._mark = self.flushed
            self._timer = self._loop.call_later(self._stall_s, self._judge)

    def unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _judge(self) -> None:
        self._timer = None
        if self.flushed == self._mark:
            self._inner.abort()
        else:
            self.watch()


def _watched(transport: asyncio.BaseTransport, loop: asyncio.AbstractEventLoop, stall_s: float) -> _Watched:
    # A WebSocket takes its transport over from HTTP, already watched.
    return transport if isinstance(transport, _Watched) else _Watched(cast("Any", transport), loop, stall_s)


class DefendedWebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol with the bounds of the module's docstring, and the batch extension."""

    limits: ClassVar[Limits] = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn.max_message_size = min(self.limits.stranger_bytes_max, self.limits.message_bytes_max)
        self.conn.available_extensions = None
        self.ping_interval = self.limits.ping_interval_s
        self.ping_timeout = self.limits.ping_timeout_s
        self._out: _Watched
        self._handshake_timer: asyncio.TimerHandle | None = None
        self._unparsed = bytearray()
        self._message = bytearray()
        self._pong: bytes | None = None
        self._control_level = 0.0
        self._control_at = self.loop.time()
        self._received = 0
        # What had moved when the peer was last known to live: bytes in, bytes out, whether some were waiting to go out.
        self._moved = (0, 0, False)

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._out = _watched(transport, self.loop, self.limits.stall_s)
        super().connection_made(cast("Any", self._out))
        self._handshake_timer = self.loop.call_later(self.limits.request_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_handshake()
        self._unparsed.clear()
        # RFC 6455 §7.1.5: gone without a close frame is 1006. The code of a close frame is in the queue already.
        self.queue.put_nowait({"type": "websocket.disconnect", "code": CloseCode.ABNORMAL_CLOSURE})
        super().connection_lost(exc)
        self._out.unwatch()

    def eof_received(self) -> None:
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._out.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._out.is_closing():
            return
        self._out.unwatch()
        pong, self._pong = self._pong, None
        if pong is not None and self.conn.state is OPEN:
            self.transport.write(pong)

    def shutdown(self) -> None:
        # Closing already, it would raise: the peer's close frame was answered.
        if not self._out.is_closing():
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        self._unparsed += data
        self._parse()

    def _parse(self) -> None:
        """Parse what was received, up to the first messages the application has not read."""
        while self._unparsed and not self.read_paused and not self._out.is_closing():
            piece = bytes(self._unparsed[:SLICE])
            del self._unparsed[:SLICE]
            super().data_received(piece)
            if self.conn.handshake_exc is not None and not self.handshake_initiated:
                # Too many or too long headers for the parser: its answer is ready, and no event tells of it.
                self.transport.write(b"".join(self.conn.data_to_send()))
                self.transport.close()

    # The peer's frames

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code == 101:
            cast("dict[str, Any]", self.scope["extensions"])[BATCH] = {}

    def start_keepalive(self) -> None:
        self._end_handshake()
        super().start_keepalive()

    def _end_handshake(self) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
            self._handshake_timer = None

    def handle_text(self, event: Frame) -> None:
        if self._fragment_tolerated(event):
            super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        if self._fragment_tolerated(event):
            super().handle_bytes(event)

    def handle_cont(self, event: Frame) -> None:
        if self.close_sent or not self._fragment_tolerated(event):
            return
        if self.frames:
            self._message = bytearray(self.frames.pop())
        self._message += event.data
        if event.fin:
            self.frames.append(bytes(self._message))
            self._message.clear()
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        data = self.frames[0]
        self.frames = []
        if self.close_sent:
            return
        if self.curr_msg_data_type == "text":
            try:
                text = data.decode()
            except UnicodeDecodeError:
                self._refuse(CloseCode.INVALID_DATA, "invalid UTF-8")
                return
            self.queue.put_nowait({"type": "websocket.receive", "text": text})
        else:
            self.queue.put_nowait({"type": "websocket.receive", "bytes": data})
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def handle_ping(self) -> None:
        if not self._control_tolerated():
            return
        pongs = self.conn.data_to_send()
        if self.writable.is_set() or self.conn.state is not OPEN:
            self.transport.write(b"".join(pongs))
        elif pongs:
            self._pong = pongs[-1]

    def handle_pong(self, event: Frame) -> None:
        if self._control_tolerated():
            super().handle_pong(event)

    def _fragment_tolerated(self, event: Frame) -> bool:
        return event.fin or len(event.data) >= TINY or self._control_tolerated()

    def _control_tolerated(self) -> bool:
        """Count a frame that costs work and carries nothing, in a bucket that leaks; too many close the connection."""
        now = self.loop.time()
        leaked = (now - self._control_at) * self.limits.control_per_s
        self._control_at = now
        self._control_level = max(0.0, self._control_level - leaked) + 1
        if self._control_level <= self.limits.control_burst:
            return True
        self._refuse(CloseCode.POLICY_VIOLATION, "too many control frames")
        return False

    def _refuse(self, code: CloseCode, reason: str) -> None:
        """Fail the connection (RFC 6455 §7.1.7): a close frame if there can be one, then the end."""
        if self.close_sent or self._out.is_closing():
            return
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.conn.fail(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()

    # Keepalive

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        self._moved = self._movement()

    def keepalive_timeout(self) -> None:
        self.pong_timer = None
        if self.close_sent or self._out.is_closing():
            return
        (received, flushed, waiting), self._moved = self._moved, self._movement()
        slow = self._received > received or (waiting and self._out.flushed > flushed)
        # Reading paused: the pong may have come, and it is the application that is behind.
        if slow or self.read_paused:
            self.pong_timer = self.loop.call_later(self.limits.ping_timeout_s, self.keepalive_timeout)
        else:
            self.transport.abort()

    def _movement(self) -> tuple[int, int, bool]:
        return self._received, self._out.flushed, self._out.get_write_buffer_size() > 0

    # The application's side

    async def receive(self) -> Any:
        message = await super().receive()
        self._parse()
        return message

    async def send(self, message: Any) -> None:
        """Send an ASGI message, `batch` among them. Waits while the peer is slow.

        Raises:
            ClientDisconnected: an OSError, as ASGI 2.4 asks: the peer has gone, or the connection is closing.
        """
        if message["type"] != "websocket.send" or not self.handshake_complete:
            await super().send(message)
            if self.close_sent:
                self.handshake_complete = True  # refused: uvicorn forgets it, and would log an error
            # After its own close the application receives no more; what waits may be the peer's answer.
            self._parse()
            return
        await self.writable.wait()
        if self.disconnected or self.close_sent or self.conn.state is not OPEN:
            raise ClientDisconnected
        batch = message.get("batch")
        if message.get("trusted"):
            self.conn.max_message_size = self.limits.message_bytes_max
        if batch is not None:
            output = _frames(batch, message.get("binary", False))
        elif message.get("bytes") is not None:
            output = _frames((message["bytes"],), True)
        else:
            output = _frames((message["text"].encode(),), False)
        self.transport.write(output)


def _frames(messages: Iterable[bytes], binary: bool) -> bytes:
    """Unfragmented, unmasked frames (RFC 6455 §5.2), one a message."""
    head = 0x80 | (Opcode.BINARY if binary else Opcode.TEXT)
    short = _SHORT_HEADS[binary]
    parts: list[bytes] = []
    for message in messages:
        length = len(message)
        if length < 126:
            parts.append(short[length])
        elif length < 65536:
            parts.append(_MEDIUM(head, 126, length))
        else:
            parts.append(_LONG(head, 127, length))
        parts.append(message)
    return b"".join(parts)


_MEDIUM = struct.Struct("!BBH").pack
_LONG = struct.Struct("!BBQ").pack
_SHORT_HEADS = tuple(
    tuple(bytes((0x80 | opcode, length)) for length in range(126)) for opcode in (Opcode.TEXT, Opcode.BINARY)
)


_H2C = re.compile(rb"\r\nupgrade:([ \t]*h2c[ \t]*\r\n)", re.IGNORECASE)


def _without_h2c(data: bytes) -> bytes:
    """What begins with a request's head, its wish for HTTP/2 overlooked (RFC 9110 §7.8 allows it).

    Java's HttpClient has that wish with every request, and the parser would stop behind the head and lose the body.
    """
    end = data.find(b"\r\n\r\n") + 2
    if end < 2 or b"h2c" not in data[:end]:
        return data
    return _H2C.sub(rb"\r\nx-upgrade:\1", data[:end], count=1) + data[end:]


class DefendedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with the bounds of the module's docstring; idleness between requests stays uvicorn's.

    A request is awaited from the connection's start, or its own first byte, until its last; `_timer` runs all the time.
    """

    limits: ClassVar[Limits] = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._out: _Watched
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._body_bytes = 0
        self._head_bytes = 0
        self._in_head = False
        self._in_request = False
        self._upgraded = False
        # uvicorn's own `cycle` is the latest request, which may be waiting behind this one.
        self._running: RequestResponseCycle | None = None

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._out = _watched(transport, self.loop, self.limits.stall_s)
        super().connection_made(cast("Any", self._out))
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_came()
        self.pipeline.clear()
        super().connection_lost(exc)
        self._out.unwatch()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def eof_received(self) -> None:
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._out.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._out.is_closing():
            self._out.unwatch()

    def data_received(self, data: bytes) -> None:
        if self._timer is None:
            self._await_request()
        if not self._in_request:
            data = _without_h2c(data)
        start = 0
        while start < len(data):
            # Of a body in slices of 4 KiB uvicorn would copy what it has of it each time.
            piece = data[start : start + (BODY_SLICE if self._in_request and not self._in_head else SLICE)]
            start += len(piece)
            if self._in_head:
                self._head_bytes += len(piece)
            super().data_received(piece)
            if self._upgraded or self._out.is_closing():
                return
            if self._in_head and self._head_bytes > self.limits.head_bytes_max:
                self._refuse_head()
                return
            if len(self.pipeline) > self.limits.pipeline_max:
                self.transport.abort()
                return

    def handle_websocket_upgrade(self) -> None:
        self._upgraded = True
        super().handle_websocket_upgrade()

    # The parser's side

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._await_request()
        self._in_request = self._in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.pipeline:
            # uvicorn reads no further until the request before is answered: it would not see its client leave.
            self.flow.resume_reading()
        self._in_head = False
        self._since = self.loop.time()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._body_bytes += len(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_request = False
        self._request_came()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_request:
            # Answered before its body ended: what still comes is thrown away, for so long and no longer.
            self._request_came()
            self._timer = self.loop.call_later(self.limits.request_s, self.transport.abort)

    # A request's time

    def _await_request(self) -> None:
        self._since = self.loop.time()
        self._body_bytes = 0
        self._timer = self.loop.call_later(self.limits.request_s, self._overdue)

    def _request_came(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        self._timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self._in_request:
            return  # a stray byte after a request
        now = self.loop.time()
        if answering and (self.flow.read_paused or self.cycle.waiting_for_100_continue):
            # It is the application that is slow.
            self._since, self._body_bytes = now, 0
        allowed = self._since + self.limits.request_s + self._body_bytes / self.limits.body_bytes_per_s
        if now < allowed:
            allowed = min(allowed, now + self.limits.body_credit_s)
            self._since, self._body_bytes = allowed - self.limits.request_s, 0
            self._timer = self.loop.call_at(allowed, self._overdue)
        else:
            self.transport.abort()

    def _refuse_head(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
        self.transport.close()
