"""A whole fabric for tests: broker, gateway, workers and simulated engines on one event loop in a thread of its own.

Real sockets between all parts, ephemeral ports, a registry in a folder of its own. Tests talk to it from other threads
over its URL, as any client would, and reach into it with `call`.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

import broker.server
import gateway.app
import workers.agent
from broker.settings import BrokerSettings
from cli.keys import create_client
from common.process import loop_factory
from gateway.settings import GatewaySettings
from gateway.store import Store
from workers.embedded.server import running
from workers.embedded.simulated import Settings, SimulatedBackend
from workers.settings import WorkerSettings

T = TypeVar("T")
START_S = 20.0


@dataclass
class Fabric:
    """`with Fabric(folder) as fabric: ...`; `engines` are the settings of one simulated engine per worker."""

    folder: Path
    engines: list[Settings] = field(default_factory=lambda: [Settings()])
    gateway_settings: dict[str, Any] = field(default_factory=dict)
    broker_settings: dict[str, Any] = field(default_factory=lambda: {"settle_s": 0.0})
    model: str = "llama2"
    client_id: str = "test-client"

    def __post_init__(self) -> None:
        with contextlib.closing(Store.open(self.folder)) as store:
            files = create_client(store, self.client_id, self.folder / "keys")
        self.private_key_path = files.private
        self.config_path = files.config
        self.http_url = ""
        self.url = ""
        self.engine_urls: list[str] = []
        self.backends: list[SimulatedBackend] = []
        self.addresses: broker.server.Addresses | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="fabric", daemon=True)
        self._ready = threading.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(START_S) or self._error:
            self.close()
            raise RuntimeError("the fabric did not start") from self._error
        config = json.loads(self.config_path.read_text())
        self.config_path.write_text(json.dumps(config | {"serverUrl": self.url}))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._error:
            raise RuntimeError("the fabric ended with an error") from self._error

    def close(self) -> None:
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)

    def call(self, function: Callable[[], Coroutine[Any, Any, T]], timeout_s: float = 10.0) -> T:
        """Run a coroutine on the fabric's loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(timeout_s)

    def busy(self) -> int:
        """Slots the engines themselves count as busy, over all models."""
        total = 0
        for url in self.engine_urls:
            for slots in httpx.get(f"{url}/debug/slots", trust_env=False).json()["models"].values():
                total += slots["busy"]
        return total

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
        """Wait for something that no event tells of."""
        waiter = threading.Event()
        for _ in range(int(timeout_s / 0.01)):
            if condition():
                return
            waiter.wait(0.01)
        raise AssertionError(f"not within {timeout_s} s: {what}")

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._error = error
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = stop = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            for settings in self.engines:
                backend = SimulatedBackend(settings)
                self.backends.append(backend)
                self.engine_urls.append(await stack.enter_async_context(running(backend)))
            group = await stack.enter_async_context(asyncio.TaskGroup())
            bound = asyncio.Event()

            def on_bound(addresses: broker.server.Addresses) -> None:
                self.addresses = addresses
                bound.set()

            any_port = "tcp://127.0.0.1:*"
            group.create_task(
                broker.server.run(
                    BrokerSettings(gateways=any_port, workers=any_port, **self.broker_settings), stop, on_ready=on_bound
                )
            )
            await bound.wait()
            assert self.addresses is not None
            listening = asyncio.Event()

            def on_listening(url: str) -> None:
                self.http_url = url
                self.url = url.replace("http://", "ws://")
                listening.set()

            group.create_task(
                gateway.app.run(
                    GatewaySettings(
                        broker=self.addresses.gateways,
                        listen="127.0.0.1:0",
                        data_dir=self.folder,
                        **self.gateway_settings,
                    ),
                    stop,
                    on_ready=on_listening,
                )
            )
            for number, url in enumerate(self.engine_urls, 1):
                slots = self.engines[number - 1].slots
                group.create_task(
                    workers.agent.run(
                        WorkerSettings(
                            broker=self.addresses.workers,
                            ollama=(f"{url},slots={slots}",),
                            name=f"worker-{number}",
                            poll_interval_s=0.2,
                        ),
                        stop,
                    )
                )
            await listening.wait()
            async with httpx.AsyncClient(trust_env=False) as client:
                for _ in range(int(START_S / 0.02)):
                    state = (await client.get(f"{self.http_url}/readyz")).json()
                    complete = state["ready"] if self.engines else state["reason"] == "no worker is connected"
                    if complete and state["workers"] == len(self.engines):
                        break
                    await asyncio.sleep(0.02)
            self._ready.set()
            await stop.wait()
