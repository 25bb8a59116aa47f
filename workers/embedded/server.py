"""The HTTP surface: Ollama's routes over any backend, and the life of the server around them.

A request's whole work runs beside a watch on its connection: when the client leaves, the work is cancelled wherever
it is (waiting, loading, generating), and its slot is free again. Errors before the first byte have their own status;
afterwards they end the stream: natively with a line `{"error": …}`, else without what marks a good end.

The routes under `/v1` are those of OpenAI and Anthropic, translated onto the same handlers (see `dialect`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from workers.embedded import anthropic, openai, wire
from workers.embedded.dialect import Native, native
from workers.embedded.engine import Completion, CutShort
from workers.embedded.engine import Final as FinalPart
from workers.embedded.residency import Residency
from workers.embedded.wire import NS_PER_S, ApiError, Message, Options, encode, quote

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.requests import Request as HttpRequest
    from starlette.types import Receive, Scope, Send

    from workers.embedded.engine import Backend, Model, Piece, Runner

log = logging.getLogger(__name__)

VERSION: Final = "0.24.0"
"""The version of Ollama whose API is spoken, which clients compare."""
BODY_BYTES_MAX: Final = 64 << 20
SHUTDOWN_TIMEOUT_S: Final = 5.0
_JSON: Final = "application/json; charset=utf-8"


class _ClientGone(Exception):
    """The connection of a request was closed from the other side."""


def create_app(backend: Backend) -> Starlette:
    """Ollama's API over `backend`. Models are loaded, and unloaded again, within the app's lifespan."""
    api = _Api(backend)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with api.residency.open():
            yield

    routes = [
        Route("/", api.running, methods=["GET", "HEAD"]),
        Route("/api/version", api.version, methods=["GET", "HEAD"]),
        Route("/api/tags", api.tags, methods=["GET", "HEAD"]),
        Route("/api/ps", api.ps, methods=["GET"]),
        Route("/api/show", api.show, methods=["POST"]),
        Route("/api/generate", _Watched(api.generate, "GenerateRequest"), methods=["POST"]),
        Route("/api/chat", _Watched(api.chat, "ChatRequest"), methods=["POST"]),
        Route("/api/embed", _Watched(api.embed, "EmbedRequest"), methods=["POST"]),
        Route("/api/embeddings", _Watched(api.embeddings, "EmbeddingRequest"), methods=["POST"]),
        Route("/v1/chat/completions", _Watched(api.chat, "ChatCompletionRequest", openai.Chat), methods=["POST"]),
        Route("/v1/completions", _Watched(api.generate, "CompletionRequest", openai.Completions), methods=["POST"]),
        Route("/v1/embeddings", _Watched(api.embed, "EmbedRequest", openai.Embeddings), methods=["POST"]),
        Route("/v1/responses", _Watched(api.chat, "ResponsesRequest", openai.Responses), methods=["POST"]),
        Route("/v1/messages", _Watched(api.chat, "MessagesRequest", anthropic.Messages), methods=["POST"]),
        Route("/v1/models", api.v1_models, methods=["GET"]),
        Route("/v1/models/{model}", api.v1_model, methods=["GET"]),
        *(backend.library.routes() if backend.library is not None else ()),
        Route("/debug/slots", api.slots, methods=["GET"]),
        Route("/debug/faults", api.faults, methods=["POST"]),
    ]
    handlers = {HTTPException: _plain_error, ApiError: _api_error, _ClientGone: _nobody}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)  # type: ignore[arg-type]
    app.router.redirect_slashes = False
    return app


def _plain_error(_: HttpRequest, error: HTTPException) -> Response:
    text = {404: "404 page not found", 405: "405 method not allowed"}.get(error.status_code, error.detail)
    return PlainTextResponse(text, error.status_code, error.headers, media_type="text/plain")


def _api_error(_: HttpRequest, error: ApiError) -> Response:
    return Response(error.line(), error.status, media_type=_JSON)


def _nobody(_: HttpRequest, __: _ClientGone) -> Response:
    return Response(status_code=499)


def _json(value: Any) -> Response:
    return Response(encode(value), media_type=_JSON)


async def read_body(receive: Receive) -> bytes:
    """The whole body; ApiError 413 beyond 64 MiB."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > BODY_BYTES_MAX:
            raise ApiError(413, "request body too large")
        if not message.get("more_body", False):
            return b"".join(parts)


class _Watched:
    """An ASGI endpoint whose handler is cancelled when its client leaves. `struct` is what Ollama calls its request."""

    def __init__(
        self, handler: Callable[[bytes, _Reply], Awaitable[None]], struct: str, dialect: type[Native] = Native
    ) -> None:
        self._handler = handler
        self._struct = struct
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send, self._dialect(self._struct))
        try:
            async with asyncio.TaskGroup() as group:
                body = await read_body(receive)
                watch = group.create_task(_watch(receive))
                try:
                    await self._handler(body, reply)
                except ApiError as error:
                    await reply.fail(error)
                except CutShort as cut:
                    if cut.clean:
                        await reply.end()
                watch.cancel()
        except* ApiError as errors:
            for refused in errors.exceptions:
                assert isinstance(refused, ApiError)
                await reply.fail(refused)
        except* _ClientGone:
            log.debug("the client of %s left", scope["path"])


async def _watch(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _ClientGone


class _Reply:
    """One response: either a whole document or a stream, in the words of the call's dialect."""

    def __init__(self, send: Send, dialect: Native) -> None:
        self.dialect = dialect
        self._send = send
        self._started = False

    async def document(self, native: dict[str, Any]) -> None:
        if self.dialect.events:
            await self.stream(self.dialect.last(native))
            await self.end()
        else:
            await self._whole(self.dialect.document(native), 200)

    async def stream(self, data: bytes) -> None:
        if not self._started:
            self._started = True
            headers = self.dialect.stream_headers
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        if not self._started:
            await self.stream(b"")
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        if self._started:
            await self.stream(self.dialect.broken(error))
            await self.end()
        else:
            await self._whole(self.dialect.error(error), error.status)

    async def _whole(self, body: bytes, status: int) -> None:
        headers = [(b"content-type", self.dialect.media_type.encode()), (b"content-length", b"%d" % len(body))]
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


class _Api:
    """The handlers. Each does what Ollama's of the same name does, in the same order."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.residency = Residency(backend)

    # -- about the engine and its models

    async def running(self, _: HttpRequest) -> Response:
        # Clients look for these very words; /api/version tells what this really is.
        return PlainTextResponse("Ollama is running")

    async def version(self, _: HttpRequest) -> Response:
        return _json({"version": VERSION, "engine": f"weftline {self._backend.label}"})

    async def tags(self, _: HttpRequest) -> Response:
        return _json(
            {
                "models": [
                    {
                        "name": name,
                        "model": name,
                        "modified_at": model.modified_at,
                        "size": model.size_bytes,
                        "digest": model.digest,
                        "details": model.details(),
                    }
                    for name, model in self._backend.models.items()
                ]
            }
        )

    async def ps(self, _: HttpRequest) -> Response:
        return _json({"models": self.residency.ps()})

    async def slots(self, _: HttpRequest) -> Response:
        return _json({"models": self.residency.slots()})

    async def faults(self, request: HttpRequest) -> Response:
        return _json({"faults": self._backend.inject(await read_body(request.receive))})

    async def show(self, request: HttpRequest) -> Response:
        values = wire.parse_body(await read_body(request.receive), "ShowRequest")
        name = values.get("model") or values.get("name") or ""
        if not name:
            raise ApiError(400, "model is required")
        model = self._find(name, 404, f"model '{name}' not found")
        return _json(
            {
                **({"template": model.template} if model.template else {}),
                "details": model.details(),
                "model_info": model.info,
                "capabilities": model.capabilities,
                "modified_at": model.modified_at,
            }
        )

    async def v1_models(self, _: HttpRequest) -> Response:
        listed = [openai.model(name, model) for name, model in self._backend.models.items()]
        return Response(encode({"object": "list", "data": listed}), media_type=openai.JSON)

    async def v1_model(self, request: HttpRequest) -> Response:
        name = request.path_params["model"]
        try:
            found = self._find(name, 404, f"model '{name}' not found")
        except ApiError as error:
            return Response(openai.refusal(error), error.status, media_type=openai.JSON)
        return Response(encode(openai.model(name, found)), media_type=openai.JSON)

    # -- inference

    async def generate(self, body: bytes, reply: _Reply) -> None:
        began_s = time.monotonic()
        request = reply.dialect.read(body)
        model = self._find(request.model, 404, f"model '{request.model}' not found")
        if not request.prompt and request.keep_alive_s == 0:
            self.residency.expire(model)
            return await reply.document(native(request.model, chat=False, done=True, done_reason="unload"))
        if request.raw and (request.template or request.system or request.context):
            raise ApiError(400, "raw mode does not support template, system, or context")
        options = self._check(request, model, "generate")
        async with self.residency.lease(model, options.num_ctx, request.keep_alive_s) as runner:
            loaded_s = time.monotonic()
            if not request.prompt:
                return await reply.document(native(request.model, chat=False, done=True, done_reason="load"))
            prompt = request.prompt
            if not request.raw:
                system = [Message("system", request.system)] if request.system else []
                prompt = await runner.render([*system, Message("user", prompt)], truncate=request.truncate)
                if request.context:
                    prompt = await runner.detokenize(request.context) + prompt
            await self._answer(request, options, runner, prompt, reply, began_s, loaded_s, chat=False)

    async def chat(self, body: bytes, reply: _Reply) -> None:
        began_s = time.monotonic()
        request = reply.dialect.read(body)
        if not request.model:
            raise ApiError(400, "model is required")
        model = self._find(request.model, 404, f"model '{request.model}' not found")
        if not request.messages and request.keep_alive_s == 0:
            self.residency.expire(model)
            return await reply.document(native(request.model, chat=True, done=True, done_reason="unload"))
        options = self._check(request, model, "chat")
        async with self.residency.lease(model, options.num_ctx, request.keep_alive_s) as runner:
            loaded_s = time.monotonic()
            if not request.messages:
                return await reply.document(native(request.model, chat=True, done=True, done_reason="load"))
            prompt = await runner.render(request.messages, truncate=request.truncate)
            await self._answer(request, options, runner, prompt, reply, began_s, loaded_s, chat=True)

    async def _answer(
        self,
        request: wire.Request,
        options: Options,
        runner: Runner,
        prompt: str,
        reply: _Reply,
        began_s: float,
        loaded_s: float,
        *,
        chat: bool,
    ) -> None:
        if request.render_only:
            rendered = {"rendered_template": prompt}
            return await reply.document(native(request.model, chat=chat, done=False, _debug_info=rendered))
        completion = Completion(prompt, options, request.schema, request.logprobs, request.truncate)
        pieces: list[Piece] = []
        keep_text = not request.stream or not (chat or request.raw)
        async with contextlib.aclosing(runner.complete(completion)) as parts:
            async for part in parts:
                if isinstance(part, FinalPart):
                    break
                if keep_text:
                    pieces += part
                if request.stream:
                    await reply.stream(reply.dialect.pieces(part))
            else:
                raise ApiError(500, "the answer ended without a result")
        final = part
        text = "".join(piece.text for piece in pieces)
        fields: dict[str, Any] = {"done_reason": final.reason}
        if not chat and not request.raw and (context := await runner.tokenize(prompt + text)):
            fields["context"] = context
        now_s = time.monotonic()
        fields |= _without_zeros(
            total_duration=int((now_s - began_s) * NS_PER_S),
            load_duration=int((loaded_s - began_s) * NS_PER_S),
            prompt_eval_count=final.prompt_tokens,
            prompt_eval_duration=final.prompt_ns,
            eval_count=final.tokens,
            eval_duration=final.eval_ns,
        )
        if request.stream:
            await reply.stream(reply.dialect.last(native(request.model, chat=chat, done=True, **fields)))
            return await reply.end()
        if request.logprobs is not None:
            fields["logprobs"] = [entry for piece in pieces for entry in piece.logprobs or ()]
        await reply.document(native(request.model, text, chat=chat, done=True, **fields))

    async def embed(self, body: bytes, reply: _Reply) -> None:
        began_s = time.monotonic()
        request = reply.dialect.read(body)
        missing = f'model "{request.model}" not found, try pulling it first'
        model = self._find(request.model, 404, missing if request.model else "model '' not found")
        options = wire.parse_options(request.options)
        async with self.residency.lease(model, options.num_ctx, request.keep_alive_s) as runner:
            loaded_s = time.monotonic()
            if not request.input:
                return await reply.document({"model": request.model, "embeddings": []})
            vectors, tokens = await runner.embed(request.input, truncate=request.truncate)
            vectors = [wire.normalize(vector) for vector in vectors]
            if 0 < request.dimensions < len(vectors[0]):
                vectors = [wire.normalize(vector[: request.dimensions]) for vector in vectors]
            durations = _without_zeros(
                total_duration=int((time.monotonic() - began_s) * NS_PER_S),
                load_duration=int((loaded_s - began_s) * NS_PER_S),
                prompt_eval_count=tokens,
            )
            await reply.document({"model": request.model, "embeddings": vectors, **durations})

    async def embeddings(self, body: bytes, reply: _Reply) -> None:
        request = reply.dialect.read(body)
        if not request.model:
            raise ApiError(400, "model is required")
        model = self._find(request.model, 404, f'model "{request.model}" not found, try pulling it first')
        options = wire.parse_options(request.options)
        async with self.residency.lease(model, options.num_ctx, request.keep_alive_s) as runner:
            if not request.prompt:
                return await reply.document({"embedding": []})
            vectors, _ = await runner.embed([request.prompt], truncate=request.truncate)
            await reply.document({"embedding": wire.normalize(vectors[0])})

    # -- checks

    def _find(self, name: str, status: int, missing: str) -> Model:
        if name:
            try:
                full = wire.full_name(name)
            except ValueError as error:
                raise ApiError(400, str(error)) from None
            if model := self._backend.models.get(full):
                return model
        raise ApiError(status, missing)

    def _check(self, request: wire.Request, model: Model, action: str) -> Options:
        """Refuse, as Ollama does, what the model cannot do; what only this engine cannot do is said plainly."""
        if request.think:
            raise ApiError(400, f"{quote(request.model)} does not support thinking")
        if "completion" not in model.capabilities:
            raise ApiError(400, f"{quote(request.model)} does not support {action}")
        for wanted, capability in ((request.suffix, "insert"), (request.tools, "tools")):
            if wanted:
                raise ApiError(400, f"registry.ollama.ai/library/{model.name} does not support {capability}")
        if request.images:
            raise ApiError(400, "this model is missing data required for image input")
        if request.template:
            raise ApiError(400, "the embedded engine does not run templates given in a request")
        return wire.parse_options(request.options)


def _without_zeros(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


# -- the server -------------------------------------------------------------------------------------------------------


def bind(listen: str) -> tuple[socket.socket, str]:
    """A listening socket for HOST:PORT (port 0 picks one) and the URL it is reached at.

    ValueError when `listen` is no such thing, OSError when it is taken.
    """
    host, _, port = listen.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{listen} is not HOST:PORT")
    host = host.strip("[]") or "127.0.0.1"
    family, kind, proto, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    shown = f"[{host}]" if ":" in host else host
    return listener, f"http://{shown}:{listener.getsockname()[1]}"


@contextlib.asynccontextmanager
async def running(backend: Backend, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """Serve `backend` in this event loop for the length of the block; yields its URL. Errors are those of `bind`."""
    listener, url = bind(listen)
    with contextlib.closing(listener):
        config = uvicorn.Config(
            create_app(backend),
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
        )
        config.load()
        # The steps of uvicorn's own `serve`, less its signal handlers and its polling for the end.
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])
        try:
            yield url
        finally:
            await _shut_down(server)


async def _shut_down(server: uvicorn.Server) -> None:
    for listening in server.servers:
        listening.close()
    # Running answers are cut: to the handlers it is as if every client had left.
    for connection in list(server.server_state.connections):
        if connection.transport:
            connection.transport.abort()
    if server.server_state.tasks:
        await asyncio.wait(server.server_state.tasks, timeout=SHUTDOWN_TIMEOUT_S)
    await server.lifespan.shutdown()


async def serve(
    listen: str, backend: Backend, stop: asyncio.Event, *, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve until `stop` is set; then running requests are cut and models unloaded. OSError when `listen` is taken."""
    async with running(backend, listen) as url:
        if on_ready:
            on_ready(url)
        await stop.wait()
