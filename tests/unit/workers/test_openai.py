"""Continuing a stream of OpenAI's routes: what is asked of the engine, and which events the reader gets."""

from typing import Any

import pytest
from msgspec import json

from workers.continuation import CannotContinue
from workers.openai import DONE, OpenAIContinuation

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETE])
HEAD = {"id": "chatcmpl-1", "object": "chunk", "created": 5, "model": "m", "system_fingerprint": "fp_ollama"}
AT = "2026-01-01T00:00:00Z"


def job(path: str, **more: Any) -> bytes:
    said = {"messages": [{"role": "user", "content": "Why?"}]} if path == CHAT else {"prompt": "Why?"}
    return json.encode({"model": "m", "stream": True} | said | more)


def choice(path: str, text: str, reason: str | None = None) -> dict[str, Any]:
    said = {"delta": {"role": "assistant", "content": text}} if path == CHAT else {"text": text}
    return {"index": 0, **said, "finish_reason": reason}


def event(*choices: dict[str, Any], **more: Any) -> bytes:
    return b"data: %b\n\n" % json.encode({**HEAD, "choices": choices, **more})


def delivered(path: str, *texts: str) -> list[bytes]:
    """The lines of a stream so far."""
    return b"".join(event(choice(path, text)) for text in texts).splitlines(keepends=True)


def rendering(prompt: str) -> bytes:
    return json.encode({"_debug_info": {"rendered_template": prompt}})


def raw_answer(*texts: str, **final: Any) -> bytes:
    lines: list[dict[str, Any]] = [{"response": text} for text in texts]
    last = {"response": "", "done": True, "done_reason": "stop", "prompt_eval_count": 9, "eval_count": len(texts)}
    return b"".join(json.encode({"model": "m", "created_at": AT, **line}) + b"\n" for line in [*lines, last | final])


@PATHS
def test_the_stream_goes_on_with_the_same_head(path: str) -> None:
    continuation = OpenAIContinuation.plan(path, job(path), delivered(path, "Be", "cause"))
    assert continuation.render_path == ("/api/chat" if path == CHAT else "/api/generate")
    request = continuation.request(rendering("P:"))
    assert request is not None
    assert json.decode(request) == {
        "model": "m",
        "prompt": "P:Because",
        "raw": True,
        "stream": True,
        "think": False,
        "options": {"temperature": 1.0, "top_p": 1.0},
    }
    answer = raw_answer(" of", " it")
    got = b"".join(continuation.dress(answer[at : at + 7]) for at in range(0, len(answer), 7)) + continuation.eof()
    assert got == b"".join(
        [event(choice(path, " of")), event(choice(path, " it")), event(choice(path, "", "stop")), DONE]
    )
    assert not continuation.done


def test_the_job_is_rendered_as_ollama_would() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning": "hm"},
        {"role": "user", "content": "c"},
    ]
    body = job(CHAT, messages=messages, max_tokens=9, temperature=0, seed=2**70, stop="x", top_p=None, logit_bias={})
    render = OpenAIContinuation.plan(CHAT, body, []).render
    assert render is not None
    asked = json.decode(render)
    assert [(turn["role"], turn["content"], turn["thinking"]) for turn in asked["messages"]] == [
        ("system", "s", ""),
        ("user", "a", ""),
        ("user", "b", ""),
        ("assistant", "", "hm"),
        ("user", "c", ""),
    ]
    assert asked["options"] == {"temperature": 0, "seed": 2**70, "stop": ["x"], "top_p": 1.0, "num_predict": 1}
    assert asked["_debug_render_only"]


@pytest.mark.parametrize(("said", "meant"), [({}, 1.0), ({"top_p": 0}, 1.0), ({"top_p": 0.5}, 0.5)])
def test_a_completion_without_top_p(said: dict[str, Any], meant: float) -> None:
    render = OpenAIContinuation.plan(COMPLETE, job(COMPLETE, stop=["a", "b"], **said), []).render
    assert render is not None
    options = json.decode(render)["options"]
    assert (options["top_p"], options["stop"]) == (meant, ["a", "b"])


@PATHS
def test_what_was_delivered_counts(path: str) -> None:
    body = job(path, max_tokens=5, stream_options={"include_usage": True})
    continuation = OpenAIContinuation.plan(path, body, delivered(path, "a", "b"))
    request = continuation.request(rendering("P:"))
    assert request is not None
    assert json.decode(request)["options"]["num_predict"] == 3
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    got = continuation.dress(raw_answer("c", done_reason="length"))
    assert got == event(choice(path, "c")) + event(choice(path, "", "length")) + event(usage=usage) + DONE


@PATHS
def test_nothing_is_left_to_be_generated(path: str) -> None:
    continuation = OpenAIContinuation.plan(path, job(path, max_tokens=2), delivered(path, "a", "b"))
    assert continuation.request(rendering("P:")) is None
    assert continuation.ending() == event(choice(path, "", "length")) + DONE


@PATHS
@pytest.mark.parametrize("usage", [True, False])
def test_only_the_end_is_missing(path: str, usage: bool) -> None:
    events = [*delivered(path, "a"), *event(choice(path, "", "stop")).splitlines(keepends=True)]
    continuation = OpenAIContinuation.plan(path, job(path, stream_options={"include_usage": usage}), events)
    assert continuation.render is None
    assert continuation.request(b"") is None
    counted = event(usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
    assert continuation.ending() == (counted if usage else b"") + DONE
    assert not continuation.done


def test_an_event_that_was_cut_is_closed_first() -> None:
    continuation = OpenAIContinuation.plan(CHAT, job(CHAT), delivered(CHAT, "a")[:-1])
    continuation.request(rendering("P:"))
    assert continuation.dress(raw_answer("b")).startswith(b"\n" + event(choice(CHAT, "b")))


def test_a_stop_string_across_the_seam_ends_the_stream() -> None:
    continuation = OpenAIContinuation.plan(CHAT, job(CHAT, stop="END"), delivered(CHAT, "text E"))
    continuation.request(rendering("P:"))
    got = continuation.dress(raw_answer("N", "D and more"))
    assert continuation.done
    assert got == event(choice(CHAT, "", "stop")) + DONE


def test_an_engine_that_fails_gives_the_stream_no_end() -> None:
    continuation = OpenAIContinuation.plan(CHAT, job(CHAT), delivered(CHAT, "a"))
    continuation.request(rendering("P:"))
    assert DONE not in continuation.dress(b"nonsense\n") + continuation.eof()


@pytest.mark.parametrize(
    ("path", "body", "events", "why"),
    [
        (CHAT, job(CHAT, tools=[{}]), [], "tools"),
        (CHAT, job(CHAT, messages=[{"role": "tool", "content": "x"}]), [], "tools"),
        (CHAT, job(CHAT, stream=False), [], "not streamed"),
        (CHAT, job(CHAT, response_format={"type": "json_object"}), [], "response_format"),
        (CHAT, job(CHAT, reasoning_effort="high"), [], "reasoning"),
        (CHAT, job(CHAT, reasoning={"effort": "low"}), [], "reasoning"),
        (CHAT, job(CHAT, logprobs=True), [], "logprobs"),
        (COMPLETE, job(COMPLETE, suffix="x"), [], "suffix"),
        (COMPLETE, job(COMPLETE, prompt=["a"]), [], "expected shape"),
        (CHAT, job(CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]), [], "images"),
        (CHAT, b"[]", [], "expected shape"),
        (CHAT, job(CHAT, model=7), [], "cannot be read"),
        (CHAT, job(CHAT), [b"data: {\n"], "cannot be read"),
        (CHAT, job(CHAT), [b'data: {"choices":[{"delta":{"reasoning":"hm"}}]}\n'], "plain text"),
        (CHAT, job(CHAT), [b'data: {"choices":[{"delta":{"tool_calls":[{}]}}]}\n'], "plain text"),
        ("/v1/messages", b"{}", [], "cannot be continued"),
    ],
)
def test_what_cannot_be_continued(path: str, body: bytes, events: list[bytes], why: str) -> None:
    with pytest.raises(CannotContinue, match=why):
        OpenAIContinuation.plan(path, body, events)
