"""Anthropic's dialect, as Ollama v0.24 speaks it (`anthropic/anthropic.go`, `middleware/anthropic.go`).

A wish for thinking is dropped rather than refused: so Ollama does for models that cannot, on this route alone.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, ClassVar, Final

from workers.embedded.dialect import Native, event
from workers.embedded.openai import Responses, pick
from workers.embedded.wire import ApiError, GoTypes, Request, check, encode, parse_body, quote, to_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.embedded.engine import Piece

_TYPES: Final[GoTypes] = {
    "model": (str, "string"),
    "messages": (list, "[]anthropic.MessageParam"),
    "stream": (bool, "bool"),
    "stop_sequences": (list, "[]string"),
    "tools": (list, "[]anthropic.Tool"),
    **dict.fromkeys(["max_tokens", "top_k"], (int, "int")),
    **dict.fromkeys(["temperature", "top_p"], ((int, float), "float64")),
}
_REASONS: Final = {"stop": "end_turn", "length": "max_tokens"}


class Messages(Native):
    """A call of `/v1/messages`."""

    media_type: ClassVar = Responses.media_type
    stream_headers: ClassVar = Responses.stream_headers

    def read(self, body: bytes) -> Request:
        values = parse_body(body, self._struct, _TYPES, "anthropic")
        if not values.get("model"):
            raise ApiError(400, "model is required")
        if values.get("max_tokens", 0) <= 0:
            raise ApiError(400, "max_tokens is required and must be positive")
        if not values.get("messages"):
            raise ApiError(400, "messages is required")
        turns = [turn for message in values["messages"] for turn in _turns(message)]
        system = _text(values.get("system"))
        if system:
            turns.insert(0, {"role": "system", "content": system})
        for stop in (stops := values.get("stop_sequences", [])):
            check(stop, str, "struct field MessagesRequest.stop_sequences", "string")
        self.events = values.get("stream", False)
        self._begun = self._text_begun = False
        identity = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        self._message: dict[str, Any] = {**identity, "model": values["model"]}
        size = len(system.encode()) + sum(_size(message) for message in values["messages"])
        self._estimate = max(size // 4, 1)
        options = {"num_predict": values["max_tokens"], "stop": stops} | pick(values, "temperature", "top_p", "top_k")
        native = pick(values, "model", "tools") | {"messages": turns, "options": options, "stream": self.events}
        return to_request(native, "ChatRequest")

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        parts = [self._begin(self._estimate)]
        texts = [text for text, _ in pieces if text]
        if texts and not self._text_begun:
            self._text_begun = True
            parts.append(_event("content_block_start", index=0, content_block={"type": "text", "text": ""}))
        parts += [
            'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
            f'{{"type":"text_delta","text":{quote(text)}}}}}\n\n'.encode()
            for text in texts
        ]
        return b"".join(parts)

    def last(self, native: dict[str, Any]) -> bytes:
        end = self._end(native)
        parts = [self._begin(end["usage"]["input_tokens"] or self._estimate)]
        if self._text_begun:
            parts.append(_event("content_block_stop", index=0))
        parts.append(_event("message_delta", delta=pick(end, "stop_reason"), usage=end["usage"]))
        return b"".join([*parts, _event("message_stop")])

    def document(self, native: dict[str, Any]) -> bytes:
        text = native["message"]["content"]
        content = [{"type": "text", "text": text}] if text else None
        return encode({**self._message, "content": content, **self._end(native)}) + b"\n"

    def error(self, error: ApiError) -> bytes:
        kinds = {400: "invalid_request_error", 404: "not_found_error", 503: "overloaded_error"}
        told = {"type": kinds.get(error.status, "api_error"), "message": error.message}
        return encode({"type": "error", "error": told, "request_id": f"req_{secrets.token_hex(12)}"}) + b"\n"

    def broken(self, error: ApiError) -> bytes:
        return b""  # as in Ollama: the stream ends without message_stop

    def _begin(self, input_tokens: int) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        usage = {"input_tokens": input_tokens, "output_tokens": 0}
        return _event("message_start", message={**self._message, "content": [], "usage": usage})

    def _end(self, native: dict[str, Any]) -> dict[str, Any]:
        usage = {"input_tokens": native.get("prompt_eval_count", 0), "output_tokens": native.get("eval_count", 0)}
        return {"stop_reason": _REASONS.get(native["done_reason"], "stop_sequence"), "usage": usage}


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)


def _turns(message: Any) -> list[dict[str, Any]]:
    """The native messages that one of Anthropic's becomes: results of tools are messages of their own."""
    check(message, dict, "struct field MessagesRequest.messages", "anthropic.MessageParam")
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, str):
        check(content, list, "struct field MessagesRequest.messages", "[]anthropic.ContentBlock")
        for block in content:
            check(block, dict, "struct field MessagesRequest.messages", "anthropic.ContentBlock")
    images = [block for block in _blocks(content) if block.get("type") == "image"]
    turn = {"role": role, "content": _text(content), "images": images}
    results = [
        {"role": "tool", "content": _text(block.get("content"))}
        for block in _blocks(content)
        if block.get("type") == "tool_result"
    ]
    called = any(block.get("type") == "tool_use" for block in _blocks(content))
    turns = [turn] if turn["content"] or images or called else []
    return results + turns if role == "user" else turns + results


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def _text(content: Any) -> str:
    """The text of a string or of the text blocks in a list."""
    if isinstance(content, str):
        return content
    return "".join(str(block.get("text") or "") for block in _blocks(content) if block.get("type") == "text")


def _size(message: dict[str, Any]) -> int:
    """Bytes, of which Ollama takes four for a token where it tells a count before it has one."""
    calls = [block for block in _blocks(message["content"]) if block.get("type") in ("tool_use", "tool_result")]
    text = str(message.get("role", "")) + _text(message["content"])
    return len(text.encode()) + sum(len(encode(call)) for call in calls)
