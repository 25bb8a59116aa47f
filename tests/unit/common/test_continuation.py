"""Which jobs may be continued at all."""

from typing import Any

import pytest
from msgspec import json

from common.continuation import objection

GENERATE: dict[str, Any] = {"model": "m", "prompt": "Why?"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Why?"}]}
SCHEMA = {"type": "object"}
CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stream": True},
        {"stream": None, "tools": None, "format": None, "think": None, "images": None, "context": None, "suffix": None},
        {"tools": [], "format": "", "think": False, "images": [], "context": [], "suffix": ""},
        {"options": {"stop": ["a"], "num_predict": 3}, "keep_alive": 0, "logprobs": True, "unheard_of": [1]},
    ],
)
@pytest.mark.parametrize(("path", "job"), [("/api/generate", GENERATE), ("/api/chat", CHAT)])
def test_plain_streamed_text_may_be_continued(path: str, job: dict[str, Any], more: dict[str, Any]) -> None:
    assert objection(path, json.encode(job | more)) == ""


@pytest.mark.parametrize("more", [{"raw": True}, {"system": "Be brief.", "template": "{{ .Prompt }}"}])
def test_what_went_into_the_prompt_does_not_matter(more: dict[str, Any]) -> None:
    assert objection("/api/generate", json.encode(GENERATE | more)) == ""


def test_tool_calls_of_earlier_turns_are_part_of_the_prompt() -> None:
    turns = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}]
    assert objection("/api/chat", json.encode(CHAT | {"messages": CHAT["messages"] + turns})) == ""


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"stream": False}, "not streamed"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"format": "json"}, "`format`"),
        ({"format": SCHEMA}, "`format`"),
        ({"format": {}}, "`format`"),
        ({"think": True}, "`think`"),
        ({"think": "low"}, "`think`"),
        ({"images": ["aGk="]}, "images"),
        ({"messages": [{"role": "user", "images": ["aGk="]}, {"role": "user"}]}, "images"),
        ({"suffix": "}"}, "`suffix`"),
        ({"context": [1, 2]}, "`context`"),
    ],
)
def test_what_cannot_be_continued_says_why(more: dict[str, Any], named: str) -> None:
    assert named in objection("/api/chat", json.encode(CHAT | more))


@pytest.mark.parametrize("path", ["/api/embed", "/v1/messages", "/api/generate/", ""])
def test_other_routes_cannot_be_continued(path: str) -> None:
    assert path in objection(path, json.encode(GENERATE))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"messages": [1]}', b'{"tools": "\xff"}', b'{"tools": ' + b"[" * 100_000]
)
def test_a_body_that_makes_no_sense_is_objected_to(body: bytes) -> None:
    assert "no JSON object" in objection("/api/chat", body)
