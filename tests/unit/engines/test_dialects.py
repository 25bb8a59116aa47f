"""Whatever JSON comes in, a dialect reads a request from it or refuses it."""

import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.embedded import anthropic, openai
from workers.embedded.dialect import Native
from workers.embedded.wire import ApiError

NAMES = re.findall(
    r"\w+",
    "model messages prompt input instructions system content role type text image_url url input_audio data source "
    "tool_calls tools stream stream_options include_usage max_tokens max_completion_tokens max_output_tokens seed stop "
    "stop_sequences temperature top_p top_k reasoning reasoning_effort effort summary response_format json_schema "
    "schema format logprobs top_logprobs dimensions encoding_format truncation suffix output thinking",
)
WORDS = [
    *("user", "message", "text", "image", "image_url", "input_text", "input_image", "input_file", "tool_use"),
    *("tool_result", "function_call", "function_call_output", "reasoning", "json_object", "json_schema", "base64"),
    *("high", "none", "", "a"),
]
SCALARS = st.none() | st.booleans() | st.integers(-5, 30) | st.floats(-2, 2) | st.sampled_from(WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": st.just("user")},
    optional={"type": VALUES, "content": VALUES, "tool_calls": VALUES, "output": VALUES},
)
LIKELY = st.fixed_dictionaries(
    {"model": st.just("m"), "max_tokens": st.just(5), "messages": st.lists(TURN, min_size=1, max_size=3)},
    optional={"prompt": VALUES, "input": VALUES | st.lists(TURN, max_size=3), "system": VALUES}
    | dict.fromkeys(("text", "reasoning", "response_format", "stop", "stop_sequences", "logprobs"), VALUES),
)


@pytest.mark.parametrize(
    "dialect", [openai.Chat, openai.Completions, openai.Embeddings, openai.Responses, anthropic.Messages]
)
@given(body=LIKELY | VALUES)
def test_a_body_is_read_or_refused(dialect: type[Native], body: Any) -> None:
    call = dialect("Request")
    with contextlib.suppress(ApiError):
        request = call.read(json.dumps(body).encode())
        assert all(isinstance(text, str) for text in (request.model, request.prompt, request.suffix, *request.input))
        assert call.events in (False, True)
    assert json.loads(call.error(ApiError(400, "no")))["error"]["message"] == "no"
