"""Operations on models, done on several engines and told as one stream of progress in Ollama's own form.

Rules
- The job is Ollama's own call (/api/pull, …), posted on each chosen engine beside its work, through the broker: it goes
  on over restarts of the broker, and its lines are repaired as any stream's.
- What concerns a layer (`digest`) is summed over the engines that have spoken of it; any other status is told when the
  first engine comes to it. Lines come at most every TELL_S: what changed meanwhile is told once.
- A failure that may pass is tried again, TRIES_MAX times in all, after 1, 2, 4 … s. Ollama keeps what it pulled of a
  layer, so a pull goes on where it broke.
- An engine whose disk has no room for a layer is stopped before it fills it.
- The stream ends with `success` if every engine succeeded, else with an error that names those that did not.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec

from common.errors import Code, FabricError
from common.logs import Log
from common.ollama import SUCCESS, UNREADABLE
from common.protocol import Count, End, Failed, Host, engine_name
from gateway.session import Begins, Events, Output, Over, Stream, Waits
from gateway.spool import Spool
from gateway.store import Store, StoreError
from gateway.upstream import Upstream

log = Log("gateway")

TELL_S: Final = 0.1
TRIES_MAX: Final = 4
BACKOFF_S: Final = 1.0
DISK_RESERVE_BYTES: Final = 2**30
"""What a pull leaves free."""
SENT_MAX: Final = 8
"""Engines that a large body is sent to at once: each has some parts of it under way."""
LAYERS_MAX: Final = 256
STATUSES_MAX: Final = 1_000
"""Beyond these an engine's lines are no longer told: a model has a handful of layers."""
PASSING: Final = frozenset({Code.WORKER_LOST, Code.NO_WORKERS, Code.SHUTTING_DOWN, Code.BACKEND_ERROR})
FOR_GOOD: Final = ("file does not exist", "not found", "unauthorized", "invalid", "does not support", "no space left")
"""Words in an engine's failure that another try will not change."""


@dataclass(slots=True, frozen=True)
class Target:
    """An engine on which it is to be done."""

    host: str
    engine: str
    disk_free_bytes: int | None = None


class Choice(msgspec.Struct, rename="camel"):
    """Which hosts a request wants: those named, those with all these labels, and of these so many. Nothing: all."""

    hosts: list[str] | None = None
    labels: list[str] = []
    copies: Annotated[int, msgspec.Meta(ge=1)] | None = None

    @property
    def anywhere(self) -> bool:
        """Whether it names none."""
        return self.hosts is None and not self.labels


def choose(
    hosts: Iterable[Host], choice: Choice, having: str | None = None, *, first: str | None = None
) -> list[Target]:
    """The engines that are meant; with `having`, only those with that model. Of each host all engines; of all hosts
    those before that have the model `first`, then those with the most free disk.

    Raises:
        FabricError: NOT_FOUND, a host that was named is not there, or drains, or none is left.
    """
    candidates = []
    known = {host.name for host in hosts}
    missing = [name for name in choice.hosts or () if name not in known]
    if missing:
        raise FabricError(
            Code.NOT_FOUND, f"no host {', '.join(missing)}; there are: {', '.join(sorted(known)) or 'none'}"
        )
    for host in hosts:
        if host.draining:
            if host.name in (choice.hosts or ()):
                raise FabricError(Code.NOT_FOUND, f"{host.name} drains; `weftline resume {host.name}` ends that")
            continue
        if (choice.hosts is not None and host.name not in choice.hosts) or not set(choice.labels) <= set(host.labels):
            continue
        targets = [
            Target(host.name, engine.url, engine.disk_free_bytes)
            for engine in host.engines
            if engine.up and (having is None or any(model.name == having for model in engine.models))
        ]
        if targets:
            has = any(model.name == first for engine in host.engines for model in engine.models)
            candidates.append((not has, -(targets[0].disk_free_bytes or 0), host.name, targets))
    chosen = [target for *_, targets in sorted(candidates)[: choice.copies] for target in targets]
    if not chosen and having is None:
        raise FabricError(Code.NOT_FOUND, "no host that was chosen has a running engine")
    return chosen


def refuse_eviction(hosts: Iterable[Host], targets: Iterable[Target], model: str) -> None:
    """Don't let a load make an engine unload a model that is busy.

    Raises:
        FabricError: QUEUE_FULL, one of the engines would have to.
    """
    meant = {(target.host, target.engine) for target in targets}
    for host in hosts:
        for engine in host.engines:
            busy = {digest for digest, count in host.busy.get(engine.url, {}).items() if count}
            held = any(one.name == model and (one.resident or one.digest in busy) for one in engine.models)
            if (host.name, engine.url) in meant and not held and 0 < engine.models_max <= len(busy):
                raise FabricError(Code.QUEUE_FULL, f"all models that {host.name} can hold are busy; try again later")


class Line(msgspec.Struct):
    """A line of progress (Ollama's api/types.go, `ProgressResponse`)."""

    status: str = ""
    digest: str = ""
    total: Count = 0
    completed: Count = 0


@dataclass(slots=True)
class _Layer:
    status: str
    total: dict[Target, int] = field(default_factory=dict)
    completed: dict[Target, int] = field(default_factory=dict)
    there: dict[Target, int] = field(default_factory=dict)
    """What of it was on the disk before."""


class Progress:
    """Merges what the engines say. Pure."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._layers: dict[str, _Layer] = {}
        self._changed: dict[str, None] = {}
        self._statuses: dict[str, None] = {}
        self._new: list[str] = []
        self._latest: dict[Target, Line] = {}
        self.ended: dict[Target, str] = {}
        """How it ended on each engine: an error, or nothing."""

    def take(self, target: Target, line: Line) -> None:
        """What an engine said."""
        self._latest[target] = line
        if line.digest and (line.digest in self._layers or len(self._layers) < LAYERS_MAX):
            layer = self._layers.setdefault(line.digest, _Layer(line.status))
            layer.total[target] = line.total
            layer.completed[target] = max(line.completed, layer.completed.get(target, 0))
            layer.there.setdefault(target, line.completed)
            self._changed[line.digest] = None
        elif (
            line.status not in ("", SUCCESS)
            and line.status not in self._statuses
            and len(self._statuses) < STATUSES_MAX
        ):
            self._statuses[line.status] = None
            self._new.append(line.status)

    def lacks_room(self, target: Target) -> str:
        """Why the engine's disk won't hold what it is pulling, or nothing."""
        if target.disk_free_bytes is None:
            return ""
        new = sum(max(0, layer.total.get(target, 0) - layer.there.get(target, 0)) for layer in self._layers.values())
        if new + DISK_RESERVE_BYTES <= target.disk_free_bytes:
            return ""
        return f"it takes {new / 2**30:.1f} GiB and its disk had {target.disk_free_bytes / 2**30:.0f} GiB free"

    def lines(self, *, detail: bool) -> list[dict[str, Any]]:
        """What changed since the last time; with `detail`, what each engine does."""
        lines: list[dict[str, Any]] = [{"status": status} for status in self._new]
        for digest in self._changed:
            layer = self._layers[digest]
            total, completed = sum(layer.total.values()), sum(layer.completed.values())
            lines.append({"status": layer.status, "digest": digest, "total": total, "completed": completed})
        self._new.clear()
        self._changed.clear()
        if detail:
            for line in lines:
                line["hosts"] = self._detail()
        return lines

    def last(self, *, detail: bool) -> dict[str, Any]:
        """The last line, when it has ended everywhere."""
        failures = {target: error for target, error in self.ended.items() if error}
        line: dict[str, Any] = {"status": SUCCESS}
        if failures:
            told = "; ".join(f"{target.host}: {error}" for target, error in failures.items())
            many = len(self._targets) > 1
            line = {"error": f"failed on {len(failures)} of {len(self._targets)} engines: {told}" if many else told}
        return line | ({"hosts": self._detail()} if detail else {})

    def _detail(self) -> list[dict[str, Any]]:
        entries = []
        for target in self._targets:
            latest = self._latest.get(target, Line())
            entry: dict[str, Any] = {"host": target.host, "engine": target.engine, "status": latest.status}
            if latest.digest:
                entry |= {"digest": latest.digest, "total": latest.total, "completed": latest.completed}
            if target in self.ended:
                entry |= {"status": SUCCESS} if not self.ended[target] else {"error": self.ended[target]}
            entries.append(entry)
        return entries


class Operation:
    """One operation. `run` it once, and look at `progress` meanwhile."""

    def __init__(
        self,
        upstream: Upstream,
        client: str,
        targets: Sequence[Target],
        method: str,
        path: str,
        body: bytes,
        spool: Spool | None = None,
    ) -> None:
        self._upstream = upstream
        self._client = client
        self._targets = targets
        self._method, self._path, self._body, self._spool = method, path, body, spool
        self._room = asyncio.Semaphore(SENT_MAX if spool is not None else len(targets))
        self.progress = Progress(targets)
        self.statuses: dict[Target, int] = {}
        """What each engine answered last, in HTTP's numbers."""

    async def run(self) -> None:
        """Do it on all engines; what became of it `progress` tells. Cancelling it stops them."""
        async with asyncio.TaskGroup() as group:
            for target in self._targets:
                group.create_task(self._on(target))

    async def _on(self, target: Target) -> None:
        async with self._room:
            await self._try(target)

    async def _try(self, target: Target) -> None:
        for tried in range(1, TRIES_MAX + 1):
            error, passing = await self._once(target)
            if not passing or tried == TRIES_MAX:
                break
            wait_s = BACKOFF_S * 2 ** (tried - 1)
            self.progress.take(target, Line(status=f"{target.host}: {error}; trying again in {wait_s:.0f} s"))
            await asyncio.sleep(wait_s)
        self.progress.ended[target] = error

    async def _once(self, target: Target) -> tuple[str, bool]:
        """Do it there: the error or nothing, and whether another try may help."""
        over: asyncio.Future[Over] = asyncio.get_running_loop().create_future()
        lacking: list[str] = []

        def hear(output: Output) -> None:
            if isinstance(output, Events):
                self._take(target, output)
                if not lacking and (why := self.progress.lacks_room(target)):
                    lacking.append(why)
                    self._upstream.cancel(stream, why)
            elif isinstance(output, Begins):
                self.statuses[target] = output.status
            elif isinstance(output, Waits):
                self.progress.take(target, Line(status=f"{target.host}: waiting for other operations there"))
            elif isinstance(output, Over) and not over.done():
                over.set_result(output)

        try:
            stream = self._submit(target, hear)
        except FabricError as error:
            return error.message, error.code in PASSING
        try:
            terminal = (await over).terminal
        finally:
            if not over.done() or over.cancelled():
                self._upstream.forget(stream)
        if isinstance(terminal, End):
            return "", False
        if lacking:
            return lacking[0], False
        self.statuses[target] = terminal.status
        if terminal.code is Code.MODEL_NOT_FOUND and not terminal.status:
            return "the host is away", True  # what stands for it in place of a model means nothing to people
        return terminal.message, _may_pass(terminal)

    def _submit(self, target: Target, hear: Callable[[Output], None]) -> Stream:
        return self._upstream.operate(
            client=self._client,
            model=engine_name(target.host, target.engine),
            method=self._method,
            path=self._path,
            body=self._body,
            sink=hear,
            spool=self._spool,
        )

    def _take(self, target: Target, events: Events) -> None:
        for text in events.lines():
            with contextlib.suppress(*UNREADABLE):
                self.progress.take(target, _line(text))


_line: Final = msgspec.json.Decoder(Line, strict=False).decode


async def write_down(
    store: Store, *, action: str, models: str, client: str, token: str, hosts: Sequence[str], outcome: str
) -> None:
    """Write an operation that has ended into the log and the audit table; that it can't be is logged."""
    log("operation on models", action=action, model=models, client=client, hosts=hosts, outcome=outcome)
    try:
        await asyncio.to_thread(
            store.write_audit,
            client_id=client,
            token_id=token,
            action=action,
            model=models,
            hosts=hosts,
            outcome=outcome,
        )
    except StoreError as error:
        log.warn("operation not written down", reason=str(error))


def _may_pass(failed: Failed) -> bool:
    told = failed.message.lower()
    return failed.code in PASSING and not 400 <= failed.status < 500 and not any(word in told for word in FOR_GOOD)
