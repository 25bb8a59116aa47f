"""The worker process: one DEALER to the broker, one HTTP client per engine, one task per lease.

Everything that needs deciding is decided by `workers.session`; here effects are carried out. The path of a line:
`_feed` reads it, `Session.feed` appends it, `Session.pump` frames it, `Socket.offer` hands it to libzmq, all in the
turn of the event loop that read it.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import httpx
from msgspec import json

from common import process, protocol
from common.config import host_port
from common.errors import ProtocolError, UsageError
from common.logs import Log
from common.transport import Socket, is_loopback
from workers.ollama import ANSWER_BYTES_MAX, Backend, pieces, read_bounded, serve
from workers.session import Close, Effect, Joined, Lease, Limits, Post, Report, Resume, Session, Superseded
from workers.settings import WorkerSettings, engine_addresses

RETRY_S = 0.005
"""How soon frames the socket refused are offered again, if it does not report room first …"""
RETRY_AWAY_S = 0.1
"""… and while there is no broker."""
LEAVE_S = 1.0
"""How long a leaving worker tries to tell the broker."""
HWM = 256
"""Frames libzmq holds for us; the rest waits in the replay buffers, where bytes are counted."""

log = Log("worker")


async def run(settings: WorkerSettings, stop: asyncio.Event, *, on_registered: Callable[[], None] | None = None) -> int:
    """Serve until `stop` is set and return the exit status: 0, or 1 if a newer process of this name took over.

    `on_registered` is called once, when the broker first confirmed the registration.

    Raises:
        ProcessError: a setting is wrong, or the engine to be started does not start; perhaps within an exception group.
    """
    addresses = engine_addresses(settings.ollama)
    host, port = host_port(settings.broker, "the broker's address")
    async with contextlib.AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(Backend(a, settings.poll_interval_s)) for a in addresses]
        group = await stack.enter_async_context(asyncio.TaskGroup())
        owned = stack.enter_context(_cancelled_at_exit())
        start = group.create_task(_start_engines(settings, backends, group, owned))
        owned.append(start)
        await process.until(stop, start)
        if stop.is_set():
            return 0
        agent = _Agent(settings, backends, group, on_registered)
        stack.callback(agent.close)
        agent.socket.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")
        log("worker started", name=settings.name, broker=settings.broker, engines=len(backends))
        owned += [group.create_task(backend.watch(agent.engines_changed)) for backend in backends]
        owned += [group.create_task(agent.tick()), group.create_task(agent.send_rest())]
        await process.until(stop, agent.socket.broken, agent.superseded.wait())
        if agent.superseded.is_set():
            log.warn("a newer process registered under this worker's name: this one ends", name=settings.name)
            return 1
        await agent.leave()
        log("worker stopped", name=settings.name)
        return 0


@contextlib.contextmanager
def _cancelled_at_exit() -> Iterator[list[asyncio.Task[None]]]:
    tasks: list[asyncio.Task[None]] = []
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


async def _start_engines(
    settings: WorkerSettings,
    backends: Sequence[Backend],
    group: asyncio.TaskGroup,
    owned: list[asyncio.Task[None]],
) -> None:
    """Ask every engine once, so that the first register is complete; start the first one if that is wanted."""
    async with asyncio.TaskGroup() as polls:
        for backend in backends:
            polls.create_task(backend.poll())
    first = backends[0]
    if settings.start_ollama and not first.engine.up:
        if not is_loopback(first.address.url):
            raise UsageError(f"--start-ollama starts an engine on this machine, and {first.address.url} is not on it.")
        started = asyncio.Event()
        owned.append(group.create_task(serve(first, started)))
        await started.wait()


class _Agent:
    """The session's hands: sockets, tasks and time."""

    def __init__(
        self,
        settings: WorkerSettings,
        backends: Sequence[Backend],
        group: asyncio.TaskGroup,
        on_registered: Callable[[], None] | None,
    ) -> None:
        self._backends = {backend.address.url: backend for backend in backends}
        self._group = group
        self._on_registered = on_registered
        self._now = asyncio.get_running_loop().time
        limits = Limits(
            first_byte_s=settings.first_byte_s,
            silence_s=settings.silence_s,
            lease_bytes_max=settings.lease_bytes_max,
            worker_bytes_max=settings.worker_bytes_max,
            orphan_s=settings.orphan_s,
            keep_s=settings.keep_s,
        )
        self._session = Session(settings.name, secrets.token_hex(16), limits, self._now())
        self._session.set_engines(self._engines())
        self._tasks: dict[Lease, asyncio.Task[None]] = {}
        self._room: dict[Lease, asyncio.Event] = {}
        self._left_over = asyncio.Event()
        self._turn = 0
        self._rescheduled = asyncio.Event()
        self.superseded = asyncio.Event()
        self.socket = Socket("dealer", self._on_frame, on_batch=self._pump, hwm=HWM)

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self.socket.close()

    async def leave(self) -> None:
        """Fail what runs and say good-bye, if there is a broker to hear it."""
        session = self._session
        self._carry_out(session.shutdown(self._now()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                while not session.left and session.registration is not None:
                    self._pump()
                    await asyncio.sleep(RETRY_S)

    async def tick(self) -> None:
        """Give the session its time."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._session.next_deadline()):
                    await self._rescheduled.wait()
            self._rescheduled.clear()
            self._carry_out(self._session.tick(self._now()))
            self._pump()

    async def send_rest(self) -> None:
        """Send what was left over: in the next turn of the loop, or soon if the socket refused it."""
        while True:
            await self._left_over.wait()
            if self._session.blocked:
                await asyncio.sleep(RETRY_AWAY_S if self._session.registration is None else RETRY_S)
            self._left_over.clear()
            self._turn += 1
            self._pump()

    def engines_changed(self) -> None:
        if self._session.set_engines(self._engines()):
            self._pump()

    def _engines(self) -> tuple[protocol.Engine, ...]:
        return tuple(backend.engine for backend in self._backends.values())

    def _on_frame(self, _peer: bytes, frame: bytes) -> None:
        try:
            message, payload = protocol.to_worker.decode(frame)
        except ProtocolError as error:
            log.warn("the broker sent what is no message", error=str(error))
            self._session.misunderstood(str(error))
            return
        self._carry_out(self._session.handle(message, payload, self._now()))

    def _pump(self) -> None:
        self._carry_out(self._session.pump(self.socket.offer, self._now()))
        if self._session.blocked:
            self._left_over.set()

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Post(lease, body):
                    log.debug("lease started", rid=lease.rid, attempt=lease.attempt, model=lease.model, path=lease.path)
                    task = self._group.create_task(self._carry(lease, body))
                    self._tasks[lease] = task
                    task.add_done_callback(partial(self._carried, lease))
                    self._rescheduled.set()
                case Close(lease):
                    if lease in self._tasks:
                        self._tasks[lease].cancel()
                case Resume(lease):
                    if lease in self._room:  # else its task did not come to wait
                        self._room[lease].set()
                case Joined(registration):
                    log("registered with the broker", registration=registration)
                    if self._on_registered is not None:
                        self._on_registered()
                        self._on_registered = None
                case Superseded():
                    self.superseded.set()
                case Report(event, facts):
                    log.warn(event, **facts)

    def _carried(self, lease: Lease, _task: asyncio.Task[None]) -> None:
        del self._tasks[lease]
        log.debug("lease ended", rid=lease.rid, attempt=lease.attempt, state=lease.state.name, events=lease.top)

    async def _carry(self, lease: Lease, body: bytes) -> None:
        """Post a lease's request and feed the session what comes; cancelling it closes the stream."""
        session, backend = self._session, self._backends[lease.engine]
        try:
            if not lease.path.startswith("/"):  # a whole URL would lead away from the engine
                raise httpx.InvalidURL(f"a path starts with '/', not like {lease.path[:100]!r}")
            headers = {"content-type": "application/json"}
            async with backend.client.stream(lease.method, lease.path, content=body, headers=headers) as response:
                if response.is_success:
                    session.head(lease, response.status_code, response.headers.get("content-type", ""), self._now())
                    await self._feed(lease, response)
                else:
                    answer = await read_bounded(response, ANSWER_BYTES_MAX)
                    session.rejected(lease, response.status_code, answer, self._now())
        except httpx.InvalidURL as error:
            session.rejected(lease, 400, json.encode({"error": str(error)}), self._now())
        except httpx.HTTPError as error:
            session.broke(lease, str(error) or type(error).__name__, self._now())
            backend.poll_soon()
        self._pump()

    async def _feed(self, lease: Lease, response: httpx.Response) -> None:
        session, now, turn = self._session, self._now, -1
        async with pieces(response) as arriving:
            async for data in arriving:
                go_on = session.feed(lease, data, now())
                # What was read together comes piece by piece without a pause: the first leaves at once, the rest of
                # this turn in one chunk.
                if turn != self._turn:
                    turn = self._turn
                    self._pump()
                    self._left_over.set()
                if not go_on:
                    return
                if lease.paused:
                    await self._wait_for_room(lease)
        session.eof(lease, now())

    async def _wait_for_room(self, lease: Lease) -> None:
        self._room[lease] = asyncio.Event()
        try:
            await self._room[lease].wait()
        finally:
            del self._room[lease]
