"""What the broker core is told, and what it answers: nothing else crosses between the core and its shell."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from common.protocol import Message


class Side(Enum):
    """Which of the two ROUTERs a peer is on."""

    GATEWAY = "gateway"
    WORKER = "worker"


@dataclass(slots=True, frozen=True)
class Received:
    """A message arrived. `frame` is the whole of it, so that a chunk can be forwarded unchanged."""

    side: Side
    peer: bytes
    message: Any
    payload: bytes
    frame: bytes


@dataclass(slots=True, frozen=True)
class Garbled:
    """A peer sent something that is no message."""

    side: Side
    peer: bytes
    reason: str


@dataclass(slots=True, frozen=True)
class Unreachable:
    """A message to this peer had nowhere to go: its line is down, or it takes nothing any more."""

    side: Side
    peer: bytes


@dataclass(slots=True, frozen=True)
class Overflowed:
    """A chunk for this gateway was dropped because its outbox is full."""

    peer: bytes
    rid: bytes


Event = Received | Garbled | Unreachable | Overflowed


@dataclass(slots=True, frozen=True)
class Send:
    """Send a message to a peer."""

    side: Side
    peer: bytes
    message: Message
    payload: bytes = b""


@dataclass(slots=True, frozen=True)
class Forward:
    """Send a chunk's frame on to a gateway, unchanged; it may be dropped, which is told as `Overflowed`."""

    peer: bytes
    rid: bytes
    frame: bytes


@dataclass(slots=True, frozen=True)
class Supply:
    """Send the frame of a body's part on to a worker, unchanged; it may be dropped: the worker asks for it again."""

    peer: bytes
    frame: bytes


@dataclass(slots=True, frozen=True)
class Note:
    """Something an operator wants to read in the log."""

    event: str
    facts: dict[str, Any]


Effect = Send | Forward | Supply | Note
