"""What a broker is told of requests, as it decodes it: by HTTP and by WebSocket, and for clients with limits."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from common import protocol
from common.protocol import Queued, Submit
from gateway.excerpt import FIELD_BYTES_MAX
from gateway.hints import READ_MAX
from gateway.spool import SPOOL_AT
from gateway.store import Store
from tests.fabric import Fabric
from tests.wsclient import authenticated
from workers.embedded.simulated import Settings

NUM_CTX = 1234
SIMULATED_CTX = 4321
ETA_MS = 4500


class Recorder:
    """In place of the broker's decoder: it keeps what gateways submit."""

    def __init__(self) -> None:
        self._decoder = protocol.from_gateway
        self.submits: list[Submit] = []

    def header(self, frame: bytes) -> tuple[Any, int]:
        message, end = self._decoder.header(frame)
        if isinstance(message, Submit):
            self.submits.append(message)
        return message, end


@pytest.fixture
def submits(monkeypatch: pytest.MonkeyPatch) -> list[Submit]:
    """What the broker has been submitted since, as it read it from the wire."""
    recorder = Recorder()
    monkeypatch.setattr(protocol, "from_gateway", recorder)
    return recorder.submits


class Estimating:
    """In place of the gateways' decoder: a broker that estimates every wait."""

    def __init__(self) -> None:
        self._decoder = protocol.to_gateway

    def decode(self, frame: bytes) -> tuple[Any, bytes]:
        message, payload = self._decoder.decode(frame)
        return replace(message, eta_ms=ETA_MS) if isinstance(message, Queued) else message, payload


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """One engine; llama2 has a num_ctx of its own."""
    rules = (f"llama2:*={NUM_CTX}", f"simulated:*={SIMULATED_CTX}")
    settings = {"anonymous": True, "num_ctx": rules}
    with Fabric(tmp_path_factory.mktemp("hints"), engines=[Settings(slots=4)], gateway_settings=settings) as running:
        yield running


@pytest.fixture
def http(fabric: Fabric) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fabric.http_url, trust_env=False, timeout=20) as client:
        yield client


def loaded(fabric: Fabric) -> dict[str, int]:
    """The models in the engine's memory, with their num_ctx."""
    models = httpx.get(f"{fabric.engine_urls[0]}/api/ps", trust_env=False).json()["models"]
    return {model["name"]: model["context_length"] for model in models}


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"model": "llama2", "messages": messages, "stream": False, **more}


def test_a_request_of_http_tells_how_urgent_and_how_long_it_is(http: httpx.Client, submits: list[Submit]) -> None:
    body = chat("why? " * 300, options={"num_predict": 7, "num_thread": 4})
    headers = {"X-Weftline-Priority": "batch", "X-Weftline-Deadline-Ms": "60000"}
    assert http.post("/api/chat", json=body, headers=headers).status_code == 200
    assert http.post("/api/chat", json=chat("x", "y", "z" * 600)).status_code == 200
    (first, second) = submits
    assert (first.priority, first.deadline_ms, first.output_max) == ("batch", 60_000, 7)
    assert (first.weight, first.running_max) == (1.0, 0), "nobody has limited who needs no key"
    assert 1500 < first.prompt_bytes < 1600
    assert len(first.prefix) == first.prompt_bytes // 512
    assert first.variant == f"num_ctx={NUM_CTX},num_thread=4"
    assert (second.priority, second.deadline_ms, second.output_max) == ("normal", None, None)


def test_a_question_about_a_model_tells_nothing(http: httpx.Client, submits: list[Submit]) -> None:
    assert http.post("/api/show", json={"model": "llama2", "system": "x" * 1000}).status_code == 200
    assert [(submit.light, submit.prefix, submit.variant) for submit in submits] == [(True, (), "")]


@pytest.mark.parametrize(
    ("path", "form"), [("/api/chat", "ollama"), ("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")]
)
@pytest.mark.parametrize(
    ("header", "words"),
    [
        *(({"x-weftline-priority": text}, "interactive, normal, batch") for text in ("urgent", "", "Batch")),
        *(({"x-weftline-deadline-ms": text}, "from 1 to 86400000") for text in ("0", "-5", "1.5", "soon", "9" * 30)),
    ],
)
def test_a_header_that_says_something_else_is_refused(
    http: httpx.Client, submits: list[Submit], path: str, form: str, header: dict[str, str], words: str
) -> None:
    response = http.post(path, json=chat("x"), headers=header)
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in (error if form == "ollama" else error["message"])
    if form != "ollama":
        assert error["type"] == "invalid_request_error"
    assert submits == []


def test_a_deadline_of_http_passes(http: httpx.Client) -> None:
    response = http.post(
        "/api/chat", json=chat("x", model="simulated", stream=True, options={"num_predict": 10**9}),
        headers={"x-weftline-deadline-ms": "50"},
    )  # fmt: skip
    assert "DEADLINE_EXCEEDED" in response.text.splitlines()[-1]


async def test_a_request_of_a_websocket_tells_the_same(fabric: Fabric, submits: list[Submit]) -> None:
    texts = ["why? " * 300, "because", "why?"]
    body = chat(*texts, options={"num_ctx": 99, "num_predict": 7})
    async with authenticated(fabric) as wire:
        await wire.send({"type": "chat", "id": "1", "priority": "interactive", "deadlineMs": 60_000, **body})
        await wire.hear_until("stream_end")
    async with httpx.AsyncClient(base_url=fabric.http_url, trust_env=False) as http:
        assert (await http.post("/v1/chat/completions", json=chat(*texts, max_tokens=7))).status_code == 200
    by_websocket, by_http = submits
    assert (by_websocket.priority, by_websocket.output_max, by_http.output_max) == ("interactive", 7, 7)
    assert by_websocket.deadline_ms == 60_000
    assert by_websocket.prefix == by_http.prefix != ()
    assert (by_websocket.variant, by_http.variant) == (f"num_ctx={NUM_CTX}", "")


def test_clients_that_differ_in_num_ctx_get_one(fabric: Fabric, http: httpx.Client) -> None:
    bodies: list[dict[str, Any]] = [{}, {"options": None}, {"options": {"num_ctx": 2048}}, {"Options": {"num_ctx": 9}}]
    for body in bodies:
        assert http.post("/api/chat", json=chat("x", **body)).status_code == 200
        assert loaded(fabric)["llama2:latest"] == NUM_CTX
    for path in ("/api/generate", "/api/embed", "/api/embeddings"):
        asked = {"model": "llama2", "prompt": "x", "input": "x", "stream": False, "options": {"num_ctx": 2048}}
        assert http.post(path, json=asked).status_code == 200
        assert loaded(fabric)["llama2:latest"] == NUM_CTX


async def test_clients_of_the_websocket_get_it_too(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send({"type": "embed", "id": "1", "model": "llama2", "input": "x", "options": {"num_ctx": 99}})
        await wire.hear_until("embed_result")
    assert loaded(fabric)["llama2:latest"] == NUM_CTX


def test_of_a_large_body_the_same_is_told_and_changed(
    fabric: Fabric, http: httpx.Client, submits: list[Submit]
) -> None:
    body = chat("x" * (SPOOL_AT + 1000), options={"num_ctx": 2048, "num_predict": 3})
    assert http.post("/api/chat", json=body).json()["eval_count"] == 3
    (submit,) = submits
    assert submit.parted_bytes > SPOOL_AT
    assert (submit.variant, submit.output_max) == (f"num_ctx={NUM_CTX}", 3)
    assert len(submit.prefix) > 90
    assert loaded(fabric)["llama2:latest"] == NUM_CTX
    with contextlib.closing(Store.open(fabric.folder)) as store:
        store.set_alias("big", "simulated")
        fabric.until(lambda: "big" in http.get("/api/tags").text, "the alias is known")
        assert http.post("/api/chat", json=body | {"model": "big"}).json()["eval_count"] == 3
        assert loaded(fabric)["simulated:latest"] == SIMULATED_CTX
        assert http.post("/api/chat", json=chat("x", model="big")).status_code == 200
        assert submits[-1].model == "simulated:latest"


def test_a_large_body_of_a_model_without_a_rule_stays_as_it_is(http: httpx.Client, submits: list[Submit]) -> None:
    body = json.dumps({"model": "simulated-embed", "input": "x" * SPOOL_AT, "options": {"num_ctx": 77}}, indent=2)
    assert http.post("/api/embed", content=body).status_code == 200
    assert (submits[0].parted_bytes, submits[0].variant) == (len(body), "num_ctx=77")


def test_a_body_that_is_too_large_to_be_read_here_tells_as_much_as_it_can(
    fabric: Fabric, http: httpx.Client, submits: list[Submit]
) -> None:
    text = "x" * (READ_MAX + 1000)
    assert http.post("/api/chat", json=chat(text, options={"num_ctx": 2048, "num_predict": 3})).status_code == 200
    assert http.post("/api/embed", json={"model": "simulated-embed", "input": text}).status_code == 200
    chatted, embedded = submits
    assert (chatted.variant, chatted.output_max, chatted.prefix) == (f"num_ctx={NUM_CTX}", 3, ())
    assert loaded(fabric)["llama2:latest"] == NUM_CTX
    assert (embedded.prompt_bytes, embedded.output_max) == (embedded.parted_bytes, 0)


@pytest.mark.parametrize("size", [0, SPOOL_AT, READ_MAX])
def test_no_options_are_too_large_to_be_changed(http: httpx.Client, submits: list[Submit], size: int) -> None:
    """Else whoever wrote enough blanks into them had the num_ctx that they liked."""
    body = json.dumps(chat("x" * size, options={"num_ctx": 2048})).replace(
        '{"num_ctx"', "{" + " " * FIELD_BYTES_MAX + '"num_ctx"'
    )
    response = http.post("/api/chat", content=body)
    assert (response.status_code, submits) == (400, [])
    assert "65536 bytes" in response.json()["error"]


def test_a_field_whose_name_is_no_text_does_no_harm(http: httpx.Client) -> None:
    assert http.post("/api/chat", content=b'{"model":"llama2","\xff":1}').status_code == 400


def test_what_an_engine_would_refuse_it_refuses_itself(http: httpx.Client) -> None:
    response = http.post("/api/chat", json=chat("x", options="x"))
    assert response.status_code == 400


def test_a_body_of_a_model_without_a_rule_is_handed_on_as_it_is(tmp_path: Path, submits: list[Submit]) -> None:
    settings = {"anonymous": True, "num_ctx": ("other:*=99",)}
    with (
        Fabric(tmp_path, engines=[Settings(slots=1)], gateway_settings=settings) as fabric,
        httpx.Client(base_url=fabric.http_url, trust_env=False, timeout=20) as http,
    ):
        text = json.dumps(chat("x", options={"num_ctx": 2048, "num_predict": 1}), indent=3)
        assert http.post("/api/chat", content=text).status_code == 200
        assert loaded(fabric)["llama2:latest"] == 2048
    assert submits[0].variant == "num_ctx=2048"


async def test_whoever_waits_hears_how_long(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "to_gateway", Estimating())
    async with authenticated(fabric) as wire:
        for number in range(5):
            endless = {"num_predict": 10**6}
            await wire.send(
                {"type": "generate", "id": f"{number}", "model": "llama2", "prompt": "x", "options": endless}
            )
        queued = await wire.hear_until("queued", ref="4")
        assert (queued["position"], queued["etaMs"]) == (1, ETA_MS)
    fabric.until(lambda: fabric.busy() == 0, "the engine is idle")


async def test_what_a_client_may_have_reaches_gateways_that_run(fabric: Fabric, submits: list[Submit]) -> None:
    """By both ways, and on a connection that was open before."""
    with contextlib.closing(Store.open(fabric.folder)) as store:
        _, secret = store.add_token(fabric.client_id)

    def by_http() -> tuple[float, int]:
        headers = {"authorization": f"Bearer {secret}"}
        url = f"{fabric.http_url}/api/chat"
        assert httpx.post(url, json=chat("x"), headers=headers, trust_env=False, timeout=20).status_code == 200
        return submits[-1].weight, submits[-1].running_max

    async with authenticated(fabric) as wire:

        async def by_websocket() -> tuple[float, int]:
            await wire.send({"type": "embed", "id": "1", "model": "llama2", "input": "x"})
            await wire.hear_until("embed_result")
            return submits[-1].weight, submits[-1].running_max

        assert await by_websocket() == await asyncio.to_thread(by_http) == (1.0, 0)
        with contextlib.closing(Store.open(fabric.folder)) as store:
            store.limit(fabric.client_id, weight=2.5, running_max=3)
        await asyncio.to_thread(fabric.until, lambda: by_http() == (2.5, 3), "the gateway has seen the change")
        assert await by_websocket() == (2.5, 3)
