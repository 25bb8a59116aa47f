"""The asyncio client against a fake gateway."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_curve_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from weftline_client import (
    AsyncClient,
    AuthenticationError,
    ConnectionLostError,
    ConnectionPool,
    InvalidRequestError,
    ModelNotFoundError,
    NotConnectedError,
    ProtocolError,
    Pulling,
    Queued,
    RateLimitedError,
    Reconnect,
    RequestCancelledError,
    SlowConsumerError,
    Stream,
    Token,
    WeftlineError,
    WorkerLostError,
    aio,
)

from tests.unit.client.fake_gateway import MODELS, FakeGateway, Line

if TYPE_CHECKING:
    from collections.abc import AsyncIterable
    from pathlib import Path

Message = dict[str, Any]

E = TypeVar("E", bound=WeftlineError)

AT_ONCE = Reconnect(delay_first_s=0, tries_max=3)
LONG = {"max_tokens": 1_000_000}


async def read_to_error(tokens: AsyncIterable[Token], kind: type[E]) -> tuple[list[Token], E]:
    """The tokens that came before the error that must end the stream, and the error."""
    read = []
    try:
        async for token in tokens:
            read.append(token)  # noqa: PERF401 - they are wanted although an error follows
    except kind as error:
        return read, error
    pytest.fail(f"the stream ended without {kind.__name__}")


async def drop(line: Line, _: Message) -> None:
    line.drop()


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_stream(encoding: Any, gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings, encoding=encoding) as client:
        stream = client.generate("the sky is blue", stream=True, options={"seed": 1})
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.result
        tokens = [token async for token in stream]
        assert tokens == ["the ", "sky ", "is ", "blue"]
        assert all(isinstance(token, Token) for token in tokens)
        assert [token.seq for token in tokens] == [0, 1, 2, 3]
        assert (gateway.lines[0].socket.subprotocol is not None) == (encoding == "msgpack")
    assert stream.result.text == stream.text == "the sky is blue"
    assert stream.result.total_tokens == 4
    assert stream.result.done_reason == "stop"
    assert stream.result.host == "gpu-1"
    assert stream.result.timings.first_token_ms == 3
    assert gateway.received == [
        {
            "type": "generate",
            "id": stream.id,
            "model": "llama2",
            "prompt": "the sky is blue",
            "options": {"seed": 1},
        }
    ]


async def test_generate_and_chat_await_the_result(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:
        assert (await client.generate("hello there", "tiny")).text == "hello there"
        messages = [{"role": "user", "content": "hello you"}]
        result = await client.chat(messages, "tiny", think=False)
        assert (result.text, result.model) == ("hello you", "tiny")
        assert [token async for token in client.chat(messages, stream=True)] == ["hello ", "you"]
    assert gateway.received[1]["messages"] == messages
    assert gateway.received[1]["think"] is False


async def test_embed_models_ping(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:
        assert (await client.embed(("ab", "c"), "tiny", dimensions=2)).embeddings == [[2.0, 1.0], [1.0, 1.0]]
        assert (await client.embed("abc")).embeddings == [[3.0, 1.0]]
        assert await asyncio.gather(*(client.models() for _ in range(5))) == [MODELS] * 5
        assert await client.ping() > 0
        assert client.active == 0


async def test_what_a_model_gives_beside_text(gateway: FakeGateway, settings: Message) -> None:
    call = {"function": {"name": "f", "arguments": {}}}

    async def think(line: Line, message: Message) -> None:
        request_id = message["id"]
        await line.send("queued", id=request_id, position=2, etaMs=100)
        await line.send("queued", id=request_id, position=1)
        await line.send("pulling", id=request_id, model="tiny", status="pulling manifest")
        await line.send("stream_start", id=request_id, model="tiny")
        await line.token(request_id, "", 0, thinking="let ")
        await line.token(request_id, "", 2, thinking="me", logprobs=[{"logprob": -0.5}])
        await line.token(request_id, "", 2, thinking="a repeat")
        await line.token(request_id, "so", 5, toolCalls=[call])
        await line.send("news", id=request_id)
        await line.end(request_id, 3, extra=1)

    gateway.scripts["chat"] = think
    async with AsyncClient(**settings) as client:
        stream = client.chat([], stream=True)
        tokens = [token async for token in stream]
    assert [(token, token.seq, token.thinking) for token in tokens] == [
        ("", 0, "let "),
        ("", 2, "me"),
        ("so", 5, None),
    ]
    assert tokens[1].logprobs == [{"logprob": -0.5}]
    assert tokens[2].tool_calls == stream.result.tool_calls == [call]
    assert (stream.result.text, stream.result.thinking, stream.result.model) == ("so", "let me", "tiny")
    assert (stream.queued, stream.pulling) == (Queued(1, None), Pulling("pulling manifest"))


async def test_a_server_that_numbers_nothing(gateway: FakeGateway, settings: Message) -> None:
    async def plain(line: Line, message: Message) -> None:
        for text in "ab":
            await line.send("stream_token", id=message["id"], token=text)
        await line.send("stream_end", id=message["id"], totalTokens=2, elapsedTime=7)

    gateway.scripts["generate"] = plain
    async with AsyncClient(**settings) as client:
        stream = client.generate("", stream=True)
        assert [(token, token.seq) async for token in stream] == [("a", 0), ("b", 1)]
        assert stream.result.elapsed_time_ms == 7


async def test_concurrent_streams_over_one_line(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:

        async def read(name: str) -> str:
            return "".join(
                [token async for token in client.generate(f"{name} ", stream=True, options={"max_tokens": 50})]
            )

        names = [f"n{number}" for number in range(20)]
        assert await asyncio.gather(*map(read, names)) == [f"{name} " * 50 for name in names]
        assert client.active == 0
    assert len(gateway.lines) == 1


# --- leaving early ----------------------------------------------------------------------------------------------------


async def leave_by_break(stream: Stream) -> None:
    async for _ in stream:
        break


async def leave_by_exception(stream: Stream) -> None:
    with suppress(ZeroDivisionError):
        async for _ in stream:
            raise ZeroDivisionError


async def leave_by_aclose(stream: Stream) -> None:
    async for _ in stream:
        await stream.aclose()
        break


async def leave_by_context(stream: Stream) -> None:
    async with stream:
        pass


async def leave_by_cancellation(stream: Stream) -> None:
    reading = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            reading.set()

    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_exception, leave_by_aclose, leave_by_context, leave_by_cancellation]
)
async def test_leaving_a_stream_stops_it(leave: Any, gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:
        stream = client.generate("on ", stream=True, options=LONG)
        await leave(stream)
        assert await gateway.got("stop") == {"type": "stop", "id": stream.id}
        assert client.active == 0
        with pytest.raises(RequestCancelledError):
            _ = stream.result
        assert (await client.generate("still here")).text == "still here"


async def test_cancelling_an_awaited_generation_stops_it(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:
        task = asyncio.create_task(client.generate("on ", options=LONG))
        request_id = (await gateway.got("generate"))["id"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await gateway.got("stop"))["id"] == request_id


async def test_stop_ends_a_stream_in_good_order(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:
        stream = client.generate("on ", stream=True, options=LONG)
        count = 0
        async for _ in stream:
            count += 1
            if count == 3:
                await stream.stop()
        assert stream.result.done_reason == "cancelled"
        assert stream.result.total_tokens == count
        await client.stop(stream.id)  # over: nothing to stop
        assert await client.ping() > 0
    assert [message["type"] for message in gateway.received] == ["generate", "stop", "ping"]


async def test_a_finished_stream_is_not_stopped(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:
        async with client.generate("a b", stream=True) as stream:
            assert [token async for token in stream] == ["a ", "b"]
        with pytest.raises(RuntimeError, match="only once"):
            aiter(stream)
        await client.ping()
    assert [message["type"] for message in gateway.received] == ["generate", "ping"]


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_errors_by_code(gateway: FakeGateway, settings: Message) -> None:
    async def lose(line: Line, message: Message) -> None:
        await line.token(message["id"], "half ", 0)
        await line.token(message["id"], "a", 1)
        await line.send("error", id=message["id"], error="gone", code=message["prompt"], retryAfterMs=250)

    async with AsyncClient(**settings) as client:
        with pytest.raises(ModelNotFoundError, match="'nope' not found") as not_found:
            await client.generate("hi", "nope")
        assert not_found.value.models == tuple(MODELS)
        gateway.scripts["generate"] = lose
        stream = client.generate("WORKER_LOST", stream=True)
        tokens, lost = await read_to_error(stream, WorkerLostError)
        assert tokens == ["half ", "a"]
        assert (lost.partial, lost.request_id) == ("half a", stream.id)
        with pytest.raises(WorkerLostError):
            _ = stream.result
        with pytest.raises(RateLimitedError) as limited:
            await client.generate("QUOTA_EXCEEDED")
        assert (limited.value.code, limited.value.retry_after_s) == ("QUOTA_EXCEEDED", 0.25)
        with pytest.raises(WeftlineError, match=r"^gone \(code: NEW_CODE\)$") as unknown:
            await client.generate("NEW_CODE")
        assert type(unknown.value) is WeftlineError


async def test_an_error_of_no_request_answers_the_oldest_call(
    gateway: FakeGateway, settings: Message, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(line: Line, _: Message) -> None:
        await line.send("error", error="slow down", code="RATE_LIMITED", retryAfterMs=10)

    gateway.scripts["models"] = refuse
    async with AsyncClient(**settings) as client:
        with pytest.raises(RateLimitedError):
            await client.models()
        heard = asyncio.Event()
        client.on("error", lambda _: heard.set())
        await refuse(gateway.lines[0], {})
        await heard.wait()
        assert await client.ping() > 0
    assert "slow down (code: RATE_LIMITED)" in caplog.text


async def test_an_id_is_used_once_at_a_time(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:
        async with client.generate("on ", stream=True, options=LONG, request_id="mine") as first:
            with pytest.raises(InvalidRequestError) as duplicate:
                await client.generate("hi", request_id="mine")
            assert duplicate.value.code == "DUPLICATE_ID"
            await anext(aiter(first))
        with pytest.raises(InvalidRequestError):
            await client.generate("hi", request_id="mine")
        while client._left:  # the server has not said yet that it ended
            await client.ping()
        assert (await client.generate("hi", request_id="mine")).id == "mine"


def test_bad_settings(pem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Client ID is required"):
        AsyncClient(client_id="", private_key=pem)
    with pytest.raises(ValueError, match="Either private_key or private_key_path"):
        AsyncClient(client_id="me")
    with pytest.raises(ValueError, match="Failed to load private key"):
        AsyncClient(client_id="me", private_key="no key")
    curve = generate_curve_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(ValueError, match="neither RSA nor Ed25519"):
        AsyncClient(client_id="me", private_key=curve)
    with pytest.raises(ValueError, match="signature_algorithm"):
        AsyncClient(client_id="me", private_key=pem, signature_algorithm="MD5")
    with pytest.raises(ValueError, match="encoding"):
        AsyncClient(client_id="me", private_key=pem, encoding="xml")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        AsyncClient(client_id="me", private_key_path=tmp_path / "none.pem")
    with pytest.raises(ValueError, match="at least one"):
        ConnectionPool(client_id="me", private_key=pem, size=0)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="not a client's config"):
        AsyncClient.from_config(tmp_path / "bad.json")


# --- who one is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["SHA256", "SHA384", "SHA512"])
async def test_signatures(algorithm: str, gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings, signature_algorithm=algorithm) as client:
        assert client.connected
    assert gateway.lines[0].authenticated["algorithm"] == algorithm


async def test_ed25519(gateway: FakeGateway, settings: Message) -> None:
    key = Ed25519PrivateKey.generate()
    gateway.clients["me"] = key.public_key()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    async with AsyncClient(**settings | {"private_key": pem}) as client:
        assert await client.models() == MODELS
    assert gateway.lines[0].authenticated["algorithm"] == "Ed25519"


async def test_a_refused_identity(gateway: FakeGateway, settings: Message) -> None:
    another = generate_private_key(public_exponent=65537, key_size=2048)
    pem = another.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for wrong in ({"private_key": pem}, {"client_id": "nobody"}):
        client = AsyncClient(**settings | wrong)
        with pytest.raises(AuthenticationError, match="Unknown client or wrong signature"):
            await client.connect()
        assert not client.connected
        with pytest.raises(WeftlineError):
            await client.generate("hi")


@pytest.mark.parametrize("beside", [True, False])
async def test_from_config(
    beside: bool, gateway: FakeGateway, pem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "me_key.pem").write_text(pem)
    config = {
        "serverUrl": gateway.url.replace("ws://", "http://"),
        "clientId": "me",
        "privateKeyPath": "me_key.pem" if beside else "./keys/me_key.pem",
        "signatureAlgorithm": "SHA512",
    }
    (keys / "me_config.json").write_text(json.dumps(config))
    async with AsyncClient.from_config(keys / "me_config.json", encoding="msgpack") as client:
        assert client.server_url == gateway.url
        assert await client.models() == MODELS
    async with ConnectionPool.from_config("keys/me_config.json", size=2) as pool:
        assert await pool.models() == MODELS
    assert gateway.lines[0].authenticated["algorithm"] == "SHA512"


# --- the line ---------------------------------------------------------------------------------------------------------


async def test_without_a_line(settings: Message, unused_tcp_port: int) -> None:
    client = AsyncClient(**settings | {"server_url": f"ws://127.0.0.1:{unused_tcp_port}"})
    await client.close()
    for request in (client.generate("hi"), client.models(), client.embed("hi")):
        with pytest.raises(NotConnectedError, match="call connect"):
            await request
    with pytest.raises(ConnectionError, match="refused"):
        await client.connect()
    with pytest.raises(NotConnectedError, match="refused"):
        await client.generate("hi")
    assert client.active == 0


async def test_without_resuming_a_line_that_drops_fails_what_runs_and_the_next_waits(
    gateway: FakeGateway, settings: Message
) -> None:
    async def cut(line: Line, message: Message) -> None:
        await line.token(message["id"], "half", 0)
        await line.stopped("cut").wait()
        line.drop()

    whole = gateway.scripts["generate"]
    gateway.scripts["generate"] = cut
    async with AsyncClient(**settings, reconnect=AT_ONCE, resume=False) as client:
        stream = client.generate("x", stream=True)
        awaited = asyncio.create_task(client.generate("y"))
        tokens = aiter(stream)
        assert await anext(tokens) == "half"
        await gateway.got("generate", 2)
        gateway.scripts["generate"] = whole
        gateway.lines[0].stopped("cut").set()
        with pytest.raises(ConnectionLostError) as lost:
            await anext(tokens)
        assert (lost.value.partial, lost.value.request_id) == ("half", stream.id)
        with pytest.raises(ConnectionLostError):
            await awaited
        assert (await client.generate("after")).text == "after"
    assert len(gateway.lines) == 2
    assert not any("resume" in line.authenticated for line in gateway.lines)


async def test_calls_fail_with_the_line(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["models"] = drop
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        with pytest.raises(ConnectionLostError):
            await client.models()
        assert await client.ping() > 0


async def test_reconnecting_gives_up(settings: Message, rsa_key: RSAPrivateKey) -> None:
    gateway = FakeGateway({"me": rsa_key.public_key()})
    async with gateway:
        client = AsyncClient(**settings | {"server_url": gateway.url}, reconnect=AT_ONCE)
        await client.connect()
        assert await client.ping() > 0
    with pytest.raises(ConnectionLostError, match="reconnecting failed"):
        await client.generate("hi")
    assert client.active == 0
    async with gateway:  # back on the same port: connect() starts anew
        await client.connect()
        assert (await client.generate("hi")).text == "hi"
        await client.close()


async def test_reconnecting_is_bounded_in_time(settings: Message, rsa_key: RSAPrivateKey) -> None:
    policy = Reconnect(delay_first_s=1e6, delay_max_s=1e6, time_max_s=0)
    async with FakeGateway({"me": rsa_key.public_key()}) as gateway:
        client = AsyncClient(**settings | {"server_url": gateway.url}, reconnect=policy)
        await client.connect()
        gateway.scripts["ping"] = drop
        for _ in range(2):
            with pytest.raises(ConnectionLostError):
                await client.ping()
        await client.close()
        assert len(gateway.lines) == 1


async def test_a_revoked_client_does_not_try_again(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        await client.ping()
        gateway.clients.clear()

        gateway.scripts["ping"] = drop
        with pytest.raises(ConnectionLostError):
            await client.ping()
        with pytest.raises(AuthenticationError):
            await client.ping()
    assert len(gateway.lines) == 2


async def test_no_reconnecting(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["ping"] = drop
    async with AsyncClient(**settings, reconnect=None) as client:
        for _ in range(2):
            with pytest.raises(ConnectionLostError):
                await client.ping()
    assert len(gateway.lines) == 1


def test_the_delays_between_tries() -> None:
    policy, rng = Reconnect(delay_first_s=1, delay_max_s=8), random.Random(7)
    for attempt, bound in enumerate([1, 2, 4, 8, 8, 8]):
        delays = [policy.delay_s(attempt, rng) for _ in range(200)]
        assert 0 <= min(delays) < bound / 10
        assert bound * 0.9 < max(delays) <= bound
    assert policy.delay_s(5000, rng) <= 8


async def test_close_ends_what_runs(gateway: FakeGateway, settings: Message) -> None:
    client = AsyncClient(**settings)
    await client.connect()
    await client.connect()  # already is
    task = asyncio.create_task(client.generate("on ", options=LONG))
    await gateway.got("generate")
    await asyncio.gather(client.close(), client.close())
    with pytest.raises(ConnectionLostError, match="closed"):
        await task
    with pytest.raises(NotConnectedError, match="closed"):
        await client.generate("hi")
    await gateway.lines[0].socket.wait_closed()
    assert gateway.lines[0].socket.close_code == 1000
    await client.connect()
    assert (await client.generate("hi")).text == "hi"
    await client.close()


async def test_stop_while_there_is_no_line(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["ping"] = drop
    never = Reconnect(delay_first_s=1e6, delay_max_s=1e6, time_max_s=1e6)
    async with AsyncClient(**settings, reconnect=never) as client:
        with pytest.raises(ConnectionLostError):
            await client.ping()
        async with client.generate("hi", stream=True) as stopped, client.generate("hi", stream=True) as closed:
            await stopped.stop()
            await read_to_error(stopped, RequestCancelledError)
            assert client.active == 1
            await client.close()
            await read_to_error(closed, NotConnectedError)
    assert [message["type"] for message in gateway.received] == ["ping"]


async def test_what_cannot_be_encoded(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["ping"] = drop
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        with pytest.raises(TypeError, match="not JSON serializable"):
            await client.generate("hi", options={"seed": object()})
        with pytest.raises(ConnectionLostError):
            await client.ping()
        with pytest.raises(InvalidRequestError, match="cannot be encoded"):  # found only once there is a line again
            await client.generate("hi", options={"seed": object()})
        assert await client.models() == MODELS


@pytest.mark.parametrize(
    "frame",
    [
        "{",
        "[]",
        '{"id":"x"}',
        '{"type":"stream_token","id":"mine","token":"x","seq":"1"}',
        '{"type":"stream_end","id":"mine"}',
        '{"type":"stream_end","id":"mine","totalTokens":1,"elapsedTime":1,"timings":[1]}',
        '{"type":"error","id":"mine","error":"e","code":"QUEUE_FULL","retryAfterMs":"soon"}',
        '{"type":["stream_end"],"id":"mine"}',
        "[" * 100_000,
    ],
)
async def test_an_unreadable_message_drops_the_line(
    frame: str, gateway: FakeGateway, settings: Message, caplog: pytest.LogCaptureFixture
) -> None:
    async def garble(line: Line, message: Message) -> None:
        await line.token(message["id"], "half", 0)
        await line.socket.send(frame)

    gateway.scripts["chat"] = garble
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        with pytest.raises(ProtocolError) as error:
            await client.chat([], request_id="mine")
        assert error.value.partial == "half"
        assert (await client.generate("after")).text == "after"
    assert gateway.lines[0].socket.close_code == 1002
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("kind", "fields", "complaint"),
    [
        ("pong", {}, "expected challenge message, got pong"),
        ("error", {"error": "going down", "code": "SHUTTING_DOWN"}, "going down"),
        ("error", {"error": "who?", "code": "AUTH_REQUIRED"}, "who"),
    ],
)
async def test_an_opening_that_is_none(
    kind: str, fields: Message, complaint: str, settings: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def open_wrongly(self: FakeGateway, line: Line) -> bool:
        await line.send(kind, **fields)
        return False

    monkeypatch.setattr(FakeGateway, "_authenticate", open_wrongly)
    kind_of_error = AuthenticationError if "AUTH_REQUIRED" in fields.values() else NotConnectedError
    with pytest.raises(kind_of_error, match=complaint):
        await AsyncClient(**settings).connect()


async def test_a_server_that_says_nothing(settings: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    async def say_nothing(self: FakeGateway, line: Line) -> bool:
        await line.socket.wait_closed()
        return False

    monkeypatch.setattr(FakeGateway, "_authenticate", say_nothing)
    with pytest.raises(NotConnectedError, match="no answer"):
        await AsyncClient(**settings, connect_timeout_s=0.05).connect()


async def test_tls_with_a_certificate_of_ones_own(rsa_key: RSAPrivateKey, settings: Message, tmp_path: Path) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, rsa_key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(rsa_key, SHA256())
    )
    chain = tmp_path / "gateway.pem"
    chain.write_bytes(settings["private_key"].encode() + certificate.public_bytes(Encoding.PEM))
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(chain)
    async with FakeGateway({"me": rsa_key.public_key()}, server_side) as gateway:
        arguments = settings | {"server_url": gateway.url.replace("wss", "https")}
        async with AsyncClient(**arguments, ssl=ssl.create_default_context(cafile=chain)) as client:
            assert (await client.generate("in private")).text == "in private"
        with pytest.raises(NotConnectedError, match="certificate verify failed"):
            await AsyncClient(**arguments).connect()


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_a_stream_read_slowly_loses_nothing(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings, stream_buffer=4) as client:
        seqs = []
        async for token in client.generate("x ", stream=True, options={"max_tokens": 500}):
            seqs.append(token.seq)
            await asyncio.sleep(0)
        assert seqs == list(range(500))


async def test_a_stream_nobody_reads_ends_and_lets_others_through(gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings, stream_buffer=4, stall_timeout_s=0.05) as client:
        stream = client.generate("x ", stream=True, options=LONG)
        tokens = aiter(stream)
        await anext(tokens)
        assert (await client.generate("others")).text == "others"
        assert (await gateway.got("stop"))["id"] == stream.id
        rest, error = await read_to_error(tokens, SlowConsumerError)
        assert [token.seq for token in rest] == list(range(1, len(rest) + 1))
        assert error.partial == "x " * (len(rest) + 1)


# --- events -----------------------------------------------------------------------------------------------------------


async def test_callbacks(gateway: FakeGateway, settings: Message, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[object] = []

    async def on_token(message: Message) -> None:
        seen.append(message["token"])

    def on_end(message: Message) -> None:
        seen.append(message["totalTokens"])

    def bad(_: Message) -> None:
        raise ZeroDivisionError("in a callback")

    async def bad_later(_: Message) -> None:
        raise ZeroDivisionError("in an async callback")

    async with AsyncClient(**settings) as client:
        for callback in (bad, bad_later, on_token):
            client.on("stream_token", callback)
        client.on("stream_end", on_end)
        await client.generate("a b")
        assert seen == ["a ", "b", 2]
        client.off("stream_token", on_token)
        client.off("stream_end")
        client.off("never registered")
        await client.generate("c")
        assert seen == ["a ", "b", 2]
    assert caplog.text.count("ZeroDivisionError: in a callback") == 3
    assert caplog.text.count("ZeroDivisionError: in an async callback") == 3


async def test_a_callback_may_use_the_client_and_close_it(gateway: FakeGateway, settings: Message) -> None:
    asked: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    async def ask(_: Message) -> None:
        asked.set_result(await client.models())

    async def close(_: Message) -> None:
        await client.close()

    client = AsyncClient(**settings)
    await client.connect()
    client.on("stream_token", ask)
    await client.generate("one")
    assert await asked == MODELS
    client.on("pong", close)
    await client.ping()
    await gateway.lines[0].socket.wait_closed()
    await client.close()
    assert not client.connected


async def test_callbacks_that_do_not_finish_are_bounded(
    gateway: FakeGateway, settings: Message, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "CALLBACKS_MAX", 3)
    ended: list[BaseException] = []

    async def hang(_: Message) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            ended.append(error)
            raise

    async with AsyncClient(**settings, stall_timeout_s=0.01) as client:
        client.on("stream_token", hang)
        with caplog.at_level(logging.ERROR):
            assert (await client.generate("a b c d")).total_tokens == 4
        assert "cancelled 3 callbacks" in caplog.text
        assert len(ended) == 3
    assert len(ended) == 4


# --- pool -------------------------------------------------------------------------------------------------------------


async def test_pool_spreads_requests(gateway: FakeGateway, settings: Message) -> None:
    seen: list[str] = []
    async with ConnectionPool(**settings, size=3) as pool:
        pool.on("stream_token", lambda message: seen.append(message["token"]))
        streams = [pool.generate("x ", stream=True, options=LONG) for _ in range(6)]
        iterators = [aiter(stream) for stream in streams]
        for tokens in iterators:
            await anext(tokens)
        assert [client.active for client in pool.clients] == [2, 2, 2]
        assert len(seen) >= 6
        pool.off("stream_token")
        for stream in streams:
            await pool.stop(stream.id)
        for tokens in iterators:
            _ = [token async for token in tokens]
        assert [stream.result.done_reason for stream in streams] == ["cancelled"] * 6
        results = await asyncio.gather(*(pool.generate(f"{number}") for number in range(9)))
        assert [result.text for result in results] == [str(number) for number in range(9)]
        assert (await pool.embed("abc")).embeddings == [[3.0, 1.0]]
    assert len(gateway.lines) == 3


async def test_pool_avoids_a_client_without_a_line(gateway: FakeGateway, settings: Message) -> None:
    async with ConnectionPool(**settings, size=2) as pool:
        await pool.clients[0].close()
        results = await asyncio.gather(*(pool.generate("x") for _ in range(4)))
        assert [result.text for result in results] == ["x"] * 4


async def test_pool_connects_wholly_or_not_at_all(gateway: FakeGateway, settings: Message) -> None:
    pool = ConnectionPool(**settings | {"client_id": "nobody"}, size=3)
    with pytest.raises(AuthenticationError):
        await pool.connect()
    assert not any(client.connected for client in pool.clients)
