"""Ollama's HTTP dialect: reading its requests, wording its errors, writing its answers. Pure.

Shapes and words follow Ollama v0.24 (`server/routes.go`, `api/types.go`) as observed from a running server; Go's JSON
encoder decides the details: fields in struct order, zero values left out where they are `omitempty`, `<`, `>` and `&`
escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from json.encoder import encode_basestring
from typing import Any, Final

import msgspec

NS_PER_S: Final = 1_000_000_000
FOREVER_S: Final = math.inf
"""A negative keep_alive: the model stays until somebody unloads it."""

_FOREVER_LIMIT_S: Final = (2**63 - 1) / NS_PER_S
"""Ollama's longest duration, about 292 years: what `expires_at` shows for a model that never expires."""


class ApiError(Exception):
    """An answer other than 200, in Ollama's own words where it has words for the case."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

    def line(self) -> bytes:
        return encode({"error": self.message})


# -- answers ----------------------------------------------------------------------------------------------------------


def _escape_html(text: str) -> str:
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def quote(text: str) -> str:
    """A JSON string as Go writes it: UTF-8 kept, HTML's special characters and the two line separators escaped."""
    quoted = encode_basestring(text)
    if "<" in quoted or ">" in quoted or "&" in quoted:
        quoted = _escape_html(quoted)
    if "\u2028" in quoted or "\u2029" in quoted:
        quoted = quoted.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return quoted


_encoder = msgspec.json.Encoder()
_sorting_encoder = msgspec.json.Encoder(order="sorted")


def encode(value: Any, *, as_map: bool = False) -> bytes:
    """A whole JSON document as Go writes it, without the newline: `as_map` sorts the keys, as Go does for its maps."""
    encoder = _sorting_encoder if as_map else _encoder
    return _escape_html(encoder.encode(value).decode()).encode()


def rfc3339(epoch_ns: int) -> str:
    """A point in time as Go's RFC3339Nano in UTC: trailing zeros of the fraction are dropped."""
    seconds, fraction = divmod(epoch_ns, NS_PER_S)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{fraction:09d}".rstrip("0").rstrip(".") + "Z"


def expiry(now_ns: int, keep_alive_s: float) -> str:
    return rfc3339(now_ns + int(min(keep_alive_s, _FOREVER_LIMIT_S) * NS_PER_S))


# -- model names ------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"(?:\w[\w.-]*(?::\d+)?/)?(?:[\w-][\w.-]*/)?[\w][\w.-]*(?::[\w][\w.-]*)?", re.ASCII)


def full_name(name: str) -> str:
    """The name under which a model is kept: without the default registry, with its tag, in lower case.

    Raises ValueError when it is no name at all.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("invalid model name")
    short = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return short if ":" in short.rpartition("/")[2] else f"{short}:latest"


# -- requests ---------------------------------------------------------------------------------------------------------

_UNITS_S: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"[+-]?(?:0|(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h))+)")


def parse_keep_alive(value: Any) -> float | None:
    """`keep_alive` in seconds, given as such or as a Go duration ("5m", "1h30m"); negative is forever, None unset."""
    match value:
        case None:
            return None
        case bool():
            raise ApiError(400, "Unsupported type: 'bool'")
        case int() | float():
            seconds = float(value)
        case str():
            if not _DURATION.fullmatch(value):
                raise ApiError(400, f"time: invalid duration {quote(value)}")
            parts = re.findall(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)", value)
            seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
            if value.startswith("-"):
                seconds = -seconds
        case _:
            raise ApiError(400, f"Unsupported type: '{go_kind(value)}'")
    return FOREVER_S if seconds < 0 else seconds


@dataclass(slots=True, frozen=True)
class Options:
    """What a request may set, with Ollama's defaults. Of the load-time options only `num_ctx` has an effect here."""

    num_ctx: int = 0
    num_keep: int = 4
    seed: int = -1
    num_predict: int = -1
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    temperature: float = 0.8
    repeat_penalty: float = 1.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)


def parse_options(values: dict[str, Any]) -> Options:
    """Options by Ollama's rules: unknown keys and nulls are ignored, a wrong type is (as there) a 500."""
    known: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = values.get(name)
        if value is None:
            continue
        if isinstance(default, list):
            if not isinstance(value, list):
                raise ApiError(500, f'option "{name}" must be of type array')
            if not all(isinstance(item, str) for item in value):
                raise ApiError(500, f'option "{name}" must be of an array of strings')
            known[name] = [item for item in value if item]
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ApiError(
                500, f'option "{name}" must be of type {"float32" if isinstance(default, float) else "integer"}'
            )
        else:
            known[name] = type(default)(value)
    return Options(**known)


_DEFAULTS: Final[dict[str, int | float | list[str]]] = {
    name: getattr(Options(), name) for name in Options.__dataclass_fields__
}


@dataclass(slots=True, frozen=True)
class Message:
    role: str
    content: str


@dataclass(slots=True, frozen=True)
class Request:
    """The fields of generate, chat and embed that matter here; each handler looks at its own."""

    model: str
    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: str = ""
    context: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    input: list[str] = field(default_factory=list)
    images: bool = False
    tools: bool = False
    stream: bool = True
    raw: bool = False
    think: bool = False
    truncate: bool = True
    dimensions: int = 0
    logprobs: int | None = None
    """How many alternatives to tell per token; None is no log probabilities."""
    schema: dict[str, Any] | None = None
    keep_alive_s: float | None = None
    render_only: bool = False
    options: dict[str, Any] = field(default_factory=dict)


GoTypes = Mapping[str, tuple[type | tuple[type, ...], str]]
"""Of the fields of a request: what is accepted, and what Ollama's wording calls it."""

_GO_TYPES: Final[GoTypes] = {
    "model": (str, "string"),
    "name": (str, "string"),
    "prompt": (str, "string"),
    "suffix": (str, "string"),
    "system": (str, "string"),
    "template": (str, "string"),
    "context": (list, "[]int"),
    "messages": (list, "[]api.Message"),
    "images": (list, "[]api.ImageData"),
    "tools": (list, "api.Tools"),
    "stream": (bool, "bool"),
    "raw": (bool, "bool"),
    "truncate": (bool, "bool"),
    "dimensions": (int, "int"),
    "logprobs": (bool, "bool"),
    "top_logprobs": (int, "int"),
    "_debug_render_only": (bool, "bool"),
    "options": (dict, "map[string]interface {}"),
}


def go_kind(value: Any) -> str:
    """What Go's decoder calls a JSON value."""
    match value:
        case bool():
            return "bool"
        case str():
            return "string"
        case int() | float():
            return "number"
        case list():
            return "array"
        case _:
            return "object"


def check(value: Any, kind: type | tuple[type, ...], where: str, go_type: str) -> None:
    """ApiError 400 in Go's words when `value`, found `where`, is not of `kind`."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        literal = f" {value}" if kind is int and isinstance(value, float) else ""
        raise ApiError(400, f"json: cannot unmarshal {go_kind(value)}{literal} into Go {where} of type {go_type}")


def parse_body(body: bytes, struct: str, types: GoTypes = _GO_TYPES, package: str = "api") -> dict[str, Any]:
    """The JSON object of a request, nulls dropped. `package` and `struct` are the Go type Ollama's wording names."""
    if not body.strip():
        raise ApiError(400, "missing request body" if package == "api" else "EOF")
    try:
        values = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise ApiError(400, f"invalid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"json: cannot unmarshal {go_kind(values)} into Go value of type {package}.{struct}")
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in values.items():
        if expected := types.get(name):
            check(value, expected[0], f"struct field {struct}.{name}", expected[1])
    return values


def parse_request(body: bytes, struct: str) -> Request:
    """A request of generate, chat, embed or embeddings; ApiError 400 in Ollama's words when it makes no sense."""
    return to_request(parse_body(body, struct), struct)


def to_request(values: dict[str, Any], struct: str) -> Request:
    """The request in a native body, given without nulls and with its own fields' types already checked."""
    for index in (context := values.get("context", [])):
        check(index, int, f"struct field {struct}.context", "int")
    top_logprobs = values.get("top_logprobs", 0)
    if not 0 <= top_logprobs <= 20:
        raise ApiError(400, "top_logprobs must be between 0 and 20")
    return Request(
        model=values.get("model", ""),
        prompt=values.get("prompt", ""),
        suffix=values.get("suffix", ""),
        system=values.get("system", ""),
        template=values.get("template", ""),
        context=context,
        messages=[_parse_message(item, struct) for item in values.get("messages", [])],
        input=_parse_input(values.get("input")),
        images=bool(values.get("images")) or any(item.get("images") for item in values.get("messages", [])),
        tools=bool(values.get("tools")),
        stream=values.get("stream", True),
        raw=values.get("raw", False),
        think=_parse_think(values.get("think")),
        truncate=values.get("truncate", True),
        dimensions=values.get("dimensions", 0),
        logprobs=top_logprobs if values.get("logprobs") else None,
        schema=_parse_format(values.get("format")),
        keep_alive_s=parse_keep_alive(values.get("keep_alive")),
        render_only=values.get("_debug_render_only", False),
        options=values.get("options", {}),
    )


def _parse_message(item: Any, struct: str) -> Message:
    check(item, dict, f"struct field {struct}.messages", "api.Message")
    fields = {name: item[name] for name in ("role", "content") if item.get(name) is not None}
    for name, value in fields.items():
        check(value, str, f"struct field {struct}.messages.{name}", "string")
    return Message(fields.get("role", "").lower(), fields.get("content", ""))


def _parse_input(value: Any) -> list[str]:
    match value:
        case None | "":
            return []
        case str():
            return [value]
        case list() if all(isinstance(item, str) for item in value):
            return value
        case _:
            raise ApiError(400, "invalid input type")


def _parse_think(value: Any) -> bool:
    match value:
        case None:
            return False
        case bool():
            return value
        case "high" | "medium" | "low" | "max":
            return True
        case str():
            levels = '"high", "medium", "low", "max", true, or false'
            raise ApiError(400, f"invalid think value: {quote(value)} (must be {levels})")
        case _:
            levels = '"high", "medium", "low", "max", true, or false'
            raise ApiError(400, f"think must be a boolean or string ({levels})")


def _parse_format(value: Any) -> dict[str, Any] | None:
    """The JSON schema that constrains the answer; "json" asks for any object. Ollama finds out late, hence the 500."""
    match value:
        case None | "":
            return None
        case "json":
            return {"type": "object"}
        case dict():
            return value
        case _:
            given = quote(encode(value).decode())
            raise ApiError(500, f'invalid format: {given}; expected "json" or a valid JSON Schema object')


def join_messages(messages: list[Message]) -> str:
    """The prompt for a model without a template of its own: the contents, with a blank line between them.

    So one user message is its own prompt, and a trailing assistant message is continued.
    """
    return "\n\n".join(message.content for message in messages if message.content)


def normalize(vector: list[float]) -> list[float]:
    """Scaled to length 1; ApiError 400 when a value is not a number."""
    length = math.sqrt(sum(value * value for value in vector))
    if not math.isfinite(length):
        raise ApiError(400, "embedding contains NaN or Inf values")
    return [value / max(length, 1e-12) for value in vector]


def human_count(number: int) -> str:
    """A count of parameters as Ollama shows it: 113K, 1.12M, 134.52M, 7B, 7.2B."""
    for unit, suffix, digits in ((10**9, "B", 1), (10**6, "M", 2)):
        if number >= unit:
            return f"{number // unit}{suffix}" if number % unit == 0 else f"{number / unit:.{digits}f}{suffix}"
    return f"{number / 1000:.0f}K" if number >= 1000 else str(number)
