"""The load generators: the same stream asked for in four ways, each as cheap as its kind allows.

    httpx       Ollama's API straight at the engine, as a good program would: raw chunks, split into lines
    lean        the same over asyncio's transport and httptools, the least a client can cost; also OpenAI's API, and
                whatever else serves one of them
    websocket   weftline's protocol over asyncio's transport, frames parsed here: the least a client can cost
    weftline    `weftline_client.AsyncClient`, what a user of ours pays

The lean two can also be told to stop what runs, as their kind does it: `stopping`.

All decode every line or message with a typed decoder (`AsyncClient` with its own) and note when each token came.
"""

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import cycle
from time import perf_counter
from typing import Any, Final, Self, cast
from urllib.parse import urlsplit

import httptools
import httpx
import msgspec
from websockets.frames import Close, CloseCode, Frame, Opcode
from weftline_client import AsyncClient
from weftline_client.credentials import Signer, load_config

from bench.fabric import BenchError, Fabric

MODEL: Final = "simulated"
PROMPT: Final = "Why is the sky blue?"
CONNECT_S: Final = 10.0
FRAME_BYTES_MAX: Final = 2**20
CONNECTIONS_MAX: Final = 8
REFUSAL_BYTES_MAX: Final = 300
"""Of an error's document, as it is told."""


@dataclass(slots=True)
class Answer:
    """One stream: when it was asked for, and when which token came (`perf_counter` seconds)."""

    asked_s: float
    came_s: list[float] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)


Generate = Callable[[int], Coroutine[Any, Any, Answer]]
"""`generate(count)`: ask for `count` tokens and await them all; BenchError if anything else comes."""


Stop = Callable[[], None]
"""Stop everything that runs: `generate` returns what came until then."""


class _Line(msgspec.Struct):
    """What a client reads of a line of /api/generate."""

    response: str = ""
    done: bool = False
    error: str = ""


_decode_line: Final = msgspec.json.Decoder(_Line).decode


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Event(msgspec.Struct):
    """What a client reads of an event of /v1/chat/completions."""

    choices: list[_Choice] = []
    error: msgspec.Raw = msgspec.Raw()


_decode_event: Final = msgspec.json.Decoder(_Event).decode
EVENT: Final = b"data: {"


def _ollama_body(count: int) -> bytes:
    return msgspec.json.encode({"model": MODEL, "prompt": PROMPT, "options": {"num_predict": count}})


def _openai_body(count: int) -> bytes:
    messages = [{"role": "user", "content": PROMPT}]
    return msgspec.json.encode({"model": MODEL, "messages": messages, "max_tokens": count, "stream": True})


def _take_lines(answer: Answer, data: bytes) -> bytes:
    """Note the tokens of all complete lines; returns the rest."""
    now_s = perf_counter()
    lines = data.split(b"\n")
    for text in lines[:-1]:
        line = _decode_line(text)
        if line.error:
            raise BenchError(line.error)
        if not line.done:
            answer.came_s.append(now_s)
            answer.tokens.append(line.response)
    return lines[-1]


def _take_events(answer: Answer, data: bytes) -> bytes:
    """Note the tokens of all complete events; returns the rest."""
    now_s = perf_counter()
    lines = data.split(b"\n")
    for text in lines[:-1]:
        if text.startswith(EVENT):
            event = _decode_event(text[len(EVENT) - 1 :])
            if event.error:
                raise BenchError(bytes(event.error)[:REFUSAL_BYTES_MAX].decode(errors="replace"))
            for choice in event.choices:
                if choice.delta.content:
                    answer.came_s.append(now_s)
                    answer.tokens.append(choice.delta.content)
    return lines[-1]


@dataclass(slots=True, frozen=True)
class Api:
    """How a stream of `count` tokens is asked for, and its tokens are taken from what comes."""

    path: str
    body: Callable[[int], bytes]
    take: Callable[[Answer, bytes], bytes]


OLLAMA: Final = Api("/api/generate", _ollama_body, _take_lines)
OPENAI: Final = Api("/v1/chat/completions", _openai_body, _take_events)


@dataclass(slots=True, frozen=True)
class Way:
    """How streams go over HTTP: to `url`, which speaks `api`.

    `processes` are what is between client and engine, by the names their usage counts under; `direct` is the way that
    what they add is measured against, empty for one that is direct itself.
    """

    name: str
    url: str
    api: Api
    token: str = ""
    processes: tuple[str, ...] = ()
    direct: str = ""

    def opened(self, streams: int) -> contextlib.AbstractAsyncContextManager[Generate]:
        """A kept connection per stream."""
        return over_http(self.url, streams, self.api, self.token)


# Over HTTP ------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def over_httpx(fabric: Fabric, streams: int) -> AsyncIterator[Generate]:
    """One `httpx.AsyncClient` with a kept connection per stream."""
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=fabric.engine_url, limits=limits, timeout=None, trust_env=False) as client:

        async def generate(count: int) -> Answer:
            body = _ollama_body(count)
            answer = Answer(perf_counter())
            async with client.stream("POST", "/api/generate", content=body) as response:
                if response.status_code != 200:
                    raise BenchError(f"the engine answered {response.status_code}: {await response.aread()!r}")
                rest = b""
                async for data in response.aiter_raw():
                    rest = _take_lines(answer, rest + data)
            return answer

        yield generate


class _Connection(asyncio.Protocol):
    """A TCP connection that tells when it is gone."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _: Exception | None) -> None:
        self._gone.set_result(None)

    @property
    def gone(self) -> bool:
        """Whether it is closed, or will be at once."""
        return self._gone.done() or self._transport.is_closing()

    async def close(self) -> None:
        self._transport.close()
        await self._gone


class _HttpConnection(_Connection):
    """One kept connection, one request at a time; httptools calls `on_*`."""

    def __init__(self, host: str, api: Api, token: str) -> None:
        super().__init__()
        self._api = api
        self._head = f"POST {api.path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        if token:
            self._head += f"authorization: Bearer {token}\r\n"
        self._parser: Any = None
        self._answer = Answer(0.0)
        self._rest = b""
        self._done: asyncio.Future[None] | None = None

    async def generate(self, count: int) -> Answer:
        body = self._api.body(count)
        request = f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._done = asyncio.get_running_loop().create_future()
        answer = self._answer = Answer(perf_counter())
        self._transport.write(request)
        await self._done
        return answer

    def stop(self) -> None:
        """Leave, which is how Ollama's API is told to stop."""
        if self._done is not None and not self._done.done():
            self._done.set_result(None)
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._done is not None and not self._done.done():
                reason = error.__context__ or error  # what a callback raised is the context
                self._done.set_exception(BenchError(f"what came is no stream of tokens: {reason}"))
            self._transport.abort()

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() == 200:
            self._rest = self._api.take(self._answer, self._rest + body)
        else:
            self._rest += body

    def on_message_complete(self) -> None:
        assert self._done is not None
        status = self._parser.get_status_code()
        if status == 200:
            self._done.set_result(None)
        else:
            self._done.set_exception(BenchError(f"{status} was answered: {self._rest[:REFUSAL_BYTES_MAX]!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._done is not None and not self._done.done():
            self._done.set_exception(BenchError("the server closed the connection"))


@contextlib.asynccontextmanager
async def over_http(url: str, streams: int, api: Api = OLLAMA, token: str = "") -> AsyncIterator[Generate]:
    """A kept connection per stream to `url`, whatever is there; `token` goes with every request."""
    async with contextlib.AsyncExitStack() as stack:
        idle = [await _connected(stack, url, api, token) for _ in range(streams)]

        async def generate(count: int) -> Answer:
            connection = idle.pop()
            if connection.gone:  # a server may close what is idle
                connection = await _connected(stack, url, api, token)
            answer = await connection.generate(count)
            idle.append(connection)
            return answer

        yield generate


async def _connected(stack: contextlib.AsyncExitStack, url: str, api: Api, token: str) -> _HttpConnection:
    """A connection that is closed with `stack`."""
    host, port = _address(url)
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: _HttpConnection(f"{host}:{port}", api, token), host, port
    )
    stack.push_async_callback(connection.close)
    return connection


def over_lean_http(fabric: Fabric, streams: int) -> contextlib.AbstractAsyncContextManager[Generate]:
    """Straight at the engine."""
    return over_http(fabric.engine_url, streams)


@contextlib.asynccontextmanager
async def _https(url: str, count: int) -> AsyncIterator[list[_HttpConnection]]:
    """So many connections to an engine."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await _connected(stack, url, OLLAMA, "") for _ in range(count)]


# Through the fabric ---------------------------------------------------------------------------------------------------


class _Heard(msgspec.Struct):
    """What a client reads of the gateway's messages, whatever their type."""

    type: str
    id: str = ""
    token: str = ""
    seq: int = -1
    challenge: str = ""
    success: bool = False
    error: str = ""


_decode_message: Final = msgspec.json.Decoder(_Heard).decode


@dataclass(slots=True)
class _Waiting:
    answer: Answer
    done: asyncio.Future[None]


class WebSocketConnection(_Connection):
    """One authenticated connection to a gateway that carries many streams."""

    def __init__(self, url: str, client_id: str, signer: Signer) -> None:
        super().__init__()
        self._url = url
        self._client_id = client_id
        self._signer = signer
        self._rest = b""
        self._upgraded = False
        self._number = 0
        self._waiting: dict[str, _Waiting] = {}
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def generate(self, count: int) -> Answer:
        """Ask for `count` tokens and await them; BenchError if the gateway answers an error, or closes."""
        self._number += 1
        ref = str(self._number)
        frame = _frame(
            {"type": "generate", "id": ref, "model": MODEL, "prompt": PROMPT, "options": {"num_predict": count}}
        )
        answer = Answer(perf_counter())
        self._waiting[ref] = waiting = _Waiting(answer, asyncio.get_running_loop().create_future())
        self._transport.write(frame)
        await waiting.done
        return answer

    def stop(self) -> None:
        """Stop every stream under way; the gateway says of each that it has ended."""
        self._transport.write(b"".join(_frame({"type": "stop", "id": ref}) for ref in self._waiting))

    async def close(self) -> None:
        self._transport.write(Frame(Opcode.CLOSE, Close(CloseCode.NORMAL_CLOSURE, "").serialize()).serialize(mask=True))
        await super().close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        host, port = _address(self._url)
        key = base64.b64encode(os.urandom(16)).decode()
        self._transport.write(
            f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._fail("the gateway closed the connection")

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        if not self._upgraded:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                self._rest = data
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._fail(f"the gateway refused the WebSocket: {head[:200]!r}")
                return
            self._upgraded, data = True, rest
        now_s = perf_counter()
        at, size = 0, len(data)
        while size - at >= 2:
            length, start = data[at + 1], at + 2
            if length >= 126:
                start += 2 if length == 126 else 8
                if size < start:
                    break
                length = int.from_bytes(data[at + 2 : start], "big")
                if length > FRAME_BYTES_MAX:
                    self._fail(f"the gateway sent a frame of {length} bytes")
                    return
            end = start + length
            if size < end:
                break
            self._on_frame(data[at], data[start:end], now_s)
            at = end
        self._rest = data[at:]

    def _on_frame(self, head: int, payload: bytes, now_s: float) -> None:
        if head == 0x80 | Opcode.TEXT:
            self._on_message(_decode_message(payload), now_s)
        elif head == 0x80 | Opcode.PING:
            self._transport.write(Frame(Opcode.PONG, payload).serialize(mask=True))
        elif head == 0x80 | Opcode.CLOSE:
            self._fail(f"the gateway closed the connection: {payload[2:].decode(errors='replace')}")
        else:
            self._fail(f"the gateway sent a frame that it never should: {head:#x}")

    def _on_message(self, message: _Heard, now_s: float) -> None:
        match message.type:
            case "stream_token":
                answer = self._waiting[message.id].answer
                if message.seq != len(answer.tokens):
                    self._fail(f"token {message.seq} came in the place of {len(answer.tokens)}")
                    return
                answer.came_s.append(now_s)
                answer.tokens.append(message.token)
            case "stream_end":
                self._waiting.pop(message.id).done.set_result(None)
            case "stream_start" | "queued":
                pass
            case "challenge":
                signature = self._signer.sign(message.challenge)
                self._transport.write(
                    _frame(
                        {
                            "type": "authenticate",
                            "clientId": self._client_id,
                            "signature": signature,
                            "algorithm": self._signer.algorithm,
                        }
                    )
                )
            case "auth_result" if message.success:
                self.ready.set_result(None)
            case _:
                self._fail(f"{message.type}: {message.error}")

    def _fail(self, why: str) -> None:
        """End everything that waits with the reason."""
        for future in (self.ready, *(waiting.done for waiting in self._waiting.values())):
            if not future.done():
                future.set_exception(BenchError(why))
                future.exception()  # seen, should nobody wait for it any more
        self._transport.abort()


@contextlib.asynccontextmanager
async def over_websocket(fabric: Fabric, streams: int) -> AsyncIterator[Generate]:
    """The streams share `connections(streams)` connections."""
    async with _websockets(fabric, connections(streams)) as opened:
        turns = cycle(opened)
        yield lambda count: next(turns).generate(count)


@contextlib.asynccontextmanager
async def _websockets(fabric: Fabric, count: int) -> AsyncIterator[list[WebSocketConnection]]:
    """So many authenticated connections."""
    host, port = _address(fabric.gateway_url)
    config = load_config(fabric.key)
    signer = Signer(None, config["private_key_path"], config["signature_algorithm"])
    loop = asyncio.get_running_loop()

    def protocol() -> WebSocketConnection:
        return WebSocketConnection(fabric.gateway_url, config["client_id"], signer)

    async with contextlib.AsyncExitStack() as stack:
        opened: list[WebSocketConnection] = []
        for _ in range(count):
            _, connection = await loop.create_connection(protocol, host, port)
            stack.push_async_callback(connection.close)
            async with asyncio.timeout(CONNECT_S):
                await connection.ready
            opened.append(connection)
        yield opened


@contextlib.asynccontextmanager
async def over_weftline_client(fabric: Fabric, streams: int) -> AsyncIterator[Generate]:
    """The same with our Python client."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient.from_config(fabric.key, reconnect=None))
            for _ in range(connections(streams))
        ]
        turns = cycle(clients)

        async def generate(count: int) -> Answer:
            answer = Answer(perf_counter())
            options = {"num_predict": count}
            async for token in next(turns).generate(PROMPT, MODEL, stream=True, options=options):
                answer.came_s.append(perf_counter())
                answer.tokens.append(token)
            return answer

        yield generate


# Stopping -------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def stopping(client: str, fabric: Fabric, streams: int) -> AsyncIterator[tuple[Generate, Stop]]:
    """`client` is "lean", whose connections serve until `stop` only, or "websocket"; one connection per stream."""
    async with _https(fabric.engine_url, streams) if client == "lean" else _websockets(fabric, streams) as opened:
        turns: cycle[_HttpConnection | WebSocketConnection] = cycle(opened)

        def stop() -> None:
            for connection in opened:
                connection.stop()

        yield lambda count: next(turns).generate(count), stop


class Slots:
    """Asks the engine for its own count of busy slots, on a connection of its own. Use `async with`."""

    def __init__(self, engine_url: str) -> None:
        self._host, self._port = _address(engine_url)

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def busy(self) -> int:
        """Requests at work now, of all models."""
        self._writer.write(f"GET /debug/slots HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n\r\n".encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        _, _, rest = head.partition(b"\r\ncontent-length:")
        body = await self._reader.readexactly(int(rest.split(b"\r\n", 1)[0]))
        return sum(model.busy for model in _decode_slots(body).models.values())


class _ModelSlots(msgspec.Struct):
    busy: int


class _AllSlots(msgspec.Struct):
    models: dict[str, _ModelSlots]


_decode_slots: Final = msgspec.json.Decoder(_AllSlots).decode


def connections(streams: int) -> int:
    """How many connections `streams` share, request by request in turn: each may ask 50 times a second."""
    return min(CONNECTIONS_MAX, streams + 1)


def _frame(message: dict[str, Any]) -> bytes:
    return Frame(Opcode.TEXT, msgspec.json.encode(message)).serialize(mask=True)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port
