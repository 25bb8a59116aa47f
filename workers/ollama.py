"""An engine over HTTP: what it can serve, and the `ollama serve` a worker may own."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Final, cast

import httpx
import msgspec

from common.config import is_loopback
from common.errors import ProcessError, UnreachableError, UsageError
from common.logs import Log
from common.ollama import UNREADABLE
from common.protocol import COUNT_MAX, ENTRY_BYTES_MAX, NAME_CHARS_MAX, Engine, Model
from workers.http import HttpClient
from workers.settings import EngineAddress

CONNECT_S: Final = 5.0
POLL_S: Final = 5.0
"""An engine that does not answer a question about itself for so long is down."""
ANSWER_BYTES_MAX: Final = 2**20
"""An engine's error, as it is passed on."""
LIST_BYTES_MAX: Final = 8 * 2**20
"""A list of models: about 20,000."""
GIB: Final = 2**30
RUNNING_TOLD_S: Final = 30.0
"""How old what is told of a model in memory may be, as long as nothing else changes."""
SHOWS_PER_POLL_MAX: Final = 32
"""Models looked at closely per poll; of the others the family tells until their turn comes."""
START_INTERVAL_S: Final = 0.1
SERVE_START_S: Final = 60.0
SERVE_STOP_S: Final = 5.0
SERVE_BACKOFF_S: Final = 1.0
SERVE_BACKOFF_S_MAX: Final = 30.0
"""An `ollama serve` that ended is started again after a second, then two, four … unless it lived a while."""

log = Log("worker")


class _Version(msgspec.Struct):
    """GET /api/version; `engine` is what embedded and simulated engines add."""

    version: str = ""
    engine: str = "ollama"


class _Details(msgspec.Struct):
    family: str = ""
    families: tuple[str, ...] | None = None


class _Listed(msgspec.Struct):
    """One of GET /api/tags or /api/ps."""

    name: str
    digest: str = ""
    size: int = 0
    details: _Details = msgspec.field(default_factory=_Details)


class _List(msgspec.Struct):
    models: list[msgspec.Raw] | None = None

    @classmethod
    def read(cls, answer: bytes) -> list[tuple[_Listed, bytes]]:
        """Each entry, and how it reads."""
        entries = [bytes(entry) for entry in msgspec.json.decode(answer, type=cls).models or ()]
        found = [(msgspec.json.decode(entry, type=_Listed), entry) for entry in entries]
        # A name that no message can carry must not cost the host all its models.
        return [(model, entry) for model, entry in found if max(len(model.name), len(model.digest)) <= NAME_CHARS_MAX]


class _Show(msgspec.Struct):
    capabilities: tuple[str, ...] | None = None


def pieces(response: httpx.Response) -> "contextlib.aclosing[AsyncGenerator[bytes, None]]":
    """The body as it arrives, unread rest thrown away at the end of the block."""
    return contextlib.aclosing(cast("AsyncGenerator[bytes, None]", response.aiter_raw()))


async def read_bounded(response: httpx.Response, bytes_max: int) -> bytes:
    """The body, cut at `bytes_max`."""
    body = bytearray()
    async with pieces(response) as arriving:
        async for piece in arriving:
            body += piece
            if len(body) >= bytes_max:
                break
    return bytes(body[:bytes_max])


class Backend:
    """One engine: the client that posts to it, and what it last said of itself. Use as an async context."""

    def __init__(self, address: EngineAddress, interval_s: float) -> None:
        self.address = address
        self.engine = Engine(url=address.url, up=False, error=f"the engine {address.url} was not asked yet")
        self.client = httpx.AsyncClient(
            base_url=address.url,
            # A generation may be silent for minutes; the session's watchdogs know when it is too long. Slots bound
            # the connections.
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            headers={"accept-encoding": "identity"},
            trust_env=False,
        )
        self.http = HttpClient(address.url, CONNECT_S)
        self._interval_s = interval_s
        self._poll_now = asyncio.Event()
        self._embedding: dict[str, bool] = {}  # by digest, of listed models only
        self._told = self.engine
        self._told_at = 0.0

    async def __aenter__(self) -> "Backend":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.http.close()
        await self.client.aclose()

    def poll_soon(self) -> None:
        """Something is wrong with the engine: look at once."""
        self._poll_now.set()

    async def watch(self, changed: Callable[[], None]) -> None:
        """Poll for ever; `changed` is called whenever `engine` became another.

        Often until it first answers: an engine that starts together with its worker is not there yet.
        """
        answered = self.engine.up
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s if answered else min(self._interval_s, START_INTERVAL_S)):
                    await self._poll_now.wait()
            self._poll_now.clear()
            if await self.poll():
                changed()
            answered = answered or self.engine.up

    async def poll(self) -> bool:
        """Ask the engine what it is and serves; True if `engine` changed and others should know."""
        before = self.engine
        try:
            self.engine = await self._ask()
        except (httpx.HTTPError, TimeoutError) as error:
            self.engine = self._down(str(error) or type(error).__name__)
        except UNREADABLE as error:
            self.engine = self._down(f"what it says is not what Ollama says: {error}")
        if self.engine.up and not before.up:
            log("engine up", url=self.engine.url, kind=self.engine.kind, models=len(self.engine.models))
        elif self.engine.error and self.engine.error != before.error:
            log.warn("engine down", url=self.engine.url, error=self.engine.error)
        now = asyncio.get_running_loop().time()
        if _lasting(self.engine) == _lasting(self._told) and (
            self.engine == self._told or now - self._told_at < RUNNING_TOLD_S
        ):
            return False
        self._told, self._told_at = self.engine, now
        return True

    def _down(self, why: str) -> Engine:
        # The models stay listed: what the host would serve is worth knowing while it is down.
        return msgspec.structs.replace(self.engine, up=False, error=f"the engine {self.address.url} is down: {why}")

    async def _ask(self) -> Engine:
        version = msgspec.json.decode(await self._get("/api/version"), type=_Version)
        listed = _List.read(await self._get("/api/tags"))
        running = {model.digest or model.name: entry for model, entry in _List.read(await self._get("/api/ps"))}
        await self._look_closely([model for model, _ in listed])
        return Engine(
            disk_free_bytes=_disk_free_bytes(self.address.url) if version.engine == "ollama" else None,
            models_max=self.address.models,
            memory_bytes=self.address.memory_bytes,
            url=self.address.url,
            kind=version.engine,
            version=version.version,
            models=tuple(self._model(*entry, running) for entry in sorted(listed, key=lambda entry: entry[0].name)),
        )

    def _model(self, listed: _Listed, entry: bytes, running: dict[str, bytes]) -> Model:
        digest = listed.digest or listed.name
        families = (listed.details.family, *(listed.details.families or ()))
        embedding = self._embedding.get(digest, any("bert" in family for family in families))
        return Model(
            name=listed.name,
            digest=digest,
            # Ollama forces embedding models to one request at a time (server/sched.go).
            slots=1 if embedding else self.address.slots,
            size_bytes=min(max(listed.size, 0), COUNT_MAX),
            embedding=embedding,
            resident=digest in running,
            listed=_bounded(entry),
            running=_bounded(running.get(digest, b"")),
        )

    async def _look_closely(self, listed: list[_Listed]) -> None:
        """Learn by /api/show which models embed and do nothing else; an answer holds for its digest."""
        digests = {model.digest or model.name: model.name for model in listed}
        self._embedding = {digest: found for digest, found in self._embedding.items() if digest in digests}
        unknown = [(digest, name) for digest, name in digests.items() if digest not in self._embedding]
        for digest, name in unknown[:SHOWS_PER_POLL_MAX]:
            try:
                body = msgspec.json.encode({"model": name})
                show = msgspec.json.decode(await self._get("/api/show", body), type=_Show)
            except (httpx.HTTPStatusError, *UNREADABLE):
                continue
            if show.capabilities is not None:
                self._embedding[digest] = "embedding" in show.capabilities and "completion" not in show.capabilities

    async def _get(self, path: str, body: bytes | None = None) -> bytes:
        # The whole answer counts: httpx bounds only the wait for its next byte.
        async with (
            asyncio.timeout(POLL_S),
            self.client.stream(
                "GET" if body is None else "POST",
                path,
                content=body,
                headers={"content-type": "application/json"} if body is not None else None,
            ) as response,
        ):
            answer = await read_bounded(response, LIST_BYTES_MAX)
            if not response.is_success:
                text = f"{path} was answered with {response.status_code}"
                raise httpx.HTTPStatusError(text, request=response.request, response=response)
            return answer


def _disk_free_bytes(url: str) -> int | None:
    """Room on the disk of an Ollama on this machine, in whole GiB so that it does not change all the time."""
    homes = (Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models"))
    places = [Path(os.environ["OLLAMA_MODELS"])] if "OLLAMA_MODELS" in os.environ else homes
    if not is_loopback(url):
        return None
    for place in places:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free // GIB * GIB
    return None


def _lasting(engine: Engine) -> Engine:
    """Without what changes with every request: until when a model is kept."""
    models = tuple(msgspec.structs.replace(model, running=b"") for model in engine.models)
    return msgspec.structs.replace(engine, models=models)


def _bounded(entry: bytes) -> bytes:
    """An entry as it travels; one that is absurdly long is left out, and gateways say what they know without it."""
    return entry if len(entry) <= ENTRY_BYTES_MAX else b""


@contextlib.asynccontextmanager
async def _serving(binary: str, url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """An `ollama serve` that listens on `url` and ends with the block."""
    process = await asyncio.create_subprocess_exec(
        binary,
        "serve",
        env={**os.environ, "OLLAMA_HOST": url},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal is ours to handle: leases are failed before the engine ends
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(SERVE_STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def serve(backend: Backend, started: asyncio.Event) -> None:
    """Run `ollama serve` for an engine for ever, again whenever it ends; `started` is set when it first answers.

    Raises:
        UsageError: there is no `ollama` on PATH.
        ProcessError: it ended before it ever answered.
        UnreachableError: it does not answer within SERVE_START_S.
    """
    binary = shutil.which("ollama")
    if binary is None:
        raise UsageError(
            f"{backend.engine.error}; and --start-ollama finds no `ollama` on PATH. "
            "Install it from https://ollama.com/download, or leave the flag out."
        )
    backoff_s = SERVE_BACKOFF_S
    while True:
        async with _serving(binary, backend.address.url) as process:
            log("ollama serve started", pid=process.pid, url=backend.address.url)
            if not started.is_set():
                await _first_answer(backend, process)
                started.set()
            running_since = asyncio.get_running_loop().time()
            status = await process.wait()
        backend.poll_soon()
        if asyncio.get_running_loop().time() - running_since > SERVE_START_S:
            backoff_s = SERVE_BACKOFF_S
        log.warn("ollama serve ended", status=status, restart_in_s=backoff_s)
        await asyncio.sleep(backoff_s)
        backoff_s = min(backoff_s * 2, SERVE_BACKOFF_S_MAX)


async def _first_answer(backend: Backend, process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(SERVE_START_S):
            while True:
                await backend.poll()
                if backend.engine.up:
                    return
                if process.returncode is not None:
                    raise ProcessError(
                        f"`ollama serve` ended with status {process.returncode} before it answered on "
                        f"{backend.address.url}; its own words stand above."
                    )
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise UnreachableError(
            f"`ollama serve` runs but did not answer on {backend.address.url} within {SERVE_START_S:g} s."
        ) from None
