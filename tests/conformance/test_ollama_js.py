"""Ollama's own library for Node.js, unchanged, over real sockets."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.conftest import locked
from workers.embedded.simulated import transcript

CLIENT = f"`ollama` {locked('ollama')} for Node.js"
TEXT = transcript("Why is the sky blue?", 3, 20)

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def seen(node: str, play: Callable[..., dict[str, Any]], new_key: Callable[..., str]) -> dict[str, Any]:
    return play(node, "ollama.mjs", WEFTLINE_WRITER=new_key("models:read", "models:write"))


def test_generate(seen: dict[str, Any]) -> None:
    whole, parts = seen["generate"]["whole"], seen["generate"]["parts"]
    assert (whole["response"], whole["done_reason"]) == (TEXT, "length")
    assert "".join(part["response"] for part in parts) == TEXT
    assert [part["done"] for part in parts] == [False] * 20 + [True]


def test_chat(seen: dict[str, Any]) -> None:
    whole, parts = seen["chat"]["whole"], seen["chat"]["parts"]
    assert whole["message"] == {"role": "assistant", "content": TEXT}
    assert "".join(part["message"]["content"] for part in parts) == TEXT


def test_embed_and_embeddings(seen: dict[str, Any]) -> None:
    assert len(seen["embed"]["embed"]["embeddings"]) == 2
    assert len(seen["embed"]["embeddings"]["embedding"]) == 32


def test_list_show_ps_and_version(seen: dict[str, Any]) -> None:
    assert {model["name"] for model in seen["models"]["list"]["models"]} >= {"llama2:latest", "simulated:latest"}
    assert seen["models"]["show"]["capabilities"] == ["completion"]
    assert isinstance(seen["models"]["ps"]["models"], list)
    assert seen["version"]["version"]


def test_a_model_that_is_nowhere(seen: dict[str, Any]) -> None:
    error = {"name": "ResponseError", "message": "model 'none' not found", "status_code": 404}
    assert seen["missing"] == {"whole": error, "streamed": error}


def test_aborting_a_stream_stops_the_engine(seen: dict[str, Any]) -> None:
    assert seen["abort"] == {"before": 1, "error": "AbortError"}


def test_pull_copy_and_delete(seen: dict[str, Any]) -> None:
    assert seen["manage"]["steps"][-1] == {"status": "success"}
    success = {"status": "success"}
    assert (seen["manage"]["copied"], seen["manage"]["deleted"]) == (success, [success, success])


def test_a_key_in_the_path(seen: dict[str, Any]) -> None:
    assert seen["path"]["response"] == TEXT


def test_a_key_that_is_missing(seen: dict[str, Any]) -> None:
    assert seen["refused"]["status_code"] == 401
    assert seen["refused"]["message"].startswith("a key is needed")
