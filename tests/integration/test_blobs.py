"""Files for models that are to be created: on which hosts they go, and what is said of them."""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway import blobs, operations
from gateway.blobs import settled
from gateway.exchange import HELD_BYTES_MAX
from gateway.operations import Target
from gateway.store import Store
from tests.fabric import Fabric
from workers.embedded.simulated import Settings

MIB = 2**20


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    settings = {"blob_bytes_max": 8 * MIB}
    folder = tmp_path_factory.mktemp("blobs")
    with Fabric(folder, engines=[Settings() for _ in range(3)], gateway_settings=settings) as running:
        yield running


def key(fabric: Fabric, *scopes: str, client: str = "ops") -> dict[str, str]:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        _, secret = store.add_token(client, scopes=scopes or ("models:write",), models=("*",))
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def http(fabric: Fabric) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fabric.http_url, headers=key(fabric), trust_env=False, timeout=20) as client:
        yield client


def blob(text: str, size: int = 1000) -> tuple[str, bytes]:
    """The path of a file, and the file."""
    data = (text.encode() * size)[:size]
    return f"/api/blobs/{digest(data)}", data


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def holders(fabric: Fabric, path: str) -> list[int]:
    """The hosts whose engines have it."""
    return [n for n, url in enumerate(fabric.engine_urls, 1) if httpx.head(url + path, trust_env=False).is_success]


def audit(fabric: Fabric, subject: str) -> list[tuple[str, tuple[str, ...], str]]:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        return [(row.action, row.hosts, row.outcome) for row in store.audit() if row.model == subject]


@pytest.mark.parametrize("size", [0, 1000, 5 * MIB])
def test_a_file_goes_to_all_hosts_once(fabric: Fabric, http: httpx.Client, size: int) -> None:
    path, data = blob("everywhere", size)
    missing = http.head(path)
    assert (missing.status_code, missing.content) == (404, b"")
    sent = http.post(path, content=data)
    assert (sent.status_code, sent.content) == (201, b"")
    assert holders(fabric, path) == [1, 2, 3]
    assert http.head(path).status_code == 200
    again = http.post(path, content=data)
    assert (again.status_code, again.content) == (200, b"")
    assert audit(fabric, digest(data)) == [("blob", ("worker-1", "worker-2", "worker-3"), "success")]


def test_hosts_are_chosen_in_the_url(fabric: Fabric, http: httpx.Client) -> None:
    path, data = blob("chosen")
    assert http.post(f"{path}?hosts=worker-3,worker-1", content=data).status_code == 201
    assert holders(fabric, path) == [1, 3]
    assert http.head(f"{path}?hosts=worker-1").status_code == 200
    assert http.head(path).status_code == 404
    assert http.post(path, content=data).status_code == 201
    assert holders(fabric, path) == [1, 2, 3]
    assert audit(fabric, digest(data))[0][1] == ("worker-2",), "only where it lacked"


def test_of_so_many_hosts_a_client_always_gets_the_same(fabric: Fabric, http: httpx.Client) -> None:
    """The files of a model must be on one host."""
    chosen = []
    for number in range(3):
        path, data = blob(f"file {number}")
        assert http.post(f"{path}?copies=1", content=data).status_code == 201
        chosen.append(holders(fabric, path))
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 1
    targets = [Target(f"h{number}", f"http://e{engine}") for number in range(20) for engine in (1, 2)]
    assert settled(targets, "ops", None) == targets
    picked = settled(targets, "ops", 3)
    assert len({target.host for target in picked}) == 3
    assert len(picked) == 6
    assert picked == settled([target for target in targets if target in picked], "ops", 3)
    assert len({settled(targets, f"client-{number}", 1)[0].host for number in range(50)}) > 5


def test_what_is_not_what_its_name_says_goes_nowhere(fabric: Fabric, http: httpx.Client) -> None:
    path, data = blob("right")
    response = http.post(path, content=b"wrong")
    expected = f'digest mismatch, expected "{digest(data)}", got "{digest(b"wrong")}"'
    assert (response.status_code, response.json()) == (400, {"error": expected, "code": "INVALID_MESSAGE"})
    assert holders(fabric, path) == []
    for name in ("sha256:1", f"md5:{'0' * 64}", f"sha256:{'g' * 64}"):
        for method in ("HEAD", "POST"):
            assert http.request(method, f"/api/blobs/{name}").status_code == 400
    assert http.post("/api/blobs/x").json()["error"] == "invalid digest format"


def test_a_choice_that_is_none(http: httpx.Client) -> None:
    path, data = blob("nowhere")
    for query, status in (("copies=0", 400), ("copies=x", 400), ("hosts=worker-9", 404), ("labels=no=such", 404)):
        assert http.post(f"{path}?{query}", content=data).status_code == status


def test_a_file_that_is_too_large(fabric: Fabric, http: httpx.Client) -> None:
    path, data = blob("large", 8 * MIB + 1)
    assert http.post(path, content=data).status_code == 413
    assert http.post(path, content=iter([data])).json()["code"] == "TOO_LARGE"
    assert holders(fabric, path) == []


def test_who_may(fabric: Fabric) -> None:
    path, data = blob("mine")
    with httpx.Client(
        base_url=fabric.http_url, headers=key(fabric, "inference", "models:read"), trust_env=False
    ) as http:
        assert http.head(path).status_code == 403
        assert http.post(path, content=data).status_code == 403
    assert httpx.post(fabric.http_url + path, content=data, trust_env=False).status_code == 401


def test_what_a_file_takes_of_memory_meanwhile_is_counted(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = blob("counted")
    with monkeypatch.context() as patch:
        patch.setattr(blobs, "SPOOL_AT", HELD_BYTES_MAX + 1)
        refused = http.post(path, content=data)
        assert (refused.status_code, refused.json()["code"]) == (503, "QUEUE_FULL")
    assert http.post(path, content=data).status_code == 201


def test_a_disk_without_room(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "choose", lambda *_: [Target("worker-1", "nowhere", 2**30)])

    async def all_lack(_self: object, _client: str, targets: list[Target], _digest: str) -> list[Target]:
        return targets

    monkeypatch.setattr(blobs.Blobs, "_lacking", all_lack)
    path, data = blob("full")
    for content in (data, iter([data])):
        response = http.post(path, content=content)
        assert (response.status_code, response.json()["code"]) == (503, "QUEUE_FULL")
        assert response.json()["error"].startswith("worker-1: it takes 0.0 GiB")


# Creating a model of files --------------------------------------------------------------------------------------------


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def hosts_with(fabric: Fabric, name: str) -> list[int]:
    return [number for number, backend in enumerate(fabric.backends, 1) if f"{name}:latest" in backend.models]


def test_a_model_is_created_where_its_files_are(fabric: Fabric, http: httpx.Client) -> None:
    names = []
    for number in range(2):
        path, data = blob(f"part {number}")
        assert http.post(f"{path}?hosts=worker-1,worker-3", content=data).status_code == 201
        names.append(digest(data))
    path, data = blob("adapter")
    assert http.post(f"{path}?hosts=worker-3,worker-2", content=data).status_code == 201
    files = dict(zip(("a.gguf", "b.gguf"), names, strict=True))
    assert lines(http.post("/api/create", json={"model": "of-files", "files": files}))[-1] == {"status": "success"}
    assert hosts_with(fabric, "of-files") == [1, 3]
    adapted = {"model": "adapted", "files": files, "adapters": {"x": digest(data)}}
    assert lines(http.post("/api/create", json=adapted))[-1] == {"status": "success"}
    assert hosts_with(fabric, "adapted") == [3]
    assert lines(http.post("/api/create", json={"model": "one", "files": files, "copies": 1}))[-1] == {
        "status": "success"
    }
    assert len(hosts_with(fabric, "one")) == 1


def test_files_that_are_not_there(fabric: Fabric, http: httpx.Client) -> None:
    path, data = blob("somewhere")
    assert http.post(f"{path}?hosts=worker-2", content=data).status_code == 201
    body: dict[str, Any] = {"model": "incomplete", "files": {"a": digest(data), "b": digest(b"missing")}}
    response = http.post("/api/create", json=body)
    assert (response.status_code, response.json()["code"]) == (404, "NOT_FOUND")
    assert response.json()["error"] == f'blob "{digest(b"missing")}" not found on worker-2: send it there first'
    body = {"model": "incomplete", "files": {"a": digest(data)}, "hosts": ["worker-1", "worker-2"]}
    assert "not found on worker-1" in http.post("/api/create", json=body).json()["error"]
    for wrong in ({"a": "sha256:1"}, {f"{number}": digest(b"x") for number in range(1001)}):
        assert http.post("/api/create", json={"model": "incomplete", "files": wrong}).status_code == 400
    assert hosts_with(fabric, "incomplete") == []


# Breaks ---------------------------------------------------------------------------------------------------------------


def test_a_host_that_does_not_tell(fabric: Fabric, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "BACKOFF_S", 0.001)
    monkeypatch.setattr(blobs, "choose", lambda *_: [Target("worker-9", "nowhere")])
    path, _ = blob("untold")
    assert http.head(path).status_code == 503


def test_a_host_that_fails_is_named(fabric: Fabric, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "BACKOFF_S", 0.001)
    path, data = blob("unlucky")
    fault = {"kind": "http_500", "model": digest(data), "count": operations.TRIES_MAX}
    httpx.post(f"{fabric.engine_urls[1]}/debug/faults", json=fault, trust_env=False).raise_for_status()
    response = http.post(path, content=data)
    error = "failed on 1 of 3 engines: worker-2: an injected fault"
    assert (response.status_code, response.json()) == (500, {"error": error})
    assert holders(fabric, path) == [1, 3]
    assert [row[2] for row in audit(fabric, digest(data))] == [error]
    assert http.post(path, content=data).status_code == 201
    assert audit(fabric, digest(data))[0] == ("blob", ("worker-2",), "success")


def test_a_host_that_fails_once_is_asked_again(
    fabric: Fabric, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "BACKOFF_S", 0.001)
    path, data = blob("shaky", 3 * MIB)
    fault = {"kind": "http_503", "model": digest(data), "count": 1}
    httpx.post(f"{fabric.engine_urls[1]}/debug/faults", json=fault, trust_env=False).raise_for_status()
    assert http.post(path, content=data).status_code == 201
    assert holders(fabric, path) == [1, 2, 3]


@contextlib.contextmanager
def half_sent(fabric: Fabric, headers: dict[str, str]) -> Iterator[socket.socket]:
    """A file of which 2 MiB were sent, and the rest does not come."""
    address = urlsplit(fabric.http_url)
    path, _ = blob("half")
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {headers['authorization']}\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(f"{head}content-length: {4 * MIB}\r\n\r\n".encode() + bytes(2 * MIB))
        yield connection


def test_a_key_that_is_revoked_stops_an_upload(fabric: Fabric) -> None:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        token, secret = store.add_token("leaving", scopes=("models:write",), models=("*",))
        with half_sent(fabric, {"authorization": f"Bearer {secret}"}) as connection:
            store.revoke_token(token.id)
            assert connection.recv(65536).startswith(b"HTTP/1.1 499 ")


def test_a_gateway_that_ends_waits_for_no_upload(tmp_path: Path) -> None:
    with Fabric(tmp_path) as fabric, half_sent(fabric, key(fabric)) as connection:
        fabric.until(lambda: bool(holding(fabric)), "it is being kept")
        fabric.stop("gateway-0", hurry=True)
        assert connection.recv(65536).startswith(b"HTTP/1.1 503 ")


def holding(fabric: Fabric) -> list[str]:
    """Files without a name that this process has open in the fabric's folder."""
    found = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return [name for name in found if name.startswith(str(fabric.folder)) and name.endswith("(deleted)")]
