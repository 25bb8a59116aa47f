"""Ollama's HTTP API on the gateway: handed on byte for byte, and cancelled when its client leaves."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from common.errors import Code, FabricError
from gateway.exchange import Ending, Room
from gateway.http_api import ANONYMOUS
from gateway.store import Store
from tests.fabric import Fabric
from workers.embedded.simulated import Settings

ENDLESS = {"num_predict": 1_000_000}


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    engines = [Settings(tokens_per_s=2000, slots=4), Settings(tokens_per_s=2000, slots=4)]
    folder = tmp_path_factory.mktemp("http")
    settings = {"anonymous": True, "body_bytes_max": 8 * 2**20}
    with Fabric(folder, engines=engines, gateway_settings=settings) as running:
        yield running


@pytest.fixture
def http(fabric: Fabric) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fabric.http_url, trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def engine(fabric: Fabric) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fabric.engine_urls[0], trust_env=False, timeout=20) as client:
        yield client


def timeless(value: Any) -> Any:
    """Without what differs from one answer to the next."""
    if isinstance(value, dict):
        timed = {"created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}
        return {key: timeless(item) for key, item in value.items() if key not in timed}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def answer(response: httpx.Response) -> tuple[int, str, list[Any]]:
    lines = [timeless(json.loads(line)) for line in response.text.splitlines()]
    return response.status_code, response.headers["content-type"], lines


GENERATE = {"model": "llama2", "prompt": "why is the sky blue?", "options": {"num_predict": 30, "seed": 3}}
CHAT = {"model": "llama2", "messages": [{"role": "user", "content": "hello"}], "options": {"num_predict": 30}}
EMBED = {"model": "simulated-embed", "input": ["a", "b"]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", GENERATE),
        ("/api/generate", {**GENERATE, "stream": False}),
        ("/api/generate", {"model": "llama2"}),
        ("/api/chat", CHAT),
        ("/api/chat", {**CHAT, "stream": False}),
        ("/api/embed", EMBED),
        ("/api/embeddings", {"model": "simulated-embed", "prompt": "a"}),
        ("/api/show", {"model": "llama2"}),
        ("/api/show", {"name": "llama2"}),
        ("/api/generate", {"model": "llama2", "prompt": "p", "raw": True, "system": "no"}),
        ("/api/generate", {"model": "llama2", "prompt": 7}),
        ("/v1/embeddings", EMBED),
    ],
)
def test_the_answer_is_the_engines(http: httpx.Client, engine: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert answer(http.post(path, json=body)) == answer(engine.post(path, json=body))


TALK = {"model": "llama2", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 30}
EVENTS = {
    "/v1/chat/completions": {**TALK, "stream_options": {"include_usage": True}},
    "/v1/completions": {"model": "llama2", "prompt": "hello", "max_tokens": 30},
    "/v1/responses": {"model": "llama2", "input": "hello", "max_output_tokens": 30},
    "/v1/messages": TALK,
}


def impersonal(text: str) -> str:
    """Without ids and times."""
    return re.sub(r'"(id|item_id|created|created_at|completed_at)":("[^"]*"|[0-9]+)', r'"\1":0', text)


@pytest.mark.parametrize("path", EVENTS)
@pytest.mark.parametrize("stream", [True, False])
def test_the_other_apis_are_the_engines_too(http: httpx.Client, engine: httpx.Client, path: str, stream: bool) -> None:
    mine, theirs = (client.post(path, json={**EVENTS[path], "stream": stream}) for client in (http, engine))
    assert (mine.status_code, impersonal(mine.text)) == (200, impersonal(theirs.text))
    assert mine.headers["content-type"] == theirs.headers["content-type"]
    assert ("event-stream" in mine.headers["content-type"]) == stream


def test_a_stream_comes_line_by_line(http: httpx.Client) -> None:
    with http.stream("POST", "/api/generate", json=GENERATE) as response:
        assert response.headers["transfer-encoding"] == "chunked"
        lines = list(response.iter_lines())
    assert len(lines) == 31
    assert json.loads(lines[-1])["done"]


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/show", "/api/embed"])
def test_a_model_that_is_nowhere(http: httpx.Client, engine: httpx.Client, path: str) -> None:
    mine, theirs = (client.post(path, json={"model": "none", "input": "a"}) for client in (http, engine))
    assert (mine.status_code, mine.json()["error"]) == (theirs.status_code, theirs.json()["error"])
    assert mine.json()["code"] == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model":"llama2","MODEL":"other"}', "write 'model', not 'MODEL'"),
        (b"{", "not the JSON"),
        (b"[]", "not the JSON"),
        (b"{}", "model is required"),
        (b'{"model":""}', "model is required"),
    ],
)
def test_a_body_that_names_no_model(http: httpx.Client, content: bytes, words: str) -> None:
    response = http.post("/api/chat", content=content)
    assert response.status_code == 400
    assert words in response.json()["error"]


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    """See tests/integration/test_large_bodies.py for those that are only large."""
    response = http.post("/api/chat", content=b" " * (8 * 2**20 + 1))
    assert (response.status_code, response.json()["code"]) == (413, "TOO_LARGE")


def test_whoever_leaves_stops_the_engine(fabric: Fabric, http: httpx.Client) -> None:
    with http.stream("POST", "/api/generate", json={**GENERATE, "options": ENDLESS}) as response:
        lines = response.iter_lines()
        next(lines)
        assert fabric.busy() == 1
    fabric.until(lambda: fabric.busy() == 0, "the engine is idle")


@contextlib.contextmanager
def all_slots_taken(http: httpx.Client) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        reading = []
        for _ in range(8):
            response = stack.enter_context(http.stream("POST", "/api/generate", json={**GENERATE, "options": ENDLESS}))
            reading.append(response.iter_lines())
            next(reading[-1])
        yield


def test_whoever_leaves_a_queue_is_gone_from_it(fabric: Fabric, http: httpx.Client) -> None:
    with all_slots_taken(http), pytest.raises(httpx.ReadTimeout):
        http.post("/api/generate", json=GENERATE, timeout=0.3)
    fabric.until(lambda: fabric.busy() == 0, "the engines are idle")
    assert http.post("/api/generate", json=GENERATE).status_code == 200


def test_a_question_about_a_model_waits_for_no_slot(fabric: Fabric, http: httpx.Client) -> None:
    with all_slots_taken(http):
        assert http.post("/api/show", json={"model": "llama2"}).status_code == 200
    fabric.until(lambda: fabric.busy() == 0, "the engines are idle")


def test_a_reader_who_is_slow_gets_every_line(tmp_path: Path) -> None:
    """The stream pauses at the outbox' bound, and what was let go comes by replay."""
    settings = {"anonymous": True, "outbox_bytes_max": 2**16}
    with (
        Fabric(tmp_path, engines=[Settings(tokens_per_s=20_000)], gateway_settings=settings) as fabric,
        httpx.Client(base_url=fabric.http_url, trust_env=False, timeout=30) as http,
        http.stream("POST", "/api/generate", json={**GENERATE, "options": {"num_predict": 30_000}}) as response,
    ):
        lines = response.iter_lines()
        first = next(lines)
        fabric.until(lambda: "weftline_pauses_total 0" not in http.get("/metrics").text, "the stream paused")
        numbered = [json.loads(line) for line in (first, *lines)]
    assert len(numbered) == 30_001
    assert numbered[-1]["eval_count"] == 30_000


def test_whoever_asked_twice_and_left_stops_the_engine(fabric: Fabric) -> None:
    """uvicorn reads no further while a second request waits, so it would not see that its client left."""
    body = json.dumps({**GENERATE, "stream": False, "options": ENDLESS}).encode()
    head = b"POST /api/generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
    address = urlsplit(fabric.http_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(head + body)
        fabric.until(lambda: fabric.busy() == 1, "it runs")
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
    fabric.until(lambda: fabric.busy() == 0, "the engine is idle")


def test_a_client_that_would_like_http2_is_answered_in_http1(fabric: Fabric) -> None:
    """As Java's HttpClient asks, on a connection that it keeps."""
    body = json.dumps({**GENERATE, "stream": False}).encode()
    head = (
        b"POST /api/generate HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nHost: localhost\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    address = urlsplit(fabric.http_url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(head + body)
            answered = b""
            while not answered.endswith(b"}"):
                answered += connection.recv(65536)
            assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
            assert json.loads(answered.partition(b"\r\n\r\n")[2])["done"]


async def test_what_is_held_has_a_bound_together() -> None:
    """Requests that are not complete, and documents."""
    room = Room(10)
    one, other = Ending(ANONYMOUS, room), Ending(ANONYMOUS, room)
    one.hold(6)
    with pytest.raises(FabricError) as error:
        other.hold(5)
    assert error.value.code is Code.QUEUE_FULL
    one.release()
    other.hold(10)
    one.release()
    assert room.bytes_left == 0


# What clients look for ------------------------------------------------------------------------------------------------


def test_the_words_clients_look_for(http: httpx.Client) -> None:
    assert http.get("/").text == http.get("/", headers={"accept": "*/*"}).text == "Ollama is running"
    assert http.head("/").status_code == 200
    assert http.head("/api/tags").status_code == 200
    assert http.head("/api/version").status_code == 200
    page = http.get("/", headers={"accept": "text/html,application/xhtml+xml"})
    assert page.headers["content-type"].startswith("text/html")
    missing = http.get("/api/nothing")
    assert (missing.status_code, missing.text) == (404, "404 page not found")
    wrong = http.get("/api/generate")
    assert (wrong.status_code, wrong.text) == (405, "405 method not allowed")


def test_a_page_from_elsewhere_may_ask(http: httpx.Client) -> None:
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    response = http.options("/api/chat", headers=headers | {"access-control-request-headers": "authorization"})
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == "*"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == "authorization"


# The catalogue --------------------------------------------------------------------------------------------------------


def test_the_fleet_is_listed_as_one_host(http: httpx.Client, engine: httpx.Client) -> None:
    assert http.get("/api/tags").json()["models"] == sorted(
        engine.get("/api/tags").json()["models"], key=lambda model: model["name"]
    )
    assert http.get("/api/version").json() == {"version": engine.get("/api/version").json()["version"]}


def test_what_is_in_memory_is_listed_with_its_host(fabric: Fabric, http: httpx.Client) -> None:
    http.post("/api/generate", json=GENERATE)

    def resident() -> bool:
        return any(model["host"].startswith("worker-") for model in http.get("/api/ps").json()["models"])

    fabric.until(resident, "the model is listed")
    entry = http.get("/api/ps").json()["models"][0]
    assert {"name", "model", "size", "digest", "expires_at", "size_vram"} <= entry.keys()


def test_openai_lists(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    one = next(model for model in listed["data"] if model["id"] == "llama2:latest")
    assert one["object"] == "model"
    assert one["created"] > 0
    assert http.get("/v1/models/llama2").json() == one | {"id": "llama2"}
    missing = http.get("/v1/models/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "model 'none' not found"


def test_who_has_what(http: httpx.Client) -> None:
    models = {model["name"]: model["hosts"] for model in http.get("/fabric/models").json()["models"]}
    assert [host["host"] for host in models["llama2"]] == ["worker-1", "worker-2"]
    assert {host["slots"] for host in models["llama2"]} == {4}


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """A fabric that asks for keys."""
    with Fabric(tmp_path_factory.mktemp("closed"), engines=[Settings(tokens_per_s=500, slots=4)]) as running:
        yield running


@pytest.fixture
def store(closed: Fabric) -> Iterator[Store]:
    with contextlib.closing(Store.open(closed.folder)) as store:
        yield store


def key(store: Store, *scopes: str, models: tuple[str, ...] = ("*",)) -> str:
    _, secret = store.add_token("app", scopes=scopes or ("inference", "models:read"), models=models, expires_at=None)
    return secret


def test_without_a_key_nothing_is_answered(closed: Fabric) -> None:
    with httpx.Client(base_url=closed.http_url, trust_env=False) as http:
        for path in ("/api/tags", "/api/ps", "/fabric/models"):
            response = http.get(path)
            assert (response.status_code, response.json()["code"]) == (401, "AUTH_REQUIRED")
        assert http.post("/api/generate", json=GENERATE).status_code == 401
        openai = http.post("/v1/chat/completions", json={})
        assert (openai.status_code, openai.json()["error"]["type"]) == (401, "authentication_error")
        anthropic = http.post("/v1/messages", json={})
        assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (401, "authentication_error")
        assert http.get("/api/version").status_code == 200
        wrong = http.get("/api/tags", headers={"authorization": "Bearer wrong"})
        assert (wrong.status_code, wrong.json()["code"]) == (401, "AUTH_FAILED")


@pytest.mark.parametrize("way", ["bearer", "x-api-key", "path"])
def test_the_three_ways_of_a_key(closed: Fabric, store: Store, way: str) -> None:
    secret = key(store)
    headers = {"bearer": {"authorization": f"Bearer {secret}"}, "x-api-key": {"x-api-key": secret}}.get(way, {})
    base = f"{closed.http_url}/k/{secret}" if way == "path" else closed.http_url
    with httpx.Client(base_url=base, headers=headers, trust_env=False) as http:
        assert http.post("/api/generate", json=GENERATE).status_code == 200
        assert http.get("/api/tags").json()["models"]
        assert http.get("/v1/models").json()["data"]


def test_a_key_reaches_as_far_as_its_scopes_and_models(closed: Fabric, store: Store) -> None:
    reader = {"authorization": f"Bearer {key(store, 'models:read', models=('llama*',))}"}
    with httpx.Client(base_url=closed.http_url, headers=reader, trust_env=False) as http:
        assert {model["name"] for model in http.get("/api/tags").json()["models"]} == {"llama2:latest"}
        assert http.get("/v1/models/simulated-embed").status_code == 404
        refused = http.post("/api/generate", json=GENERATE)
        assert (refused.status_code, refused.json()["code"]) == (403, "FORBIDDEN")
        assert http.post("/api/show", json={"model": "simulated-embed"}).status_code == 403


def test_a_revoked_key_is_refused_and_its_stream_ends(closed: Fabric, store: Store) -> None:
    token, secret = store.add_token("leaving", scopes=("inference",), models=("*",), expires_at=None)
    headers = {"authorization": f"Bearer {secret}"}
    with httpx.Client(base_url=closed.http_url, headers=headers, trust_env=False, timeout=20) as http:
        with http.stream("POST", "/api/generate", json={**GENERATE, "options": ENDLESS}) as response:
            lines = response.iter_lines()
            next(lines)
            store.revoke_token(token.id)
            last = list(lines)[-1]
        assert json.loads(last)["code"] == "CANCELLED"
        assert http.post("/api/generate", json=GENERATE).status_code == 401
    closed.until(lambda: closed.busy() == 0, "the engine is idle")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "rebound.example"},
        {"origin": "https://evil.example"},
        {"x-forwarded-for": "10.0.0.9"},
        {"forwarded": "for=10.0.0.9"},
        {"via": "1.1 proxy"},
        {"host": "["},
        {"origin": "http://["},
    ],
)
def test_nobody_from_elsewhere_is_anonymous(http: httpx.Client, headers: dict[str, str]) -> None:
    assert http.get("/api/tags", headers=headers).status_code == 401
    assert http.get("/api/tags", headers={"origin": "http://localhost:8080"}).status_code == 200


# Breaks ---------------------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_when_its_host_dies(tmp_path: Path) -> None:
    engines = [Settings(tokens_per_s=50, slots=1), Settings(tokens_per_s=50, slots=1)]
    with Fabric(tmp_path, engines=engines, gateway_settings={"anonymous": True}) as fabric:
        body = {**GENERATE, "options": {"num_predict": 100, "seed": 3}}
        with httpx.Client(base_url=fabric.http_url, trust_env=False, timeout=30) as http:
            whole = [json.loads(line)["response"] for line in http.post("/api/generate", json=body).text.splitlines()]
            with http.stream("POST", "/api/generate", json=body) as response:
                lines = response.iter_lines()
                texts = [json.loads(next(lines))["response"] for _ in range(10)]
                first = next(number for number, url in enumerate(fabric.engine_urls, 1) if fabric.busy(url))
                fabric.stop(f"worker-{first}", hurry=True)
                texts += [json.loads(line)["response"] for line in lines]
        assert texts == whole


def test_a_stream_of_events_goes_on_when_its_host_dies(tmp_path: Path) -> None:
    engines = [Settings(tokens_per_s=50, slots=1), Settings(tokens_per_s=50, slots=1)]
    body = {**TALK, "max_tokens": 100, "seed": 3, "stream": True}
    with (
        Fabric(tmp_path, engines=engines, gateway_settings={"anonymous": True}) as fabric,
        httpx.Client(base_url=fabric.http_url, trust_env=False, timeout=30) as http,
    ):
        whole = impersonal(http.post("/v1/chat/completions", json=body).text)
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            got = [next(lines) for _ in range(20)]
            first = next(number for number, url in enumerate(fabric.engine_urls, 1) if fabric.busy(url))
            fabric.stop(f"worker-{first}", hurry=True)
            got += lines
        ids = set(re.findall('"id":"([^"]*)"', "".join(got)))
    assert "".join(map(texts_of, got)) == "".join(map(texts_of, whole.splitlines()))
    assert [line for line in got if line][-1] == "data: [DONE]"
    assert len(ids) == 1


def texts_of(line: str) -> str:
    choices = json.loads(line.removeprefix("data: "))["choices"] if line.startswith("data: {") else []
    return "".join(choice["delta"]["content"] for choice in choices)


def test_a_draining_gateway_finishes_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    with Fabric(tmp_path, gateway_settings={"anonymous": True}) as fabric:
        with httpx.Client(base_url=fabric.http_url, trust_env=False, timeout=30) as http:
            body = {**GENERATE, "options": {"num_predict": 100}}
            with http.stream("POST", "/api/generate", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                fabric.stop("gateway-0")
                fabric.until(lambda: http.get("/readyz").status_code == 503, "it drains")
                refused = http.post("/api/generate", json=body)
                assert (refused.status_code, refused.json()["code"]) == (503, "SHUTTING_DOWN")
                assert refused.headers["retry-after"] == "1"
                assert json.loads(list(lines)[-1])["done"]
        fabric.until(lambda: fabric.ended("gateway-0"), "it has ended")


def test_a_gateway_that_ends_says_so_in_the_stream(tmp_path: Path) -> None:
    with (
        Fabric(tmp_path, gateway_settings={"anonymous": True}) as fabric,
        httpx.Client(base_url=fabric.http_url, trust_env=False, timeout=30) as http,
        http.stream("POST", "/api/generate", json={**GENERATE, "options": ENDLESS}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        fabric.stop("gateway-0", hurry=True)
        assert json.loads(list(lines)[-1])["code"] == "SHUTTING_DOWN"


def test_many_at_once(fabric: Fabric) -> None:
    async def one(http: httpx.AsyncClient, number: int) -> str:
        body = {**GENERATE, "prompt": str(number), "stream": False}
        response = await http.post("/api/generate", json=body)
        return str(response.json()["response"])

    async def all_of_them() -> list[str]:
        async with httpx.AsyncClient(base_url=fabric.http_url, trust_env=False, timeout=30) as http:
            return await asyncio.gather(*(one(http, number) for number in range(50)))

    texts = asyncio.run(all_of_them())
    assert len(set(texts)) == 50
