"""Models come and go on all hosts at once, over real sockets and simulated engines."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.main import main
from gateway import operations
from gateway.store import Store
from tests.fabric import Fabric
from workers.embedded.simulated import Settings

WRITE = ("inference", "models:read", "models:write")


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    engines = [Settings(slots=1, pull_bytes=1000) for _ in range(3)]
    with Fabric(tmp_path_factory.mktemp("operations"), engines=engines) as running:
        yield running


def key(fabric: Fabric, *scopes: str, models: tuple[str, ...] = ("*",)) -> dict[str, str]:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        _, secret = store.add_token("ops", scopes=scopes or WRITE, models=models)
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def http(fabric: Fabric) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fabric.http_url, headers=key(fabric), trust_env=False, timeout=20) as client:
        yield client


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def hosts_with(fabric: Fabric, name: str) -> list[int]:
    return [number for number, backend in enumerate(fabric.backends, 1) if f"{name}:latest" in backend.models]


def outcome_of(fabric: Fabric, model: str) -> tuple[str, tuple[str, ...], str]:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        newest = next(row for row in store.audit() if row.model == f"{model}:latest")
    assert newest.client == "ops"
    return newest.action, newest.hosts, newest.outcome


def test_a_pull_is_done_on_all_hosts_and_told_as_one(fabric: Fabric, http: httpx.Client) -> None:
    told = lines(http.post("/api/pull", json={"model": "everywhere"}))
    assert told[0] == {"status": "pulling manifest"}
    assert told[-1] == {"status": "success"}
    (layer,) = [line for line in told if line.get("digest") and line["completed"] == line["total"]]
    assert layer["total"] == 3000
    assert hosts_with(fabric, "everywhere") == [1, 2, 3]
    assert outcome_of(fabric, "everywhere") == ("pull", ("worker-1", "worker-2", "worker-3"), "success")
    fabric.until(
        lambda: http.post("/api/generate", json={"model": "everywhere", "prompt": "p"}).is_success, "it serves"
    )


def test_hosts_are_chosen(fabric: Fabric, http: httpx.Client) -> None:
    assert lines(http.post("/api/pull", json={"name": "one", "hosts": ["worker-2"]}))[-1] == {"status": "success"}
    assert hosts_with(fabric, "one") == [2]
    http.post("/api/pull", json={"model": "two", "copies": 2})
    assert len(hosts_with(fabric, "two")) == 2
    missing = http.post("/api/pull", json={"model": "m", "hosts": ["worker-9"]})
    assert (missing.status_code, missing.json()["code"]) == (404, "NOT_FOUND")
    assert "worker-1, worker-2, worker-3" in missing.json()["error"]


def test_each_host_is_told_of_to_those_who_ask(http: httpx.Client) -> None:
    told = lines(http.post("/api/pull?detail=hosts", json={"model": "detailed"}))
    assert [(entry["host"], entry["status"]) for entry in told[-1]["hosts"]] == [
        (f"worker-{number}", "success") for number in (1, 2, 3)
    ]


def test_a_pull_without_a_stream(fabric: Fabric, http: httpx.Client) -> None:
    response = http.post("/api/pull", json={"model": "quiet", "stream": False})
    assert (response.status_code, response.json()) == (200, {"status": "success"})
    failed = http.post("/api/pull", json={"model": "missing-quiet", "stream": False})
    assert failed.status_code == 500
    assert "file does not exist" in failed.json()["error"]
    assert outcome_of(fabric, "missing-quiet")[2].startswith("failed on 3 of 3")


def test_a_model_that_is_in_no_registry_is_not_asked_for_again(http: httpx.Client) -> None:
    told = lines(http.post("/api/pull", json={"model": "missing"}))
    assert "failed on 3 of 3 engines" in told[-1]["error"]
    assert "pull model manifest: file does not exist" in told[-1]["error"]
    assert not any("trying again" in line.get("status", "") for line in told)


def inject(fabric: Fabric, engine: int, kind: str, model: str, **more: Any) -> None:
    body = {"kind": kind, "model": model, **more}
    httpx.post(f"{fabric.engine_urls[engine - 1]}/debug/faults", json=body, trust_env=False).raise_for_status()


def test_a_pull_that_breaks_is_tried_again_and_goes_on(
    fabric: Fabric, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "BACKOFF_S", 0.01)
    inject(fabric, 2, "error_line", "shaky", after=4, count=2)
    told = lines(http.post("/api/pull", json={"model": "shaky"}))
    assert told[-1] == {"status": "success"}
    assert [line for line in told if "worker-2: an injected fault; trying again" in line["status"]]
    assert hosts_with(fabric, "shaky") == [1, 2, 3]


def test_one_host_that_fails_for_good_is_named(
    fabric: Fabric, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "BACKOFF_S", 0.01)
    inject(fabric, 1, "http_500", "partly", count=1000)
    told = lines(http.post("/api/pull", json={"model": "partly"}))
    assert told[-1]["error"].startswith("failed on 1 of 3 engines: worker-1: ")
    assert hosts_with(fabric, "partly") == [2, 3]


def under_way(fabric: Fabric) -> int:
    """Pulls that the engines work on."""
    return sum(backend.library.under_way for backend in fabric.backends if backend.library)


@contextlib.contextmanager
def hanging(fabric: Fabric, http: httpx.Client, model: str) -> Iterator[Iterator[str]]:
    """A pull that hangs on every host; its lines."""
    for engine in range(1, len(fabric.backends) + 1):
        inject(fabric, engine, "hang", model, after=2)
    with http.stream("POST", "/api/pull", json={"model": model}) as response:
        reading = response.iter_lines()
        next(reading)
        fabric.until(lambda: under_way(fabric) == len(fabric.backends), "they pull")
        yield reading


def test_whoever_leaves_stops_the_pull(fabric: Fabric, http: httpx.Client) -> None:
    with hanging(fabric, http, "left"):
        pass
    fabric.until(lambda: under_way(fabric) == 0, "nobody pulls for nobody")
    fabric.until(lambda: outcome(fabric, "left") == "stopped by the client", "it is written down")
    assert lines(http.post("/api/pull", json={"model": "left"}))[-1] == {"status": "success"}


def test_a_revoked_key_ends_its_operations(fabric: Fabric) -> None:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        token, secret = store.add_token("revoked-ops", scopes=WRITE)
        headers = {"authorization": f"Bearer {secret}"}
        with (
            httpx.Client(base_url=fabric.http_url, headers=headers, trust_env=False, timeout=20) as http,
            hanging(fabric, http, "revoked") as reading,
        ):
            store.revoke_token(token.id)
            last = json.loads(list(reading)[-1])
    assert (last["error"], last["code"]) == ("this key was revoked", "CANCELLED")
    assert outcome(fabric, "revoked") == "this key was revoked"
    fabric.until(lambda: under_way(fabric) == 0, "nobody pulls for it any more")


def test_a_gateway_that_ends_tells_of_its_operations(tmp_path: Path) -> None:
    with Fabric(tmp_path, engines=[Settings(pull_bytes=1000)]) as ending:
        with (
            httpx.Client(base_url=ending.http_url, headers=key(ending), trust_env=False, timeout=20) as http,
            hanging(ending, http, "cut") as reading,
        ):
            ending.stop("gateway-0", hurry=True)
            assert json.loads(list(reading)[-1])["code"] == "SHUTTING_DOWN"
        assert outcome(ending, "cut") == "this gateway is shutting down"
        ending.until(lambda: under_way(ending) == 0, "its operation ends with it")


def test_a_host_that_drains_is_left_out_and_not_waited_for(fabric: Fabric, http: httpx.Client) -> None:
    assert fabric.addresses is not None
    broker = ["--broker", fabric.addresses.gateways]
    assert main(["drain", "worker-3", *broker]) == 0
    try:
        fabric.until(lambda: draining(http) == {"worker-3"}, "it is seen")
        refused = http.post("/api/pull", json={"model": "m", "hosts": ["worker-3"]})
        assert (refused.status_code, refused.json()["error"]) == (
            404,
            "worker-3 drains; `weftline resume worker-3` ends that",
        )
        assert lines(http.post("/api/pull", json={"model": "undrained"}))[-1] == {"status": "success"}
        assert hosts_with(fabric, "undrained") == [1, 2]
    finally:
        assert main(["resume", "worker-3", *broker]) == 0
    fabric.until(lambda: draining(http) == set(), "it is back")


def draining(http: httpx.Client) -> set[str]:
    models = http.get("/fabric/models").json()["models"]
    return {entry["host"] for model in models for entry in model["hosts"] if entry["draining"]}


def test_what_has_ended_is_known_at_once(http: httpx.Client) -> None:
    for number in range(5):
        assert http.post("/api/pull", json={"model": f"next{number}", "stream": False}).is_success
        assert http.post("/api/generate", json={"model": f"next{number}", "prompt": "p"}).is_success
        assert http.post("/api/copy", json={"source": f"next{number}", "destination": "again"}).is_success
        assert http.request("DELETE", "/api/delete", json={"model": "again"}).is_success
        assert http.request("DELETE", "/api/delete", json={"model": "again"}).status_code == 404


def test_what_fails_is_asked_as_often_as_is_said(
    fabric: Fabric, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "BACKOFF_S", 0.01)
    inject(fabric, 1, "http_500", "counted", count=100)
    body = {"model": "counted", "hosts": ["worker-1"], "stream": False}
    assert http.post("/api/pull", json=body).status_code == 500
    (left,) = [fault.count for fault in fabric.backends[0].faults.pending if fault.model == "counted"]
    assert left == 100 - operations.TRIES_MAX


def outcome(fabric: Fabric, model: str) -> str:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        return next((row.outcome for row in store.audit() if row.model == f"{model}:latest"), "")


def test_pulls_take_no_slot(fabric: Fabric, http: httpx.Client) -> None:
    for engine in (1, 2, 3):
        inject(fabric, engine, "hang", "slow", after=2)
    with http.stream("POST", "/api/pull", json={"model": "slow"}) as response:
        reading = response.iter_lines()
        next(reading)
        assert http.post("/api/generate", json={"model": "llama2", "prompt": "p", "stream": False}).is_success


def test_copy_and_delete(fabric: Fabric, http: httpx.Client) -> None:
    http.post("/api/pull", json={"model": "origin", "hosts": ["worker-1", "worker-3"]})
    fabric.until(lambda: len(having(http, "origin")) == 2, "it is seen")
    copied = http.post("/api/copy", json={"source": "origin", "destination": "copied"})
    assert (copied.status_code, copied.content) == (200, b"")
    assert hosts_with(fabric, "copied") == [1, 3]
    deleted = http.request("DELETE", "/api/delete", json={"model": "origin"})
    assert (deleted.status_code, deleted.content) == (200, b"")
    assert hosts_with(fabric, "origin") == []
    fabric.until(lambda: not having(http, "origin"), "it is seen")
    again = http.request("DELETE", "/api/delete", json={"model": "origin"})
    assert (again.status_code, again.json()["error"]) == (404, "model 'origin' not found")


def having(http: httpx.Client, model: str) -> list[str]:
    models = http.get("/fabric/models").json()["models"]
    return [entry["host"] for found in models if found["name"] == model for entry in found["hosts"]]


def test_a_model_is_kept_in_memory_and_let_go(fabric: Fabric, http: httpx.Client) -> None:
    def resident() -> set[str]:
        return {model["host"] for model in http.get("/api/ps").json()["models"] if model["name"] == "llama2:latest"}

    held = http.post("/fabric/load", json={"model": "llama2", "hosts": ["worker-1", "worker-2"], "keepAlive": -1})
    assert (held.status_code, held.json()) == (200, {"status": "success"})
    fabric.until(lambda: {"worker-1", "worker-2"} <= resident(), "it is in memory")
    http.post("/fabric/load", json={"model": "llama2", "keepAlive": 0})
    fabric.until(lambda: not resident(), "it is let go")


@pytest.mark.parametrize("path", ["/api/pull", "/api/push", "/api/create", "/api/copy", "/fabric/load"])
def test_bad_requests(http: httpx.Client, path: str) -> None:
    long = json.dumps({"model": "m" * 257, "source": "m" * 257}).encode()
    named = b'{"model":"mine","source":"mine","%b":"yours"}'
    nearly = [named % name for name in (b"Model", b"FROM", "\u017fource".encode())]
    for body in (b"{", b"{}", b'{"model":7}', b'{"model":"m","copies":0}', long, *nearly):
        assert http.post(path, content=body).status_code == 400
    assert http.post(path, json={"model": "m", "source": "m", "hosts": ["nowhere"]}).status_code == 404


def test_only_a_key_with_the_scope_may(fabric: Fabric) -> None:
    reader = key(fabric, "inference", "models:read")
    with httpx.Client(base_url=fabric.http_url, headers=reader, trust_env=False) as http:
        refused = http.post("/api/pull", json={"model": "m"})
        assert (refused.status_code, refused.json()["code"]) == (403, "FORBIDDEN")
    narrow = key(fabric, *WRITE, models=("mine*",))
    with httpx.Client(base_url=fabric.http_url, headers=narrow, trust_env=False) as http:
        assert http.post("/api/pull", json={"model": "yours"}).status_code == 403
        copy = {"source": "mine", "destination": "yours", "hosts": ["worker-1"]}
        assert http.post("/api/pull", json={"model": "mine", "hosts": ["worker-1"]}).status_code == 200
        fabric.until(lambda: bool(having(http, "mine")), "it is seen")
        assert http.post("/api/copy", json=copy).status_code == 403


def test_a_request_that_is_too_large(http: httpx.Client) -> None:
    response = http.post("/api/create", content=b" " * (2**20 + 1))
    assert (response.status_code, response.json()["code"]) == (413, "TOO_LARGE")
