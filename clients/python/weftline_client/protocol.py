"""The client's side of the published protocol, without I/O: what is sent, what arrives, and how both are encoded.

A message is a map with its kind in "type". It travels as a JSON text frame, or as the same map in a binary msgpack
frame when both sides agree on the subprotocol `weftline.msgpack`. Unknown keys and kinds are ignored. Times on the wire
are integer milliseconds. `clients/vectors/messages.json` holds one golden message of every kind.
"""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict

import msgpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MSGPACK_SUBPROTOCOL = "weftline.msgpack"

Message = dict[str, Any]


# --- what is sent -----------------------------------------------------------------------------------------------------


class RequestParams(TypedDict, total=False):
    """What every request may carry. A parameter that is absent or None is not sent, and the server's default holds."""

    request_id: str
    """The request's own id; a random one by default. Ids of one identity must not repeat, on whichever of its lines,
    until a minute after the request's end: by its id a request is resumed."""
    options: Mapping[str, Any] | None
    """Sampling and load options, by Ollama's names; `max_tokens` stands for `num_predict`."""
    keep_alive: str | float | None
    """How long the model stays loaded afterwards: "5m", or seconds."""
    priority: Literal["interactive", "normal", "batch"] | None
    deadline_ms: int | None
    """Milliseconds from now after which the answer is worth nothing; the request then ends with DEADLINE_EXCEEDED."""


class GenerateParams(RequestParams, total=False):
    """Parameters of `generate`, with Ollama's meanings."""

    system: str | None
    suffix: str | None
    images: Sequence[str | bytes] | None
    """Each either base64 text or the image's bytes."""
    format: str | Mapping[str, Any] | None
    """"json", or a JSON schema."""
    raw: bool | None
    think: bool | str | None
    migrate: bool | None
    """False: if the host dies in mid-stream, end with WORKER_LOST rather than let another host continue the text."""


class ChatParams(RequestParams, total=False):
    """Parameters of `chat`, with Ollama's meanings."""

    tools: Sequence[Mapping[str, Any]] | None
    format: str | Mapping[str, Any] | None
    think: bool | str | None
    migrate: bool | None


class EmbedParams(RequestParams, total=False):
    """Parameters of `embed`, with Ollama's meanings."""

    truncate: bool | None
    dimensions: int | None


_PARAMS = {
    "generate": GenerateParams.__optional_keys__,
    "chat": ChatParams.__optional_keys__,
    "embed": EmbedParams.__optional_keys__,
}
_WIRE_NAMES = {"keep_alive": "keepAlive", "deadline_ms": "deadlineMs"}


def request_message(kind: str, request_id: str, fields: Message, params: Mapping[str, Any]) -> Message:
    """The message of a `generate`, `chat` or `embed`.

    Raises TypeError for a parameter that the kind does not have.
    """
    if unknown := params.keys() - _PARAMS[kind]:
        raise TypeError(f"{kind}() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    message: Message = {"type": kind, "id": request_id, **fields}
    for name, value in params.items():
        if value is None or name == "request_id":
            continue
        if name == "images":
            value = [b64encode(image).decode() if isinstance(image, bytes) else image for image in value]
        message[_WIRE_NAMES.get(name, name)] = value
    return message


def authenticate_message(client_id: str, signature: str, algorithm: str, *, resume: bool = False) -> Message:
    """The answer to a challenge; `signature` is base64. `resume` has the server keep what runs when the line drops."""
    answer = {"type": "authenticate", "clientId": client_id, "signature": signature, "algorithm": algorithm}
    return answer | {"resume": True} if resume else answer


def resume_message(request_id: str, last_seq: int) -> Message:
    """Asks for the events after `last_seq`, -1 for all, of a request that was sent on a line that has dropped."""
    return {"type": "resume", "id": request_id, "lastSeq": last_seq}


def stop_message(request_id: str) -> Message:
    """Asks the server to end a request; it answers with a `stream_end` whose doneReason is "cancelled"."""
    return {"type": "stop", "id": request_id}


# --- what arrives -----------------------------------------------------------------------------------------------------


class Token(str):
    """A piece of text as the model gave it, empty where the event carried only something else.

    `seq` counts a stream's events from 0. `thinking`, `tool_calls` and `logprobs` are None where the model gave none.
    """

    __slots__ = ("logprobs", "seq", "thinking", "tool_calls")

    seq: int
    thinking: str | None
    tool_calls: list[Message] | None
    logprobs: list[Message] | None

    @classmethod
    def from_message(cls, message: Message, seq: int) -> Self:
        """The token of a `stream_token`."""
        get = message.get
        token = cls(get("token") or "")
        token.seq = seq
        token.thinking = get("thinking")
        token.tool_calls = get("toolCalls")
        token.logprobs = get("logprobs")
        return token


@dataclass(frozen=True, slots=True)
class Queued:
    """Where a request stands in the queue: `position` 1 is next; `eta_ms` is None where the server cannot tell."""

    position: int
    eta_ms: int | None

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """The place that a `queued` tells."""
        return cls(position=message["position"], eta_ms=message.get("etaMs"))


@dataclass(frozen=True, slots=True)
class Pulling:
    """How far a host is with pulling the model: Ollama's words, and of a layer its digest and bytes, else None."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """The progress that a `pulling` tells."""
        get = message.get
        return cls(message["status"], get("digest"), get("total"), get("completed"))


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in ms; None where the server did not say."""

    queue_ms: float | None = None
    load_ms: float | None = None
    first_token_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished generation. Fields that the server did not send are None.

    `done_reason` is "stop", "length", "load" or, after a stop, "cancelled". `migrated` means that the stream went on on
    another host after a failure; `attempts` counts the hosts that worked on it.
    """

    id: str
    model: str
    text: str
    thinking: str
    tool_calls: list[Message]
    total_tokens: int
    elapsed_time_ms: float
    done_reason: str | None
    prompt_tokens: int | None
    host: str | None
    attempts: int | None
    migrated: bool
    timings: Timings

    @classmethod
    def from_message(cls, message: Message, *, model: str, text: str, thinking: str, tool_calls: list[Message]) -> Self:
        """The result that a `stream_end` completes, with what its stream had brought."""
        timings: Message = message.get("timings") or {}
        return cls(
            id=message["id"],
            model=model,
            text=text,
            thinking=thinking,
            tool_calls=tool_calls,
            total_tokens=message["totalTokens"],
            elapsed_time_ms=message["elapsedTime"],
            done_reason=message.get("doneReason"),
            prompt_tokens=message.get("promptTokens"),
            host=message.get("host"),
            attempts=message.get("attempts"),
            migrated=bool(message.get("migrated")),
            timings=Timings(timings.get("queueMs"), timings.get("loadMs"), timings.get("firstTokenMs")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult:
    """Embeddings, one vector for each input in its order."""

    id: str
    model: str
    embeddings: list[list[float]]
    prompt_tokens: int | None
    elapsed_time_ms: float | None

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """The result that an `embed_result` carries."""
        return cls(
            id=message["id"],
            model=message["model"],
            embeddings=message["embeddings"],
            prompt_tokens=message.get("promptTokens"),
            elapsed_time_ms=message.get("elapsedTime"),
        )


# --- how both are encoded ---------------------------------------------------------------------------------------------

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encode(message: Message, *, binary: bool) -> str | bytes:
    """A message as a text frame of JSON or, if `binary`, a frame of msgpack."""
    if not binary:
        return _JSON.encode(message)
    packed: bytes = msgpack.packb(message)
    return packed


def decode(frame: str | bytes) -> Message:
    """The message in a frame: JSON if it is text, msgpack if it is bytes. Raises ValueError if it holds no map."""
    try:
        message = json.loads(frame) if isinstance(frame, str) else msgpack.unpackb(frame)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:  # FormatError and StackError are ValueErrors
        raise ValueError(f"undecodable frame: {error}") from error
    if not isinstance(message, dict):
        raise ValueError("a message must be a map")
    return message
