"""Files for models that are to be created, as Ollama takes them: /api/blobs/DIGEST, on several engines at once.

A request may choose where, in its URL: `?hosts=a,b&labels=k=v&copies=N`. Without a choice it is the same as for a pull.
Of `copies` a client always gets the same hosts (`settled`), for a model is made of files that must be on one host.
"""

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Final
from urllib.parse import parse_qs

import msgspec
from starlette.routing import Route
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from common.errors import Code, FabricError
from gateway.exchange import Ending, answer, attended, check_length, fill
from gateway.http_api import OLLAMA, Endpoint, HttpApi
from gateway.operations import DISK_RESERVE_BYTES, Choice, Operation, Target, choose, write_down
from gateway.spool import SPOOL_AT, Spool
from gateway.store import Scope, Store
from gateway.websocket import Services

DIGEST: Final = re.compile("sha256[:-][0-9a-fA-F]{64}")
"""Ollama's manifest/paths.go, BlobsPath."""
FILES_MAX: Final = 1000
"""Files of one model."""

_encode = msgspec.json.Encoder().encode


class Blobs:
    """The routes, and who has what."""

    def __init__(self, api: HttpApi, services: Services, store: Store) -> None:
        self._api = api
        self._services = services
        self._store = store

    def route(self) -> Route:
        endpoint = Endpoint(self._api, OLLAMA, Scope.MODELS_WRITE, self._answer)
        return Route("/api/blobs/{digest}", endpoint, methods=["HEAD", "POST"])

    async def holders(
        self, client: str, choice: Choice, targets: Sequence[Target], digests: Sequence[str]
    ) -> list[Target]:
        """Those of the chosen engines that have all these files: all, if the choice names them, else `copies` of them.

        Raises:
            FabricError: INVALID_MESSAGE, what is named is no file; NOT_FOUND, they are not there; NO_WORKERS, an engine
                does not tell.
        """
        if len(digests) > FILES_MAX or not all(map(DIGEST.fullmatch, digests)):
            raise FabricError(Code.INVALID_MESSAGE, f"invalid digest format, or more than {FILES_MAX} files")
        holding = list(targets)
        for digest in dict.fromkeys(digests):
            lacking = await self._lacking(client, holding, digest)
            holding = [target for target in holding if target not in lacking]
            if not holding or (lacking and choice.hosts is not None):
                where = ", ".join(sorted({target.host for target in lacking}))
                raise FabricError(Code.NOT_FOUND, f'blob "{digest}" not found on {where}: send it there first')
        return settled(holding, client, choice.copies)

    async def _answer(self, ending: Ending, scope: AsgiScope, receive: Receive, send: Send) -> None:
        digest: str = scope["path_params"]["digest"]
        if not DIGEST.fullmatch(digest):
            raise FabricError(Code.INVALID_MESSAGE, "invalid digest format")
        client = ending.grant.client
        choice = _choice(scope)
        copies = choice.copies or (choice.anywhere and self._services.settings.pull_copies) or None
        chosen = choose(await self._api.hosts(), msgspec.structs.replace(choice, copies=None))
        targets = settled(chosen, client, copies)
        posts = scope["method"] == "POST"
        looking = self._lacking(client, targets, digest)
        lacking = await attended(looking, ending, None if posts else receive)  # a body is still to be read
        if not lacking:
            await answer(send, 200, b"")
        elif posts:
            await self._take(digest, lacking, ending, scope, receive, send)
        else:
            raise FabricError(Code.NOT_FOUND, f'blob "{digest}" not found')

    async def _take(
        self, digest: str, targets: list[Target], ending: Ending, scope: AsgiScope, receive: Receive, send: Send
    ) -> None:
        """Have the file come, and send it to these engines."""
        bytes_max = self._services.settings.blob_bytes_max
        _check_room(targets, check_length(scope, bytes_max, self._api.spools))
        ending.hold(SPOOL_AT)  # what is gathered for the next write
        spool = ending.own(Spool(self._api.spools, hashed=True))
        await attended(fill(spool, receive, bytes_max), ending)
        if spool.digest != digest:
            text = f'digest mismatch, expected "{digest}", got "{spool.digest}"'
            raise FabricError(Code.INVALID_MESSAGE, text)
        _check_room(targets, spool.size)
        grant = ending.grant
        operation = Operation(self._services.upstream, grant.client, targets, "POST", _path(digest), b"", spool)
        outcome = "stopped by the client"
        try:
            await attended(operation.run(), ending, receive)
            last = operation.progress.last(detail=False)
            outcome = str(last.get("error", "success"))
        except FabricError as error:
            outcome = error.message
            raise
        finally:
            await write_down(
                self._store,
                action="blob",
                models=digest,
                client=grant.client,
                token=grant.token,
                hosts=sorted({target.host for target in targets}),
                outcome=outcome,
            )
        if "error" in last:
            await answer(send, 500, _encode(last))
        else:
            await answer(send, 201, b"")

    async def _lacking(self, client: str, targets: list[Target], digest: str) -> list[Target]:
        """The engines that do not have the file.

        Raises:
            FabricError: NO_WORKERS, one does not tell.
        """
        operation = Operation(self._services.upstream, client, targets, "HEAD", _path(digest), b"")
        await operation.run()
        unknown = [target for target in targets if operation.statuses.get(target) not in (200, 404)]
        if unknown:
            told = "; ".join(f"{target.host}: {operation.progress.ended[target]}" for target in unknown)
            raise FabricError(Code.NO_WORKERS, f"not every host tells whether it has the file: {told}")
        return [target for target in targets if operation.statuses[target] == 404]


def settled(targets: list[Target], client: str, copies: int | None) -> list[Target]:
    """The engines of so many hosts (None: of all), for each client always the same ones as long as they are there."""
    hosts = dict.fromkeys(target.host for target in targets)
    ranked = sorted(hosts, key=lambda host: sha256(f"{client} {host}".encode()).digest())
    return [target for target in targets if target.host in ranked[:copies]]


def _choice(scope: AsgiScope) -> Choice:
    """Which hosts the URL names.

    Raises:
        FabricError: INVALID_MESSAGE.
    """
    query = parse_qs(scope["query_string"].decode("latin-1"))
    wish = {
        name: [part for value in query[name] for part in value.split(",")]
        for name in ("hosts", "labels")
        if name in query
    }
    try:
        return msgspec.convert(wish | {"copies": query.get("copies", [None])[-1]}, Choice, strict=False)
    except msgspec.ValidationError as error:
        raise FabricError(Code.INVALID_MESSAGE, f"the query is wrong: {error}") from None


def _check_room(targets: list[Target], size: int) -> None:
    """Refuse what an engine's disk does not hold.

    Raises:
        FabricError: QUEUE_FULL.
    """
    for target in targets:
        if target.disk_free_bytes is not None and size + DISK_RESERVE_BYTES > target.disk_free_bytes:
            free = f"{target.disk_free_bytes / 2**30:.0f} GiB free"
            raise FabricError(
                Code.QUEUE_FULL, f"{target.host}: it takes {size / 2**30:.1f} GiB and its disk had {free}"
            )


def _path(digest: str) -> str:
    return f"/api/blobs/{digest}"
