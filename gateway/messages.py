"""The client's WebSocket protocol, as types: what a client may send and what it hears.

The same maps travel as JSON text frames or, with the subprotocol `weftline.msgpack`, as binary msgpack. Field names are
camelCase on the wire; unknown fields are ignored; `timestamp` is in ms since 1970. docs/api-reference.md describes each
message in words and is checked against this module.
"""

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Raw, Struct

SUBPROTOCOL: Final = "weftline.msgpack"

SMALL: Final = 256 * 1024
VALUES_MAX: Final = 100_000
"""Values (strings, numbers, lists, maps) in a message larger than SMALL: 16 MiB of empty lists would take 1.2 GB and
hold up everyone for 5 s. More of them is a bad message."""

PRIORITIES: Final = ("interactive", "normal", "batch")
DEADLINE_MS_MAX: Final = 86_400_000

Id = Annotated[str, Meta(min_length=1, max_length=128)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]


class FromClient(Struct, frozen=True, kw_only=True, rename="camel", tag_field="type", tag=str.lower):
    """Base of what a client sends."""


class Authenticate(FromClient, frozen=True, kw_only=True):
    """Answer to `challenge`: the signature over the challenge's bytes, in base64.

    With `resume` the client's requests wait for it when its line breaks; their ids must be unique among all it makes.
    """

    client_id: Annotated[str, Meta(max_length=256)]
    signature: Annotated[str, Meta(max_length=4096)]
    algorithm: Annotated[str, Meta(max_length=32)] | None = None
    resume: bool = False


class Job(FromClient, frozen=True, kw_only=True):
    """What every request has. `priority` and `deadline_ms` are for the queue; the rest is Ollama's.

    Without `migrate` a stream whose host dies is not continued on another one.
    """

    id: Id
    model: ModelName
    options: dict[str, Any] = {}
    keep_alive: str | float | None = None
    priority: Annotated[str, Meta(pattern=f"^({'|'.join(PRIORITIES)})$")] = "normal"
    deadline_ms: Annotated[int, Meta(gt=0, le=DEADLINE_MS_MAX)] | None = None
    migrate: bool = True


class Generate(Job, frozen=True, kw_only=True):
    """Stream a completion of a prompt."""

    prompt: str
    system: str | None = None
    suffix: str | None = None
    images: list[str] | None = None
    format: str | dict[str, Any] | None = None
    raw: bool | None = None
    think: bool | str | None = None


class Chat(Job, frozen=True, kw_only=True):
    """Stream the answer to a conversation."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None


class Embed(Job, frozen=True, kw_only=True):
    """Embed one text or several."""

    input: str | list[str]
    truncate: bool | None = None
    dimensions: int | None = None


class Stop(FromClient, frozen=True, kw_only=True):
    """End a stream; it ends with a `stream_end` whose doneReason is "cancelled"."""

    id: Id


class Resume(FromClient, frozen=True, kw_only=True):
    """Go on with a stream after a break, from the event after `last_seq`; -1: from the first."""

    id: Id
    last_seq: Annotated[int, Meta(ge=-1, lt=2**53)]


class Models(FromClient, frozen=True, kw_only=True):
    """Ask which models there are."""


class Ping(FromClient, frozen=True, kw_only=True):
    """Ask for a `pong`."""


class ToClient(Struct, frozen=True, kw_only=True, rename="camel", tag_field="type", omit_defaults=True):
    """Base of what a client hears."""

    timestamp: int


class Challenge(ToClient, frozen=True, kw_only=True, tag="challenge"):
    """Sign this, as it is. The first message on every connection."""

    challenge: str


class AuthResult(ToClient, frozen=True, kw_only=True, tag="auth_result"):
    """Whether the signature was right."""

    success: bool
    error: str | None = None


class Queued(ToClient, frozen=True, kw_only=True, tag="queued"):
    """The request waits for a free slot; `position` counts from 1."""

    id: str
    position: int
    eta_ms: int | None = None


class Pulling(ToClient, frozen=True, kw_only=True, tag="pulling"):
    """No host has the model; it is being pulled. The fields after `model` are those of a line of Ollama's /api/pull."""

    id: str
    model: str
    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


class StreamStart(ToClient, frozen=True, kw_only=True, tag="stream_start"):
    """The engine answered: tokens follow."""

    id: str
    model: str


class StreamToken(ToClient, frozen=True, kw_only=True, tag="stream_token"):
    """A piece of the answer; `seq` rises, and what is not plain text stands beside `token`."""

    id: str
    token: str
    seq: int
    thinking: str | None = None
    tool_calls: Raw | None = None
    logprobs: Raw | None = None


class Timings(Struct, frozen=True, kw_only=True, rename="camel"):
    """Where the time went, in ms: waiting for a slot, loading the model, from the request to its first token."""

    queue_ms: int
    load_ms: int
    first_token_ms: int | None


class StreamEnd(ToClient, frozen=True, kw_only=True, tag="stream_end"):
    """The stream is complete. `done_reason` is "stop", "length", "load", "unload" or "cancelled"."""

    id: str
    total_tokens: int
    elapsed_time: int
    done_reason: str
    prompt_tokens: int
    host: str
    attempts: int
    timings: Timings
    migrated: bool = False


class EmbedResult(ToClient, frozen=True, kw_only=True, tag="embed_result"):
    """The vectors, one per input, and the tokens they took."""

    id: str
    model: str
    embeddings: list[list[float]]
    prompt_tokens: int
    elapsed_time: int


class ErrorMessage(ToClient, frozen=True, kw_only=True, tag="error"):
    """A request (with `id`) or a message failed. `code` is stable, `error` is for people."""

    error: str
    code: str
    id: str | None = None
    models: tuple[str, ...] | None = None
    retry_after_ms: int | None = None


class ModelsResult(ToClient, frozen=True, kw_only=True, tag="models_result"):
    """The models there are, by name; `:latest` is dropped."""

    models: tuple[str, ...]


class Pong(ToClient, frozen=True, kw_only=True, tag="pong"):
    """Answer to `ping`."""


class Draining(ToClient, frozen=True, kw_only=True, tag="draining"):
    """The gateway is going to close this connection: start nothing more on it."""


ClientMessage = Authenticate | Generate | Chat | Embed | Stop | Resume | Models | Ping
ServerMessage = (
    Challenge
    | AuthResult
    | Queued
    | Pulling
    | StreamStart
    | StreamToken
    | StreamEnd
    | EmbedResult
    | ErrorMessage
    | ModelsResult
    | Pong
    | Draining
)


class Codec:
    """One of the two encodings of a connection."""

    def __init__(self, *, binary: bool) -> None:
        self.binary = binary
        flavour: Any = msgspec.msgpack if binary else msgspec.json
        self.encode = flavour.Encoder().encode
        self._decode = flavour.Decoder(ClientMessage).decode
        self._decode_any = flavour.Decoder().decode

    def decode(self, data: bytes | str) -> Any:
        """Decode a client's message.

        Raises:
            BadMessage: it isn't one.
        """
        if self.binary and isinstance(data, str):
            raise BadMessage("this connection speaks msgpack: send binary frames")
        if len(data) > SMALL and self._values(data) > VALUES_MAX:
            raise BadMessage(f"a message may hold at most {VALUES_MAX} values")
        try:
            return self._decode(data)
        except msgspec.ValidationError as error:
            raise self._diagnose(data, str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadMessage(f"not {'msgpack' if self.binary else 'JSON'}: {error}") from None

    def _values(self, data: bytes | str) -> int:
        """How many values the message holds, without making them; it need not be well-formed."""
        if self.binary:
            assert isinstance(data, bytes)
            return _msgpack_values(data)
        return _json_values(data if isinstance(data, str) else data.decode("latin-1"))

    def _diagnose(self, data: bytes | str, error: str) -> "BadMessage":
        """Find out which request a wrong message speaks of, so that its waiter hears of it."""
        try:
            anything = self._decode_any(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            anything = None
        if not isinstance(anything, dict):
            return BadMessage("a message is a map with a 'type'")
        ref, kind = anything.get("id"), anything.get("type")
        ref = ref if isinstance(ref, str) else None
        if not isinstance(kind, str) or kind not in TYPES:
            return BadMessage(f"there is no message type {str(kind)[:64]!r}", ref=ref, unknown_type=True)
        return BadMessage(f"{kind}: {error}", ref=ref)


class BadMessage(Exception):
    """A client's message that can't be understood; `ref` is the request it names, if any."""

    def __init__(self, text: str, *, ref: str | None = None, unknown_type: bool = False) -> None:
        super().__init__(text)
        self.ref = ref
        self.unknown_type = unknown_type


def _json_values(text: str) -> int:
    """Values of a JSON text: every string, and every comma and bracket outside strings, stands for one at most."""
    bare = text.replace("\\\\", "").replace('\\"', "")
    strings = bare.count('"') // 2
    if strings > VALUES_MAX:
        return strings
    outside = "".join(bare.split('"')[::2])
    return sum(map(outside.count, ",[{"))


def _msgpack_values(data: bytes) -> int:
    """Values of a msgpack document, or a little more than VALUES_MAX."""
    at = count = 0
    while at < len(data) and count <= VALUES_MAX:
        size, length_bytes = _MSGPACK_SIZES[data[at]]
        at += size + int.from_bytes(data[at + 1 : at + 1 + length_bytes], "big")
        count += 1
    return count


def _msgpack_size(head: int) -> tuple[int, int]:
    """Bytes a value that begins with `head` takes (of a container: before its items), and how many of them say how many
    more follow. After the msgpack specification's table of formats."""
    if 0xA0 <= head <= 0xBF:  # fixstr
        return 1 + (head & 0x1F), 0
    sizes = {0xC4: (2, 1), 0xC5: (3, 2), 0xC6: (5, 4), 0xC7: (3, 1), 0xC8: (4, 2), 0xC9: (6, 4)}  # bin, ext
    sizes |= {0xD9: (2, 1), 0xDA: (3, 2), 0xDB: (5, 4)}  # str
    fixed = {0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}  # numbers
    fixed |= {0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}  # fixext
    fixed |= {0xDC: 3, 0xDD: 5, 0xDE: 3, 0xDF: 5}  # arrays and maps
    return sizes.get(head) or (fixed.get(head, 1), 0)


_MSGPACK_SIZES: Final = tuple(map(_msgpack_size, range(256)))

JSON: Final = Codec(binary=False)
MSGPACK: Final = Codec(binary=True)
TYPES: Final = frozenset(cls.__struct_config__.tag for cls in ClientMessage.__args__)


# Ollama's lines -------------------------------------------------------------------------------------------------------


# What a line does not have. (A union with None would not decode: to msgspec, Raw is no type among others.)
NOTHING: Final = Raw()


class ChatMessage(Struct, frozen=True):
    content: str = ""
    thinking: str | None = None
    tool_calls: Raw = NOTHING


class Line(Struct, frozen=True):
    """What matters of a line of /api/generate, /api/chat or the document of /api/embed; the rest is ignored."""

    response: str = ""
    thinking: str | None = None
    message: ChatMessage | None = None
    tool_calls: Raw = NOTHING
    logprobs: Raw = NOTHING
    done: bool = False


class Embeddings(Struct, frozen=True):
    """The document of /api/embed."""

    embeddings: list[list[float]]
    prompt_eval_count: int = 0


decode_line: Final = msgspec.json.Decoder(Line).decode
decode_embeddings: Final = msgspec.json.Decoder(Embeddings).decode

_QUEUE_FIELDS: Final = frozenset({"id", "priority", "deadline_ms", "migrate", "options"})
EMBED_PATH: Final = "/api/embed"


def ollama_call(job: Job) -> tuple[str, bytes]:
    """A request as the HTTP call it stands for: path and JSON body, as a client of Ollama would have sent them.

    `options.max_tokens` is what the guides call Ollama's `num_predict`.

    Raises:
        BadMessage: something in it has no place in JSON (msgpack has extensions, and maps with keys of any type).
    """
    body = {
        name: value
        for name in job.__struct_fields__
        if name not in _QUEUE_FIELDS and (value := getattr(job, name)) is not None
    }
    options = dict(job.options)
    if "max_tokens" in options:
        options.setdefault("num_predict", options.pop("max_tokens"))
        options.pop("max_tokens", None)
    if options:
        body["options"] = options
    if not isinstance(job, Embed):
        body["stream"] = True
    try:
        return f"/api/{type(job).__name__.lower()}", msgspec.json.encode(body)
    except (TypeError, RecursionError) as error:
        raise BadMessage(f"cannot be said in JSON: {error}", ref=job.id) from None
