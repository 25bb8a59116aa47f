"""Settings of the gateway."""

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from common.config import Amount, Bytes, PositiveSeconds, Seconds, Settings, host_port, tcp_addresses
from common.errors import UsageError


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
    auto_pull: tuple[str, ...] = ()
    """Patterns of models that are pulled when somebody asks for one that no host has (gateway/autopull.py)."""
    auto_pull_s: PositiveSeconds = 600.0
    """How long an HTTP request waits for such a pull; then it is answered 503, and the pull goes on for a while."""
    num_ctx: tuple[str, ...] = ()
    """PATTERN=N, the first that matches a model: its requests by Ollama's API get this num_ctx, whatever they say."""
    origins: tuple[str, ...] = ("*",)
    """Web pages that may connect, as scheme://host[:port]; "*" is any. Others get 403 and no CORS headers."""
    frame_bytes_max: Bytes = 16 * 2**20
    """A client's message; a larger one ends in TOO_LARGE, one a quarter larger in close code 1009."""
    body_bytes_max: Bytes = 256 * 2**20
    """The body of an HTTP request for inference."""
    blob_bytes_max: Bytes = 256 * 2**30
    """A file that is sent for a model that is to be created."""
    spool_bytes_max: Bytes = 512 * 2**30
    """All such bodies that are too large for a message together; they are kept in files. Beyond it: QUEUE_FULL."""
    spool_dir: Path | None = None
    """The folder of these files, which have no names; None: `data_dir`."""
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
        for rule in self.num_ctx:
            if not re.fullmatch(r".+=[1-9]\d{0,8}", rule, re.ASCII):
                raise UsageError(
                    f"num_ctx of [gateway] must have entries PATTERN=N, like llama3.2:*=8192, not {rule!r}"
                )

    def num_ctx_of(self, model: str) -> int | None:
        """The num_ctx that a model, by its full name, is always loaded with; None if that is left to clients."""
        for rule in self.num_ctx:
            pattern, _, number = rule.rpartition("=")
            if fnmatchcase(model, pattern):
                return int(number)
        return None

    @property
    def brokers(self) -> list[str]:
        """`broker`, address by address."""
        return tcp_addresses(self.broker, "--broker")
