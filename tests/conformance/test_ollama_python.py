"""Ollama's own Python library, unchanged, over real sockets."""

import importlib.metadata
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal

import ollama
import pytest
from pydantic import RootModel

from tests.fabric import Fabric
from workers.embedded.simulated import transcript

CLIENT = f"`ollama` {importlib.metadata.version('ollama')} for Python"
PROMPT = "Why is the sky blue?"
MESSAGES = [{"role": "user", "content": PROMPT}]
SHORT = {"num_predict": 20, "seed": 3}
TEXT = transcript(PROMPT, 3, 20)
ENDLESS = {"num_predict": 100_000}


@pytest.fixture
def client(fleet: Fabric, key: str) -> Iterator[ollama.Client]:
    with ollama.Client(fleet.http_url, headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


@pytest.fixture
async def aclient(fleet: Fabric, key: str) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(fleet.http_url, headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def test_generate(client: ollama.Client) -> None:
    whole = client.generate("llama2", PROMPT, options=SHORT)
    assert (whole.response, whole.done, whole.done_reason, whole.eval_count) == (TEXT, True, "length", 20)
    assert whole.total_duration is not None
    assert whole.total_duration > 0
    parts = list(client.generate("llama2", PROMPT, options=SHORT, stream=True))
    assert "".join(part.response or "" for part in parts) == TEXT
    assert [part.done for part in parts] == [False] * 20 + [True]
    assert parts[-1].eval_count == 20


def test_chat(client: ollama.Client) -> None:
    whole = client.chat("llama2", MESSAGES, options=SHORT)
    assert (whole.message.role, whole.message.content) == ("assistant", TEXT)
    parts = list(client.chat("llama2", MESSAGES, options=SHORT, stream=True))
    assert "".join(part.message.content or "" for part in parts) == TEXT
    assert parts[-1].done


async def test_generate_and_chat_asynchronously(aclient: ollama.AsyncClient) -> None:
    assert (await aclient.generate("llama2", PROMPT, options=SHORT)).response == TEXT
    assert (await aclient.chat("llama2", MESSAGES, options=SHORT)).message.content == TEXT
    generated = await aclient.generate("llama2", PROMPT, options=SHORT, stream=True)
    assert "".join([part.response or "" async for part in generated]) == TEXT
    talked = await aclient.chat("llama2", MESSAGES, options=SHORT, stream=True)
    assert "".join([part.message.content or "" async for part in talked]) == TEXT


def test_embed_and_embeddings(client: ollama.Client) -> None:
    many = client.embed("simulated-embed", ["a cat", "a dog"]).embeddings
    assert len(many) == 2
    assert client.embed("simulated-embed", "a cat").embeddings == many[:1]
    assert len(client.embeddings("simulated-embed", "a cat").embedding) == len(many[0])


async def test_embed_asynchronously(aclient: ollama.AsyncClient) -> None:
    assert len((await aclient.embed("simulated-embed", ["a", "b"])).embeddings) == 2


def test_list_show_and_ps(client: ollama.Client, fleet: Fabric) -> None:
    listed = {model.model: model for model in client.list().models}
    assert {"llama2:latest", "simulated:latest", "simulated-embed:latest"} <= listed.keys()
    assert listed["llama2:latest"].modified_at is not None
    shown = client.show("llama2")
    assert shown.capabilities == ["completion"]
    assert shown.details is not None
    assert shown.details.quantization_level == "Q8_0"

    def loaded() -> bool:
        return any(model.model == "simulated:latest" and model.expires_at for model in client.ps().models)

    client.generate("simulated", PROMPT, options=SHORT)
    fleet.until(loaded, "the model is listed as loaded")


def test_keep_alive_unloads(client: ollama.Client, fleet: Fabric) -> None:
    def loaded() -> bool:
        return any(model.model == "simulated:latest" for model in client.ps().models)

    assert client.generate("simulated", keep_alive="10m").done_reason == "load"
    fleet.until(loaded, "it is loaded")
    assert client.generate("simulated", keep_alive=0).done_reason == "unload"
    fleet.until(lambda: not loaded(), "it is unloaded")


@pytest.mark.engine
def test_structured_output(embedded: Fabric) -> None:
    class Answer(RootModel[Literal["yes", "no"]]):
        pass

    with ollama.Client(embedded.http_url) as client:
        answer = client.chat("tiny", MESSAGES, format=Answer.model_json_schema(), options={"temperature": 0})
        Answer.model_validate_json(answer.message.content or "")


def test_tools_are_refused_as_the_engine_refuses_them(client: ollama.Client) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    with pytest.raises(ollama.ResponseError, match="does not support tools") as raised:
        client.chat("llama2", MESSAGES, tools=[add])
    assert raised.value.status_code == 400


def test_a_model_that_is_nowhere(client: ollama.Client) -> None:
    calls: list[Callable[[], object]] = [
        lambda: client.generate("none", PROMPT),
        lambda: client.chat("none", MESSAGES),
        lambda: list(client.chat("none", MESSAGES, stream=True)),
        lambda: client.show("none"),
    ]
    for call in calls:
        with pytest.raises(ollama.ResponseError) as raised:
            call()
        assert (raised.value.status_code, raised.value.error) == (404, "model 'none' not found")
    with pytest.raises(ollama.ResponseError) as raised:
        client.embed("none", "a")
    assert (raised.value.status_code, raised.value.error) == (404, 'model "none" not found, try pulling it first')


async def test_a_model_that_is_nowhere_asynchronously(aclient: ollama.AsyncClient) -> None:
    with pytest.raises(ollama.ResponseError) as raised:
        await aclient.generate("none", PROMPT)
    assert raised.value.status_code == 404


def test_leaving_a_stream_stops_the_engine(client: ollama.Client, fleet: Fabric) -> None:
    for _ in client.generate("llama2", PROMPT, options=ENDLESS, stream=True):
        assert fleet.busy() == 1
        break
    fleet.until(lambda: fleet.busy() == 0, "the engine is idle")


async def test_leaving_a_stream_asynchronously_stops_the_engine(aclient: ollama.AsyncClient, fleet: Fabric) -> None:
    stream = await aclient.chat("llama2", MESSAGES, options=ENDLESS, stream=True)
    await anext(stream)
    assert fleet.busy() == 1
    await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
    fleet.until(lambda: fleet.busy() == 0, "the engine is idle")


@pytest.mark.usefixtures("broken")
def test_a_stream_that_breaks_raises_after_what_came(client: ollama.Client) -> None:
    stream = client.generate("llama2", PROMPT, format="json", options=SHORT, stream=True)  # cannot be continued
    assert "".join(next(stream).response or "" for _ in range(5)) == transcript(PROMPT, 3, 5)
    with pytest.raises(ollama.ResponseError):
        next(stream)


@pytest.mark.usefixtures("broken")
def test_a_stream_whose_engine_dies_goes_on_elsewhere(client: ollama.Client) -> None:
    stream = client.generate("llama2", PROMPT, options=SHORT, stream=True)
    assert "".join(part.response or "" for part in stream) == TEXT


def test_pull_copy_and_delete(fleet: Fabric, new_key: Callable[..., str]) -> None:
    headers = {"Authorization": f"Bearer {new_key('models:read', 'models:write')}"}
    with ollama.Client(fleet.http_url, headers=headers) as client:

        def names() -> set[str | None]:
            return {model.model for model in client.list().models}

        steps = list(client.pull("brought", stream=True))
        assert {step.status for step in steps} >= {"pulling manifest", "success"}
        assert steps[-1].status == "success"
        measured = [step for step in steps if step.total and step.completed is not None]
        assert measured[-1].completed == measured[-1].total
        assert client.pull("brought").status == "success"
        fleet.until(lambda: "brought:latest" in names(), "the model is listed")
        assert client.copy("brought", "copied").status == "success"
        fleet.until(lambda: "copied:latest" in names(), "the copy is listed")
        for name in ("brought", "copied"):
            assert client.delete(name).status == "success"
        fleet.until(lambda: not names() & {"brought:latest", "copied:latest"}, "they are not listed")
        with pytest.raises(ollama.ResponseError, match="file does not exist"):
            client.pull("missing-model")
        with pytest.raises(ollama.ResponseError) as raised:
            client.delete("brought")
        assert raised.value.status_code == 404


def test_create_from_a_file(fleet: Fabric, new_key: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" * 2**19)
    headers = {"Authorization": f"Bearer {new_key('models:read', 'models:write')}"}
    with ollama.Client(fleet.http_url, headers=headers) as client:
        digest = client.create_blob(file)
        assert client.create_blob(file) == digest
        created = list(client.create("filed", files={"model.gguf": digest}, stream=True))
        assert created[-1].status == "success"
        fleet.until(lambda: "filed:latest" in {model.model for model in client.list().models}, "the model is listed")
        with pytest.raises(ollama.ResponseError, match="not found on"):
            client.create("filed", files={"model.gguf": f"sha256:{'0' * 64}"})


def test_pull_needs_a_key_that_may(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="models:write") as raised:
        client.pull("brought")
    assert raised.value.status_code == 403


def test_set_up_by_variables_alone(fleet: Fabric, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"{fleet.http_url}/k/{key}")
    with ollama.Client() as client:
        assert client.generate("llama2", PROMPT, options=SHORT).response == TEXT
    monkeypatch.setenv("OLLAMA_HOST", fleet.http_url.removeprefix("http://"))
    monkeypatch.setenv("OLLAMA_API_KEY", key)
    with ollama.Client() as client:
        assert client.generate("llama2", PROMPT, options=SHORT).response == TEXT


def test_a_key_that_is_missing_wrong_or_too_weak(fleet: Fabric, new_key: Callable[..., str]) -> None:
    statuses = {"": 401, "wl_wrong": 401, new_key("models:read"): 403, new_key(models=("simulated*",)): 403}
    for text, status in statuses.items():
        headers = {"Authorization": f"Bearer {text}"} if text else {}
        with ollama.Client(fleet.http_url, headers=headers) as client:
            with pytest.raises(ollama.ResponseError) as raised:
                client.generate("llama2", PROMPT)
            assert raised.value.status_code == status
