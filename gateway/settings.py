"""Settings of the gateway."""

from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from common.config import Amount, Bytes, PositiveSeconds, Seconds, Settings, host_port, tcp_addresses


class GatewaySettings(Settings, frozen=True):
    """Where the gateway listens, what it trusts, and its bounds."""

    section: ClassVar[str] = "gateway"

    broker: str = "tcp://127.0.0.1:5570"
    """Where the broker waits for gateways; several in order, separated by commas: the first that lives serves."""
    listen: str = "127.0.0.1:3000"
    data_dir: Path | None = None
    public_url: str = ""
    """The URL clients dial, ws:// or wss://; challenges are bound to it. Empty: made from `listen`."""
    insecure: bool = False

    anonymous: bool = False
    """Whether HTTP requests from this very machine need no key. Those of WebSockets always do."""
    pull_copies: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    """On how many hosts a model is pulled that names none; 0: on all."""
    origins: tuple[str, ...] = ("*",)
    """Web pages that may connect, as scheme://host[:port]; "*" is any. Others get 403 and no CORS headers."""
    frame_bytes_max: Bytes = 16 * 2**20
    """A client's message; a larger one ends in TOO_LARGE, one a quarter larger in close code 1009."""
    messages_per_s: Annotated[float, msgspec.Meta(ge=0.001, le=1e6)] = 50.0
    messages_burst: Amount = 200
    """Messages of one connection; more are answered RATE_LIMITED, and a flood of those closes it with 1008."""
    streams_max: Amount = 256
    """Streams at once on one connection; one more is answered RATE_LIMITED."""
    outbox_bytes_max: Bytes = 4 * 2**20
    """What waits for one connection; beyond it its streams pause and are refilled by replay when it reads again."""
    stall_s: PositiveSeconds = 10.0
    """A connection that reads nothing for so long is closed."""
    authenticate_s: PositiveSeconds = 15.0
    request_s: PositiveSeconds = 10.0
    """A plain HTTP request must be complete within this."""
    unauthenticated_max: Amount = 1_000
    """Connections that have not authenticated yet; one more is answered 503."""
    resume_s: Seconds = 60.0
    """How long a request waits for a client that authenticated with `resume`, and how long after its end it is kept."""
    migrate: bool = True
    """Whether a stream whose host dies is continued on another one, if it is plain text."""
    drain_s: Seconds = 30.0
    """After SIGTERM: how long clients that cannot resume may finish what runs."""
    drain_stagger_s: Seconds = 2.0
    """After SIGTERM: the time over which the others are sent away, so that they don't all connect elsewhere at once."""
    broker_lost_s: Seconds = 30.0
    """How long accepted requests wait for a broker that went away; those that can be resumed `resume_s` longer."""

    def __post_init__(self) -> None:
        host_port(self.listen, "--listen")
        tcp_addresses(self.broker, "--broker")

    @property
    def brokers(self) -> list[str]:
        """`broker`, address by address."""
        return tcp_addresses(self.broker, "--broker")
