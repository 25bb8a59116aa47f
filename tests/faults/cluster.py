"""A whole fabric of real processes with lines that can be made bad, for tests that break it.

    client ─> proxy `front[i]` ─> gateway-i ─> proxy `up[i]` ─> broker <─ proxy `lines[i]` <─ worker-i ─> engine-i

Ports are chosen once, so that a part that was killed comes back where it was. Everything a part says goes to
FOLDER/<part>.log, every history to FOLDER/history. Parts are ended by their pids, with the block.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from cli.keys import create_client
from common.history import VARIABLE, History
from gateway.store import Store
from tests.faults.checker import Report, check
from tests.faults.client import WireClient
from tests.faults.proxy import Proxy
from tests.processes import ROOT

START_S: Final = 40.0
STOP_S: Final = 10.0
POLL_S: Final = 0.02
CLIENT: Final = "app"


class Part:
    """`python -m MODULE ARGUMENTS`, which can be killed and started again in its place."""

    def __init__(
        self,
        name: str,
        folder: Path,
        module: str,
        *arguments: str,
        settings: dict[str, str],
        prefix: Sequence[str] = (),
        port: int = 0,
    ) -> None:
        self.name = name
        self.port = port
        """Where it listens; 0 if it doesn't."""
        self.starts = 0
        self.stopped = False
        self._settings = settings
        self.arguments = arguments
        self._argv = [*prefix, sys.executable, "-m", module, *arguments]
        self._folder = folder
        self._child: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def log(self) -> Path:
        return self._folder / f"{self.name}.log"

    @property
    def lives(self) -> bool:
        return self._child is not None and self._child.returncode is None

    async def start(self) -> None:
        assert not self.lives, f"{self.name} runs already"
        environment = (
            os.environ
            | self._settings
            | {
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")]),
                # What a part keeps for itself, it keeps here.
                "XDG_DATA_HOME": str(self._folder / self.name),
                "XDG_STATE_HOME": str(self._folder / self.name),
                VARIABLE: str(self._folder / "history" / self.name),
            }
        )
        with self.log.open("ab") as log:
            self._child = await asyncio.create_subprocess_exec(
                *self._argv, cwd=ROOT, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.starts += 1
        self.stopped = False

    def signal(self, number: int) -> None:
        """Send a signal; SIGSTOP is remembered, for a stopped part cannot end by itself."""
        assert self._child is not None
        self._child.send_signal(number)
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self.stopped = number == signal.SIGSTOP

    async def kill(self) -> None:
        """kill -9, and wait till it is gone."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def ended(self, timeout_s: float = STOP_S) -> int:
        """Wait for its end; its exit status. Raises TimeoutError."""
        assert self._child is not None
        return await asyncio.wait_for(self._child.wait(), timeout_s)

    async def close(self) -> None:
        if not self.lives:
            return
        if self.stopped:
            self.signal(signal.SIGCONT)
        # In a hurry: SIGTERM would wait for what clients may still come back for.
        self.signal(signal.SIGINT)
        try:
            await self.ended()
        except TimeoutError:
            await self.kill()

    def usage(self) -> tuple[int, int]:
        """Resident bytes and open descriptors."""
        process = psutil.Process(self.pid)
        return process.memory_info().rss, process.num_fds()


@dataclass
class Cluster:
    """`async with Cluster(folder).running() as cluster`: `workers` workers with an engine each, `gateways` gateways.

    `settings` are environment variables of all parts. `worker_prefix` starts workers and engines elsewhere, in a
    network namespace, whence the broker is at `broker_host`, without a proxy.
    """

    folder: Path
    workers: int = 1
    gateways: int = 1
    tokens_per_s: float = 100.0
    slots: int = 4
    first_token_s: float = 0.0
    settings: dict[str, str] = field(default_factory=dict)
    worker_prefix: tuple[str, ...] = ()
    broker_host: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    lines: list[Proxy] = field(default_factory=list)
    """Worker to broker."""
    up: list[Proxy] = field(default_factory=list)
    """Gateway to broker."""
    front: list[Proxy] = field(default_factory=list)
    """Client to gateway."""
    engine_ports: list[int] = field(default_factory=list)

    @property
    def broker(self) -> Part:
        return self.parts["broker"]

    def worker(self, number: int) -> Part:
        return self.parts[f"worker-{number}"]

    def engine(self, number: int) -> Part:
        return self.parts[f"engine-{number}"]

    def gateway(self, number: int) -> Part:
        return self.parts[f"gateway-{number}"]

    @property
    def urls(self) -> list[str]:
        """Of the gateways, each through its proxy."""
        return [f"ws://127.0.0.1:{proxy.port}" for proxy in self.front]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Cluster"]:
        """Start everything and wait till all have found each other; end everything with the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Store.open(self.folder / "data")) as store:
            self.config = create_client(store, CLIENT, self.folder / "keys").config
        self.record = History(self.folder / "history" / "harness")
        async with httpx.AsyncClient(trust_env=False, timeout=5) as self.http:
            try:
                await self._start()
                yield self
            finally:
                await self._stop()
                self.record.close()

    async def _start(self) -> None:
        ports = free_ports(2 + 2 * self.workers + self.gateways)
        for_gateways, for_workers = ports.pop(), ports.pop()
        host = self.broker_host or "127.0.0.1"
        self.add(
            *("broker", "broker", "--gateways", f"tcp://127.0.0.1:{for_gateways}"),
            *("--workers", f"tcp://{host}:{for_workers}", *(["--insecure"] if self.broker_host else [])),
            port=for_gateways,
        )
        for number in range(1, self.gateways + 1):
            port = ports.pop()
            self.up.append(await self._proxy(for_gateways))
            self.front.append(await self._proxy(port))
            self.add(
                *(f"gateway-{number}", "gateway", "--broker", f"tcp://127.0.0.1:{self.up[-1].port}"),
                *("--listen", f"127.0.0.1:{port}", "--data-dir", str(self.folder / "data")),
                *("--public-url", f"ws://127.0.0.1:{self.front[-1].port}"),
                port=port,
            )
        for number in range(1, self.workers + 1):
            port = ports.pop()
            self.engine_ports.append(port)
            if self.broker_host:
                address = f"tcp://{host}:{for_workers}"
            else:
                self.lines.append(await self._proxy(for_workers))
                address = f"tcp://127.0.0.1:{self.lines[-1].port}"
            self.add(
                *(f"engine-{number}", "workers.embedded", "--simulated", "--listen", f"127.0.0.1:{port}"),
                *("--tokens-per-s", str(self.tokens_per_s), "--slots", str(self.slots)),
                *("--first-token-s", str(self.first_token_s)),
                prefix=self.worker_prefix,
                port=port,
            )
            self.add(
                *(f"worker-{number}", "workers", "--broker", address, "--name", f"worker-{number}"),
                *("--ollama", f"http://127.0.0.1:{port},slots={self.slots}"),
                prefix=self.worker_prefix,
            )
        engines = [part for name, part in self.parts.items() if name.startswith("engine")]
        others = [part for part in self.parts.values() if part not in engines]
        for part in engines:
            await part.start()
        if not self.worker_prefix:
            for part in engines:
                await self.listening(part)
        for part in others:
            await part.start()
        await self.ready()

    def add(self, name: str, module: str, *arguments: str, prefix: Sequence[str] = (), port: int = 0) -> None:
        """One more part, not started yet; histories are read by what names begin with: worker, gateway."""
        self.parts[name] = Part(name, self.folder, module, *arguments, settings=self.settings, prefix=prefix, port=port)

    async def _proxy(self, target: int) -> Proxy:
        proxy = Proxy(target)
        await proxy.open()
        return proxy

    async def _stop(self) -> None:
        # Clients first, the engines last: as an operator would.
        proxies = [*self.front, *self.lines, *self.up]
        for proxy in proxies:
            proxy.heal()
        await asyncio.gather(*(part.close() for part in self.parts.values()))
        for proxy in proxies:
            await proxy.close()

    def client(self, *, gateways: Sequence[int] = (), **options: Any) -> WireClient:
        """A client of these gateways (numbered from 1), all of them unless told."""
        urls = [self.urls[number - 1] for number in gateways] or self.urls
        return WireClient(urls, self.config, self.record, **options)

    # Breaking and healing ---------------------------------------------------------------------------------------------

    def fault(self, kind: str, part: str, **facts: Any) -> None:
        """Write down what is broken now."""
        self.record("fault", kind=kind, part=part, **facts)

    async def kill(self, name: str) -> None:
        """kill -9 a part."""
        self.fault("kill", name)
        await self.parts[name].kill()

    def freeze(self, name: str) -> None:
        self.fault("stop", name)
        self.parts[name].signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.parts[name].signal(signal.SIGCONT)

    async def inject(self, engine: int, kind: str, **facts: Any) -> None:
        """Let an engine's next requests go wrong, see `workers.embedded.simulated.Fault`."""
        self.fault(kind, f"engine-{engine}")
        answer = await self.http.post(self._engine_url(engine, "/debug/faults"), json={"kind": kind, **facts})
        answer.raise_for_status()

    async def heal(self) -> None:
        """Bring everything back and wait till all have found each other."""
        for proxy in [*self.front, *self.lines, *self.up]:
            proxy.heal()
            await proxy.accept()
        for part in self.parts.values():
            if not part.lives:
                await part.start()
            elif part.stopped:
                part.signal(signal.SIGCONT)
        await self.ready()

    # Looking at it ----------------------------------------------------------------------------------------------------

    async def listening(self, part: Part) -> None:
        await until(lambda: _listens(part.port), f"{part.name} listens", START_S)

    async def ready(self, timeout_s: float = START_S) -> None:
        """Wait till every gateway sees every worker with all its models."""
        for number in range(1, self.gateways + 1):
            await self.sees(number, self.workers, timeout_s)

    async def sees(self, gateway: int, workers: int, timeout_s: float = START_S) -> None:
        """Wait till a gateway sees so many workers, and can serve if there are any."""

        async def state() -> bool:
            try:
                answer = (await self.http.get(f"http://127.0.0.1:{self.gateway(gateway).port}/readyz")).json()
            except httpx.HTTPError:
                return False
            return answer.get("workers", 0) == workers and bool(answer["ready"]) == bool(workers)

        await until(state, f"gateway-{gateway} sees {workers} workers", timeout_s)

    async def busy(self, engine: int) -> int:
        """Slots that an engine itself counts as busy; 0 if it does not live."""
        try:
            models = (await self.http.get(self._engine_url(engine, "/debug/slots"))).json()["models"]
        except httpx.TransportError:
            return 0
        return sum(slots["busy"] + slots["waiting"] for slots in models.values())

    async def working(self, engine: int, slots: int) -> None:
        """Wait till an engine works on so many requests."""
        await until(lambda: self._works(engine, slots), f"engine-{engine} works on {slots}", STOP_S)

    async def idle(self, timeout_s: float = STOP_S) -> None:
        """I4: wait till no engine works."""
        for number in range(1, self.workers + 1):
            await until(partial(self._works, number, 0), f"engine-{number} is idle", timeout_s)

    async def _works(self, engine: int, slots: int) -> bool:
        return await self.busy(engine) == slots

    def usage(self) -> dict[str, tuple[int, int]]:
        """Resident bytes and descriptors of every part that lives."""
        return {name: part.usage() for name, part in self.parts.items() if part.lives}

    def check(self) -> Report:
        """What the histories say, so far."""
        return check(self.folder / "history")

    def _engine_url(self, engine: int, path: str) -> str:
        return f"http://127.0.0.1:{self.engine_ports[engine - 1]}{path}"


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = STOP_S) -> float:
    """Wait for what no event tells a test; how long it took, in s. Raises AssertionError."""
    began = time.monotonic()
    while True:
        met = condition()
        if not isinstance(met, bool):
            met = await met
        took = time.monotonic() - began
        if met:
            return took
        assert took < timeout_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, below those the system gives out by itself, so that none is taken meanwhile."""
    found: list[int] = []
    port = 20_000 + os.getpid() * 37 % 10_000
    while len(found) < count:
        port += 1
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
