"""The load generators: they bring what was sent, and say so when something else comes."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.frames import CloseCode

from bench import clients
from bench.fabric import BenchError, Fabric
from cli.keys import create_key_files
from workers.embedded.server import running
from workers.embedded.simulated import Settings, SimulatedBackend, transcript

Script = Callable[[ServerConnection, dict[str, Any]], Awaitable[None]]


def target(*, engine_url: str = "", gateway_url: str = "", key: Path = Path()) -> Fabric:
    return Fabric(engine_url, gateway_url, key, "", {})


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return create_key_files("bench", tmp_path, algorithm="ed25519")[0].config


@contextlib.asynccontextmanager
async def gateway(script: Script, *, admit: bool = True) -> AsyncIterator[str]:
    """A gateway that plays `script` after every `generate`."""

    async def handle(connection: ServerConnection) -> None:
        await connection.send(json.dumps({"type": "challenge", "challenge": "abc", "timestamp": 1}))
        assert json.loads(await connection.recv())["clientId"] == "bench"
        answer = {"type": "auth_result", "success": admit, "error": None if admit else "authentication failed"}
        await connection.send(json.dumps({key: value for key, value in answer.items() if value is not None}))
        async for frame in connection:
            await script(connection, json.loads(frame))

    async with serve(handle, "127.0.0.1", 0, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"ws://127.0.0.1:{port}"


async def say(connection: ServerConnection, ref: str, *tokens: str, first_seq: int = 0) -> None:
    await connection.send(json.dumps({"type": "stream_start", "id": ref, "model": "simulated"}))
    for seq, token in enumerate(tokens, first_seq):
        await connection.send(json.dumps({"type": "stream_token", "id": ref, "token": token, "seq": seq}))


async def end(connection: ServerConnection, ref: str) -> None:
    await connection.send(json.dumps({"type": "stream_end", "id": ref, "totalTokens": 1}))


@pytest.mark.parametrize("opened", [clients.over_httpx, clients.over_lean_http])
async def test_direct_clients_bring_the_engines_tokens(opened: Any) -> None:
    async with (
        running(SimulatedBackend(Settings(slots=4))) as url,
        opened(target(engine_url=url), 3) as generate,
    ):
        for _ in range(2):  # the second time on kept connections
            answers = await asyncio.gather(*(generate(count) for count in (1, 2, 500)))
            assert ["".join(a.tokens) for a in answers] == [transcript(clients.PROMPT, 0, n) for n in (1, 2, 500)]
            assert all(a.asked_s < a.came_s[0] and a.came_s == sorted(a.came_s) for a in answers)


@pytest.mark.parametrize("opened", [clients.over_httpx, clients.over_lean_http])
async def test_direct_clients_say_what_the_engine_refused(opened: Any) -> None:
    async with (
        running(SimulatedBackend(Settings(models=("other",)))) as url,
        opened(target(engine_url=url), 1) as generate,
    ):
        with pytest.raises(BenchError, match=r"404.*not found"):
            await generate(1)


async def test_openai_events_bring_the_same_tokens() -> None:
    async with (
        running(SimulatedBackend(Settings(slots=4))) as url,
        clients.over_http(url, 2, clients.OPENAI, "a key") as generate,
    ):
        for _ in range(2):
            answers = await asyncio.gather(generate(1), generate(300))
            assert ["".join(a.tokens) for a in answers] == [transcript(clients.PROMPT, 0, n) for n in (1, 300)]
            assert [len(a.tokens) for a in answers] == [len(a.came_s) for a in answers] == [1, 300]


async def test_a_connection_that_was_closed_idle_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    connected = clients._connected

    async def recorded(*arguments: Any) -> Any:
        opened.append(await connected(*arguments))
        return opened[-1]

    async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}}")
        line = json.dumps({"response": " a", "done": False}).encode() + b"\n"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(line), line))
        writer.close()

    monkeypatch.setattr(clients, "_connected", recorded)
    async with await asyncio.start_server(serve_once, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with clients.over_http(url, 1) as generate:
            for number in (1, 2):
                assert (await generate(1)).tokens == [" a"]
                assert len(opened) == number
                await opened[-1]._gone
                assert opened[-1].gone


def test_events_are_taken_wherever_they_are_cut() -> None:
    body = b"".join(
        b"data: %s\n\n" % json.dumps({"choices": choices}).encode()
        for choices in (
            [{"delta": {"role": "assistant", "content": " a"}}],
            [{"delta": {"content": " b"}}],
            [{"delta": {"content": ""}, "finish_reason": "length"}],
            [],
        )
    )
    for cut in range(len(body)):
        answer = clients.Answer(0.0)
        rest = clients.OPENAI.take(answer, body[:cut])
        assert clients.OPENAI.take(answer, rest + body[cut:] + b"data: [DONE]\n\n") == b""
        assert answer.tokens == [" a", " b"]


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b'HTTP/1.1 503 Busy\r\ncontent-length: 13\r\n\r\n{"a": 1}\n{"b"', r"503 was answered.*\"a\": 1"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n<html>\n\n", r"no stream of tokens"),
        (b"SSH-2.0\r\n\r\n", r"no stream of tokens"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"error": "it broke"}\n', r"it broke"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n", r"closed the connection"),
    ],
)
async def test_anything_else_over_http_is_an_error(reply: bytes, text: str) -> None:
    async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}}")
        writer.write(reply)
        writer.close()

    async with await asyncio.start_server(serve_once, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with clients.over_http(url, 1) as generate:
            with pytest.raises(BenchError, match=text):
                await generate(1)


def test_an_event_that_tells_of_an_error_is_one() -> None:
    with pytest.raises(BenchError, match=r"\{\"message\": \"no room\"\}"):
        clients.OPENAI.take(clients.Answer(0.0), b'data: {"error": {"message": "no room"}}\n\n')


async def test_websocket_frames_of_all_sizes_and_pings(key: Path) -> None:
    tokens = ["a", "b" * 200, "c" * 70_000, "d"]

    async def script(connection: ServerConnection, message: dict[str, Any]) -> None:
        assert message["options"] == {"num_predict": 4}
        await say(connection, message["id"], *tokens)
        await (await connection.ping())
        await end(connection, message["id"])

    async with gateway(script) as url, clients.over_websocket(target(gateway_url=url, key=key), 1) as generate:
        answers = await asyncio.gather(generate(4), generate(4), generate(4))
    assert [answer.tokens for answer in answers] == [tokens] * 3


async def test_streams_take_connections_in_turn(key: Path) -> None:
    """At 50 requests a second on each, no connection may carry them all."""
    used: list[int] = []

    async def script(connection: ServerConnection, message: dict[str, Any]) -> None:
        used.append(connection.remote_address[1])
        await say(connection, message["id"], "a")
        await end(connection, message["id"])

    async with gateway(script) as url, clients.over_websocket(target(gateway_url=url, key=key), 64) as generate:
        for _ in range(16):
            await generate(1)
    assert sorted(used.count(port) for port in set(used)) == [2] * clients.CONNECTIONS_MAX


async def lose_a_token(connection: ServerConnection, message: dict[str, Any]) -> None:
    await say(connection, message["id"], "b", first_seq=1)


async def refuse(connection: ServerConnection, message: dict[str, Any]) -> None:
    await connection.send(json.dumps({"type": "error", "id": message["id"], "code": "NO_WORKERS", "error": "no one"}))


async def leave(connection: ServerConnection, _: dict[str, Any]) -> None:
    await connection.close(CloseCode.POLICY_VIOLATION, "too many messages")


@pytest.mark.parametrize(
    ("script", "text"),
    [(lose_a_token, "token 1 came in the place of 0"), (refuse, "no one"), (leave, "too many messages")],
)
async def test_anything_else_over_websocket_is_an_error(script: Script, text: str, key: Path) -> None:
    async with gateway(script) as url, clients.over_websocket(target(gateway_url=url, key=key), 1) as generate:
        with pytest.raises(BenchError, match=text):
            await generate(1)


async def test_a_refused_identity_is_an_error(key: Path) -> None:
    async with gateway(refuse, admit=False) as url:
        with pytest.raises(BenchError, match="authentication failed"):
            async with clients.over_websocket(target(gateway_url=url, key=key), 1):
                pass


async def test_a_port_that_is_no_websocket_is_an_error(key: Path) -> None:
    async with running(SimulatedBackend()) as url:
        with pytest.raises(BenchError, match="refused the WebSocket"):
            async with clients.over_websocket(target(gateway_url=url, key=key), 1):
                pass
