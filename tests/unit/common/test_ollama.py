"""The last line of an answer, in the three forms an answer may have."""

import pytest

from common.ollama import document, last_line
from common.protocol import COUNT_MAX, Stats

DONE = b'{"done":true,"done_reason":"stop","prompt_eval_count":3,"eval_count":2,"total_duration":9}\n'


def stats_of(data: bytes) -> Stats:
    last = last_line(data)
    assert last is not None
    return last.stats()


@pytest.mark.parametrize("before", [b"", b'{"done":false}\n', b'{"done":false}\n{"response":"x"}\n'])
def test_the_newest_line_counts(before: bytes) -> None:
    last = last_line(before + DONE)
    assert last is not None
    assert last.done
    assert last.stats() == Stats(done_reason="stop", prompt_tokens=3, completion_tokens=2, total_ns=9)


@pytest.mark.parametrize("line", [b'{"done":false}\n', b'{"response":"a"}', b'{"data":[1]}'])
def test_a_line_that_is_not_the_last(line: bytes) -> None:
    last = last_line(line)
    assert last is not None
    assert not last.done


@pytest.mark.parametrize("data", [b"", b"\n", b'{"do', b"text", b"data: ", b"data: {", b": comment\n\n", b"event: x\n"])
def test_what_cannot_be_read(data: bytes) -> None:
    assert last_line(data) is None


@pytest.mark.parametrize(
    ("event", "done"),
    [
        (b"data: [DONE]\n\n", True),
        (b"data:[DONE]", True),
        (b'event: message_stop\ndata: {"type":"message_stop"}\n\n', True),
        (b'data: {"type":"response.completed"}\n', True),
        (b'data: {"type":"response.completed","response":{}}\n', True),
        (b'data: {"type":"response.output_text.delta"}\n\n', False),
        (b'data: {"choices":[{"delta":{"content":"done"}}],"done":true}\n\n', False),
    ],
)
def test_events_of_a_stream(event: bytes, done: bool) -> None:
    last = last_line(event)
    assert last is not None
    assert last.done == done


def test_a_document_may_have_lines() -> None:
    read = document(b'{"embeddings":[[0.5,\n0.25]],\n"prompt_eval_count":2}\n')
    assert read is not None
    assert read.stats() == Stats(prompt_tokens=2)
    assert document(b"nonsense") is None


def test_counts_of_the_other_apis() -> None:
    openai = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}}\n\n'
    anthropic = b'data: {"type":"message_delta","usage":{"input_tokens":5,"output_tokens":7}}\n\n'
    wrapped = b'data: {"type":"response.completed","response":{"usage":{"input_tokens":5,"output_tokens":7}}}\n\n'
    for event in (openai, anthropic, wrapped):
        assert stats_of(event) == Stats(prompt_tokens=5, completion_tokens=7)


def test_counts_that_no_message_could_carry() -> None:
    assert stats_of(b'{"eval_count":-1,"prompt_eval_count":18000000000000000000}') == Stats(prompt_tokens=COUNT_MAX)
