"""Anthropic's own Python library, unchanged, over real sockets."""

import importlib.metadata
import time
from collections.abc import AsyncIterator, Callable, Iterator

import anthropic
import pytest
from anthropic.types import MessageParam, TextBlock

from tests.conformance.conftest import Full
from tests.fabric import Fabric
from workers.embedded.simulated import transcript

CLIENT = f"`anthropic` {importlib.metadata.version('anthropic')} for Python"
PROMPT = "Why is the sky blue?"
TURNS: list[MessageParam] = [{"role": "user", "content": PROMPT}]
TEXT = transcript(PROMPT, 0, 20)


@pytest.fixture
def client(fleet: Fabric, key: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=fleet.http_url, api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
async def aclient(fleet: Fabric, key: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=fleet.http_url, auth_token=key, max_retries=0) as client:
        yield client


def test_messages(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model="llama2", messages=TURNS, max_tokens=20)
    (block,) = whole.content
    assert isinstance(block, TextBlock)
    assert (block.text, whole.stop_reason, whole.usage.output_tokens) == (TEXT, "max_tokens", 20)


def test_messages_streamed(client: anthropic.Anthropic) -> None:
    events = list(client.messages.create(model="llama2", messages=TURNS, max_tokens=20, stream=True))
    assert [events[0].type, events[1].type] == ["message_start", "content_block_start"]
    assert [event.type for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    with client.messages.stream(model="llama2", messages=TURNS, max_tokens=20) as stream:
        assert "".join(stream.text_stream) == TEXT
        assert stream.get_final_message().usage.output_tokens == 20


async def test_messages_asynchronously(aclient: anthropic.AsyncAnthropic) -> None:
    async with aclient.messages.stream(model="llama2", messages=TURNS, max_tokens=20) as stream:
        assert "".join([text async for text in stream.text_stream]) == TEXT


def test_a_system_prompt_and_the_beta_path(client: anthropic.Anthropic) -> None:
    message = client.beta.messages.create(
        model="llama2", system="Be brief.", messages=[{"role": "user", "content": PROMPT}], max_tokens=20
    )
    assert message.usage.output_tokens == 20


def test_tools_are_refused_as_the_engine_refuses_them(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="does not support tools"):
        client.messages.create(
            model="llama2",
            messages=TURNS,
            max_tokens=20,
            tools=[{"name": "now", "input_schema": {"type": "object"}}],
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_is_nowhere(client: anthropic.Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.NotFoundError, match="model 'none' not found") as raised:
        client.messages.create(model="none", messages=TURNS, max_tokens=20, stream=stream)
    assert raised.value.type == "not_found_error"


def test_leaving_a_stream_stops_the_engine(client: anthropic.Anthropic, fleet: Fabric) -> None:
    with client.messages.stream(model="llama2", messages=TURNS, max_tokens=100_000) as stream:
        next(stream.text_stream)
        assert fleet.busy() == 1
    fleet.until(lambda: fleet.busy() == 0, "the engine is idle")


@pytest.mark.usefixtures("broken")
def test_a_stream_that_breaks_raises_after_what_came(client: anthropic.Anthropic) -> None:
    came: list[str] = []
    with (
        pytest.raises(anthropic.APIStatusError) as raised,
        client.messages.stream(model="llama2", messages=TURNS, max_tokens=20) as stream,
    ):
        came += stream.text_stream
    assert "".join(came) == transcript(PROMPT, 0, 5)
    assert raised.value.type == "api_error"


def test_a_key_that_is_wrong_or_too_weak(client: anthropic.Anthropic, new_key: Callable[..., str]) -> None:
    cases: dict[str, type[anthropic.APIStatusError]] = {
        "ollama": anthropic.AuthenticationError,
        "wl_wrong": anthropic.AuthenticationError,
        new_key("models:read"): anthropic.PermissionDeniedError,
        new_key(models=("simulated*",)): anthropic.PermissionDeniedError,
    }
    for text, kind in cases.items():
        with pytest.raises(kind):
            client.with_options(api_key=text).messages.create(model="llama2", messages=TURNS, max_tokens=20)


def test_a_full_queue_is_asked_again_as_late_as_it_says(full: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        full.release()

    monkeypatch.setattr(time, "sleep", sleep)
    with anthropic.Anthropic(base_url=full.fabric.http_url, api_key="ollama") as client:
        with pytest.raises(anthropic.InternalServerError, match="server busy, please try again") as raised:
            client.with_options(max_retries=0).messages.create(model="llama2", messages=TURNS, max_tokens=20)
        assert (raised.value.status_code, raised.value.type) == (503, "overloaded_error")
        assert client.messages.create(model="llama2", messages=TURNS, max_tokens=20).usage.output_tokens == 20
    [seconds] = waited
    assert seconds == round(seconds) > 0, "as the answer said, in whole seconds"


@pytest.mark.parametrize("variable", ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"])
def test_set_up_by_variables_alone(fleet: Fabric, key: str, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", fleet.http_url)
    monkeypatch.setenv(variable, key)
    with anthropic.Anthropic() as client:
        assert client.messages.create(model="llama2", messages=TURNS, max_tokens=20).usage.output_tokens == 20
