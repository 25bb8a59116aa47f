"""What is concluded from an engine's answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from common.protocol import COUNT_MAX, Engine, Model
from workers import ollama as module
from workers.ollama import LIST_BYTES_MAX, SHOWS_PER_POLL_MAX, Backend
from workers.settings import EngineAddress

URL = "http://127.0.0.1:11434"


def answer(status: int, body: object = b"") -> httpx.Response:
    """As from a socket: not read yet."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.Response(status, stream=httpx.ByteStream(content))


class Ollama:
    """Answers by path; `fault` replaces them all."""

    def __init__(self) -> None:
        self.version: Any = {"version": "0.33.0"}
        self.models: list[dict[str, Any]] = []
        self.resident: list[dict[str, Any]] = []
        self.capabilities: dict[str, list[str] | None] = {}
        self.asked: list[str] = []
        self.fault: Callable[[httpx.Request], httpx.Response] | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.path)
        if self.fault is not None:
            return self.fault(request)
        match request.url.path:
            case "/api/version":
                return answer(200, self.version)
            case "/api/tags":
                return answer(200, {"models": self.models})
            case "/api/ps":
                return answer(200, {"models": self.resident or None})
        name = json.loads(request.content)["model"]
        if name not in self.capabilities:
            return answer(404, {"error": "no such model"})
        return answer(200, {"capabilities": self.capabilities[name], "details": {}})


@pytest.fixture
def ollama() -> Ollama:
    return Ollama()


@pytest.fixture
async def backend(ollama: Ollama) -> AsyncIterator[Backend]:
    async with Backend(EngineAddress(URL, 4), 2.0) as backend:
        await backend.client.aclose()
        backend.client = httpx.AsyncClient(base_url=URL, transport=httpx.MockTransport(ollama))
        yield backend


def raw(entry: Any) -> bytes:
    """As it stands in the answer."""
    return json.dumps(entry).encode()


def listed(name: str, digest: str, family: str = "llama") -> dict[str, Any]:
    return {"name": name, "digest": digest, "size": 7, "details": {"family": family, "families": [family]}}


async def test_models_with_slots_aliases_and_residency(ollama: Ollama, backend: Backend) -> None:
    ollama.models = [listed("z:latest", "d1"), listed("a:latest", "d1"), listed("e:latest", "d2", "nomic-bert")]
    ollama.resident = [listed("z:latest", "d1")]
    ollama.capabilities = {"a:latest": ["completion"], "e:latest": ["embedding"]}
    assert await backend.poll()
    z = raw(ollama.resident[0])
    assert backend.engine == Engine(
        url=URL,
        version="0.33.0",
        models=(
            Model(
                name="a:latest",
                digest="d1",
                slots=4,
                size_bytes=7,
                resident=True,
                listed=z.replace(b"z:", b"a:"),
                running=z,
            ),
            Model(name="e:latest", digest="d2", slots=1, size_bytes=7, embedding=True, listed=raw(ollama.models[2])),
            Model(name="z:latest", digest="d1", slots=4, size_bytes=7, resident=True, listed=z, running=z),
        ),
    )
    ollama.asked.clear()
    assert not await backend.poll()
    assert ollama.asked == ["/api/version", "/api/tags", "/api/ps"]  # a digest is looked at once


async def test_what_the_operator_says_of_an_engine_is_passed_on(ollama: Ollama) -> None:
    async with Backend(EngineAddress(URL, 4, 2, 24 * 2**30), 2.0) as backend:
        await backend.client.aclose()
        backend.client = httpx.AsyncClient(base_url=URL, transport=httpx.MockTransport(ollama))
        await backend.poll()
        assert (backend.engine.models_max, backend.engine.memory_bytes) == (2, 24 * 2**30)


async def test_capabilities_decide_over_the_family(ollama: Ollama, backend: Backend) -> None:
    ollama.models = [listed("both", "d1"), listed("qwen-embed", "d2", "qwen3"), listed("bert-chat", "d3", "bert")]
    ollama.capabilities = {
        "both": ["completion", "embedding"],
        "qwen-embed": ["embedding"],
        "bert-chat": ["completion"],
    }
    await backend.poll()
    assert {model.name: model.embedding for model in backend.engine.models} == {
        "both": False,
        "qwen-embed": True,
        "bert-chat": False,
    }


async def test_without_capabilities_the_family_decides_and_is_asked_again(ollama: Ollama, backend: Backend) -> None:
    ollama.models = [listed("old", "d1", "nomic-bert"), listed("silent", "d2")]
    ollama.capabilities = {"silent": None}
    await backend.poll()
    assert [model.embedding for model in backend.engine.models] == [True, False]
    ollama.capabilities = {"old": ["completion"], "silent": ["embedding"]}
    assert await backend.poll()
    assert [model.embedding for model in backend.engine.models] == [False, True]


async def test_a_poll_looks_at_a_bounded_number_of_models(ollama: Ollama, backend: Backend) -> None:
    ollama.models = [listed(f"m{n:03}", f"d{n}") for n in range(SHOWS_PER_POLL_MAX + 5)]
    ollama.capabilities = {model["name"]: ["completion"] for model in ollama.models}
    await backend.poll()
    assert ollama.asked.count("/api/show") == SHOWS_PER_POLL_MAX
    await backend.poll()
    assert ollama.asked.count("/api/show") == SHOWS_PER_POLL_MAX + 5


async def test_kinds(ollama: Ollama, backend: Backend) -> None:
    ollama.version = {"version": "1", "engine": "simulated"}
    await backend.poll()
    assert backend.engine.kind == "simulated"


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (refuse, "refused"),
        (lambda _: answer(500), "/api/version was answered with 500"),
        (lambda _: answer(200, b"Ollama is running"), "not what Ollama says"),
        (lambda _: answer(200, b"[\xff]"), "not what Ollama says"),
        (lambda _: answer(200, b" " * (LIST_BYTES_MAX + 1)), "not what Ollama says"),
    ],
)
async def test_down_with_a_sentence_and_back(
    ollama: Ollama, backend: Backend, fault: Callable[[httpx.Request], httpx.Response], words: str
) -> None:
    ollama.models = [listed("m", "d1")]
    ollama.capabilities = {"m": ["completion"]}
    await backend.poll()
    up = backend.engine
    ollama.fault = fault
    assert await backend.poll()
    assert not backend.engine.up
    assert words in backend.engine.error
    assert URL in backend.engine.error
    assert backend.engine.models == up.models
    assert not await backend.poll()
    ollama.fault = None
    assert await backend.poll()
    assert backend.engine == up


async def test_an_engine_that_starts_with_its_worker_is_not_waited_for_a_whole_interval(ollama: Ollama) -> None:
    """The first answer counts: it is looked for often, whatever the interval of later looks is."""
    ollama.models = [listed("m", "d1")]
    ollama.capabilities = {"m": ["completion"]}
    refusals = iter([True, True])

    def starting(request: httpx.Request) -> httpx.Response:
        if not next(refusals, False):
            ollama.fault = None
        return refuse(request)

    ollama.fault = starting
    answered = asyncio.Event()
    async with Backend(EngineAddress(URL, 4), 3600.0) as backend:
        await backend.client.aclose()
        backend.client = httpx.AsyncClient(base_url=URL, transport=httpx.MockTransport(ollama))
        await backend.poll()
        assert not backend.engine.up
        watch = asyncio.create_task(backend.watch(lambda: answered.set() if backend.engine.up else None))
        try:
            async with asyncio.timeout(10):
                await answered.wait()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
    assert [model.name for model in backend.engine.models] == ["m"]


async def test_how_long_a_model_is_kept_is_no_news_every_time(
    ollama: Ollama, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes with every request; the whole state of the host would travel every two seconds."""
    ollama.models = [listed("a", "d1")]
    ollama.resident = [listed("a", "d1") | {"expires_at": "1"}]
    assert await backend.poll()
    ollama.resident = [listed("a", "d1") | {"expires_at": "2"}]
    assert not await backend.poll()
    monkeypatch.setattr(module, "RUNNING_TOLD_S", 0.0)
    assert await backend.poll()
    assert b'"2"' in backend.engine.models[0].running
    assert not await backend.poll()
    ollama.resident = []
    assert await backend.poll(), "it is out of memory"


async def test_what_no_message_can_carry_costs_the_host_nothing_else(ollama: Ollama, backend: Backend) -> None:
    ollama.models = [listed("n" * 257, "d1"), listed("fine", "d2") | {"size": 2**70}, listed("too", "d" * 257)]
    assert await backend.poll()
    (model,) = backend.engine.models
    assert (model.name, model.size_bytes) == ("fine", COUNT_MAX)
