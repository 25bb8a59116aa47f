"""The worker process: a DEALER to each broker, one HTTP client per engine, one task per lease.

Everything that needs deciding is decided by `workers.session`; here effects are carried out. The path of a line:
`_feed` reads it, `Session.feed` appends it, `Session.pump` frames it, `Socket.offer` hands it to libzmq, all in the
turn of the event loop that read it.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final
from urllib.parse import quote
from zlib import crc32

from msgspec import json

from common import history, process, protocol
from common.config import default_data_dir, host_port, is_loopback
from common.errors import ProtocolError, UsageError
from common.logs import Log
from common.transport import Socket
from workers.continuation import RAW_PATH, CannotContinue, Continuation
from workers.http import BrokenError, Connection, RequestError
from workers.ollama import ANSWER_BYTES_MAX, Backend, serve
from workers.openai import OpenAIContinuation
from workers.session import (
    Close,
    Drained,
    Effect,
    Give,
    Joined,
    Lease,
    Limits,
    Post,
    Probe,
    Report,
    Resume,
    Served,
    Session,
    Superseded,
)
from workers.settings import WorkerSettings, engine_addresses

RETRY_S = 0.005
"""How soon frames the socket refused are offered again, if it does not report room first …"""
RETRY_AWAY_S = 0.1
"""… and while there is no broker."""
LEAVE_S = 1.0
"""How long a leaving worker tries to tell the broker."""
DRAIN_LOOK_S = 0.05
DIAL_AGAIN_S = 10.0
"""A broker that has been silent for so long is dialled with a new socket."""
PROBE: Final = protocol.encode(protocol.Probe())
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
    brokers = [host_port(address.strip(), "the broker's address") for address in settings.broker.split(",")]
    async with contextlib.AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(Backend(a, settings.poll_interval_s)) for a in addresses]
        group = await stack.enter_async_context(asyncio.TaskGroup())
        owned = stack.enter_context(_cancelled_at_exit())
        start = group.create_task(_start_engines(settings, backends, group, owned))
        owned.append(start)
        await process.until(stop, start)
        if stop.is_set():
            return 0
        agent = _Agent(settings, backends, group, on_registered, len(brokers))
        stack.callback(agent.close)
        for line, (host, port) in zip(agent.sockets, brokers, strict=True):
            line.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")
        log("worker started", name=settings.name, broker=settings.broker, engines=len(backends))
        owned += [group.create_task(backend.watch(agent.engines_changed)) for backend in backends]
        owned += [group.create_task(agent.tick()), group.create_task(agent.send_rest())]
        broken = [line.broken for line in agent.sockets]
        await process.until(asyncio.Event(), agent.until_drained(stop), agent.superseded.wait(), *broken)
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
        brokers: int,
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
        self._settings = settings
        self._session = Session(
            settings.name, secrets.token_hex(16), limits, self._now(), brokers=brokers, labels=settings.labels
        )
        self._session.set_engines(self._engines())
        self._drained = (settings.data_dir or default_data_dir()) / f"{quote(settings.name, safe='')}.drained"
        if self._drained.exists():
            log.warn("drained: takes nothing until `weftline resume`", name=settings.name)
            self._session.drain()
        self._tasks: dict[Lease, asyncio.Task[None]] = {}
        self._answers: dict[Lease, _Answer] = {}
        self._bodies: dict[Lease, _Body] = {}
        self._left_over = asyncio.Event()
        self._rescheduled = asyncio.Event()
        self.superseded = asyncio.Event()
        self.sockets = [
            Socket("dealer", partial(self._on_frame, index), on_batch=self._pump, hwm=HWM) for index in range(brokers)
        ]
        self._serve(0)
        self._dialled_at = [self._now()] * brokers

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        for line in self.sockets:
            line.close()

    def _serve(self, broker: int) -> None:
        self._broker = broker
        self._offer = self.sockets[broker].offer

    async def until_drained(self, stop: asyncio.Event) -> None:
        """Wait for `stop`; then, if there is time, until what runs has ended and nobody can ask for its events."""
        await stop.wait()
        if not process.gently(stop):
            return
        session = self._session
        session.drain(for_good=True)
        log("draining", name=session.name, leases=session.leases)
        self._pump()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_s):
                while session.leases:  # noqa: ASYNC110 - many ways lead there, and nobody is in a hurry
                    await asyncio.sleep(DRAIN_LOOK_S)

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
            now = self._now()
            self._carry_out(self._session.tick(now))
            for index, line in enumerate(self.sockets):
                if now - max(self._session.heard_at(index), self._dialled_at[index]) > DIAL_AGAIN_S:
                    self._dialled_at[index] = now
                    line.dial_again()
            self._pump()

    async def send_rest(self) -> None:
        """Send what was left over: in the next turn of the loop, or soon if the socket refused it."""
        while True:
            await self._left_over.wait()
            if self._session.blocked:
                await asyncio.sleep(RETRY_AWAY_S if self._session.registration is None else RETRY_S)
            self._left_over.clear()
            self._pump()

    def engines_changed(self) -> None:
        if self._session.set_engines(self._engines()):
            self._pump()

    def _engines(self) -> tuple[protocol.Engine, ...]:
        return tuple(backend.engine for backend in self._backends.values())

    def _on_frame(self, broker: int, _peer: bytes, frame: bytes) -> None:
        try:
            message, payload = protocol.to_worker.decode(frame)
        except ProtocolError as error:
            log.warn("the broker sent what is no message", error=str(error))
            self._session.misunderstood(str(error))
            return
        self._carry_out(self._session.handle(message, payload, self._now(), broker=broker))

    def _pump(self) -> None:
        self._carry_out(self._session.pump(self._offer, self._now()))
        if self._session.blocked:
            self._left_over.set()

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Post(lease, body, prior, parted_bytes):
                    log.debug("lease started", rid=lease.rid, attempt=lease.attempt, model=lease.model, path=lease.path)
                    if parted_bytes:
                        self._bodies[lease] = _Body(self, lease, parted_bytes)
                    task = self._group.create_task(self._carry(lease, body, prior))
                    self._tasks[lease] = task
                    task.add_done_callback(partial(self._carried, lease))
                    self._rescheduled.set()
                case Give(lease, part):
                    if lease in self._bodies:  # else its task is ending
                        self._bodies[lease].give(part)
                case Close(lease):
                    if lease in self._tasks:
                        self._tasks[lease].cancel()
                case Resume(lease):
                    if lease in self._answers:  # else its task is ending
                        self._answers[lease].resume()
                case Joined(registration):
                    log("registered with the broker", registration=registration)
                    if self._on_registered is not None:
                        self._on_registered()
                        self._on_registered = None
                case Served(broker):
                    log.warn("another broker is served from now on", broker=broker)
                    self._serve(broker)
                case Probe():
                    for index, line in enumerate(self.sockets):
                        if index != self._broker:
                            line.offer(PROBE)
                case Drained(on):
                    self._keep_in_mind(on)
                case Superseded():
                    self.superseded.set()
                case Report(event, facts):
                    log.warn(event, **facts)

    def _carried(self, lease: Lease, _task: asyncio.Task[None]) -> None:
        del self._tasks[lease]
        self._bodies.pop(lease, None)
        log.debug("lease ended", rid=lease.rid, attempt=lease.attempt, state=lease.state.name, events=lease.top)

    def _keep_in_mind(self, drained: bool) -> None:
        log("drained by an operator" if drained else "takes work again", name=self._session.name)
        try:
            if drained:
                self._drained.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._drained.touch()
            else:
                self._drained.unlink(missing_ok=True)
        except OSError as error:
            log.warn("cannot keep in mind that this worker is drained", path=self._drained, error=error.strerror)

    async def _carry(self, lease: Lease, body: bytes, prior: tuple[bytes, ...]) -> None:
        """Post a lease's request; what comes goes to the session. Cancelling it closes the stream."""
        session, backend = self._session, self._backends[lease.engine]
        answer = self._answers[lease] = _Answer(self, lease)
        try:
            if prior:
                await self._continue(lease, body, prior, answer)
            else:
                await backend.http.request(lease.method, lease.path, self._bodies.get(lease, body), answer)
            if answer.ok:
                if lease.digest == protocol.OPERATION:
                    await backend.poll()  # first: who hears that it has ended may ask for the model at once
                    self.engines_changed()
                session.eof(lease, self._now())
            elif prior and answer.status < 500:
                session.cannot_continue(lease, f"the engine answered {answer.status}", self._now())
            else:
                session.rejected(lease, answer.status, bytes(answer.refusal), self._now())
        except CannotContinue as reason:
            session.cannot_continue(lease, str(reason), self._now())
        except RequestError as error:
            session.rejected(lease, 400, json.encode({"error": str(error)}), self._now())
        except BrokenError as error:
            session.broke(lease, str(error), self._now())
            backend.poll_soon()
        finally:
            del self._answers[lease]
        self._pump()

    async def _continue(self, lease: Lease, body: bytes, prior: tuple[bytes, ...], answer: "_Answer") -> None:
        """Post what continues a stream that broke elsewhere.

        Raises:
            CannotContinue: its engine or what was delivered does not allow it.
            BrokenError: the engine broke.
        """
        http = self._backends[lease.engine].http
        kind = OpenAIContinuation if lease.path.startswith("/v1/") else Continuation
        continuation = kind.plan(lease.path, body, prior)
        rendering = b""
        if continuation.render is not None:
            document = _Document()
            await http.request("POST", continuation.render_path, continuation.render, document)
            if document.status >= 500:
                answer.status, answer.refusal = document.status, document.content
                return
            rendering = bytes(document.content)
        request = continuation.request(rendering)
        answer.continuation = continuation
        if request is not None:
            await http.request("POST", RAW_PATH, request, answer)
            rest = continuation.eof() if answer.ok else b""
        else:
            answer.ok, rest = True, continuation.ending()
            self._on_head(lease, 200, continuation.content_type)
        if rest:
            self._on_body(lease, rest)

    def part_taken(self, lease: Lease) -> None:
        """The engine has taken a part of a lease's body."""
        self._session.taken(lease, self._now())
        self._pump()

    def _on_head(self, lease: Lease, status: int, content_type: str) -> None:
        self._session.head(lease, status, content_type, self._now())

    def _on_end(self, lease: Lease, data: bytes) -> None:
        """The last of it, before the engine's own end."""
        if self._on_body(lease, data):
            self._session.eof(lease, self._now())
            self._pump()

    def _on_body(self, lease: Lease, data: bytes) -> bool:
        """Feed the session; False: it wants no more."""
        top = lease.top
        go_on = self._session.feed(lease, data, self._now())
        if history.record is not None and lease.top > top:
            hashes = [crc32(line.rstrip(b"\n")) for line in lease.events[top - lease.base :]]
            history.record("chunk", rid=lease.rid, attempt=lease.attempt, seq=top, hashes=hashes)
        self._pump()
        return go_on


class _Body:
    """A body that comes in parts, on its way from the session to the engine; the session bounds what is here."""

    def __init__(self, agent: _Agent, lease: Lease, size: int) -> None:
        self.size = size
        self._agent = agent
        self._lease = lease
        self._parts: asyncio.Queue[bytes] = asyncio.Queue()

    def give(self, part: bytes) -> None:
        self._parts.put_nowait(part)

    async def next(self) -> bytes:
        return await self._parts.get()

    def taken(self) -> None:
        self._agent.part_taken(self._lease)


class _Answer:
    """Hears an engine's answer for a lease, in the turn of the loop that read it."""

    __slots__ = ("_agent", "_connection", "_lease", "continuation", "ok", "refusal", "status")

    _connection: Connection

    def __init__(self, agent: _Agent, lease: Lease) -> None:
        self._agent = agent
        self._lease = lease
        self.ok = False
        self.status = 0
        self.refusal = bytearray()
        self.continuation: Continuation | OpenAIContinuation | None = None

    def head(self, status: int, content_type: str, connection: Connection) -> None:
        self.status, self.ok, self._connection = status, 200 <= status < 300, connection
        if self.ok:
            kind = content_type if self.continuation is None else self.continuation.content_type
            self._agent._on_head(self._lease, status, kind)

    def body(self, data: bytes) -> None:
        if not self.ok:
            self.refusal += data[: ANSWER_BYTES_MAX - len(self.refusal)]
            return
        if self.continuation is not None:
            data = self.continuation.dress(data)
            if self.continuation.done:
                self._agent._on_end(self._lease, data)
                self._connection.close()
                return
            if not data:
                return
        if not self._agent._on_body(self._lease, data):
            self._connection.close()
        elif self._lease.paused:
            self._connection.pause()

    def resume(self) -> None:
        self._connection.resume()


class _Document:
    """Takes a whole answer, up to a bound."""

    __slots__ = ("content", "status")

    def __init__(self) -> None:
        self.status = 0
        self.content = bytearray()

    def head(self, status: int, content_type: str, connection: Connection) -> None:
        self.status = status

    def body(self, data: bytes) -> None:
        self.content += data[: ANSWER_BYTES_MAX - len(self.content)]
