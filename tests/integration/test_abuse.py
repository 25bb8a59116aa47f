"""Peers that lie, flood or make no sense: what each gets, and that nobody else notices."""

import asyncio
import contextlib
import json
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import pytest
import websockets

import workers.agent
import workers.ollama
from common.errors import Code
from common.protocol import Failed, Submit, full_name
from gateway.hints import EVERYBODYS
from gateway.session import Histories, Over, Stream
from gateway.settings import GatewaySettings
from gateway.websocket import Closed, Connection, Services
from tests.fabric import Fabric
from tests.integration.test_worker import Call, ScriptedEngine, document, stream
from tests.wsclient import Wire, authenticated, connect
from workers.embedded.simulated import Settings, transcript
from workers.ollama import Backend
from workers.settings import EngineAddress, WorkerSettings

LINE = b'{"response":"a","done":false}\n'
FINAL = b'{"response":"","done":true,"eval_count":1}\n'
DEEP = b"[" * 5000 + b"]" * 5000
HUGE = b"1" + b"0" * 40
EMBEDDING = b'{"embeddings":[[1.0]]}'


@contextlib.asynccontextmanager
async def hostile(fabric: Fabric) -> AsyncIterator[ScriptedEngine]:
    """An engine whose answers a test scripts, behind a worker of its own in the fabric; its model is `m`."""
    assert fabric.addresses is not None
    engine = ScriptedEngine()
    await engine.start()
    stop, registered = asyncio.Event(), asyncio.Event()
    settings = WorkerSettings(broker=fabric.addresses.workers, ollama=(engine.url,), name="hostile")
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(workers.agent.run(settings, stop, on_registered=registered.set))
            await registered.wait()
            yield engine
            stop.set()
    finally:
        await engine.stop()


async def terminals(wire: Wire, ref: str) -> list[dict[str, Any]]:
    """Everything said about a request until a ping sent after its first terminal is answered."""
    first = await wire.hear_until("stream_end", "embed_result", "error", ref=ref)
    heard = [first]
    await wire.send({"type": "ping"})
    while (message := await wire.hear())["type"] != "pong":
        heard.append(message)
    return heard


# An engine ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        stream(LINE, b'{"response":"\xff"}\n', FINAL),
        stream(LINE, b'{"response":"\\ud800"}\n', FINAL),
        stream(LINE, b'{"x":' + DEEP + b"}\n", FINAL),
        stream(LINE, b'{"tool_calls":"\xff"}\n', FINAL),
        stream(LINE, b'{"done":true,"x":' + DEEP + b"}\n"),
        stream(LINE, b'{"error":' + DEEP + b"}\n"),
        stream(LINE, b"<html>\n", FINAL),
        document(200, b""),
        document(200, b'{"hello":"world"}'),
    ],
    ids=["utf8", "surrogate", "deep", "utf8 in tool calls", "deep end", "deep error", "html", "empty", "foreign"],
)
async def test_what_is_not_ollamas_ends_its_own_stream_and_no_other(
    fabric: Fabric, script: Callable[[Call], Awaitable[None]]
) -> None:
    async with hostile(fabric) as engine, authenticated(fabric) as wire:
        engine.script = script
        await wire.send({"type": "generate", "id": "h", "model": "m", "prompt": "x"})
        (error,) = await terminals(wire, "h")
        assert (error["type"], error["code"]) == ("error", "BACKEND_ERROR")
        # Gateway and worker live: the same connection, and the same engine when it makes sense again.
        engine.script = stream(LINE, FINAL)
        await wire.send({"type": "generate", "id": "n", "model": "m", "prompt": "x"})
        assert (await terminals(wire, "n"))[0]["type"] == "stream_end"


async def test_numbers_that_msgpack_cannot_carry(fabric: Fabric) -> None:
    """JSON's numbers have no bounds: not on the way from the worker, and not to a client that speaks msgpack."""
    async with (
        hostile(fabric) as engine,
        websockets.connect(
            fabric.url, subprotocols=[websockets.Subprotocol("weftline.msgpack")], proxy=None
        ) as connection,
    ):
        wire = Packed(connection)
        assert (await wire.authenticate(fabric))["success"]
        engine.script = stream(b'{"done":true,"eval_count":' + HUGE + b',"total_duration":-' + HUGE + b"}\n")
        await wire.send({"type": "generate", "id": "1", "model": "m", "prompt": "x"})
        assert (await terminals(wire, "1"))[0]["totalTokens"] == 2**53 - 1
        engine.script = stream(b'{"response":"","tool_calls":[' + HUGE + b"]}\n", FINAL)
        await wire.send({"type": "generate", "id": "2", "model": "m", "prompt": "x"})
        assert (await terminals(wire, "2"))[0]["code"] == "BACKEND_ERROR"
        engine.script = document(200, b'{"embeddings":[[1]],"prompt_eval_count":' + HUGE + b"}")
        await wire.send({"type": "embed", "id": "3", "model": "m", "input": "x"})
        assert (await terminals(wire, "3"))[0]["code"] == "BACKEND_ERROR"


class Packed(Wire):
    async def send(self, message: Any) -> None:
        await self.connection.send(msgpack.packb(message))

    async def hear(self) -> dict[str, Any]:
        message: dict[str, Any] = msgpack.unpackb(await self.connection.recv())
        return message


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (document(200, b""), "error"),
        (stream(EMBEDDING + b"\n" + EMBEDDING + b"\n"), "error"),
        (stream(b'{"embeddings":1}\n', b'{"error":"x"}\n'), "error"),
        (stream(EMBEDDING + b"\n", b'{"error":"x"}\n'), "embed_result"),
    ],
    ids=["nothing", "two", "nonsense and an error", "a result and an error"],
)
async def test_an_embedding_has_exactly_one_end(
    fabric: Fabric, script: Callable[[Call], Awaitable[None]], kind: str
) -> None:
    async with hostile(fabric) as engine, authenticated(fabric) as wire:
        engine.script = script
        await wire.send({"type": "embed", "id": "e", "model": "m", "input": "x"})
        assert [message["type"] for message in await terminals(wire, "e")] == [kind]


async def test_interim_responses_are_not_the_answer(fabric: Fabric) -> None:
    async def script(call: Call) -> None:
        await call.raw(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 3)
        await stream(LINE, FINAL)(call)

    async with hostile(fabric) as engine, authenticated(fabric) as wire:
        engine.script = script
        await wire.send({"type": "generate", "id": "i", "model": "m", "prompt": "x"})
        assert (await terminals(wire, "i"))[0]["type"] == "stream_end"


async def test_an_endless_trailer_is_cut(fabric: Fabric) -> None:
    """The parser keeps a header until its end: a worker must not."""

    async def script(call: Call) -> None:
        await call.head()
        await call.piece(LINE)
        await call.raw(b"0\r\nx: ")
        for _ in range(1024):
            await call.raw(b"y" * 2**16)
        pytest.fail("64 MiB of a trailer were taken")

    async with hostile(fabric) as engine, authenticated(fabric) as wire:
        engine.script = script
        await wire.send({"type": "generate", "id": "t", "model": "m", "prompt": "x"})
        (error,) = await terminals(wire, "t")
        assert error["code"] == "BACKEND_ERROR"
        assert "trailer" in error["error"]


async def test_an_engine_that_trickles_its_list_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.ollama, "POLL_S", 0.05)
    left = asyncio.Event()

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b" ")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await reader.read()
            writer.close()
            await writer.wait_closed()
        left.set()

    async with await asyncio.start_server(trickle, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with Backend(EngineAddress(f"http://{host}:{port}"), 60.0) as backend, asyncio.timeout(10):
            await backend.poll()
            assert not backend.engine.up
            assert "TimeoutError" in backend.engine.error
            await left.wait()


# A client -------------------------------------------------------------------------------------------------------------


async def test_a_stranger_gets_no_room_for_long_messages(fabric: Fabric) -> None:
    """A thousand strangers with 20 MiB each were 20 GB."""
    async with connect(fabric) as wire:
        await wire.hear()
        await wire.send("x" * (64 * 1024 + 1))
        assert (await wire.closed())[0] == 1009
    async with authenticated(fabric) as wire:
        await wire.send(
            {"type": "generate", "id": "l", "model": "llama2", "prompt": "x" * 2**20, "options": {"max_tokens": 1}}
        )
        assert (await terminals(wire, "l"))[0]["type"] == "stream_end"


@pytest.mark.parametrize(
    "data",
    [
        '{"type":[]}',
        '{"type":{"a":1}}',
        '{"type":{}}',
        '{"type":"generate","id":"1","model":"llama2","prompt":"p","options":{"x":[' + "[]," * 200_000 + "1]}}",
    ],
)
async def test_malformed_messages_leave_the_connection_open(fabric: Fabric, data: str) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(data)
        assert (await wire.hear())["code"] in ("INVALID_MESSAGE", "UNKNOWN_TYPE")
        await wire.send({"type": "ping"})
        assert (await wire.hear())["type"] == "pong"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    folder = tmp_path_factory.mktemp("narrow")
    with Fabric(folder, engines=[Settings()], gateway_settings={"outbox_bytes_max": 50_000}) as running:
        yield running


async def test_a_result_larger_than_the_outbox_costs_nothing_else(narrow: Fabric) -> None:
    async with authenticated(narrow) as wire:
        await wire.send({"type": "embed", "id": "e", "model": "simulated-embed", "input": ["x"] * 1000})
        result = await wire.hear_until("embed_result", "error")
        assert len(result["embeddings"]) == 1000
        await wire.send({"type": "generate", "id": "g", "model": "llama2", "prompt": "p", "options": {"max_tokens": 5}})
        assert (await terminals(wire, "g"))[0]["type"] == "stream_end"


def connection_of(submitted: list[Stream]) -> Connection:
    """A connection without a network: what it submits is kept, what it says stays in its outbox."""

    def submit(**_: Any) -> Stream:
        rid = struct.pack("!QQ", 0, len(submitted))
        submitted.append(
            Stream(Submit(rid=rid, client="c", ref="r", model="m", path="/"), b"", 0.0, histories=Histories())
        )
        return submitted[-1]

    services = SimpleNamespace(
        settings=GatewaySettings(outbox_bytes_max=1000, messages_per_s=50, messages_burst=200),
        upstream=SimpleNamespace(submit=submit),
        model=full_name,
        share=lambda client: EVERYBODYS,
        pulls=SimpleNamespace(may=lambda model: False),
        metrics=SimpleNamespace(requests=0, pauses=0, errors=Counter()),
    )
    return Connection(cast("Any", SimpleNamespace(scope={})), cast("Services", services))


async def test_a_request_of_a_client_that_does_not_read_is_paused_too() -> None:
    """Otherwise each new request adds its whole answer to what waits."""
    submitted: list[Stream] = []
    connection = connection_of(submitted)
    job = {"type": "generate", "model": "m", "prompt": "p"}
    connection._handle(json.dumps(job | {"id": "1"}))
    connection.push(b"x" * 1001)
    connection._handle(json.dumps(job | {"id": "2"}))
    assert [stream._paused for stream in submitted] == [True, True]


async def test_a_revoked_client_that_does_not_read_costs_nothing_more() -> None:
    """Its line may hold back what was being written for as long as it likes."""
    submitted: list[Stream] = []
    forgotten: list[Stream] = []
    connection = connection_of(submitted)
    connection._services.upstream.forget = forgotten.append  # type: ignore[method-assign, assignment]
    connection._resumes = True
    for ref in ("1", "2"):
        connection._handle(json.dumps({"type": "generate", "id": ref, "model": "m", "prompt": "p"}))
    connection.push(b"x")
    connection.revoke()
    assert forgotten == submitted
    assert not connection._outbox


async def test_a_connection_that_is_to_close_writes_no_more_than_what_waits() -> None:
    """Streams that went on would keep it open as long as they last."""
    connection = connection_of([])

    async def write(frames: list[bytes]) -> None:
        assert frames == [b"first"]
        connection.push(b"second")

    connection._write = write  # type: ignore[method-assign, assignment]
    connection.push(b"first")
    connection.dismiss()
    with pytest.raises(Closed):
        await connection._write_outbox()
    assert list(connection._outbox) == [b"second"]


async def test_refusals_are_forgiven_in_time() -> None:
    """A client a little too fast for hours is told so, not sent away; a flood is."""
    connection = connection_of([])
    now = connection._refusals._at
    connection._loop = cast("Any", SimpleNamespace(time=lambda: now))

    def refuse() -> None:
        connection._refuse('{"type":"ping"}', 0.01)
        connection._answer_bytes = connection._outbox_bytes = 0  # it reads

    for _ in range(1000):
        now += 0.1
        refuse()
    for _ in range(199):
        refuse()
    with pytest.raises(Closed):
        refuse()


def heard_by(connection: Connection) -> list[dict[str, Any]]:
    """What waits in its outbox."""
    return [json.loads(frame) for frame in connection._outbox]


async def test_one_long_answer_does_not_mean_that_the_client_does_not_read() -> None:
    connection = connection_of([])
    connection.say_error(Code.INTERNAL, "x" * 1500)
    assert connection._closing is None
    connection.say_error(Code.INTERNAL, "x")
    assert connection._closing is not None
    assert (connection._closing.code, connection._closing.reason) == (1008, "the client does not read")


async def test_many_answers_nobody_reads_close_the_line() -> None:
    connection = connection_of([])
    while connection._closing is None:
        connection.say_error(Code.INTERNAL, "x")
        assert connection._answer_bytes < 1200


async def test_an_error_has_a_bound() -> None:
    """An engine's own words may be as long as it likes, and a fleet may have any number of models."""
    submitted: list[Stream] = []
    connection = connection_of(submitted)
    connection._services.metrics.finished = lambda *_: None  # type: ignore[method-assign]
    connection._handle(json.dumps({"type": "generate", "id": "1", "model": "m", "prompt": "p"}))
    models = tuple(f"model-{number}" for number in range(5000))
    rid = submitted[0].submit.rid
    failed = Failed(rid=rid, attempt=0, code=Code.MODEL_NOT_FOUND, message="x" * 10_000, models=models)
    connection._streams["1"].hear(Over(failed, b""))
    (error,) = heard_by(connection)
    assert (error["code"], error["error"]) == ("MODEL_NOT_FOUND", "x" * 2000)
    assert error["models"] == list(models[:1000])


async def test_nobody_else_gets_a_token_of_it(fabric: Fabric) -> None:
    """Ids are a connection's own: the same one on two connections names two requests."""
    async with authenticated(fabric) as one, authenticated(fabric) as other:
        for wire, prompt in ((one, "alpha"), (other, "beta")):
            await wire.send(
                {"type": "generate", "id": "same", "model": "llama2", "prompt": prompt, "options": {"max_tokens": 40}}
            )
        for wire, prompt in ((one, "alpha"), (other, "beta")):
            text = ""
            while (message := await wire.hear())["type"] != "stream_end":
                text += message.get("token", "")
            assert text == transcript(prompt, 0, 40)
