"""A bare client of the WebSocket protocol, for tests that send what no client library would."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import websockets
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.fabric import Fabric


class Wire:
    """One connection; messages are dicts."""

    def __init__(self, connection: websockets.ClientConnection) -> None:
        self.connection = connection

    async def send(self, message: Any) -> None:
        """Send a dict as JSON, or a str or bytes as they are."""
        await self.connection.send(json.dumps(message) if isinstance(message, dict) else message)

    async def hear(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self.connection.recv())
        return message

    async def hear_until(self, *types: str, ref: str | None = None) -> dict[str, Any]:
        """Skip messages until one of these types (about `ref`) comes."""
        while True:
            message = await self.hear()
            if message["type"] in types and (ref is None or message.get("id") == ref):
                return message

    async def closed(self) -> tuple[int, str]:
        """Wait for the server's close; its code and reason."""
        await self.connection.wait_closed()
        assert self.connection.close_code is not None
        return self.connection.close_code, self.connection.close_reason or ""

    async def authenticate(self, fabric: Fabric, **more: Any) -> dict[str, Any]:
        challenge = await self.hear()
        assert challenge["type"] == "challenge"
        await self.send(
            {
                "type": "authenticate",
                "clientId": fabric.client_id,
                "signature": sign(fabric, challenge["challenge"]),
                **more,
            }
        )
        return await self.hear()


def sign(fabric: Fabric, challenge: str) -> str:
    key = load_pem_private_key(fabric.private_key_path.read_bytes(), None)
    assert isinstance(key, RSAPrivateKey)
    return base64.b64encode(key.sign(challenge.encode(), PKCS1v15(), hashes.SHA256())).decode()


@asynccontextmanager
async def connect(fabric: Fabric, *, gateway: int = 0, **options: Any) -> AsyncIterator[Wire]:
    """A connection that has said nothing yet."""
    async with websockets.connect(fabric.url_of(gateway), max_size=None, proxy=None, **options) as connection:
        yield Wire(connection)


@asynccontextmanager
async def authenticated(
    fabric: Fabric, *, gateway: int = 0, resume: bool = False, **options: Any
) -> AsyncIterator[Wire]:
    """A connection of the fabric's client."""
    async with connect(fabric, gateway=gateway, **options) as wire:
        result = await wire.authenticate(fabric, resume=resume)
        assert result["success"], result
        yield wire
