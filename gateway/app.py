"""The gateway's shell: one port for WebSocket and HTTP, the line to the broker, the client registry."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from common.config import default_data_dir, host_port, refuse_exposed, writable_dir
from common.errors import ProcessError
from common.logs import Log
from common.process import gently, until
from gateway.auth import Authenticator
from gateway.autopull import AutoPull
from gateway.fleet_api import FleetApi
from gateway.hints import Share
from gateway.http_api import HttpApi, TokenPaths
from gateway.keyring import Keyring
from gateway.metrics import Metrics
from gateway.protocols import Limits, listener, protocols
from gateway.settings import GatewaySettings
from gateway.store import Client, Store, StoreError, Token
from gateway.upstream import Upstream
from gateway.websocket import Connection, Services

log = Log("gateway")

REVOCATIONS_S = 1.0
STOP_S = 5.0
"""How long connections get to hear that the gateway ends."""
DRAIN_LOOK_S = 0.05


class Gateway:
    """The ASGI application and everything its connections share."""

    def __init__(self, services: Services, keyring: Keyring, store: Store) -> None:
        self._services = services
        self._keyring = keyring
        self._api = HttpApi(services, keyring)
        self._connections: set[Connection] = set()
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        origins = services.settings.origins
        self.app = Starlette(
            routes=[
                Route("/", self._api.root),
                *self._api.routes(),
                *FleetApi(self._api, services, store).routes(),
                Route("/livez", self._live),
                Route("/readyz", self._ready),
                Route("/metrics", self._metrics),
                WebSocketRoute("/", self._websocket),
                WebSocketRoute("/ws", self._websocket),
                WebSocketRoute("/{path:path}", self._elsewhere),
            ],
            middleware=[
                Middleware(_Cors, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]),
                Middleware(TokenPaths),
            ],
            exception_handlers={HTTPException: _plain_error},  # type: ignore[dict-item]
        )
        self.app.router.redirect_slashes = False

    async def watch_revocations(self, store: Store) -> None:
        """Send revoked clients away, REVOCATIONS_S after the fact at most. An unreadable registry is asked again."""
        change = 0
        while True:
            try:
                changed = await asyncio.to_thread(store.changed_since, change)
                aliases = await asyncio.to_thread(store.aliases)
                # In one turn, so that no request meets the one and not the other.
                self._services.aliases.clear()
                self._services.aliases.update({alias.name: alias.target for alias in aliases})
            except StoreError as error:
                log.warn("client registry unreadable", reason=str(error))
                changed = []
            if changed:
                change = changed[-1].change
            self._services.shares.update(shares(record for record in changed if isinstance(record, Client)))
            revoked = {record.id for record in changed if isinstance(record, Client) and record.revoked}
            tokens = [record for record in changed if isinstance(record, Token)]
            self._services.authenticator.revoke(revoked)
            self._keyring.revoke(revoked, {token.id for token in tokens})
            revoked_tokens = {token.id for token in tokens if token.revoked}
            self._api.revoke(revoked, revoked_tokens)
            for connection in list(self._connections) if revoked else ():
                if connection.client in revoked:
                    connection.revoke()
            if revoked or revoked_tokens:
                self._services.pulls.revoke(revoked, revoked_tokens)
            if revoked:
                self._services.upstream.revoke(revoked)
            await asyncio.sleep(REVOCATIONS_S)

    async def until_drained(self, stop: asyncio.Event) -> None:
        """Wait for `stop`; then, if there is time, let clients finish, or go elsewhere one after the other."""
        await stop.wait()
        if not gently(stop):
            return
        settings = self._services.settings
        self._draining = self._api.draining = True
        log("draining", connections=len(self._connections))
        for connection in list(self._connections):
            connection.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.drain_s):
                idle = [connection for connection in self._connections if connection.idle]
                for connection in idle:
                    await asyncio.sleep(settings.drain_stagger_s / len(idle))
                    connection.dismiss()
                while self._connections or self._api.running:
                    for connection in list(self._connections):
                        if connection.idle:
                            connection.dismiss()
                    await asyncio.sleep(DRAIN_LOOK_S)

    async def dismiss(self) -> None:
        """Send every client away, and wait a moment for them to go."""
        self._draining = self._api.draining = True
        self._api.dismiss()
        for connection in list(self._connections):
            connection.dismiss()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._empty.wait()
                while self._api.running:  # noqa: ASYNC110 - it is short, and nobody is in a hurry
                    await asyncio.sleep(DRAIN_LOOK_S)

    async def _websocket(self, websocket: WebSocket) -> None:
        settings, metrics = self._services.settings, self._services.metrics
        origin = websocket.headers.get("origin")
        if origin is not None and "*" not in settings.origins and origin not in settings.origins:
            await websocket.send_denial_response(PlainTextResponse("this origin may not connect", 403))
            return
        if self._draining:
            await websocket.send_denial_response(PlainTextResponse("this gateway is shutting down", 503))
            return
        if metrics.unauthenticated >= settings.unauthenticated_max:
            busy = PlainTextResponse("too many connections are authenticating", 503, {"Retry-After": "5"})
            await websocket.send_denial_response(busy)
            return
        connection = Connection(websocket, self._services)
        self._connections.add(connection)
        self._empty.clear()
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            if not self._connections:
                self._empty.set()

    async def _elsewhere(self, websocket: WebSocket) -> None:
        await websocket.send_denial_response(PlainTextResponse("clients connect to / or /ws", 404))

    async def _live(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _ready(self, _: Request) -> Response:
        upstream = self._services.upstream
        fleet = upstream.fleet
        reason = (
            "this gateway is shutting down"
            if self._draining
            else "the broker does not answer"
            if not upstream.connected
            else "no worker is connected"
            if not fleet.workers
            else "no model can be served"
            if not fleet.models
            else None
        )
        state = {"ready": reason is None, "reason": reason, "workers": fleet.workers, "models": list(fleet.models)}
        return JSONResponse(state, 200 if reason is None else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Cors(CORSMiddleware):
    """Starlette's, with the status that Ollama gives a preflight."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            return response
        headers = {name: value for name, value in response.headers.items() if name not in _OF_A_BODY}
        return Response(status_code=204, headers=headers)


_OF_A_BODY = frozenset({"content-length", "content-type"})


def _plain_error(_: Request, error: HTTPException) -> Response:
    """As Ollama words it."""
    text = {404: "404 page not found", 405: "405 method not allowed"}.get(error.status_code, error.detail)
    return PlainTextResponse(text, error.status_code, error.headers)


def shares(clients: Iterable[Client]) -> dict[str, Share]:
    """What these clients may have."""
    return {client.id: Share(client.weight, client.running_max) for client in clients}


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the process has one place for signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(settings: GatewaySettings, stop: asyncio.Event, *, on_ready: Callable[[str], None] | None = None) -> int:
    """Run a gateway until `stop`; `on_ready` hears the URL it listens on (`http://host:port`).

    Raises:
        ProcessError: the port is taken or exposed, or the data dir or the spool dir can't be used.
    """
    host, port = host_port(settings.listen, "--listen")
    refuse_exposed([settings.listen], insecure=settings.insecure)
    data_dir = writable_dir(settings.data_dir or default_data_dir())
    if settings.spool_dir is not None and not os.access(settings.spool_dir, os.W_OK | os.X_OK):
        raise ProcessError(f"spool_dir of [gateway], {settings.spool_dir}, is no folder that can be written.")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(Store.open(data_dir)))
        try:
            sock = listener(host, port)
        except OSError as error:
            raise ProcessError(
                f"cannot listen on {settings.listen}: {error.strerror}. Is another process using the port?"
            ) from None
        stack.callback(sock.close)
        actual = f"{host}:{sock.getsockname()[1]}"
        upstream = stack.enter_context(
            contextlib.closing(
                Upstream(
                    settings.brokers,
                    lost_s=settings.broker_lost_s,
                    resume_s=settings.resume_s,
                    migrate=settings.migrate,
                )
            )
        )
        services = Services(
            settings=settings,
            upstream=upstream,
            authenticator=Authenticator(store.get, settings.public_url or f"ws://{actual}"),
            metrics=Metrics(upstream),
            pulls=AutoPull(settings, upstream, store),
            aliases={alias.name: alias.target for alias in store.aliases()},
            shares=shares(store.list()),
        )
        keyring = Keyring(store.find_token)
        gateway = Gateway(services, keyring, store)
        limits = Limits(
            stall_s=settings.stall_s,
            request_s=settings.request_s,
            message_bytes_max=settings.frame_bytes_max + settings.frame_bytes_max // 4,
        )
        websocket_protocol, http_protocol = protocols(limits)
        server = _Server(
            uvicorn.Config(
                gateway.app,
                ws=websocket_protocol,
                http=http_protocol,
                lifespan="off",
                log_config=None,
                access_log=False,
                ws_max_size=limits.message_bytes_max,
                ws_ping_interval=limits.ping_interval_s,
                ws_ping_timeout=limits.ping_timeout_s,
                ws_per_message_deflate=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            log("listening", url=f"ws://{actual}", broker=settings.broker)
            if on_ready is not None:
                on_ready(f"http://{actual}")
            await until(
                asyncio.Event(),
                gateway.until_drained(stop),
                upstream.run(),
                upstream.supply(),
                upstream.broken(),
                gateway.watch_revocations(store),
                services.pulls.run(),
                asyncio.shield(serving),
            )
            await gateway.dismiss()
        finally:
            server.should_exit = True
            await serving
    log("stopped")
    return 0
