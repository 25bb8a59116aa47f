"""A worker between a broker and an engine that do as they are told: real sockets, real HTTP."""

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from msgspec.structs import replace

import workers.ollama
from common import protocol
from common.errors import Code, ProcessError, UsageError
from common.process import Stop, process_error
from common.protocol import (
    Assign,
    Beat,
    Bye,
    Cancel,
    Chunk,
    Claim,
    Drain,
    End,
    Error,
    Failed,
    Model,
    Probe,
    Refused,
    Register,
    Registered,
    Release,
    Replay,
    Started,
    State,
    Stats,
    Superseded,
    Who,
)
from common.transport import Socket
from workers.__main__ import main
from workers.agent import run
from workers.settings import WorkerSettings

M = TypeVar("M")
WAIT_S = 20.0
NDJSON = "application/x-ndjson"
FINAL = b'{"response":"","done":true,"done_reason":"stop","prompt_eval_count":2,"eval_count":3}\n'


def token(index: int) -> bytes:
    return b'{"response":"t%d","done":false}\n' % index


class FakeBroker:
    """Confirms registrations (unless told not to) and keeps everything else a worker says."""

    def __init__(self, address: str = "tcp://127.0.0.1:*") -> None:
        self.confirms = True
        self.registrations = 0
        self.peer = b""
        self._inbox: asyncio.Queue[tuple[Any, bytes]] = asyncio.Queue()
        self.socket = Socket("router", self._on_frame)
        try:
            self.address = self.socket.bind(address)
        except ProcessError:
            self.socket.close()
            raise

    def _on_frame(self, peer: bytes, frame: bytes) -> None:
        message, payload = protocol.from_worker.decode(frame)
        if isinstance(message, Probe):
            self.socket.send(protocol.encode(Beat()), peer)
            return
        if isinstance(message, Register):
            self.peer = peer
            if self.confirms:
                self.confirm()
        elif peer != self.peer:
            self.socket.send(protocol.encode(Who()), peer)
            return
        self._inbox.put_nowait((message, payload))

    def confirm(self) -> None:
        self.registrations += 1
        self.send(Registered(registration=self.registrations))

    def send(self, message: protocol.Message, payload: bytes = b"") -> None:
        self.socket.send(protocol.encode(message, payload), self.peer)

    async def get(self, kind: type[M]) -> tuple[M, bytes]:
        """The next message of a type; beats and states pass by unasked, anything else fails the test."""
        while True:
            async with asyncio.timeout(WAIT_S):
                message, payload = await self._inbox.get()
            if isinstance(message, kind):
                return message, payload
            assert isinstance(message, Beat | State | Register), message

    async def events(self) -> tuple[list[bytes], End | Failed, bytes]:
        """All events of the one running lease until its terminal, that, and its payload."""
        lines: list[bytes] = []
        while True:
            message, payload = await self.get(Chunk | End | Failed)  # type: ignore[arg-type]
            if not isinstance(message, Chunk):
                return lines, message, payload
            new = payload.splitlines(keepends=True)
            assert (message.seq, message.n) == (len(lines), len(new))
            lines += new

    def assign(self, engine: str, rid: bytes = b"r", **changes: Any) -> None:
        fields: dict[str, Any] = {"path": "/api/generate", "registration": self.registrations} | changes
        self.send(Assign(rid=rid, attempt=1, engine=engine, model="m:latest", digest="d1", **fields), b'{"model":"m"}')


class ScriptedEngine:
    """Answers polls like an Ollama with one model, and everything else by `script(write)`."""

    def __init__(self) -> None:
        self.models = [{"name": "m:latest", "digest": "d1", "size": 5, "details": {"family": "llama"}}]
        self.script: Callable[[Call], Awaitable[None]] = stream(token(0), FINAL)
        self.calls: list[Call] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            first, *lines = head.split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines if line)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            call = Call(first, headers, body, reader, writer)
            path = first.split()[1]
            answers: dict[str, Any] = {
                "/api/version": {"version": "0.33.0"},
                "/api/tags": {"models": self.models},
                "/api/ps": {"models": []},
                "/api/show": {"capabilities": ["completion"]},
            }
            if path in answers:
                await call.answer(200, "application/json", json.dumps(answers[path]).encode())
            else:
                self.calls.append(call)
                await self.script(call)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class Call:
    """One request at the engine. `end` says that the connection may be closed."""

    def __init__(
        self,
        first: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.first, self.headers, self.body = first, headers, body
        self._reader, self._writer = reader, writer

    async def head(self, status: int = 200, content_type: str = NDJSON) -> None:
        await self.raw(
            f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n"
            "connection: close\r\n\r\n".encode()
        )

    async def piece(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def answer(self, status: int, content_type: str, body: bytes) -> None:
        await self.head(status, content_type)
        if body:
            await self.piece(body)
        await self.end()

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def closed(self) -> None:
        """The worker closed the connection."""
        async with asyncio.timeout(WAIT_S):
            assert await self._reader.read() == b""


def stream(*pieces: bytes, end: bool = True) -> Callable[[Call], Awaitable[None]]:
    async def script(call: Call) -> None:
        await call.head()
        for piece in pieces:
            await call.piece(piece)
        if end:
            await call.end()

    return script


def document(status: int, body: bytes) -> Callable[[Call], Awaitable[None]]:
    return lambda call: call.answer(status, "application/json", body)


class Line:
    """A worker that runs, the broker before it, the engine behind it."""

    def __init__(self, broker: FakeBroker, engine: ScriptedEngine) -> None:
        self.broker = broker
        self.engine = engine
        self.register = Register(name="", epoch="", engines=())
        self.stop = asyncio.Event()
        self.task: asyncio.Task[int] | None = None

    async def start(self, **settings: Any) -> None:
        registered = asyncio.Event()
        values: dict[str, Any] = {"ollama": (f"{self.engine.url},slots=2",), "poll_interval_s": 0.05} | settings
        self.task = asyncio.create_task(
            run(
                WorkerSettings(name="gpu-1", **({"broker": self.broker.address} | values)),
                self.stop,
                on_registered=registered.set,
            )
        )
        self.register, _ = await self.broker.get(Register)
        async with asyncio.timeout(WAIT_S):
            await registered.wait()

    async def end(self) -> int:
        assert self.task is not None
        self.stop.set()
        async with asyncio.timeout(WAIT_S):
            return await self.task


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    line = Line(FakeBroker(), ScriptedEngine())
    await line.engine.start()
    try:
        yield line
        if line.task is not None and not line.task.done():
            assert await line.end() == 0
    finally:
        if line.task is not None:
            line.task.cancel()
        line.broker.socket.close()
        await line.engine.stop()


async def test_registers_with_what_the_engine_serves(line: Line) -> None:
    await line.start()
    [engine] = line.register.engines
    assert (engine.url, engine.kind, engine.version, engine.up) == (line.engine.url, "ollama", "0.33.0", True)
    (model,) = engine.models
    assert msgspec.json.decode(model.listed)["name"] == "m:latest"
    assert replace(model, listed=b"") == Model(name="m:latest", digest="d1", slots=2, size_bytes=5)
    assert line.register.name == "gpu-1"
    assert len(line.register.epoch) == 32
    line.engine.models = []
    state, _ = await line.broker.get(State)
    assert state.engines[0].models == ()
    await line.broker.get(Beat)


async def test_a_stream(line: Line) -> None:
    line.engine.script = stream(token(0) + token(1)[:5], token(1)[5:], FINAL)
    await line.start()
    line.broker.assign(line.engine.url)
    started, _ = await line.broker.get(Started)
    assert (started.rid, started.attempt, started.status, started.content_type) == (b"r", 1, 200, NDJSON)
    lines, end, _ = await line.broker.events()
    assert lines == [token(0), token(1), FINAL]
    stats = Stats(done_reason="stop", prompt_tokens=2, completion_tokens=3)
    assert end == End(rid=b"r", attempt=1, seq=3, stats=stats)
    [call] = line.engine.calls
    assert call.first == "post /api/generate http/1.1"
    assert call.body == b'{"model":"m"}'
    assert call.headers["content-type"] == "application/json"
    assert call.headers["accept-encoding"] == "identity"
    line.broker.send(Replay(rid=b"r", attempt=1, start=2))
    chunk, payload = await line.broker.get(Chunk)
    assert (chunk.seq, chunk.n, payload) == (2, 1, FINAL)
    assert (await line.broker.get(End))[0] == end


async def test_each_line_arrives_before_the_engine_says_more(line: Line) -> None:
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        for index in range(3):
            await call.piece(token(index))
            await go_on.wait()
            go_on.clear()
        await call.piece(FINAL)
        await call.end()

    line.engine.script = script
    await line.start()
    line.broker.assign(line.engine.url)
    await line.broker.get(Started)
    for index in range(3):
        chunk, payload = await line.broker.get(Chunk)
        assert (chunk.seq, payload) == (index, token(index))
        go_on.set()
    await line.broker.get(Chunk)
    await line.broker.get(End)


async def test_an_embedding_is_one_event(line: Line) -> None:
    body = b'{"embeddings":[[0.5,\n0.25]],"prompt_eval_count":2}'
    line.engine.script = document(200, body)
    await line.start()
    line.broker.assign(line.engine.url, path="/api/embed")
    await line.broker.get(Started)
    chunk, payload = await line.broker.get(Chunk)
    assert (chunk.n, payload) == (1, body)
    assert (await line.broker.get(End))[0].stats == Stats(prompt_tokens=2)


@pytest.mark.parametrize(
    ("script", "code", "retryable", "message", "events"),
    [
        (document(404, b'{"error":"model not found"}'), Code.MODEL_NOT_FOUND, False, "model not found", 0),
        (document(400, b'{"error":"bad"}'), Code.INVALID_MESSAGE, False, "bad", 0),
        (document(500, b'{"error":"boom"}'), Code.BACKEND_ERROR, True, "boom", 0),
        (document(503, b"x" * 2**21), Code.BACKEND_ERROR, True, "answered 503", 0),
        (stream(token(0)), Code.BACKEND_ERROR, True, "without a last line", 1),
        (stream(token(0), end=False), Code.BACKEND_ERROR, True, "127.0.0.1", 1),
        (stream(token(0), b'{"error":"the runner died"}\n', token(1)), Code.BACKEND_ERROR, True, "the runner died", 1),
    ],
)
async def test_failures(
    line: Line, script: Callable[[Call], Awaitable[None]], code: Code, retryable: bool, message: str, events: int
) -> None:
    line.engine.script = script
    await line.start()
    line.broker.assign(line.engine.url)
    if events:
        await line.broker.get(Started)
    lines, failed, payload = await line.broker.events()
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable, failed.seq) == (code, retryable, events)
    assert message in failed.message
    assert lines == [token(0)][:events]
    assert len(payload) <= 2**20
    line.engine.script = stream(FINAL)  # the slot is free, the worker well
    line.broker.assign(line.engine.url, rid=b"next")
    await line.broker.get(Started)
    assert (await line.broker.events())[0] == [FINAL]


@pytest.mark.parametrize("path", ["http://127.0.0.1:1/api/generate", "api/generate", "/api\x00"])
async def test_a_path_that_is_none(line: Line, path: str) -> None:
    await line.start()
    line.broker.assign(line.engine.url, path=path)
    failed, _ = await line.broker.get(Failed)
    assert (failed.code, failed.retryable) == (Code.INVALID_MESSAGE, False)
    assert line.engine.calls == []


@pytest.mark.parametrize("begins", [False, True])
async def test_an_engine_that_hangs_is_left(line: Line, begins: bool) -> None:
    closed = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        if begins:
            await call.piece(token(0))
        await call.closed()
        closed.set()

    line.engine.script = script
    await line.start(first_byte_s=0.2, silence_s=0.1)
    line.broker.assign(line.engine.url)
    await line.broker.get(Started)
    _, failed, _ = await line.broker.events()
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable, failed.seq) == (Code.BACKEND_ERROR, True, int(begins))
    async with asyncio.timeout(WAIT_S):
        await closed.wait()


async def test_cancel_closes_the_engine_s_connection(line: Line) -> None:
    closed = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.piece(token(0))
        await call.closed()
        closed.set()

    line.engine.script = script
    await line.start()
    line.broker.assign(line.engine.url)
    await line.broker.get(Started)
    await line.broker.get(Chunk)
    line.broker.send(Cancel(rid=b"r"))
    async with asyncio.timeout(WAIT_S):
        await closed.wait()
    line.engine.script = stream(FINAL)
    line.broker.assign(line.engine.url, rid=b"next")
    assert (await line.broker.get(Started))[0].rid == b"next"
    assert (await line.broker.events())[0] == [FINAL]


async def test_an_engine_that_dies_and_returns(line: Line) -> None:
    dying = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.piece(token(0))
        await dying.wait()

    line.engine.script = script
    await line.start(poll_interval_s=0.1)
    line.broker.assign(line.engine.url)
    await line.broker.get(Started)
    await line.broker.get(Chunk)
    await line.engine.stop()
    dying.set()
    seen: dict[type, Any] = {}
    while len(seen) < 2:
        message, _ = await line.broker.get(Failed | State)  # type: ignore[arg-type]
        seen[type(message)] = message
    assert (seen[Failed].code, seen[Failed].retryable, seen[Failed].seq) == (Code.BACKEND_ERROR, True, 1)
    [engine] = seen[State].engines
    assert not engine.up
    assert line.engine.url in engine.error
    line.broker.assign(line.engine.url, rid=b"next")
    assert "does not answer" in (await line.broker.get(protocol.Refused))[0].reason
    line.engine.script = stream(FINAL)
    await line.engine.start()
    assert (await line.broker.get(State))[0].engines[0].up
    line.broker.assign(line.engine.url, rid=b"again")
    await line.broker.get(Started)
    assert (await line.broker.events())[0] == [FINAL]


async def test_a_worker_whose_engine_is_down_registers_and_says_so(line: Line) -> None:
    await line.engine.stop()
    await line.start()
    [engine] = line.register.engines
    assert not engine.up
    assert "is down" in engine.error
    await line.engine.start()
    assert (await line.broker.get(State))[0].engines[0].up


async def test_a_broker_that_restarts_is_told_what_runs(line: Line) -> None:
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.piece(token(0))
        await go_on.wait()
        await call.piece(token(1) + FINAL)
        await call.end()

    line.engine.script = script
    await line.start()
    line.broker.assign(line.engine.url)
    await line.broker.get(Started)
    await line.broker.get(Chunk)
    line.broker.socket.close()
    async with asyncio.timeout(WAIT_S):
        while True:  # the port is free when libzmq's thread has closed it
            with contextlib.suppress(ProcessError):
                line.broker = FakeBroker(line.broker.address)
                break
            await asyncio.sleep(0.01)
    register, _ = await line.broker.get(Register)
    assert register.epoch == line.register.epoch
    claim = Claim(
        rid=b"r",
        attempt=1,
        engine=line.engine.url,
        digest="d1",
        client="",
        ref="",
        model="m:latest",
        path="/api/generate",
        top=1,
    )
    assert register.leases == (claim,)
    line.broker.send(Replay(rid=b"r", attempt=1, start=0))
    await line.broker.get(Started)
    chunk, payload = await line.broker.get(Chunk)
    assert (chunk.seq, payload) == (0, token(0))
    go_on.set()
    chunk, payload = await line.broker.get(Chunk)
    assert (chunk.seq, chunk.n, payload) == (1, 2, token(1) + FINAL)
    assert (await line.broker.get(End))[0].seq == 3


async def test_a_broker_that_takes_nothing_stops_the_engine_at_the_bound(line: Line) -> None:
    lines = [b'{"response":"%06d%b"}\n' % (index, b"x" * 200) for index in range(20_000)]

    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await go_on.wait()
        await call.head()
        for index in range(0, len(lines), 500):
            await call.piece(b"".join(lines[index : index + 500]))
        await call.piece(FINAL)
        await call.end()

    line.engine.script = script
    await line.start(lease_bytes_max=2**18)
    line.broker.assign(line.engine.url)
    line.broker.confirms = False
    line.broker.send(Who())
    await line.broker.get(Register)
    go_on.set()
    register, _ = await line.broker.get(Register)
    [claim] = register.leases
    assert claim.top * len(lines[0]) < 2**19
    line.broker.confirms = True
    line.broker.confirm()
    await line.broker.get(Started)
    got, end, _ = await line.broker.events()
    assert got == [*lines, FINAL]
    assert end.seq == len(lines) + 1


async def test_a_line_beyond_the_bound_passes(line: Line) -> None:
    long = b'{"response":"%b"}\n' % (b"x" * 2**20)
    line.engine.script = stream(long, long, FINAL)
    await line.start(lease_bytes_max=2**16)
    line.broker.assign(line.engine.url)
    await line.broker.get(Started)
    assert (await line.broker.events())[0] == [long, long, FINAL]


async def test_garbage_from_the_broker_is_answered(line: Line) -> None:
    await line.start()
    line.broker.socket.send(b"\0\0\0\1garbage", line.broker.peer)
    assert (await line.broker.get(Error))[0].code is Code.INVALID_MESSAGE


async def test_superseded_ends_with_1(line: Line) -> None:
    await line.start()
    line.broker.send(Superseded())
    assert line.task is not None
    async with asyncio.timeout(WAIT_S):
        assert await line.task == 1


async def test_stop_fails_what_runs_and_says_bye(line: Line) -> None:
    line.engine.script = lambda call: call.closed()
    await line.start()
    line.broker.assign(line.engine.url)
    line.broker.assign(line.engine.url, rid=b"s")
    await line.broker.get(Beat)
    assert await line.end() == 0
    codes = [(await line.broker.get(Failed))[0] for _ in range(2)]
    assert {(failed.rid, failed.code, failed.retryable) for failed in codes} == {
        (b"r", Code.SHUTTING_DOWN, True),
        (b"s", Code.SHUTTING_DOWN, True),
    }
    await line.broker.get(Bye)


async def test_a_worker_that_is_told_to_end_finishes_first(line: Line) -> None:
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.piece(token(0))
        await go_on.wait()
        await call.piece(FINAL)
        await call.end()

    line.engine.script = script
    line.stop = Stop()
    await line.start()
    line.broker.assign(line.engine.url)
    await line.broker.get(Started)
    await line.broker.get(Chunk)
    line.stop.set()
    while not (await line.broker.get(State))[0].draining:
        pass
    line.broker.assign(line.engine.url, rid=b"s")
    assert (await line.broker.get(Refused))[0].reason == "the worker is draining"
    go_on.set()
    await line.broker.get(Chunk)
    assert (await line.broker.get(End))[0].seq == 2
    await line.broker.get(Beat)
    assert line.task is not None
    assert not line.task.done(), "somebody may come back for the events"
    line.broker.send(Release(rid=b"r"))
    await line.broker.get(Bye)
    assert await line.end() == 0


async def test_a_worker_does_not_finish_for_ever(line: Line) -> None:
    line.engine.script = lambda call: call.closed()
    line.stop = Stop()
    await line.start(drain_s=0.01)
    line.broker.assign(line.engine.url)
    await line.broker.get(Beat)
    line.stop.set()
    assert (await line.broker.get(Failed))[0].code is Code.SHUTTING_DOWN
    assert await line.end() == 0


async def test_a_drained_worker_is_still_drained_after_a_restart(line: Line, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data_dir": tmp_path / "new"}
    for command, drained in ((None, False), (Drain(), True), (Drain(), True), (Drain(on=False), False)):
        if command is not None:
            line.broker.send(command)
            while (await line.broker.get(State))[0].draining != drained:
                pass
            await line.end()
            await line.broker.get(Bye)
            line.stop = asyncio.Event()
        await line.start(**settings)
        assert line.register.draining == drained


async def test_a_worker_that_cannot_keep_in_mind_that_it_is_drained_drains_all_the_same(
    line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    await line.start(data_dir=tmp_path / "file")
    line.broker.send(Drain())
    while not (await line.broker.get(State))[0].draining:
        pass
    assert "cannot keep in mind that this worker is drained" in caplog.text


async def test_the_next_broker_of_the_list_takes_over(line: Line) -> None:
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.head()
        await call.piece(token(0))
        await go_on.wait()
        await call.piece(FINAL)
        await call.end()

    line.engine.script = script
    second = FakeBroker()
    try:
        await line.start(broker=f"{line.broker.address},{second.address}")
        line.broker.assign(line.engine.url)
        await line.broker.get(Started)
        await line.broker.get(Chunk)
        line.broker.socket.close()
        register, _ = await second.get(Register)
        assert (register.epoch, [lease.top for lease in register.leases]) == (line.register.epoch, [1])
        go_on.set()
        chunk, payload = await second.get(Chunk)
        assert (chunk.seq, payload) == (1, FINAL)
        await second.get(End)
        assert await line.end() == 0
    finally:
        second.socket.close()


async def test_stop_without_a_broker(line: Line) -> None:
    line.broker.socket.close()
    line.task = asyncio.create_task(
        run(WorkerSettings(broker=line.broker.address, ollama=(line.engine.url,)), line.stop)
    )
    assert await line.end() == 0


# The process ----------------------------------------------------------------------------------------------------------

FAKE_OLLAMA = """#!{python}
import http.server, json, os, sys
assert sys.argv[1:] == ["serve"]
host, port = os.environ["OLLAMA_HOST"].removeprefix("http://").split(":")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({{"version": str(os.getpid()), "models": []}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
{before}
http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
"""


def fake_ollama(folder: Path, monkeypatch: pytest.MonkeyPatch, before: str = "") -> None:
    path = folder / "ollama"
    path.write_text(FAKE_OLLAMA.format(python=sys.executable, before=before))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


async def test_start_ollama_owns_its_child(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ollama(tmp_path, monkeypatch)
    monkeypatch.setattr(workers.ollama, "SERVE_BACKOFF_S", 0.01)
    await line.engine.stop()  # its port is free now
    await line.start(start_ollama=True)
    [engine] = line.register.engines
    assert engine.up
    first = int(engine.version)
    os.kill(first, signal.SIGKILL)
    while engine.version == str(first):
        [engine] = (await line.broker.get(State))[0].engines
    assert engine.up
    assert await line.end() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(engine.version), 0)
    await line.engine.start()


async def test_start_ollama_leaves_a_running_engine_alone(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    await line.start(start_ollama=True)
    assert line.register.engines[0].version == "0.33.0"


@pytest.mark.parametrize(
    ("before", "found", "host", "kind", "words"),
    [
        ("", False, "127.0.0.1:1", UsageError, "no `ollama` on PATH"),
        ("", True, "192.0.2.1:1", UsageError, "is not on it"),
        ("sys.exit(3)", True, "127.0.0.1:1", ProcessError, "ended with status 3"),
        ("import time; time.sleep(60)", True, "127.0.0.1:1", ProcessError, "did not answer"),
    ],
)
async def test_start_ollama_that_cannot(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    found: bool,
    host: str,
    kind: type[ProcessError],
    words: str,
) -> None:
    monkeypatch.setattr(workers.ollama, "SERVE_START_S", 3.0 if "status" in words else 0.2)
    monkeypatch.setattr(workers.ollama, "CONNECT_S", 0.1)
    monkeypatch.setattr(workers.ollama, "POLL_S", 0.1)
    fake_ollama(tmp_path, monkeypatch, before)
    if not found:
        monkeypatch.setenv("PATH", "")
    with pytest.raises(BaseExceptionGroup) as caught:
        await run(WorkerSettings(ollama=(host,), start_ollama=True), asyncio.Event())
    error = process_error(caught.value)
    assert isinstance(error, kind)
    assert words in str(error)


async def test_the_command_ends_well_on_sigterm(line: Line) -> None:
    command = [sys.executable, "-m", "workers", "--broker", line.broker.address, "--ollama", line.engine.url]
    process = await asyncio.create_subprocess_exec(*command, "--name", "gpu-2", stderr=asyncio.subprocess.PIPE)
    try:
        assert (await line.broker.get(Register))[0].name == "gpu-2"
        await line.broker.get(Beat)
        process.terminate()
        async with asyncio.timeout(WAIT_S):
            _, errors = await process.communicate()
        assert process.returncode == 0
        await line.broker.get(Bye)
        assert b"engine up" in errors
        assert b"registered with the broker" in errors
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--broker", "nowhere"], "HOST:PORT"),
        (["--ollama", "ftp://a"], "http or https"),
        (["--log-level", "loud"], "log-level"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_the_command_s_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
