"""One HTTP request that is handed on as it came, and its answer as the engine gave it.

An exchange is an ASGI response. What the stream brings is put into an outbox and written in one piece per turn, so that
lines which were ready together leave together; past `outbox_bytes_max` the stream pauses and is refilled by replay. A
streamed answer (NDJSON or SSE) begins with the engine's head; a document is held until it is whole, so that it has a
length, and a failure a status. When the client leaves, the request is cancelled down to the engine.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from common.errors import Code, FabricError
from common.logs import Log
from common.ollama import NDJSON, SSE, document
from common.protocol import End, Failed
from gateway.autopull import AutoPull, Waiter
from gateway.dialects import RETRY_AFTER_S, STATUS, Dialect, status_of, words_of
from gateway.hints import EVERYBODYS, NO_HINTS, Hints, Share
from gateway.keyring import Grant
from gateway.metrics import Metrics
from gateway.session import Begins, Events, Moved, Output, Over, Stream
from gateway.spool import SPOOL_AT, Spool, Spools
from gateway.upstream import Upstream

log = Log("gateway")

HELD_BYTES_MAX: Final = 512 * 2**20
JSON: Final = b"application/json; charset=utf-8"
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")


class Gone(Exception):
    """The client left, or took nothing any more."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Call:
    """What is asked of an engine, and in whose name."""

    client: str
    ref: str
    model: str
    path: str
    body: bytes
    light: bool = False
    spool: Spool | None = None
    """The body, if it is a large one."""
    priority: str = "normal"
    deadline_ms: int | None = None
    hints: Hints = NO_HINTS
    share: Share = EVERYBODYS


async def read_body(receive: Receive, ending: "Ending", bytes_max: int) -> bytes:
    """The whole body, in memory.

    Raises:
        Gone: the client left.
        FabricError: TOO_LARGE, or QUEUE_FULL, there is no room.
    """
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        part, more = await _read(receive)
        size += len(part)
        _check_size(size, bytes_max)
        ending.hold(len(part))
        parts.append(part)
    return b"".join(parts)


async def read_large(receive: Receive, ending: "Ending", spools: Spools, bytes_max: int) -> bytes | Spool:
    """The whole body: in memory if it is small, else in a file, which `ending` closes.

    Raises:
        Gone: the client left.
        FabricError: TOO_LARGE; QUEUE_FULL, there is no room; or why it was ended from outside.
    """
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= SPOOL_AT:
        part, more = await _read(receive)
        size += len(part)
        _check_size(size, bytes_max)
        ending.hold(len(part))
        parts.append(part)
    if size <= SPOOL_AT:
        return b"".join(parts)
    spool = ending.own(Spool(spools))
    await attended(fill(spool, receive, bytes_max, parts, more=more), ending)
    return spool


async def fill(
    spool: Spool, receive: Receive, bytes_max: int, parts: list[bytes] | None = None, *, more: bool = True
) -> None:
    """Write a body into a file: `parts` of it, and what is still to come.

    Raises:
        Gone: the client left.
        FabricError: TOO_LARGE, or QUEUE_FULL, there is no room.
    """
    parts = parts or []
    size = sum(map(len, parts))
    while True:
        if size >= SPOOL_AT or not more:
            await spool.write(b"".join(parts))
            parts.clear()
            size = 0
        if not more:
            return
        part, more = await _read(receive)
        size += len(part)
        _check_size(spool.size + size, bytes_max)
        parts.append(part)


async def _read(receive: Receive) -> tuple[bytes, bool]:
    """The next piece of a body, and whether there is more of it."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Gone
    return message.get("body", b""), message.get("more_body", False)


def _check_size(size: int, bytes_max: int) -> None:
    if size > bytes_max:
        raise FabricError(Code.TOO_LARGE, f"a request may have at most {bytes_max} bytes")


def check_length(scope: Message, bytes_max: int, spools: Spools) -> int:
    """How many bytes the body announces itself to have, 0 if it does not; refuse it at once if they are too many.

    Raises:
        FabricError: TOO_LARGE, or QUEUE_FULL, there is no room.
    """
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = int(value)
            _check_size(length, bytes_max)
            if length > SPOOL_AT:
                spools.check(length)
            return length
    return 0


async def attended(work: Coroutine[Any, Any, T], ending: "Ending", receive: Receive | None = None) -> T:
    """Do the work, until its client leaves (`receive`: listen whether it does) or it is ended from outside.

    Raises:
        Gone: the client left.
        FabricError: why it was ended.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[FabricError] = loop.create_future()
    working = loop.create_task(work)
    gone = [] if receive is None else [loop.create_task(until_gone(receive))]
    try:
        ending.watch(ended.set_result)
        awaited: set[asyncio.Future[Any]] = {working, ended, *gone}
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ended.result() if ended.done() else Gone
    finally:
        ending.watch(None)
        for task in (working, *gone):
            task.cancel()
        await asyncio.gather(working, *gone, return_exceptions=True)


async def answer(
    send: Send, status: int, body: bytes, *, content_type: bytes = JSON, retry_after_s: int | None = None
) -> None:
    """A whole answer."""
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
    if retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, dialect: Dialect, error: FabricError, retry_after_ms: int | None = None) -> None:
    """Answer with an error of our own."""
    status = STATUS.get(error.code, 500)
    body = dialect.document(status, error.code, error.message)
    await answer(send, status, body, retry_after_s=_retry_after_s(status, retry_after_ms))


def _retry_after_s(status: int, retry_after_ms: int | None) -> int | None:
    if status not in (429, 503):
        return None
    return RETRY_AFTER_S if retry_after_ms is None else math.ceil(retry_after_ms / 1000)


class Room:
    """The bytes that all requests and documents of a gateway may take together while they are incomplete."""

    def __init__(self, bytes_max: int = HELD_BYTES_MAX) -> None:
        self.bytes_left = bytes_max


class Ending:
    """How the work on a request is ended from outside: its key was revoked, or the gateway ends."""

    def __init__(self, grant: Grant, room: Room) -> None:
        self.grant = grant
        self._room = room
        self._held = 0
        self._spools: list[Spool] = []
        self._reason: FabricError | None = None
        self._tell: Callable[[FabricError], None] | None = None

    def hold(self, size: int) -> None:
        """So many bytes more are kept for the request, until `release`.

        Raises:
            FabricError: QUEUE_FULL, there is no room.
        """
        if size > self._room.bytes_left:
            raise FabricError(Code.QUEUE_FULL, "this gateway holds all it can; try again later")
        self._room.bytes_left -= size
        self._held += size

    def own(self, spool: Spool) -> Spool:
        """Close it at `release`."""
        self._spools.append(spool)
        return spool

    def release(self) -> None:
        """Nothing is kept any more."""
        self._room.bytes_left += self._held
        self._held = 0
        while self._spools:
            self._spools.pop().close()

    def end(self, reason: FabricError) -> None:
        """Now, or when the work begins. The first reason counts."""
        if self._reason is None:
            self._reason = reason
            if self._tell is not None:
                self._tell(reason)

    def watch(self, tell: Callable[[FabricError], None] | None) -> None:
        """Have `tell` called when it is ended, or (None) nobody any more.

        Raises:
            FabricError: the reason, if it was ended already.
        """
        if tell is not None and self._reason is not None:
            raise self._reason
        self._tell = tell


class Exchange:
    """The answer to one call. `run` it once."""

    def __init__(
        self, dialect: Dialect, upstream: Upstream, metrics: Metrics, outbox_bytes_max: int, pulls: AutoPull
    ) -> None:
        self._dialect = dialect
        self._upstream = upstream
        self._metrics = metrics
        self._outbox_bytes_max = outbox_bytes_max
        self._pulls = pulls
        self._waiter: Waiter | None = None
        self._stream: Stream | None = None
        self._ending: Ending
        self._head = Begins(200, "application/json")
        self._streamed = False
        self._started = False
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._paused = False
        self._over: Over | None = None
        self._filled = asyncio.Event()

    async def run(self, call: Call, ending: Ending, receive: Receive, send: Send) -> None:
        """Submit the call and answer with what comes, until `ending` says otherwise.

        Raises:
            FabricError: it was not accepted, or ended before, and nothing was sent.
            Gone: the client left.
        """
        ending.watch(self._end)
        self._ending = ending
        submit = partial(
            self._upstream.submit,
            client=call.client,
            ref=call.ref,
            model=call.model,
            path=call.path,
            body=call.body,
            sink=self._hear,
            light=call.light,
            spool=call.spool,
            priority=call.priority,
            hints=call.hints,
            share=call.share,
        )

        def again(deadline_ms: int | None) -> None:
            self._stream = submit(deadline_ms=deadline_ms)

        if self._pulls.may(call.model):
            self._waiter = Waiter(
                self._pulls, token=ending.grant.token, size=len(call.body), submit=again, sink=self._hear
            )
        self._stream = submit(deadline_ms=call.deadline_ms)
        self._metrics.requests += 1
        watch = asyncio.get_running_loop().create_task(until_gone(receive))
        watch.add_done_callback(lambda _: self._filled.set())
        try:
            while not watch.done():
                await self._filled.wait()
                self._filled.clear()
                if await self._write(send):
                    return
            raise Gone
        except OSError:
            raise Gone from None  # ASGI 2.4: the peer has gone while something was being sent to it
        finally:
            ending.watch(None)
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self._forget()
            self._waiter = None  # it holds the body, and this

    def _forget(self) -> None:
        """Whatever is under way is not wanted any more."""
        assert self._stream is not None
        if self._waiter is not None:
            self._waiter.leave()
        if self._over is None:
            self._upstream.forget(self._stream)

    def _end(self, reason: FabricError) -> None:
        """It is ended from outside."""
        assert self._stream is not None
        if self._over is None:
            self._forget()
            rid, attempt = self._stream.submit.rid, self._stream.attempt
            self._hear(Over(Failed(rid=rid, attempt=attempt, code=reason.code, message=reason.message), b""))

    def _hold(self, size: int) -> None:
        try:
            self._ending.hold(size)
        except FabricError as error:
            self._outbox.clear()
            self._ending.end(error)

    def _hear(self, output: Output) -> None:
        match output:
            case Events():
                self._metrics.events += output.n - output.skip
                payload = output.payload if not output.skip else b"\n".join([*output.lines(), b""])
                self._outbox.append(payload)
                self._outbox_bytes += len(payload)
                if not self._streamed:
                    self._hold(len(payload))
                elif self._outbox_bytes > self._outbox_bytes_max and not self._paused:
                    assert self._stream is not None
                    self._paused = True
                    self._metrics.pauses += 1
                    self._stream.pause()
            case Begins():
                self._waiter = None
                self._head = output
                self._streamed = output.content_type.partition(";")[0].strip() in (NDJSON, SSE)
            case Over():
                assert self._stream is not None
                if self._waiter is not None and self._waiter.take(self._stream, output.terminal):
                    return  # its end, or another stream, comes when the model has been pulled
                self._over = output
                self._metrics.finished(self._stream, output.terminal)
            case Moved():
                raise AssertionError("nobody can come back for a request of HTTP")
            case _:
                return  # a place in the queue: HTTP has no way to tell it
        self._filled.set()

    async def _write(self, send: Send) -> bool:
        """Write what there is; True if that was the last of it."""
        over = self._over
        if self._streamed:
            await self._write_stream(send, last=over is not None and isinstance(over.terminal, End))
        if over is None:
            return False
        if isinstance(over.terminal, End):
            if not self._streamed:
                body = b"".join(self._outbox)
                await answer(send, self._head.status, body, content_type=self._head.content_type.encode("latin-1"))
        else:
            await self._fail(send, over.terminal, over.payload)
        return True

    async def _write_stream(self, send: Send, *, last: bool) -> None:
        if not self._started:
            self._started = True
            headers = [(b"content-type", self._head.content_type.encode("latin-1")), (b"cache-control", b"no-cache")]
            # Proxies like nginx would else hold back what comes slowly.
            headers.append((b"x-accel-buffering", b"no"))
            await send({"type": "http.response.start", "status": self._head.status, "headers": headers})
        while self._outbox:
            data = self._outbox[0] if len(self._outbox) == 1 else b"".join(self._outbox)
            self._outbox.clear()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._outbox_bytes = sum(map(len, self._outbox))
            if self._paused and self._outbox_bytes <= self._outbox_bytes_max // 2:
                self._paused = False
                assert self._stream is not None
                self._upstream.unpause(self._stream)
        if last:
            await send({"type": "http.response.body", "body": b""})

    async def _fail(self, send: Send, failed: Failed, payload: bytes) -> None:
        self._metrics.errors[failed.code] += 1
        status = status_of(failed)
        assert self._stream is not None
        submit = self._stream.submit
        text = words_of(submit.path, submit.model, failed)
        if self._started:
            body = self._dialect.event(status, failed.code, text)
            await send({"type": "http.response.body", "body": body})
            return
        retry_after_s = _retry_after_s(status, failed.retry_after_ms)
        # What the engine answered itself is in its own words, and in its API's form; if it is JSON, and whole.
        own = failed.status and document(payload) is not None
        body = payload if own else self._dialect.document(status, failed.code, text)
        await answer(send, status, body, retry_after_s=retry_after_s)


async def until_gone(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
