"""A model that no host has is pulled by who asks for it first, over real sockets and simulated engines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from weftline_client import AsyncClient

from gateway import autopull
from gateway.store import Audit, Store
from tests.fabric import Fabric
from tests.integration.test_websocket import text_of
from tests.wsclient import authenticated
from workers.embedded.simulated import Settings, transcript

PATTERNS = ("auto-*", "missing-auto*")


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    engines = [Settings(pull_bytes=1000) for _ in range(2)]
    folder = tmp_path_factory.mktemp("autopull")
    broker = {"settle_s": 0.0, "recover_s": 0.1}  # else who resumes waits for what an earlier broker may have had
    with Fabric(folder, engines=engines, gateway_settings={"auto_pull": PATTERNS}, broker_settings=broker) as running:
        yield running


def client(fabric: Fabric, name: str = "somebody", models: tuple[str, ...] = ("*",)) -> httpx.Client:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        _, secret = store.add_token(name, scopes=("inference", "models:read"), models=models)
    headers = {"authorization": f"Bearer {secret}"}
    return httpx.Client(base_url=fabric.http_url, headers=headers, trust_env=False, timeout=20)


@pytest.fixture
def http(fabric: Fabric) -> Iterator[httpx.Client]:
    with client(fabric) as one:
        yield one


def audit(fabric: Fabric, model: str) -> list[Audit]:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        return [row for row in store.audit() if row.model == f"{model}:latest"]


def waiting(http: httpx.Client, model: str) -> int:
    """How many requests wait for a pull."""
    return sum(pull["waiting"] for pull in http.get("/fabric/pulls").json()["pulls"] if pull["model"] == model)


class Gate:
    """Pulls stop half-way until it is opened."""

    def __init__(self, fabric: Fabric, monkeypatch: pytest.MonkeyPatch, *engines: int) -> None:
        self._fabric = fabric
        self._open = asyncio.Event()
        self.begun: list[str] = []
        for number in engines or range(len(fabric.backends)):
            library = fabric.backends[number].library
            assert library is not None
            monkeypatch.setattr(library, "_lines", self._held(library._lines))

    def _held(self, lines: Callable[..., AsyncIterator[dict[str, Any]]]) -> Callable[..., AsyncIterator[Any]]:
        async def held(name: str, fault: Any) -> AsyncIterator[dict[str, Any]]:
            self.begun.append(name)
            async for line in lines(name, fault):
                yield line
                if line.get("completed") == 500:
                    await self._open.wait()

        return held

    def open(self) -> None:
        async def let() -> None:
            self._open.set()

        self._fabric.call(let)

    @property
    def under_way(self) -> int:
        """Pulls that the engines work on."""
        return sum(backend.library.under_way for backend in self._fabric.backends if backend.library)


@pytest.fixture
def gate(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = Gate(fabric, monkeypatch)
    yield held
    held.open()
    with client(fabric) as http:
        fabric.until(lambda: not http.get("/fabric/pulls").json()["pulls"], "the pulls have ended")


# What works -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {"prompt": "p", "stream": False}),
        ("/api/generate", {"prompt": "p"}),
        ("/api/chat", {"messages": [{"role": "user", "content": "p"}]}),
        ("/api/embed", {"input": "p"}),
        ("/api/embeddings", {"prompt": "p"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "p"}]}),
        ("/v1/completions", {"prompt": "p"}),
        ("/v1/embeddings", {"input": "p"}),
        ("/v1/responses", {"input": "p"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "p"}], "max_tokens": 3}),
    ],
)
def test_the_first_use_pulls_and_is_answered(
    fabric: Fabric, http: httpx.Client, path: str, body: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model = f"auto-http-{request.node.callspec.indices['path']}"
    answer = http.post(path, json={"model": model, **body})
    assert answer.status_code == 200, answer.text
    fabric.until(lambda: bool(audit(fabric, model)), "it is written down")
    (row,) = audit(fabric, model)
    assert (row.client, row.action, row.hosts, row.outcome) == (
        "somebody",
        "auto-pull",
        ("worker-1", "worker-2"),
        "success",
    )


async def test_a_websocket_client_is_told(fabric: Fabric, gate: Gate) -> None:
    async with authenticated(fabric) as wire:
        request = {"type": "generate", "id": "1", "model": "auto-told", "prompt": "hello"}
        await wire.send(request | {"options": {"max_tokens": 9, "seed": 7}})
        first = await wire.hear()
        assert (first["type"], first["id"], first["model"], first["status"]) == (
            "pulling",
            "1",
            "auto-told",
            "starting",
        )
        then = await wire.hear()
        while then.get("completed") != 1000:
            then = await wire.hear()
        assert (then["type"], then["total"]) == ("pulling", 2000)
        assert then["digest"].startswith("sha256:")
        assert then["status"] == f"pulling {then['digest'][7:19]}"
        await asyncio.to_thread(gate.open)
        start = await wire.hear_until("stream_start")
        assert start["model"] == "auto-told"
        text, end = await text_of(wire, "1")
        assert (text, end["doneReason"]) == (transcript("hello", 7, 9), "length")
        await wire.send({"type": "embed", "id": "2", "model": "auto-embeds", "input": "hello"})
        assert (await wire.hear_until("embed_result"))["model"] == "auto-embeds"
        chat = {"type": "chat", "id": "3", "model": "auto-chats", "messages": [{"role": "user", "content": "hi"}]}
        await wire.send(chat)
        assert (await wire.hear_until("stream_end", ref="3"))["doneReason"] == "stop"


async def test_our_client_surfaces_it(fabric: Fabric, gate: Gate) -> None:
    async with AsyncClient.from_config(fabric.config_path) as client:
        told = asyncio.Event()
        client.on("pulling", lambda message: told.set() if message.get("completed") == 1000 else None)
        async with client.generate("hello", "auto-ours", stream=True, options={"max_tokens": 3}) as stream:
            await told.wait()
            assert stream.pulling is not None
            assert (stream.pulling.total, stream.pulling.completed) == (2000, 1000)
            await asyncio.to_thread(gate.open)
            assert len([token async for token in stream]) == 3


def test_ten_requests_share_one_pull(fabric: Fabric, http: httpx.Client, gate: Gate) -> None:
    def ask(number: int) -> int:
        body = {"model": "auto-shared", "prompt": f"p{number}", "stream": False}
        return http.post("/api/generate", json=body).status_code

    with ThreadPoolExecutor(10) as pool:
        answers = pool.map(ask, range(10))
        fabric.until(lambda: waiting(http, "auto-shared") == 10, "all wait")
        fabric.until(
            lambda: http.get("/fabric/pulls").json()["pulls"][0].get("completed") == 1000, "half of it is there"
        )
        (pull,) = http.get("/fabric/pulls").json()["pulls"]
        layer = pull.pop("digest")
        assert pull == {
            "model": "auto-shared",
            "hosts": ["worker-1", "worker-2"],
            "waiting": 10,
            "status": f"pulling {layer[7:19]}",
            "total": 2000,
            "completed": 1000,
        }
        with client(fabric, models=("others*",)) as other:
            assert other.get("/fabric/pulls").json() == {"pulls": []}
        gate.open()
        assert list(answers) == [200] * 10
    assert gate.begun == ["auto-shared:latest"] * 2
    fabric.until(lambda: bool(audit(fabric, "auto-shared")), "it is written down")
    assert len(audit(fabric, "auto-shared")) == 1
    assert http.get("/fabric/pulls").json() == {"pulls": []}


def test_the_first_host_that_has_it_answers(
    fabric: Fabric, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(fabric, monkeypatch, 1)
    assert http.post("/api/generate", json={"model": "auto-first", "prompt": "p"}).is_success
    assert gate.under_way == 1, "the other host is still at it, and nobody waits for it"
    assert not audit(fabric, "auto-first")
    gate.open()
    fabric.until(lambda: bool(audit(fabric, "auto-first")), "it goes on to the end")
    assert audit(fabric, "auto-first")[0].outcome == "success"


def test_what_an_alias_stands_for_is_pulled(fabric: Fabric) -> None:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        store.set_alias("prod", "auto-target")
    with client(fabric, models=("prod",)) as http:

        def ask() -> httpx.Response:
            return http.post("/api/generate", json={"model": "prod", "prompt": "p", "stream": False})

        fabric.until(lambda: ask().status_code == 200, "the gateway knows the alias, and the model is pulled")
        assert ask().json()["model"] == "auto-target"
        assert http.post("/api/generate", json={"model": "auto-target", "prompt": "p"}).status_code == 403


# What does not --------------------------------------------------------------------------------------------------------


async def test_a_model_that_may_not_be_pulled_is_not_found_at_once(fabric: Fabric, gate: Gate) -> None:
    with client(fabric) as http:
        refused = await asyncio.to_thread(http.post, "/api/generate", json={"model": "other", "prompt": "p"})
        assert (refused.status_code, refused.json()["error"]) == (404, "model 'other' not found")
        shown = await asyncio.to_thread(http.post, "/api/show", json={"model": "auto-shown"})
        assert shown.status_code == 404, "to ask what a model is, is not to use it"
    async with authenticated(fabric) as wire:
        await wire.send({"type": "generate", "id": "1", "model": "other", "prompt": "p"})
        assert (await wire.hear())["code"] == "MODEL_NOT_FOUND"
    assert gate.begun == []


def test_a_key_that_is_not_for_the_model_pulls_nothing(fabric: Fabric, gate: Gate) -> None:
    with client(fabric, models=("others*",)) as http:
        assert http.post("/api/generate", json={"model": "auto-forbidden", "prompt": "p"}).status_code == 403
    assert gate.begun == []


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ("PULLS_MAX", "1 models are being pulled already; try again later"),
        ("WAITING_MAX", "1 requests wait for models already; try again later"),
        ("WAITING_BYTES_MAX", "1 requests wait for models already; try again later"),
    ],
)
async def test_beyond_the_bounds_the_queue_is_full(
    fabric: Fabric, gate: Gate, monkeypatch: pytest.MonkeyPatch, bound: str, words: str
) -> None:
    monkeypatch.setattr(autopull, bound, 100 if bound == "WAITING_BYTES_MAX" else 1)
    async with authenticated(fabric) as wire:
        ask = {"type": "generate", "model": f"auto-{bound.lower()}", "prompt": "p"}
        await wire.send(ask | {"id": "1"})
        await wire.hear_until("pulling")
        await wire.send(ask | {"id": "2", "model": "auto-too-much"})
        error = await wire.hear_until("error")
        assert (error["id"], error["code"], error["error"]) == ("2", "QUEUE_FULL", words)
        assert error["retryAfterMs"] > 0
        await asyncio.to_thread(gate.open)
        assert (await wire.hear_until("stream_end", ref="1"))["doneReason"] == "stop"


# Who leaves -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def asking(fabric: Fabric, http: httpx.Client, model: str) -> Iterator[None]:
    """Somebody who waits for a pull, and leaves at the end."""
    before = waiting(http, model)

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=fabric.http_url, headers=http.headers, trust_env=False) as one:
            await one.post("/api/generate", json={"model": model, "prompt": "p"}, timeout=20)

    with ThreadPoolExecutor(1) as pool:
        loop = asyncio.new_event_loop()
        task = loop.create_task(ask())
        running = pool.submit(loop.run_until_complete, task)
        try:
            fabric.until(lambda: waiting(http, model) == before + 1, "it waits")
            yield
        finally:
            loop.call_soon_threadsafe(task.cancel)
            running.exception()
            loop.close()


def test_the_pull_goes_on_as_long_as_another_waits(fabric: Fabric, http: httpx.Client, gate: Gate) -> None:
    with ThreadPoolExecutor(1) as pool:
        with asking(fabric, http, "auto-others"):
            second = pool.submit(http.post, "/api/generate", json={"model": "auto-others", "prompt": "p"})
            fabric.until(lambda: waiting(http, "auto-others") == 2, "both wait")
        fabric.until(lambda: waiting(http, "auto-others") == 1, "one has left")
        gate.open()
        assert second.result().is_success
    assert len(gate.begun) == 2


def test_who_comes_back_soon_finds_the_pull_under_way(fabric: Fabric, http: httpx.Client, gate: Gate) -> None:
    with asking(fabric, http, "auto-again"):
        pass
    fabric.until(lambda: waiting(http, "auto-again") == 0, "nobody waits")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(http.post, "/api/generate", json={"model": "auto-again", "prompt": "p"})
        fabric.until(lambda: waiting(http, "auto-again") == 1, "it waits again")
        gate.open()
        assert second.result().is_success
    assert len(gate.begun) == 2, "by the same pull"


def test_a_pull_that_nobody_waits_for_is_stopped(
    fabric: Fabric, http: httpx.Client, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autopull, "GRACE_S", 0.05)
    with asking(fabric, http, "auto-left"):
        pass
    fabric.until(lambda: gate.under_way == 0, "the engines stop")
    fabric.until(lambda: bool(audit(fabric, "auto-left")), "it is written down")
    assert audit(fabric, "auto-left")[0].outcome == "stopped: nobody waited for it any more"
    assert http.get("/fabric/pulls").json() == {"pulls": []}
    gate.open()
    assert http.post("/api/generate", json={"model": "auto-left", "prompt": "p"}).is_success, "it can be asked anew"


async def test_a_websocket_client_stops_runs_late_and_leaves(
    fabric: Fabric, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autopull, "GRACE_S", 0.05)
    ask = {"type": "generate", "model": "auto-stopped", "prompt": "p"}
    async with authenticated(fabric) as wire:
        await wire.send(ask | {"id": "late", "deadlineMs": 60})
        error = await wire.hear_until("error")
        assert (error["id"], error["code"]) == ("late", "DEADLINE_EXCEEDED")
        assert error["error"].startswith("model 'auto-stopped' is being pulled (")
        await wire.send(ask | {"id": "stopped", "deadlineMs": 60_000})
        await wire.hear_until("pulling")
        await wire.send({"type": "stop", "id": "stopped"})
        end = await wire.hear_until("stream_end", "error")
        assert (end["id"], end["doneReason"], end["totalTokens"]) == ("stopped", "cancelled", 0)
        await wire.send(ask | {"id": "left"})
        await wire.hear_until("pulling")
    await asyncio.to_thread(fabric.until, lambda: gate.under_way == 0, "nobody waits")


async def test_a_client_that_resumes_asks_again(fabric: Fabric, gate: Gate) -> None:
    ask = {"type": "generate", "id": "kept", "model": "auto-resumed", "prompt": "p"}
    async with authenticated(fabric, resume=True) as wire:
        await wire.send(ask)
        await wire.hear_until("pulling")
        wire.connection.transport.abort()
    async with authenticated(fabric, resume=True) as wire:
        await wire.send({"type": "resume", "id": "kept", "lastSeq": -1})
        assert (await wire.hear())["code"] == "NOT_FOUND"
        await wire.send(ask)
        await wire.hear_until("pulling")
        await asyncio.to_thread(gate.open)
        assert (await wire.hear_until("stream_end", "error"))["doneReason"] == "stop"
    assert len(gate.begun) == 2, "by the same pull"


def test_a_revoked_key_waits_no_longer(fabric: Fabric, gate: Gate) -> None:
    with contextlib.closing(Store.open(fabric.folder)) as store, client(fabric) as reader:
        token, secret = store.add_token("revoked", scopes=("inference",))
        headers = {"authorization": f"Bearer {secret}"}
        with (
            httpx.Client(base_url=fabric.http_url, headers=headers, trust_env=False, timeout=20) as http,
            ThreadPoolExecutor(1) as pool,
        ):
            asked = pool.submit(http.post, "/api/generate", json={"model": "auto-revoked", "prompt": "p"})
            fabric.until(lambda: waiting(reader, "auto-revoked") == 1, "it waits")
            store.revoke_token(token.id)
            assert asked.result().json()["error"] == "this key was revoked"
    fabric.until(lambda: gate.under_way == 0, "what only it asked for is stopped")


# Other fabrics --------------------------------------------------------------------------------------------------------


def test_who_cannot_be_told_hears_in_the_end_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"auto_pull": ("*",), "auto_pull_s": 0.5}
    broker = {"settle_s": 0.0, "unserved_s": 0.0}
    engines = [Settings(pull_bytes=1000)]
    with (
        Fabric(tmp_path, engines=engines, gateway_settings=settings, broker_settings=broker) as fabric,
        client(fabric) as http,
    ):
        gate = Gate(fabric, monkeypatch)
        fabric.backends[0].models.clear()
        fabric.until(lambda: not http.get("/api/tags").json()["models"], "it is seen")
        late = http.post("/api/generate", json={"model": "large", "prompt": "p"})
        assert (late.status_code, late.json()["code"], late.headers["retry-after"]) == (503, "NO_WORKERS", "5")
        assert late.json()["error"].startswith("model 'large' is being pulled (")
        assert late.json()["error"].endswith("; ask again later")
        gate.open()
        body = {"model": "large", "prompt": "p"}
        fabric.until(lambda: http.post("/api/generate", json=body).is_success, "whoever asks again is answered")
        assert len(gate.begun) == 1


async def test_a_pull_that_fails_is_told_in_ollamas_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "model 'missing-auto' not found: pull model manifest: file does not exist"
    ask = {"model": "missing-auto", "prompt": "p", "input": "p"}
    engines = [Settings(pull_bytes=1000) for _ in range(2)]
    with (
        Fabric(tmp_path, engines=engines, gateway_settings={"auto_pull": PATTERNS, "pull_copies": 1}) as fabric,
        client(fabric) as http,
    ):
        gate = Gate(fabric, monkeypatch)
        async with authenticated(fabric) as wire:
            await wire.send(ask | {"type": "generate", "id": "1"})
            error = await wire.hear_until("error")
            assert (error["id"], error["code"], error["error"]) == ("1", "MODEL_NOT_FOUND", words)
        for path in ("/api/generate", "/api/embed"):
            refused = await asyncio.to_thread(http.post, path, json=ask)
            assert (refused.status_code, refused.json()) == (404, {"error": words, "code": "MODEL_NOT_FOUND"})
        said = await asyncio.to_thread(http.post, "/v1/completions", json=ask)
        assert said.json()["error"]["message"] == words
        assert http.get("/fabric/pulls").json() == {"pulls": []}
        assert gate.begun == ["missing-auto:latest"], "on one host; who asks soon after hears of the same failure"
        (row,) = audit(fabric, "missing-auto")
        assert (row.client, row.outcome) == ("test-client", "worker-1: pull model manifest: file does not exist")


def test_a_gateway_that_ends_tells_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [Settings(pull_bytes=1000)]
    with Fabric(tmp_path, engines=engines, gateway_settings={"auto_pull": PATTERNS}) as fabric:
        gate = Gate(fabric, monkeypatch)
        with client(fabric) as http, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(http.post, "/api/generate", json={"model": "auto-cut", "prompt": "p"})
            fabric.until(lambda: gate.begun == ["auto-cut:latest"] and waiting(http, "auto-cut") == 1, "it waits")
            fabric.stop("gateway-0", hurry=True)
            assert asked.result().json()["code"] == "SHUTTING_DOWN"
        fabric.until(lambda: gate.under_way == 0, "its pull ends with it")


def test_a_model_that_no_host_lists_afterwards(
    fabric: Fabric, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autopull, "LISTED_S", 0.05)
    monkeypatch.setattr(autopull, "FAILED_S", 0.0)
    for backend in fabric.backends:
        assert backend.library is not None
        monkeypatch.setattr(backend.library, "_models", {})
    refused = http.post("/api/generate", json={"model": "auto-hidden", "prompt": "p"})
    assert refused.status_code == 404
    assert refused.json()["error"] == "model 'auto-hidden' was pulled, but no host lists it"
