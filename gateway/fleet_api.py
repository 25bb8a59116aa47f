"""Operations on the models of the fleet, as Ollama's own routes ask for them: pull, push, create, copy, delete, load.

Beside Ollama's fields a request may choose where it is done (`gateway.operations.Choice`):

    hosts       a list of names               labels      a list of KEY=VALUE, all of which a host must have
    copies      so many hosts                 ?detail=hosts in the URL: every line tells what each host does

Whoever asks needs the scope models:write. Each operation is written into the audit table when it has ended.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs

import msgspec
from msgspec import Raw
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from common.errors import Code, FabricError
from common.logs import Log
from common.ollama import NDJSON, UNREADABLE
from common.protocol import Host, full_name, short_name
from gateway.exchange import JSON, Gone, answer, read_body, refuse, until_gone
from gateway.http_api import OLLAMA, HttpApi
from gateway.keyring import Grant
from gateway.operations import TELL_S, Choice, Operation, Target, choose
from gateway.store import Scope, Store, StoreError
from gateway.websocket import Services

log = Log("gateway")

_CHOICE: Final = frozenset({"hosts", "labels", "copies", "stream", "keepAlive"})
_encode = msgspec.json.Encoder().encode
_fields = msgspec.json.Decoder(dict[str, Raw])


class _Request(Choice):
    """What is looked at; everything else goes to the engines as it came."""

    model: str = ""
    name: str = ""
    source: str = ""
    destination: str = ""
    from_: str = msgspec.field(name="from", default="")
    stream: bool = True
    keep_alive: int | str = -1


_request = msgspec.json.Decoder(_Request)


@dataclass(slots=True, frozen=True)
class _Job:
    """What is to be done: which call on which engines, and whether its progress is told."""

    method: str
    path: str
    body: bytes
    targets: list[Target]
    model: str
    streams: bool


class FleetApi:
    """The routes, and what they share."""

    def __init__(self, api: HttpApi, services: Services, store: Store) -> None:
        self._api = api
        self._services = services
        self._store = store

    def routes(self) -> Iterable[BaseRoute]:
        for path, method in (
            ("/api/pull", "POST"),
            ("/api/push", "POST"),
            ("/api/create", "POST"),
            ("/api/copy", "POST"),
            ("/api/delete", "DELETE"),
            ("/fabric/load", "POST"),
        ):
            yield Route(path, _Endpoint(self, path), methods=[method])

    async def operate(self, path: str, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Do what a request asks."""
        try:
            if self._api.draining:
                raise FabricError(Code.SHUTTING_DOWN, "this gateway is shutting down; connect again")
            grant = await self._api.grant(scope, Scope.MODELS_WRITE)
            body = await read_body(receive)
            job = self._job(path, body, await self._api.hosts())
            for model in {job.model, *_others(body)}:
                if not grant.allows_model(model):
                    raise FabricError(Code.FORBIDDEN, f"this key may not touch the model {short_name(model)!r}")
            detail = parse_qs(scope["query_string"].decode("latin-1")).get("detail") == ["hosts"]
            await self._run(path.rpartition("/")[2], job, grant, detail, receive, send)
        except FabricError as error:
            self._services.metrics.errors[error.code] += 1
            await refuse(send, OLLAMA, error)
        except Gone:
            pass

    def _job(self, path: str, body: bytes, hosts: tuple[Host, ...]) -> _Job:
        try:
            request, fields = _request.decode(body), _fields.decode(body)
        except UNREADABLE as error:
            raise FabricError(Code.INVALID_MESSAGE, f"the body is not the JSON that was expected: {error}") from None
        name = request.source if path == "/api/copy" else request.model or request.name
        if not name:
            raise FabricError(Code.INVALID_MESSAGE, "model is required")
        model = full_name(name)
        rest: Mapping[str, Any] = {key: value for key, value in fields.items() if key not in _CHOICE}
        match path:
            case "/api/pull":
                copies = request.copies or self._services.settings.pull_copies or None
                chosen = msgspec.structs.replace(request, copies=copies)
                return _Job(
                    "POST", path, _encode({**rest, "stream": True}), choose(hosts, chosen), model, request.stream
                )
            case "/api/create":
                having = full_name(request.from_) if request.from_ else None
                targets = choose(hosts, request, having) or choose(hosts, request)
                return _Job("POST", path, _encode({**rest, "stream": True}), targets, model, request.stream)
            case "/api/push":
                targets = self._having(hosts, request, model)[:1]
                return _Job("POST", path, _encode({**rest, "stream": True}), targets, model, request.stream)
            case "/fabric/load":
                targets = self._having(hosts, request, model)
                keep: dict[str, Any] = {"model": name, "keep_alive": request.keep_alive, "stream": False}
                embeds = any(m.embedding for h in hosts for e in h.engines for m in e.models if m.name == model)
                path = "/api/embed" if embeds else "/api/generate"
                return _Job("POST", path, _encode(keep), targets, model, False)
            case _:
                method = "DELETE" if path == "/api/delete" else "POST"
                return _Job(method, path, _encode(rest), self._having(hosts, request, model), model, False)

    def _having(self, hosts: tuple[Host, ...], choice: Choice, model: str) -> list[Target]:
        targets = choose(hosts, choice, model)
        if not targets:
            raise FabricError(Code.MODEL_NOT_FOUND, f"model '{short_name(model)}' not found")
        return targets

    async def _run(self, action: str, job: _Job, grant: Grant, detail: bool, receive: Receive, send: Send) -> None:
        operation = Operation(self._services.upstream, grant.client, job.targets, job.method, job.path, job.body)
        running = asyncio.create_task(operation.run())
        gone = asyncio.create_task(until_gone(receive))
        outcome: str | None = None
        started = False
        try:
            while not running.done():
                await asyncio.wait({running, gone}, timeout=TELL_S, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise Gone
                lines = operation.progress.lines(detail=detail)
                if job.streams and lines:
                    await _send_lines(send, lines, started=started)
                    started = True
            running.result()
            self._api.models_changed()
            last = operation.progress.last(detail=detail)
            outcome = str(last.get("error", "success"))
            await self._write_down(action, job, grant, outcome)  # first: what is told as done is written down
            if job.streams:
                await _send_lines(send, [last], started=started, ended=True)
            elif "error" in last:
                await answer(send, 500, _encode(last))
            else:
                whole = job.path in ("/api/copy", "/api/delete") and not detail
                await answer(send, 200, b"" if whole else _encode(last), content_type=JSON)
        except OSError:
            raise Gone from None
        finally:
            for task in (running, gone):
                task.cancel()
            await asyncio.gather(running, gone, return_exceptions=True)
            if outcome is None:
                await self._write_down(action, job, grant, "stopped by the client")

    async def _write_down(self, action: str, job: _Job, grant: Grant, outcome: str) -> None:
        hosts = sorted({target.host for target in job.targets})
        log("operation on models", action=action, model=job.model, client=grant.client, hosts=hosts, outcome=outcome)
        with contextlib.suppress(StoreError):
            await asyncio.to_thread(
                self._store.write_audit,
                client_id=grant.client,
                token_id=grant.token,
                action=action,
                model=job.model,
                hosts=hosts,
                outcome=outcome,
            )


class _Endpoint:
    """An ASGI endpoint."""

    def __init__(self, api: FleetApi, path: str) -> None:
        self._api, self._path = api, path

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await self._api.operate(self._path, scope, receive, send)


def _others(body: bytes) -> list[str]:
    """Models that a request names beside its own."""
    request = _request.decode(body)
    return [full_name(name) for name in (request.destination, request.from_) if name]


async def _send_lines(send: Send, lines: list[dict[str, Any]], *, started: bool, ended: bool = False) -> None:
    if not started:
        headers = [(b"content-type", NDJSON.encode()), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
    data = b"".join(_encode(line) + b"\n" for line in lines)
    await send({"type": "http.response.body", "body": data, "more_body": not ended})
