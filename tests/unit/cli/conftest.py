"""A gateway and a broker to talk to, each on a thread of its own, so that commands run as they do at a terminal."""

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common import protocol
from common.protocol import Admin, Message, Query
from common.transport import Socket
from tests.unit.client.fake_gateway import FakeGateway


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Commands take over the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own settings reaches a command; the data dir is the test's."""
    for name in ("CONFIG", "KEY", "CLIENT_URL", "CLIENT_BROKER", "CLIENT_MODEL", "CLIENT_OLLAMA"):
        monkeypatch.delenv(f"WEFTLINE_{name}", raising=False)
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    monkeypatch.setenv("WEFTLINE_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="session")
def client_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def gateway(portal: BlockingPortal, client_key: Ed25519PrivateKey) -> Iterator[FakeGateway]:
    """It knows the client "me"."""
    with portal.wrap_async_context_manager(FakeGateway({"me": client_key.public_key()})) as gateway:
        yield gateway


@pytest.fixture
def config(gateway: FakeGateway, client_key: Ed25519PrivateKey, tmp_path: Path) -> Path:
    """The NAME_config.json of "me", as the environment names it where a test asks for it."""
    pem = client_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return write_config(tmp_path, pem, gateway.url)


def write_config(folder: Path, pem: bytes, url: str, client_id: str = "me") -> Path:
    key = folder / f"{client_id}_key.pem"
    key.write_bytes(pem)
    path = folder / f"{client_id}_config.json"
    path.write_text(
        json.dumps(
            {"serverUrl": url, "clientId": client_id, "privateKeyPath": str(key), "signatureAlgorithm": "ed25519"}
        )
    )
    return path


BrokerOf = Callable[..., "contextlib.AbstractContextManager[str]"]


@pytest.fixture
def broker_of(portal: BlockingPortal) -> BrokerOf:
    """A broker that gives these answers in turn, the last for ever; its address. What it is asked goes to `asked`."""

    @contextlib.asynccontextmanager
    async def broker(*answers: Message | bytes, asked: list[Message] | None = None) -> AsyncIterator[str]:
        left = list(answers)

        def on_frame(peer: bytes, frame: bytes) -> None:
            message, _ = protocol.from_gateway.decode(frame)
            assert isinstance(message, Query | Admin)
            if asked is not None:
                asked.append(message)
            answer = left.pop(0) if len(left) > 1 else left[0]
            socket.send(answer if isinstance(answer, bytes) else protocol.encode(answer), peer)

        socket = Socket("router", on_frame)
        try:
            yield socket.bind("tcp://127.0.0.1:*")
        finally:
            socket.close()

    return lambda *answers, **options: portal.wrap_async_context_manager(broker(*answers, **options))
