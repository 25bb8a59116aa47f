"""OpenAI's and Anthropic's routes of the engine, over the simulated backend, through real sockets.

The expected shapes are what Ollama v0.24.0 answered to the same requests.
"""

import asyncio
import base64
import contextlib
import json
import re
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from workers.embedded.server import running
from workers.embedded.simulated import Settings, SimulatedBackend, transcript

TURNS = [{"role": "user", "content": "Why?"}]
CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "simulated", "messages": TURNS, "max_tokens": 3},
    "/v1/completions": {"model": "simulated", "prompt": "Why?", "max_tokens": 3},
    "/v1/responses": {"model": "simulated", "input": "Why?", "max_output_tokens": 3},
    "/v1/messages": {"model": "simulated", "messages": TURNS, "max_tokens": 3},
}
WORDS = [f" {word}" for word in transcript("Why?", 0, 3).split()]
TEXT = "".join(WORDS)


@contextlib.asynccontextmanager
async def engine(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    backend = SimulatedBackend(Settings(**settings))
    async with running(backend) as url, httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as client:
        yield client


async def ask(path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    async with engine() as client:
        response = await client.post(path, json=CALLS.get(path, {}) | body)
        assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
        answer: dict[str, Any] = response.json()
        return answer


async def events(client: httpx.AsyncClient, path: str, **body: Any) -> list[tuple[str, Any]]:
    """The names and data of a stream's events; of data that is no JSON, the text."""
    response = await client.post(path, json=CALLS[path] | {"stream": True} | body)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    found = [re.fullmatch(r"(?:event: (\S+)\n)?data: (.*)", block) for block in blocks]
    assert all(found)
    return [(one[1] or "", json.loads(one[2]) if one[2] != "[DONE]" else one[2]) for one in found if one]


async def inject(client: httpx.AsyncClient, **fault: Any) -> None:
    assert (await client.post("/debug/faults", json=fault)).status_code == 200


# -- chat completions ------------------------------------------------------------------------------------------------


async def test_a_chat_completion_in_one_document() -> None:
    answer = await ask("/v1/chat/completions")
    assert re.fullmatch(r"chatcmpl-\d+", answer.pop("id"))
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "chat.completion",
        "model": "simulated",
        "system_fingerprint": "fp_ollama",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
    }


async def test_a_streamed_chat_completion_ends_with_its_reason_its_usage_and_done() -> None:
    async with engine() as client:
        *chunks, done = await events(client, "/v1/chat/completions", stream_options={"include_usage": True})
        plain = await events(client, "/v1/chat/completions")
    assert done == ("", "[DONE]")
    *texts, end, usage = [data for _, data in chunks]
    keys = ["id", "object", "created", "model", "system_fingerprint", "choices"]
    assert [list(chunk) for chunk in (*texts, end)] == [keys] * 4
    assert {chunk["object"] for chunk in (*texts, end, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (*texts, end, usage)}) == 1
    assert [chunk["choices"] for chunk in texts] == [
        [{"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}] for word in WORDS
    ]
    ended = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": "length"}
    assert end["choices"] == [ended]
    assert list(usage) == [*keys, "usage"]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert [data["choices"][0]["finish_reason"] for _, data in plain[:-1]] == [None, None, None, "length"]
    assert plain[-1] == done


async def test_the_options_of_a_chat_completion_are_the_engines() -> None:
    stop = transcript("Why?", 3, 20)[33:37]
    stopped = await ask("/v1/chat/completions", max_tokens=20, seed=3, stop=stop)
    whole = transcript("Why?", 3, 20)
    assert stopped["choices"][0]["message"]["content"] == whole[: whole.find(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    limited = await ask("/v1/chat/completions", max_tokens=None, max_completion_tokens=2)
    assert limited["usage"]["completion_tokens"] == 2


async def test_a_chat_completion_is_continued_from_its_rendered_prompt() -> None:
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": parts}]
    rendered = await ask("/v1/chat/completions", messages=turns, _debug_render_only=True)
    assert rendered["choices"] == [{"index": 0, "message": {"role": "", "content": ""}, "finish_reason": None}]
    assert rendered["_debug_info"] == {"rendered_template": "Be.\n\nOne.\n\nTwo."}
    async with engine() as client:
        # Streamed, Ollama has no place for the prompt: one empty chunk, and no [DONE].
        ((_, chunk),) = await events(client, "/v1/chat/completions", _debug_render_only=True)
    assert chunk["choices"][0]["delta"]["content"] == ""


# -- text completions ------------------------------------------------------------------------------------------------


async def test_a_completion_in_one_document() -> None:
    for prompt in ("Why?", ["Why?"]):
        answer = await ask("/v1/completions", prompt=prompt)
        assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
        assert answer["object"] == "text_completion"
        assert answer["choices"] == [{"text": TEXT, "index": 0, "finish_reason": "length"}]
        assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}


async def test_a_streamed_completion_has_an_empty_usage_in_every_chunk_if_it_is_wanted() -> None:
    async with engine() as client:
        *chunks, done = await events(client, "/v1/completions", stream_options={"include_usage": True})
        plain = await events(client, "/v1/completions")
    assert done == ("", "[DONE]")
    keys = ["id", "object", "created", "choices", "model", "system_fingerprint", "usage"]
    assert all(list(chunk) == keys for _, chunk in chunks)
    assert [choice["text"] for _, chunk in chunks for choice in chunk["choices"]] == [*WORDS, ""]
    assert [chunk["usage"]["total_tokens"] for _, chunk in chunks] == [0, 0, 0, 0, 4]
    assert all("usage" not in chunk for _, chunk in plain[:-1])


async def test_an_empty_prompt_loads_the_model() -> None:
    async with engine() as client:
        (_, chunk), done = await events(client, "/v1/completions", prompt="")
        assert chunk["choices"] == [{"text": "", "index": 0, "finish_reason": "load"}]
        assert done == ("", "[DONE]")
        assert (await client.get("/api/ps")).json()["models"][0]["name"] == "simulated:latest"


# -- embeddings and models -------------------------------------------------------------------------------------------


async def test_embeddings_as_numbers_and_as_base64() -> None:
    body: dict[str, Any] = {"model": "simulated-embed", "input": ["a b", "c"], "dimensions": 5}
    answer = await ask("/v1/embeddings", **body)
    coded = await ask("/v1/embeddings", encoding_format="base64", **body)
    assert answer.keys() == coded.keys() == {"object", "data", "model", "usage"}
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    for index, (plain, packed) in enumerate(zip(answer["data"], coded["data"], strict=True)):
        assert (plain["object"], plain["index"], len(plain["embedding"])) == ("embedding", index, 5)
        unpacked = struct.unpack("<5f", base64.b64decode(packed["embedding"]))
        assert list(unpacked) == pytest.approx(plain["embedding"], rel=1e-6)
    assert len((await ask("/v1/embeddings", model="simulated-embed", input=""))["data"]) == 1


async def test_models_are_listed_and_found() -> None:
    async with engine(models=["one", "mine/two:7b"]) as client:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [(item["id"], item["owned_by"]) for item in listed["data"]] == [
            ("one:latest", "library"),
            ("mine/two:7b", "mine"),
            ("simulated-embed:latest", "library"),
        ]
        found = (await client.get("/v1/models/one")).json()
        assert found == {"id": "one", "object": "model", "created": 1767225600, "owned_by": "library"}
        missing = await client.get("/v1/models/x")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


# -- responses -------------------------------------------------------------------------------------------------------


async def test_a_response_in_one_document() -> None:
    answer = await ask("/v1/responses", instructions="Be.", temperature=0.5)
    item = answer["output"][0]
    text = transcript("Be.\n\nWhy?", 0, 3)
    assert item.pop("id").startswith("msg_")
    assert answer["output"] == [
        {
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}],
        }
    ]
    assert list(answer)[:6] == ["id", "object", "created_at", "completed_at", "status", "incomplete_details"]
    assert len(answer) == 31
    assert answer["completed_at"] >= answer["created_at"]
    told = ("status", "model", "instructions", "temperature", "top_p", "max_output_tokens")
    assert [answer[name] for name in told] == ["completed", "simulated", "Be.", 0.5, 1, 3]
    assert answer["usage"] == {
        "input_tokens": 2,
        "output_tokens": 3,
        "total_tokens": 5,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


async def test_the_events_of_a_streamed_response() -> None:
    async with engine() as client:
        stream = await events(client, "/v1/responses")
    names = [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [name for name, _ in stream] == [f"response.{name}" for name in names]
    for index, (name, data) in enumerate(stream):
        assert (data["type"], data["sequence_number"]) == (name, index)
        assert list(data) == sorted(data)
    assert [data["delta"] for name, data in stream if name.endswith("delta")] == WORDS
    assert stream[0][1]["response"]["status"] == "in_progress"
    assert stream[0][1]["response"]["usage"] is None
    completed = stream[-1][1]["response"]
    assert completed["status"] == "completed"
    assert completed["output"] == [stream[-2][1]["item"]]
    assert completed["output"][0]["content"][0]["text"] == stream[-4][1]["text"] == TEXT
    assert completed["usage"]["output_tokens"] == 3


async def test_a_responses_input_is_a_conversation() -> None:
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "One."}]},
        {"type": "reasoning", "encrypted_content": "hm"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Two."}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "Three."},
    ]
    answer = await ask("/v1/responses", input=turns)
    assert answer["output"][0]["content"][0]["text"] == transcript("One.\n\nTwo.\n\nThree.", 0, 3)


# -- messages --------------------------------------------------------------------------------------------------------


async def test_a_message_in_one_document() -> None:
    answer = await ask("/v1/messages", thinking={"type": "enabled"})
    assert re.fullmatch(r"msg_[0-9a-f]{24}", answer.pop("id"))
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "simulated",
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "max_tokens",
        "usage": {"input_tokens": 1, "output_tokens": 3},
    }


async def test_the_events_of_a_streamed_message() -> None:
    async with engine() as client:
        stream = await events(client, "/v1/messages", system=[{"type": "text", "text": "Be."}])
    assert all(data["type"] == name for name, data in stream)
    (_, start), (_, block), *deltas, (_, stop), (_, delta), (last, _) = stream
    assert start["message"].pop("id").startswith("msg_")
    assert start["message"] == {
        "type": "message",
        "role": "assistant",
        "model": "simulated",
        "content": [],
        "usage": {"input_tokens": (3 + 4 + 4) // 4, "output_tokens": 0},  # an estimate: bytes by four
    }
    assert block == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    text = "".join(data["delta"]["text"] for _, data in deltas)
    assert text == transcript("Be.\n\nWhy?", 0, 3)
    assert {(name, data["index"], data["delta"]["type"]) for name, data in deltas} == {
        ("content_block_delta", 0, "text_delta")
    }
    assert stop == {"type": "content_block_stop", "index": 0}
    assert delta["delta"] == {"stop_reason": "max_tokens"}
    assert delta["usage"] == {"input_tokens": 2, "output_tokens": 3}
    assert last == "message_stop"


async def test_blocks_of_a_message_and_stop_sequences() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "."}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Three."}, {"type": "tool_result", "content": "Two."}],
        },
    ]
    whole = transcript("One.\n\nTwo.\n\nThree.", 0, 9)
    stop = whole[20:24]
    answer = await ask("/v1/messages", messages=turns, max_tokens=9, stop_sequences=[stop])
    assert answer["content"] == [{"type": "text", "text": whole[: whole.find(stop)]}]
    assert answer["stop_reason"] == "end_turn"


# -- errors ----------------------------------------------------------------------------------------------------------

NO_TOOLS = "registry.ollama.ai/library/simulated:latest does not support tools"
NO_IMAGES = "this model is missing data required for image input"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        *[(path, {"model": "x"}, 404, "model 'x' not found") for path in CALLS],
        *[(path, {"model": "x", "stream": True}, 404, "model 'x' not found") for path in CALLS],
        *[(path, {"tools": [{}]}, 400, NO_TOOLS) for path in CALLS if path != "/v1/completions"],
        ("/v1/chat/completions", {"model": ""}, 400, "model is required"),
        ("/v1/chat/completions", {"model": "simulated-embed"}, 400, '"simulated-embed" does not support chat'),
        ("/v1/chat/completions", {"messages": []}, 400, "[] is too short - 'messages'"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user"}]},
            400,
            "invalid message content type: <nil>",
        ),
        ("/v1/chat/completions", {"messages": [{"content": [{"type": "x"}]}]}, 400, "invalid message format"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [PICTURE]}]}, 400, NO_IMAGES),
        ("/v1/chat/completions", {"reasoning_effort": "high"}, 400, '"simulated" does not support thinking'),
        (
            "/v1/chat/completions",
            {"max_tokens": "x"},
            400,
            "json: cannot unmarshal string into Go struct field ChatCompletionRequest.max_tokens of type int",
        ),
        (
            "/v1/completions",
            {"suffix": "x"},
            400,
            "registry.ollama.ai/library/simulated:latest does not support insert",
        ),
        (
            "/v1/completions",
            {"prompt": ["a", "b"]},
            400,
            "json: cannot unmarshal array into Go struct field CompletionRequest.prompt of type string",
        ),
        ("/v1/completions", {"stop": [1]}, 400, "invalid type for 'stop' field: float64"),
        ("/v1/embeddings", {"model": "simulated-embed"}, 400, "invalid input"),
        (
            "/v1/embeddings",
            {"model": "x", "input": "a"},
            404,
            'model "x" not found, try pulling it first',
        ),
        (
            "/v1/embeddings",
            {"model": "simulated-embed", "input": "a", "encoding_format": "hex"},
            400,
            "Invalid value for 'encoding_format' = hex. Supported values: ['float', 'base64'].",
        ),
        ("/v1/responses", {"input": [{"type": "x"}]}, 400, 'input[0]: unknown input item type: "x"'),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            400,
            "file inputs are not currently supported",
        ),
        ("/v1/responses", {"reasoning": {"effort": "low"}}, 400, '"simulated" does not support thinking'),
        ("/v1/messages", {"model": ""}, 400, "model is required"),
        ("/v1/messages", {"max_tokens": 0}, 400, "max_tokens is required and must be positive"),
        ("/v1/messages", {"messages": []}, 400, "messages is required"),
        ("/v1/messages", {"messages": [{"content": [{"type": "image"}]}]}, 400, NO_IMAGES),
    ],
)
async def test_errors_are_ollamas_in_the_words_of_the_api(
    path: str, body: dict[str, Any], status: int, message: str
) -> None:
    answer = await ask(path, status, **body)
    kind = {400: "invalid_request_error", 404: "not_found_error"}[status]
    if path == "/v1/messages":
        assert re.fullmatch(r"req_[0-9a-f]{24}", answer.pop("request_id"))
        assert answer == {"type": "error", "error": {"type": kind, "message": message}}
    else:
        assert answer == {"error": {"message": message, "type": kind, "param": None, "code": None}}


# -- faults and clients that leave -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CALLS)
async def test_a_refusal_by_the_runner_has_its_status(path: str) -> None:
    async with engine() as client:
        await inject(client, kind="http_503")
        response = await client.post(path, json=CALLS[path] | {"stream": True})
        assert response.status_code == 503
        told = response.json()["error"]
        assert told["message"] == "server busy, please try again.  maximum pending requests exceeded"
        assert told["type"] == ("overloaded_error" if path == "/v1/messages" else "api_error")


@pytest.mark.parametrize("kind", ["truncate", "error_line"])
@pytest.mark.parametrize("path", CALLS)
async def test_a_stream_that_fails_ends_without_what_marks_its_end(path: str, kind: str) -> None:
    async with engine() as client:
        whole = await events(client, path)
        await inject(client, kind=kind, after=2)
        broken = await events(client, path)
    last: dict[str, Any] = {}
    if kind == "error_line" and "completions" in path:
        last = broken.pop()[1]  # Ollama makes an empty chunk of the error
        assert last["model"] == ""
        assert last["choices"][0].get("text", last["choices"][0].get("delta", {}).get("content")) == ""
        assert last["choices"][0]["finish_reason"] is None
    shown = [name for name, _ in broken]
    assert shown == [name for name, _ in whole][: len(shown)]
    assert 0 < len(shown) < len(whole) - 1
    assert json.dumps([data for _, data in broken]).count(WORDS[1]) == 1
    assert "[DONE]" not in [data for _, data in broken]


@pytest.mark.parametrize("path", CALLS)
async def test_a_connection_that_dies_is_seen_to(path: str) -> None:
    async with engine() as client:
        await inject(client, kind="die_mid", after=2)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(path, json=CALLS[path] | {"stream": True})


@pytest.mark.parametrize("path", CALLS)
async def test_a_client_that_leaves_frees_its_slot(path: str) -> None:
    async with engine(slots=1) as client:
        await inject(client, kind="hang", after=1)
        async with client.stream("POST", path, json=CALLS[path] | {"stream": True}) as hanging:
            assert "data: " in await anext(hanging.aiter_text())
            assert (await client.get("/debug/slots")).json()["models"]["simulated:latest"]["busy"] == 1
        async with asyncio.timeout(10):
            assert (await client.post(path, json=CALLS[path])).status_code == 200
