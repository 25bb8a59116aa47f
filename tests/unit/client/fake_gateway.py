"""A scriptable gateway for tests of clients: it checks signatures for real, records all it got, says what it is told.

By default it answers like a gateway in front of an echo model: `generate` and `chat` stream the words of the prompt,
repeated up to `options.max_tokens` if that is given. It keeps nothing when a line drops. A test replaces what a message
type does through `scripts`, and what happens before the challenge through `opening`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Self

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

if TYPE_CHECKING:
    from ssl import SSLContext
    from types import TracebackType

    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

Message = dict[str, Any]
Script = Callable[["Line", Message], Awaitable[None]]
TIMESTAMP = 1_700_000_000_000
MODELS = ["llama2", "tiny"]

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "SHA256": hashes.SHA256(),
    "SHA384": hashes.SHA384(),
    "SHA512": hashes.SHA512(),
}


class Line:
    """One client's connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.client_id = ""
        self.authenticated: Message = {}
        self.stops: dict[str, asyncio.Event] = {}

    def stopped(self, request_id: str) -> asyncio.Event:
        """Set when the client has asked to stop that request."""
        return self.stops.setdefault(request_id, asyncio.Event())

    async def send(self, kind: str, **fields: Any) -> None:
        message = {"type": kind, "timestamp": TIMESTAMP, **fields}
        binary = self.socket.subprotocol is not None
        await self.socket.send(msgpack.packb(message) if binary else json.dumps(message))

    async def token(self, request_id: str, text: str, seq: int, **fields: Any) -> None:
        await self.send("stream_token", id=request_id, token=text, seq=seq, **fields)

    async def end(self, request_id: str, tokens: int, reason: str = "stop", **fields: Any) -> None:
        await self.send("stream_end", id=request_id, totalTokens=tokens, elapsedTime=12, doneReason=reason, **fields)

    def drop(self) -> None:
        """Cut the line without a word."""
        self.socket.transport.abort()


class FakeGateway:
    """Clients are public keys by client id. `url` is known once it is entered."""

    def __init__(self, clients: dict[str, RSAPublicKey | Ed25519PublicKey], ssl: SSLContext | None = None) -> None:
        self.ssl = ssl
        self.clients = clients
        self.lines: list[Line] = []
        self.received: list[Message] = []
        self.scripts: dict[str, Script] = {
            "generate": echo,
            "chat": echo,
            "embed": embed,
            "models": lambda line, _: line.send("models_result", models=MODELS),
            "ping": lambda line, _: line.send("pong"),
            "stop": _stop,
            "resume": _forgotten,
        }
        self.opening: Callable[[Line], Awaitable[None]] = _at_once
        self.url = ""
        self._news = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self._server = await serve(
            self._serve,
            "127.0.0.1",
            int(self.url.rpartition(":")[2] or 0),
            subprotocols=[Subprotocol("weftline.msgpack")],
            select_subprotocol=lambda _, offered: offered[0] if offered else None,
            close_timeout=1,
            ssl=self.ssl,
        )
        self.url = f"{'wss' if self.ssl else 'ws'}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def got(self, kind: str, count: int = 1) -> Message:
        """Wait for the `count`-th message of a type, from whichever client."""

        def found() -> list[Message]:
            return [message for message in self.received if message["type"] == kind]

        async with self._news:
            await self._news.wait_for(lambda: len(found()) >= count)
        return found()[count - 1]

    async def _serve(self, socket: ServerConnection) -> None:
        line = Line(socket)
        self.lines.append(line)
        with contextlib.suppress(ConnectionClosed):
            await self.opening(line)
            if not await self._authenticate(line):
                return
            async with asyncio.TaskGroup() as group:
                tasks = []
                try:
                    while True:
                        message = _decode(await socket.recv())
                        async with self._news:
                            self.received.append(message)
                            self._news.notify_all()
                        tasks.append(group.create_task(self._answer(line, message)))
                except ConnectionClosed:
                    pass
                finally:
                    for task in tasks:
                        task.cancel()

    async def _answer(self, line: Line, message: Message) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self.scripts[message["type"]](line, message)

    async def _authenticate(self, line: Line) -> bool:
        challenge = "v1-" + secrets.token_urlsafe(32)
        await line.send("challenge", challenge=challenge)
        answer = _decode(await line.socket.recv())
        line.client_id, line.authenticated = answer["clientId"], answer
        key = self.clients.get(line.client_id)
        if key is not None and _verified(key, answer, challenge):
            await line.send("auth_result", success=True)
            return True
        await line.send("auth_result", success=False, error="Unknown client or wrong signature")
        await line.socket.close(1008)
        return False


def _verified(key: RSAPublicKey | Ed25519PublicKey, answer: Message, challenge: str) -> bool:
    signature = base64.b64decode(answer["signature"], validate=True)
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, challenge.encode())
        else:
            key.verify(signature, challenge.encode(), PKCS1v15(), _HASHES[answer.get("algorithm", "SHA256")])
    except InvalidSignature:
        return False
    return True


def _decode(frame: str | bytes) -> Message:
    message: Message = json.loads(frame) if isinstance(frame, str) else msgpack.unpackb(frame)
    return message


async def _at_once(_: Line) -> None:
    """A new line is challenged without delay."""


async def _forgotten(line: Line, message: Message) -> None:
    await line.send("error", id=message["id"], error="no such request", code="NOT_FOUND")


async def _stop(line: Line, message: Message) -> None:
    line.stopped(message["id"]).set()


async def echo(line: Line, message: Message) -> None:
    """Stream the prompt's words back, until they are out or the client stops it."""
    request_id, model = message["id"], message["model"]
    if model not in MODELS:
        error = f"model '{model}' not found"
        await line.send("error", id=request_id, error=error, code="MODEL_NOT_FOUND", models=MODELS)
        return
    prompt = message["prompt"] if "prompt" in message else message["messages"][-1]["content"]
    words = re.findall(r"\S+\s*", prompt)
    if (limit := message.get("options", {}).get("max_tokens")) is not None:
        words = list(itertools.islice(itertools.cycle(words), limit))
    await line.send("stream_start", id=request_id, model=model)
    for seq, word in enumerate(words):
        if line.stopped(request_id).is_set():
            await line.end(request_id, seq, "cancelled")
            return
        await line.token(request_id, word, seq)
        await asyncio.sleep(0)  # let what the client says be heard
    await line.end(
        request_id,
        len(words),
        promptTokens=len(words),
        host="gpu-1",
        attempts=1,
        timings={"queueMs": 1, "loadMs": 2, "firstTokenMs": 3},
    )


async def embed(line: Line, message: Message) -> None:
    """The vector of a text is its length and one."""
    texts = [message["input"]] if isinstance(message["input"], str) else message["input"]
    await line.send(
        "embed_result",
        id=message["id"],
        model=message["model"],
        embeddings=[[float(len(text)), 1.0] for text in texts],
        promptTokens=len(texts),
        elapsedTime=3,
    )
