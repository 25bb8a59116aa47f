"""The gateway's line to its broker: owns the DEALER and every stream, and keeps both alive through breaks."""

import asyncio
import secrets
import socket
from collections.abc import Callable, Iterable
from typing import Final

from common import protocol
from common.errors import Code, FabricError, ProtocolError
from common.logs import Log
from common.protocol import (
    BODY_BYTES_MAX,
    HEARTBEAT_INTERVAL_S,
    HEARTBEATS_MISSED_MAX,
    Accepted,
    Beat,
    Bye,
    Error,
    Hello,
    Message,
    Query,
    Snapshot,
    Submit,
    Who,
)
from common.transport import Sent, Socket
from gateway.session import Output, Over, Stream, ToBroker

log = Log("gateway")

QUERIES_MAX: Final = 64
HELLO_INTERVAL_S: Final = 0.05
SILENCE_S: Final = HEARTBEAT_INTERVAL_S * HEARTBEATS_MISSED_MAX

Sink = Callable[[Output], None]
"""Hears everything about one stream that is for its client. Must not raise."""


class Upstream:
    """One per gateway; `run` owns its time, `close` its socket.

    A broker that goes silent is waited for: streams are submitted again when it, or another in its place, answers, and
    end in NO_WORKERS after `lost_s`. While it is away new requests are refused at once with the same code.
    """

    def __init__(self, broker: str, *, lost_s: float) -> None:
        self._broker = broker
        self._lost_s = lost_s
        self._loop = asyncio.get_running_loop()
        self._name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._streams: dict[bytes, tuple[Stream, Sink]] = {}
        self._queries: dict[int, asyncio.Future[Snapshot]] = {}
        self._query_id = 0
        self._heard_at = self._loop.time()
        self._greeting = True
        self._welcome_due = True
        self.connected = False
        self.fleet = Snapshot()
        self.changed = asyncio.Event()
        self._socket = Socket("dealer", self._on_frame)
        try:
            self._socket.connect(broker)
        except BaseException:
            self.close()
            raise

    @property
    def streams(self) -> int:
        """Requests without a terminal."""
        return len(self._streams)

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
    ) -> Stream:
        """Send a job; everything about it comes to `sink`, and the last is `Over`.

        Raises:
            FabricError: TOO_LARGE, or NO_WORKERS when the broker does not answer.
        """
        if len(body) > BODY_BYTES_MAX:
            raise FabricError(
                Code.TOO_LARGE, f"the request takes {len(body)} bytes; at most {BODY_BYTES_MAX} go through"
            )
        if not self.connected:
            raise FabricError(Code.NO_WORKERS, f"the broker at {self._broker} does not answer; try again in a moment")
        message = Submit(
            rid=secrets.token_bytes(16),
            client=client,
            ref=ref,
            model=protocol.full_name(model),
            path=path,
            priority=priority,
            deadline_ms=deadline_ms,
        )
        now = self._loop.time()
        stream = Stream(message, body, now)
        self._streams[message.rid] = stream, sink
        self._carry_out(message.rid, stream.submission(now))
        return stream

    def cancel(self, stream: Stream, reason: str) -> None:
        """Stop a stream; its `Over` still comes."""
        self._carry_out(stream.submit.rid, stream.cancel(reason))

    def unpause(self, stream: Stream) -> None:
        """A stream's client reads again."""
        self._carry_out(stream.submit.rid, stream.unpause(self._loop.time()))

    def forget(self, stream: Stream) -> None:
        """Nobody listens to the stream any more: stop it, and hear nothing of it."""
        if stream.submit.rid in self._streams:
            self._streams[stream.submit.rid] = stream, _deaf
            self.cancel(stream, "the client is gone")

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
        self._send(Query(id=number, what=what))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise FabricError(Code.NO_WORKERS, f"the broker at {self._broker} does not answer") from None
        finally:
            del self._queries[number]

    async def run(self) -> None:
        """Keep the line alive, until cancelled."""
        beat_at = 0.0
        while True:
            now = self._loop.time()
            if self.connected and now - self._heard_at > SILENCE_S:
                log.warn("broker lost", broker=self._broker, streams=len(self._streams))
                self._lost()
            if not self.connected and self._streams and now - self._heard_at > self._lost_s:
                for rid, (stream, _) in list(self._streams.items()):
                    text = f"the broker at {self._broker} has not answered for {self._lost_s:.0f} s"
                    self._carry_out(rid, stream.abandon(Code.NO_WORKERS, text))
            if self._greeting and self._socket.offer(protocol.encode(Hello(name=self._name))):
                self._greeting = False
                beat_at = now + HEARTBEAT_INTERVAL_S
            elif now >= beat_at:
                beat_at = now + HEARTBEAT_INTERVAL_S
                self._socket.offer(protocol.encode(Beat()))
                for rid, (stream, _) in list(self._streams.items()):
                    self._carry_out(rid, stream.tick(now))
            await asyncio.sleep(HELLO_INTERVAL_S if self._greeting else max(0.01, beat_at - now))

    async def broken(self) -> None:
        """Ends only by raising: a bug met while reading."""
        await self._socket.broken

    def close(self) -> None:
        self._socket.offer(protocol.encode(Bye()))
        self._socket.close()

    def _on_frame(self, _: bytes, frame: bytes) -> None:
        try:
            message, payload = protocol.to_gateway.decode(frame)
        except ProtocolError as error:
            log.warn("broker not understood", reason=str(error))
            return
        self._heard_at = now = self._loop.time()
        match message:
            case Beat():
                pass
            case Who():
                self._welcome_due = True
                self._send(Hello(name=self._name))
            case Snapshot():
                self._on_snapshot(message, now)
            case Error():
                log.warn("broker did not understand", code=message.code, reason=message.message)
            case _:
                entry = self._streams.get(message.rid)
                if entry is not None:
                    self._carry_out(message.rid, entry[0].handle(message, payload, now))
                elif isinstance(message, protocol.End | protocol.Failed):
                    self._send(protocol.Ack(rid=message.rid))
                elif isinstance(message, Accepted):
                    self._send(protocol.Cancel(rid=message.rid))

    def _on_snapshot(self, snapshot: Snapshot, now: float) -> None:
        future = self._queries.get(snapshot.id)
        if future is not None:
            if not future.done():
                future.set_result(snapshot)
            return
        self.fleet = snapshot
        self.changed.set()
        if self._welcome_due:
            self._welcome_due = False
            self.connected = True
            log("connected", broker=self._broker, models=len(snapshot.models), workers=snapshot.workers)
            for rid, (stream, _) in list(self._streams.items()):
                self._carry_out(rid, stream.submission(now))

    def _carry_out(self, rid: bytes, outputs: Iterable[Output]) -> None:
        for output in outputs:
            if type(output) is ToBroker:
                self._send(output.message, output.payload)
                continue
            _, sink = self._streams[rid]
            if type(output) is Over:
                del self._streams[rid]
            sink(output)

    def _send(self, message: Message, payload: bytes = b"") -> None:
        # A message the socket refuses is lost with the line: streams are submitted again when the broker answers.
        if self._socket.send(protocol.encode(message, payload)) is Sent.GONE:
            self._lost()

    def _lost(self) -> None:
        """Greet again; what waits for the old line would only confuse the new one."""
        self.connected = False
        self._greeting = self._welcome_due = True
        self._socket.discard()


def _deaf(_: Output) -> None:
    """The sink of a stream nobody listens to."""
