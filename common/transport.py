"""The only module that imports zmq: sockets that drop nothing silently, never block and never grow without bound.

Why each option is set (libzmq 4.3.5, measured):

- ROUTER_MANDATORY and NOBLOCK: a default ROUTER reports success for messages it throws away.
- No chosen routing ids and no ROUTER_HANDOVER: a newcomer could receive another's next job. Who a peer is, its
  `register` or `hello` says; the routing id only says where to answer.
- IMMEDIATE: nothing queues for a broker that is not there. What was sent and not read when a line breaks is lost, and
  the rules of the wire repair that (registration numbers, `gap`, `replay`).
- RECONNECT_IVL and RECONNECT_IVL_MAX are drawn per process: libzmq adds no jitter once a maximum is set.
- CONNECT_TIMEOUT: else the kernel's own back-off decides how soon a host that was cut off is back (13 s after 30 s).
- MAXMSGSIZE: an announced 8 GiB frame would be allocated. HANDSHAKE_IVL cuts silent peers. A finite LINGER lets a
  process end.

The file descriptor of a ZeroMQ socket is edge-triggered: a readable event says "something changed", so a turn reads
until EAGAIN (or its cap, then comes back), and after sends the state is looked at again.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

import zmq

from common.errors import ProcessError
from common.protocol import FRAME_BYTES_MAX

DRAIN_MAX: Final = 256
"""Messages read in one turn before other sockets get theirs."""
HWM: Final = 1000
"""Messages libzmq holds per peer and direction."""
OUTBOX_MESSAGES_MAX: Final = 2000
OUTBOX_BYTES_MAX: Final = 64 * 2**20
"""What waits in this process for a peer whose HWM is reached; beyond it droppable messages are dropped (their gap is
repaired by `replay`)."""
RESERVE_MESSAGES: Final = 1000
RESERVE_BYTES: Final = FRAME_BYTES_MAX
"""What control messages may take beyond that: chunks alone never cost a peer its terminals. One that can't take these
either counts as gone, and nothing is kept for it."""
FLUSH_INTERVAL_S: Final = 0.005
LINGER_MS: Final = 300


# Plain numbers: combining or passing zmq's enums costs half a microsecond a message.
_NOW: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.SNDMORE) | _NOW


class Sent(Enum):
    """What became of a message."""

    OK = "handed to libzmq, or waiting in the outbox"
    FULL = "dropped: the peer's outbox is full"
    GONE = "no such peer, or it takes nothing any more"


class _Outbox:
    __slots__ = ("bytes", "frames")

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.bytes = 0


OnFrame = Callable[[bytes, bytes], None]
"""Called with (routing id of the peer, frame); the routing id of a DEALER's one peer is b""."""


class Socket:
    """A ROUTER or DEALER on the running event loop. The task that made it closes it.

    `on_frame` is called for every message, `on_batch` once after each turn of reading. Neither may raise: what a peer
    sends must not end the process; a bug should, so the exception is handed to the loop and `broken` is set.
    """

    def __init__(
        self, kind: str, on_frame: OnFrame, *, on_batch: Callable[[], None] | None = None, hwm: int = HWM
    ) -> None:
        self._router = kind == "router"
        self._on_frame = on_frame
        self._on_batch = on_batch
        self._outboxes: dict[bytes, _Outbox] = {}
        self._loop = asyncio.get_running_loop()
        self._flush_handle: asyncio.TimerHandle | None = None
        self._look_scheduled = False
        self._hwm = hwm
        self._address = ""
        self.broken: asyncio.Future[None] = self._loop.create_future()
        self._open()

    def _open(self) -> None:
        self._socket: zmq.Socket[bytes] = _context().socket(zmq.ROUTER if self._router else zmq.DEALER)
        option: dict[int, int] = {
            zmq.SNDHWM: self._hwm,
            zmq.RCVHWM: self._hwm,
            zmq.LINGER: LINGER_MS,
            zmq.IMMEDIATE: 1,
            zmq.MAXMSGSIZE: FRAME_BYTES_MAX,
            zmq.CONNECT_TIMEOUT: 2000,
            zmq.HANDSHAKE_IVL: 5000,
            zmq.BACKLOG: 4096,
            zmq.RECONNECT_IVL: random.randint(50, 150),
            zmq.RECONNECT_IVL_MAX: random.randint(800, 1600),
            zmq.HEARTBEAT_IVL: 2000,
            zmq.HEARTBEAT_TIMEOUT: 6000,
        }
        if self._router:
            option[zmq.ROUTER_MANDATORY] = 1
        for name, value in option.items():
            self._socket.setsockopt(name, value)
        self._fd: int = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._fd, self._turn)

    def bind(self, address: str) -> str:
        """Bind and return the actual address (`tcp://127.0.0.1:*` picks a port).

        Raises:
            ProcessError: the address is taken, or is not one of this machine.
        """
        try:
            self._socket.setsockopt(zmq.IPV6, "[" in address)
            self._socket.bind(address)
        except zmq.ZMQError as error:
            hint = " Is another process using the port?" if error.errno == zmq.EADDRINUSE else ""
            raise ProcessError(f"cannot bind {address}: {zmq.strerror(error.errno or 0)}.{hint}") from None
        return self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]

    def connect(self, address: str) -> None:
        """Dial out, now and again after every break.

        Raises:
            ProcessError: `address` is not of the form tcp://host:port.
        """
        try:
            self._socket.setsockopt(zmq.IPV6, "[" in address)
            self._socket.connect(address)
        except zmq.ZMQError as error:
            raise ProcessError(f"cannot connect to {address!r}: {error}. It should read tcp://HOST:PORT.") from None
        self._address = address
        self._look_later()

    def dial_again(self) -> None:
        """Begin anew with the address that was connected to.

        libzmq ends the session of a DEALER that was sent more than MAXMSGSIZE, and never dials again.
        """
        self._loop.remove_reader(self._fd)
        self._socket.close(0)
        self._outboxes.clear()
        self._open()
        self.connect(self._address)

    def send(self, frame: bytes, peer: bytes = b"", *, droppable: bool = False) -> Sent:
        """Send now, or as soon as the peer takes it; never blocks, and keeps the order per peer.

        FULL is for droppable frames only; at GONE all that waited for the peer is let go.
        """
        outbox = self._outboxes.get(peer)
        if outbox is None:
            sent = self._try(peer, frame)
            if sent is not Sent.FULL:
                return sent
            outbox = self._outboxes[peer] = _Outbox()
        messages_max, bytes_max = OUTBOX_MESSAGES_MAX, OUTBOX_BYTES_MAX
        if not droppable:
            messages_max, bytes_max = messages_max + RESERVE_MESSAGES, bytes_max + RESERVE_BYTES
        if len(outbox.frames) >= messages_max or outbox.bytes + len(frame) > bytes_max:
            if droppable:
                return Sent.FULL
            del self._outboxes[peer]
            return Sent.GONE
        outbox.frames.append(frame)
        outbox.bytes += len(frame)
        self._flush_later()
        return Sent.OK

    def offer(self, frame: bytes) -> bool:
        """Send if the peer takes it at once; the caller keeps what is refused (a DEALER with its own buffer)."""
        return not self._outboxes and self._try(b"", frame) is Sent.OK

    @property
    def idle(self) -> bool:
        """Whether libzmq took all there was to send."""
        return not self._outboxes

    def discard(self) -> None:
        """Drop what waits in the outboxes: the peer it was for is gone."""
        self._outboxes.clear()

    def close(self) -> None:
        """Close; what libzmq still holds is sent for at most LINGER_MS in the background."""
        if self._socket.closed:
            return
        self._loop.remove_reader(self._fd)
        if self._flush_handle is not None:
            self._flush_handle.cancel()
        self._socket.close(LINGER_MS)
        self.broken.cancel()

    def _try(self, peer: bytes, frame: bytes) -> Sent:
        # A send may take in what the descriptor would have announced, even one that fails.
        if not self._look_scheduled:
            self._look_later()
        try:
            if self._router:
                self._socket.send(peer, _MORE)
            self._socket.send(frame, _NOW)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.OK

    def _turn(self) -> None:
        if self._socket.closed:
            return
        try:
            for _ in range(DRAIN_MAX):
                try:
                    peer = self._socket.recv(_NOW) if self._router else b""
                    frame = self._socket.recv(_NOW)
                except zmq.Again:
                    break
                if self._socket.getsockopt(zmq.RCVMORE):
                    self._skip_parts()
                    frame = b""  # more parts than the wire knows: not a message, and told so like any other garbage
                self._on_frame(peer, frame)
                if self._socket.closed:
                    return
            else:
                self._look_later()
            if self._outboxes:
                self._flush()
            if self._on_batch is not None:
                self._on_batch()
        except BaseException as error:
            if not self.broken.done():
                self.broken.set_exception(error)
            raise

    def _skip_parts(self) -> None:
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv(_NOW)

    def _look_later(self) -> None:
        if not self._look_scheduled:
            self._look_scheduled = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._look_scheduled = False
        if not self._socket.closed and self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator, arg-type]
            self._turn()

    def _flush_later(self) -> None:
        if self._flush_handle is None:
            self._flush_handle = self._loop.call_later(FLUSH_INTERVAL_S, self._flush_again)

    def _flush_again(self) -> None:
        self._flush_handle = None
        self._flush()

    def _flush(self) -> None:
        for peer in list(self._outboxes):
            outbox = self._outboxes[peer]
            while outbox.frames:
                sent = self._try(peer, outbox.frames[0])
                if sent is Sent.FULL:
                    break
                if sent is Sent.GONE:
                    outbox.frames.clear()
                    break
                outbox.bytes -= len(outbox.frames.popleft())
            if not outbox.frames:
                del self._outboxes[peer]
        if self._outboxes:
            self._flush_later()


_shared: zmq.Context[Any] | None = None


def _context() -> "zmq.Context[Any]":
    """One context per process: libzmq's threads must not multiply, nor survive a fork."""
    global _shared
    if _shared is None or _shared.closed:
        _shared = zmq.Context()
        _shared.set(zmq.MAX_SOCKETS, 4096)
    return _shared
