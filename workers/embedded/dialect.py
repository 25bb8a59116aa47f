"""How one call is read and its answer written: here in Ollama's own words.

The handlers know native requests and native documents only. The dialects of other APIs (`openai`, `anthropic`) derive
from `Native` and translate at both ends, just as Ollama's own middleware stands before its native handlers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from workers.embedded.wire import ApiError, Request, encode, parse_request, quote, rfc3339

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.embedded.engine import Piece


class Native:
    """One call of a native route. `read` comes first, then either `document` or `pieces` and one `last`."""

    media_type: ClassVar = "application/json; charset=utf-8"
    stream_headers: ClassVar[Sequence[tuple[bytes, bytes]]] = [(b"content-type", b"application/x-ndjson")]
    events = False
    """Whether the answer is a stream of events even when there is nothing to stream; known once the body is read."""

    def __init__(self, struct: str) -> None:
        self._struct = struct

    def read(self, body: bytes) -> Request:
        """The request; ApiError when it makes no sense."""
        request = parse_request(body, self._struct)
        chat = self._struct == "ChatRequest"
        self._head = f'{{"model":{quote(request.model)},"created_at":"'
        self._middle = '","message":{"role":"assistant","content":' if chat else '","response":'
        self._tail = '},"done":false' if chat else ',"done":false'
        return request

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        """A line for each piece, all with the same `created_at`: they became ready together."""
        start = f"{self._head}{rfc3339(time.time_ns())}{self._middle}"
        tail = self._tail
        return "".join(
            [
                f"{start}{quote(text)}{tail}}}\n"
                if logprobs is None
                else f'{start}{quote(text)}{tail},"logprobs":{encode(logprobs).decode()}}}\n'
                for text, logprobs in pieces
            ]
        ).encode()

    def last(self, native: dict[str, Any]) -> bytes:
        """The end of a stream, from the native document that ends it."""
        return encode(native) + b"\n"

    def document(self, native: dict[str, Any]) -> bytes:
        """The whole answer, from the native one."""
        return encode(native)

    def error(self, error: ApiError) -> bytes:
        """The document of a refusal."""
        return error.line()

    def broken(self, error: ApiError) -> bytes:
        """The end of a stream that fails: nothing of what `last` would have said."""
        return error.line() + b"\n"


def native(model: str, text: str = "", *, chat: bool, done: bool, **fields: Any) -> dict[str, Any]:
    """A document of `/api/chat` or `/api/generate`."""
    # A prompt that was only rendered has, in Ollama, a message with nothing in it.
    role = "" if "_debug_info" in fields else "assistant"
    content = {"message": {"role": role, "content": text}} if chat else {"response": text}
    return {"model": model, "created_at": rfc3339(time.time_ns()), **content, "done": done, **fields}


def event(value: Any, name: str = "", *, as_map: bool = False) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encode(value, as_map=as_map) + b"\n\n"
