"""How the APIs word a failure."""

from typing import Any

import pytest
from msgspec import json

from common.errors import Code
from common.protocol import Failed
from gateway.dialects import QUEUE_FULL_TEXT, Anthropic, Dialect, Ollama, OpenAI, status_of, words_of


def failed(code: Code, **more: Any) -> Failed:
    return Failed(rid=b"r", attempt=1, code=code, message="it broke", **more)


@pytest.mark.parametrize(
    ("dialect", "status", "document"),
    [
        (Ollama(), 404, {"error": "text", "code": "NOT_FOUND"}),
        (Ollama(), 401, {"error": "text", "code": "NOT_FOUND", "status": "text"}),
        (
            OpenAI(),
            400,
            {"error": {"message": "text", "type": "invalid_request_error", "param": None, "code": "NOT_FOUND"}},
        ),
        (OpenAI(), 404, {"error": {"message": "text", "type": "not_found_error", "param": None, "code": "NOT_FOUND"}}),
        (OpenAI(), 502, {"error": {"message": "text", "type": "api_error", "param": None, "code": "NOT_FOUND"}}),
    ],
)
def test_documents(dialect: Dialect, status: int, document: dict[str, Any]) -> None:
    assert json.decode(dialect.document(status, Code.NOT_FOUND, "text")) == document


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "authentication_error"), (503, "overloaded_error"), (500, "api_error")]
)
def test_documents_of_anthropic_have_a_number(status: int, kind: str) -> None:
    one, other = (json.decode(Anthropic().document(status, Code.INTERNAL, "text")) for _ in range(2))
    assert one["error"] == {"type": kind, "message": "text"}
    assert one["type"] == "error"
    assert one["request_id"] != other["request_id"]


def test_the_last_words_of_a_stream() -> None:
    assert Ollama().event(502, Code.WORKER_LOST, "text") == b'{"error":"text","code":"WORKER_LOST"}\n'
    event = OpenAI().event(502, Code.WORKER_LOST, "text")
    assert event.startswith(b'\ndata: {"error":{"message":"text"'), "the event before may lack its blank line"
    assert event.endswith(b"}\n\n")
    assert Anthropic().event(502, Code.WORKER_LOST, "text").startswith(b'\nevent: error\ndata: {"type":"error"')


def test_the_engines_own_status_counts() -> None:
    assert status_of(failed(Code.INVALID_MESSAGE, status=422)) == 422
    assert status_of(failed(Code.NO_WORKERS)) == 503
    assert status_of(failed(Code.BACKEND_ERROR, status=999)) == 502, "no HTTP server could say that"
    assert status_of(failed(Code.RESUME_GAP)) == 500


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/api/chat", Code.MODEL_NOT_FOUND, "model 'm' not found"),
        ("/v1/completions", Code.MODEL_NOT_FOUND, "model 'm' not found"),
        ("/api/embed", Code.MODEL_NOT_FOUND, 'model "m" not found, try pulling it first'),
        ("/api/chat", Code.QUEUE_FULL, QUEUE_FULL_TEXT),
        ("/api/chat", Code.WORKER_LOST, "it broke"),
    ],
)
def test_words(path: str, code: Code, words: str) -> None:
    assert words_of(path, "m:latest", failed(code)) == words
    if code is Code.MODEL_NOT_FOUND:
        assert words_of(path, "m:latest", failed(code, status=404)) == "it broke", "whoever answered has words for it"
