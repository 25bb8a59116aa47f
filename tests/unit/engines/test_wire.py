import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.embedded import wire
from workers.embedded.wire import ApiError, Message


@given(st.text())
def test_quote_is_json_that_is_safe_inside_html(text: str) -> None:
    quoted = wire.quote(text)
    assert json.loads(quoted) == text
    assert not set("<>&\u2028\u2029") & set(quoted)


def test_quote_writes_what_go_writes() -> None:
    assert wire.quote('a<b>&"c"\u2028é') == '"a\\u003cb\\u003e\\u0026\\"c\\"\\u2028é"'


@pytest.mark.parametrize(
    ("epoch_ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_795_259_590_257_408_508, "2026-11-21T11:13:10.257408508Z"),
        (1_795_259_590_713_928_810, "2026-11-21T11:13:10.71392881Z"),
    ],
)
def test_times_are_rfc3339_without_trailing_zeros(epoch_ns: int, text: str) -> None:
    assert wire.rfc3339(epoch_ns) == text


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("llama2", "llama2:latest"),
        ("LLAMA2:Latest", "llama2:latest"),
        ("library/llama2:7b", "llama2:7b"),
        ("registry.ollama.ai/library/llama2", "llama2:latest"),
        ("me/mine:q4_K_M", "me/mine:q4_k_m"),
        ("localhost:5000/me/mine", "localhost:5000/me/mine:latest"),
    ],
)
def test_names(name: str, full: str) -> None:
    assert wire.full_name(name) == full


@pytest.mark.parametrize("name", ["", "a b", "a:", ":a", "/a", "../a"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="invalid model name"):
        wire.full_name(name)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), (0, 0), (1.5, 1.5), ("5m", 300), ("1h30m", 5400), ("250ms", 0.25), ("0", 0), (-1, math.inf)],
)
def test_keep_alive(value: object, seconds: float | None) -> None:
    assert wire.parse_keep_alive(value) == seconds


def test_a_negative_duration_is_forever_and_shows_as_292_years() -> None:
    assert wire.parse_keep_alive("-1m") == math.inf
    assert wire.expiry(0, math.inf).startswith("2262-04-11T")


@pytest.mark.parametrize(
    ("value", "words"),
    [("zz", 'time: invalid duration "zz"'), ("5", 'time: invalid duration "5"'), (True, "Unsupported type: 'bool'")],
)
def test_what_is_no_keep_alive(value: object, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        wire.parse_keep_alive(value)


# Bodies and Ollama v0.24's own answers to them, recorded from a running server.
REFUSED = [
    ("GenerateRequest", "", 400, "missing request body"),
    ("GenerateRequest", "[1]", 400, "json: cannot unmarshal array into Go value of type api.GenerateRequest"),
    (
        "GenerateRequest",
        '{"model":5}',
        400,
        "json: cannot unmarshal number into Go struct field GenerateRequest.model of type string",
    ),
    (
        "GenerateRequest",
        '{"stream":"a"}',
        400,
        "json: cannot unmarshal string into Go struct field GenerateRequest.stream of type bool",
    ),
    (
        "GenerateRequest",
        '{"options":[]}',
        400,
        "json: cannot unmarshal array into Go struct field GenerateRequest.options of type map[string]interface {}",
    ),
    (
        "GenerateRequest",
        '{"context":["a"]}',
        400,
        "json: cannot unmarshal string into Go struct field GenerateRequest.context of type int",
    ),
    (
        "ChatRequest",
        '{"messages":{"role":"tool"}}',
        400,
        "json: cannot unmarshal object into Go struct field ChatRequest.messages of type []api.Message",
    ),
    (
        "ChatRequest",
        '{"messages":[{"role":5}]}',
        400,
        "json: cannot unmarshal number into Go struct field ChatRequest.messages.role of type string",
    ),
    (
        "GenerateRequest",
        '{"think":"zz"}',
        400,
        'invalid think value: "zz" (must be "high", "medium", "low", "max", true, or false)',
    ),
    ("GenerateRequest", '{"top_logprobs":22}', 400, "top_logprobs must be between 0 and 20"),
    ("GenerateRequest", '{"keep_alive":"zz"}', 400, 'time: invalid duration "zz"'),
    ("EmbedRequest", '{"input":5}', 400, "invalid input type"),
    ("EmbedRequest", '{"input":[5]}', 400, "invalid input type"),
    (
        "EmbedRequest",
        '{"dimensions":"x"}',
        400,
        "json: cannot unmarshal string into Go struct field EmbedRequest.dimensions of type int",
    ),
    (
        "GenerateRequest",
        '{"format":"xml"}',
        500,
        'invalid format: "\\"xml\\""; expected "json" or a valid JSON Schema object',
    ),
    ("GenerateRequest", '{"format":5}', 500, 'invalid format: "5"; expected "json" or a valid JSON Schema object'),
]


@pytest.mark.parametrize(("struct", "body", "status", "words"), REFUSED)
def test_bad_requests_are_refused_in_ollamas_words(struct: str, body: str, status: int, words: str) -> None:
    with pytest.raises(ApiError) as refused:
        wire.parse_request(body.encode(), struct)
    assert (refused.value.status, refused.value.message) == (status, words)


def test_bad_json_is_a_400() -> None:
    with pytest.raises(ApiError, match="invalid JSON") as refused:
        wire.parse_request(b"{bad", "GenerateRequest")
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": "a"}, 'option "top_k" must be of type integer'),
        ({"temperature": "a"}, 'option "temperature" must be of type float32'),
        ({"temperature": True}, 'option "temperature" must be of type float32'),
        ({"stop": "a"}, 'option "stop" must be of type array'),
        ({"stop": [1]}, 'option "stop" must be of an array of strings'),
    ],
)
def test_bad_options_are_a_500(options: dict[str, object], words: str) -> None:
    with pytest.raises(ApiError) as refused:
        wire.parse_options(options)
    assert (refused.value.status, refused.value.message) == (500, words)


def test_options_fall_back_to_ollamas_defaults() -> None:
    options = wire.parse_options({"top_k": 3.9, "temperature": 0, "seed": None, "unknown": object()})
    assert (options.top_k, options.temperature, options.seed, options.top_p) == (3, 0.0, -1, 0.9)


def test_a_chat_request() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "USER", "content": "hi", "extra": 1}, {"role": "assistant", "content": None}],
        "stream": False,
        "format": "json",
        "keep_alive": "1m",
        "logprobs": True,
        "tools": [],
        "options": None,
    }
    request = wire.parse_request(json.dumps(body).encode(), "ChatRequest")
    assert request.messages == [Message("user", "hi"), Message("assistant", "")]
    assert (request.stream, request.schema, request.keep_alive_s) == (False, {"type": "object"}, 60)
    assert (request.logprobs, request.tools, request.options) == (0, False, {})


def test_messages_without_a_template_are_joined() -> None:
    assert wire.join_messages([Message("user", "one")]) == "one"
    assert wire.join_messages([Message("system", "be"), Message("user", ""), Message("assistant", "so")]) == "be\n\nso"


def test_normalize() -> None:
    assert wire.normalize([3.0, 4.0]) == [0.6, 0.8]
    assert wire.normalize([0.0, 0.0]) == [0.0, 0.0]
    with pytest.raises(ApiError, match="NaN or Inf"):
        wire.normalize([math.nan])


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (112_960, "113K"), (1_115_264, "1.12M"), (134_515_008, "134.52M"), (7 * 10**9, "7B")],
)
def test_counts_for_people(number: int, text: str) -> None:
    assert wire.human_count(number) == text
