"""Operations on the models of the fleet, as Ollama's own routes ask for them: pull, push, create, copy, delete, load.

Beside Ollama's fields a request may choose where it is done (`gateway.operations.Choice`):

    hosts       a list of names               labels      a list of KEY=VALUE, all of which a host must have
    copies      so many hosts                 ?detail=hosts in the URL: every line tells what each host does

Whoever asks needs the scope models:write. Each operation is written into the audit table when it has ended.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs

import msgspec
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from common.errors import Code, FabricError
from common.ollama import NDJSON, UNREADABLE
from common.protocol import NAME_CHARS_MAX, Host, full_name, short_name
from gateway.blobs import Blobs
from gateway.dialects import STATUS
from gateway.exchange import Ending, Gone, answer, attended, read_body, until_gone
from gateway.http_api import OLLAMA, Endpoint, HttpApi, fields_of
from gateway.keyring import Grant
from gateway.operations import TELL_S, Choice, Operation, Target, choose, refuse_eviction, write_down
from gateway.store import Scope, Store
from gateway.websocket import Services

REQUEST_BYTES_MAX: Final = 2**20
"""To read the millions of fields that a larger one may have would hold up everybody for seconds."""
_CHOICE: Final = frozenset({"hosts", "labels", "copies", "stream", "keepAlive"})
_encode = msgspec.json.Encoder().encode


class _Request(Choice):
    """What is looked at; everything else goes to the engines as it came."""

    model: str = ""
    name: str = ""
    source: str = ""
    destination: str = ""
    from_: str = msgspec.field(name="from", default="")
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    stream: bool | None = True
    keep_alive: int | str = -1


_request = msgspec.json.Decoder(_Request)


@dataclass(slots=True, frozen=True)
class _Job:
    """What is to be done: which call on which engines, to which models, and whether its progress is told.

    `files` are needed for it: of the engines only those count that have them.
    """

    action: str
    method: str
    path: str
    body: bytes
    targets: list[Target]
    models: tuple[str, ...]
    streams: bool
    choice: Choice
    files: tuple[str, ...] = ()


class FleetApi:
    """The routes, and what they share."""

    def __init__(self, api: HttpApi, services: Services, store: Store) -> None:
        self._api = api
        self._services = services
        self._store = store
        self._blobs = Blobs(api, services, store)

    def routes(self) -> Iterable[BaseRoute]:
        for path, method in (
            ("/api/pull", "POST"),
            ("/api/push", "POST"),
            ("/api/create", "POST"),
            ("/api/copy", "POST"),
            ("/api/delete", "DELETE"),
            ("/fabric/load", "POST"),
        ):
            work = partial(self._operate, path)
            yield Route(path, Endpoint(self._api, OLLAMA, Scope.MODELS_WRITE, work), methods=[method])
        yield self._blobs.route()

    async def _operate(self, path: str, ending: Ending, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Do what a request asks."""
        body = await read_body(receive, ending, REQUEST_BYTES_MAX)
        job = self._job(path, body, await self._api.hosts())
        for model in job.models:
            if not ending.grant.allows_model(model):
                raise FabricError(Code.FORBIDDEN, f"this key may not touch the model {short_name(model)!r}")
        if job.files:
            finding = self._blobs.holders(ending.grant.client, job.choice, job.targets, job.files)
            job = replace(job, targets=await attended(finding, ending, receive))
        detail = parse_qs(scope["query_string"].decode("latin-1")).get("detail") == ["hosts"]
        await self._run(job, ending, detail, receive, send)

    def _job(self, path: str, body: bytes, hosts: tuple[Host, ...]) -> _Job:
        fields = fields_of(body)
        try:
            request = _request.decode(body)
        except UNREADABLE as error:
            raise FabricError(Code.INVALID_MESSAGE, f"the body is not the JSON that was expected: {error}") from None
        names = (request.model or request.name, request.from_)
        if path == "/api/copy":
            names = (request.source, request.destination)
        models = tuple(full_name(name) for name in names if name)
        if not names[0] or any(len(model) > NAME_CHARS_MAX for model in models):
            raise FabricError(Code.INVALID_MESSAGE, f"model is required, with at most {NAME_CHARS_MAX} characters")
        model, method, streams = models[0], "POST", False
        files = (*(request.files or {}).values(), *(request.adapters or {}).values())
        rest: dict[str, Any] = {key: value for key, value in fields.items() if key not in _CHOICE}
        match path:
            case "/api/pull":
                copies = request.copies or (request.anywhere and self._services.settings.pull_copies) or None
                targets = choose(hosts, msgspec.structs.replace(request, copies=copies), first=model)
                streams = True
            case "/api/create":
                having = models[1] if request.from_ else None
                choice = msgspec.structs.replace(request, copies=None) if files else request
                targets = choose(hosts, choice, having) or choose(hosts, choice)
                streams = True
            case "/api/push":
                targets = self._having(hosts, request, model)[:1]
                streams = True
            case "/fabric/load":
                targets = self._having(hosts, request, model)
                if request.keep_alive != 0:
                    refuse_eviction(hosts, targets, model)
                rest = {"model": names[0], "keep_alive": request.keep_alive, "stream": False}
                embeds = any(m.embedding for h in hosts for e in h.engines for m in e.models if m.name == model)
                path = "/api/embed" if embeds else "/api/generate"
                return _Job("load", method, path, _encode(rest), targets, models, False, request)
            case _:
                targets = self._having(hosts, request, model)
                method = "DELETE" if path == "/api/delete" else "POST"
        rest |= {"stream": True} if streams else {}
        action = path.rpartition("/")[2]
        streams = streams and request.stream is not False
        return _Job(action, method, path, _encode(rest), targets, models, streams, request, files)

    def _having(self, hosts: tuple[Host, ...], choice: Choice, model: str) -> list[Target]:
        targets = choose(hosts, choice, model)
        if not targets:
            raise FabricError(Code.MODEL_NOT_FOUND, f"model '{short_name(model)}' not found")
        return targets

    async def _run(self, job: _Job, ending: Ending, detail: bool, receive: Receive, send: Send) -> None:
        grant, loop = ending.grant, asyncio.get_running_loop()
        ended: asyncio.Future[FabricError] = loop.create_future()
        ending.watch(ended.set_result)
        operation = Operation(self._services.upstream, grant.client, job.targets, job.method, job.path, job.body)
        running = loop.create_task(operation.run())
        gone = loop.create_task(until_gone(receive))
        outcome = "stopped by the client"
        started = False
        try:
            while not running.done():
                awaited: set[asyncio.Future[Any]] = {running, gone, ended}
                await asyncio.wait(awaited, timeout=TELL_S, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise Gone
                if ended.done():
                    break
                lines = operation.progress.lines(detail=detail)
                if job.streams and lines:
                    await _send_lines(send, lines, started=started)
                    started = True
            if ended.done():
                reason = ended.result()
                status, last = STATUS.get(reason.code, 500), {"error": reason.message, "code": reason.code.value}
            else:
                outcome = "a defect of the gateway"
                running.result()
                status, last = 500, operation.progress.last(detail=detail)
            outcome = str(last.get("error", "success"))
        except OSError:
            raise Gone from None
        finally:
            ending.watch(None)
            for task in (running, gone):
                task.cancel()
            await asyncio.gather(running, gone, return_exceptions=True)
            self._api.models_changed()
            await self._write_down(job, grant, outcome)  # first: what is told as done is written down
        if job.streams:
            await _send_lines(send, [last], started=started, ended=True)
        elif "error" in last:
            await answer(send, status, _encode(last))
        else:
            empty = job.action in ("copy", "delete") and not detail
            await answer(send, 200, b"" if empty else _encode(last))

    async def _write_down(self, job: _Job, grant: Grant, outcome: str) -> None:
        await write_down(
            self._store,
            action=job.action,
            models=" ".join(job.models),
            client=grant.client,
            token=grant.token,
            hosts=sorted({target.host for target in job.targets}),
            outcome=outcome,
        )


async def _send_lines(send: Send, lines: list[dict[str, Any]], *, started: bool, ended: bool = False) -> None:
    if not started:
        headers = [(b"content-type", NDJSON.encode()), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
    data = b"".join(_encode(line) + b"\n" for line in lines)
    await send({"type": "http.response.body", "body": data, "more_body": not ended})
