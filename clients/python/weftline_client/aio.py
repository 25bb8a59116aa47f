"""The asyncio client: many concurrent requests over one WebSocket.

Theory of operation. `connect()` starts one task, which owns the socket until `close()`: it opens the line, signs the
challenge, reads every frame, and reconnects with full jitter when the line drops. Requests live in one table, and are
sent at once or, while there is no line, by the next one. Whatever arrives is put into the record of its request, and
whoever awaits that request is woken. A request leaves the table at its terminal message, or when the one who awaits it
leaves first, and then the server is told to `stop`.

Resuming. With `resume`, a dropped line ends nothing. The server keeps what it runs, and each new line takes it up:

    phase            sent on this line   NOT_FOUND                     DUPLICATE_ID      anything but an error
    WAITING          nothing yet         -                             -                 -
    RUNNING          the request         ends it                       ends it           RUNNING
    RESUMING         resume{id,lastSeq}  RESENT if no token had come   ends it           RUNNING
                                         and nobody stopped it,
                                         else ends it
    RESENT           the request, again  ends it                       RESUMING_AGAIN    RUNNING
    RESUMING_AGAIN   resume{id,lastSeq}  ends it                       ends it           RUNNING

A line that drops takes all but WAITING to RESUMING on the next one. DUPLICATE_ID after RESENT says that the first
sending was still on its way when `resume` overtook it. RATE_LIMITED, which a crowd of resumptions may earn, is tried
again; SHUTTING_DOWN of a server that said `draining` leaves it to the next line, for this one is about to be closed;
every other error ends the request. Tokens whose seq has been seen are repeats and are ignored.

Stopping. A server that has not taken a request up yet would answer its `stop` with NOT_FOUND, which could not be told
from the answer to `resume`. So `stop` is sent while RUNNING, and otherwise as soon as something comes for the request.
A request that was left stays in a second table until its terminal comes, so that a `stop` that was lost with the line
is repeated on the next: no engine works for nobody. `close()` closes with 1000, at which the server stops all; only
while there is no line it has to leave that to the server, which gives up what nobody has resumed in time.

Bounds. A stream buffers `stream_buffer` tokens. When it is full the reader stops reading, so TCP slows the server; all
streams of the connection wait meanwhile. A stream that makes no room for `stall_timeout_s` is stopped and ends with
SlowConsumerError after its buffered tokens. At most `CALLBACKS_MAX` asynchronous event callbacks run at once; at the
bound the reader waits likewise, then cancels them. At most `LEFT_MAX` requests that were left are remembered; at the
bound the oldest is forgotten, and if its `stop` was lost the server gives it up in time. A new line sends `MEND_BURST`
messages at once and then one each `MEND_PAUSE_S`, or as slowly as RATE_LIMITED asks. A request that was resumed or
refused `Reconnect.tries_max` times in a row, and never heard of, ends when the line drops once more, or it is refused
once more: one that fells each gateway that takes it up must not do so for ever. Such tries also lengthen the wait for
the next line.
Nothing is ever dropped without an error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
import uuid
from abc import ABC, abstractmethod
from asyncio import sleep
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from errno import ECONNREFUSED
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, overload

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

from weftline_client.credentials import Signer, load_config
from weftline_client.errors import (
    AuthenticationError,
    ConnectionLostError,
    InvalidRequestError,
    NotConnectedError,
    ProtocolError,
    RequestCancelledError,
    SlowConsumerError,
    WeftlineError,
    error_from_message,
)
from weftline_client.protocol import (
    MSGPACK_SUBPROTOCOL,
    ChatParams,
    EmbedParams,
    EmbedResult,
    GenerateParams,
    Message,
    Pulling,
    Queued,
    Result,
    Token,
    authenticate_message,
    decode,
    encode,
    request_message,
    resume_message,
    stop_message,
)

if TYPE_CHECKING:
    import ssl
    from pathlib import Path
    from types import TracebackType

Callback = Callable[[Message], object]

CALLBACKS_MAX = 10_000
CLOSE_TIMEOUT_S = 2.0
LEFT_MAX = 256
MEND_BURST = 100
MEND_PAUSE_S = 0.025  # with the burst, half of what a gateway allows a connection by default, and less than its rate
NEVER_CONNECTED = "not connected: call connect() first, or use a `with` block"

logger = logging.getLogger("weftline_client")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconnect:
    """How a lost line is opened again: at most `tries_max` tries within `time_max_s`.

    The server keeps what ran on the line for a minute.
    """

    tries_max: int = 10
    time_max_s: float = 120.0
    delay_first_s: float = 0.25
    delay_max_s: float = 15.0

    def delay_s(self, attempt: int, rng: random.Random) -> float:
        """The wait before the try numbered `attempt` from 0.

        Exponential with full jitter, which spreads a crowd of clients best (M. Brooker, "Exponential Backoff And
        Jitter", AWS Architecture Blog, 2015).
        """
        return rng.uniform(0, min(self.delay_max_s, self.delay_first_s * 2 ** min(attempt, 32)))


class Settings(TypedDict, total=False):
    """The keyword arguments of `AsyncClient`, for those that pass them on."""

    client_id: str
    private_key_path: str | Path | None
    private_key: str | bytes | None
    signature_algorithm: str
    encoding: Literal["json", "msgpack"]
    reconnect: Reconnect | None
    resume: bool
    connect_timeout_s: float
    stream_buffer: int
    stall_timeout_s: float
    message_bytes_max: int
    ssl: ssl.SSLContext | None


class _Phase(Enum):
    """Where a request stands on the line there is; the module's docstring has the table."""

    WAITING = auto()
    RUNNING = auto()
    RESUMING = auto()
    RESENT = auto()
    RESUMING_AGAIN = auto()


class _Request:
    """One request under way: what was asked, what has come, and how it ended."""

    __slots__ = (
        "buffer", "entered", "id", "last_seq", "message", "model", "news", "outcome", "parts", "phase",
        "pulling", "queued", "room", "stopped", "streamed", "thinking", "tool_calls", "tries",
    )  # fmt: skip

    def __init__(self, message: Message, *, streamed: bool) -> None:
        self.id: str = message["id"]
        self.model: str = message["model"]
        self.message = message
        self.streamed = streamed
        self.entered = time.monotonic()
        self.phase = _Phase.WAITING
        self.stopped = False  # whether the server is to end it
        self.tries = 0  # to take it up on a new line, since anything but an error came
        self.last_seq = -1
        self.queued: Queued | None = None
        self.pulling: Pulling | None = None
        self.parts: list[str] = []
        self.thinking: list[str] = []
        self.tool_calls: list[Message] = []
        self.buffer: list[Token] = []  # tokens not taken yet, if streamed
        self.outcome: Result | EmbedResult | WeftlineError | None = None
        self.news = asyncio.Event()  # set when there is something to take: a token, or the outcome
        self.room = asyncio.Event()  # set when the buffer has been taken, or will not be needed

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.parts)

    @property
    def sent(self) -> bool:
        """Whether it has been sent, on this line or another."""
        return self.phase is not _Phase.WAITING

    def asked(self) -> Message:
        """The message that asks for it now: of its deadline, what is left."""
        deadline_ms = self.message.get("deadlineMs")
        if not isinstance(deadline_ms, int):
            return self.message
        spent_ms = int((time.monotonic() - self.entered) * 1000)
        return self.message | {"deadlineMs": max(1, deadline_ms - spent_ms)}

    def push(self, message: Message) -> None:
        """Take in a `stream_token`. One whose seq was seen already is a repeat, one after the end is for nobody."""
        seq = message.get("seq", self.last_seq + 1)
        if seq <= self.last_seq:
            return
        self.last_seq = seq
        if self.outcome is not None:
            return
        if self.streamed:
            token = Token.from_message(message, seq)
            self.parts.append(token)
            self.buffer.append(token)
            self.news.set()
        else:
            self.parts.append(str(message.get("token") or ""))
        if thinking := message.get("thinking"):
            self.thinking.append(thinking)
        if tool_calls := message.get("toolCalls"):
            self.tool_calls += tool_calls

    def take(self) -> list[Token]:
        """The buffered tokens, which leave the buffer."""
        tokens, self.buffer = self.buffer, []
        self.room.set()
        if self.outcome is None:
            self.news.clear()
        return tokens

    def finish(self, outcome: Result | EmbedResult | WeftlineError) -> None:
        """End it; the first outcome holds."""
        if self.outcome is None:
            self.outcome = outcome
            self.news.set()
            self.room.set()

    def result(self) -> Result | EmbedResult:
        """What it ended with. Raises the error it ended with, or RuntimeError if it has not ended."""
        if self.outcome is None:
            raise RuntimeError(f"request {self.id} has not ended")
        if isinstance(self.outcome, WeftlineError):
            raise self.outcome
        return self.outcome


class StreamState:
    """What is known of a stream at any moment."""

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._iterated = False

    @property
    def id(self) -> str:
        """The request's id, as `stop()` takes it and event messages carry it."""
        return self._request.id

    @property
    def model(self) -> str:
        """The model, by the server's name for it once the stream has started."""
        return self._request.model

    @property
    def queued(self) -> Queued | None:
        """The last place in the queue that the server told, None if it told none."""
        return self._request.queued

    @property
    def pulling(self) -> Pulling | None:
        """How far the pull of the model was when the server last told; None if it told of none."""
        return self._request.pulling

    @property
    def text(self) -> str:
        """The text that has arrived so far, read or not."""
        return self._request.text

    @property
    def result(self) -> Result:
        """The result, once the stream has been read to its end.

        Raises the error the stream ended with, or RuntimeError if it has not ended.
        """
        result = self._request.result()
        assert isinstance(result, Result)
        return result

    def _iterate_once(self) -> None:
        if self._iterated:
            raise RuntimeError("a stream can be read only once")
        self._iterated = True


class Stream(StreamState):
    """A generation whose tokens are read as they come: `async for token in stream`, once.

    It is sent when it is first read (or entered with `async with`). Leaving it early, by `break`, an exception,
    cancellation or `aclose()`, stops the generation. Errors are raised after the tokens that came before them.
    """

    def __init__(self, pick: Callable[[], AsyncClient], request: _Request) -> None:
        super().__init__(request)
        self._pick = pick
        self._client: AsyncClient | None = None

    async def start(self) -> None:
        """Send the request, if that has not been done. Raises NotConnectedError if there is no line to send it on."""
        if self._client is None:
            self._client = self._pick()
            await self._client._submit(self._request)

    async def stop(self) -> None:
        """Ask the server to end the generation; the stream then ends with done_reason "cancelled"."""
        if self._client is not None:
            await self._client.stop(self.id)

    async def aclose(self) -> None:
        """Leave the stream: the generation is stopped and nothing more arrives."""
        self._leave()

    def _leave(self) -> None:
        if self._client is not None:
            self._client._leave(self._request)

    async def _batch(self) -> list[Token]:
        """All tokens that have come and not been taken; waits for at least one. Empty at the stream's end."""
        request = self._request
        await self.start()
        await request.news.wait()
        if tokens := request.take():
            return tokens
        request.result()
        return tokens

    async def _tokens(self) -> AsyncIterator[Token]:
        try:
            while batch := await self._batch():
                for token in batch:
                    yield token
        finally:
            self._leave()

    def __aiter__(self) -> AsyncIterator[Token]:
        # A generator of its own, so that Python tells us when the loop that reads it is left early.
        self._iterate_once()
        return self._tokens()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()


class _Requests(ABC):
    """The requests one can make, of one client or of a pool of them."""

    @abstractmethod
    def _pick(self) -> AsyncClient:
        """The client that is to carry the next request."""

    @overload
    def generate(
        self,
        prompt: str,
        model: str = ...,
        *,
        stream: Literal[False] = ...,
        **params: Unpack[GenerateParams],
    ) -> Coroutine[Any, Any, Result]: ...
    @overload
    def generate(
        self, prompt: str, model: str = ..., *, stream: Literal[True], **params: Unpack[GenerateParams]
    ) -> Stream: ...
    @overload
    def generate(
        self, prompt: str, model: str = ..., *, stream: bool, **params: Unpack[GenerateParams]
    ) -> Coroutine[Any, Any, Result] | Stream: ...
    def generate(
        self, prompt: str, model: str = "llama2", *, stream: bool = False, **params: Unpack[GenerateParams]
    ) -> Coroutine[Any, Any, Result] | Stream:
        """Complete a prompt: await it for the Result, or with `stream=True` iterate over its tokens.

        `params` are those of `GenerateParams`. Raises a WeftlineError by the server's code, ConnectionLostError if
        the line drops and the request cannot be resumed, NotConnectedError if there is none. Cancelling it stops the
        generation.
        """
        return self._start("generate", {"model": model, "prompt": prompt}, params, stream=stream)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str = ...,
        *,
        stream: Literal[False] = ...,
        **params: Unpack[ChatParams],
    ) -> Coroutine[Any, Any, Result]: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str = ...,
        *,
        stream: Literal[True],
        **params: Unpack[ChatParams],
    ) -> Stream: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str = ...,
        *,
        stream: bool,
        **params: Unpack[ChatParams],
    ) -> Coroutine[Any, Any, Result] | Stream: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str = "llama2",
        *,
        stream: bool = False,
        **params: Unpack[ChatParams],
    ) -> Coroutine[Any, Any, Result] | Stream:
        """Continue a conversation of {"role": …, "content": …} messages; otherwise as `generate`."""
        fields = {"model": model, "messages": list(messages)}
        return self._start("chat", fields, params, stream=stream)

    async def embed(
        self, input: str | Sequence[str], model: str = "llama2", **params: Unpack[EmbedParams]
    ) -> EmbedResult:
        """The embeddings of one or several texts. Raises as `generate` does."""
        texts = input if isinstance(input, str) else list(input)
        request = self._request("embed", {"model": model, "input": texts}, params, streamed=False)
        result = await self._complete(request)
        assert isinstance(result, EmbedResult)
        return result

    def _request(self, kind: str, fields: Message, params: Mapping[str, Any], *, streamed: bool) -> _Request:
        request_id = params.get("request_id") or str(uuid.uuid4())
        return _Request(request_message(kind, request_id, fields, params), streamed=streamed)

    def _start(
        self, kind: str, fields: Message, params: Mapping[str, Any], *, stream: bool
    ) -> Coroutine[Any, Any, Result] | Stream:
        request = self._request(kind, fields, params, streamed=stream)
        return Stream(self._pick, request) if stream else self._generated(request)

    async def _generated(self, request: _Request) -> Result:
        result = await self._complete(request)
        assert isinstance(result, Result)
        return result

    async def _complete(self, request: _Request) -> Result | EmbedResult:
        client = self._pick()
        try:
            await client._submit(request)
            await request.news.wait()
            return request.result()
        finally:
            client._leave(request)


class AsyncClient(_Requests):
    """A connection to weftline that any number of tasks may share.

    `server_url` is ws:// or wss:// (http and https mean the same), or several of them for gateways of one fabric: they
    are tried in order, and a line that drops is followed by one to the next. The key is PEM, RSA or Ed25519, without
    password. `encoding="msgpack"` asks for binary frames and falls back to JSON. `reconnect=None` leaves a lost line
    lost. `resume=False` ends what runs with the line it runs on, as `reconnect=None` does; otherwise requests go on
    where they were, and whoever awaits them notices nothing but the delay. `ssl` is for servers whose certificate the
    system does not know.

    Raises ValueError for a missing or bad setting, OSError for a key file that cannot be read.
    """

    def __init__(
        self,
        server_url: str | Sequence[str] = "ws://localhost:3000",
        *,
        client_id: str,
        private_key_path: str | Path | None = None,
        private_key: str | bytes | None = None,
        signature_algorithm: str = "SHA256",
        encoding: Literal["json", "msgpack"] = "json",
        reconnect: Reconnect | None = Reconnect(),
        resume: bool = True,
        connect_timeout_s: float = 10.0,
        stream_buffer: int = 8192,
        stall_timeout_s: float = 5.0,
        message_bytes_max: int = 64 << 20,
        ssl: ssl.SSLContext | None = None,
    ) -> None:
        if not client_id:
            raise ValueError("Client ID is required")
        if encoding not in ("json", "msgpack"):
            raise ValueError(f'encoding must be "json" or "msgpack", not {encoding!r}')
        urls = [server_url] if isinstance(server_url, str) else server_url
        self._urls = deque("ws" + url.removeprefix("http") if url.startswith("http") else url for url in urls)
        if not self._urls:
            raise ValueError("server_url must name at least one gateway")
        self.client_id = client_id
        self._signer = Signer(private_key, private_key_path, signature_algorithm)
        self._reconnect = reconnect
        self._resume = resume and reconnect is not None
        self._tries_max = reconnect.tries_max if reconnect else 0
        self._rng = random.Random()
        self._connect_timeout_s = connect_timeout_s
        self._stream_buffer = stream_buffer
        self._stall_timeout_s = stall_timeout_s
        self._dial: dict[str, Any] = {
            "subprotocols": [Subprotocol(MSGPACK_SUBPROTOCOL)] if encoding == "msgpack" else None,
            "compression": None,  # tokens are small and latency is what counts
            "max_size": message_bytes_max,
            "open_timeout": None,  # connect_timeout_s bounds the whole, authentication included
            "close_timeout": CLOSE_TIMEOUT_S,
        }
        if ssl is not None:
            self._dial["ssl"] = ssl

        self._task: asyncio.Task[None] | None = None  # owns the line, from connect() to close()
        self._line: asyncio.Future[ClientConnection] | None = None  # pending while a line is being opened
        self._group: asyncio.TaskGroup | None = None  # stops and callbacks; lives inside _task
        self._requests: dict[str, _Request] = {}
        self._left: dict[str, _Request] = {}  # ended here, but the server has not said so yet; oldest first
        self._mending: asyncio.Queue[_Request] = asyncio.Queue()  # what this line has yet to send for its requests
        self._mend_pause_s = 0.0
        self._draining = False  # the server has said that it is about to close this line
        self._calls: deque[tuple[str, asyncio.Future[Message]]] = deque()  # models and pings under way, oldest first
        self._callbacks: dict[str, list[Callback]] = {}
        self._callbacks_running: set[asyncio.Task[None]] = set()

    @classmethod
    def from_config(cls, path: str | Path, **settings: Any) -> Self:
        """A client as a NAME_config.json describes it, with `settings` on top.

        Raises OSError if it or the key cannot be read, ValueError if either is not what it should be.
        """
        return cls(**{**load_config(path), **settings})

    @property
    def server_url(self) -> str:
        """The gateway of the line there is, or else the one that is tried next."""
        return self._urls[0]

    @property
    def connected(self) -> bool:
        """Whether there is an authenticated line at the moment."""
        line = self._line
        return line is not None and line.done() and not line.cancelled() and line.exception() is None

    @property
    def active(self) -> int:
        """How many requests are under way."""
        return len(self._requests)

    async def connect(self) -> None:
        """Open the line and authenticate: one try, of at most `connect_timeout_s`, at each gateway in turn.

        Does nothing when connected.

        Raises AuthenticationError if the server refuses the identity, NotConnectedError if it cannot be reached.
        """
        if self._task is not None and not self._task.done():
            await self._ready()
            return
        self._line = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(), name="weftline-client")
        try:
            await self._ready()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the line. Requests under way end with ConnectionLostError, and running callbacks are cancelled.

        The server stops what it ran for this client: at once, or, if there is no line to tell it on, after a minute.
        """
        task = self._task
        if task is None:
            return
        if not task.cancelling():
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()):
            raise error

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def models(self) -> list[str]:
        """The names of the models that can be asked for."""
        models: list[str] = (await self._call("models"))["models"]
        return models

    async def ping(self) -> float:
        """Wait for the server's pong; the round trip in ms."""
        start = time.perf_counter()
        await self._call("ping")
        return (time.perf_counter() - start) * 1000

    async def stop(self, request_id: str) -> None:
        """Ask the server to end a request; it ends with done_reason "cancelled". Nothing if it is not under way.

        While there is no line this returns at once, and the next line stops the request.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        if not request.sent:
            self._end(request, RequestCancelledError("stopped before it was sent", request_id=request_id))
            return
        request.stopped = True
        if self.connected and request.phase is _Phase.RUNNING:
            assert self._line is not None
            await self._send_or_resume(self._line.result(), stop_message(request_id))

    def on(self, message_type: str, callback: Callback) -> None:
        """Call `callback(message)` for every message of that type that arrives after authentication.

        An asynchronous callback runs as a task. An exception in a callback is logged and ends nothing else.
        """
        self._callbacks.setdefault(message_type, []).append(callback)

    def off(self, message_type: str, callback: Callback | None = None) -> None:
        """Remove one callback of a message type, or all of them."""
        registered = self._callbacks.get(message_type, [])
        registered[:] = [other for other in registered if callback is not None and other != callback]

    # --- requests -----------------------------------------------------------------------------------------------------

    def _pick(self) -> AsyncClient:
        return self

    async def _submit(self, request: _Request) -> None:
        """Enter a request into the table and send it; while a line is being opened, `_serve` will send it."""
        if self._line is None:
            raise NotConnectedError(NEVER_CONNECTED)
        if self._find(request.id) is not None:
            # Also if it was left: until the server says that it ended, what comes with this id is of that one.
            raise InvalidRequestError("the id is in use", code="DUPLICATE_ID", request_id=request.id)
        self._requests[request.id] = request
        request.entered = time.monotonic()
        try:
            if self._line.done():
                connection = self._line.result()
                request.phase = _Phase.RUNNING
                await self._send_or_resume(connection, request.message)
        except BaseException:
            self._leave(request)
            raise

    def _leave(self, request: _Request) -> None:
        """Forget a request that nobody awaits any more, and stop it if it has not ended."""
        if self._requests.get(request.id) is request:
            self._abandon(request, RequestCancelledError("left before its end", request_id=request.id))

    def _abandon(self, request: _Request, error: WeftlineError) -> None:
        """End a request on this side, and have the server end it: now, or when the next line has taken it up."""
        self._end(request, error)
        if not request.sent:
            return
        request.stopped = True
        if self._resume:
            request.message = {}  # it may be large, and will not be sent again
            self._left[request.id] = request
            if len(self._left) > LEFT_MAX:
                del self._left[next(iter(self._left))]
        if request.phase is _Phase.RUNNING:
            self._send_soon(request, stop_message(request.id))

    def _end(self, request: _Request, outcome: Result | EmbedResult | WeftlineError) -> None:
        self._requests.pop(request.id, None)
        self._left.pop(request.id, None)
        request.finish(outcome)

    def _all(self) -> tuple[_Request, ...]:
        """The requests that the server may speak of, those that somebody awaits first."""
        return (*self._requests.values(), *self._left.values())

    def _find(self, request_id: str) -> _Request | None:
        """The one of those with that id."""
        return self._requests.get(request_id) or self._left.get(request_id)

    async def _call(self, kind: str) -> Message:
        """Send a message that has no id and wait for its reply."""
        line = await self._ready()
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._calls.append((kind, reply))
        await self._send(line, {"type": kind})
        return await reply

    async def _ready(self) -> ClientConnection:
        """The line, as soon as there is one. Raises why there will be none."""
        if self._line is None:
            raise NotConnectedError(NEVER_CONNECTED)
        while True:
            line = self._line
            connection = await asyncio.shield(line)
            if line is self._line:  # else it dropped before this task ran again
                return connection

    async def _send(self, connection: ClientConnection, message: Message) -> None:
        try:
            await connection.send(encode(message, binary=connection.subprotocol is not None))
        except ConnectionClosed as error:
            raise ConnectionLostError(f"connection lost: {error}", request_id=message.get("id")) from error

    async def _send_or_resume(self, connection: ClientConnection, message: Message) -> None:
        """Send a message of a request; if the line drops under it, the next line makes good for it."""
        try:
            await self._send(connection, message)
        except ConnectionLostError:
            if not self._resume:
                raise

    def _send_soon(self, request: _Request, message: Message) -> None:
        """Send a message of that request on the line there is, if there is one, without waiting."""
        if self.connected and self._group is not None:
            assert self._line is not None
            self._group.create_task(self._send_or_end(self._line.result(), request, message))

    async def _send_or_end(self, connection: ClientConnection, request: _Request, message: Message) -> None:
        try:
            await self._send(connection, message)
        except ConnectionLostError:
            logger.debug("the line dropped before this was sent: %s", message)
        except (TypeError, ValueError, OverflowError) as error:
            self._end(request, InvalidRequestError(f"cannot be encoded: {error}", request_id=request.id))

    # --- the line -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Keep a line open until cancelled, or until none can be had."""
        failure: WeftlineError = NotConnectedError("the client was closed")
        async with asyncio.TaskGroup() as self._group:
            try:
                connection = await self._open_any()
                while True:
                    lost = await self._serve(connection)
                    connection = await self._reopen(lost)
            except WeftlineError as error:
                failure = error
            finally:
                assert self._line is not None
                self._line.set_exception(failure)
                self._line.exception()  # seen: that nobody waits for a line is no news
                text = failure.message
                if not isinstance(failure, NotConnectedError):
                    text = f"connection lost; reconnecting failed: {text}"
                self._give_up(ConnectionLostError(text))
                for request in list(self._requests.values()):  # never sent
                    self._end(request, type(failure)(failure.message, request_id=request.id))
                for task in self._callbacks_running:
                    task.cancel()

    async def _open_any(self) -> ClientConnection:
        """One try at each gateway. Raises AuthenticationError at the first refusal, or NotConnectedError."""
        failures: list[NotConnectedError] = []
        for _ in range(len(self._urls)):
            try:
                return await self._open()
            except NotConnectedError as error:
                failures.append(error)
        raise NotConnectedError("; ".join(error.message for error in failures)) from failures[-1]

    async def _open(self) -> ClientConnection:
        """One try at an authenticated line; after a failure the next gateway is the first.

        Raises AuthenticationError or NotConnectedError.
        """
        try:
            return await self._dial_first()
        except NotConnectedError:
            self._urls.rotate(-1)
            raise

    async def _dial_first(self) -> ClientConnection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = await connect(self.server_url, **self._dial)
                try:
                    await self._authenticate(connection)
                except BaseException:
                    await _hang_up(connection)
                    raise
                return connection
        except WeftlineError:
            raise
        except TimeoutError as error:
            raise NotConnectedError(f"{self.server_url}: no answer in {self._connect_timeout_s} s") from error
        except (OSError, WebSocketException) as error:
            # asyncio's text names the number only, and gathers those of several addresses in one OSError without it.
            refused = "connection refused: " if f"[Errno {ECONNREFUSED}]" in str(error) else ""
            raise NotConnectedError(f"{self.server_url}: {refused}{error}") from error

    async def _authenticate(self, connection: ClientConnection) -> None:
        challenge = await _expect(connection, "challenge")
        signature = self._signer.sign(str(challenge.get("challenge")))
        answer = authenticate_message(self.client_id, signature, self._signer.algorithm, resume=self._resume)
        await self._send(connection, answer)
        result = await _expect(connection, "auth_result")
        if not result.get("success"):
            raise AuthenticationError(str(result.get("error") or "Unknown error"))

    async def _reopen(self, lost: WeftlineError) -> ClientConnection:
        """A new line in place of the lost one, by the policy. Raises ConnectionLostError or AuthenticationError."""
        policy = self._reconnect
        if policy is None:
            raise lost
        cause: WeftlineError = lost
        self._urls.rotate(-1)
        tries = min((request.tries for request in self._all() if request.sent), default=0)
        try:
            async with asyncio.timeout(policy.time_max_s):
                for attempt in range(tries, policy.tries_max):
                    delay_s = policy.delay_s(attempt, self._rng)
                    logger.info("reconnecting in %.2f s, try %d: %s", delay_s, attempt + 1, cause)
                    await sleep(delay_s)
                    try:
                        return await self._open()
                    except NotConnectedError as error:
                        cause = error
        except TimeoutError:
            logger.info("no new line in %s s", policy.time_max_s)
        raise ConnectionLostError(f"{lost.message}; reconnecting failed: {cause.message}") from cause

    async def _serve(self, connection: ClientConnection) -> WeftlineError:
        """Read the line until it drops, and end what cannot be resumed on another. Returns why it dropped."""
        assert self._line is not None
        assert self._group is not None
        self._line.set_result(connection)
        self._take_up()
        mending = self._group.create_task(self._mend(connection))
        resumable = False
        lost: WeftlineError = ConnectionLostError("the client was closed")
        try:
            while True:
                full = self._dispatch(decode(await connection.recv()))
                if full is not None:
                    await self._await_room(full)
                if len(self._callbacks_running) >= CALLBACKS_MAX:
                    await self._await_callbacks()
        except ConnectionClosed as error:
            lost = ConnectionLostError(f"connection lost: {error}")
            resumable = self._resume
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.exception("the server sent a message that cannot be read")
            lost = ProtocolError(f"unreadable message: {error!r}")
        finally:
            self._line = asyncio.get_running_loop().create_future()
            mending.cancel()
            self._fail_calls(lost)
            self._give_up(lost, self._tries_max if resumable else 0)
            await _hang_up(
                connection, CloseCode.PROTOCOL_ERROR if isinstance(lost, ProtocolError) else CloseCode.NORMAL_CLOSURE
            )
        return lost

    def _take_up(self) -> None:
        """Begin a line: what was sent on another is to be resumed, what waits is to be sent."""
        self._mending = asyncio.Queue()
        self._mend_pause_s = 0.0
        self._draining = False
        for request in self._all():
            if request.sent:
                request.phase = _Phase.RESUMING
                request.tries += 1
            self._mending.put_nowait(request)

    async def _mend(self, connection: ClientConnection) -> None:
        """Send for each request what its phase asks for, as fast as a gateway takes it."""
        for number in itertools.count():
            request = await self._mending.get()
            if pause_s := max(self._mend_pause_s, MEND_PAUSE_S if number >= MEND_BURST else 0.0):
                await sleep(pause_s)
            if self._find(request.id) is not request:
                continue
            if request.phase is _Phase.RESENT and request.stopped:
                request.phase = _Phase.RESUMING_AGAIN  # there may be something to stop, but nothing is wanted any more
            elif request.phase is _Phase.WAITING:
                request.phase = _Phase.RUNNING
            resuming = request.phase in (_Phase.RESUMING, _Phase.RESUMING_AGAIN)
            message = resume_message(request.id, request.last_seq) if resuming else request.asked()
            await self._send_or_end(connection, request, message)

    def _give_up(self, lost: WeftlineError, tries: int = 0) -> None:
        """End the requests that were sent and had that many tries or more, each with an error of its own."""
        for request in self._all():
            if request.sent and request.tries >= tries:
                self._end(request, type(lost)(lost.message, request_id=request.id, partial=request.text))

    def _fail_calls(self, lost: WeftlineError) -> None:
        """End the calls under way, each with an error of its own."""
        while self._calls:
            _, reply = self._calls.popleft()
            if not reply.done():
                reply.set_exception(type(lost)(lost.message))
                reply.exception()  # seen: whoever was still sending the call fails by that

    # --- what arrives -------------------------------------------------------------------------------------------------

    def _dispatch(self, message: Message) -> _Request | None:
        """Give a message to its request; returns that request if its buffer is now full.

        Raises KeyError, TypeError, ValueError or AttributeError if the message is not as the protocol has it.
        """
        kind = message["type"]
        if callbacks := self._callbacks.get(kind):
            self._emit(callbacks, message)
        if kind == "models_result":
            self._reply("models", message)
            return None
        if kind == "draining":
            self._draining = self._resume
            return None
        if kind == "pong":
            self._reply("ping", message)
            return None
        request = self._find(message.get("id", ""))
        if request is None:
            if kind == "error" and message.get("id") is None:
                self._reply(None, error_from_message(message))
            return None
        if request.phase is not _Phase.RUNNING and kind != "error":
            self._taken_up(request, kind)
        match kind:
            case "stream_token":
                request.push(message)
                if len(request.buffer) >= self._stream_buffer and request.outcome is None:
                    return request
            case "queued":
                request.queued = Queued.from_message(message)
            case "pulling":
                request.pulling = Pulling.from_message(message)
            case "stream_start":
                request.model = message["model"]
            case "stream_end":
                result = Result.from_message(
                    message,
                    model=request.model,
                    text=request.text,
                    thinking="".join(request.thinking),
                    tool_calls=request.tool_calls,
                )
                self._end(request, result)
            case "embed_result":
                self._end(request, EmbedResult.from_message(message))
            case "error":
                self._refused(request, error_from_message(message, request.text))
        return None

    def _taken_up(self, request: _Request, kind: str) -> None:
        """Something has come for a request that a new line was to take up."""
        request.phase = _Phase.RUNNING
        request.tries = 0
        if request.stopped and kind not in ("stream_end", "embed_result"):
            self._send_soon(request, stop_message(request.id))

    def _refused(self, request: _Request, error: WeftlineError) -> None:
        """An error has come for a request: its end or, while a line takes it up, the reason for another try."""
        match error.code, request.phase:
            case "NOT_FOUND", _Phase.RESUMING if request.last_seq < 0 and not request.stopped:
                request.phase = _Phase.RESENT
            case "NOT_FOUND", _Phase.RESUMING | _Phase.RESUMING_AGAIN:
                kind = RequestCancelledError if request.stopped else ConnectionLostError
                text = "the line dropped, and the server no longer has the request"
                self._end(request, kind(text, request_id=request.id, partial=request.text))
                return
            case "DUPLICATE_ID", _Phase.RESENT:
                request.phase = _Phase.RESUMING_AGAIN
            case "RATE_LIMITED", _Phase.RESUMING | _Phase.RESENT | _Phase.RESUMING_AGAIN if (
                request.tries < self._tries_max
            ):
                request.tries += 1
                self._mend_pause_s = max(self._mend_pause_s, error.retry_after_s or MEND_PAUSE_S)
            case "SHUTTING_DOWN", phase if self._draining and request.last_seq < 0:
                # The server is about to close this line: the next one takes it up.
                request.phase = _Phase.WAITING if phase is _Phase.RUNNING else _Phase.RESUMING
                return
            case _:
                self._end(request, error)
                return
        self._mending.put_nowait(request)

    def _reply(self, kind: str | None, outcome: Message | WeftlineError) -> None:
        """Answer the oldest call of that kind, or of any; an error that answers none is logged."""
        for index, (waiting, reply) in enumerate(self._calls):
            if kind is None or waiting == kind:
                del self._calls[index]
                if reply.done():
                    return
                if isinstance(outcome, WeftlineError):
                    reply.set_exception(outcome)
                else:
                    reply.set_result(outcome)
                return
        if isinstance(outcome, WeftlineError):
            logger.warning("the server reports: %s", outcome)

    async def _await_room(self, request: _Request) -> None:
        """Read nothing more until a full stream has been read, or has had its time."""
        request.room.clear()
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await request.room.wait()
        except TimeoutError:
            error = SlowConsumerError(
                f"{len(request.buffer)} tokens were not read in {self._stall_timeout_s} s",
                request_id=request.id,
                partial=request.text,
            )
            self._abandon(request, error)

    # --- callbacks ----------------------------------------------------------------------------------------------------

    def _emit(self, callbacks: list[Callback], message: Message) -> None:
        assert self._group is not None
        for callback in tuple(callbacks):
            try:
                pending = callback(message)
            except Exception:
                logger.exception("callback for %r failed", message["type"])
                continue
            if isawaitable(pending):
                task = self._group.create_task(_finish_callback(pending, message["type"]))
                self._callbacks_running.add(task)
                task.add_done_callback(self._callbacks_running.discard)

    async def _await_callbacks(self) -> None:
        """Read nothing more until a callback has finished; when none does, cancel them all."""
        done, running = await asyncio.wait(
            self._callbacks_running, timeout=self._stall_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not done:
            logger.error("cancelled %d callbacks that did not finish", len(running))
            for task in running:
                task.cancel()


async def _finish_callback(pending: Awaitable[object], message_type: str) -> None:
    try:
        await pending
    except Exception:
        logger.exception("callback for %r failed", message_type)


async def _expect(connection: ClientConnection, kind: str) -> Message:
    """The next message of the opening, which must be of that kind."""
    try:
        message = decode(await connection.recv())
    except ValueError as error:
        raise NotConnectedError(f"expected {kind}: {error}") from error
    if message.get("type") == "error":
        refusal = error_from_message(message)
        raise refusal if isinstance(refusal, AuthenticationError) else NotConnectedError(str(refusal))
    if message.get("type") != kind:
        raise NotConnectedError(f"expected {kind} message, got {message.get('type')}")
    return message


async def _hang_up(connection: ClientConnection, code: CloseCode = CloseCode.NORMAL_CLOSURE) -> None:
    """Close politely, within CLOSE_TIMEOUT_S, and in any case."""
    try:
        await asyncio.gather(connection.close(code), _read_away(connection))
    finally:
        connection.transport.abort()


async def _read_away(connection: ClientConnection) -> None:
    """Drop what still arrives: the peer's answer to our close stands behind it."""
    with suppress(ConnectionClosed):
        while True:
            await connection.recv()


class ConnectionPool(_Requests):
    """Several clients of one identity; each request goes to the one with the fewest under way.

    One connection carries many streams, so a pool pays only where a single line's reader or the per-connection limits
    of a server are what is short. Arguments are those of `AsyncClient`.
    """

    def __init__(
        self, server_url: str | Sequence[str] = "ws://localhost:3000", *, size: int = 4, **settings: Unpack[Settings]
    ) -> None:
        if size < 1:
            raise ValueError("a pool needs at least one client")
        self.clients = [AsyncClient(server_url, **settings) for _ in range(size)]

    @classmethod
    def from_config(cls, path: str | Path, *, size: int = 4, **settings: Any) -> Self:
        """A pool as a NAME_config.json describes its clients; see `AsyncClient.from_config`."""
        return cls(size=size, **{**load_config(path), **settings})

    async def connect(self) -> None:
        """Open all lines at once. If one fails all are closed, and its error is raised."""
        results = await asyncio.gather(*(client.connect() for client in self.clients), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result

    async def close(self) -> None:
        """Close all lines."""
        await asyncio.gather(*(client.close() for client in self.clients))

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def models(self) -> list[str]:
        """The names of the models that can be asked for."""
        return await self._pick().models()

    async def stop(self, request_id: str) -> None:
        """Ask the server to end a request, whichever client carries it."""
        await asyncio.gather(*(client.stop(request_id) for client in self.clients))

    def on(self, message_type: str, callback: Callback) -> None:
        """Register a callback with every client."""
        for client in self.clients:
            client.on(message_type, callback)

    def off(self, message_type: str, callback: Callback | None = None) -> None:
        """Remove one callback of a message type, or all of them, from every client."""
        for client in self.clients:
            client.off(message_type, callback)

    def _pick(self) -> AsyncClient:
        return min(self.clients, key=lambda client: (not client.connected, client.active))
