"""How Ollama's, OpenAI's and Anthropic's APIs word a failure: before the answer began, and in its middle. Pure."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Final

import msgspec

from common.errors import Code
from common.protocol import Failed, short_name

STATUS: Final[Mapping[Code, int]] = {
    Code.AUTH_FAILED: 401,
    Code.AUTH_REQUIRED: 401,
    Code.FORBIDDEN: 403,
    Code.INVALID_MESSAGE: 400,
    Code.NOT_FOUND: 404,
    Code.MODEL_NOT_FOUND: 404,
    Code.TOO_LARGE: 413,
    Code.RATE_LIMITED: 429,
    Code.QUEUE_FULL: 503,
    Code.NO_WORKERS: 503,
    Code.SHUTTING_DOWN: 503,
    Code.CANCELLED: 499,
    Code.WORKER_LOST: 502,
    Code.BACKEND_ERROR: 502,
    Code.DEADLINE_EXCEEDED: 504,
}
"""What is not named here is 500."""
RETRY_AFTER_S: Final = 1
"""With 429 and 503, where nobody knows better."""
QUEUE_FULL_TEXT: Final = "server busy, please try again.  maximum pending requests exceeded"
"""Ollama's own words (server/sched.go, ErrMaxQueue), which clients look for."""

_encode = msgspec.json.Encoder().encode


def status_of(failed: Failed) -> int:
    """The engine's own status if it answered with one that HTTP knows, else that of the code."""
    return failed.status if 400 <= failed.status < 600 else STATUS.get(failed.code, 500)


def words_of(path: str, model: str, failed: Failed) -> str:
    """What went wrong, as Ollama would have said it where it has words for it."""
    if failed.code is Code.MODEL_NOT_FOUND and not failed.status:  # else somebody else has found words for it
        if path in ("/api/embed", "/api/embeddings", "/v1/embeddings"):
            return f'model "{short_name(model)}" not found, try pulling it first'
        return f"model '{short_name(model)}' not found"
    return QUEUE_FULL_TEXT if failed.code is Code.QUEUE_FULL else failed.message


class Dialect(ABC):
    """The errors of one API."""

    @abstractmethod
    def document(self, status: int, code: Code, text: str) -> bytes:
        """The body of an answer with that status."""

    @abstractmethod
    def event(self, status: int, code: Code, text: str) -> bytes:
        """What ends a stream that cannot go on, after its last whole line; an event may lack its blank line."""


class Ollama(Dialect):
    """`{"error": "text"}`, also as the last line of a stream (api/types.go, StatusError)."""

    def document(self, status: int, code: Code, text: str) -> bytes:
        # Of a 401 the `ollama` command line prints nothing but this member (api/types.go, AuthorizationError).
        said = {"status": text} if status == 401 else {}
        return _encode({"error": text, "code": code.value, **said})

    def event(self, status: int, code: Code, text: str) -> bytes:
        return self.document(status, code, text) + b"\n"


class OpenAI(Dialect):
    """`{"error": {…}}`. Its clients raise at an event that carries one; a stream without `[DONE]` is none to them."""

    def document(self, status: int, code: Code, text: str) -> bytes:
        kind = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}.get(status)
        kind = kind or {404: "not_found_error", 429: "rate_limit_error"}.get(status, "api_error")
        return _encode({"error": {"message": text, "type": kind, "param": None, "code": code.value}})

    def event(self, status: int, code: Code, text: str) -> bytes:
        return b"\ndata: %b\n\n" % self.document(status, code, text)


class Anthropic(Dialect):
    """`{"type": "error", "error": {…}}`, in a stream as the event `error`."""

    def document(self, status: int, code: Code, text: str) -> bytes:
        kinds = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
        kinds |= {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
        error = {"type": kinds.get(status, "api_error"), "message": text}
        return _encode({"type": "error", "error": error, "request_id": f"req_{secrets.token_hex(12)}"})

    def event(self, status: int, code: Code, text: str) -> bytes:
        return b"\nevent: error\ndata: %b\n\n" % self.document(status, code, text)
