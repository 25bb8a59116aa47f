"""The gateway's HTTP side and its watch over revocations, without a socket."""

import asyncio
import base64
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import websockets
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from common.errors import Code, FabricError, ProcessError
from gateway import app
from gateway.app import Gateway
from gateway.auth import Authenticator, load_public_key
from gateway.keyring import Keyring
from gateway.settings import GatewaySettings
from gateway.store import Alias, Client, Store, Token
from tests.fabric import Fabric

GOOD = "https://chat.example.org"
WAIT_S = 10.0


def a_gateway(authenticator: Authenticator | None = None, **settings: Any) -> Gateway:
    """With nobody behind it."""
    upstream = SimpleNamespace(revoke=lambda client_ids: None)
    pulls = SimpleNamespace(revoke=lambda clients, tokens: None)
    services = SimpleNamespace(
        settings=GatewaySettings(**settings),
        authenticator=authenticator,
        upstream=upstream,
        pulls=pulls,
        aliases={},
        shares={},
    )
    return Gateway(cast("Any", services), Keyring(lambda digest: None), cast("Any", None))


# Pages of other origins -----------------------------------------------------------------------------------------------


async def ask(gateway: Gateway, method: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway.app), base_url="http://gateway") as client:
        return await client.request(method, "/livez", headers={k.replace("_", "-"): v for k, v in headers.items()})


async def test_a_page_of_an_allowed_origin_may_read_the_answer_and_no_other_may() -> None:
    gateway = a_gateway(origins=(GOOD,))
    good = await ask(gateway, "GET", origin=GOOD)
    assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, GOOD)
    assert good.headers["vary"] == "Origin", "or a cache would give one page the leave of another"
    for origin in (
        "https://evil.example",
        "null",
        GOOD + ".evil.example",
        GOOD.replace("https", "http"),
        GOOD + ":444",
    ):
        assert "access-control-allow-origin" not in (await ask(gateway, "GET", origin=origin)).headers
    plain = await ask(gateway, "GET")
    assert (plain.status_code, plain.text) == (200, "ok\n")
    assert "access-control-allow-origin" not in plain.headers


async def test_by_default_any_page_may_read_the_answer_without_credentials() -> None:
    answer = await ask(a_gateway(), "GET", origin="https://any.example")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


async def test_a_preflight_allows_reading_to_allowed_origins_only() -> None:
    gateway = a_gateway(origins=(GOOD,))
    good = await ask(gateway, "OPTIONS", origin=GOOD, access_control_request_method="GET")
    assert (good.status_code, good.content) == (204, b"")
    assert good.headers["access-control-allow-origin"] == GOOD
    assert {"GET", "POST", "DELETE"} <= set(good.headers["access-control-allow-methods"].split(", "))
    for method in ("GET", "POST"):
        refused = await ask(gateway, "OPTIONS", origin="https://evil.example", access_control_request_method=method)
        assert refused.status_code == 400, method
    evil = await ask(gateway, "OPTIONS", origin="https://evil.example", access_control_request_method="GET")
    assert "access-control-allow-origin" not in evil.headers


# Handshakes that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "status"), [("/foo", 404), ("/ws/", 404), ("/ws?a=b", 101), ("", 101)])
async def test_clients_are_told_where_to_connect_and_no_error_is_logged(
    path: str, status: int, fabric: Fabric, caplog: pytest.LogCaptureFixture
) -> None:
    if status == 101:
        async with websockets.connect(f"{fabric.url}{path}") as line:
            assert "challenge" in await line.recv()
    else:
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(f"{fabric.url}{path}")
        assert refused.value.response.status_code == status
        assert refused.value.response.body == b"clients connect to / or /ws"
        # Answered after the task of the one refused has ended, if it logs.
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(f"{fabric.http_url}/livez")
    assert [record.message for record in caplog.records if record.name.startswith("uvicorn")] == []


# Revocations ----------------------------------------------------------------------------------------------------------


class Watched:
    """A registry that tells when the watch has taken note of a change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen = 0
        self._grown = threading.Condition()

    def changed_since(self, change: int) -> Sequence[Client | Token]:
        with self._grown:
            self._seen = change  # it asks for what came after: all before was acted upon
            self._grown.notify_all()
        return self._store.changed_since(change)

    def aliases(self) -> Sequence[Alias]:
        return self._store.aliases()

    def wait_until_seen(self, change: int) -> None:
        with self._grown:
            assert self._grown.wait_for(lambda: self._seen >= change, WAIT_S)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store.open(tmp_path)) as store:
        yield store


@pytest.mark.parametrize("revoked_meanwhile", [True, False])
async def test_a_revocation_between_look_up_and_log_in_counts(
    store: Store, revoked_meanwhile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No connection bears the client's name yet when the watch sees the change, and it sees it once."""
    monkeypatch.setattr(app, "REVOCATIONS_S", 0.001)
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    store.add("alice", load_public_key(pem))
    watched = Watched(store)

    def find(name: str) -> Client | None:
        found = store.get(name)
        if revoked_meanwhile:
            watched.wait_until_seen(store.revoke(name).change)
        return found

    authenticator = Authenticator(find, "ws://gateway")
    gateway = a_gateway(authenticator)
    watch = asyncio.create_task(gateway.watch_revocations(cast("Store", watched)))
    try:
        challenge = authenticator.challenge()
        signature = base64.b64encode(key.sign(challenge.line.encode())).decode()
        log_in = authenticator.authenticate(challenge, "alice", signature)
        if revoked_meanwhile:
            with pytest.raises(FabricError) as caught:
                await log_in
            assert caught.value.code is Code.AUTH_FAILED
        else:
            assert (await log_in).id == "alice"
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


# Its folders ----------------------------------------------------------------------------------------------------------


async def test_a_folder_for_large_bodies_that_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    settings = GatewaySettings(listen="127.0.0.1:0", data_dir=tmp_path, spool_dir=tmp_path / "none")
    with pytest.raises(ProcessError, match=r"spool_dir .*none, is no folder"):
        await app.run(settings, asyncio.Event())
