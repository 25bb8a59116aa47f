"""Settings of the broker."""

from typing import ClassVar

from common.config import Settings


class BrokerSettings(Settings, frozen=True):
    """Where the broker listens, and its bounds."""

    section: ClassVar[str] = "broker"

    gateways: str = "tcp://127.0.0.1:5570"
    workers: str = "tcp://127.0.0.1:5571"
    insecure: bool = False

    queue_max: int = 10_000
    """Requests that may wait in all; one more is answered QUEUE_FULL."""
    queue_client_max: int = 1_000
    """Requests of one client that may wait."""
    queue_bytes_max: int = 512 * 2**20
    """Bodies of all requests that wait or have not started."""
    unserved_s: float = 30.0
    """How long a request waits for a model that was there and is gone."""
    settle_s: float = 5.0
    """How long a broker that just started waits for its workers before it says that a model does not exist."""
    ack_s: float = 60.0
    """How long an ended request waits for its gateway's acknowledgement."""
