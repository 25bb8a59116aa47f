"""A fabric of real processes for the length of a block: engine, broker, gateway and worker.

Every process binds a free loopback port and tells which by the line it logs when it listens. All of them end with the
block, by their process ids, and by themselves should this process be killed.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from cli.keys import ensure_client
from common import process
from common.errors import ProcessError
from gateway.store import Store

START_S: Final = 30.0
STOP_S: Final = 5.0
LOG_LINES_KEPT: Final = 20
ADDRESS: Final = re.compile(r"\b(?:http|ws|tcp)://[\w.:\[\]]+")


class BenchError(ProcessError):
    """The benchmark could not be run, or what it received was wrong."""


@dataclass(slots=True)
class Part:
    """A process: the addresses it says it listens on, its own first, and the last lines of its log."""

    name: str
    child: asyncio.subprocess.Process
    listening: asyncio.Future[list[str]]
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES_KEPT))

    async def read_log(self) -> None:
        """Read stderr to its end; the line that says "listening" tells the addresses."""
        assert self.child.stderr is not None
        while line := (await self.child.stderr.readline()).decode(errors="replace"):
            self.log.append(line)
            if "listening" in line and not self.listening.done():
                self.listening.set_result(ADDRESS.findall(line))
        if not self.listening.done():
            self.listening.set_exception(BenchError(f"the {self.name} ended at its start:\n{''.join(self.log)}"))
            self.listening.exception()  # seen, should nobody wait for it any more


@dataclass(slots=True, frozen=True)
class Usage:
    """CPU seconds used so far and resident bytes of each process, by name; `client` is this one.

    `machine_s` is what all processes of the machine have used: others running beside show in it.
    """

    cpu_s: dict[str, float]
    rss_bytes: dict[str, int]
    machine_s: float


@dataclass(slots=True, frozen=True)
class Fabric:
    """Where to send requests: straight to the engine, or through the gateway with the client config `key`, over HTTP
    with `token`. `processes` are those whose usage counts, by the name it counts under.
    """

    engine_url: str
    gateway_url: str
    key: Path
    token: str
    processes: dict[str, list[psutil.Process]]

    def usage(self) -> Usage:
        """What every process has used so far."""
        cpu_s, rss_bytes = {}, {}
        for name, group in self.processes.items():
            cpu_s[name], rss_bytes[name] = 0.0, 0
            for running in group:
                with contextlib.suppress(psutil.NoSuchProcess), running.oneshot():  # its streams break, which tells
                    times = running.cpu_times()
                    cpu_s[name] += times.user + times.system
                    rss_bytes[name] += running.memory_info().rss
        machine = psutil.cpu_times()
        return Usage(cpu_s, rss_bytes, sum(machine) - machine.idle - getattr(machine, "iowait", 0.0))


@contextlib.asynccontextmanager
async def running(folder: Path, *, tokens_per_s: float, slots: int, engine_port: int = 0) -> AsyncIterator[Fabric]:
    """Start a fabric with one simulated engine of `slots` streams at `tokens_per_s` each (0: unpaced).

    `folder` is its data dir; keys found there are used again. The engine takes a free port unless one is given.

    Raises:
        BenchError: a process did not start.
    """
    async with contextlib.AsyncExitStack() as stack:
        parts: list[Part] = []

        async def start(name: str, *arguments: str) -> Part:
            parts.append(part := await stack.enter_async_context(_part(name, "-m", *arguments)))
            return part

        try:
            async with asyncio.timeout(START_S):
                rate = f"{tokens_per_s:g}"
                listen = f"127.0.0.1:{engine_port}"
                simulated = ("--simulated", "--tokens-per-s", rate, "--slots", str(slots), "--listen", listen)
                engine = await start("engine", "workers.embedded", *simulated)
                any_port = "tcp://127.0.0.1:*"
                broker = await start("broker", "broker", "--gateways", any_port, "--workers", any_port)
                engine_url, *_ = await engine.listening
                for_gateways, for_workers, *_ = await broker.listening
                await start(
                    *("worker", "workers", "--broker", for_workers, "--name", "bench"),
                    *("--ollama", f"{engine_url},slots={slots}"),
                )
                gateway = await start(
                    *("gateway", "gateway", "--broker", for_gateways, "--listen", "127.0.0.1:0"),
                    *("--data-dir", str(folder)),
                )
                gateway_url, *_ = await gateway.listening
                await _ready(gateway_url)
        except TimeoutError:
            logs = "".join(line for part in parts for line in part.log)
            raise BenchError(f"the fabric was not ready within {START_S:g} s:\n{logs}") from None
        processes = {part.name: [psutil.Process(part.child.pid)] for part in parts} | {"client": [psutil.Process()]}
        key = ensure_client(folder, "bench", server_url=gateway_url)
        with contextlib.closing(Store.open(folder)) as store:
            _, token = store.add_token("bench")
        yield Fabric(engine_url, gateway_url, key, token, processes)


@contextlib.asynccontextmanager
async def _part(name: str, *arguments: str) -> AsyncIterator[Part]:
    """A process of ours that ends with the block."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {process.PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C reaches us alone, and we stop the parts
    )
    part = Part(name, child, asyncio.get_running_loop().create_future())
    async with ended(child, part.read_log()):
        yield part


@contextlib.asynccontextmanager
async def ended(child: asyncio.subprocess.Process, reading: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`reading` its output runs beside the block; then the leader of a session is ended, and after STOP_S the hard way,
    with whatever of its session is left.
    """
    reader = asyncio.create_task(reading)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await child.wait()
                await asyncio.shield(reader)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
            await reader


async def _ready(gateway_url: str) -> None:
    """Wait until the gateway says that a model can be served."""
    async with httpx.AsyncClient(base_url=gateway_url.replace("ws://", "http://"), trust_env=False) as client:
        while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.05)
