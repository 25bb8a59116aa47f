"""A fake gateway that knows one client, and that client's key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.unit.client.fake_gateway import FakeGateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(scope="session")
def rsa_key() -> RSAPrivateKey:
    return generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="session")
def pem(rsa_key: RSAPrivateKey) -> str:
    return rsa_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.fixture
async def gateway(rsa_key: RSAPrivateKey) -> AsyncIterator[FakeGateway]:
    async with FakeGateway({"me": rsa_key.public_key()}) as gateway:
        yield gateway


@pytest.fixture
def settings(gateway: FakeGateway, pem: str) -> dict[str, Any]:
    """Arguments of a client that the gateway knows."""
    return {"server_url": gateway.url, "client_id": "me", "private_key": pem}
