"""LangChain's integration of Ollama, unchanged, where it is installed."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.conftest import pinned
from tests.fabric import Fabric
from workers.embedded.simulated import transcript

VERSION = pinned("langchain-ollama")
CLIENT = f"`langchain-ollama` {VERSION}"
BY_HAND = True
pytestmark = pytest.mark.by_hand
TEXT = transcript("Why is the sky blue?", 3, 20)


@pytest.fixture(scope="module")
def seen(frameworks: str, play: Callable[..., dict[str, Any]], fleet: Fabric, key: str) -> dict[str, Any]:
    seen = play(frameworks, "trial_langchain.py", OLLAMA_HOST=f"{fleet.http_url}/k/{key}")
    assert seen["version"] == VERSION
    return seen


def test_chat_ollama(seen: dict[str, Any]) -> None:
    chat = seen["chat"]
    assert chat["whole"] == "".join(chat["parts"]) == TEXT
    assert (chat["reason"], chat["usage"]["output_tokens"]) == ("length", 20)


def test_ollama_llm(seen: dict[str, Any]) -> None:
    assert seen["llm"]["whole"] == "".join(seen["llm"]["parts"]) == TEXT


def test_ollama_embeddings(seen: dict[str, Any]) -> None:
    assert len(seen["embeddings"]["documents"]) == 2
    assert seen["embeddings"]["query"] == seen["embeddings"]["documents"][0]


def test_everything_asynchronously(seen: dict[str, Any]) -> None:
    calls = seen["asynchronously"]
    assert {calls["whole"], "".join(calls["parts"]), *calls["batch"]} == {TEXT}
    assert calls["embeddings"] == seen["embeddings"]["documents"]


def test_a_model_that_is_nowhere(seen: dict[str, Any]) -> None:
    assert seen["missing"] == {"status": 404, "error": "model 'none' not found"}


def test_a_key_in_a_header(seen: dict[str, Any]) -> None:
    assert seen["header"] == TEXT
