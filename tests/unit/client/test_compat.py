"""The guide's interface on this client's machinery. What a real fabric makes of it is seen in tests/conformance."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from weftline_client import compat
from weftline_client.compat import OllamaClient, OllamaConnectionPool, SyncOllamaClient

from tests.unit.client.fake_gateway import MODELS, FakeGateway, Line

if TYPE_CHECKING:
    from types import ModuleType

Message = dict[str, Any]

GUIDE = Path(__file__).parents[2] / "conformance/guides/ollama_client.py"
LONG = {"max_tokens": 1_000_000}


@pytest.fixture(scope="module")
def guide() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guide_ollama_client", GUIDE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interface(cls: type) -> dict[str, Any]:
    """Public methods and the constructor: whether they are coroutines, and their parameters without annotations."""
    return {
        name: (
            inspect.iscoroutinefunction(method),
            [(each.name, each.kind, each.default) for each in inspect.signature(method).parameters.values()],
        )
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if name == "__init__" or not name.startswith("_")
    }


@pytest.mark.parametrize("name", compat.__all__)
def test_methods_are_the_guides(name: str, guide: ModuleType) -> None:
    assert interface(getattr(compat, name)) == interface(getattr(guide, name))


@pytest.mark.parametrize("name", compat.__all__)
async def test_attributes_are_the_guides(name: str, guide: ModuleType) -> None:
    theirs, ours = (getattr(module, name)({"client_id": "me"}) for module in (guide, compat))
    if name == "SyncOllamaClient":
        theirs.loop.close()
    missing = {attribute for attribute in vars(theirs) if not hasattr(ours, attribute)}
    assert missing <= {"ws", "private_key"}  # the guide's inner workings
    assert ours.__dict__.get("config") == vars(theirs).get("config")


async def test_generate(gateway: FakeGateway, settings: Message) -> None:
    client = OllamaClient(settings)
    assert not client.connected
    assert not client.authenticated
    assert client.active_requests == {}
    assert await client.connect() is True
    assert client.connected
    assert client.authenticated
    result = await client.generate("the sky", options={"max_tokens": 3})
    assert result == {"text": "the skythe ", "total_tokens": 3, "elapsed_time": 12}
    await client.generate("hi", "tiny")
    await client.close()
    assert not client.connected
    assert gateway.received[1] == gateway.received[1] | {"model": "tiny", "prompt": "hi", "options": {}}


async def test_what_is_under_way_can_be_seen_and_stopped(gateway: FakeGateway, settings: Message) -> None:
    client = OllamaClient(settings)
    await client.connect()
    task = asyncio.create_task(client.generate("on ", options=LONG))
    await gateway.got("generate")
    ((request_id, state),) = client.active_requests.items()
    assert isinstance(state["text"], str)
    await client.stop(request_id)
    result = await task
    assert result["text"] == "on " * result["total_tokens"]
    assert client.active_requests == {}
    await client.close()


async def test_callbacks(gateway: FakeGateway, settings: Message) -> None:
    seen: list[str] = []

    async def note(message: Message) -> None:
        seen.append(message["type"])

    client = OllamaClient(settings)
    client.on("stream_token", note)
    client.on("stream_end", note)
    assert client.message_callbacks == {"stream_token": [note], "stream_end": [note]}
    await client.connect()
    await client.generate("a b")
    assert seen == ["stream_token", "stream_token", "stream_end"]
    client.off("stream_token", note)
    client.off("stream_end")
    client.off("never registered")
    assert client.message_callbacks == {"stream_token": [], "stream_end": []}
    client.message_callbacks["pong"] = [note]
    await client.ping()
    assert seen[3:] == ["pong"]
    await client.close()


async def test_errors(gateway: FakeGateway, settings: Message, pem: str, unused_tcp_port: int) -> None:
    client = OllamaClient(settings | {"signature_algorithm": "what the guide does not know"})
    with pytest.raises(ConnectionError, match=r"^Not connected$"):
        await client.ping()
    with pytest.raises(ConnectionError, match=r"^Not connected or authenticated$"):
        await client.generate("hi")
    await client.connect()
    with pytest.raises(Exception, match=r"^model 'nope' not found \(code: MODEL_NOT_FOUND\)$"):
        await client.generate("hi", "nope")
    await client.close()

    with pytest.raises(ConnectionError, match=r"^Connection failed: Authentication failed: Unknown client"):
        await OllamaClient(settings | {"client_id": "nobody"}).connect()
    nowhere = settings | {"server_url": f"ws://127.0.0.1:{unused_tcp_port}"}
    with pytest.raises(ConnectionError, match=r"^Connection failed: .*refused"):
        await OllamaClient(nowhere).connect()
    for wrong, complaint in (
        ({"client_id": None}, "Client ID is required"),
        ({"private_key": None}, "Either private_key or private_key_path must be provided"),
        ({"private_key": "no key"}, "Failed to load private key"),
    ):
        with pytest.raises(ValueError, match=complaint):
            await OllamaClient(settings | wrong).connect()


async def test_a_lost_line_stays_lost_until_connect(gateway: FakeGateway, settings: Message) -> None:
    async def drop(line: Line, _: Message) -> None:
        line.drop()

    whole = gateway.scripts["generate"]
    gateway.scripts["generate"] = drop
    client = OllamaClient(settings)
    await client.connect()
    with pytest.raises(ConnectionError, match="connection lost"):
        await client.generate("hi")
    assert not client.connected
    gateway.scripts["generate"] = whole
    with pytest.raises(ConnectionError, match="Not connected"):
        await client.generate("hi")
    await client.connect()
    assert (await client.generate("hi"))["text"] == "hi"
    await client.connect()  # in place of the line there was
    assert await client.get_models() == MODELS
    await client.close()
    assert len(gateway.lines) == 3


async def test_synchronous(gateway: FakeGateway, settings: Message) -> None:
    def run() -> None:
        client = SyncOllamaClient(settings)
        client.close()
        assert client.connect() is True
        assert client.thread is not None
        assert client.loop is not None
        assert client.generate("a b", "tiny", {"seed": 1})["total_tokens"] == 2
        client.stop("never heard of")
        assert client.get_models() == MODELS
        client.close()
        assert client.thread is None

    await asyncio.to_thread(run)


async def test_pool_lends_each_client_once(gateway: FakeGateway, settings: Message) -> None:
    pool = OllamaConnectionPool(settings, pool_size=2)
    await pool.initialize()
    borrowed = [await pool.get_client() for _ in range(2)]
    assert pool.available_clients == []
    waiting = asyncio.create_task(pool.generate("hi"))
    models = await borrowed[0].get_models()
    assert not waiting.done()
    await pool.release_client(borrowed[0])
    assert (await waiting)["text"] == "hi"
    assert await pool.get_models() == models == MODELS
    await pool.release_client(borrowed[1])
    assert set(pool.available_clients) == set(pool.clients) == set(borrowed)
    await pool.close()
    assert pool.clients == []
    assert not any(client.connected for client in borrowed)
