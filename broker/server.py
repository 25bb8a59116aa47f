"""The broker's shell: owns both ROUTERs and the clock, feeds the core and carries out what it answers."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from broker.core import BrokerCore
from broker.events import Effect, Event, Forward, Garbled, Note, Overflowed, Received, Send, Side, Supply, Unreachable
from broker.settings import BrokerSettings
from common import history, protocol
from common.config import refuse_exposed
from common.errors import Code, ProtocolError
from common.logs import Log
from common.process import until
from common.protocol import FRAME_BYTES_MAX, Accepted, Chunk, End, Error, Failed, Leased, Lost, Part
from common.transport import Sent, Socket

log = Log("broker")

_TOLD: Final = (Accepted, Leased, Lost, End, Failed)

TICK_S_MAX = 0.05
"""Between two ticks a request may come whose deadline is the next."""


@dataclass(slots=True, frozen=True)
class Addresses:
    """Where the broker listens in fact, ports chosen."""

    gateways: str
    workers: str


class Broker:
    """Made and closed by one task, on its event loop."""

    def __init__(self, settings: BrokerSettings) -> None:
        refuse_exposed([settings.gateways, settings.workers], insecure=settings.insecure)
        self._loop = asyncio.get_running_loop()
        self.core = BrokerCore(settings, nonce=secrets.randbits(32), now=self._loop.time())
        self._gateways = Socket("router", self._on_gateway_frame)
        self._workers = Socket("router", self._on_worker_frame)
        try:
            self.addresses = Addresses(self._gateways.bind(settings.gateways), self._workers.bind(settings.workers))
        except BaseException:
            self.close()
            raise

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, or until a bug of ours ends it."""
        await until(stop, self._ticks(), self._gateways.broken, self._workers.broken)

    def close(self) -> None:
        self._gateways.close()
        self._workers.close()

    async def _ticks(self) -> None:
        while True:
            self._carry_out(self.core.tick(self._loop.time()))
            await asyncio.sleep(min(max(0.01, self.core.next_deadline() - self._loop.time()), TICK_S_MAX))

    def _on_gateway_frame(self, peer: bytes, frame: bytes) -> None:
        try:
            message, end = protocol.from_gateway.header(frame)
        except ProtocolError as error:
            self._feed(Garbled(Side.GATEWAY, peer, str(error)))
            return
        payload = b"" if type(message) is Part else frame[end:]  # a part goes on as it is
        self._feed(Received(Side.GATEWAY, peer, message, payload, frame))

    def _on_worker_frame(self, peer: bytes, frame: bytes) -> None:
        try:
            message, end = protocol.from_worker.header(frame)
        except ProtocolError as error:
            self._feed(Garbled(Side.WORKER, peer, str(error)))
            return
        if type(message) is Chunk:
            # Nearly all there is to do: no event, no effect, and its payload is never copied.
            gateway = self.core.route(peer, message, self._loop.time())
            if gateway is not None:
                self._forward(gateway, message.rid, frame)
                return
        self._feed(Received(Side.WORKER, peer, message, frame[end:], frame))

    def _forward(self, gateway: bytes, rid: bytes, frame: bytes) -> None:
        sent = self._gateways.send(frame, gateway, droppable=True)
        if sent is Sent.FULL:
            self._feed(Overflowed(gateway, rid))
        elif sent is Sent.GONE:
            self._feed(Unreachable(Side.GATEWAY, gateway))

    def _feed(self, event: Event) -> None:
        self._carry_out(self.core.handle(event, self._loop.time()))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if type(effect) is Forward:
                self._forward(effect.peer, effect.rid, effect.frame)
            elif type(effect) is Supply:
                if self._workers.send(effect.frame, effect.peer, droppable=True) is Sent.GONE:
                    effects += self.core.handle(Unreachable(Side.WORKER, effect.peer), self._loop.time())
            elif type(effect) is Send:
                socket = self._gateways if effect.side is Side.GATEWAY else self._workers
                told = effect.message
                if history.record is not None and isinstance(told, _TOLD):
                    facts = {name: getattr(told, name) for name in ("attempt", "worker") if hasattr(told, name)}
                    history.record(type(told).__name__.lower(), rid=told.rid, **facts)
                frame = protocol.encode(told, effect.payload)
                if len(frame) > FRAME_BYTES_MAX:
                    # It would end the peer's line for good. Only a list of what somebody made up is so large.
                    log.warn("message too large", kind=type(told).__name__, bytes=len(frame))
                    frame = protocol.encode(Error(code=Code.TOO_LARGE, message="the answer is too large"))
                sent = socket.send(frame, effect.peer)
                if sent is Sent.GONE:
                    # What follows from it is carried out after what was decided before.
                    effects += self.core.handle(Unreachable(effect.side, effect.peer), self._loop.time())
            elif type(effect) is Note:
                log(effect.event, **effect.facts)


async def run(
    settings: BrokerSettings, stop: asyncio.Event, *, on_ready: Callable[[Addresses], None] | None = None
) -> int:
    """Run a broker until `stop`; `on_ready` hears its addresses.

    Raises:
        ProcessError: a port is taken, or is exposed without `insecure`.
    """
    broker = Broker(settings)
    try:
        log("listening", gateways=broker.addresses.gateways, workers=broker.addresses.workers)
        if on_ready is not None:
            on_ready(broker.addresses)
        await broker.run(stop)
    finally:
        broker.close()
    log("stopped")
    return 0
