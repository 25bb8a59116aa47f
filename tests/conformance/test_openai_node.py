"""OpenAI's own library for Node.js, unchanged, over real sockets."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.conftest import locked
from tests.fabric import Fabric
from workers.embedded.simulated import transcript

CLIENT = f"`openai` {locked('openai')} for Node.js"
TEXT = transcript("Why is the sky blue?", 0, 20)

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def seen(node: str, play: Callable[..., dict[str, Any]], fleet: Fabric, key: str) -> dict[str, Any]:
    return play(node, "openai.mjs", OPENAI_BASE_URL=f"{fleet.http_url}/v1", OPENAI_API_KEY=key)


def test_chat_completions(seen: dict[str, Any]) -> None:
    choice = seen["chat"]["whole"]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (TEXT, "length")
    *chunks, counts = seen["chat"]["chunks"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == TEXT
    assert (counts["choices"], counts["usage"]["completion_tokens"]) == ([], 20)


def test_completions(seen: dict[str, Any]) -> None:
    assert seen["completions"]["choices"][0]["text"] == TEXT


def test_responses(seen: dict[str, Any]) -> None:
    assert seen["responses"]["whole"]["output_text"] == TEXT
    events = seen["responses"]["events"]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == TEXT
    assert events[-1]["type"] == "response.completed"


def test_embeddings(seen: dict[str, Any]) -> None:
    assert [len(one["embedding"]) for one in seen["embeddings"]["data"]] == [32, 32]


def test_models(seen: dict[str, Any]) -> None:
    assert {model["id"] for model in seen["models"]["list"]} >= {"llama2:latest", "simulated:latest"}
    assert seen["models"]["one"]["id"] == "llama2"


def test_a_model_that_is_nowhere(seen: dict[str, Any]) -> None:
    assert seen["missing"] == {
        "name": "NotFoundError",
        "status": 404,
        "code": "MODEL_NOT_FOUND",
        "message": "404 model 'none' not found",
    }


def test_aborting_a_stream_stops_the_engine(seen: dict[str, Any]) -> None:
    assert seen["abort"] == {"before": 1}


def test_a_key_that_is_wrong(seen: dict[str, Any]) -> None:
    assert (seen["refused"]["name"], seen["refused"]["status"]) == ("AuthenticationError", 401)
