"""OpenAI's dialect, as Ollama v0.24 speaks it (`openai/openai.go`, `openai/responses.go`, `middleware/openai.go`).

What Ollama ignores is ignored; what the engine cannot do (images, tools, thinking) the native handler refuses.
Two things v0.24 does not know are taken as well: `max_completion_tokens`, and a prompt that is a list of one string.
"""

from __future__ import annotations

import base64
import secrets
import struct
import time
from abc import ABC, abstractmethod
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from workers.embedded.dialect import Native, event
from workers.embedded.wire import (
    NS_PER_S,
    ApiError,
    GoTypes,
    Request,
    check,
    encode,
    go_kind,
    parse_body,
    quote,
    to_request,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.embedded.engine import Model, Piece

_TYPES: Final[GoTypes] = {
    **dict.fromkeys(["model", "suffix", "instructions", "encoding_format", "truncation"], (str, "string")),
    **dict.fromkeys(["stream", "background", "_debug_render_only"], (bool, "bool")),
    **dict.fromkeys(["max_tokens", "max_completion_tokens", "max_output_tokens", "seed"], (int, "int")),
    **dict.fromkeys(["top_logprobs", "dimensions"], (int, "int")),
    **dict.fromkeys(["temperature", "top_p", "frequency_penalty", "presence_penalty"], ((int, float), "float64")),
    "messages": (list, "[]openai.Message"),
    "tools": (list, "[]api.Tool"),
    "stream_options": (dict, "openai.StreamOptions"),
    "reasoning": (dict, "openai.Reasoning"),
}
JSON: Final = "application/json"
_MARK: Final = "\0"


def model(name: str, model: Model) -> dict[str, Any]:
    """A model as `/v1/models` tells it; its owner is the namespace of its name."""
    owner = name.split("/")[-2] if "/" in name else "library"
    created = int(datetime.fromisoformat(model.modified_at).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


def refusal(error: ApiError) -> bytes:
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(error.status, "api_error")
    return encode({"error": {"message": error.message, "type": kind, "param": None, "code": None}}) + b"\n"


def pick(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of `names` that are given."""
    return {name: values[name] for name in names if name in values}


class _OpenAI(Native):
    media_type: ClassVar = JSON
    stream_headers: ClassVar[Sequence[tuple[bytes, bytes]]] = [(b"content-type", b"text/event-stream")]

    def error(self, error: ApiError) -> bytes:
        return refusal(error)


# -- chat and text completions ----------------------------------------------------------------------------------------


class _Completions(_OpenAI, ABC):
    """What `/v1/chat/completions` and `/v1/completions` have in common: one choice, chunk by chunk."""

    @abstractmethod
    def _chunk(self, text: str, reason: str | None = None, logprobs: list[dict[str, Any]] | None = None) -> Any:
        """A chunk of the stream, its keys in the order of Ollama's fields."""

    def _begin(self, prefix: str, values: dict[str, Any]) -> None:
        self._identity = {"id": f"{prefix}-{secrets.randbelow(999)}"}
        self._model = {"model": values.get("model", ""), "system_fingerprint": "fp_ollama"}
        self._usage_wanted = bool(values.get("stream_options", {}).get("include_usage"))
        self.events = values.get("stream", False)

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        before, after = event(self._chunk(_MARK)).decode().split(quote(_MARK))
        return b"".join(
            event(self._chunk(text, None, logprobs)) if logprobs else f"{before}{quote(text)}{after}".encode()
            for text, logprobs in pieces
        )

    def last(self, native: dict[str, Any]) -> bytes:
        chunk = self._chunk("", native.get("done_reason"))
        usage = event(chunk | {"choices": [], "usage": _usage(native)}) if self._usage_wanted else b""
        return event(chunk) + (usage + b"data: [DONE]\n\n" if native["done"] else b"")

    def broken(self, error: ApiError) -> bytes:
        # Ollama takes the native line with the error for one with nothing in it; there is no [DONE].
        return event(self._chunk("") | {"model": ""})


class Chat(_Completions):
    """A call of `/v1/chat/completions`."""

    def read(self, body: bytes) -> Request:
        values = parse_body(body, self._struct, {**_TYPES, "logprobs": (bool, "bool")}, "openai")
        if not values.get("messages"):
            raise ApiError(400, "[] is too short - 'messages'")
        if isinstance(stops := values.get("stop"), list):
            values["stop"] = [stop for stop in stops if isinstance(stop, str)]
        self._begin("chatcmpl", values)
        effort = values["reasoning"].get("effort") if "reasoning" in values else values.get("reasoning_effort")
        match values.get("response_format"):
            case {"type": "json_object"}:
                form: Any = "json"
            case {"type": "json_schema", "json_schema": {"schema": form}}:
                pass
            case _:
                form = None
        native = pick(values, "model", "tools", "logprobs", "top_logprobs", "_debug_render_only") | {
            "messages": [turn for message in values["messages"] for turn in _turns(message)],
            "options": _options(values, "max_completion_tokens", "max_tokens"),
            "format": form,
            "stream": self.events,
            "think": _think(effort, f"'{effort}'"),
        }
        return to_request(native, "ChatRequest")

    def _chunk(self, text: str, reason: str | None = None, logprobs: list[dict[str, Any]] | None = None) -> Any:
        return self._choice(
            "chat.completion.chunk", {"delta": {"role": "assistant", "content": text}}, reason, logprobs
        )

    def document(self, native: dict[str, Any]) -> bytes:
        message = {"message": native["message"]}
        whole = self._choice("chat.completion", message, native.get("done_reason"), native.get("logprobs"))
        return encode(whole | {"usage": _usage(native)} | pick(native, "_debug_info")) + b"\n"

    def _choice(
        self, kind: str, said: dict[str, Any], reason: str | None, logprobs: list[dict[str, Any]] | None
    ) -> dict[str, Any]:
        choice = {"index": 0, **said, "finish_reason": reason}
        if logprobs:
            choice["logprobs"] = {"content": logprobs}
        return {**self._identity, "object": kind, "created": _now_s(), **self._model, "choices": [choice]}


class Completions(_Completions):
    """A call of `/v1/completions`. Ollama tells neither log probabilities nor a rendered prompt here."""

    def read(self, body: bytes) -> Request:
        values = parse_body(body, self._struct, {**_TYPES, "logprobs": (int, "int")}, "openai")
        match values.get("prompt", ""):
            case [str(prompt)]:
                pass
            case prompt:
                check(prompt, str, "struct field CompletionRequest.prompt", "string")
        self._begin("cmpl", values)
        native = pick(values, "model", "suffix", "_debug_render_only") | {
            "prompt": prompt,
            "options": _options(values, "max_tokens"),
            "stream": self.events,
            "top_logprobs": max(values.get("logprobs", 0), 0),
        }
        return to_request(native, "GenerateRequest")

    def _chunk(self, text: str, reason: str | None = None, logprobs: list[dict[str, Any]] | None = None) -> Any:
        choices = [{"text": text, "index": 0, "finish_reason": reason}]
        head = {**self._identity, "object": "text_completion", "created": _now_s()}
        usage = {"usage": _usage({})} if self._usage_wanted else {}
        return {**head, "choices": choices, **self._model, **usage}

    def document(self, native: dict[str, Any]) -> bytes:
        whole = self._chunk(native["response"], native.get("done_reason"))
        choices = whole.pop("choices")  # after the model's name here, before it in a chunk
        return encode({**whole, "choices": choices, "usage": _usage(native)}) + b"\n"


def _turns(message: Any) -> list[dict[str, Any]]:
    """The native messages that one of OpenAI's becomes: each of its parts is a message, as in Ollama."""
    check(message, dict, "struct field ChatCompletionRequest.messages", "openai.Message")
    match message.get("content"):
        case str(text):
            parts: list[dict[str, Any]] = [{"content": text}]
        case list(content):
            parts = [_part(part) for part in content]
        case content:
            if message.get("tool_calls") is None:
                raise ApiError(400, f"invalid message content type: {_go_type(content)}")
            parts = [{}]
    return [{"role": message.get("role"), **part} for part in parts]


def _part(part: Any) -> dict[str, Any]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"content": text}
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
            if url.startswith(("http://", "https://")):
                raise ApiError(400, "image URLs are not currently supported, please use base64 encoded data instead")
            return {"images": [url]}
        case {"type": "input_audio", "input_audio": {"data": str(audio)}}:
            return {"images": [audio]}
        case _:
            raise ApiError(400, "invalid message format")


def _options(values: dict[str, Any], *limits: str) -> dict[str, Any]:
    """The native options; the last of `limits` that is given bounds the answer."""
    given = pick(values, "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty")
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, **given}
    for limit in limits:
        options |= {"num_predict": values[limit]} if limit in values else {}
    match values.get("stop"):
        case str(stop):
            options["stop"] = [stop]
        case list(stops):
            for stop in stops:
                if not isinstance(stop, str):
                    raise ApiError(400, f"invalid type for 'stop' field: {_go_type(stop)}")
            options["stop"] = stops
    return options


def _think(effort: Any, quoted: str) -> Any:
    if effort and effort not in ("high", "medium", "low", "max", "none"):
        allowed = '"high", "medium", "low", "max", or "none"'
        raise ApiError(400, f"invalid reasoning value: {quoted} (must be {allowed})")
    return False if effort == "none" else effort or None


def _go_type(value: Any) -> str:
    """How Go names the type of a value that may be anything."""
    kinds = {"number": "float64", "array": "[]interface {}", "object": "map[string]interface {}"}
    return "<nil>" if value is None else kinds.get(kind := go_kind(value), kind)


def _usage(native: dict[str, Any]) -> dict[str, int]:
    read, written = native.get("prompt_eval_count", 0), native.get("eval_count", 0)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _now_s() -> int:
    return time.time_ns() // NS_PER_S


# -- embeddings -------------------------------------------------------------------------------------------------------


class Embeddings(_OpenAI):
    """A call of `/v1/embeddings`."""

    def read(self, body: bytes) -> Request:
        values = parse_body(body, self._struct, _TYPES, "openai")
        form = values.get("encoding_format", "")
        if form.lower() not in ("", "float", "base64"):
            supported = "Supported values: ['float', 'base64']."
            raise ApiError(400, f"Invalid value for 'encoding_format' = {form}. {supported}")
        self._base64 = form.lower() == "base64"
        if (texts := values.get("input")) in (None, []):
            raise ApiError(400, "invalid input")
        return to_request(
            pick(values, "model", "dimensions") | {"input": [""] if texts == "" else texts}, "EmbedRequest"
        )

    def document(self, native: dict[str, Any]) -> bytes:
        data = []
        for index, vector in enumerate(native["embeddings"]):
            shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if self._base64 else vector
            data.append({"object": "embedding", "embedding": shown, "index": index})
        tokens = native.get("prompt_eval_count", 0)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return encode({"object": "list", "data": data, "model": native["model"], "usage": usage}) + b"\n"


# -- responses --------------------------------------------------------------------------------------------------------

_RESPONSE: Final[dict[str, Any]] = msgspec.json.decode(
    '{"id":"","object":"response","created_at":0,"completed_at":null,"status":"in_progress","incomplete_details":null,'
    '"model":"","previous_response_id":null,"instructions":null,"output":[],"error":null,"tools":[],'
    '"tool_choice":"auto","truncation":"disabled","parallel_tool_calls":true,"text":{"format":{"type":"text"}},'
    '"top_p":1,"presence_penalty":0,"frequency_penalty":0,"top_logprobs":0,"temperature":1,"reasoning":null,'
    '"usage":null,"max_output_tokens":null,"max_tool_calls":null,"store":false,"background":false,'
    '"service_tier":"default","metadata":{},"safety_identifier":null,"prompt_cache_key":null}'
)
_ECHOED: Final = ("model", "truncation", "top_p", "temperature", "max_output_tokens", "background")


class Responses(_OpenAI):
    """A call of `/v1/responses`. Nothing is stored: `previous_response_id` and its like are ignored, as in Ollama.

    Ollama writes the events of a stream from maps, hence with sorted keys, and the whole document from a structure.
    """

    stream_headers: ClassVar = [
        *_OpenAI.stream_headers,
        (b"cache-control", b"no-cache"),
        (b"connection", b"keep-alive"),
    ]

    def read(self, body: bytes) -> Request:
        values = parse_body(body, self._struct, _TYPES, "openai")
        self.events = values.get("stream", False)
        self._item = f"msg_{secrets.randbelow(999_999)}"
        self._sequence = 0
        self._texts: list[str] = []
        effort = values.get("reasoning", {}).get("effort")
        self._response = _RESPONSE | pick(values, *_ECHOED) | {"id": f"resp_{secrets.randbelow(999_999)}"}
        messages: list[dict[str, Any]] = []
        if instructions := values.get("instructions"):
            messages.append({"role": "system", "content": instructions})
            self._response["instructions"] = instructions
        if reasoning := pick(values.get("reasoning", {}), "effort", "summary"):
            self._response["reasoning"] = ({"effort": None, "summary": None} if self.events else {}) | reasoning
        schema = None
        match values.get("text"):
            case {"format": dict(form)}:
                self._response["text"] = {"format": pick(form, "type", "name", "schema", "strict")}
                schema = form.get("schema") if form.get("type") == "json_schema" else None
        match values.get("input", ""):
            case list(items):
                messages += [turn for index, item in enumerate(items) for turn in _input(item, f"input[{index}]")]
            case text:
                messages += [{"role": "user", **_content(text, "input")}] if text != "" else []
        options = {"temperature": 1.0} | pick(values, "temperature", "top_p")
        if "max_output_tokens" in values:
            options["num_predict"] = values["max_output_tokens"]
        native = pick(values, "model", "tools") | {
            "messages": messages,
            "options": options,
            "format": schema,
            "stream": self.events,
            "think": _think(effort, f'"{effort}"'),
        }
        return to_request(native, "ChatRequest")

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        parts = [self._begin()]
        for text in [text for text, _ in pieces if text]:
            if not self._texts:
                item = self._message() | {"status": "in_progress", "content": []}
                parts.append(self._event("output_item.added", output_index=0, item=item))
                parts.append(self._event("content_part.added", **self._place(), part=_output_text("")))
            self._texts.append(text)
            parts.append(
                'event: response.output_text.delta\ndata: {"content_index":0,"delta":'
                f'{quote(text)},"item_id":"{self._item}","logprobs":[],"output_index":0,'
                f'"sequence_number":{self._sequence},"type":"response.output_text.delta"}}\n\n'.encode()
            )
            self._sequence += 1
        return b"".join(parts)

    def last(self, native: dict[str, Any]) -> bytes:
        parts = [self._begin()]
        if self._texts:
            text = "".join(self._texts)
            parts.append(self._event("output_text.done", **self._place(), text=text, logprobs=[]))
            parts.append(self._event("content_part.done", **self._place(), part=_output_text(text)))
            parts.append(self._event("output_item.done", output_index=0, item=self._message()))
        completed = self._completed(native, [self._message()] if self._texts else None)
        return b"".join([*parts, self._event("completed", response=completed)])

    def broken(self, error: ApiError) -> bytes:
        return b""  # as in Ollama: the stream ends without response.completed

    def document(self, native: dict[str, Any]) -> bytes:
        self._texts = [native["message"]["content"]]
        return encode(self._completed(native, [self._message()])) + b"\n"

    def _begin(self) -> bytes:
        if self._sequence:
            return b""
        self._response["created_at"] = _now_s()
        return self._event("created", response=self._response) + self._event("in_progress", response=self._response)

    def _event(self, name: str, **fields: Any) -> bytes:
        value = {"type": f"response.{name}", "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event(value, value["type"], as_map=True)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _message(self) -> dict[str, Any]:
        content = [_output_text("".join(self._texts))]
        return {"id": self._item, "type": "message", "status": "completed", "role": "assistant", "content": content}

    def _completed(self, native: dict[str, Any], output: list[dict[str, Any]] | None) -> dict[str, Any]:
        read, written, both = _usage(native).values()
        counts = {"input_tokens": read, "output_tokens": written, "total_tokens": both}
        details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        times = {"created_at": _now_s(), "completed_at": _now_s()}
        return self._response | times | {"status": "completed", "output": output, "usage": counts | details}


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _input(item: Any, where: str) -> list[dict[str, Any]]:
    """The native messages of an input item. A call of a tool says nothing to a model that has none."""
    check(item, dict, "value", "openai.ResponsesInputItem")
    match item.get("type") or ("message" if item.get("role") else None):
        case "message":
            return [{"role": item.get("role"), **_content(item.get("content") or "", f"{where}: content")}]
        case "function_call_output":
            return [{"role": "tool", **_content(item.get("output") or "", f"{where}: output")}]
        case "function_call":
            return [{"role": "assistant"}]
        case "reasoning":
            return []
        case None:
            raise ApiError(400, f"{where}: input item missing required 'type' field")
        case kind:
            raise ApiError(400, f'{where}: unknown input item type: "{kind}"')


def _content(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"content": value}
    if not isinstance(value, list):
        unfit = f"json: cannot unmarshal {go_kind(value)} into Go value of type []json.RawMessage"
        raise ApiError(400, f"{where} must be a string or array: {unfit}")
    texts: list[str] = []
    images: list[Any] = []
    for index, part in enumerate(value):
        match part:
            case {"type": "input_text" | "output_text", "text": str(text)}:
                texts.append(text)
            case {"type": "input_image", "image_url": image}:
                images.append(image)
            case {"type": "input_file"}:
                raise ApiError(400, "file inputs are not currently supported")
            case _:
                kind = part.get("type", "") if isinstance(part, dict) else go_kind(part)
                raise ApiError(400, f"{where}[{index}]: unknown content type: {kind}")
    return {"content": "".join(texts), "images": images}
