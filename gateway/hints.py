"""What a broker's scheduler is told of a request for inference: how much it reads and writes, and how it begins. Pure.

Rules
- Hints are best effort. A body that cannot be read gives fewer of them or none, never an error: the engine judges it.
- A prompt's beginnings (common/prefix.py) are those of its parts in the order in which engines read them: system,
  tools, messages. A message counts with its role and its text, whichever API it came by and however its JSON is
  written, so that a conversation agrees with its next turn up to the last boundary. What comes and goes between two
  turns has no place in it: ids, options, marks for caching (Anthropic's `cache_control`), and the model's thinking,
  which clients drop when they send an answer back.
- An image counts as a hash of its bytes as they are written, drawn out to about what an engine reads of it; never to
  more than was written, else a body of tiny ones would be a prompt of GBs.
- What is embedded has no beginnings: engines keep nothing of it.
- It runs on the way to the first token. The parts of a body are found as slices of it, and only what holds text is
  decoded. A conversation of more than OBJECTS_MAX objects, or QUOTES_MAX quotes, would take long to read, and much
  memory; it counts as it is written, as does one that is not what the APIs document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from mmap import mmap
from typing import Final, TypeVar

import msgspec
from msgspec import Raw, Struct

from common.errors import Code, FabricError
from common.ollama import UNREADABLE
from common.prefix import chain
from common.protocol import COUNT_MAX, NAME_CHARS_MAX
from gateway.excerpt import FIELD_BYTES_MAX

SMALL: Final = 64 * 1024
READ_MAX: Final = 16 * 2**20
"""To tell a body's beginnings takes a few times its size in memory: a larger one has none."""
OBJECTS_MAX: Final = 20_000
QUOTES_MAX: Final = 12 * OBJECTS_MAX
"""Both are counted in conversations larger than SMALL; smaller ones cannot have many more."""
IMAGES_MAX: Final = 64
"""Of one message; more are not looked at."""
URL_HEAD_BYTES: Final = 128
"""In which a data: URL says what it carries."""
DIGEST_BYTES: Final = 32
IMAGE_BYTES: Final = 2048
"""What an image counts as: vision models make some hundred tokens of one, and a token is about four bytes of text."""

GENERATING: Final = frozenset(
    {"/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
)
EMBEDDING: Final = frozenset({"/api/embed", "/api/embeddings", "/v1/embeddings"})
SHORT: Final = ("options", "shift", "max_tokens", "max_completion_tokens", "max_output_tokens")
"""The fields that hints are made of beside the prompt."""
NATIVE: Final = "/api/"
"""How the paths of Ollama's own API begin. The others have no options with which a model is loaded."""

T = TypeVar("T")
Buffer = bytes | memoryview | Raw | mmap
"""What a body may be in; it is not kept."""
NOTHING: Final = Raw()
NULL: Final = Raw(b"null")
_FALSE: Final = Raw(b"false")
_SYSTEM: Final = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True)
class Hints:
    """As `common.protocol.Submit` has them. `output_max` is None where the request does not say."""

    prompt_bytes: int = 0
    output_max: int | None = None
    variant: str = ""
    prefix: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """What a client may have: a weight among the others, and so many requests that run at once (0: any number)."""

    weight: float = 1.0
    running_max: int = 0


NO_HINTS: Final = Hints()
EVERYBODYS: Final = Share()


class _Body(Struct, gc=False):
    """The parts of a request of any of the APIs, not yet read."""

    template: Raw = NOTHING
    system: Raw = NOTHING
    instructions: Raw = NOTHING
    tools: Raw = NOTHING
    messages: Raw = NOTHING
    context: Raw = NOTHING
    images: Raw = NOTHING
    prompt: Raw = NOTHING
    suffix: Raw = NOTHING
    input: Raw = NOTHING
    options: Raw = NOTHING
    shift: Raw = NOTHING
    max_tokens: Raw = NOTHING
    max_completion_tokens: Raw = NOTHING
    max_output_tokens: Raw = NOTHING


class _Options(Struct, gc=False):
    """Of Ollama's options (api/types.go) the length of the answer and the Runner's, of now and of former versions."""

    num_predict: Raw = NOTHING
    num_ctx: Raw = NOTHING
    num_batch: Raw = NOTHING
    num_gpu: Raw = NOTHING
    main_gpu: Raw = NOTHING
    use_mmap: Raw = NOTHING
    use_mlock: Raw = NOTHING
    num_thread: Raw = NOTHING
    numa: Raw = NOTHING
    low_vram: Raw = NOTHING
    f16_kv: Raw = NOTHING
    logits_all: Raw = NOTHING
    vocab_only: Raw = NOTHING


_RUNNER: Final = _Options.__struct_fields__[1:]


class _Piece(Struct, gc=False):
    """A text or an image."""

    text: str | None = None
    image_url: Raw = NOTHING
    source: Raw = NOTHING


class _Block(_Piece, gc=False):
    """A piece of a message's content; Anthropic's may be the call of a tool (`name`, `input`), or its result."""

    name: str | None = None
    input: Raw = NOTHING
    content: str | list[_Piece] | None = None


class _Function(Struct, gc=False):
    name: str | None = None
    arguments: Raw = NOTHING


class _ToolCall(Struct, gc=False):
    function: _Function | None = None


class _Message(Struct, gc=False):
    """A message of any of the APIs. In OpenAI's `responses` calls, results and thinking are items with a `type`."""

    role: str | None = None
    content: str | list[_Block] | None = None
    images: Raw = NOTHING
    tool_calls: list[_ToolCall] | None = None
    type: str | None = None
    name: str | None = None
    arguments: Raw = NOTHING
    output: str | list[_Piece] | None = None


_body: Final = msgspec.json.Decoder(_Body)
_options: Final = msgspec.json.Decoder(_Options)
_fields: Final = msgspec.json.Decoder(dict[str, Raw])
_messages: Final = msgspec.json.Decoder(list[_Message])
_content: Final[msgspec.json.Decoder[str | list[_Block]]] = msgspec.json.Decoder(str | list[_Block])
_text: Final = msgspec.json.Decoder(str)
_scalar: Final[msgspec.json.Decoder[float | bool]] = msgspec.json.Decoder(int | float | bool)


def hints_of(path: str, body: Buffer) -> Hints:
    """What can be told of a request, whose `body` is to be posted to `path`."""
    asked = _read(_body, body) if path in GENERATING or path in EMBEDDING else None
    if asked is None:
        return NO_HINTS
    native = path.startswith(NATIVE)
    options = (_read(_options, asked.options) if native else None) or _Options()
    variant = _variant(options, asked.shift) if native else ""
    if path in EMBEDDING:
        return Hints(len(asked.input or asked.prompt), 0, variant)
    limits = options.num_predict, asked.max_output_tokens, asked.max_completion_tokens, asked.max_tokens
    output_max = next(filter(None, map(_limit, limits[:1] if native else limits[1:])), None)
    if len(body) > READ_MAX:
        return Hints(0, output_max, variant)
    prefix, prompt_bytes = chain((b"".join(_parts(asked)),))
    return Hints(prompt_bytes, output_max, variant, prefix)


def options_with(body: Buffer, num_ctx: int) -> bytes | None:
    """The options of a request of Ollama's own API, with this `num_ctx`; None where an engine could not read them.

    They are to stand last in the body: of fields of one name Go takes the last, in whatever case they are written, and
    of options what the last says of each.

    Raises:
        FabricError: INVALID_MESSAGE, they are too large, or nested too deeply, to be read here.
    """
    try:
        asked = _body.decode(body)
    except UNREADABLE as error:
        raise FabricError(Code.INVALID_MESSAGE, f"the body is not the JSON that was expected: {error}") from None
    if len(asked.options) > FIELD_BYTES_MAX:
        raise FabricError(Code.INVALID_MESSAGE, f"the options have more than {FIELD_BYTES_MAX} bytes")
    options = {} if asked.options in (NOTHING, NULL) else _read(_fields, asked.options)
    return None if options is None else msgspec.json.encode(options | {"num_ctx": num_ctx})


def _read(decoder: msgspec.json.Decoder[T], data: Buffer) -> T | None:
    """What is written there, if it is what was expected."""
    try:
        return decoder.decode(data)
    except UNREADABLE:
        return None


def _limit(raw: Raw) -> int | None:
    """A number of tokens; nothing if it is none, or means "without end" (0 and below)."""
    number = _read(_scalar, raw) if raw else None
    return None if number is None or isinstance(number, bool) or number < 1 else int(min(number, COUNT_MAX))


def _variant(options: _Options, shift: Raw) -> str:
    """The Runner's options as one text.

    A negative `num_gpu` leaves a model that is loaded as it is (server/sched.go, needsReload), as does a `shift` that
    is not turned off.
    """
    said = []
    for name in _RUNNER:
        raw = getattr(options, name)
        value = _read(_scalar, raw) if raw else None
        if value is None or (name == "num_gpu" and value < 0) or abs(value) > COUNT_MAX:
            continue
        said.append(f"{name}={str(value).lower() if isinstance(value, bool) else int(value)}")
    if shift == _FALSE:
        said.append("shift=false")
    return ",".join(said)[:NAME_CHARS_MAX]


def _parts(asked: _Body) -> Iterator[bytes]:
    """The prompt, piece by piece."""
    yield _written(asked.context)
    yield _written(asked.template)
    yield from _said("system", asked.system)
    yield from _said("system", asked.instructions)
    conversation = asked.messages or asked.input
    messages = _decoded(_messages, conversation)
    first = 0  # that is no system message: tools stand before it
    for message in messages or ():
        if message.role not in _SYSTEM:
            break
        yield from _message(message)
        first += 1
    yield _written(asked.tools)
    if messages is None:
        yield from _said("user", conversation)
    else:
        for message in messages[first:]:
            yield from _message(message)
    yield from _images(asked.images)
    yield from _said("user", asked.prompt)
    yield _written(asked.suffix)


def _message(message: _Message) -> Iterator[bytes]:
    if message.type == "reasoning":
        return
    yield _head(message.role or message.type or "")
    yield from _images(message.images)
    yield from _content_of(message.content)
    for call in message.tool_calls or ():
        if call.function is not None:
            yield from _call(call.function.name, call.function.arguments)
    yield from _call(message.name, message.arguments)
    yield from _content_of(message.output)


def _said(role: str, raw: Raw) -> Iterator[bytes]:
    """What stands outside of a message, as if it stood in one of that role."""
    if raw and raw != NULL:
        content = _decoded(_content, raw)
        yield _head(role)
        yield from (bytes(raw),) if content is None else _content_of(content)


def _content_of(content: str | Sequence[_Piece] | None) -> Iterator[bytes]:
    if isinstance(content, str):
        yield content.encode()
        return
    for piece in content or ():
        if piece.text:
            yield piece.text.encode()
        if piece.image_url or piece.source:
            # The longest string in it, be it {"url": …}, {"data": …} or a URL alone.
            yield _image(max(_strings(piece.image_url or piece.source), key=len, default=memoryview(b"")))
        if isinstance(piece, _Block):
            yield from _call(piece.name, piece.input)
            yield from _content_of(piece.content)


def _call(name: str | None, arguments: Raw) -> Iterator[bytes]:
    yield (name or "").encode()
    yield bytes(arguments)


def _images(raw: Raw) -> Iterator[bytes]:
    """Of a list of them in base64."""
    return map(_image, _strings(raw))


def _strings(raw: Raw) -> Iterator[memoryview]:
    """The strings in it, with one copy made of them all; there are no quotes in those that are looked for."""
    data = bytes(raw)
    view, end = memoryview(data), -1
    for _ in range(IMAGES_MAX):
        start = data.find(b'"', end + 1) + 1
        end = data.find(b'"', start)
        if start == 0 or end < 0:
            return
        yield view[start:end]


def _image(data: memoryview) -> bytes:
    """Of an image in base64, or of a URL; of one that carries the image, that."""
    before, carries, _ = bytes(data[:URL_HEAD_BYTES]).partition(b";base64,")
    if carries:
        data = data[len(before) + len(carries) :]
    if len(data) <= DIGEST_BYTES:
        return bytes(data)
    return (blake2b(data, digest_size=DIGEST_BYTES).digest() * (IMAGE_BYTES // DIGEST_BYTES))[: len(data)]


def _head(role: str) -> bytes:
    return f"\0{role}\0".encode()


def _written(raw: Raw) -> bytes:
    """As it stands there."""
    return b"" if raw == NULL else bytes(raw)


def _decoded(decoder: msgspec.json.Decoder[T], raw: Raw) -> T | None:
    """As `_read`; nothing if there is too much in it."""
    if len(raw) > SMALL:
        data = bytes(raw)
        if data.count(b"{") > OBJECTS_MAX or data.count(b'"') > QUOTES_MAX:
            return None
    return _read(decoder, raw)
