"""The wire: every message round-trips, any msgpack reader can read it, and garbage is an error and nothing worse."""

import typing

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import protocol
from common.errors import Code, ProtocolError
from common.protocol import Beat, Chunk, Decoder, End, Engine, Error, Hello, Message, Model, Stats, encode

DIRECTIONS: list[tuple[str, Decoder, typing.Any]] = [
    ("from_gateway", protocol.from_gateway, protocol.FromGateway),
    ("to_gateway", protocol.to_gateway, protocol.ToGateway),
    ("from_worker", protocol.from_worker, protocol.FromWorker),
    ("to_worker", protocol.to_worker, protocol.ToWorker),
]
EVERY_MESSAGE = [
    pytest.param(decoder, kind, id=f"{direction}-{kind.__name__}")
    for direction, decoder, union in DIRECTIONS
    for kind in typing.get_args(union)
]
ENGINE = Engine(url="http://e", models=(Model(name="m:latest", digest="d", slots=2, resident=True),))
CLAIM = protocol.Claim(
    rid=b"r", attempt=1, engine="e", digest="d", client="c", ref="1", model="m", path="/p", top=4, ended=True
)
# Each is within every bound that the wire puts on its type.
SAMPLES: dict[typing.Any, typing.Any] = {
    str: "WORD",
    int: 7,
    float: 0.5,
    bool: True,
    bytes: b"\x00\xff" * 8,
    Code: Code.BACKEND_ERROR,
    Stats: Stats(done_reason="stop", prompt_tokens=3, total_ns=2**40),
    tuple[str, ...]: ("a", "b"),
    tuple[bytes, ...]: (b"p",),
    dict[bytes, int]: {b"r": 5},
    int | None: 9,
    tuple[Engine, ...]: (ENGINE,),
    tuple[protocol.Claim, ...]: (CLAIM,),
    protocol.Submit | None: protocol.Submit(rid=b"r" * 16, client="c", ref="1", model="m", path="/p"),
    tuple[protocol.Host, ...]: (protocol.Host(name="h", engines=(ENGINE,), busy={"http://e": {"d": 1}}),),
    tuple[protocol.Job, ...]: (
        protocol.Job(rid=b"r", client="c", ref="1", model="m", state="queued", age_ms=3, position=1),
    ),
}


def sample(kind: type[Message]) -> Message:
    """A message with every field set to something other than its default."""
    hints = typing.get_type_hints(kind)
    fields = msgspec.structs.fields(kind)
    return kind(**{f.name: not f.default if hints[f.name] is bool else SAMPLES[hints[f.name]] for f in fields})


def header_of(frame: bytes) -> bytes:
    return frame[4 : 4 + int.from_bytes(frame[:4], "big")]


def framed(header: object, payload: bytes = b"") -> bytes:
    """A frame as another implementation of the wire would make it."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    return len(packed).to_bytes(4, "big") + packed + payload


@pytest.mark.parametrize(("decoder", "kind"), EVERY_MESSAGE)
@pytest.mark.parametrize("payload", [b"", b"\x00" * 7 + b"{}\n"])
def test_every_message_comes_back_as_it_was(decoder: Decoder, kind: type[Message], payload: bytes) -> None:
    message = sample(kind)
    assert decoder.decode(encode(message, payload)) == (message, payload)


@pytest.mark.parametrize(("decoder", "kind"), EVERY_MESSAGE)
def test_any_msgpack_reader_reads_the_header(decoder: Decoder, kind: type[Message]) -> None:
    message = sample(kind)
    header = msgpack.unpackb(header_of(encode(message, b"payload")))
    tag = {"modelop": "model"}.get(kind.__name__.lower(), kind.__name__.lower())
    assert header.pop("t") == tag
    assert set(header) == {field.name for field in msgspec.structs.fields(kind)}
    assert decoder.decode(framed({"t": tag, **header}))[0] == message


@pytest.mark.parametrize(("decoder", "kind"), EVERY_MESSAGE)
def test_keys_of_a_newer_version_are_ignored(decoder: Decoder, kind: type[Message]) -> None:
    message = sample(kind)
    header = msgpack.unpackb(header_of(encode(message)))
    assert decoder.decode(framed({**header, "invented_later": [1, {"x": b"y"}]})) == (message, b"")


def test_defaults_take_no_bytes() -> None:
    assert msgpack.unpackb(header_of(encode(Beat()))) == {"t": "beat"}


def test_a_chunk_is_the_same_frame_on_both_sides_of_the_broker() -> None:
    chunk = Chunk(rid=b"r" * 16, attempt=protocol.attempt_of(1, 9), seq=4, n=2)
    frame = encode(chunk, b"{}\n{}\n")
    assert protocol.from_worker.decode(frame) == protocol.to_gateway.decode(frame) == (chunk, b"{}\n{}\n")
    message, end = protocol.from_worker.header(frame)
    assert (message, frame[end:]) == (chunk, b"{}\n{}\n")
    assert encode(*protocol.to_gateway.decode(frame)) == frame


def test_attempts_order_by_ordinal_whatever_the_nonce() -> None:
    first, second = protocol.attempt_of(1, 2**32 - 1), protocol.attempt_of(2, 0)
    assert first < second
    assert [protocol.ordinal_of(attempt) for attempt in (0, first, second)] == [0, 1, 2]


# What is no message ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00\x00", id="half a length"),
        pytest.param(b"\x00\x00\x00\x00", id="no header"),
        pytest.param(b"\x00\x00\x00\x00{}", id="only a payload"),
        pytest.param(b"\xff\xff\xff\xff" + b"x" * 20, id="4 GiB announced"),
        pytest.param(b'{"type": "generate"}', id="JSON"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(framed({"t": "invented"}), id="unknown type"),
        pytest.param(framed({"t": "leased", "rid": b"r"}), id="a type of the other direction"),
        pytest.param(framed({"rid": b"r"}), id="no type"),
        pytest.param(framed({"t": 1}), id="type not a string"),
        pytest.param(framed([1, 2]), id="not a map"),
        pytest.param(framed({"t": "ack"}), id="a key missing"),
        pytest.param(framed({"t": "ack", "rid": "text"}), id="a key of another type"),
        pytest.param(framed({"t": "beat", 1: 2}), id="a key that is no string"),
        pytest.param(framed(b"\x81\xa1t\xa3\xff\xfe\xfd"), id="type not UTF-8"),
        pytest.param(framed(msgpack.packb({"t": "beat"}) + b"\xc0"), id="something after the header"),
        pytest.param(framed(b"\x82\xa1t\xa4beat\xa1x" + b"\x91" * 100_000), id="deep nesting"),
        pytest.param(framed(b"\x82\xa1t\xa6submit\xa6prefix\xdd\xff\xff\xff\xff"), id="an array of 4 billion"),
    ],
)
def test_what_is_no_message_is_a_protocol_error(frame: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.from_gateway.decode(frame)
    assert 0 < len(str(caught.value)) <= protocol.ERROR_TEXT_MAX


def test_the_error_does_not_repeat_a_megabyte() -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.from_gateway.decode(framed({"t": "x" * 2**20}))
    assert len(str(caught.value)) == protocol.ERROR_TEXT_MAX


@pytest.mark.parametrize("direction", range(4))
@given(data=st.data())
def test_random_bytes_are_at_worst_a_protocol_error(direction: int, data: st.DataObject) -> None:
    _, decoder, union = DIRECTIONS[direction]
    good = encode(sample(data.draw(st.sampled_from(typing.get_args(union)))), b"payload")
    position = data.draw(st.integers(0, len(good)))
    frame = data.draw(
        st.one_of(
            st.binary(max_size=64),
            st.binary(max_size=64).map(framed),
            st.just(good[:position]),
            st.binary(max_size=8).map(lambda noise: good[:position] + noise + good[position + len(noise) :]),
        )
    )
    try:
        message, _ = decoder.decode(frame)
    except ProtocolError:
        return
    assert isinstance(message, Message)


@pytest.mark.parametrize(
    "header",
    [
        {"t": "chunk", "rid": b"r", "attempt": 1, "seq": -1, "n": 1},
        {"t": "chunk", "rid": b"r", "attempt": 1, "seq": 2**53, "n": 1},
        {"t": "chunk", "rid": b"r", "attempt": 1, "seq": 1, "n": 2**64 - 1},
        {"t": "chunk", "rid": b"r", "attempt": 1, "seq": 1, "n": 1.5},
    ],
)
def test_numbers_that_could_not_be_added_up_are_refused(header: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        protocol.from_worker.decode(framed(header))


def test_a_model_that_has_no_slot_is_refused() -> None:
    """A broker could never tell when one is free."""
    model = {"name": "m:latest", "digest": "d", "slots": 0}
    header = {"t": "state", "engines": [{"url": "http://e1", "models": [model]}]}
    with pytest.raises(ProtocolError, match="slots"):
        protocol.from_worker.decode(framed(header))
    model["slots"] = 1
    assert protocol.from_worker.decode(framed(header))[0]


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(ProtocolError, match="enum value 'NO_SUCH_CODE'"):
        protocol.from_worker.decode(framed({"t": "error", "code": "NO_SUCH_CODE", "message": ""}))
    assert protocol.from_worker.decode(framed({"t": "error", "code": "INTERNAL", "message": ""}))[0] == Error(
        code=Code.INTERNAL, message=""
    )


def test_messages_cannot_be_changed() -> None:
    hello = Hello(name="g")
    with pytest.raises(AttributeError):
        hello.name = "other"  # type: ignore[misc]
    assert End(rid=b"r", attempt=1, seq=0, stats=Stats()) == End(rid=b"r", attempt=1, seq=0, stats=Stats())


# Names of models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("llama2", "llama2:latest"),
        ("llama2:latest", "llama2:latest"),
        ("llama2:13b", "llama2:13b"),
        ("library/llama2", "library/llama2:latest"),
        ("host.example:5000/team/model", "host.example:5000/team/model:latest"),
        ("host.example:5000/team/model:q4", "host.example:5000/team/model:q4"),
    ],
)
def test_without_a_tag_a_model_is_latest(name: str, full: str) -> None:
    assert protocol.full_name(name) == full
    assert protocol.full_name(protocol.short_name(full)) == full


def test_a_short_name_drops_only_latest() -> None:
    assert [protocol.short_name(name) for name in ("a:latest", "a:13b", "a:latest-dev")] == [
        "a",
        "a:13b",
        "a:latest-dev",
    ]
