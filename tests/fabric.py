"""A whole fabric for tests: broker, gateways, workers and simulated engines on one event loop in a thread of its own.

Real sockets between all parts, ephemeral ports, a registry in a folder of its own. Tests talk to it from other threads
over its URL, as any client would, and reach into it with `call`.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

import broker.server
import gateway.app
import workers.agent
from broker.settings import BrokerSettings
from cli.keys import create_client
from common.process import Stop, loop_factory
from gateway.settings import GatewaySettings
from gateway.store import Store
from workers.embedded.server import running
from workers.embedded.simulated import Settings, SimulatedBackend
from workers.settings import WorkerSettings

T = TypeVar("T")
START_S = 20.0


@dataclass
class Fabric:
    """`with Fabric(folder) as fabric: ...`; `engines` are the settings of one simulated engine per worker.

    `workers`: further settings of each worker. `clients`: further clients by name, with their limits.
    """

    folder: Path
    engines: list[Settings] = field(default_factory=lambda: [Settings()])
    workers: Sequence[Mapping[str, Any]] = ()
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gateways: int = 1
    gateway_settings: dict[str, Any] = field(default_factory=dict)
    broker_settings: dict[str, Any] = field(default_factory=lambda: {"settle_s": 0.0})
    model: str = "llama2"
    client_id: str = "test-client"

    def __post_init__(self) -> None:
        with contextlib.closing(Store.open(self.folder)) as store:
            files = create_client(store, self.client_id, self.folder / "keys")
            for name, limits in self.clients.items():
                create_client(store, name, self.folder / "keys", algorithm="Ed25519")
                if limits:
                    store.limit(name, **limits)
        self.private_key_path = files.private
        self.config_path = files.config
        self.http_urls = [""] * self.gateways
        self.engine_urls: list[str] = []
        self.backends: list[SimulatedBackend] = []
        self.addresses: broker.server.Addresses | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stops: dict[str, Stop] = {}
        self._ended: dict[str, threading.Event] = {}
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

    @property
    def http_url(self) -> str:
        """The first gateway's, as a browser would say it."""
        return self.http_urls[0]

    @property
    def url(self) -> str:
        """The first gateway's."""
        return self.url_of(0)

    def url_of(self, gateway: int) -> str:
        """As WebSocket clients say it."""
        return self.http_urls[gateway].replace("http://", "ws://")

    def config_of(self, client: str) -> Path:
        """Of one of `clients`. The URL in it is none."""
        return self.folder / "keys" / f"{client}_config.json"

    def models(self, engine: int) -> dict[str, dict[str, Any]]:
        """What an engine itself counts, by the models' names (`Residency.slots`)."""
        answer = httpx.get(f"{self.engine_urls[engine]}/debug/slots", trust_env=False).json()
        return {name.removesuffix(":latest"): counts for name, counts in answer["models"].items()}

    def close(self) -> None:
        for process in self._stops:
            self.stop(process, hurry=True)
        self._thread.join(START_S)

    def stop(self, process: str, *, hurry: bool = False) -> None:
        """As SIGTERM does (`hurry`: SIGINT), to "broker", "gateway-0" …, "worker-1" …; `ended` waits for its end."""

        def stop() -> None:
            self._stops[process].hurry = hurry
            self._stops[process].set()

        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(stop)

    def ended(self, process: str) -> bool:
        """Whether the process has ended."""
        return self._ended[process].is_set()

    def call(self, function: Callable[[], Coroutine[Any, Any, T]], timeout_s: float = 10.0) -> T:
        """Run a coroutine on the fabric's loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(timeout_s)

    def busy(self, *engines: str) -> int:
        """Slots these engines (none: all) themselves count as busy, over all models."""
        total = 0
        for url in engines or self.engine_urls:
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

            def start(name: str, main: Callable[[Stop], Coroutine[Any, Any, int]]) -> None:
                self._stops[name], self._ended[name] = Stop(), threading.Event()
                task = group.create_task(main(self._stops[name]))
                task.add_done_callback(lambda _: self._ended[name].set())

            any_port = "tcp://127.0.0.1:*"
            broker_settings = BrokerSettings(gateways=any_port, workers=any_port, **self.broker_settings)
            start("broker", lambda stop: broker.server.run(broker_settings, stop, on_ready=on_bound))
            await bound.wait()
            assert self.addresses is not None
            gateway_settings = GatewaySettings(
                broker=self.addresses.gateways, listen="127.0.0.1:0", data_dir=self.folder, **self.gateway_settings
            )
            for number in range(self.gateways):
                listening = asyncio.Event()

                def on_listening(url: str, number: int = number, listening: asyncio.Event = listening) -> None:
                    self.http_urls[number] = url
                    listening.set()

                start(f"gateway-{number}", partial(gateway.app.run, gateway_settings, on_ready=on_listening))
                await listening.wait()
            for number, (url, engine) in enumerate(zip(self.engine_urls, self.engines, strict=True), 1):
                memory = f",memory={engine.memory_bytes}" if engine.memory_bytes else ""
                worker_settings = WorkerSettings(
                    broker=self.addresses.workers,
                    ollama=(f"{url},slots={engine.slots}{memory}",),
                    name=f"worker-{number}",
                    poll_interval_s=0.2,
                    data_dir=self.folder,
                    **(self.workers[number - 1] if self.workers else {}),
                )
                start(f"worker-{number}", partial(workers.agent.run, worker_settings))
            async with httpx.AsyncClient(trust_env=False) as client:
                for url in self.http_urls:
                    for _ in range(int(START_S / 0.02)):
                        state = (await client.get(f"{url}/readyz")).json()
                        complete = state["ready"] if self.engines else state["reason"] == "no worker is connected"
                        if complete and state["workers"] == len(self.engines):
                            break
                        await asyncio.sleep(0.02)
            self._ready.set()
