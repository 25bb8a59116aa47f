"""The clients of the published guides, unchanged, against the whole fabric.

The Python tests run twice: with the guide's own classes and with `weftline_client.compat`, which must be their equal.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from weftline_client import compat

if TYPE_CHECKING:
    from tests.fabric import Fabric

GUIDES = Path(__file__).parent / "guides"
PROMPT = "Count from one to ten thousand."
SHORT = {"max_tokens": 8, "temperature": 0.0}
STOPPED_BEFORE = 500_000  # tokens: minutes of work for any engine


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["guide", "compat"])
def library(request: pytest.FixtureRequest) -> Any:
    """A module with OllamaClient, SyncOllamaClient and OllamaConnectionPool."""
    if request.param == "compat":
        return compat
    spec = importlib.util.spec_from_file_location("guide_ollama_client", GUIDES / "ollama_client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(fabric: Fabric) -> dict[str, Any]:
    """The client's configuration, made from NAME_config.json as the guide shows it."""
    config = json.loads(fabric.config_path.read_text())
    return {
        "server_url": config["serverUrl"].replace("http://", "ws://"),
        "client_id": config["clientId"],
        "private_key_path": config["privateKeyPath"],
        "signature_algorithm": config.get("signatureAlgorithm", "SHA256"),
    }


@pytest.fixture
async def client(library: Any, config: dict[str, Any]) -> Any:
    client = library.OllamaClient(config)
    assert await client.connect() is True
    yield client
    await client.close()


async def test_python_generates(client: Any, fabric: Fabric) -> None:
    messages: list[dict[str, Any]] = []

    async def record(message: dict[str, Any]) -> None:
        messages.append(message)

    for kind in ("stream_start", "stream_token", "stream_end"):
        client.on(kind, record)
    assert client.connected
    assert client.authenticated
    result = await client.generate(PROMPT, fabric.model, SHORT)
    assert result.keys() == {"text", "total_tokens", "elapsed_time"}
    assert result["text"] == "".join(message.get("token", "") for message in messages)
    assert result["text"]
    assert 0 < result["total_tokens"] <= SHORT["max_tokens"]
    assert result["elapsed_time"] >= 0
    assert [messages[0]["type"], messages[-1]["type"]] == ["stream_start", "stream_end"]
    assert {message["type"] for message in messages[1:-1]} == {"stream_token"}
    assert len({message["id"] for message in messages}) == 1
    assert all(isinstance(message["timestamp"], int) for message in messages)
    assert messages[0]["model"] == fabric.model
    assert messages[-1]["totalTokens"] == result["total_tokens"]
    assert messages[-1]["elapsedTime"] == result["elapsed_time"]
    assert client.active_requests == {}

    client.off("stream_token", record)
    client.off("stream_start")
    messages.clear()
    await client.generate(PROMPT, fabric.model, SHORT)
    assert [message["type"] for message in messages] == ["stream_end"]


async def test_python_generates_concurrently(client: Any, fabric: Fabric) -> None:
    streamed: dict[str, str] = {}

    async def record(message: dict[str, Any]) -> None:
        streamed[message["id"]] = streamed.get(message["id"], "") + message["token"]

    client.on("stream_token", record)
    results = await asyncio.gather(*(client.generate(f"{n} {PROMPT}", fabric.model, SHORT) for n in range(5)))
    assert sorted(result["text"] for result in results) == sorted(streamed.values())
    assert len(streamed) == 5


async def test_python_models_and_ping(client: Any, fabric: Fabric) -> None:
    pong = asyncio.get_running_loop().create_future()

    async def note(message: dict[str, Any]) -> None:
        pong.set_result(message)

    models = await client.get_models()
    assert fabric.model in models
    assert all(isinstance(model, str) for model in models)
    client.on("pong", note)
    assert await client.ping() is None
    assert (await pong)["type"] == "pong"


async def test_python_unknown_model(client: Any, fabric: Fabric) -> None:
    with pytest.raises(Exception, match=r".+ \(code: MODEL_NOT_FOUND\)$"):
        await client.generate(PROMPT, "no-such-model")
    assert client.active_requests == {}
    assert (await client.generate(PROMPT, fabric.model, SHORT))["text"]


async def test_python_stop(client: Any, fabric: Fabric) -> None:
    stopping: list[str] = []

    async def stop(message: dict[str, Any]) -> None:
        if not stopping:
            stopping.append(message["id"])
            assert list(client.active_requests) == stopping
            await client.stop(message["id"])

    client.on("stream_token", stop)
    result = await client.generate(PROMPT, fabric.model, {"max_tokens": STOPPED_BEFORE})
    assert result["total_tokens"] < STOPPED_BEFORE
    assert stopping
    assert await client.stop("never-heard-of") is None
    assert (await client.generate(PROMPT, fabric.model, SHORT))["text"]


async def test_python_refused(library: Any, config: dict[str, Any]) -> None:
    key = generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    for wrong in ({"private_key": pem}, {"client_id": "nobody-knows-me"}):
        client = library.OllamaClient(config | wrong)
        with pytest.raises(ConnectionError, match="Authentication failed"):
            await client.connect()
        assert not client.connected
        assert not client.authenticated
        await client.close()


async def test_python_bad_configuration(library: Any, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Client ID is required"):
        await library.OllamaClient(config | {"client_id": None}).connect()
    with pytest.raises(ValueError, match="Either private_key or private_key_path must be provided"):
        await library.OllamaClient(config | {"private_key_path": None}).connect()
    with pytest.raises(ValueError, match="Failed to load private key"):
        await library.OllamaClient(config | {"private_key": "no key"}).connect()


async def test_python_closed(client: Any, fabric: Fabric) -> None:
    await client.close()
    assert not client.connected
    for call in (client.generate(PROMPT, fabric.model), client.get_models(), client.stop("x"), client.ping()):
        with pytest.raises(ConnectionError, match="Not connected"):
            await call
    assert await client.connect() is True
    assert (await client.generate(PROMPT, fabric.model, SHORT))["text"]


async def test_python_synchronous(library: Any, config: dict[str, Any], fabric: Fabric) -> None:
    def run() -> tuple[Any, ...]:
        client = library.SyncOllamaClient(config)
        loop = client.loop
        try:
            return client.connect(), client.generate(PROMPT, fabric.model, SHORT), client.get_models()
        finally:
            client.close()
            if loop is not None:  # the guide's class leaves its loop open
                loop.close()

    connected, result, models = await asyncio.to_thread(run)
    assert connected is True
    assert result["text"]
    assert fabric.model in models


async def test_python_pool(library: Any, config: dict[str, Any], fabric: Fabric) -> None:
    pool = library.OllamaConnectionPool(config, pool_size=2)
    await pool.initialize()
    try:
        assert len(pool.clients) == len(pool.available_clients) == 2
        results = await asyncio.gather(*(pool.generate(PROMPT, fabric.model, SHORT) for _ in range(2)))
        assert all(result["text"] for result in results)
        assert fabric.model in await pool.get_models()
    finally:
        await pool.close()


# --- Node -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def node() -> str:
    """Node, with what the guide's client imports installed as locked."""
    missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        missing("Node.js and npm are needed to run the Node guide's client")
    installed, lock = GUIDES / "node_modules/.package-lock.json", GUIDES / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        result = subprocess.run(command, cwd=GUIDES, capture_output=True, text=True, timeout=100)
        if result.returncode:
            missing(f"npm ci failed: {result.stderr.strip()}")
    return node


async def drive(node: str, scenario: str, fabric: Fabric) -> dict[str, Any]:
    """Play a scenario of drive.js; what it prints last."""
    process = await asyncio.create_subprocess_exec(
        node,
        "drive.js",
        scenario,
        cwd=GUIDES,
        env=os.environ
        | {
            "WEFTLINE_URL": fabric.url,
            "WEFTLINE_CLIENT_ID": fabric.client_id,
            "WEFTLINE_KEY_PATH": str(fabric.private_key_path.resolve()),
            "WEFTLINE_PROMPT": PROMPT,
            "WEFTLINE_MODEL": fabric.model,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, stderr.decode()
    outcome: dict[str, Any] = json.loads(stdout.decode().splitlines()[-1])
    return outcome


def named(outcome: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [event for event in outcome["events"] if event["name"] == name]


@pytest.mark.node
async def test_node_generates(node: str, fabric: Fabric) -> None:
    outcome = await drive(node, "generate", fabric)
    result = outcome["result"]
    assert result["text"] == "".join(event["token"] for event in named(outcome, "token"))
    assert result["text"]
    assert 0 < result["totalTokens"] <= 8
    assert result["elapsedTime"] >= 0
    (start,), (end,) = named(outcome, "generation_start"), named(outcome, "generation_complete")
    assert start["model"] == fabric.model
    assert start["id"] == end["id"]
    assert end["totalTokens"] == result["totalTokens"]
    assert [event["name"] for event in outcome["events"][:2]] == ["connect", "authenticated"]
    assert named(outcome, "disconnect") == [outcome["events"][-1]]
    assert named(outcome, "error") == []


@pytest.mark.node
async def test_node_generates_concurrently(node: str, fabric: Fabric) -> None:
    outcome = await drive(node, "concurrent", fabric)
    streamed: dict[str, str] = {}
    for event in named(outcome, "token"):
        streamed[event["id"]] = streamed.get(event["id"], "") + event["token"]
    assert sorted(result["text"] for result in outcome["results"]) == sorted(streamed.values())
    assert len(streamed) == 4
    assert outcome["left"] == 0


@pytest.mark.node
async def test_node_models(node: str, fabric: Fabric) -> None:
    assert fabric.model in (await drive(node, "models", fabric))["models"]


@pytest.mark.node
async def test_node_ping(node: str, fabric: Fabric) -> None:
    assert isinstance((await drive(node, "ping", fabric))["pong"]["timestamp"], int)


@pytest.mark.node
async def test_node_unknown_model(node: str, fabric: Fabric) -> None:
    outcome = await drive(node, "unknown_model", fabric)
    assert outcome["message"].endswith(" (MODEL_NOT_FOUND)")
    (error,) = named(outcome, "error")
    assert error["code"] == "MODEL_NOT_FOUND"


@pytest.mark.node
async def test_node_stop(node: str, fabric: Fabric) -> None:
    outcome = await drive(node, "stop", fabric)
    assert outcome["result"]["totalTokens"] < STOPPED_BEFORE
    assert outcome["unknown"] == "No active generation with that ID"
    assert named(outcome, "error") == []


@pytest.mark.node
async def test_node_bad_key(node: str, fabric: Fabric) -> None:
    outcome = await drive(node, "bad_key", fabric)
    assert outcome["message"].startswith("Authentication failed: ")
    assert [event["name"] for event in outcome["events"]] == ["connect", "auth_error", "disconnect"]
    assert outcome["events"][-1]["code"] == 1008


@pytest.mark.node
async def test_node_reconnects(node: str, fabric: Fabric) -> None:
    outcome = await drive(node, "reconnect", fabric)
    assert outcome["result"]["text"]
    assert len(named(outcome, "authenticated")) == 2


@pytest.mark.node
async def test_node_closed(node: str, fabric: Fabric) -> None:
    outcome = await drive(node, "closed", fabric)
    assert (outcome["generate"], outcome["ping"]) == ("Not authenticated", "Not connected")


@pytest.mark.node
async def test_node_pool(node: str, fabric: Fabric) -> None:
    results = (await drive(node, "pool", fabric))["results"]
    assert len(results) == 3
    assert all(result["text"] for result in results)
