"""OllamaClient and its companions, with the interface that the OllamaClient guide for Python defines.

Code written for the guide's classes runs on weftline's client by changing its import. The differences are repairs: what
is under way when the line drops raises ConnectionError instead of waiting for ever; a pool that is used up hands out
the next client that is returned; `ping` waits for its pong; callbacks may be plain functions.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from weftline_client.aio import AsyncClient, Callback
from weftline_client.errors import AuthenticationError, NotConnectedError
from weftline_client.sync import LoopThread

if TYPE_CHECKING:
    import threading
    from collections.abc import Coroutine

__all__ = ["OllamaClient", "OllamaConnectionPool", "SyncOllamaClient"]

T = TypeVar("T")

logger = logging.getLogger("weftline_client")


class OllamaClient:
    """One connection. `config` has server_url, client_id, private_key_path or private_key, signature_algorithm.

    `message_callbacks` maps message types to lists of callbacks. A lost line stays lost until `connect()` is called
    again, as `connected` tells; so nothing is resumed, and the server stops what ran on it at once.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config: dict[str, Any] = {
            "server_url": "ws://localhost:3000",
            "client_id": None,
            "private_key_path": None,
            "private_key": None,
            "signature_algorithm": "SHA256",
            **config,
        }
        self.message_callbacks: dict[str, list[Callback]] = {}
        self._client: AsyncClient | None = None

    @property
    def connected(self) -> bool:
        """Whether the line is open."""
        return self._client is not None and self._client.connected

    @property
    def authenticated(self) -> bool:
        """Whether the server has accepted the client: on an open line, always."""
        return self.connected

    @property
    def active_requests(self) -> dict[str, dict[str, Any]]:
        """The requests under way by their ids, with their text so far. A new dict each time."""
        if self._client is None:
            return {}
        return {request.id: {"text": request.text} for request in self._client._requests.values()}

    async def connect(self) -> bool:
        """Connect and authenticate; True.

        Raises ValueError for a missing id or an unusable key, ConnectionError ("Connection failed: …", and "Connection
        failed: Authentication failed: …") if there is no way in.
        """
        await self.close()
        algorithm = self.config["signature_algorithm"]
        self._client = AsyncClient(
            self.config["server_url"],
            client_id=self.config["client_id"],
            private_key=self.config["private_key"] or None,
            private_key_path=self.config["private_key_path"] or None,
            # The guide signs with SHA-256 whenever it does not know the name.
            signature_algorithm=algorithm if algorithm in ("SHA384", "SHA512") else "SHA256",
            reconnect=None,
        )
        self._client._callbacks = self.message_callbacks
        try:
            await self._client.connect()
        except AuthenticationError as error:
            raise ConnectionError(f"Connection failed: Authentication failed: {error.message}") from error
        except NotConnectedError as error:
            raise ConnectionError(f"Connection failed: {error.message}") from error
        return True

    def on(self, message_type: str, callback: Callback) -> None:
        """Register a callback for a message type."""
        self.message_callbacks.setdefault(message_type, []).append(callback)

    def off(self, message_type: str, callback: Callback | None = None) -> None:
        """Remove a callback of a message type, or all of them."""
        if message_type in self.message_callbacks:
            kept = [other for other in self.message_callbacks[message_type] if callback and other != callback]
            self.message_callbacks[message_type] = kept

    async def generate(
        self, prompt: str, model: str = "llama2", options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Complete a prompt; a dict of text, total_tokens and elapsed_time (ms).

        Raises ConnectionError without a line or when it drops, and an Exception "… (code: X)" for the server's errors.
        """
        result = await self._connected_client().generate(prompt, model, options=options or {})
        return {
            "text": result.text,
            "total_tokens": result.total_tokens,
            "elapsed_time": result.elapsed_time_ms,
        }

    async def stop(self, request_id: str) -> None:
        """Stop a generation; nothing if it is not under way. Raises ConnectionError without a line."""
        await self._connected_client().stop(request_id)

    async def get_models(self) -> list[str]:
        """The names of the models. Raises ConnectionError without a line or when it drops."""
        return await self._connected_client().models()

    async def ping(self) -> None:
        """Ping the server and wait for its pong. Raises ConnectionError without a line or when it drops."""
        await self._connected_client("Not connected").ping()

    async def close(self) -> None:
        """Close the line, if there is one."""
        if self._client is not None:
            await self._client.close()

    def _connected_client(self, complaint: str = "Not connected or authenticated") -> AsyncClient:
        if self._client is None or not self._client.connected:
            raise ConnectionError(complaint)
        return self._client


class SyncOllamaClient:
    """OllamaClient, as `async_client`, on a background thread."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.async_client = OllamaClient(config)
        self._background = LoopThread()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The background loop, None while there is none."""
        return self._background.loop

    @property
    def thread(self) -> threading.Thread | None:
        """The background thread, None while there is none."""
        return self._background.thread

    def connect(self) -> bool:
        """Connect and authenticate; see `OllamaClient.connect`."""
        return self._run(self.async_client.connect())

    def generate(self, prompt: str, model: str = "llama2", options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Complete a prompt; see `OllamaClient.generate`."""
        return self._run(self.async_client.generate(prompt, model, options))

    def stop(self, request_id: str) -> None:
        """Stop a generation; see `OllamaClient.stop`."""
        self._run(self.async_client.stop(request_id))

    def get_models(self) -> list[str]:
        """The names of the models; see `OllamaClient.get_models`."""
        return self._run(self.async_client.get_models())

    def close(self) -> None:
        """Close the line and end the background thread."""
        if self.thread is not None:
            try:
                self._run(self.async_client.close())
            finally:
                self._background.stop()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self._background.start()
        return self._background.run(coroutine)


class OllamaConnectionPool:
    """`pool_size` clients of one identity, lent out one at a time."""

    def __init__(self, config: dict[str, Any], pool_size: int = 5) -> None:
        self.config = config
        self.pool_size = pool_size
        self.clients: list[OllamaClient] = []
        self.available_clients: list[OllamaClient] = []
        self.lock = asyncio.Condition()

    async def initialize(self) -> None:
        """Connect all clients. Raises as `OllamaClient.connect` does."""
        for _ in range(self.pool_size):
            client = OllamaClient(self.config)
            await client.connect()
            self.clients.append(client)
            self.available_clients.append(client)
        logger.info("connection pool initialized with %d clients", self.pool_size)

    async def get_client(self) -> OllamaClient:
        """Borrow a client; waits until there is one."""
        async with self.lock:
            await self.lock.wait_for(lambda: self.available_clients)
            return self.available_clients.pop()

    async def release_client(self, client: OllamaClient) -> None:
        """Return a borrowed client."""
        async with self.lock:
            self.available_clients.append(client)
            self.lock.notify()

    async def generate(
        self, prompt: str, model: str = "llama2", options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Complete a prompt with a borrowed client; see `OllamaClient.generate`."""
        client = await self.get_client()
        try:
            return await client.generate(prompt, model, options)
        finally:
            await self.release_client(client)

    async def get_models(self) -> list[str]:
        """The names of the models; see `OllamaClient.get_models`."""
        client = await self.get_client()
        try:
            return await client.get_models()
        finally:
            await self.release_client(client)

    async def close(self) -> None:
        """Close all clients."""
        for client in self.clients:
            await client.close()
        self.clients = []
        self.available_clients = []
