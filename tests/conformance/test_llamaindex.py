"""LlamaIndex' integrations of Ollama, unchanged, where they are installed."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.conftest import pinned
from workers.embedded.simulated import transcript

VERSIONS = {name: pinned(name) for name in ("llama-index-llms-ollama", "llama-index-embeddings-ollama")}
CLIENT = ", ".join(f"`{name}` {version}" for name, version in VERSIONS.items())
BY_HAND = True
pytestmark = pytest.mark.by_hand
TEXT = transcript("Why is the sky blue?", 3, 20)


@pytest.fixture(scope="module")
def seen(frameworks: str, play: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    seen = play(frameworks, "trial_llamaindex.py")
    assert seen["versions"] == VERSIONS
    return seen


def test_complete(seen: dict[str, Any]) -> None:
    assert seen["complete"]["whole"] == "".join(seen["complete"]["parts"]) == TEXT


def test_chat(seen: dict[str, Any]) -> None:
    assert seen["chat"]["whole"] == "".join(seen["chat"]["parts"]) == TEXT


def test_embeddings(seen: dict[str, Any]) -> None:
    assert len(seen["embeddings"]["batch"]) == 2
    assert seen["embeddings"]["query"] == seen["embeddings"]["batch"][0]


def test_everything_asynchronously(seen: dict[str, Any]) -> None:
    calls = seen["asynchronously"]
    assert {calls["whole"], "".join(calls["parts"])} == {TEXT}
    assert calls["embeddings"] == seen["embeddings"]["batch"]


def test_a_model_that_is_nowhere(seen: dict[str, Any]) -> None:
    assert seen["missing"] == {"status": 404, "error": "model 'none' not found"}
