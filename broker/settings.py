"""Settings of the broker."""

from typing import ClassVar

from broker.rules import Rules
from common.config import Amount, Bytes, PositiveSeconds, Seconds, Settings, refuse_unbindable


class BrokerSettings(Settings, frozen=True):
    """Where the broker listens, and its bounds."""

    section: ClassVar[str] = "broker"

    gateways: str = "tcp://127.0.0.1:5570"
    workers: str = "tcp://127.0.0.1:5571"
    insecure: bool = False

    queue_max: Amount = 10_000
    """Requests that may wait in all; one more is answered QUEUE_FULL."""
    queue_client_max: Amount = 1_000
    """Requests of one client that may wait."""
    queue_bytes_max: Bytes = 512 * 2**20
    """Bodies of all requests that wait or have not started."""
    unserved_s: Seconds = 30.0
    """How long a request waits for a model that was there and is gone."""
    settle_s: Seconds = 5.0
    """How long a broker that just started waits for its workers before it says that a model does not exist."""
    ack_s: PositiveSeconds = 60.0
    """How long an ended request waits for its gateway's acknowledgement."""
    recover_s: Seconds = 10.0
    """How long a request that another broker had leased waits for its worker's claim, or a claim for its gateway."""
    gateway_grace_s: Seconds = 10.0
    """How long a request outlives its gateway, if its client's own grace is not longer."""
    rules: tuple[str, ...] = ()
    """Which hosts may serve what, as `model=PATTERN on KEY=VALUE` or `client=PATTERN not host=NAME`."""
    ended_max: Amount = 50_000
    """Ended requests that clients could still resume; beyond it the oldest are forgotten."""

    def __post_init__(self) -> None:
        refuse_unbindable(self.gateways, "--gateways")
        refuse_unbindable(self.workers, "--workers")
        Rules(self.rules)
