"""The gateway's lines to its brokers: owns a DEALER each and the clock; what is said on them `gateway.link` decides."""

import asyncio
import secrets
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from msgspec.structs import replace

from common import protocol
from common.errors import Code, FabricError, ProtocolError
from common.logs import Log
from common.protocol import BODY_BYTES_MAX, Beat, Bye, Chunk, Error, Message, Part, Probe, Query, Snapshot, Submit
from common.transport import Sent, Socket
from gateway.hints import EVERYBODYS, NO_HINTS, Hints, Share
from gateway.link import Attachment, Link, Sink
from gateway.session import Output, Stream, Wanted
from gateway.spool import Spool

log = Log("gateway")

QUERIES_MAX: Final = 64
WANTED_MAX: Final = 4096
"""Parts of bodies that wait to be read; one more is asked for again."""
HELLO_INTERVAL_S: Final = 0.05
PORTION_INTERVAL_S: Final = 0.005
DIAL_AGAIN_S: Final = 10.0
"""A broker that has been silent for so long is dialled with a new socket."""


class Upstream:
    """One per gateway; `run` owns its time, `close` its sockets.

    A broker that goes silent is waited for, or the next one of the list is served: streams are submitted again when one
    answers, and end in NO_WORKERS after `lost_s`. Meanwhile new requests are refused at once with the same code.
    """

    def __init__(self, brokers: Sequence[str], *, lost_s: float, resume_s: float, migrate: bool = True) -> None:
        self._brokers = brokers
        self._resume_ms = int(resume_s * 1000)
        self._migrate = migrate
        self._loop = asyncio.get_running_loop()
        name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        now = self._loop.time()
        self._link = Link(name, len(brokers), now, lost_s=lost_s, resume_s=resume_s)
        self._dialled_at = [now] * len(brokers)
        self._queries: dict[int, asyncio.Future[Snapshot]] = {}
        self._query_id = 0
        self._wanted: dict[tuple[bytes, int], tuple[Wanted, Spool]] = {}
        self._wanting = asyncio.Event()
        self.changed = asyncio.Event()
        self._sockets: list[Socket] = []
        try:
            for index, address in enumerate(brokers):
                self._sockets.append(Socket("dealer", partial(self._on_frame, index)))
                self._sockets[-1].connect(address)
        except BaseException:
            self.close()
            raise

    @property
    def streams(self) -> int:
        """Requests without a terminal."""
        return self._link.streams

    @property
    def waiting(self) -> int:
        """Those of them that no host had yet."""
        return self._link.waiting

    @property
    def connected(self) -> bool:
        """Whether a broker answers."""
        return self._link.connected

    @property
    def fleet(self) -> Snapshot:
        """What the broker last said of models and workers."""
        return self._link.fleet

    def submit(
        self,
        *,
        client: str,
        ref: str,
        model: str,
        path: str,
        body: bytes,
        sink: Sink,
        priority: str = "normal",
        deadline_ms: int | None = None,
        resume: bool = False,
        migrate: bool = True,
        light: bool = False,
        spool: Spool | None = None,
        hints: Hints = NO_HINTS,
        share: Share = EVERYBODYS,
    ) -> Stream:
        """Send a job; everything about it comes to `sink`, and the last is `Over`.

        Of one with a `spool` that is the body; whoever submits it keeps it until then.

        Raises:
            FabricError: TOO_LARGE, MODEL_NOT_FOUND for a name no model can have, or NO_WORKERS when no broker answers.
        """
        if protocol.names_engine(model):
            raise FabricError(Code.MODEL_NOT_FOUND, f"model {model[:100]!r} is on no host")
        if len(body) > BODY_BYTES_MAX:
            raise FabricError(
                Code.TOO_LARGE, f"the request takes {len(body)} bytes; at most {BODY_BYTES_MAX} go through"
            )
        self._check_connected()
        message = Submit(
            rid=secrets.token_bytes(16),
            client=client,
            ref=ref,
            model=protocol.full_name(model),
            path=path,
            priority=priority,
            deadline_ms=deadline_ms,
            grace_ms=self._resume_ms if resume else 0,
            migrate=migrate and self._migrate,
            light=light,
            weight=share.weight,
            running_max=share.running_max,
            prompt_bytes=hints.prompt_bytes,
            output_max=hints.output_max,
            variant=hints.variant,
            prefix=hints.prefix,
        )
        return self._start(message, body, sink, spool)

    def operate(
        self,
        *,
        client: str,
        model: str,
        method: str,
        path: str,
        body: bytes,
        sink: Sink,
        spool: Spool | None = None,
    ) -> Stream:
        """Have an operation done on the models of one engine; `model` is its `engine_name`.

        Raises:
            FabricError: NO_WORKERS when no broker answers.
        """
        self._check_connected()
        rid = secrets.token_bytes(16)
        message = Submit(rid=rid, client=client, ref=rid.hex(), model=model, method=method, path=path, migrate=False)
        return self._start(message, body, sink, spool)

    def _start(self, message: Submit, body: bytes, sink: Sink, spool: Spool | None) -> Stream:
        if spool is not None:
            message = replace(message, parted_bytes=spool.size)
            sink = partial(self._hear_parted, message.rid, spool, sink)
        stream = self._link.submit(message, body, sink, self._loop.time())
        self._flush()
        return stream

    def _hear_parted(self, rid: bytes, spool: Spool, sink: Sink, output: Output) -> None:
        """The sink of a stream whose body is here."""
        if not isinstance(output, Wanted):
            sink(output)
        elif len(self._wanted) < WANTED_MAX:
            self._wanted[rid, output.offset] = output, spool
            self._wanting.set()

    async def supply(self) -> None:
        """Send workers the parts of bodies that they want, until cancelled; one after the other bounds what is held."""
        while True:
            await self._wanting.wait()
            self._wanting.clear()
            while self._wanted:
                rid, offset = next(iter(self._wanted))
                wanted, spool = self._wanted.pop((rid, offset))
                try:
                    data = await spool.read(offset, wanted.size)
                except OSError as error:
                    log.warn("a request that was kept cannot be read", reason=error.strerror)
                    continue
                if data:  # else it is over meanwhile
                    self._send(self._link.broker, Part(rid=rid, attempt=wanted.attempt, offset=offset), data)

    def attach(
        self,
        *,
        client: str,
        ref: str,
        wanted: int,
        sink: Sink,
        answered: Callable[[Stream | None, Code | None], None],
        waits: Callable[[], bool],
    ) -> None:
        """A client is back and wants its request from event `wanted` on; see `Attachment`.

        Raises:
            FabricError: NO_WORKERS, too many wait for a broker already.
        """
        if not self._link.attach(Attachment(client, ref, wanted, sink, answered, waits)):
            raise FabricError(Code.NO_WORKERS, f"the broker at {self._address} does not answer; try again in a moment")
        self._flush()

    def cancel(self, stream: Stream, reason: str) -> None:
        """Stop a stream; its `Over` still comes."""
        self._link.cancel(stream, reason)
        self._flush()

    def unpause(self, stream: Stream) -> None:
        """A stream's client reads again."""
        self._link.unpause(stream, self._loop.time())
        self._flush()

    def park(self, stream: Stream) -> None:
        """A stream's client may come back for it, here or elsewhere."""
        self._link.park(stream, self._loop.time())
        self._flush()

    def forget(self, stream: Stream, reason: str = "the client is gone") -> None:
        """Nobody listens to the stream any more: stop it, and hear nothing of it."""
        self._link.forget(stream, reason)
        self._flush()

    def revoke(self, clients: set[str]) -> None:
        """Stop the streams that wait for these clients."""
        self._link.revoke(clients)
        self._flush()

    async def query(self, what: str, timeout_s: float = 2.0) -> Snapshot:
        """Ask the broker what it holds.

        Raises:
            FabricError: NO_WORKERS, it does not answer.
        """
        if len(self._queries) >= QUERIES_MAX:
            raise FabricError(Code.RATE_LIMITED, f"{QUERIES_MAX} questions are open already")
        self._query_id += 1
        number = self._query_id
        self._queries[number] = future = self._loop.create_future()
        self._send(self._link.broker, Query(id=number, what=what))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise FabricError(Code.NO_WORKERS, f"the broker at {self._address} does not answer") from None
        finally:
            del self._queries[number]

    async def run(self) -> None:
        """Keep the line alive, until cancelled."""
        link = self._link
        absent = False
        while True:
            was_connected = link.connected
            now = self._loop.time()
            if link.tick(now) and was_connected:
                log.warn("broker lost", streams=link.streams, next=self._address)
                absent = True
            elif not absent and link.away(now):
                log.warn("the broker does not answer", broker=self._address)
                absent = True
            elif link.connected:
                absent = False
            for index, line in enumerate(self._sockets):
                if now - max(link.heard_at(index), self._dialled_at[index]) > DIAL_AGAIN_S:
                    self._dialled_at[index] = now
                    line.dial_again()
            line = self._sockets[link.broker]
            if link.greeting:
                line.discard()
                if line.offer(protocol.encode(link.hello())):
                    link.greeted()
            elif link.resubmits and line.idle:
                link.resubmit(now)
            self._flush()
            pause_s = PORTION_INTERVAL_S if link.resubmits else 1.0 if link.connected else HELLO_INTERVAL_S
            await asyncio.sleep(min(pause_s, max(0.01, link.next_deadline() - self._loop.time())))

    async def broken(self) -> None:
        """Ends only by raising: a bug met while reading."""
        await asyncio.gather(*(line.broken for line in self._sockets))

    def close(self) -> None:
        for index, line in enumerate(self._sockets):
            if index == self._link.broker:
                line.offer(protocol.encode(Bye()))
            line.close()

    @property
    def _address(self) -> str:
        return self._brokers[self._link.broker]

    def _check_connected(self) -> None:
        if not self._link.accepts(self._loop.time()):
            raise FabricError(Code.NO_WORKERS, f"the broker at {self._address} does not answer; try again in a moment")

    def _on_frame(self, broker: int, _: bytes, frame: bytes) -> None:
        try:
            message, payload = protocol.to_gateway.decode(frame)
        except ProtocolError as error:
            log.warn("broker not understood", reason=str(error))
            self._send(broker, Error(code=Code.INVALID_MESSAGE, message=str(error)))
            return
        if isinstance(message, Snapshot) and message.id:
            future = self._queries.get(message.id)
            if future is not None and not future.done():
                future.set_result(message)
            return
        if isinstance(message, Error):
            log.warn("broker did not understand", code=message.code, reason=message.message)
        was_connected = self._link.connected
        self._link.handle(broker, message, payload, self._loop.time())
        self._flush()
        if isinstance(message, Snapshot):
            self.changed.set()
            if self._link.connected and not was_connected:
                log("connected", broker=self._address, models=len(message.models), workers=message.workers)

    def _flush(self) -> None:
        for tell in self._link.take():
            self._send(tell.broker, tell.message, tell.payload)

    def _send(self, broker: int, message: Message, payload: bytes = b"") -> None:
        if type(message) is Beat or type(message) is Probe:
            self._sockets[broker].offer(protocol.encode(message))  # one that is not there now needs none later
            return
        # A message the socket refuses is lost with the line: streams are submitted again when a broker answers. What is
        # handed over the worker has too, and a part of a body it asks for again.
        droppable = type(message) is Chunk or type(message) is Part
        sent = self._sockets[broker].send(protocol.encode(message, payload), droppable=droppable)
        if sent is Sent.GONE and broker == self._link.broker:
            self._link.lost()
