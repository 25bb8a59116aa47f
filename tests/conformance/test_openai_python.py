"""OpenAI's own Python library, unchanged, over real sockets."""

import importlib.metadata
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal

import openai
import pytest
from pydantic import RootModel

from tests.conformance.conftest import Full
from tests.fabric import Fabric
from workers.embedded.simulated import transcript

CLIENT = f"`openai` {importlib.metadata.version('openai')} for Python"
PROMPT = "Why is the sky blue?"
TEXT = transcript(PROMPT, 0, 20)


@pytest.fixture
def client(fleet: Fabric, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.http_url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
async def aclient(fleet: Fabric, key: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{fleet.http_url}/v1", api_key=key, max_retries=0) as client:
        yield client


def test_chat_completions(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="llama2", messages=[{"role": "user", "content": PROMPT}], max_tokens=20
    )
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (TEXT, "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    *chunks, counts = client.chat.completions.create(
        model="llama2",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "length"
    assert counts.choices == []
    assert counts.usage is not None
    assert counts.usage.completion_tokens == 20


async def test_chat_completions_asynchronously(aclient: openai.AsyncOpenAI) -> None:
    whole = await aclient.chat.completions.create(
        model="llama2", messages=[{"role": "user", "content": PROMPT}], max_tokens=20
    )
    assert whole.choices[0].message.content == TEXT
    stream = await aclient.chat.completions.create(
        model="llama2", messages=[{"role": "user", "content": PROMPT}], max_tokens=20, stream=True
    )
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="llama2", prompt=PROMPT, max_tokens=20)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (TEXT, "length")
    stream = client.completions.create(model="llama2", prompt=PROMPT, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="llama2", input=PROMPT, max_output_tokens=20)
    assert whole.output_text == TEXT
    events = list(client.responses.create(model="llama2", input=PROMPT, max_output_tokens=20, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    with client.responses.stream(model="llama2", input=PROMPT, max_output_tokens=20) as stream:
        assert stream.get_final_response().output_text == TEXT


def test_embeddings(client: openai.OpenAI) -> None:
    many = client.embeddings.create(model="simulated-embed", input=["a cat", "a dog"])  # in base64, unasked
    plain = client.embeddings.create(model="simulated-embed", input=["a cat", "a dog"], encoding_format="float")
    assert len(many.data) == 2
    for one, other in zip(many.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)


def test_models(client: openai.OpenAI) -> None:
    assert {"llama2:latest", "simulated:latest"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("llama2").id == "llama2"
    with pytest.raises(openai.NotFoundError, match="model 'none' not found"):
        client.models.retrieve("none")


@pytest.mark.engine
def test_structured_output(embedded: Fabric) -> None:
    class Answer(RootModel[Literal["yes", "no"]]):
        pass

    with openai.OpenAI(base_url=f"{embedded.http_url}/v1", api_key="ollama") as client:
        answer = client.chat.completions.parse(
            model="tiny", messages=[{"role": "user", "content": "dog"}], response_format=Answer, temperature=0
        )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_tools_are_refused_as_the_engine_refuses_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        client.chat.completions.create(
            model="llama2",
            messages=[{"role": "user", "content": PROMPT}],
            tools=[{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}],
        )


def test_a_model_that_is_nowhere(client: openai.OpenAI) -> None:
    calls: list[Callable[[], object]] = [
        lambda: client.chat.completions.create(model="none", messages=[{"role": "user", "content": PROMPT}]),
        lambda: client.completions.create(model="none", prompt=PROMPT, stream=True),
        lambda: client.responses.create(model="none", input=PROMPT),
        lambda: client.embeddings.create(model="none", input=PROMPT),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError, match=r"none.* not found") as raised:
            call()
        assert raised.value.code == "MODEL_NOT_FOUND"


def test_leaving_a_stream_stops_the_engine(client: openai.OpenAI, fleet: Fabric) -> None:
    with client.chat.completions.create(
        model="llama2", messages=[{"role": "user", "content": PROMPT}], max_tokens=100_000, stream=True
    ) as stream:
        next(stream)
        assert fleet.busy() == 1
    fleet.until(lambda: fleet.busy() == 0, "the engine is idle")


@pytest.mark.usefixtures("broken")
def test_a_stream_that_breaks_raises_after_what_came(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="llama2",
        messages=[{"role": "user", "content": PROMPT}],
        response_format={"type": "json_object"},  # cannot be continued
        stream=True,
    )
    came = [next(stream).choices[0].delta.content]
    with pytest.raises(openai.APIError) as raised:
        came += [chunk.choices[0].delta.content for chunk in stream]
    assert raised.value.code == "BACKEND_ERROR"


@pytest.mark.usefixtures("broken")
def test_a_stream_whose_engine_dies_goes_on_elsewhere(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="llama2", prompt=PROMPT, max_tokens=20, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_a_key_that_is_wrong_or_too_weak(client: openai.OpenAI, new_key: Callable[..., str]) -> None:
    cases: dict[str, type[openai.APIStatusError]] = {
        "ollama": openai.AuthenticationError,
        "wl_wrong": openai.AuthenticationError,
        new_key("models:read"): openai.PermissionDeniedError,
        new_key(models=("simulated*",)): openai.PermissionDeniedError,
    }
    for text, kind in cases.items():
        with pytest.raises(kind):
            client.with_options(api_key=text).completions.create(model="llama2", prompt=PROMPT)


def test_a_full_queue_is_asked_again_as_late_as_it_says(full: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        full.release()

    monkeypatch.setattr(time, "sleep", sleep)
    with openai.OpenAI(base_url=f"{full.fabric.http_url}/v1", api_key="ollama") as client:
        with pytest.raises(openai.InternalServerError, match="server busy, please try again") as raised:
            client.with_options(max_retries=0).completions.create(model="llama2", prompt=PROMPT)
        assert raised.value.status_code == 503
        assert waited == []
        assert client.completions.create(model="llama2", prompt=PROMPT, max_tokens=20).choices[0].text == TEXT
        [seconds] = waited
        assert seconds == round(seconds) > 0, "as the answer said, in whole seconds"


def test_set_up_by_variables_alone(fleet: Fabric, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{fleet.http_url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with openai.OpenAI() as client:
        assert client.completions.create(model="llama2", prompt=PROMPT, max_tokens=20).choices[0].text == TEXT
