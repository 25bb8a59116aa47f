"""Settings of the gateway."""

from pathlib import Path
from typing import ClassVar

from common.config import Settings


class GatewaySettings(Settings, frozen=True):
    """Where the gateway listens, what it trusts, and its bounds."""

    section: ClassVar[str] = "gateway"

    broker: str = "tcp://127.0.0.1:5570"
    listen: str = "127.0.0.1:3000"
    data_dir: Path | None = None
    public_url: str = ""
    """The URL clients dial, ws:// or wss://; challenges are bound to it. Empty: made from `listen`."""
    insecure: bool = False

    origins: tuple[str, ...] = ("*",)
    """Web pages that may connect, as scheme://host[:port]; "*" is any. Others get 403 and no CORS headers."""
    frame_bytes_max: int = 16 * 2**20
    """A client's message; a larger one ends in TOO_LARGE, one a quarter larger in close code 1009."""
    messages_per_s: float = 50.0
    messages_burst: int = 200
    """Messages of one connection; more are answered RATE_LIMITED, and a flood of those closes it with 1008."""
    streams_max: int = 256
    """Streams at once on one connection; one more is answered RATE_LIMITED."""
    outbox_bytes_max: int = 4 * 2**20
    """What waits for one connection; beyond it its streams pause and are refilled by replay when it reads again."""
    stall_s: float = 10.0
    """A connection that reads nothing for so long is closed."""
    authenticate_s: float = 15.0
    request_s: float = 10.0
    """A plain HTTP request must be complete within this."""
    unauthenticated_max: int = 1_000
    """Connections that have not authenticated yet; one more is answered 503."""
    broker_lost_s: float = 30.0
    """How long accepted requests wait for a broker that went away."""
