"""The client protocol's types: what is decoded, what is refused, and which HTTP call a request stands for."""

import json
from typing import Any

import msgpack
import msgspec
import pytest

from gateway import messages
from gateway.messages import BadMessage, Chat, Embed, Generate, decode_line, ollama_call


def test_a_line_may_have_tool_calls_and_logprobs() -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    text = json.dumps({"message": {"content": "", "thinking": "hm", "tool_calls": calls}, "logprobs": [{"token": "a"}]})
    line = decode_line(text.encode() + b"\n")
    assert line.message is not None
    assert msgspec.json.decode(line.message.tool_calls) == calls
    assert msgspec.json.decode(line.logprobs) == [{"token": "a"}]
    assert line.message.thinking == "hm"


def test_a_plain_line_has_neither() -> None:
    line = decode_line(b'{"model":"m","created_at":"x","response":"hi","done":false,"context":[1]}')
    assert (line.response, line.done) == ("hi", False)
    assert line.tool_calls is line.logprobs is messages.NOTHING


@pytest.mark.parametrize("codec", [messages.JSON, messages.MSGPACK])
def test_both_encodings_write_pieces_of_json_into_tokens(codec: messages.Codec) -> None:
    calls = [{"function": {"name": "f"}}]
    raw: Any = calls if codec.binary else msgspec.Raw(json.dumps(calls).encode())
    encoded = codec.encode(messages.StreamToken(timestamp=1, id="1", token="", seq=0, tool_calls=raw))
    decoded = msgpack.unpackb(encoded) if codec.binary else json.loads(encoded)
    assert decoded == {"type": "stream_token", "timestamp": 1, "id": "1", "token": "", "seq": 0, "toolCalls": calls}


def test_generate_becomes_the_call_a_client_of_ollama_would_have_made() -> None:
    job = Generate(
        id="1",
        model="m",
        prompt="p",
        system="s",
        options={"max_tokens": 5, "temperature": 0.5},
        keep_alive="5m",
        priority="batch",
        deadline_ms=5,
    )
    path, body = ollama_call(job)
    assert path == "/api/generate"
    assert json.loads(body) == {
        "model": "m",
        "prompt": "p",
        "system": "s",
        "options": {"num_predict": 5, "temperature": 0.5},
        "keep_alive": "5m",
        "stream": True,
    }


def test_num_predict_wins_over_max_tokens() -> None:
    _, body = ollama_call(Generate(id="1", model="m", prompt="p", options={"max_tokens": 5, "num_predict": 2}))
    assert json.loads(body)["options"] == {"num_predict": 2}


def test_chat_and_embed_become_their_calls() -> None:
    path, body = ollama_call(Chat(id="1", model="m", messages=[{"role": "user", "content": "x"}], think="low"))
    assert path == "/api/chat"
    content = [{"role": "user", "content": "x"}]
    assert json.loads(body) == {"model": "m", "messages": content, "think": "low", "stream": True}
    path, body = ollama_call(Embed(id="1", model="m", input=["a"], dimensions=8))
    assert path == "/api/embed"
    assert json.loads(body) == {"model": "m", "input": ["a"], "dimensions": 8}


def test_a_text_on_a_binary_connection_is_a_bad_message() -> None:
    with pytest.raises(BadMessage, match="binary"):
        messages.MSGPACK.decode("{}")


@pytest.mark.parametrize("data", [b"\xff\xfe", "[" * 100_000, '{"type": "ping"', b"", '{"type": 5}', "null", '"x"'])
def test_garbage_is_a_bad_message_and_nothing_worse(data: Any) -> None:
    with pytest.raises(BadMessage):
        messages.JSON.decode(data)
