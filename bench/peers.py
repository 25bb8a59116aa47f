"""Other proxies in front of the same engine: installed outside the repository, started for the length of a block.

    nginx         what a proxy costs that knows nothing of models; from the PATH, or out of Debian's package
    ollama-herd   a router for many Ollama hosts
    LiteLLM       a gateway for many providers, which speaks OpenAI's API and asks Ollama's for it

The two from PyPI have a virtual environment each in the user's cache folder. Nothing here is installed into the system
or the product, and no service is started: nginx's package is unpacked only. A peer that can't be had says why.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import httpx
import msgspec
import platformdirs
import psutil

from bench.clients import MODEL, OLLAMA, OPENAI, Api
from bench.fabric import LOG_LINES_KEPT, BenchError, ended

INSTALL_S: Final = 600.0
START_S: Final = 60.0
LOOK_S: Final = 0.1
SETTLE_S: Final = 3.0
IDLE: Final = 0.15
"""The part of a core up to which a peer counts as idle: two ticks of the clock in LOOK_S are more."""
QUESTION_S: Final = 2.0
TIED: Final = ("setpriv", "--pdeathsig", "TERM")
"""Where it is there: ends a peer when this process is killed."""


@dataclass(slots=True, frozen=True)
class Running:
    """A peer that answers: where, to which key, and the processes it consists of."""

    url: str
    token: str
    processes: list[psutil.Process]

    async def settled(self) -> None:
        """Wait until it has done what it does after its answers, SETTLE_S at most: the next turn is another's."""

        async def used_s() -> float:
            await asyncio.sleep(LOOK_S)
            return sum(sum(process.cpu_times()[:2]) for process in self.processes)

        with contextlib.suppress(TimeoutError, psutil.NoSuchProcess):
            async with asyncio.timeout(SETTLE_S):
                before_s = await used_s()
                while (now_s := await used_s()) - before_s > IDLE * LOOK_S:
                    before_s = now_s


class Peer(ABC):
    """A proxy. `install` it once, then `running` it in front of an engine."""

    name: ClassVar[str]
    api: ClassVar[Api] = OLLAMA
    ready: ClassVar[str]
    """What answers GET with 200 when it is up."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache or Path(platformdirs.user_cache_dir("weftline")) / "bench"

    @abstractmethod
    def installed(self) -> bool:
        """Whether it can be started."""

    @abstractmethod
    async def install(self) -> None:
        """Get it.

        Raises:
            BenchError: it can't be had.
        """

    @abstractmethod
    async def version(self) -> str:
        """Of what is installed."""

    @abstractmethod
    def command(self, folder: Path, engine_url: str, port: int, token: str) -> tuple[Sequence[str], Mapping[str, str]]:
        """How it is started to listen on that loopback port, with its files in `folder`; and its environment."""

    async def joined(self, client: httpx.AsyncClient, engine_url: str) -> bool:
        """Whether it is up, and knows the engine; most do from their configuration."""
        try:
            return (await client.get(self.ready)).status_code == 200
        except httpx.TransportError:
            return False

    @contextlib.asynccontextmanager
    async def running(self, folder: Path, engine_url: str) -> AsyncIterator[Running]:
        """Start it, with nothing of the user's: `folder` is its home.

        Raises:
            BenchError: it ended, or was not ready within START_S.
        """
        url = f"http://127.0.0.1:{(port := free_port())}"
        token = f"sk-{secrets.token_hex(32)}"
        await asyncio.to_thread(folder.mkdir)
        command, environment = self.command(folder, engine_url, port, token)
        tied = TIED if shutil.which(TIED[0]) else ()
        log: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        child = await asyncio.create_subprocess_exec(
            *tied,
            *command,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        async with ended(child, _read(child, log)):
            try:
                async with (
                    asyncio.timeout(START_S),
                    httpx.AsyncClient(base_url=url, timeout=QUESTION_S, trust_env=False) as client,
                ):
                    while not await self.joined(client, engine_url):
                        if child.returncode is not None:
                            raise BenchError(f"{self.name} ended at its start:\n{''.join(log)}")
                        await asyncio.sleep(LOOK_S)
            except TimeoutError:
                raise BenchError(f"{self.name} was not ready within {START_S:g} s:\n{''.join(log)}") from None
            main = psutil.Process(child.pid)
            yield Running(url, token, [main, *main.children(recursive=True)])


class Nginx(Peer):
    """As Debian has it; one hop of plain proxying, unbuffered, on kept connections."""

    name = "nginx"
    ready = "/up"

    def installed(self) -> bool:
        return bool(self._found)

    @property
    def _found(self) -> str:
        places = (os.environ["PATH"], "/usr/sbin", str(self._cache / "nginx/usr/sbin"))
        return shutil.which("nginx", path=os.pathsep.join(places)) or ""

    async def install(self) -> None:
        if not shutil.which("apt-get"):
            raise BenchError("nginx is not on the PATH, and there is no apt-get to have it from")
        folder = _fresh(self._cache / "nginx")
        try:
            await _do("apt-get", "download", "--quiet", "nginx", cwd=folder)
        except BenchError:
            if os.geteuid() != 0:
                raise
            await _do("apt-get", "update", "--quiet", cwd=folder)  # a fresh machine has no lists
            await _do("apt-get", "download", "--quiet", "nginx", cwd=folder)
        (package,) = folder.glob("nginx_*.deb")
        await _do("dpkg-deb", "--extract", str(package), str(folder), cwd=folder)
        package.unlink()

    async def version(self) -> str:
        said = await _do(self._found, "-v")  # "nginx version: nginx/1.22.1"
        return said.rpartition("/")[2]

    def command(self, folder: Path, engine_url: str, port: int, token: str) -> tuple[Sequence[str], Mapping[str, str]]:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"  {kind}_temp_path {folder}/{kind};\n" for kind in kinds)
        config = folder / "nginx.conf"
        config.write_text(
            f"""daemon off;
worker_processes auto;
pid {folder}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
  access_log off;
{temporary}  upstream engine {{
    server {engine_url.removeprefix("http://")};
    keepalive 64;
    keepalive_requests 1000000;
  }}
  server {{
    listen 127.0.0.1:{port};
    keepalive_requests 1000000;
    location = /up {{ return 200; }}
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""
        )
        return (self._found, "-p", str(folder), "-c", str(config), "-e", "stderr"), {}


class _FromPyPI(Peer):
    """A program in a virtual environment of its own; the folder's name tells the version."""

    requirement: ClassVar[str]
    program: ClassVar[str]

    @property
    def _folder(self) -> Path:
        return self._cache / self.requirement

    @property
    def _done(self) -> Path:
        return self._folder / "installed"

    def installed(self) -> bool:
        return self._done.exists()

    async def install(self) -> None:
        folder = _fresh(self._folder)
        await _do(sys.executable, "-m", "venv", str(folder), cwd=folder)
        pip = (str(folder / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet")
        await _do(*pip, "install", self.requirement, cwd=folder)
        self._done.touch()

    async def version(self) -> str:
        return self.requirement.rpartition("==")[2]


class OllamaHerd(_FromPyPI):
    """Its node agent, which watches a host and reports it, is left out: the one report it needs is sent from here.

    It says of itself where it is by mDNS, here under a name that no herd listens to, and sends no telemetry.
    """

    name = "ollama-herd"
    requirement = "ollama-herd==0.11.4"
    program = "herd"
    ready = "/fleet/status"

    def command(self, folder: Path, engine_url: str, port: int, token: str) -> tuple[Sequence[str], Mapping[str, str]]:
        environment = {
            "FLEET_NODE_TELEMETRY": "false",
            "FLEET_TELEMETRY": "false",
            "FLEET_MDNS_SERVICE_TYPE": "_weft-bench._tcp.local.",
            "FLEET_DISABLE_MODEL_PRELOADER": "true",
            # One report has to do for all the time.
            "FLEET_HEARTBEAT_TIMEOUT": "86400",
            "FLEET_HEARTBEAT_OFFLINE": "86400",
        }
        program = str(self._folder / "bin" / self.program)
        return (program, "--host", "127.0.0.1", "--port", str(port), "--log-level", "WARNING"), environment

    async def joined(self, client: httpx.AsyncClient, engine_url: str) -> bool:
        if not await super().joined(client, engine_url):
            return False
        # Memory and parallelism as large as it takes for all the requests that it runs at once: 8.
        name = f"{MODEL}:latest"
        report: dict[str, Any] = {
            "node_id": "bench",
            "cpu": {"cores_physical": 8, "utilization_pct": 0},
            "memory": {"total_gb": 64, "used_gb": 8, "available_gb": 56},
            "ollama": {
                "models_available": [name],
                "models_loaded": [{"name": name, "size_gb": 1}],
                "num_parallel": 64,
            },
            "ollama_host": engine_url,
        }
        answer = await client.post("/heartbeat", json=report)
        if answer.status_code != 200:
            raise BenchError(f"it does not take the report of its node: {answer.text}")
        return True


class LiteLLM(_FromPyPI):
    """One worker process, its default; no database."""

    name = "LiteLLM"
    api = OPENAI
    requirement = "litellm[proxy]==1.106.0"
    program = "litellm"
    ready = "/health/liveliness"

    def command(self, folder: Path, engine_url: str, port: int, token: str) -> tuple[Sequence[str], Mapping[str, str]]:
        config = folder / "config.yaml"  # JSON is YAML
        parameters = {"model": f"ollama_chat/{MODEL}", "api_base": engine_url}
        settings = {
            "model_list": [{"model_name": MODEL, "litellm_params": parameters}],
            "general_settings": {"master_key": token},
            "litellm_settings": {"telemetry": False, "num_retries": 0},
        }
        config.write_bytes(msgspec.json.encode(settings))
        program = str(self._folder / "bin" / self.program)
        where = ("--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False")
        return (program, *where), {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


PEERS: Final[tuple[type[Peer], ...]] = (Nginx, OllamaHerd, LiteLLM)


async def ensure(peer: Peer, *, install: bool) -> None:
    """See to it that the peer is installed.

    Raises:
        BenchError: it is not, and it was not to be installed or can't be.
    """
    if peer.installed():
        return
    if not install:
        raise BenchError("it is not installed yet; a run without --quick does that")
    print(f"installing {peer.name}", file=sys.stderr, flush=True)
    await peer.install()
    if not peer.installed():
        raise BenchError("its package does not have what it should")


def _fresh(folder: Path) -> Path:
    """An empty folder; what a broken installation left is removed."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise BenchError(f"cannot write {error.filename}: {error.strerror}") from None
    return folder


async def _do(*command: str, cwd: Path | None = None) -> str:
    """Run a command to its end; its last line, which is the reason if it fails."""
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise BenchError(f"{command[0]}: {error.strerror}") from None
    log: deque[str] = deque(maxlen=1)
    try:
        async with asyncio.timeout(INSTALL_S), ended(child, _read(child, log)):
            await child.wait()
    except TimeoutError:
        raise BenchError(f"`{' '.join(command)}` took more than {INSTALL_S:g} s") from None
    if child.returncode:
        raise BenchError(f"`{' '.join(command)}` failed: {''.join(log).strip()}")
    return "".join(log).strip()


async def _read(child: asyncio.subprocess.Process, log: deque[str]) -> None:
    assert child.stdout is not None
    while line := (await child.stdout.readline()).decode(errors="replace"):
        log.append(line)


def free_port() -> int:
    """One that nobody has now; these programs can't tell which they took."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
