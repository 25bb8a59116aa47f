"""What can go wrong, as one tree. Codes are the server's and stable; one that is not known here is a `WeftlineError`.

WeftlineError                 INTERNAL, and any unknown code
├── AuthenticationError       AUTH_FAILED, AUTH_REQUIRED
├── ForbiddenError            FORBIDDEN
├── InvalidRequestError       INVALID_MESSAGE, UNKNOWN_TYPE, DUPLICATE_ID
│   └── TooLargeError         TOO_LARGE
├── NotFoundError             NOT_FOUND
│   └── ModelNotFoundError    MODEL_NOT_FOUND: `.models` are those there are
├── UnavailableError          SHUTTING_DOWN: another try, later or elsewhere, may succeed
│   ├── NoWorkersError        NO_WORKERS
│   ├── QueueFullError        QUEUE_FULL
│   └── RateLimitedError      RATE_LIMITED
│       └── QuotaExceededError  QUOTA_EXCEEDED
├── DeadlineExceededError     DEADLINE_EXCEEDED
├── RequestCancelledError     CANCELLED, or closed on this side before its end
├── WorkerLostError           WORKER_LOST
├── BackendError              BACKEND_ERROR
├── ResumeGapError            RESUME_GAP
├── ProtocolError             PROTOCOL_ERROR: the server sent what cannot be read
├── SlowConsumerError         SLOW_CONSUMER: a stream's buffer stayed full
└── NotConnectedError         NOT_CONNECTED: no connection, and none could be made (also a ConnectionError)
    └── ConnectionLostError   CONNECTION_LOST: the line dropped, and the request could not be resumed

The last three kinds are raised on this side of the line; their codes never cross it.
"""

from __future__ import annotations

from typing import Any


class WeftlineError(Exception):
    """An error with a stable `code` and a `message` for people.

    `request_id` names the request it ended, if it ended one; `partial` is the text that request had delivered, and
    `retry_after_s` how long the server asks to wait before another try.
    """

    code = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        request_id: str | None = None,
        partial: str = "",
        retry_after_s: float | None = None,
        models: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code or type(self).code
        self.message = message
        self.request_id = request_id
        self.partial = partial
        self.retry_after_s = retry_after_s
        self.models = models

    def __str__(self) -> str:
        return f"{self.message} (code: {self.code})"


class AuthenticationError(WeftlineError):
    """The server does not accept this identity or its signature; trying again will not help."""

    code = "AUTH_FAILED"


class ForbiddenError(WeftlineError):
    """The identity is known but may not do this."""

    code = "FORBIDDEN"


class InvalidRequestError(WeftlineError):
    """The server could not take the request as it was written."""

    code = "INVALID_MESSAGE"


class TooLargeError(InvalidRequestError):
    """The request is larger than the server allows."""

    code = "TOO_LARGE"


class NotFoundError(WeftlineError):
    """What the request names does not exist."""

    code = "NOT_FOUND"


class ModelNotFoundError(NotFoundError):
    """No host has the model; `models` are the names of those there are."""

    code = "MODEL_NOT_FOUND"


class UnavailableError(WeftlineError):
    """Not now: the same request may succeed later; see `retry_after_s`."""

    code = "SHUTTING_DOWN"


class NoWorkersError(UnavailableError):
    """No host is connected that could run the request."""

    code = "NO_WORKERS"


class QueueFullError(UnavailableError):
    """The server's queue has no room."""

    code = "QUEUE_FULL"


class RateLimitedError(UnavailableError):
    """This identity has sent too much in too short a time."""

    code = "RATE_LIMITED"


class QuotaExceededError(RateLimitedError):
    """This identity has used up what it was granted."""

    code = "QUOTA_EXCEEDED"


class DeadlineExceededError(WeftlineError):
    """The request's `deadline_ms` passed before its end."""

    code = "DEADLINE_EXCEEDED"


class RequestCancelledError(WeftlineError):
    """The request was cancelled before its end."""

    code = "CANCELLED"


class WorkerLostError(WeftlineError):
    """The host died in mid-stream and the request could not go on elsewhere; `partial` is what it delivered."""

    code = "WORKER_LOST"


class BackendError(WeftlineError):
    """The engine that ran the request failed."""

    code = "BACKEND_ERROR"


class ResumeGapError(WeftlineError):
    """A stream could not be resumed without a gap; `partial` is what had arrived before the line dropped."""

    code = "RESUME_GAP"


class ProtocolError(WeftlineError):
    """The server sent what cannot be read. The connection is dropped: going on could mean a gap in a stream."""

    code = "PROTOCOL_ERROR"


class SlowConsumerError(WeftlineError):
    """A stream was not read while its buffer was full and others waited behind it, so it was stopped."""

    code = "SLOW_CONSUMER"


class NotConnectedError(WeftlineError, ConnectionError):
    """There is no connection and none could be made."""

    code = "NOT_CONNECTED"


class ConnectionLostError(NotConnectedError):
    """The line dropped while the request was running, and it could not go on; `partial` is what had arrived.

    No new line could be had, the server no longer had the request, or resuming was turned off.
    """

    code = "CONNECTION_LOST"


_BY_CODE: dict[str, type[WeftlineError]] = {
    "AUTH_REQUIRED": AuthenticationError,
    "UNKNOWN_TYPE": InvalidRequestError,
    "DUPLICATE_ID": InvalidRequestError,
} | {
    kind.code: kind
    for kind in (
        AuthenticationError,
        ForbiddenError,
        InvalidRequestError,
        TooLargeError,
        NotFoundError,
        ModelNotFoundError,
        UnavailableError,
        NoWorkersError,
        QueueFullError,
        RateLimitedError,
        QuotaExceededError,
        DeadlineExceededError,
        RequestCancelledError,
        WorkerLostError,
        BackendError,
        ResumeGapError,
    )
}


def error_from_message(message: dict[str, Any], partial: str = "") -> WeftlineError:
    """The error that a server's `error` message describes, with the text its request had delivered."""
    code = str(message.get("code") or WeftlineError.code)
    retry_after_ms = message.get("retryAfterMs")
    return _BY_CODE.get(code, WeftlineError)(
        str(message.get("error") or "the server gave no reason"),
        code=code,
        request_id=message.get("id"),
        partial=partial,
        retry_after_s=None if retry_after_ms is None else retry_after_ms / 1000,
        models=tuple(message.get("models") or ()),
    )
