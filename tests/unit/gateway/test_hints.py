"""What a scheduler is told of a request: its length, what it may write, how its model is loaded, how it begins."""

import contextlib
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, FabricError
from common.prefix import BLOCK_BYTES, HASHES_MAX
from common.protocol import COUNT_MAX, Submit
from gateway import hints
from gateway.excerpt import FIELD_BYTES_MAX
from gateway.hints import EMBEDDING, GENERATING, IMAGE_BYTES, NO_HINTS, Hints, hints_of, options_with

Body = dict[str, Any]
Turns = list[tuple[str, str]]
"""(role, text)"""
TOOLS = [{"type": "function", "function": {"name": "look", "description": "x" * 700, "parameters": {}}}]
TURNS: Turns = [
    ("user", "Why is the sky blue? " * 40),
    ("assistant", "Because of Rayleigh's scattering. " * 50),
    ("user", 'ä ö ü € 😀 "quoted"\n' * 60),
    ("assistant", "I see. " * 100),
    ("user", "And at night?" * 70),
]


def of(path: str, body: Any) -> Hints:
    return hints_of(path, json.dumps(body).encode())


def ollama(turns: Turns, system: str = "Be brief.", **more: Any) -> Body:
    said = [{"role": role, "content": text} for role, text in turns]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *said], **more}


def anthropic(turns: Turns, system: str = "Be brief.", **more: Any) -> Body:
    """As its agents write it: blocks, of which the last is marked for caching."""
    said: list[Body] = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    said[-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}
    return {"model": "m", "max_tokens": 5, "system": [{"type": "text", "text": system}], "messages": said, **more}


def responses(turns: Turns, system: str = "Be brief.", **more: Any) -> Body:
    kinds = {"user": "input_text", "assistant": "output_text"}
    said = [{"role": role, "content": [{"type": kinds[role], "text": text}]} for role, text in turns]
    return {"model": "m", "instructions": system, "input": said, **more}


APIS: list[tuple[str, Callable[..., Body]]] = [
    ("/api/chat", ollama),
    ("/v1/chat/completions", ollama),
    ("/v1/messages", anthropic),
    ("/v1/responses", responses),
]
every_api = pytest.mark.parametrize(("path", "request_of"), APIS)


@every_api
def test_a_turn_begins_as_the_turn_before(path: str, request_of: Callable[..., Body]) -> None:
    chains = [of(path, request_of(TURNS[:count], tools=TOOLS)).prefix for count in (1, 3, 5)]
    for before, after in pairwise(chains):
        assert len(before) >= 2
        assert after[: len(before)] == before
        assert len(after) > len(before)


def test_a_conversation_is_the_same_by_every_api() -> None:
    chains = {of(path, request_of(TURNS)).prefix for path, request_of in APIS}
    assert len(chains) == 1
    assert of("/api/generate", {"system": "Be brief.", "prompt": TURNS[0][1]}) == of("/api/chat", ollama(TURNS[:1]))


@every_api
def test_what_is_said_of_a_prompt_is_its_length(path: str, request_of: Callable[..., Body]) -> None:
    text = sum(len(text.encode()) for _, text in TURNS)
    assert text < of(path, request_of(TURNS)).prompt_bytes < text + 100
    assert len(of(path, request_of(TURNS)).prefix) == of(path, request_of(TURNS)).prompt_bytes // BLOCK_BYTES


@every_api
@pytest.mark.parametrize("change", [{"system": "Be long."}, {"tools": TOOLS}, {"tools": [*TOOLS, *TOOLS]}])
def test_another_system_or_other_tools_are_another_beginning(
    path: str, request_of: Callable[..., Body], change: Body
) -> None:
    former = of(path, request_of(TURNS, tools=[{"name": "other"}])).prefix
    assert of(path, request_of(TURNS, **{"tools": [{"name": "other"}], **change})).prefix[0] != former[0]


@every_api
def test_what_comes_and_goes_has_no_place_in_it(path: str, request_of: Callable[..., Body]) -> None:
    body = request_of(TURNS)
    aside = {"id": "1", "user": "me", "metadata": {"user_id": "x"}, "stream": True, "temperature": 1, "seed": 7}
    aside |= {"options": {"seed": 5}, "keep_alive": 5, "format": "json", "tools": None, "previous_response_id": None}
    changed = aside | body
    assert json.loads(json.dumps(changed)) != body
    assert of(path, changed) == of(path, body)


def test_thinking_is_no_part_of_what_follows() -> None:
    def prefixes(path: str, thought: list[Any], plain: list[Any], key: str = "messages") -> tuple[Any, Any]:
        return of(path, {key: thought}).prefix, of(path, {key: plain}).prefix

    user, said = {"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y" * 600}
    for thinks in ({"thinking": "hm"}, {"reasoning": "hm"}, {"reasoning_content": "hm"}):
        one, other = prefixes("/api/chat", [user, said | thinks], [user, said])
        assert one == other
    blocks = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "y" * 600}]
    one, other = prefixes("/v1/messages", [user, said | {"content": blocks}], [user, said])
    assert one == other
    item = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}
    one, other = prefixes("/v1/responses", [user, item, said], [user, said], "input")
    assert one == other


def test_calls_of_tools_and_their_results_count() -> None:
    call = {"function": {"name": "look", "arguments": {"where": "x" * 600}}}
    seen = "s" * 600
    ask = {"role": "user", "content": "?"}

    def sizes(path: str, *items: Body, key: str = "messages") -> list[int]:
        return [of(path, {key: [ask, *items[:count]]}).prompt_bytes for count in range(len(items) + 1)]

    cases = [
        sizes("/api/chat", {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": seen}),
        sizes(
            "/v1/messages",
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "1", "name": "look", "input": {"a": "x" * 600}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": seen}]}]},
        ),
        sizes(
            "/v1/responses",
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": "x" * 600},
            {"type": "function_call_output", "call_id": "1", "output": seen},
            key="input",
        ),
    ]
    for nothing, called, answered in cases:
        assert nothing + 600 < called < nothing + 700
        assert called + 600 <= answered < called + 700
    assert of("/api/chat", {"messages": [ask | {"tool_calls": [{}]}]}) == of("/api/chat", {"messages": [ask]})


def test_an_image_counts_by_its_bytes() -> None:
    def prompts(image: str) -> list[tuple[str, Body]]:
        url = f"data:image/png;base64,{image}"
        source = {"type": "base64", "media_type": "image/png", "data": image}
        message: Body = {"role": "user", "content": "see"}
        see: Body = {"type": "text", "text": "see"}
        parts: list[tuple[str, str, Body]] = [
            ("/v1/chat/completions", "messages", {"image_url": {"url": url, "detail": "low"}}),
            ("/v1/responses", "input", {"image_url": url}),
            ("/v1/messages", "messages", {"source": source}),
        ]
        return [
            *((path, {key: [message | {"content": [{"type": "image"} | part, see]}]}) for path, key, part in parts),
            ("/api/chat", {"messages": [message | {"images": [image]}]}),
            ("/api/generate", {"prompt": "see", "images": [image]}),
        ]

    one, other = ([of(path, body) for path, body in prompts(letter * 100_000)] for letter in "AB")
    assert len({told.prefix for told in one[:-1]}) == 1
    for same, different in zip(one, other, strict=True):
        assert IMAGE_BYTES < same.prompt_bytes < IMAGE_BYTES + 50
        assert same.prefix[0] != different.prefix[0]


def test_a_prompt_that_grows_begins_as_before() -> None:
    for path in ("/api/generate", "/v1/completions"):
        before, after = (of(path, {"prompt": "x" * size}).prefix for size in (3_000, 6_000))
        assert after[: len(before)] == before != ()
    assert of("/v1/completions", {"prompt": ["x" * 600, "y"]}).prefix != ()
    assert of("/api/generate", {"prompt": "x", "context": list(range(1000))}).prefix != ()
    plain = of("/api/generate", {"prompt": "x" * 600})
    assert of("/api/generate", {"prompt": "x" * 600, "template": "t {{ .Prompt }}"}).prefix != plain.prefix
    assert of("/api/generate", {"prompt": "x" * 600, "suffix": "y" * 600}).prefix[:1] == plain.prefix[:1]


@pytest.mark.parametrize("path", sorted(EMBEDDING))
def test_what_is_embedded_has_a_length_and_nothing_to_write(path: str) -> None:
    key = "prompt" if path == "/api/embeddings" else "input"
    assert of(path, {key: "x" * 1000}) == Hints(prompt_bytes=1002, output_max=0)
    assert of(path, {key: ["x" * 1000] * 10}).prompt_bytes > 10_000


def test_of_other_calls_nothing_is_told() -> None:
    assert of("/api/show", {"model": "m", "system": "x" * 1000}) == NO_HINTS


@pytest.mark.parametrize(
    ("number", "told"),
    [
        *((7, 7), (7.0, 7), (10**30, COUNT_MAX), (1e300, COUNT_MAX)),
        *[(0, None), (-1, None), (-2, None), (0.5, None), ("7", None), (None, None), (True, None), ([], None)],
    ],
)
def test_the_most_that_may_be_written(number: Any, told: int | None) -> None:
    assert of("/api/chat", {"options": {"num_predict": number}}).output_max == told
    assert of("/v1/messages", {"max_tokens": number}).output_max == told
    assert of("/v1/chat/completions", {"max_completion_tokens": number}).output_max == told
    assert of("/v1/responses", {"max_output_tokens": number}).output_max == told


def test_each_api_has_its_own_limit() -> None:
    assert of("/api/chat", {"max_tokens": 7}).output_max is None
    assert of("/v1/chat/completions", {"options": {"num_predict": 7}}).output_max is None
    assert of("/v1/chat/completions", {"max_tokens": 9, "max_completion_tokens": 7}).output_max == 7
    assert of("/v1/chat/completions", {"max_tokens": 9, "max_completion_tokens": None}).output_max == 9


@pytest.mark.parametrize(
    ("options", "variant"),
    [
        ({}, ""),
        (None, ""),
        ("x", ""),
        ({"temperature": 1, "num_predict": 5, "seed": 1}, ""),
        ({"num_thread": 4, "num_ctx": 8192.0}, "num_ctx=8192,num_thread=4"),
        ({"use_mmap": False, "num_gpu": 20, "num_batch": 512}, "num_batch=512,num_gpu=20,use_mmap=false"),
        ({"num_gpu": -1, "num_ctx": None}, ""),
        ({"num_ctx": "8192"}, ""),
        ({"num_ctx": 10**300}, ""),
    ],
)  # fmt: skip
def test_the_options_a_model_is_loaded_with(options: Any, variant: str) -> None:
    assert of("/api/chat", {"options": options}).variant == variant
    assert of("/api/embed", {"options": options}).variant == variant
    assert of("/v1/chat/completions", {"options": options}).variant == ""


def test_a_shift_that_is_turned_off_is_a_variant() -> None:
    assert of("/api/chat", {"shift": False, "options": {"num_ctx": 5}}).variant == "num_ctx=5,shift=false"
    assert of("/api/chat", {"shift": True}).variant == of("/api/chat", {"shift": None}).variant == ""


def test_no_variant_is_too_long_for_the_wire() -> None:
    options = dict.fromkeys(hints._RUNNER, 10**15)
    told = of("/api/chat", {"options": options, "shift": False})
    assert msgspec.convert(msgspec.to_builtins(submit(told)), Submit) == submit(told)


# What is not as it should be ------------------------------------------------------------------------------------------

texts = st.text(max_size=30)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({*hints._Body.__struct_fields__, *hints._Message.__struct_fields__, *hints._Block.__struct_fields__})
near = st.recursive(
    json_values,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6),
    max_leaves=20,
)
paths = st.sampled_from(sorted(GENERATING | EMBEDDING))


def submit(told: Hints) -> Submit:
    return Submit(
        rid=bytes(16),
        client="c",
        ref="r",
        model="m:latest",
        path="/",
        prompt_bytes=told.prompt_bytes,
        output_max=told.output_max,
        variant=told.variant,
        prefix=told.prefix,
    )


@given(paths, st.dictionaries(st.sampled_from(FIELDS), near, max_size=8))
def test_whatever_a_body_holds_there_are_hints_that_travel(path: str, body: Body) -> None:
    told = of(path, body)
    assert told == of(path, body)
    assert msgspec.convert(msgspec.to_builtins(submit(told)), Submit) == submit(told)
    with contextlib.suppress(FabricError):
        options_with(json.dumps(body).encode(), 8)


@given(paths, st.binary(max_size=100) | st.sampled_from([b"", b"null", b"[]", b"{", b'"x"', b"[" * 100_000]))
def test_what_is_no_request_has_no_hints(path: str, body: bytes) -> None:
    assert hints_of(path, body) == NO_HINTS
    with pytest.raises(FabricError, match="not the JSON"):
        options_with(body, 8)


def test_a_conversation_that_cannot_be_decoded_counts_as_it_is_written() -> None:
    strange = [{"role": "user", "content": "x" * 2000}, {"role": 5, "content": {"no": "list"}}, "x" * 2000]
    before, after = (of("/api/chat", {"messages": strange[:count]}).prefix for count in (2, 3))
    assert len(before) >= 3
    assert after[: len(before)] == before


def test_a_conversation_of_a_great_many_objects_is_not_decoded() -> None:
    body = {"messages": [{"role": "user", "content": "x"}] * 30_000}
    told = of("/api/chat", body)
    assert told.prompt_bytes > len(json.dumps(body["messages"]))
    assert 64 < len(told.prefix) <= HASHES_MAX


def test_a_body_that_is_too_large_to_be_read_has_no_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "READ_MAX", 1000)
    body = ollama(TURNS, options={"num_predict": 7, "num_ctx": 5})
    assert of("/api/chat", body) == Hints(0, 7, "num_ctx=5")


@pytest.mark.parametrize("images", [5, [], {}, ["A" * 10, 5], "A" * 10, None])
def test_images_that_are_none_do_no_harm(images: Any) -> None:
    body = {"messages": [{"role": "user", "content": "see", "images": images}]}
    assert of("/api/chat", body).prompt_bytes < 30
    blocks = {"messages": [{"role": "user", "content": [{"image_url": images}, {"source": images}]}]}
    assert of("/v1/messages", blocks).prompt_bytes < 30


def test_so_many_images_are_looked_at() -> None:
    body = {"messages": [{"role": "user", "content": "see", "images": ["A"] * 1000}]}
    assert of("/api/chat", body).prompt_bytes < (hints.IMAGES_MAX + 1) * IMAGE_BYTES


@pytest.mark.parametrize("image", ["", "A", "A" * (hints.DIGEST_BYTES + 1), "A" * IMAGE_BYTES])
def test_a_prompt_of_tiny_images_is_no_larger_than_they(image: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "images": [image] * hints.IMAGES_MAX}] * 100}).encode()
    assert hints_of("/api/chat", body).prompt_bytes < len(body)


def test_tiny_images_differ() -> None:
    told = [of("/api/generate", {"prompt": "x" * 600, "images": [letter * 40]}).prefix for letter in "AB"]
    assert told[0] != told[1]


def test_a_conversation_of_a_great_many_strings_is_not_read() -> None:
    body = {"messages": [{"role": "user", "images": [""] * hints.QUOTES_MAX}]}
    told = of("/api/chat", body)
    assert told.prompt_bytes > len(json.dumps(body["messages"]))


def test_any_buffer_will_do() -> None:
    body = json.dumps(ollama(TURNS)).encode()
    assert hints_of("/api/chat", memoryview(body)) == hints_of("/api/chat", body)


# One num_ctx for all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({}, {"num_ctx": 8192}),
        ({"options": None}, {"num_ctx": 8192}),
        ({"options": {"num_ctx": 4096, "temperature": 0.5, "stop": ["x"]}},
         {"num_ctx": 8192, "temperature": 0.5, "stop": ["x"]}),
        ({"options": "x"}, None),
    ],
)  # fmt: skip
def test_the_options_get_the_num_ctx_that_is_wanted(body: Body, options: Body | None) -> None:
    told = options_with(json.dumps({"model": "m", **body}).encode(), 8192)
    assert (None if told is None else json.loads(told)) == options


def test_options_that_are_too_large_to_be_read_are_refused() -> None:
    """Passed on as they are, they would get the client the num_ctx it wants."""
    with pytest.raises(FabricError, match="more than 65536 bytes") as refused:
        options_with(b'{"options":{' + b" " * FIELD_BYTES_MAX + b'"num_ctx":131072}}', 8192)
    assert refused.value.code is Code.INVALID_MESSAGE
