"""Models that are pulled when somebody asks for one that no host has (`[gateway] auto_pull`).

Rules
- Only the broker says that nobody has a model: it waits for one whose host is away for a moment. So a request is first
  submitted as any other; what comes back as MODEL_NOT_FOUND with nothing delivered waits here, and is submitted again
  when a host lists the model. A request waits here once.
- All requests for a model wait for one pull. They go on as soon as the first host has the model; the pull goes on to
  the other hosts it was meant for.
- Who can be told (WebSocket) is told every FRAME_S at most, and waits as long as its deadline lets it. Who cannot
  (HTTP) waits for `auto_pull_s`, then hears how far it is and that it should ask again.
- A pull that nobody waits for any more is stopped after GRACE_S, which is as long as a client may take to come back by
  default: who comes again finds it further on, and what nobody wants fills no disk. What was pulled is kept by the
  engine, so a later pull goes on from there.
- A pull that failed is remembered for FAILED_S: who asks meanwhile hears the same, and no registry is asked again. It
  counts among the PULLS_MAX, so that wrong names can flood neither the registry of models nor the audit table.
- Beyond PULLS_MAX pulls, WAITING_MAX requests or WAITING_BYTES_MAX of their bodies: QUEUE_FULL.
- Another gateway may pull the same model at the same time. An engine downloads a layer once, whoever asks.
"""

import asyncio
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from common.errors import Code, FabricError
from common.logs import Log
from common.ollama import SUCCESS, progress_words
from common.protocol import End, Failed, short_name
from gateway.keyring import matches
from gateway.operations import TELL_S, Choice, Operation, Target, choose, write_down
from gateway.session import Over, Stream
from gateway.settings import GatewaySettings
from gateway.store import Store
from gateway.upstream import Upstream

log = Log("gateway")

PULLS_MAX: Final = 8
WAITING_MAX: Final = 1_000
WAITING_BYTES_MAX: Final = 256 * 2**20
FRAME_S: Final = 1.0
GRACE_S: Final = 60.0
FAILED_S: Final = 10.0
LISTED_S: Final = 30.0
"""How long after a pull its host may take to list the model."""
RETRY_AFTER_MS: Final = 5_000

Line = dict[str, Any]
"""`status`, and of a layer `digest`, `total` and `completed`, as Ollama's progress has them."""


@dataclass(slots=True, eq=False)
class Pull:
    """One model that is being pulled, and who waits for it."""

    model: str
    client: str
    token: str
    waiting: set["Waiter"] = field(default_factory=set)
    targets: list[Target] = field(default_factory=list)
    line: Line = field(default_factory=lambda: {"status": "starting"})
    listed: bool = False
    """A host has it: nobody needs to wait any more."""
    error: FabricError | None = None
    """Why it failed."""
    task: "asyncio.Task[None] | None" = None
    grace: asyncio.TimerHandle | None = None


class Waiter:
    """A request for a model that may be pulled, from its submission to its first event.

    `submit` submits it anew, with what is left of its deadline in ms, `sink` is its stream's, `tell` hears of progress.
    """

    def __init__(
        self,
        pulls: "AutoPull",
        *,
        token: str,
        size: int,
        submit: Callable[[int | None], None],
        sink: Callable[[Over], None],
        tell: Callable[[Line], None] | None = None,
    ) -> None:
        self._pulls = pulls
        self._stream: Stream
        self._used = False
        self.token = token
        self.size = size
        self.submit = submit
        self.sink = sink
        self.tell = tell
        self.told: Line | None = None
        self.told_at = float("-inf")
        self.pull: Pull | None = None
        self.timer: asyncio.Handle | None = None

    @property
    def client(self) -> str:
        """Who asked."""
        return self._stream.submit.client

    def take(self, stream: Stream, terminal: End | Failed) -> bool:
        """Whether the request waits for a pull now, instead of ending so."""
        if self._used or stream.next_seq or not self._pulls.mends(stream, terminal):
            return False
        self._used = True
        self._stream = stream
        self._pulls.join(self, stream.submit.model, self._deadline_ms())
        return True

    def leave(self) -> bool:
        """Nobody wants it any more; whether it was waiting."""
        waited = self.timer is not None or self.pull is not None
        self._pulls.drop(self)
        return waited

    def end(self, error: FabricError | None) -> None:
        """The model is there, or it will not be."""
        self._pulls.drop(self)
        if error is None:
            try:
                self.submit(self._deadline_ms())
            except FabricError as refused:
                error = refused
            else:
                return
        found_words = error.code is Code.MODEL_NOT_FOUND  # a status says that they need no others (`words_of`)
        busy = error.code in (Code.QUEUE_FULL, Code.NO_WORKERS)
        failed = Failed(
            rid=self._stream.submit.rid,
            attempt=self._stream.attempt,
            code=error.code,
            message=error.message,
            status=404 if found_words else 0,
            retry_after_ms=RETRY_AFTER_MS if busy else None,
        )
        self.sink(Over(failed, b""))

    def _deadline_ms(self) -> int | None:
        deadline_ms = self._stream.submit.deadline_ms
        if deadline_ms is None:
            return None
        return max(1, deadline_ms - int((self._pulls.clock() - self._stream.submitted_at) * 1000))


class AutoPull:
    """One per gateway; `run` owns the pulls."""

    def __init__(self, settings: GatewaySettings, upstream: Upstream, store: Store) -> None:
        self._settings = settings
        self._upstream = upstream
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._group: asyncio.TaskGroup | None = None
        self._pulls: dict[str, Pull] = {}
        self._waiting = 0
        self._waiting_bytes = 0
        self.clock = self._loop.time

    async def run(self) -> None:
        """Own the pulls, until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._loop.create_future()
        finally:
            self._group = None

    def may(self, model: str) -> bool:
        """Whether this model may be pulled because somebody asks for it."""
        return matches(model, self._settings.auto_pull)

    def under_way(self, allowed: Callable[[str], bool]) -> list[Line]:
        """What is being pulled, oldest first."""
        return [
            {
                "model": short_name(pull.model),
                "hosts": sorted({target.host for target in pull.targets}),
                "waiting": len(pull.waiting),
                **pull.line,
            }
            for pull in self._pulls.values()
            if pull.error is None and allowed(pull.model)
        ]

    def revoke(self, clients: Set[str], tokens: Set[str]) -> None:
        """Stop at once what they have asked for, unless others wait. Their own requests have been ended."""
        for pull in list(self._pulls.values()):
            if not pull.waiting and (pull.client in clients or pull.token in tokens):
                self._stop(pull)

    # For a waiter -----------------------------------------------------------------------------------------------------

    def mends(self, stream: Stream, terminal: End | Failed) -> bool:
        """Whether a request ended so because no host has its model."""
        if stream.submit.light or not isinstance(terminal, Failed) or terminal.status:
            return False
        # A fleet without any model is one without workers to the broker.
        nothing = terminal.code is Code.NO_WORKERS and self._upstream.connected and self._upstream.fleet.workers > 0
        return terminal.code is Code.MODEL_NOT_FOUND or nothing

    def join(self, waiter: Waiter, model: str, deadline_ms: int | None) -> None:
        """Have it wait; its `end` is called later, never from here."""
        pull = self._pulls.get(model)
        refusal = self._refusal(waiter, pull)
        if refusal is not None or (pull is not None and pull.listed):
            waiter.timer = self._loop.call_soon(waiter.end, refusal)
            return
        if pull is None:
            assert self._group is not None
            pull = self._pulls[model] = Pull(model, waiter.client, waiter.token)
            pull.task = self._group.create_task(self._run(pull))
        self._keep(pull)
        waiter.pull = pull
        pull.waiting.add(waiter)
        self._waiting += 1
        self._waiting_bytes += waiter.size
        bounds = [] if deadline_ms is None else [(deadline_ms / 1000, Code.DEADLINE_EXCEEDED)]
        if waiter.tell is None:
            bounds.append((self._settings.auto_pull_s, Code.NO_WORKERS))
        if bounds:
            wait_s, code = min(bounds)
            waiter.timer = self._loop.call_later(wait_s, self._late, waiter, code)
        self._tell(waiter, pull)

    def drop(self, waiter: Waiter) -> None:
        """It does not wait any more."""
        if waiter.timer is not None:
            waiter.timer.cancel()
            waiter.timer = None
        pull, waiter.pull = waiter.pull, None
        if pull is None:
            return
        pull.waiting.discard(waiter)
        self._waiting -= 1
        self._waiting_bytes -= waiter.size
        if not pull.waiting and not pull.listed and pull.error is None:
            pull.grace = self._loop.call_later(GRACE_S, self._stop, pull)

    def _refusal(self, waiter: Waiter, pull: Pull | None) -> FabricError | None:
        if self._group is None:
            return FabricError(Code.SHUTTING_DOWN, "this gateway is shutting down")
        if pull is not None and (pull.error is not None or pull.listed):
            return pull.error
        if pull is None and len(self._pulls) >= PULLS_MAX:
            return FabricError(Code.QUEUE_FULL, f"{PULLS_MAX} models are being pulled already; try again later")
        if self._waiting >= WAITING_MAX or self._waiting_bytes + waiter.size > WAITING_BYTES_MAX:
            return FabricError(Code.QUEUE_FULL, f"{self._waiting} requests wait for models already; try again later")
        return None

    def _late(self, waiter: Waiter, code: Code) -> None:
        assert waiter.pull is not None
        waiter.end(FabricError(code, f"{_words(waiter.pull)}; ask again later"))

    # A pull -----------------------------------------------------------------------------------------------------------

    async def _run(self, pull: Pull) -> None:
        try:
            await self._carry_out(pull)
        except FabricError as error:
            pull.error = error
            self._keep(pull)
            for waiter in list(pull.waiting):
                waiter.end(error)
            await asyncio.sleep(FAILED_S)
        finally:
            self._remove(pull)

    async def _carry_out(self, pull: Pull) -> None:
        """Pull it, and let who waits go on.

        Raises:
            FabricError: MODEL_NOT_FOUND, it failed on all hosts; NO_WORKERS, there is none.
        """
        name = short_name(pull.model)
        try:
            hosts = (await self._upstream.query("hosts")).hosts
            pull.targets = choose(hosts, Choice(copies=self._settings.pull_copies or None), first=pull.model)
        except FabricError as error:
            raise FabricError(Code.NO_WORKERS, f"model '{name}' cannot be pulled: {error.message}") from None
        names = sorted({target.host for target in pull.targets})
        log("auto-pull begins", model=pull.model, client=pull.client, hosts=names)
        body = msgspec.json.encode({"model": name, "stream": True})
        operation = Operation(self._upstream, pull.client, pull.targets, "POST", "/api/pull", body)
        running = self._loop.create_task(operation.run())
        outcome = "stopped: nobody waited for it any more"
        try:
            while not running.done():
                await asyncio.wait((running,), timeout=TELL_S)
                self._look(pull, operation)
            outcome = "a defect of the gateway"
            running.result()
            outcome = str(operation.progress.last(detail=False).get("error", SUCCESS))
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await write_down(
                self._store,
                action="auto-pull",
                models=pull.model,
                client=pull.client,
                token=pull.token,
                hosts=names,
                outcome=outcome,
            )
        errors = dict.fromkeys(operation.progress.ended.values())
        if "" not in errors:
            raise FabricError(Code.MODEL_NOT_FOUND, f"model '{name}' not found: {'; '.join(errors)}")
        try:
            async with asyncio.timeout(LISTED_S):
                while not pull.listed:
                    await asyncio.sleep(TELL_S)
                    self._look(pull, operation)
        except TimeoutError:
            raise FabricError(Code.MODEL_NOT_FOUND, f"model '{name}' was pulled, but no host lists it") from None

    def _look(self, pull: Pull, operation: Operation) -> None:
        """Tell of what has changed, and let who waits go on if it can."""
        if lines := operation.progress.lines(detail=False):
            pull.line = lines[-1]
        if pull.listed:
            return
        if "" in operation.progress.ended.values() and short_name(pull.model) in self._upstream.fleet.models:
            pull.listed = True
            self._keep(pull)
            for waiter in list(pull.waiting):
                waiter.end(None)
        for waiter in pull.waiting:
            self._tell(waiter, pull)

    def _tell(self, waiter: Waiter, pull: Pull) -> None:
        now = self._loop.time()
        if waiter.tell is not None and waiter.told is not pull.line and now - waiter.told_at >= FRAME_S:
            waiter.told, waiter.told_at = pull.line, now
            waiter.tell(pull.line)

    def _keep(self, pull: Pull) -> None:
        """It is not to be stopped for want of somebody who waits."""
        if pull.grace is not None:
            pull.grace.cancel()
            pull.grace = None

    def _stop(self, pull: Pull) -> None:
        """Nobody wants it any more."""
        self._remove(pull)  # at once: who asks for it now starts another
        assert pull.task is not None
        pull.task.cancel()

    def _remove(self, pull: Pull) -> None:
        if self._pulls.get(pull.model) is pull:
            del self._pulls[pull.model]


def _words(pull: Pull) -> str:
    """How far it is, for people."""
    return f"model '{short_name(pull.model)}' is being pulled ({progress_words(pull.line)})"
