"""The harness's own client: speaks the published protocol, resumes what a broken line cut, writes down all it saw.

It shares nothing with `weftline_client`, which hides repeats from those who iterate: here each event that crossed the
line is recorded, a repeat too. `Requester` is what both kinds of clients look like to a test.
"""

import asyncio
import contextlib
import json
import random
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, Self

import websockets
from weftline_client import AsyncClient, WeftlineError
from weftline_client.credentials import Signer, load_config

from common.history import Recorder

RETRY_S: Final = (0.05, 0.5)
"""Between two tries to connect, at random, so that a crowd does not come at once."""
OPEN_S: Final = 5.0
SILENCE_S: Final = 4.0
"""A line on which a ping is not answered for so long is dead."""
GONE: Final = "GONE"
"""The terminal of a request whose client cannot resume and whose line dropped, or that was left by `close`."""


@dataclass(slots=True, eq=False)
class Request:
    """One request, as far as it has come. `seqs` are those of the tokens, in the order they came."""

    ref: str
    message: dict[str, Any]
    sent: bool = False
    seqs: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    terminal: str = ""
    end: dict[str, Any] = field(default_factory=dict)
    resumed: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def text(self) -> str:
        return "".join(self.words)

    async def reached(self, count: int) -> None:
        """Wait until `count` tokens have come, or the end."""
        while len(self.words) < count and not self.terminal:
            self.changed.clear()
            await self.changed.wait()

    async def over(self) -> str:
        """Wait for the terminal: "end", "stopped", or an error's code."""
        while not self.terminal:
            self.changed.clear()
            await self.changed.wait()
        return self.terminal


class Requester(Protocol):
    """Sends requests and records what becomes of them."""

    def send(self, prompt: str, tokens: int, *, seed: int = 0, **more: Any) -> Request: ...


def _ask(record: Recorder, prompt: str, tokens: int, seed: int, more: dict[str, Any]) -> Request:
    """A request for `tokens` tokens, written down before anything of it crosses the line."""
    ref = str(uuid.uuid4())
    options = {"num_predict": tokens, "seed": seed}
    message = {"type": "generate", "id": ref, "model": "llama2", "prompt": prompt, "options": options, **more}
    record("request", ref=ref, prompt=prompt, seed=seed, tokens=tokens)
    return Request(ref, message)


class WireClient:
    """`async with WireClient(urls, config, record) as client`. It goes from url to url when a line breaks.

    `read` is awaited before each message is read: a test that wants a slow client lets it wait.
    """

    def __init__(
        self,
        urls: list[str],
        config: Path,
        record: Recorder,
        *,
        resume: bool = True,
        rng: random.Random | None = None,
        **options: Any,
    ) -> None:
        arguments = load_config(config)
        self._client_id = arguments["client_id"]
        self._signer = Signer(None, arguments["private_key_path"], arguments.get("signature_algorithm", "SHA256"))
        self._urls = urls
        self._at = 0
        self._record = record
        self._resume = resume
        self._rng = rng or random.Random(0)
        alive = {"ping_interval": SILENCE_S / 2, "ping_timeout": SILENCE_S / 2}
        self._options = {"open_timeout": OPEN_S, "close_timeout": 1, "max_size": None, "proxy": None} | alive | options
        self._socket: websockets.ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._outgoing: asyncio.Queue[dict[str, Any]] = asyncio.Queue(10_000)
        self.requests: dict[str, Request] = {}
        self.lines = 0
        """Connections that authenticated."""
        self.codes: list[int | None] = []
        """How each of them ended."""
        self.told: list[dict[str, Any]] = []
        """Messages about no request of ours, the last hundred."""
        self.connected = asyncio.Event()
        self._open = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        waiter = asyncio.create_task(self.connected.wait())
        try:
            await asyncio.wait((waiter, self._task), timeout=30, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        if not self.connected.is_set():
            if self._task.done():
                self._task.result()
            await self.close()
            raise AssertionError(f"no line to {self._urls} within 30 s")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, code: int = 1000) -> None:
        """Leave for good: 1000 says so, and stops what runs."""
        if self._socket is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self._socket.close(code)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for request in self.requests.values():
            self._finish(request, GONE)

    def send(self, prompt: str, tokens: int, *, seed: int = 0, **more: Any) -> Request:
        """Ask for `tokens` tokens; sent now, or when there is a line."""
        request = _ask(self._record, prompt, tokens, seed, more)
        self.requests[request.ref] = request
        self._outgoing.put_nowait(request.message)
        return request

    def stop(self, request: Request) -> None:
        self._record("stop", ref=request.ref)
        self._outgoing.put_nowait({"type": "stop", "id": request.ref})

    def say(self, message: dict[str, Any]) -> None:
        """Send something else."""
        self._outgoing.put_nowait(message)

    async def _run(self) -> None:
        while True:
            url = self._urls[self._at % len(self._urls)]
            self._at += 1
            try:
                async with websockets.connect(url, **self._options) as connection:
                    await self._converse(connection, url)
                    self.codes.append(connection.close_code)
            except (OSError, TimeoutError, websockets.WebSocketException, EOFError):
                pass
            finally:
                self._socket = None
                self.connected.clear()
            if not self._resume:
                for request in self.requests.values():
                    if request.sent:
                        self._finish(request, GONE)
            await asyncio.sleep(self._rng.uniform(*RETRY_S))

    async def _converse(self, connection: websockets.ClientConnection, url: str) -> None:
        challenge = await self._hear(connection)
        await connection.send(
            json.dumps(
                {
                    "type": "authenticate",
                    "clientId": self._client_id,
                    "signature": self._signer.sign(challenge["challenge"]),
                    "resume": self._resume,
                }
            )
        )
        result = await self._hear(connection)
        if not result.get("success"):
            raise EOFError(result)
        self.lines += 1
        self._record("line", line=self.lines, url=url)
        # What was sent on an earlier line is asked for again, before anything new.
        for request in self.requests.values():
            if request.sent and not request.terminal:
                await self._send_resume(connection, request)
        self._socket = connection
        self.connected.set()
        self._open.set()
        writer = asyncio.create_task(self._write(connection))
        try:
            with contextlib.suppress(websockets.ConnectionClosed):
                while True:
                    await self.reading.wait()
                    await self._take(connection, await self._hear(connection))
            await connection.wait_closed()
            self._record("line_over", line=self.lines, code=connection.close_code)
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, connection: websockets.ClientConnection) -> None:
        while True:
            # A gateway that drains takes nothing new: it waits for the next line.
            await self._open.wait()
            message = await self._outgoing.get()
            request = self.requests.get(message.get("id", "")) if message["type"] == "generate" else None
            if request is not None:
                # From here on it may have arrived, even if `send` fails.
                request.sent = True
            with contextlib.suppress(websockets.ConnectionClosed):
                await connection.send(json.dumps(message))

    async def _hear(self, connection: websockets.ClientConnection) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await connection.recv())
        return message

    async def _send_resume(self, connection: websockets.ClientConnection, request: Request) -> None:
        last = request.seqs[-1] if request.seqs else -1
        request.resumed += 1
        self._record("resume", ref=request.ref, last=last, line=self.lines)
        await connection.send(json.dumps({"type": "resume", "id": request.ref, "lastSeq": last}))

    async def _take(self, connection: websockets.ClientConnection, message: dict[str, Any]) -> None:
        kind, ref = message["type"], message.get("id")
        if ref is None:
            if kind == "draining":
                self._open.clear()
            self.told.append(message)
            del self.told[:-100]
            return
        request = self.requests.get(ref)
        match kind:
            case "stream_token":
                self._record("token", ref=ref, seq=message["seq"], text=message["token"], line=self.lines)
                if request is not None:
                    request.seqs.append(message["seq"])
                    request.words.append(message["token"])
                    request.changed.set()
            case "stream_end":
                stopped = message["doneReason"] == "cancelled"
                self._over(ref, "stopped" if stopped else "end", message)
            case "error" if request is not None and self._resend(connection, request, message["code"]):
                # The first sending was lost with the line, or was not.
                if message["code"] == "NOT_FOUND":
                    self._record("again", ref=ref)
                    await connection.send(json.dumps(request.message))
                else:
                    await self._send_resume(connection, request)
            case "error":
                self._over(ref, message["code"], message)

    def _resend(self, connection: websockets.ClientConnection, request: Request, code: str) -> bool:
        if not self._resume or request.terminal or not request.resumed:
            return False
        return (code == "NOT_FOUND" and not request.seqs) or code == "DUPLICATE_ID"

    def _over(self, ref: str, terminal: str, message: dict[str, Any]) -> None:
        facts = {name: message[name] for name in ("host", "attempts", "migrated", "error") if name in message}
        self._record("terminal", ref=ref, kind=terminal, line=self.lines, **facts)
        request = self.requests.pop(ref, None)
        if request is not None and not request.terminal:
            request.end = message
            request.terminal = terminal
            request.changed.set()

    def _finish(self, request: Request, terminal: str) -> None:
        if not request.terminal:
            self._record("left", ref=request.ref)
            request.terminal = terminal
            request.changed.set()


class LibraryClient:
    """The published Python client, with what its user sees written down. `async with` it; `client` is the client."""

    def __init__(self, client: AsyncClient, record: Recorder) -> None:
        self.client = client
        self._record = record
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.client.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.close()

    def send(self, prompt: str, tokens: int, *, seed: int = 0, **more: Any) -> Request:
        request = _ask(self._record, prompt, tokens, seed, more)
        task = asyncio.create_task(self._read(request, prompt, more))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return request

    async def _read(self, request: Request, prompt: str, more: dict[str, Any]) -> None:
        stream = self.client.generate(
            prompt, stream=True, options=request.message["options"], request_id=request.ref, **more
        )
        try:
            async for token in stream:
                self._record("token", ref=request.ref, seq=token.seq, text=str(token), line=0)
                request.seqs.append(token.seq)
                request.words.append(str(token))
                request.changed.set()
            result = stream.result
            request.terminal = "stopped" if result.done_reason == "cancelled" else "end"
            self._record("terminal", ref=request.ref, kind=request.terminal, host=result.host, attempts=result.attempts)
        except WeftlineError as error:
            request.terminal = error.code
            self._record("terminal", ref=request.ref, kind=error.code, error=str(error))
        except asyncio.CancelledError:
            request.terminal = GONE
            self._record("left", ref=request.ref)
            raise
        finally:
            request.changed.set()
