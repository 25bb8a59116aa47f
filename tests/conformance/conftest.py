"""What the clients of Ollama's, OpenAI's and Anthropic's APIs are tried against: a fleet that asks for keys."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.store import Store
from tests.conformance.fleet import joined, tiny
from tests.fabric import Fabric
from workers.embedded.simulated import Fault, Settings

CLIENTS = Path(__file__).parent / "clients"
SET = ["OLLAMA_HOST", "OLLAMA_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_KEY"]
SET += ["ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"]


@pytest.fixture(scope="module", autouse=True)
def _plain_environment() -> Iterator[None]:
    """What this machine is set to use is not what is tried."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SET:
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """Two hosts with the models `llama2`, `simulated` and `simulated-embed`. Shared: what a test starts, it stops."""
    engines = [Settings(tokens_per_s=2000, slots=4), Settings(tokens_per_s=2000, slots=4)]
    with Fabric(tmp_path_factory.mktemp("fleet"), engines=engines) as running:
        yield running


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """One host with the real model `tiny`; this machine needs no key there."""
    folder = tmp_path_factory.mktemp("embedded")
    with Fabric(folder, engines=[], gateway_settings={"anonymous": True}) as fabric, joined(fabric, tiny(), "tiny"):
        yield fabric


@pytest.fixture(scope="session")
def new_key(fleet: Fabric) -> Callable[..., str]:
    """Makes keys with the scopes that are named."""

    def make(*scopes: str, models: tuple[str, ...] = ("*",)) -> str:
        with contextlib.closing(Store.open(fleet.folder)) as store:
            return store.add_token("app", scopes=scopes or ("inference", "models:read"), models=models)[1]

    return make


@pytest.fixture(scope="session")
def key(new_key: Callable[..., str]) -> str:
    """A key that may do what clients do."""
    return new_key()


@pytest.fixture
def broken(fleet: Fabric) -> Iterator[None]:
    """Every host's engine stops in the middle of the next answer, with no good end."""
    for backend in fleet.backends:
        backend.faults.pending.append(Fault(kind="die_mid", after=5, count=1))
    yield
    for backend in fleet.backends:
        backend.faults.pending.clear()


@dataclass
class Full:
    """A host that is busy and a queue that is full, until `release`."""

    fabric: Fabric
    release: Callable[[], None]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Full]:
    """One more request is answered 503; this machine needs no key."""
    with (
        Fabric(
            tmp_path,
            engines=[Settings(tokens_per_s=2000, slots=1)],
            gateway_settings={"anonymous": True},
            broker_settings={"settle_s": 0.0, "queue_max": 1},
        ) as fabric,
        contextlib.ExitStack() as taken,
        httpx.Client(base_url=fabric.http_url, trust_env=False) as http,
    ):
        endless = {"model": "llama2", "prompt": "a", "options": {"num_predict": 100_000}}
        running = taken.enter_context(http.stream("POST", "/api/generate", json=endless)).iter_lines()
        next(running)
        body = json.dumps(endless).encode()
        host, _, port = fabric.http_url.removeprefix("http://").partition(":")
        waiting = taken.enter_context(socket.create_connection((host, int(port))))
        waiting.sendall(
            b"POST /api/generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        fabric.until(lambda: "\nweftline_requests_total 2" in http.get("/metrics").text, "the other one waits")

        def release() -> None:
            taken.close()  # the one that waits leaves first
            fabric.until(lambda: fabric.busy() == 0, "the engine is idle")

        yield Full(fabric, release)


@pytest.fixture(scope="session")
def node() -> str:
    """Node, with the clients installed as locked."""
    missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        missing("Node.js and npm are needed to run the clients for Node.js")
    installed, lock = CLIENTS / "node_modules/.package-lock.json", CLIENTS / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        command = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=100)
        if done.returncode:
            missing(f"npm ci failed: {done.stderr.strip()}")
    return node


@pytest.fixture(scope="session")
def frameworks() -> str:
    """A Python with LangChain and LlamaIndex, which are too large for the tests' own environment."""
    python = os.environ.get("WEFTLINE_FRAMEWORKS_PYTHON")
    if python is None:
        pytest.skip(f"set WEFTLINE_FRAMEWORKS_PYTHON to a Python that has {CLIENTS.name}/requirements-frameworks.txt")
    return python


@pytest.fixture(scope="session")
def play(fleet: Fabric, key: str) -> Callable[..., dict[str, Any]]:
    """Runs one of the trials in clients/; what its client saw, by scenario."""

    def run(interpreter: str, trial: str, **environment: str) -> dict[str, Any]:
        environment |= {"WEFTLINE_URL": fleet.http_url, "WEFTLINE_KEY": key}
        environment["WEFTLINE_ENGINES"] = ",".join(fleet.engine_urls)
        done = subprocess.run(
            [interpreter, trial], cwd=CLIENTS, env=os.environ | environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return seen

    return run


def locked(package: str) -> str:
    """The version of an npm package that is tried."""
    lock = json.loads((CLIENTS / "package-lock.json").read_text(encoding="utf-8"))
    return str(lock["packages"][f"node_modules/{package}"]["version"])


def pinned(package: str) -> str:
    """The version of a framework that is tried."""
    lines = (CLIENTS / "requirements-frameworks.txt").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix(f"{package}==") for line in lines if line.startswith(f"{package}=="))
