"""The broker's shell: owns both ROUTERs and the clock, feeds the core and carries out what it answers."""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from broker.core import BrokerCore
from broker.events import Effect, Event, Forward, Garbled, Note, Overflowed, Received, Send, Side, Unreachable
from broker.settings import BrokerSettings
from common import protocol
from common.config import refuse_exposed
from common.errors import ProtocolError
from common.logs import Log
from common.process import until
from common.transport import Sent, Socket

log = Log("broker")


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
            await asyncio.sleep(max(0.01, self.core.next_deadline() - self._loop.time()))

    def _on_gateway_frame(self, peer: bytes, frame: bytes) -> None:
        self._on_frame(Side.GATEWAY, protocol.from_gateway, peer, frame)

    def _on_worker_frame(self, peer: bytes, frame: bytes) -> None:
        self._on_frame(Side.WORKER, protocol.from_worker, peer, frame)

    def _on_frame(self, side: Side, decoder: protocol.Decoder, peer: bytes, frame: bytes) -> None:
        try:
            message, payload = decoder.decode(frame)
        except ProtocolError as error:
            self._feed(Garbled(side, peer, str(error)))
            return
        self._feed(Received(side, peer, message, payload, frame))

    def _feed(self, event: Event) -> None:
        self._carry_out(self.core.handle(event, self._loop.time()))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if type(effect) is Forward:
                sent = self._gateways.send(effect.frame, effect.peer, droppable=True)
                if sent is Sent.FULL:
                    self._feed(Overflowed(effect.peer, effect.rid))
            elif type(effect) is Send:
                socket = self._gateways if effect.side is Side.GATEWAY else self._workers
                sent = socket.send(protocol.encode(effect.message, effect.payload), effect.peer)
                if sent is Sent.GONE:
                    self._feed(Unreachable(effect.side, effect.peer))
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
