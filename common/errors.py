"""Every error a client, an operator or another process can see, with its stable code.

    FabricError              a request failed; `code` is one of `Code`, the sentence is for people
    ProtocolError            a peer sent something that is not a message of the wire
    ProcessError             a process cannot start or go on; `exit_status` is its exit status
      UsageError      (2)    a flag, a setting or a key is wrong
      UnreachableError (69)  the other side does not answer (EX_UNAVAILABLE of sysexits.h)
      AuthError       (77)   the other side refused who we are (EX_NOPERM of sysexits.h)

A peer's error never ends a server; a `ProcessError` always ends the process that raised it, with a sentence on stderr.
"""

from enum import StrEnum
from typing import ClassVar


class Code(StrEnum):
    """The error codes of the client protocol. A code never changes its meaning and is never reused."""

    AUTH_FAILED = "AUTH_FAILED"
    AUTH_REQUIRED = "AUTH_REQUIRED"
    FORBIDDEN = "FORBIDDEN"
    INVALID_MESSAGE = "INVALID_MESSAGE"
    UNKNOWN_TYPE = "UNKNOWN_TYPE"
    DUPLICATE_ID = "DUPLICATE_ID"
    NOT_FOUND = "NOT_FOUND"
    TOO_LARGE = "TOO_LARGE"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    NO_WORKERS = "NO_WORKERS"
    QUEUE_FULL = "QUEUE_FULL"
    RATE_LIMITED = "RATE_LIMITED"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    WORKER_LOST = "WORKER_LOST"
    BACKEND_ERROR = "BACKEND_ERROR"
    RESUME_GAP = "RESUME_GAP"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    INTERNAL = "INTERNAL"


class FabricError(Exception):
    """A request that failed, told to the client as `error{code, error}`."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ProtocolError(Exception):
    """A frame that is not a message of the wire. The sender is told and counted; nothing else suffers."""


class ProcessError(Exception):
    """A process cannot start or go on. The message says what is wrong and what to do about it."""

    exit_status: ClassVar[int] = 1


class UsageError(ProcessError):
    """A flag, a setting or a key is wrong."""

    exit_status = 2


class UnreachableError(ProcessError):
    """The broker, the gateway or the engine does not answer."""

    exit_status = 69


class AuthError(ProcessError):
    """The gateway does not know this client, or its key."""

    exit_status = 77
