"""Ollama's, OpenAI's and Anthropic's HTTP APIs on the gateway: who may ask what, and where it goes.

A request for inference is handed on as it came (gateway/exchange.py); lists are answered for the whole fleet
(gateway/catalogue.py). A client says who it is by one of

    Authorization: Bearer TOKEN      Ollama's and OpenAI's libraries
    x-api-key: TOKEN                 Anthropic's
    /k/TOKEN/…                       before any path: the `ollama` command line sends no header to a foreign host

or, where the setting `anonymous` allows it, by being on this machine. Such a request must come from a loopback address,
not through a proxy, name a loopback host (else a web page could reach it by rebinding its own name), and, if a page
sent it, that page must be from a loopback host too.
"""

import asyncio
import ipaddress
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from common.config import default_data_dir
from common.errors import Code, FabricError
from common.logs import Log
from common.ollama import UNREADABLE
from common.protocol import Host, full_name, short_name
from gateway import catalogue
from gateway.catalogue import Catalogue
from gateway.dialects import Anthropic, Dialect, Ollama, OpenAI
from gateway.exchange import Call, Ending, Exchange, Gone, Room, attended, check_length, read_large, refuse
from gateway.hints import EMBEDDING, NATIVE, READ_MAX, SHORT, Buffer, Hints, hints_of, options_with
from gateway.keyring import Grant, Keyring
from gateway.messages import DEADLINE_MS_MAX, PRIORITIES
from gateway.spool import Spool, Spools
from gateway.store import MODEL_CHARS_MAX, MODELS, SCOPES, Scope, StoreError, token_digest
from gateway.websocket import Services

OLLAMA, OPENAI, ANTHROPIC = Ollama(), OpenAI(), Anthropic()
INFERENCE: Final[dict[str, Dialect]] = {
    "/api/generate": OLLAMA,
    "/api/chat": OLLAMA,
    "/api/embed": OLLAMA,
    "/api/embeddings": OLLAMA,
    "/v1/chat/completions": OPENAI,
    "/v1/completions": OPENAI,
    "/v1/embeddings": OPENAI,
    "/v1/responses": OPENAI,
    "/v1/messages": ANTHROPIC,
}
ANONYMOUS: Final = Grant(client="~anonymous", token="", scopes=frozenset(SCOPES), models=MODELS)
"""Who uses a gateway that lets its own machine in. No client can have this name."""
MODEL_FIELDS: Final = frozenset({"model", "name", "source", "destination", "from"})
log = Log("gateway")

Work = Callable[[Ending, AsgiScope, Receive, Send], Awaitable[None]]
TOKEN_PREFIX: Final = "/k/"
PRIORITY: Final = b"x-weftline-priority"
DEADLINE: Final = b"x-weftline-deadline-ms"

_json = msgspec.json.Encoder().encode


class _Job(msgspec.Struct):
    """What the gateway reads of a request's body; `name` is what Ollama called it once."""

    model: str = ""
    name: str = ""


_VARIANTS: Final = [
    name
    for field in _Job.__struct_fields__
    for name in map("".join, product(*((letter, letter.upper()) for letter in field)))
    if name != field
]
"""The other ways to write a field, for an engine that reads it in any case. (No letter of theirs has a third form.)"""
_STRICT_JOB: Any = msgspec.defstruct(
    "_StrictJob", [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in _VARIANTS], bases=(_Job,)
)
_READ: Final = (*_STRICT_JOB.__struct_fields__, *SHORT)
"""What is read of a body that is larger than READ_MAX."""
EXCERPTS_MAX: Final = 2
"""Of such bodies that are being read at once."""

_job = msgspec.json.Decoder(_STRICT_JOB)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class TokenPaths:
    """ASGI middleware: `/k/TOKEN/api/tags` is `/api/tags` with that token."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(TOKEN_PREFIX):
            token, _, path = scope["path"].removeprefix(TOKEN_PREFIX).partition("/")
            scope = {**scope, "path": f"/{path}", "raw_path": None, "weftline.token": token}
        await self._app(scope, receive, send)


class HttpApi:
    """The routes, and what they share."""

    def __init__(self, services: Services, keyring: Keyring) -> None:
        self._services = services
        self._keyring = keyring
        self._catalogue = Catalogue(services.upstream)
        self._running: set[Ending] = set()
        self._room = Room()
        settings = services.settings
        folder = settings.spool_dir or settings.data_dir or default_data_dir()
        self.spools = Spools(folder, settings.spool_bytes_max)
        self._excerpts = asyncio.Semaphore(EXCERPTS_MAX)
        self.draining = False

    @property
    def running(self) -> int:
        """Requests that are being worked on."""
        return len(self._running)

    def dismiss(self) -> None:
        """End them all."""
        for ending in list(self._running):
            ending.end(FabricError(Code.SHUTTING_DOWN, "this gateway is shutting down"))

    def revoke(self, clients: Set[str], tokens: Set[str]) -> None:
        """End what runs for them."""
        for ending in list(self._running):
            if ending.grant.client in clients or ending.grant.token in tokens:
                ending.end(FabricError(Code.CANCELLED, "this key was revoked"))

    def routes(self) -> Iterable[BaseRoute]:
        for path, dialect in INFERENCE.items():
            work = partial(self._infer, path, dialect, False)
            yield Route(path, Endpoint(self, dialect, Scope.INFERENCE, work), methods=["POST"])
        show = partial(self._infer, "/api/show", OLLAMA, True)
        yield Route("/api/show", Endpoint(self, OLLAMA, Scope.MODELS_READ, show), methods=["POST"])
        aliases = self._services.aliases
        yield self._list("/api/tags", lambda hosts, allowed, _: catalogue.tags(hosts, allowed, aliases))
        yield self._list("/api/ps", lambda hosts, allowed, _: catalogue.ps(hosts, allowed))
        yield self._list("/fabric/models", lambda hosts, allowed, _: catalogue.fabric_models(hosts, allowed))
        yield self._list("/fabric/pulls", lambda _, allowed, __: {"pulls": self._services.pulls.under_way(allowed)})
        yield self._list(
            "/v1/models", lambda hosts, allowed, _: catalogue.openai_models(hosts, allowed, aliases), OPENAI
        )
        yield self._list("/v1/models/{model:path}", self._openai_model, OPENAI)
        yield Route("/api/version", self._version, methods=["GET"])

    def models_changed(self) -> None:
        """Something was done to the models of hosts."""
        self._catalogue.forget()

    async def hosts(self) -> tuple[Host, ...]:
        """All hosts, as they were a moment ago.

        Raises:
            FabricError: NO_WORKERS, no broker answers.
        """
        return await self._catalogue.hosts()

    async def grant(self, scope: AsgiScope, wanted: Scope) -> Grant:
        """Who asks.

        Raises:
            FabricError: AUTH_REQUIRED, AUTH_FAILED, or FORBIDDEN without the scope `wanted`.
        """
        token = _token(scope)
        if self._services.settings.anonymous and _is_local(scope) and token_digest(token) is None:
            # Also with what cannot be a key: OpenAI's libraries insist on one, and people write `ollama`.
            grant = ANONYMOUS
        elif token:
            try:
                grant = await self._keyring.grant(token)
            except StoreError as error:
                log.warn("client registry unreadable", reason=str(error))
                text = "the gateway cannot read its client registry; try again later"
                raise FabricError(Code.INTERNAL, text) from None
        else:
            raise FabricError(
                Code.AUTH_REQUIRED,
                "a key is needed: send it as `Authorization: Bearer KEY`, or put /k/KEY before the path; "
                "an operator makes one with `weftline keys token NAME`",
            )
        if not grant.allows(wanted):
            raise FabricError(Code.FORBIDDEN, f"this key does not have the scope {wanted}")
        return grant

    async def answer(
        self, dialect: Dialect, wanted: Scope, work: Work, scope: AsgiScope, receive: Receive, send: Send
    ) -> None:
        """Answer a request by `work`, for whoever may have it done; its errors are told in `dialect`."""
        try:
            if self.draining:
                raise FabricError(Code.SHUTTING_DOWN, "this gateway is shutting down; connect again")
            ending = Ending(await self.grant(scope, wanted), self._room)
            self._running.add(ending)  # in the same turn: a revocation was seen by the one or finds the other
            try:
                await work(ending, scope, receive, send)
            finally:
                self._running.discard(ending)
                ending.release()
        except FabricError as error:
            self._services.metrics.errors[error.code] += 1
            await refuse(send, dialect, error)
        except Gone:
            pass

    async def _infer(
        self, path: str, dialect: Dialect, light: bool, ending: Ending, scope: AsgiScope, receive: Receive, send: Send
    ) -> None:
        """Hand a request to an engine."""
        services, grant = self._services, ending.grant
        settings = services.settings
        priority, deadline_ms = _urgency(scope)
        check_length(scope, settings.body_bytes_max, self.spools)
        body = await read_large(receive, ending, self.spools, settings.body_bytes_max)
        model, body, hints = await self._made_ready(path, light, body, ending, receive)
        call = Call(
            client=grant.client,
            ref=secrets.token_hex(8),
            model=model,
            path=path,
            body=b"" if isinstance(body, Spool) else body,
            light=light,
            spool=body if isinstance(body, Spool) else None,
            priority=priority,
            deadline_ms=deadline_ms,
            hints=hints,
            share=services.share(grant.client),
        )
        exchange = Exchange(
            dialect, services.upstream, services.metrics, services.settings.outbox_bytes_max, services.pulls
        )
        await exchange.run(call, ending, receive, send)

    async def _made_ready(
        self, path: str, light: bool, body: bytes | Spool, ending: Ending, receive: Receive
    ) -> tuple[str, bytes | Spool, Hints]:
        """The model that is meant, the body as an engine is to get it, and what a scheduler is told of it.

        Raises:
            Gone: the client left.
            FabricError: INVALID_MESSAGE; FORBIDDEN; QUEUE_FULL, there is no room; or why it was ended from outside.
        """
        told: Buffer = body if isinstance(body, bytes) else await attended(self._told(body), ending, receive)
        asked = _model_of(told)
        if not ending.grant.allows_model(asked):
            raise FabricError(Code.FORBIDDEN, f"this key may not use the model {short_name(asked)!r}")
        model = self._services.model(asked)
        changes: dict[str, bytes] = {}
        if model != asked:
            changes["model"] = _json(short_name(model))
        num_ctx = self._services.settings.num_ctx_of(model) if path.startswith(NATIVE) and not light else None
        if num_ctx is not None:
            options = options_with(told, num_ctx)
            changes |= {} if options is None else {"options": options}
        if isinstance(body, bytes):
            body = _with_fields(body, changes) if changes else body
            return model, body, hints_of(path, body)
        if changes:
            # Of two fields of one name the last one counts, in Go as here.
            end = b"".join(b',"%b":%b' % (name.encode(), value) for name, value in changes.items())
            await body.replace_end(end + b"}")
        if isinstance(told, bytes):
            hints = hints_of(path, _with_fields(told, changes))
            return model, body, replace(hints, prompt_bytes=body.size) if path in EMBEDDING else hints
        return model, body, await attended(asyncio.to_thread(hints_of, path, body.view()), ending, receive)

    async def _told(self, spool: Spool) -> Buffer:
        """A large body, or if that would take too long to read here, what is to be read of it.

        Raises:
            FabricError: INVALID_MESSAGE, or QUEUE_FULL, it cannot be read.
        """
        if spool.size <= READ_MAX:
            return spool.view()
        async with self._excerpts:
            return await spool.excerpt(_READ)

    async def root(self, request: Request) -> Response:
        """What Ollama says to its clients, and a page for people."""
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(PAGE)
        return PlainTextResponse("Ollama is running")

    def _openai_model(self, hosts: Any, allowed: catalogue.Allowed, request: Request) -> Any:
        name = full_name(request.path_params["model"])
        model = catalogue.find(hosts, self._services.model(name)) if allowed(name) else None
        if model is None:
            raise FabricError(Code.MODEL_NOT_FOUND, f"model '{short_name(name)}' not found")
        return catalogue.openai_model(short_name(name), model)

    async def _version(self, request: Request) -> Response:
        # Clients ask before they have a key; the number tells nothing that the answers' form does not.
        try:
            hosts = await self._catalogue.hosts()
        except FabricError:
            hosts = ()
        return Response(_json({"version": catalogue.version(hosts)}), media_type="application/json")

    def _list(
        self, path: str, make: Callable[[Any, catalogue.Allowed, Request], Any], dialect: Dialect = OLLAMA
    ) -> Route:
        async def listing(request: Request) -> Response:
            try:
                grant = await self.grant(request.scope, Scope.MODELS_READ)
                document = make(await self._catalogue.hosts(), grant.allows_model, request)
            except FabricError as error:
                self._services.metrics.errors[error.code] += 1
                return _Refusal(dialect, error)
            return Response(_json(document), media_type="application/json; charset=utf-8")

        return Route(path, listing, methods=["GET"])


class Endpoint:
    """An ASGI endpoint, so that nothing stands between a stream and its connection."""

    def __init__(self, api: HttpApi, dialect: Dialect, wanted: Scope, work: Work) -> None:
        self._api = api
        self._what = dialect, wanted, work

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await self._api.answer(*self._what, scope, receive, send)


class _Refusal(Response):
    """An error of our own."""

    def __init__(self, dialect: Dialect, error: FabricError) -> None:
        super().__init__()
        self._dialect, self._error = dialect, error

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await refuse(send, self._dialect, self._error)


def fields_of(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a request.

    Go reads a field's name in any case, and an engine would take `MODEL` for the model that was checked here.

    Raises:
        FabricError: INVALID_MESSAGE, it is no JSON object, or one with a name that is nearly one of a model's.
    """
    try:
        fields = _fields.decode(body)
    except UNREADABLE as error:
        raise FabricError(Code.INVALID_MESSAGE, f"the body is not the JSON that was expected: {error}") from None
    for name in fields:
        if name not in MODEL_FIELDS and name.casefold() in MODEL_FIELDS:
            raise FabricError(Code.INVALID_MESSAGE, f"write {name.casefold()!r}, not {name!r}")
    return fields


def _model_of(body: Buffer) -> str:
    """The full name of the model a request is for, in one pass and without memory for what else is in it.

    Raises:
        FabricError: INVALID_MESSAGE.
    """
    try:
        job = _job.decode(body)
    except UNREADABLE as error:
        raise FabricError(Code.INVALID_MESSAGE, f"the body is not the JSON that was expected: {error}") from None
    for variant in _VARIANTS:
        if getattr(job, variant) is not msgspec.UNSET:
            raise FabricError(Code.INVALID_MESSAGE, f"write {variant.casefold()!r}, not {variant!r}")
    model = job.model or job.name
    if not model:
        raise FabricError(Code.INVALID_MESSAGE, "model is required")
    if len(model) > MODEL_CHARS_MAX:
        raise FabricError(Code.INVALID_MESSAGE, f"the name of a model has at most {MODEL_CHARS_MAX} characters")
    return full_name(model)


def _with_fields(body: bytes, changes: Mapping[str, bytes]) -> bytes:
    """The same request with other fields (JSON), which come last; one for another model has no `name`.

    Raises:
        FabricError: INVALID_MESSAGE.
    """
    fields = fields_of(body)
    for name in (*changes, "name") if "model" in changes else changes:
        fields.pop(name, None)
    return _json(fields | {name: msgspec.Raw(value) for name, value in changes.items()})


def _urgency(scope: AsgiScope) -> tuple[str, int | None]:
    """The priority of a request and the ms in which its answer is wanted.

    Raises:
        FabricError: INVALID_MESSAGE, a header says something else.
    """
    priority = _header(scope, PRIORITY)
    if priority is None:
        priority = "normal"
    elif priority not in PRIORITIES:
        raise FabricError(Code.INVALID_MESSAGE, f"X-Weftline-Priority must be one of {', '.join(PRIORITIES)}")
    deadline = _header(scope, DEADLINE)
    if deadline is None:
        return priority, None
    if not re.fullmatch(r"\d{1,8}", deadline, re.ASCII) or not 0 < int(deadline) <= DEADLINE_MS_MAX:
        text = f"X-Weftline-Deadline-Ms must be a whole number from 1 to {DEADLINE_MS_MAX}"
        raise FabricError(Code.INVALID_MESSAGE, text)
    return priority, int(deadline)


def _header(scope: AsgiScope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


def _token(scope: AsgiScope) -> str:
    """The key a request carries, or nothing."""
    by_path: str | None = scope.get("weftline.token")
    if by_path is not None:
        return by_path
    kind, _, token = (_header(scope, b"authorization") or "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    return _header(scope, b"x-api-key") or ""


_OF_PROXIES: Final = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


def _is_local(scope: AsgiScope) -> bool:
    """Whether a request comes from this very machine, and no web page from elsewhere is behind it."""
    peer = scope.get("client")
    origin = _header(scope, b"origin")
    return (
        peer is not None
        and _is_loopback(peer[0])
        and not any(_header(scope, name) is not None for name in _OF_PROXIES)
        and _is_loopback(_hostname(f"//{_header(scope, b'host') or ''}"))
        and (origin is None or _is_loopback(_hostname(origin)))
    )


def _hostname(url: str) -> str:
    """The host a URL names, or nothing."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>weftline</title>
<style>
body { font: 16px/1.6 system-ui, sans-serif; max-width: 42rem; margin: 3rem auto; padding: 0 1rem; color: #1c2733; }
pre { background: #f3f5f7; padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { background: #10161c; color: #dde5ec } pre { background: #1b242d } }
</style>
<h1>weftline is running</h1>
<p>One URL in front of many Ollama hosts. Point a client of Ollama or OpenAI here:</p>
<pre id="how">export OLLAMA_HOST=ORIGIN/k/YOUR_KEY
export OPENAI_BASE_URL=ORIGIN/v1 OPENAI_API_KEY=YOUR_KEY</pre>
<p>An operator makes a key with <code>weftline keys token NAME</code>. WebSocket clients connect to
<code>WS_ORIGIN/ws</code>. State: <a href="/readyz">/readyz</a>, <a href="/metrics">/metrics</a>.</p>
<script>
for (const node of document.querySelectorAll("pre, code"))
  node.textContent = node.textContent
    .replaceAll("WS_ORIGIN", location.origin.replace(/^http/, "ws"))
    .replaceAll("ORIGIN", location.origin);
</script>
</html>
"""
