"""weftline's Python client: stream tokens from many Ollama hosts over one WebSocket.

    async with AsyncClient.from_config("keys/me_config.json") as client:
        async for token in client.generate("Why is the sky blue?", stream=True):
            print(token, end="", flush=True)

`Client` is the same without an event loop, `ConnectionPool` spreads requests over several lines, and
`weftline_client.compat` has the interface of the widespread OllamaClient guides.
"""

from weftline_client.aio import AsyncClient, ConnectionPool, Reconnect, Stream
from weftline_client.errors import (
    AuthenticationError,
    BackendError,
    ConnectionLostError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    ModelNotFoundError,
    NotConnectedError,
    NotFoundError,
    NoWorkersError,
    ProtocolError,
    QueueFullError,
    QuotaExceededError,
    RateLimitedError,
    RequestCancelledError,
    ResumeGapError,
    SlowConsumerError,
    TooLargeError,
    UnavailableError,
    WeftlineError,
    WorkerLostError,
)
from weftline_client.protocol import EmbedResult, Pulling, Queued, Result, Timings, Token
from weftline_client.sync import Client, SyncStream

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "BackendError",
    "Client",
    "ConnectionLostError",
    "ConnectionPool",
    "DeadlineExceededError",
    "EmbedResult",
    "ForbiddenError",
    "InvalidRequestError",
    "ModelNotFoundError",
    "NoWorkersError",
    "NotConnectedError",
    "NotFoundError",
    "ProtocolError",
    "Pulling",
    "QueueFullError",
    "Queued",
    "QuotaExceededError",
    "RateLimitedError",
    "Reconnect",
    "RequestCancelledError",
    "Result",
    "ResumeGapError",
    "SlowConsumerError",
    "Stream",
    "SyncStream",
    "Timings",
    "Token",
    "TooLargeError",
    "UnavailableError",
    "WeftlineError",
    "WorkerLostError",
]
