"""The wire between gateway, broker and worker: typed messages, how they are framed, and its limits.

A message is ONE ZeroMQ frame (after the routing id that a ROUTER adds):

    4 bytes, big-endian    length of the header
    header                 msgpack map; the key "t" names the type, e.g. {"t": "chunk", "rid": ..., "seq": 7, "n": 2}
    payload                the rest: opaque bytes (a request body or a part of one, NDJSON lines)

One frame forwards a third faster than header and payload as two, and the header of a chunk is the same on both sides of
the broker, so that a token's frame crosses it unchanged. Unknown map keys are ignored; an unknown type is answered with
`Error` and counted, so that N-1 and N can talk.

Names: `rid` is a request's 128 random bits. `seq` numbers a request's events (one line each) from 0 across all its
attempts; a chunk carries events seq … seq+n-1. `attempt` is `ordinal << 32 | nonce`: the ordinal counts a request's
attempts from 1, the nonce is the 32 random bits a broker draws at its start, so that attempts order by ordinal and no
two brokers ever name the same one.

Durations on the wire are milliseconds that remain, never points in time: clocks of two hosts are not compared.
"""

from typing import Annotated, Any, Final

import msgspec

from common.errors import Code, ProtocolError

VERSION: Final = 1

HEARTBEAT_INTERVAL_S: Final = 1.0
"""Both sides of every link send `beat` this often …"""
HEARTBEATS_MISSED_MAX: Final = 3
"""… and take the other for lost after this many without a message …"""
SILENCE_S: Final = HEARTBEAT_INTERVAL_S * HEARTBEATS_MISSED_MAX
"""… that is, after so long."""

BODY_BYTES_MAX: Final = 16 * 2**20
"""A request's body that travels in one message. A larger one stays at its gateway and is fetched in parts."""
PART_BYTES_MAX: Final = 2**20
"""A part of such a body, which its worker asks for …"""
PARTS_MAX: Final = 4
"""… so many at once for a lease."""
FRAME_BYTES_MAX: Final = BODY_BYTES_MAX + 2**20
"""A whole message: the largest body and a header of at most 1 MiB (a register with thousands of models)."""
CHUNK_BYTES_MAX: Final = 256 * 2**10
"""Lines that are ready together travel together up to here; a longer line travels alone."""
ATTEMPTS_MAX: Final = 3
LIGHT: Final = ""
OPERATION: Final = "*"
BESIDE_MAX: Final = {LIGHT: 8, OPERATION: 16}
"""Digests of leases that take no slot, and how many of their kind run on an engine at once."""


def attempt_of(ordinal: int, nonce: int) -> int:
    """Name an attempt: `ordinal` from 1, `nonce` the broker's 32 random bits."""
    return ordinal << 32 | nonce


def ordinal_of(attempt: int) -> int:
    """The ordinal of an attempt, 0 for "none yet"."""
    return attempt >> 32


COUNT_MAX: Final = 2**53 - 1
Count = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
"""Events or milliseconds, bounded so that no sum of them outgrows msgpack's 64 bits or a float."""
Attempt = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
"""As `attempt_of` makes them, with room for one more."""
Short = Annotated[str, msgspec.Meta(max_length=1024)]
"""What a queued request keeps beside its body is bounded too: the broker counts bodies only."""
NAME_CHARS_MAX: Final = 256
Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
"""What is said to people."""
ENGINES_MAX: Final = 64
MODELS_MAX: Final = 4096
"""Models of one engine."""
LEASES_MAX: Final = 10_000
ENTRY_BYTES_MAX: Final = 16 * 2**10
Entry = Annotated[bytes, msgspec.Meta(max_length=ENTRY_BYTES_MAX)]
Method = Annotated[str, msgspec.Meta(pattern="^[A-Z]{1,16}$")]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="t", tag=str.lower):
    """Base of everything on the wire."""


# What engines, workers and requests say of themselves -----------------------------------------------------------------


class Model(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model an engine can serve, by its full name (`llama2:latest`). Aliases share a digest, and so their slots.

    `listed` and `running` are its entries in the engine's /api/tags and /api/ps, as they came (JSON); `running` is
    empty if it is not in memory.
    """

    name: Name
    digest: Name
    slots: Annotated[int, msgspec.Meta(ge=1, le=COUNT_MAX)] = 1
    size_bytes: Count = 0
    embedding: bool = False
    resident: bool = False
    listed: Entry = b""
    running: Entry = b""


class Engine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An Ollama server (or an embedded or simulated engine) behind a worker; `url` names it within the worker.

    `models_max`: how many models it holds at once, 0 if that is not known; one more would evict another.
    `memory_bytes`: how much memory it has for them, 0 if that is not known.
    `disk_free_bytes`: room for more models on its disk, in whole GiB; None if the worker cannot see it.
    """

    url: Name
    kind: Name = "ollama"
    version: Name = ""
    up: bool = True
    error: Text = ""
    models_max: Count = 0
    memory_bytes: Count = 0
    disk_free_bytes: Count | None = None
    models: Annotated[tuple[Model, ...], msgspec.Meta(max_length=MODELS_MAX)] = ()


LABELS_MAX: Final = 64
Labels = Annotated[tuple[Name, ...], msgspec.Meta(max_length=LABELS_MAX)]
"""What an operator says of a host, as `key=value`."""
Engines = Annotated[tuple[Engine, ...], msgspec.Meta(max_length=ENGINES_MAX)]


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A lease a worker holds, as it says in `register`: `top` events exist, and `ended` says that no more will.

    The rest is what the `assign` said, so that a broker that knows nothing can take the request up again.
    """

    rid: bytes
    attempt: Attempt
    engine: str
    digest: str
    client: Short
    ref: Short
    model: Short
    path: Short
    method: Method = "POST"
    grace_ms: Count = 0
    top: Count = 0
    ended: bool = False


class Stats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the engine's final line says of the whole request. Durations in ns, as Ollama counts them."""

    done_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_ns: int = 0
    load_ns: int = 0
    prompt_ns: int = 0
    completion_ns: int = 0


# gateway → broker -----------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a gateway, and its answer to `who`."""

    name: Name
    version: int = VERSION


class Submit(Message, frozen=True):
    """A job: an HTTP call in a box. Payload: the request body, exactly as it will be posted.

    `client` is the authenticated identity and `ref` the client's own id of the request: (client, ref) names it from
    outside. `grace_ms` is how long it waits for a client whose line broke; 0 for one that does not resume.

    The rest is what a resubmission knows from before. `accepted`: a broker has said so. `attempt` is the last attempt
    the gateway heard of, and `lost` says that it is over, so the request is to run again: from the start, or, where
    `next_seq` events have arrived, as a continuation, whose payload is the body (`body_bytes` of it) and then those
    events. `attachment` counts how often the request changed hands. `absent_ms`: its client has been away so long.
    `migrate`: it may be continued on another host; `continued` counts how often it was.

    `light`: a question that an engine answers beside its work, as /api/show is: its lease's digest is LIGHT. An
    operation on an engine's models, as /api/pull is, has the engine in place of a model (`engine_name`), and OPERATION.

    `parted_bytes`: its body, of so many bytes, is not here: it stays at the gateway, and its worker will `want` it.

    For the scheduler: `priority` is interactive, normal or batch; the client's share is `weight`, and at most
    `running_max` of its requests run at once (0: any number). `prompt_bytes` of text are to be read, and at most
    `output_max` tokens to be written. `prefix`: hashes of the prompt's beginnings (common/prefix.py), the shortest
    first. `variant`: the options with which the model is loaded (num_ctx above all); another variant reloads it.
    """

    rid: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    client: Short
    ref: Short
    model: Short
    path: Short
    method: Method = "POST"
    priority: Short = "normal"
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    running_max: Count = 0
    deadline_ms: Count | None = None
    grace_ms: Count = 0
    waited_ms: Count = 0
    accepted: bool = False
    attempt: Attempt = 0
    lost: bool = False
    next_seq: Count = 0
    body_bytes: Count = 0
    migrate: bool = True
    light: bool = False
    parted_bytes: Count = 0
    continued: Count = 0
    attachment: Count = 0
    absent_ms: Count | None = None
    prompt_bytes: Count = 0
    output_max: Count | None = None
    variant: Name = ""
    prefix: Annotated[tuple[Annotated[bytes, msgspec.Meta(max_length=16)], ...], msgspec.Meta(max_length=128)] = ()


class Cancel(Message, frozen=True):
    """Stop a request (gateway → broker), or one attempt of it (broker → worker). `attempt` 0: whichever."""

    rid: bytes
    attempt: int = 0
    reason: str = ""


class Replay(Message, frozen=True):
    """Ask for events again from `start`; at most `bytes_max` of payload; one outstanding per request."""

    rid: bytes
    attempt: int
    start: int
    bytes_max: int = 4 * 2**20


class Part(Message, frozen=True):
    """What was wanted of a body, from `offset` on (gateway → broker → worker). It may be lost on the way.

    Payload: as many bytes as were wanted.
    """

    rid: bytes
    attempt: int
    offset: Count


class Ack(Message, frozen=True):
    """The gateway has everything up to the terminal. The request is forgotten once its client cannot resume it."""

    rid: bytes


class Detach(Message, frozen=True):
    """The client's line broke: the request waits `grace_ms` for it. Its gateway goes on receiving it."""

    rid: bytes


class Attach(Message, frozen=True):
    """A client is back: what is the request that (client, ref) names? Answered by `attached` of the same id."""

    id: int
    client: Short
    ref: Short


class Query(Message, frozen=True):
    """Ask for a `snapshot`; `what` is "fleet", "hosts" or "requests". Anyone admitted to the port may ask."""

    id: int
    what: str = "fleet"


class Admin(Message, frozen=True):
    """An operator's wish: `action` is "drain" or "resume", `target` a host. Answered by a `snapshot` of hosts."""

    id: int
    action: str
    target: str = ""


class Beat(Message, frozen=True):
    """A sign of life."""


class Probe(Message, frozen=True):
    """Are you there? Answered by `beat`. Of one who serves another broker, so it is no sign that it serves this one."""


# broker → gateway -----------------------------------------------------------------------------------------------------


class Accepted(Message, frozen=True):
    """The broker holds the request: from now on it gets exactly one terminal."""

    rid: bytes


class Queued(Message, frozen=True):
    """The request waits; `position` counts from 1."""

    rid: bytes
    position: int
    eta_ms: int | None = None


class Leased(Message, frozen=True):
    """The request went to a worker. Sent before the `assign`."""

    rid: bytes
    attempt: int
    worker: str
    engine: str


class Started(Message, frozen=True):
    """The engine answered with this; events follow. Payload, in a replay from 0: the request body."""

    rid: bytes
    attempt: int
    status: int
    content_type: str = ""


class Chunk(Message, frozen=True):
    """Events seq … seq+n-1. Payload: the lines, each with its newline."""

    rid: bytes
    attempt: int
    seq: Count
    n: Count


class Gap(Message, frozen=True):
    """Events below `top` exist and may have been lost on the way: replay what is missing."""

    rid: bytes
    attempt: int
    top: int


class End(Message, frozen=True):
    """The request is complete when its `seq` events have arrived."""

    rid: bytes
    attempt: Attempt
    seq: Count
    stats: Stats


class Failed(Message, frozen=True):
    """The attempt, or the request, failed after `seq` events. Payload: the engine's own answer, if it gave one.

    From a worker, `retryable` says that another host may do better; from the broker the request is over.
    `resubmit`, from the broker, says that the gateway may submit it again from where it stands.
    `retry_after_ms` says when to come back and `models` which models there are, where that helps.
    """

    rid: bytes
    attempt: int
    code: Code
    message: Text
    seq: Count = 0
    status: int = 0
    retryable: bool = False
    resubmit: bool = False
    retry_after_ms: int | None = None
    models: tuple[str, ...] = ()


class Lost(Message, frozen=True):
    """The attempt died with its host before its first event; the request waits again."""

    rid: bytes
    attempt: int


class Attached(Message, frozen=True):
    """The answer to `attach`: the request, with its `attempt` and a new `attachment`; None: there is none.

    It changes hands when its `submit` comes back, from a gateway whose client is still there.
    Payload: its body, if the broker still has it; else it comes with the `started` of a replay from 0.
    """

    id: int
    submit: Submit | None = None


class Detached(Message, frozen=True):
    """The request is another gateway's now.

    Answered by what this one has of it, a `started` with the body and `chunk`s from 0, which go on to the other.
    """

    rid: bytes


class Forgotten(Message, frozen=True):
    """The events below `base` that a `replay` asked for are no longer kept."""

    rid: bytes
    attempt: int
    base: int


class Host(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker, as operators see it.

    `busy` counts leases by engine url and model digest, `kept` requests that ended and can still be resumed from it.
    """

    name: str
    engines: tuple[Engine, ...]
    busy: dict[str, dict[str, int]] = {}
    kept: int = 0
    draining: bool = False
    beat_age_ms: int = 0
    epoch: str = ""
    labels: tuple[str, ...] = ()


class Job(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request, as operators see it. `age_ms` since it was accepted."""

    rid: bytes
    client: str
    ref: str
    model: str
    state: str
    age_ms: int
    worker: str = ""
    engine: str = ""
    attempt: int = 0
    events: int = 0
    position: int = 0
    eta_ms: int | None = None
    priority: str = "normal"


class Snapshot(Message, frozen=True):
    """The answer to `query`, and what every gateway is told when the fleet changes (id 0, "fleet")."""

    id: int = 0
    what: str = "fleet"
    models: tuple[str, ...] = ()
    workers: int = 0
    queued: int = 0
    running: int = 0
    hosts: tuple[Host, ...] = ()
    jobs: tuple[Job, ...] = ()


# worker → broker ------------------------------------------------------------------------------------------------------


class Register(Message, frozen=True):
    """First message of a worker, and its answer to `who`: the truth about what it holds.

    `epoch` is random per process start: the newest process of a name wins.
    """

    name: Name
    epoch: Name
    engines: Engines
    leases: Annotated[tuple[Claim, ...], msgspec.Meta(max_length=LEASES_MAX)] = ()
    draining: bool = False
    labels: Labels = ()
    version: int = VERSION


class State(Message, frozen=True):
    """The worker's engines changed."""

    engines: Engines
    draining: bool = False


class Want(Message, frozen=True):
    """Send me `size` bytes of the body of a lease, from `offset` on (worker → broker → gateway)."""

    rid: bytes
    attempt: int
    offset: Count
    size: Annotated[int, msgspec.Meta(ge=1, le=PART_BYTES_MAX)]


class Refused(Message, frozen=True):
    """An `assign` the worker will not carry out: stale registration, unknown engine, draining."""

    rid: bytes
    attempt: int
    reason: Text


class Bye(Message, frozen=True):
    """The peer leaves on purpose."""


# broker → worker ------------------------------------------------------------------------------------------------------


class Registered(Message, frozen=True):
    """The broker took the register; assigns that carry another number are stale."""

    registration: int


class Who(Message, frozen=True):
    """The broker does not know this peer: introduce yourself."""


class Assign(Message, frozen=True):
    """Run a job on an engine. Payload: the request body. `digest` names the slot it takes.

    With `start` > 0 it is continued: `body_bytes` of the payload are the body, the rest its events below `start`.
    With `parted_bytes` > 0 there is no payload: the worker asks for the body's parts.
    """

    rid: bytes
    attempt: int
    registration: int
    engine: str
    model: str
    digest: str
    path: str
    client: Short = ""
    ref: Short = ""
    method: Method = "POST"
    grace_ms: Count = 0
    start: Count = 0
    body_bytes: Count = 0
    parted_bytes: Count = 0


class Release(Message, frozen=True):
    """The request is over for everyone: drop its replay buffer."""

    rid: bytes


class Drain(Message, frozen=True):
    """Take no new lease, or take them again; the worker keeps it in mind beyond its restart."""

    on: bool = True


class Superseded(Message, frozen=True):
    """A newer process of this worker's name registered: this one ends with exit status 1."""


class ModelOp(Message, frozen=True, tag="model"):
    """Reserved for fleet operations: pull, delete, load or unload a model."""

    id: int
    engine: str
    action: str
    model: str


class Error(Message, frozen=True):
    """The peer's message could not be understood."""

    code: Code
    message: Text


FromGateway = (
    Hello
    | Submit
    | Cancel
    | Detach
    | Attach
    | Replay
    | Part
    | Ack
    | Started
    | Chunk
    | Query
    | Admin
    | Beat
    | Probe
    | Bye
    | Error
)
ToGateway = (
    Who
    | Accepted
    | Queued
    | Leased
    | Started
    | Chunk
    | Gap
    | Forgotten
    | Want
    | End
    | Failed
    | Lost
    | Attached
    | Detached
    | Snapshot
    | Beat
    | Error
)
FromWorker = Register | State | Beat | Probe | Started | Chunk | Forgotten | Want | End | Failed | Refused | Bye | Error
ToWorker = Registered | Who | Assign | Cancel | Replay | Part | Release | Drain | Superseded | ModelOp | Beat | Error

_encoder = msgspec.msgpack.Encoder()
_HEADER = 4
ERROR_TEXT_MAX: Final = 200
"""What is told and logged of a mistake: it may quote the peer."""


def encode(message: Message, payload: bytes = b"") -> bytes:
    """Frame a message."""
    header = _encoder.encode(message)
    return b"%b%b%b" % (len(header).to_bytes(_HEADER, "big"), header, payload)


class Decoder(msgspec.Struct, frozen=True):
    """Decodes the messages one side may send."""

    messages: msgspec.msgpack.Decoder[Any]

    def decode(self, frame: bytes) -> tuple[Any, bytes]:
        """Split a frame into message and payload.

        Raises:
            ProtocolError: no message of this direction; the text names what is wrong.
        """
        message, end = self.header(frame)
        return message, frame[end:]

    def header(self, frame: bytes) -> tuple[Any, int]:
        """The message, and where its payload begins: `decode` without a copy of it.

        Raises:
            ProtocolError: as `decode`.
        """
        end = _HEADER + int.from_bytes(frame[:_HEADER], "big")
        if len(frame) < end or end == _HEADER:
            raise ProtocolError(f"a frame of {len(frame)} bytes announces a header of {end - _HEADER}")
        try:
            return self.messages.decode(memoryview(frame)[_HEADER:end]), end
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(str(error)[:ERROR_TEXT_MAX]) from None


from_gateway = Decoder(msgspec.msgpack.Decoder(FromGateway))
to_gateway = Decoder(msgspec.msgpack.Decoder(ToGateway))
from_worker = Decoder(msgspec.msgpack.Decoder(FromWorker))
to_worker = Decoder(msgspec.msgpack.Decoder(ToWorker))


def full_name(model: str) -> str:
    """A model's name as Ollama lists it: without a tag it means `:latest`."""
    return model if ":" in model.rsplit("/", 1)[-1] else f"{model}:latest"


def engine_name(host: str, url: str) -> str:
    """What stands for an engine in place of a model's name, which can't begin like this."""
    return f"@{host} {url}"


def names_engine(model: str) -> bool:
    """Whether it is none of a model."""
    return model.startswith("@")


def short_name(model: str) -> str:
    """A model's name as clients like it: `:latest` dropped."""
    return model.removesuffix(":latest")
