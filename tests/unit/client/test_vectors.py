"""Every golden message of clients/vectors: the client produces each of its own and understands each of the server's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from weftline_client import (
    AsyncClient,
    AuthenticationError,
    EmbedResult,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    Pulling,
    Queued,
    QueueFullError,
    Result,
    ResumeGapError,
    Timings,
    Token,
    WorkerLostError,
)
from weftline_client.errors import error_from_message
from weftline_client.protocol import (
    authenticate_message,
    decode,
    encode,
    request_message,
    resume_message,
    stop_message,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.client.fake_gateway import FakeGateway, Line

Message = dict[str, Any]

VECTORS: list[dict[str, Any]] = json.loads(
    Path(__file__).parents[3].joinpath("clients/vectors/messages.json").read_text(encoding="utf-8")
)
BY_NAME = {vector["name"]: vector["message"] for vector in VECTORS}


def names(direction: str) -> list[str]:
    return [vector["name"] for vector in VECTORS if vector["direction"] == direction]


def request(kind: str, *fields: str, **params: Any) -> Callable[[Message], Message]:
    """Builds a request from a golden one: the named fields are taken from it, `params` are as a caller gives them."""
    return lambda golden: request_message(kind, golden["id"], {name: golden[name] for name in fields}, params)


# What a client of this package sends; it has no reason to send the others.
PRODUCED: dict[str, Callable[[Message], Message]] = {
    "authenticate": lambda golden: authenticate_message("my-client", golden["signature"], "SHA256"),
    "authenticate with Ed25519": lambda golden: authenticate_message("my-client", golden["signature"], "Ed25519"),
    "authenticate to resume": lambda golden: authenticate_message(
        "my-client", golden["signature"], "SHA256", resume=True
    ),
    "generate as the guides do": request(
        "generate", "model", "prompt", options={"temperature": 0.5, "max_tokens": 200}, system=None
    ),
    "generate with everything": request(
        "generate",
        "model",
        "prompt",
        system="Be brief.",
        suffix="The end.",
        images=[b"\x89PNG"],
        format={"type": "object", "properties": {"answer": {"type": "string"}}},
        raw=False,
        think="low",
        options={"seed": 7},
        keep_alive="5m",
        priority="interactive",
        deadline_ms=30_000,
        request_id="r-2",
    ),
    "chat": request(
        "chat",
        "model",
        "messages",
        tools=BY_NAME["chat"]["tools"],
        format="json",
        think=True,
        options={"temperature": 0},
        keep_alive=300,
        priority="normal",
        deadline_ms=60_000,
    ),
    "generate on one host only": request("generate", "model", "prompt", migrate=False),
    "chat on one host only": request("chat", "model", "messages", migrate=False),
    "embed one text": request("embed", "model", "input"),
    "embed several texts": request(
        "embed",
        "model",
        "input",
        options={"num_ctx": 256},
        truncate=True,
        dimensions=2,
        keep_alive=0,
        priority="batch",
        deadline_ms=5000,
    ),
    "stop": lambda golden: stop_message(golden["id"]),
    "models": lambda _: {"type": "models"},
    "ping": lambda _: {"type": "ping"},
    "resume": lambda golden: resume_message(golden["id"], golden["lastSeq"]),
    "resume from the start": lambda golden: resume_message(golden["id"], -1),
}
OF_OTHERS = {"authenticate as the guides do"}


def test_every_client_message_is_produced_or_another_clients() -> None:
    assert set(names("client")) == PRODUCED.keys() | OF_OTHERS


@pytest.mark.parametrize("name", PRODUCED)
def test_client_message_is_produced(name: str) -> None:
    assert PRODUCED[name](BY_NAME[name]) == BY_NAME[name]


@pytest.mark.parametrize("kind", ["models", "ping"])
async def test_bare_messages_go_out_as_they_are(kind: str, gateway: FakeGateway, settings: Message) -> None:
    async with AsyncClient(**settings) as client:
        await getattr(client, kind)()
    assert gateway.received == [BY_NAME[kind]]


def test_a_parameter_of_another_request_is_refused() -> None:
    with pytest.raises(TypeError, match=r"embed\(\) got an unexpected keyword argument 'system'"):
        request_message("embed", "r-1", {}, {"system": "Be brief."})


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_frames(vector: dict[str, Any]) -> None:
    message = vector["message"]
    for binary in (False, True):
        assert decode(encode(message, binary=binary)) == message
    if golden := vector.get("msgpack_hex"):
        assert decode(bytes.fromhex(golden)) == message
        assert cast("bytes", encode(message, binary=True)).hex() == golden


@pytest.mark.parametrize("frame", ["", "{", "[]", "7", '"text"', b"", b"\xc1", b"\x93\x01", b"\x01", b"\x80\x80"])
def test_a_frame_without_a_map_is_refused(frame: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"undecodable frame|must be a map"):
        decode(frame)


def token_fields(token: Token) -> tuple[object, ...]:
    return (str(token), token.seq, token.thinking, token.tool_calls, token.logprobs)


def parsed(message: Message) -> object:
    """What the client makes of a server's message that belongs to a request, or refuses its opening."""
    match message["type"]:
        case "stream_token":
            return token_fields(Token.from_message(message, message["seq"]))
        case "stream_end":
            return Result.from_message(message, model="llama2", text="text", thinking="", tool_calls=[])
        case "queued":
            return Queued.from_message(message)
        case "pulling":
            return Pulling.from_message(message)
        case "embed_result":
            return EmbedResult.from_message(message)
    error = error_from_message(message, "partial")
    return (type(error), str(error), error.request_id, error.partial, error.retry_after_s, error.models)


STREAM = BY_NAME["stop"]["id"]
END = {"id": STREAM, "model": "llama2", "text": "text", "thinking": "", "tool_calls": [], "host": "gpu-1"}
PARSED: dict[str, object] = {
    "queued": Queued(3, 4500),
    "queued, no estimate": Queued(1, None),
    "pulling": Pulling(
        "pulling dde5aa3fc5ff",
        "sha256:dde5aa3fc5ffc17176b5e8bdc82f587b24b2678c6c66101bf7da77af9f7ccdff",
        2_019_377_376,
        524_288_000,
    ),
    "pulling, no layer": Pulling("pulling manifest"),
    "stream_token": ("Blå 🌊", 0, None, None, None),
    "stream_token, thinking": ("", 1, "Rayleigh", None, None),
    "stream_token, tool calls": (
        "",
        2,
        None,
        [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        None,
    ),
    "stream_token, logprobs": (
        "sky",
        3,
        None,
        None,
        [{"token": "sky", "logprob": -0.25, "bytes": [115, 107, 121]}],
    ),
    "stream_end": Result(
        **END,
        total_tokens=42,
        elapsed_time_ms=1350,
        done_reason="stop",
        prompt_tokens=12,
        attempts=2,
        migrated=True,
        timings=Timings(20, 0, 85),
    ),
    "stream_end as the guides know it": Result(
        **END | {"host": None},
        total_tokens=42,
        elapsed_time_ms=1350,
        done_reason=None,
        prompt_tokens=None,
        attempts=None,
        migrated=False,
        timings=Timings(),
    ),
    "stream_end after a stop": Result(
        **END,
        total_tokens=5,
        elapsed_time_ms=120,
        done_reason="cancelled",
        prompt_tokens=12,
        attempts=1,
        migrated=False,
        timings=Timings(0, 0, None),
    ),
    "embed_result": EmbedResult(
        id="r-5", model="all-minilm", embeddings=[[0.25, -0.5], [0.125, 0.75]], prompt_tokens=2, elapsed_time_ms=9
    ),
    "error of a request": (
        WorkerLostError,
        "the host was lost (code: WORKER_LOST)",
        STREAM,
        "partial",
        None,
        (),
    ),
    "error, unknown model": (
        ModelNotFoundError,
        "model 'llama9' not found (code: MODEL_NOT_FOUND)",
        STREAM,
        "partial",
        None,
        ("llama2", "codellama"),
    ),
    "error, try later": (
        QueueFullError,
        "the queue is full (code: QUEUE_FULL)",
        STREAM,
        "partial",
        1.5,
        (),
    ),
    "error, nothing to resume": (
        NotFoundError,
        "no such request (code: NOT_FOUND)",
        STREAM,
        "partial",
        None,
        (),
    ),
    "error, a gap": (
        ResumeGapError,
        "the events after 41 are no longer kept (code: RESUME_GAP)",
        STREAM,
        "partial",
        None,
        (),
    ),
    "error of no request": (
        InvalidRequestError,
        "there is no message type 'generte' (code: UNKNOWN_TYPE)",
        None,
        "partial",
        None,
        (),
    ),
}
# These have no record of their own: the tests below see what they do.
IN_A_CONNECTION = {
    "challenge",
    "auth_result accepted",
    "auth_result refused",
    "stream_start",
    "models_result",
    "pong",
    "draining",
}


def test_every_server_message_is_understood() -> None:
    assert set(names("server")) == PARSED.keys() | IN_A_CONNECTION


@pytest.mark.parametrize("name", PARSED)
def test_server_message_is_parsed(name: str) -> None:
    assert parsed(BY_NAME[name]) == PARSED[name]


async def test_golden_opening_and_replies(gateway: FakeGateway, settings: Message, pem: str) -> None:
    async def golden(line: Line, message: Message) -> None:
        reply = {"models": "models_result", "ping": "pong", "generate": "stream_start"}[message["type"]]
        await line.socket.send(json.dumps(BY_NAME["draining"]))  # its close says the same
        await line.socket.send(json.dumps(BY_NAME[reply]))
        if message["type"] == "generate":
            await line.socket.send(json.dumps(BY_NAME["stream_end"]))

    gateway.scripts |= {"models": golden, "ping": golden, "generate": golden}
    async with AsyncClient(**settings) as client:
        assert await client.models() == BY_NAME["models_result"]["models"]
        assert await client.ping() > 0
        stream = client.generate("hi", "llama2:latest", stream=True, request_id=STREAM)
        assert [token async for token in stream] == []
        assert stream.model == BY_NAME["stream_start"]["model"]
    with pytest.raises(AuthenticationError) as refused:
        await AsyncClient(**settings | {"client_id": "another"}).connect()
    assert refused.value.message == BY_NAME["auth_result refused"]["error"]
