"""One client on one WebSocket: it authenticates, asks, and hears its streams.

A connection has two tasks: one reads messages, the other writes what waits in the outbox. Streams put into the
outbox from the broker's side. Bounds, and what happens at them:

    messages        a token bucket; the refused are answered RATE_LIMITED, and more of those than fit into another such
                    bucket close the connection (1008)
    streams         `streams_max` at once, then RATE_LIMITED
    outbox          past `outbox_bytes_max` the connection's streams pause: their events are let go and asked for again
                    when half of it is read. What no replay brings again (errors, ends) has the same bound for itself;
                    at it the connection closes (1008)
    time            `authenticate_s` to authenticate; `stall_s` without reading aborts it (gateway/protocols.py)

When the line breaks, the streams of a client that authenticated with `resume` wait for it; it says with `resume`, here
or on another gateway, up to where it has them. Others are stopped, as are all of a client that closed on purpose.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from zlib import crc32

import msgspec
from msgspec.structs import replace
from starlette.websockets import WebSocket, WebSocketDisconnect

from common import history
from common.errors import Code, FabricError, ProcessError
from common.logs import Log
from common.protocol import End, Failed, Submit, full_name, short_name
from gateway import messages
from gateway.auth import Authenticator
from gateway.autopull import AutoPull, Line, Waiter
from gateway.hints import EVERYBODYS, Share, hints_of
from gateway.messages import NOTHING, BadMessage, Codec
from gateway.metrics import Metrics
from gateway.protocols import BATCH
from gateway.session import Begins, Events, Moved, Output, Over, Stream, Waits
from gateway.settings import GatewaySettings
from gateway.upstream import Upstream

log = Log("gateway")

POLICY_VIOLATION: Final = 1008
GOING_AWAY: Final = 1001
ON_PURPOSE: Final = frozenset({1000, 1005})
"""A client that closes with these codes (1005: with none) is gone for good."""
ERROR_CHARS_MAX: Final = 2_000
MODELS_TOLD_MAX: Final = 1_000
"""How many models an error names; `models` brings all."""
_timestamp: Callable[[], int] = lambda: int(time.time() * 1000)  # noqa: E731


@dataclass(slots=True)
class Services:
    """What all connections of a gateway share."""

    settings: GatewaySettings
    upstream: Upstream
    authenticator: Authenticator
    metrics: Metrics
    pulls: AutoPull
    aliases: dict[str, str] = field(default_factory=dict)
    """Names that stand for models, and these; full names. It changes while the gateway runs."""
    shares: dict[str, Share] = field(default_factory=dict)
    """What the registered clients may have. It changes while the gateway runs."""

    def share(self, client: str) -> Share:
        """What a client is entitled to, now."""
        return self.shares.get(client, EVERYBODYS)

    def models(self) -> tuple[str, ...]:
        """What can be asked, as clients know it: models, and the names that stand for some."""
        models = dict.fromkeys(self.upstream.fleet.models)
        aliases = [short_name(alias) for alias, model in self.aliases.items() if short_name(model) in models]
        return tuple(models | dict.fromkeys(aliases))

    def model(self, name: str) -> str:
        """The full name of the model that is meant by a name."""
        full = full_name(name)
        return self.aliases.get(full, full)


class Bucket:
    """A token bucket (messages per second, with a burst)."""

    def __init__(self, rate: float, burst: int, now: float) -> None:
        self._rate, self._burst, self._tokens, self._at = rate, burst, float(burst), now

    def take(self, now: float) -> float:
        """Take one; 0 if there was one, else the seconds until there is."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate


class Closed(Exception):
    """The connection is to be closed, with this code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Connection:
    """A client's connection, from the accepted handshake to its end."""

    def __init__(self, websocket: WebSocket, services: Services) -> None:
        settings = services.settings
        self._websocket = websocket
        self._services = services
        self._loop = asyncio.get_running_loop()
        self._codec: Codec = messages.JSON
        self._client = ""
        self._resumes = False
        self._gone_for_good = False
        self._draining = False
        self._streams: dict[str, ClientStream] = {}
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._answer_bytes = 0
        self._outbox_filled = asyncio.Event()
        self._paused = False
        self._closing: Closed | None = None
        self._bucket = Bucket(settings.messages_per_s, settings.messages_burst, self._loop.time())
        self._refusals = Bucket(settings.messages_per_s, settings.messages_burst, self._loop.time())
        self._batches = BATCH in websocket.scope.get("extensions", {})

    async def run(self) -> None:
        """Serve the client until it leaves or is sent away."""
        offered = self._websocket.scope.get("subprotocols", [])
        subprotocol = messages.SUBPROTOCOL if messages.SUBPROTOCOL in offered else None
        if subprotocol:
            self._codec = messages.MSGPACK
        metrics = self._services.metrics
        metrics.unauthenticated += 1
        try:
            await self._websocket.accept(subprotocol)
            try:
                await self._authenticate()
            finally:
                metrics.unauthenticated -= 1
            metrics.connections += 1
            try:
                await self._serve()
            finally:
                metrics.connections -= 1
        except Closed as closed:
            with contextlib.suppress(WebSocketDisconnect):
                await self._write(list(self._outbox))
                await self._websocket.close(closed.code, closed.reason)
        except (_Left, WebSocketDisconnect):
            pass  # the client went away, perhaps while something was being sent to it

    @property
    def client(self) -> str:
        """Who it is; "" before authentication."""
        return self._client

    def dismiss(self) -> None:
        """The gateway is ending: say so and close."""
        self._close(GOING_AWAY, "the gateway is shutting down")

    def drain(self) -> None:
        """The gateway is going to end: start nothing more."""
        if not self._draining:
            self._draining = True
            self.say(messages.Draining)

    @property
    def idle(self) -> bool:
        """Whether closing it costs its client nothing but a new connection."""
        return self._resumes or not self._streams

    def revoke(self) -> None:
        """The client may not be here any more."""
        self._gone_for_good = True
        self._outbox.clear()
        self._leave_streams()
        self._close(POLICY_VIOLATION, "this client was revoked")

    # Authentication ---------------------------------------------------------------------------------------------------

    async def _authenticate(self) -> None:
        authenticator = self._services.authenticator
        challenge = authenticator.challenge()
        await self._write([self._encode(messages.Challenge, challenge=challenge.line)])
        try:
            async with asyncio.timeout(self._services.settings.authenticate_s):
                data = await self._receive()
        except TimeoutError:
            raise Closed(POLICY_VIOLATION, "not authenticated in time") from None
        try:
            message = self._codec.decode(data)
        except BadMessage as error:
            await self._write([self._error(Code.INVALID_MESSAGE, f"authenticate first; {error}", ref=error.ref)])
            raise Closed(POLICY_VIOLATION, "not an authenticate") from None
        if not isinstance(message, messages.Authenticate):
            text = "authenticate first: sign the challenge and send it back"
            await self._write([self._error(Code.AUTH_REQUIRED, text, ref=getattr(message, "id", None))])
            raise Closed(POLICY_VIOLATION, "not authenticated")
        try:
            client = await authenticator.authenticate(
                challenge, message.client_id, message.signature, message.algorithm
            )
        except FabricError as error:
            self._services.metrics.authentications_failed += 1
            await self._write([self._encode(messages.AuthResult, success=False, error=error.message)])
            raise Closed(POLICY_VIOLATION, error.message) from None
        except ProcessError as error:
            log.warn("client registry unreadable", reason=str(error))
            text = "the gateway cannot read its client registry; try again later"
            await self._write([self._error(Code.INTERNAL, text)])  # no verdict on the client: it may come again
            raise Closed(1011, "registry unreadable") from None
        self._client = client.id
        self._resumes = message.resume
        await self._write([self._encode(messages.AuthResult, success=True)], trusted=True)

    # Reading ----------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        writer = self._loop.create_task(self._write_outbox())
        reader = self._loop.create_task(self._read())
        try:
            # Whichever ends first ends the connection; its exception says how.
            await asyncio.wait((writer, reader), return_when=asyncio.FIRST_COMPLETED)
            for task in (reader, writer):
                if task.done():
                    task.result()
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            self._leave_streams()

    def _leave_streams(self) -> None:
        upstream = self._services.upstream
        leave = upstream.park if self._resumes and not self._gone_for_good else upstream.forget
        streams = list(self._streams.values())
        self._streams.clear()  # first: what is being resumed sees that nobody waits for it any more
        for stream in streams:
            if stream.waiter is not None:
                stream.waiter.leave()
                stream.waiter = None  # it holds the body, and the stream
            if stream.stream is not None:
                leave(stream.stream)

    async def _read(self) -> None:
        while True:
            try:
                data = await self._receive()
            except _Left:
                return
            if self._closing is not None:
                continue  # it is told so, and asks elsewhere
            wait_s = self._bucket.take(self._loop.time())
            if wait_s:
                self._refuse(data, wait_s)
                continue
            self._handle(data)

    def _refuse(self, data: bytes | str, wait_s: float) -> None:
        if self._refusals.take(self._loop.time()):
            raise Closed(POLICY_VIOLATION, "too many messages")
        try:
            message = self._codec.decode(data)
        except BadMessage as error:
            ref = error.ref
        else:
            if isinstance(message, messages.Stop):
                # Stopping relieves everyone; and an error with the id of a running stream would seem to end it.
                self._stop(message)
                return
            ref = getattr(message, "id", None)
        text = f"at most {self._services.settings.messages_per_s:g} messages a second"
        self.say_error(Code.RATE_LIMITED, text, ref=ref, retry_after_ms=int(wait_s * 1000) + 1)

    def _handle(self, data: bytes | str) -> None:
        settings = self._services.settings
        if _size(data) > settings.frame_bytes_max:
            # It was read whole, so its id could be found; but a message this large is not worth decoding.
            self.say_error(Code.TOO_LARGE, f"a message may have at most {settings.frame_bytes_max} bytes")
            return
        try:
            message = self._codec.decode(data)
        except BadMessage as error:
            code = Code.UNKNOWN_TYPE if error.unknown_type else Code.INVALID_MESSAGE
            self.say_error(code, str(error), ref=error.ref)
            return
        match message:
            case messages.Job():
                self._submit(message)
            case messages.Stop():
                self._stop(message)
            case messages.Models():
                self.say(messages.ModelsResult, models=self._services.models())
            case messages.Ping():
                self.say(messages.Pong)
            case messages.Resume():
                self._resume(message)
            case messages.Authenticate():
                self.say_error(Code.INVALID_MESSAGE, "already authenticated")
                raise Closed(POLICY_VIOLATION, "a second authenticate")

    def _may_start(self, ref: str) -> bool:
        """Whether there is room for another stream; if not, its client is told why."""
        settings = self._services.settings
        if self._draining:
            self.say_error(Code.SHUTTING_DOWN, "this gateway is shutting down; connect again", ref=ref)
        elif ref in self._streams:
            self.say_error(Code.DUPLICATE_ID, f"a request with the id {ref!r} is running", ref=ref)
        elif len(self._streams) >= settings.streams_max:
            text = f"at most {settings.streams_max} requests at once on one connection"
            self.say_error(Code.RATE_LIMITED, text, ref=ref, retry_after_ms=1000)
        else:
            return True
        return False

    def _submit(self, job: messages.Job) -> None:
        if not self._may_start(job.id):
            return
        stream = ClientStream(self, job.id)
        try:
            model = self._services.model(job.model)
            path, body = messages.ollama_call(self._as_asked(job, model))
            submit = partial(
                self._services.upstream.submit,
                client=self._client,
                ref=job.id,
                model=model,
                path=path,
                body=body,
                sink=stream.hear,
                priority=job.priority,
                resume=self._resumes,
                migrate=job.migrate,
                hints=hints_of(path, body),
                share=self._services.share(self._client),
            )
            if self._services.pulls.may(model):
                stream.waiter = Waiter(
                    self._services.pulls,
                    token="",
                    size=len(body),
                    submit=lambda deadline_ms: stream.bind(submit(deadline_ms=deadline_ms)),
                    sink=stream.hear,
                    tell=stream.say_pulling,
                )
            stream.bind(submit(deadline_ms=job.deadline_ms))
        except BadMessage as error:
            self.say_error(Code.INVALID_MESSAGE, str(error), ref=job.id)
            return
        except FabricError as error:
            self.say_error(error.code, error.message, ref=job.id)
            return
        self._streams[job.id] = stream
        self._services.metrics.requests += 1
        if history.record is not None:
            history.record("submitted", rid=stream._submit.rid, ref=job.id)

    def _as_asked(self, job: messages.Job, model: str) -> messages.Job:
        """The request as it goes to an engine: for the model that is meant, loaded as it always is."""
        if model != full_name(job.model):
            job = replace(job, model=model)
        num_ctx = self._services.settings.num_ctx_of(model)
        return job if num_ctx is None else replace(job, options=job.options | {"num_ctx": num_ctx})

    def _resume(self, message: messages.Resume) -> None:
        if not self._resumes:
            text = "only a client that authenticated with `resume` can resume; send the request again"
            self.say_error(Code.NOT_FOUND, text, ref=message.id)
        elif self._may_start(message.id):
            stream = ClientStream(self, message.id, wanted=message.last_seq + 1)
            self._streams[message.id] = stream
            try:
                self._services.upstream.attach(
                    client=self._client,
                    ref=message.id,
                    wanted=stream.wanted,
                    sink=stream.hear,
                    answered=partial(self._resumed, stream),
                    waits=partial(self._waits, stream),
                )
            except FabricError as error:
                del self._streams[message.id]
                self.say_error(error.code, error.message, ref=message.id)

    def _waits(self, waiting: "ClientStream") -> bool:
        """Whether the resumed stream is to be heard here, or to be stopped; else it is left where it is."""
        return self._streams.get(waiting.ref) is waiting or self._gone_for_good or waiting.stopped

    def _resumed(self, waiting: "ClientStream", stream: Stream | None, code: Code | None) -> None:
        """The broker answered a resume; the connection may have ended meanwhile."""
        here = self._streams.get(waiting.ref) is waiting
        if stream is None:
            if here:
                del self._streams[waiting.ref]
                text = "no such request to resume; send it again" if code is None else "the broker does not answer"
                self.say_error(code or Code.NOT_FOUND, text, ref=waiting.ref)
        elif here:
            waiting.bind(stream)
            self._services.metrics.resumes += 1
            if history.record is not None:
                history.record("submitted", rid=stream.submit.rid, ref=waiting.ref)
            if waiting.stopped:
                self._services.upstream.cancel(stream, "stopped by the client")
        else:
            self._services.upstream.forget(stream)

    def _stop(self, message: messages.Stop) -> None:
        stream = self._streams.get(message.id)
        if stream is None:
            self.say_error(Code.NOT_FOUND, "no such stream on this connection", ref=message.id)
        else:
            stream.stopped = True
            if stream.waiter is not None and stream.waiter.leave():
                stream.waiter.end(FabricError(Code.CANCELLED, "stopped by the client"))
            elif stream.stream is not None:
                self._services.upstream.cancel(stream.stream, "stopped by the client")

    async def _receive(self) -> bytes | str:
        event = await self._websocket.receive()
        if event["type"] == "websocket.disconnect":
            self._gone_for_good = self._gone_for_good or event.get("code") in ON_PURPOSE
            raise _Left
        data: bytes | str | None = event.get("text")
        if data is None:
            data = event["bytes"]
        return data

    # Writing ----------------------------------------------------------------------------------------------------------

    def push(self, frame: bytes) -> None:
        """Put an encoded message of a stream into the outbox."""
        self._outbox.append(frame)
        self._outbox_bytes += len(frame)
        self._outbox_filled.set()
        bound = self._services.settings.outbox_bytes_max
        if self._outbox_bytes > bound and not self._paused:
            self._paused = True
            self._services.metrics.pauses += 1
            for stream in self._streams.values():
                if stream.stream is not None:
                    stream.stream.pause()

    async def _write_outbox(self) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            if self._outbox:
                batch = list(self._outbox)
                self._outbox.clear()
                await self._write(batch)
                # Only now: what the transport holds back has not been read by anyone.
                self._outbox_bytes = sum(map(len, self._outbox))
                self._answer_bytes = 0
                if self._paused and self._outbox_bytes <= self._services.settings.outbox_bytes_max // 2:
                    self._paused = False
                    for stream in list(self._streams.values()):
                        if stream.stream is not None:
                            self._services.upstream.unpause(stream.stream)
            if self._closing is not None:
                raise self._closing  # `run` writes what is left, and it must not grow meanwhile

    async def _write(self, frames: list[bytes], *, trusted: bool = False) -> None:
        if self._batches:
            await self._websocket.send(
                {"type": "websocket.send", "batch": frames, "binary": self._codec.binary, "trusted": trusted}
            )
            return
        for frame in frames:
            if self._codec.binary:
                await self._websocket.send({"type": "websocket.send", "bytes": frame})
            else:
                await self._websocket.send({"type": "websocket.send", "text": frame.decode()})

    def _close(self, code: int, reason: str) -> None:
        if self._closing is None:
            self._closing = Closed(code, reason)
        self._outbox_filled.set()

    def _encode(self, kind: Callable[..., Any], **fields: Any) -> bytes:
        encoded: bytes = self._codec.encode(kind(timestamp=_timestamp(), **fields))
        return encoded

    def say(self, kind: Callable[..., Any], **fields: Any) -> None:
        """Say something that no replay brings again."""
        self._answer(self._encode(kind, **fields))

    def _answer(self, frame: bytes) -> None:
        self.push(frame)
        others_wait = self._answer_bytes > 0  # one alone may be as long as it is
        self._answer_bytes += len(frame)
        if others_wait and self._answer_bytes > self._services.settings.outbox_bytes_max:
            self._close(POLICY_VIOLATION, "the client does not read")

    def _error(self, code: Code, text: str, *, ref: str | None = None, **more: Any) -> bytes:
        self._services.metrics.errors[code] += 1
        return self._encode(messages.ErrorMessage, id=ref, code=code.value, error=text[:ERROR_CHARS_MAX], **more)

    def say_error(self, code: Code, text: str, *, ref: str | None = None, **more: Any) -> None:
        """Say that a message or a request (`ref`) failed."""
        self._answer(self._error(code, text, ref=ref, **more))


class ClientStream:
    """Translates one stream's lines, as Ollama writes them, into the client's messages."""

    __slots__ = ("_complete", "_connection", "_tokens", "ref", "stopped", "stream", "waiter", "wanted")

    def __init__(self, connection: Connection, ref: str, *, wanted: int = 0) -> None:
        self._connection = connection
        self._tokens = 0
        self._complete = False
        self.ref = ref
        self.wanted = wanted
        """The client has the events below."""
        self.stream: Stream | None = None
        """None while it is being resumed."""
        self.waiter: Waiter | None = None
        """Until the first event, of a request for a model that may be pulled."""
        self.stopped = False

    def bind(self, stream: Stream) -> None:
        """The stream that is translated."""
        self.stream = stream
        if self._connection._paused:
            stream.pause()

    @property
    def _submit(self) -> Submit:
        assert self.stream is not None  # nothing is heard before
        return self.stream.submit

    @property
    def _embeds(self) -> bool:
        return self._submit.path == messages.EMBED_PATH

    def hear(self, output: Output) -> None:
        """Take in what happened to the stream."""
        connection, ref = self._connection, self.ref
        match output:
            case Events():
                self._on_events(output)
            case Waits():
                connection.say(messages.Queued, id=ref, position=output.position, eta_ms=output.eta_ms)
            case Begins():
                self.waiter = None
                if not self._embeds:
                    connection.say(messages.StreamStart, id=ref, model=short_name(self._submit.model))
            case Moved():
                connection._streams.pop(ref, None)
                connection.say_error(Code.CANCELLED, "this request goes on on another connection", ref=ref)
            case Over() if self._awaits_pull(output.terminal):
                pass  # its end, or another stream, comes when the model has been pulled
            case Over():
                self.waiter = None
                connection._streams.pop(ref, None)
                self._on_over(output)

    def _awaits_pull(self, terminal: End | Failed) -> bool:
        if self.waiter is None or self.stream is None or self.stopped:
            return False
        return self.waiter.take(self.stream, terminal)

    def say_pulling(self, line: Line) -> None:
        """Say how far the pull of the model is."""
        self._connection.say(messages.Pulling, id=self.ref, model=short_name(self._submit.model), **line)

    def _on_events(self, events: Events) -> None:
        connection = self._connection
        encode = connection._codec.encode
        push = connection.push
        ref = self.ref
        wanted = self.wanted
        now = _timestamp()
        if self._embeds:
            self._on_embeddings(events.payload)
            return
        for seq, text in enumerate(events.lines(), events.seq):
            try:
                line = messages.decode_line(text)
                self._complete = line.done
                if line.message is None:
                    token, thinking, tool_calls = line.response, line.thinking, line.tool_calls
                else:
                    token, thinking, tool_calls = line.message.content, line.message.thinking, line.message.tool_calls
                if token or thinking or tool_calls is not NOTHING:
                    self._tokens += 1
                    if seq < wanted:
                        continue
                    push(
                        encode(
                            messages.StreamToken(
                                timestamp=now,
                                id=ref,
                                token=token,
                                seq=seq,
                                thinking=thinking,
                                tool_calls=self._embeddable(tool_calls),
                                logprobs=self._embeddable(line.logprobs),
                            )
                        )
                    )
            except NONSENSE as error:
                self._give_up(f"the engine's line {seq} is not Ollama's: {error}")
                return
        connection._services.metrics.events += events.n - events.skip
        seq = max(events.seq, wanted)
        if history.record is not None and self.stream is not None and seq < events.seq + events.n - events.skip:
            rid, attempt = self._submit.rid, self.stream.attempt
            hashes = [crc32(line.rstrip(b"\n")) for line in events.lines()[seq - events.seq :]]
            history.record("delivered", rid=rid, ref=ref, attempt=attempt, seq=seq, hashes=hashes)

    def _embeddable(self, raw: msgspec.Raw) -> Any:
        """A piece of Ollama's JSON as it can stand in a message: as it is in JSON, decoded for msgpack."""
        if raw is NOTHING:
            return None
        if self._connection._codec.binary:
            return msgspec.json.decode(raw)
        str(raw, "utf-8")  # it is not looked at otherwise, and a text frame must be UTF-8
        return raw

    def _on_embeddings(self, document: bytes) -> None:
        connection = self._connection
        try:
            result = messages.decode_embeddings(document)
            frame = connection._encode(
                messages.EmbedResult,
                id=self.ref,
                model=short_name(self._submit.model),
                embeddings=result.embeddings,
                prompt_tokens=result.prompt_eval_count,
                elapsed_time=self._elapsed_ms(),
            )
        except NONSENSE as error:
            self._give_up(f"the engine's answer is no embedding: {error}")
            return
        self._complete = True
        connection.push(frame)

    def _give_up(self, why: str) -> None:
        """The engine's answer makes no sense: to leave the piece out would be a gap, so the stream ends here."""
        stream, connection = self.stream, self._connection
        assert stream is not None
        rid = stream.submit.rid
        log.warn("engine not understood", rid=rid, worker=stream.worker, reason=why)
        connection._streams.pop(self.ref, None)
        connection._services.upstream.forget(stream)
        self._on_over(Over(Failed(rid=rid, attempt=stream.attempt, code=Code.BACKEND_ERROR, message=why), b""))

    def _on_over(self, over: Over) -> None:
        connection, terminal = self._connection, over.terminal
        if isinstance(terminal, End) and not self._complete and not self.stopped:
            self._give_up("the engine's answer has no end")
            return
        assert self.stream is not None
        connection._services.metrics.finished(self.stream, terminal)
        if self._embeds and self._complete:
            pass  # the result was the last word, whatever the engine did after it
        elif isinstance(terminal, End):
            self._say_end(terminal.stats.done_reason or "stop", terminal)
        elif terminal.code is Code.CANCELLED and self.stopped:
            self._say_end("cancelled", None)
        else:
            connection.say_error(
                terminal.code,
                terminal.message,
                ref=self.ref,
                models=terminal.models[:MODELS_TOLD_MAX] or None,
                retry_after_ms=terminal.retry_after_ms,
            )

    def _say_end(self, done_reason: str, end: End | None) -> None:
        stream = self.stream
        assert stream is not None
        stats = end.stats if end else None
        self._connection.say(
            messages.StreamEnd,
            id=self.ref,
            total_tokens=(stats.completion_tokens if stats else 0) or self._tokens,
            elapsed_time=self._elapsed_ms(),
            done_reason=done_reason,
            prompt_tokens=stats.prompt_tokens if stats else 0,
            host=stream.worker,
            attempts=stream.attempts,
            migrated=stream.continued > 0,
            timings=messages.Timings(
                queue_ms=_ms(stream.submitted_at, stream.leased_at) or 0,
                load_ms=stats.load_ns // 1_000_000 if stats else 0,
                first_token_ms=_ms(stream.submitted_at, stream.first_event_at),
            ),
        )

    def _elapsed_ms(self) -> int:
        assert self.stream is not None
        return int((self._connection._loop.time() - self.stream.submitted_at) * 1000)


# What decoding an engine's JSON, or encoding it again, may raise.
NONSENSE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError)


class _Left(Exception):
    """The client closed, or its line broke."""


def _size(data: bytes | str) -> int:
    """The bytes of a frame; a text is measured only as far as its characters leave it open."""
    return len(data) if isinstance(data, bytes) or data.isascii() else len(data.encode())


def _ms(start: float, end: float | None) -> int | None:
    return None if end is None else int((end - start) * 1000)
