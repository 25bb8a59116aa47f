"""A broker core under a clock of our own, with every invariant checked after every event."""

from collections.abc import Sequence
from typing import Any, TypeVar

from broker.core import BrokerCore
from broker.events import Effect, Event, Forward, Garbled, Note, Overflowed, Received, Send, Side, Supply, Unreachable
from broker.scheduler import Scheduler
from broker.settings import BrokerSettings
from broker.state import Request
from common.errors import Code
from common.protocol import (
    Ack,
    Admin,
    Assign,
    Attach,
    Beat,
    Bye,
    Cancel,
    Chunk,
    Claim,
    Detach,
    End,
    Engine,
    Failed,
    Hello,
    Message,
    Model,
    Part,
    Query,
    Refused,
    Register,
    Replay,
    Started,
    Stats,
    Submit,
    Want,
    encode,
)
from common.protocol import State as EnginesChanged

M = TypeVar("M", bound=Message)

NONCE = 0xBEEF


def engine(
    *models: str, url: str = "http://e1", slots: int = 1, up: bool = True, resident: Sequence[str] = ()
) -> Engine:
    """An engine with these models, each its own digest."""
    return Engine(
        url=url,
        up=up,
        models=tuple(Model(name=name, digest=f"sha:{name}", slots=slots, resident=name in resident) for name in models),
    )


def rid_of(name: str) -> bytes:
    """A readable request id of the real length."""
    return name.encode().ljust(16, b".")


def claim_of(rid: bytes, attempt: int, top: int = 0, *, ref: str = "", **more: Any) -> Claim:
    """A worker's claim of a lease for `m:latest` on its first engine, of alice's request with this id."""
    facts: dict[str, Any] = {"engine": "http://e1", "digest": "sha:m:latest", "client": "alice", "model": "m:latest"}
    ref = ref or rid.rstrip(b".").decode()
    return Claim(rid=rid, attempt=attempt, top=top, **{**facts, "ref": ref, "path": "/api/generate", **more})


class Harness:
    """Feeds a `BrokerCore`; keeps the effects of the last event, and whatever each peer was sent since it was asked."""

    def __init__(
        self, *, nonce: int = NONCE, now: float = 100.0, scheduler: Scheduler | None = None, **settings: Any
    ) -> None:
        self.now = now
        # Unless a test is about it, a broker that has been up for long: it knows which models there are.
        settings.setdefault("settle_s", 0.0)
        self.nonce = nonce
        self.core = BrokerCore(BrokerSettings(**settings), nonce=nonce, now=self.now, scheduler=scheduler)
        self.effects: list[Effect] = []
        self._sent: dict[bytes, list[tuple[Any, bytes]]] = {}
        self.tick()

    # What happens -----------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> list[Effect]:
        return self._took(self.core.handle(event, self.now))

    def tick(self) -> list[Effect]:
        return self._took(self.core.tick(self.now))

    def wait(self, seconds: float, *, beating: Sequence[bytes] = ()) -> None:
        """Let time pass as the shell does: tick at every deadline of the core; `beating` peers stay alive."""
        end = self.now + seconds
        beat_at = self.now
        while self.now < end:
            self.now = min(end, max(self.core.next_deadline(), self.now + 0.01))
            if self.now >= beat_at:
                beat_at = self.now + 1.0
                for peer in beating:
                    self.feed(Received(_side(peer), peer, Beat(), b"", b""))
            self.tick()

    def from_gateway(self, message: Message, payload: bytes = b"", peer: bytes = b"g1") -> list[Effect]:
        return self.feed(Received(Side.GATEWAY, peer, message, payload, encode(message, payload)))

    def from_worker(self, message: Message, payload: bytes = b"", peer: bytes = b"w1") -> list[Effect]:
        return self.feed(Received(Side.WORKER, peer, message, payload, encode(message, payload)))

    # Gateways ---------------------------------------------------------------------------------------------------------

    def gateway(self, name: str = "g1", *, peer: bytes = b"") -> bytes:
        """A gateway says hello; its routing id is its name unless given."""
        peer = peer or name.encode()
        self.from_gateway(Hello(name=name), peer=peer)
        self.sent(peer)
        return peer

    def submit(
        self, name: str = "r1", *, model: str = "m:latest", body: bytes = b"{}", peer: bytes = b"g1", **more: Any
    ) -> bytes:
        rid = rid_of(name)
        message = Submit(rid=rid, model=model, path="/api/generate", **{"client": "alice", "ref": name, **more})
        self.from_gateway(message, body, peer)
        return rid

    def part(self, rid: bytes, attempt: int, offset: int = 0, *, peer: bytes = b"g1") -> bytes:
        """A part of a body arrives; returns its frame."""
        message = Part(rid=rid, attempt=attempt, offset=offset)
        self.from_gateway(message, b"part", peer)
        return encode(message, b"part")

    def cancel(self, rid: bytes, *, peer: bytes = b"g1", reason: str = "") -> None:
        self.from_gateway(Cancel(rid=rid, reason=reason), peer=peer)

    def ack(self, rid: bytes, *, peer: bytes = b"g1") -> None:
        self.from_gateway(Ack(rid=rid), peer=peer)

    def detach(self, rid: bytes, *, peer: bytes = b"g1") -> None:
        self.from_gateway(Detach(rid=rid), peer=peer)

    def attach(self, ref: str, number: int = 1, *, client: str = "alice", peer: bytes = b"g2") -> None:
        self.from_gateway(Attach(id=number, client=client, ref=ref), peer=peer)

    def admin(self, action: str, target: str, *, peer: bytes = b"g1") -> None:
        self.from_gateway(Admin(id=9, action=action, target=target), peer=peer)

    def replay(self, rid: bytes, attempt: int, start: int = 0, *, peer: bytes = b"g1") -> Replay:
        message = Replay(rid=rid, attempt=attempt, start=start)
        self.from_gateway(message, peer=peer)
        return message

    def query(self, what: str = "fleet", *, peer: bytes = b"g1") -> Any:
        self.sent(peer)
        self.from_gateway(Query(id=7, what=what), peer=peer)
        [answer] = self.sent(peer)
        return answer

    # Workers ----------------------------------------------------------------------------------------------------------

    def worker(
        self,
        name: str = "w1",
        *engines: Engine,
        peer: bytes = b"",
        epoch: str = "e1",
        claims: Sequence[Claim] = (),
        draining: bool = False,
    ) -> bytes:
        """A worker registers, by default with one engine that has `m:latest` once; its routing id is its name."""
        peer = peer or name.encode()
        message = Register(
            name=name,
            epoch=epoch,
            engines=engines or (engine("m:latest"),),
            leases=tuple(claims),
            draining=draining,
        )
        self.from_worker(message, peer=peer)
        return peer

    def chunk(
        self, rid: bytes, attempt: int, seq: int = 0, n: int = 1, *, peer: bytes = b"w1", payload: bytes = b"{}\n"
    ) -> bytes:
        """A chunk arrives; returns its frame."""
        message = Chunk(rid=rid, attempt=attempt, seq=seq, n=n)
        self.from_worker(message, payload, peer)
        return encode(message, payload)

    def started(self, rid: bytes, attempt: int, *, peer: bytes = b"w1") -> Started:
        message = Started(rid=rid, attempt=attempt, status=200, content_type="application/x-ndjson")
        self.from_worker(message, peer=peer)
        return message

    def want(self, rid: bytes, attempt: int, offset: int = 0, *, peer: bytes = b"w1") -> Want:
        message = Want(rid=rid, attempt=attempt, offset=offset, size=100)
        self.from_worker(message, peer=peer)
        return message

    def end(self, rid: bytes, attempt: int, seq: int = 1, *, peer: bytes = b"w1") -> End:
        message = End(rid=rid, attempt=attempt, seq=seq, stats=Stats(done_reason="stop"))
        self.from_worker(message, peer=peer)
        return message

    def failed(self, rid: bytes, attempt: int, *, peer: bytes = b"w1", payload: bytes = b"", **more: Any) -> Failed:
        message = Failed(rid=rid, attempt=attempt, message="engine hiccup", **{"code": Code.BACKEND_ERROR, **more})
        self.from_worker(message, payload, peer)
        return message

    def refused(self, rid: bytes, attempt: int, *, peer: bytes = b"w1") -> None:
        self.from_worker(Refused(rid=rid, attempt=attempt, reason="busy"), peer=peer)

    def engines(self, *engines: Engine, peer: bytes = b"w1", draining: bool = False) -> None:
        self.from_worker(EnginesChanged(engines=engines, draining=draining), peer=peer)

    def bye(self, peer: bytes) -> None:
        self.feed(Received(_side(peer), peer, Bye(), b"", b""))

    def unreachable(self, peer: bytes) -> None:
        self.feed(Unreachable(_side(peer), peer))

    def overflowed(self, rid: bytes, *, peer: bytes = b"g1") -> None:
        self.feed(Overflowed(peer, rid))

    def garbled(self, peer: bytes) -> None:
        self.feed(Garbled(_side(peer), peer, "not a map"))

    # What came of it --------------------------------------------------------------------------------------------------

    def sent(self, peer: bytes = b"g1") -> list[Any]:
        """The messages this peer was sent since it was last asked; a forwarded chunk is its frame."""
        return [message for message, _ in self._sent.pop(peer, [])]

    def payloads(self, peer: bytes) -> list[bytes]:
        """Like `sent`, the payloads."""
        return [payload for _, payload in self._sent.pop(peer, [])]

    def told(self, kind: type[M], peer: bytes = b"g1") -> list[M]:
        """Like `sent`, but only the messages of this type."""
        return [message for message in self.sent(peer) if isinstance(message, kind)]

    def assigned(self, peer: bytes = b"w1") -> Assign:
        """The one assign this worker was sent since it was last asked."""
        [assign] = self.told(Assign, peer)
        return assign

    def notes(self) -> list[str]:
        """The notes of the last event."""
        return [effect.event for effect in self.effects if isinstance(effect, Note)]

    def request(self, rid: bytes) -> Request:
        return self.core.state.requests[rid]

    @property
    def empty(self) -> bool:
        """Nothing is held any more, in any index."""
        core, state = self.core, self.core.state
        return not (
            any((state.requests, +state.phases, state.body_bytes, len(core.scheduler), core._client_waiting))
            or any(gateway.rids or gateway.gapped for gateway in state.gateways.values())
            or any(worker.rids or worker.busy for worker in state.workers.values())
        )

    def _took(self, effects: list[Effect]) -> list[Effect]:
        self.core.validate()
        self.effects = effects
        for effect in effects:
            if isinstance(effect, Send):
                encode(effect.message)  # whatever the core says can be said
                self._sent.setdefault(effect.peer, []).append((effect.message, effect.payload))
            elif isinstance(effect, Forward | Supply):
                self._sent.setdefault(effect.peer, []).append((effect.frame, b""))
        return effects


def _side(peer: bytes) -> Side:
    return Side.GATEWAY if peer.startswith(b"g") else Side.WORKER
