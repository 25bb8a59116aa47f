"""The models of a simulated engine come and go: /api/pull, /api/create, /api/delete and /api/copy, and /api/blobs,
without anything to download or to keep: of a blob only its digest is remembered.

A pull brings one layer whose digest is a hash of the name, `pull_bytes` at `pull_bytes_per_s`, in a line for each
tenth. What was pulled of a layer is kept when a pull breaks off, as Ollama keeps it. A name that begins with
`missing` is in no registry. Faults with the model's name happen to its pull, `after` so many tenths: http_500,
http_503, error_line, hang. The first two also happen to a blob whose digest is the name.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from workers.embedded.wire import ApiError, encode, full_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request

    from workers.embedded.engine import Model
    from workers.embedded.simulated import Fault, Faults, Settings

TENTHS = 10


class _Asked(msgspec.Struct):
    model: str = ""
    name: str = ""
    source: str = ""
    destination: str = ""
    from_: str = msgspec.field(name="from", default="")
    files: dict[str, str] = {}
    adapters: dict[str, str] = {}
    stream: bool = True


class Library:
    """The routes; `models` is the backend's own, and changes."""

    def __init__(
        self, models: dict[str, Model], settings: Settings, faults: Faults, make: Callable[[str], Model]
    ) -> None:
        self._models = models
        self._settings = settings
        self._faults = faults
        self._make = make
        self._pulled: dict[str, int] = {}
        self._blobs: set[str] = set()
        self.under_way = 0
        """Pulls."""

    def routes(self) -> list[Route]:
        return [
            Route("/api/pull", self._pull, methods=["POST"]),
            Route("/api/create", self._create, methods=["POST"]),
            Route("/api/blobs/{digest}", self._blob, methods=["HEAD", "POST"]),
            Route("/api/delete", self._delete, methods=["DELETE"]),
            Route("/api/copy", self._copy, methods=["POST"]),
        ]

    async def _pull(self, request: Request) -> Response:
        asked = await _read(request)
        name = _named(asked.model or asked.name)
        fault = self._faults.take(name)
        self._fail(fault)
        lines = self._progress(name, fault)
        if asked.stream:
            return StreamingResponse(_encoded(lines), media_type="application/x-ndjson")
        last = [line async for line in lines][-1]
        return Response(encode(last), 500 if "error" in last else 200, media_type="application/json")

    def _fail(self, fault: Fault | None) -> None:
        if fault is not None and fault.kind in ("http_500", "http_503"):
            raise ApiError(int(fault.kind[-3:]), "an injected fault")

    async def _progress(self, name: str, fault: Fault | None) -> AsyncIterator[dict[str, Any]]:
        self.under_way += 1
        try:
            async for line in self._lines(name, fault):
                yield line
        finally:
            self.under_way -= 1

    async def _lines(self, name: str, fault: Fault | None) -> AsyncIterator[dict[str, Any]]:
        settings = self._settings
        yield {"status": "pulling manifest"}
        if name.startswith("missing"):
            yield {"error": "pull model manifest: file does not exist"}
            return
        digest = hashlib.sha256(name.encode()).hexdigest()
        layer = {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}", "total": settings.pull_bytes}
        for tenth in range(self._pulled.get(digest, 0), TENTHS):
            if fault is not None and tenth >= fault.after:
                if fault.kind == "hang":
                    await asyncio.Event().wait()
                yield {"error": "an injected fault"}
                return
            if settings.pull_bytes_per_s:
                await asyncio.sleep(settings.pull_bytes / TENTHS / settings.pull_bytes_per_s)
            self._pulled[digest] = tenth + 1
            yield layer | {"completed": settings.pull_bytes * (tenth + 1) // TENTHS}
        for status in ("verifying sha256 digest", "writing manifest"):
            yield {"status": status}
        self._models[name] = self._make(name)
        yield {"status": "success"}

    async def _blob(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        if not re.fullmatch("sha256[:-][0-9a-fA-F]{64}", digest):
            raise ApiError(400, "invalid digest format")
        if digest in self._blobs:
            return Response()
        if request.method == "HEAD":
            raise ApiError(404, f'blob "{digest}" not found')
        self._fail(self._faults.take(digest))
        sha256 = hashlib.sha256()
        async for piece in request.stream():
            sha256.update(piece)
        came = f"sha256:{sha256.hexdigest()}"
        if came != digest:
            raise ApiError(400, f'digest mismatch, expected "{digest}", got "{came}"')
        self._blobs.add(digest)
        return Response(status_code=201)

    async def _create(self, request: Request) -> Response:
        asked = await _read(request)
        name = _named(asked.model or asked.name)
        if not asked.from_ and not asked.files:
            raise ApiError(400, "neither 'from' or 'files' was specified")
        lines = self._created(name, asked)
        if asked.stream:
            return StreamingResponse(_encoded(lines), media_type="application/x-ndjson")
        last = [line async for line in lines][-1]
        return Response(encode(last), 400 if "error" in last else 200, media_type="application/json")

    async def _created(self, name: str, asked: _Asked) -> AsyncIterator[dict[str, Any]]:
        if asked.from_ and full_name(asked.from_) not in self._models:
            yield {"error": f"model '{asked.from_}' not found"}
            return
        yield {"status": "parsing GGUF"}
        for digest in (*asked.files.values(), *asked.adapters.values()):
            if digest not in self._blobs:
                yield {"error": f"open {digest.replace(':', '-')}: no such file or directory"}
                return
        self._models[name] = self._make(name)
        yield {"status": "success"}

    async def _delete(self, request: Request) -> Response:
        asked = await _read(request)
        name = _named(asked.model or asked.name)
        if self._models.pop(name, None) is None:
            raise ApiError(404, f"model '{asked.model or asked.name}' not found")
        return Response()

    async def _copy(self, request: Request) -> Response:
        asked = await _read(request)
        source = self._models.get(_named(asked.source))
        if source is None:
            raise ApiError(404, f'model "{asked.source}" not found')
        name = _named(asked.destination)
        self._models[name] = replace(source, name=name)
        return Response()


async def _read(request: Request) -> _Asked:
    try:
        return msgspec.json.decode(await request.body(), type=_Asked)
    except msgspec.DecodeError as error:
        raise ApiError(400, str(error)) from None


def _named(name: str) -> str:
    if not name:
        raise ApiError(400, "model is required")
    return full_name(name)


async def _encoded(lines: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for line in lines:
        yield encode(line) + b"\n"
