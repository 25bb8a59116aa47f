"""`weftline doctor`: looks at every part, from this machine outwards, and says in words what is wrong and what to do.

It changes nothing: what does not exist is not made. It generates, though: once through the whole fabric, and a few
tokens on each engine it probes.

What an engine serves at a time is measured, not asked (Ollama tells nobody): several streams start together, and one
whose first token comes while another is in its first half runs beside it. On an engine that serves one at a time, the
first token of the next comes after the last of the one before.
"""

import asyncio
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import httpx
import typer
from weftline_client import AsyncClient, InvalidRequestError, WeftlineError

from cli.chat import client_arguments, default_model, key_told, told
from cli.fleet import age, ask, print_json, run
from cli.keys import DEFAULT_URL
from cli.settings import BrokerOption, ClientSettings, KeyOption, ModelOption, UrlOption
from common import logs
from common.command import ConfigOption, DataDirOption, JsonOption
from common.config import is_loopback
from common.errors import ProcessError
from common.protocol import HEARTBEAT_INTERVAL_S, Engine, Query, Snapshot, full_name
from gateway.store import FILE_NAME, Store, StoreError
from workers.settings import EngineAddress, engine_addresses

ANSWER_S: Final = 5.0
GENERATION_S: Final = 300.0
"""A generation, with the load of its model before it."""
STREAMS: Final = 4
TOKENS: Final = 24
TOKENS_MIN: Final = 4
STREAM_S_MIN: Final = 0.02
"""A shorter stream, in tokens or in time, says nothing about who ran beside whom."""


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What was found about one part; `remedy` says what to do about it."""

    part: str
    status: Status
    finding: str
    remedy: str = ""


def doctor(
    broker: BrokerOption = None,
    url: UrlOption = None,
    key: KeyOption = None,
    model: ModelOption = None,
    ollama: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="An engine to probe; repeatable. [local ones]")
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """Check every part, and say what is wrong and what to do."""
    flags = {"broker": broker, "url": url, "key": key, "model": model, "ollama": ollama, "data_dir": data_dir}
    settings = ClientSettings.load(flags, config=config)
    logs.setup(level="error")
    engine_addresses(settings.ollama)  # a wrong one is said before anything else
    checks = run(_examine(settings, silent=as_json))
    if as_json:
        print_json([asdict(check) for check in checks])
    failed = sum(check.status is Status.FAIL for check in checks)
    warned = sum(check.status is Status.WARN for check in checks)
    if not as_json:
        print(f"\n{failed} failed, {warned} to look at, {len(checks) - failed - warned} fine.")
    return 1 if failed else 0


async def _examine(settings: ClientSettings, *, silent: bool) -> list[Check]:
    checks = []
    async with aclosing(examine(settings)) as findings:
        async for check in findings:
            checks.append(check)
            if not silent:
                _print(check)
    return checks


async def examine(settings: ClientSettings) -> AsyncGenerator[Check, None]:
    """All checks, each as soon as it is done."""
    yield Check("python", Status.OK, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield libraries()
    for check in data_dir_checks(settings):
        yield check
    fleet = None
    try:
        fleet = await ask(settings.broker, Query(id=1, what="hosts"))
    except ProcessError as error:
        yield _failed("broker", error)
    if fleet is not None:
        for check in fleet_checks(fleet, settings.broker):
            yield check
    async for check in gateway_checks(settings):
        yield check
    async for check in engine_checks(settings, fleet):
        yield check


# This machine ---------------------------------------------------------------------------------------------------------


def libraries() -> Check:
    """Whether what weftline declares to need is installed."""
    try:
        requirements = metadata.requires("weftline") or []
    except metadata.PackageNotFoundError:
        remedy = "Install it: `make up` in its folder, or `pip install -e clients/python -e .`"
        return Check("libraries", Status.WARN, "weftline is not installed; it runs from its sources.", remedy)
    problems = []
    for requirement in requirements:
        found = re.match(r"([\w.-]+)(?:>=([\d.]+))?", requirement)
        assert found is not None
        name, least = found.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if ";" not in requirement:  # else it may be for another platform
                problems.append(f"{name} is missing")
            continue
        if least and _numbers(version) < _numbers(least):
            problems.append(f"{name} {version} is older than {least}")
    if problems:
        remedy = "Install what is locked: pip install -r deploy/lock/run.lock"
        return Check("libraries", Status.FAIL, f"{', '.join(problems)}.", remedy)
    return Check("libraries", Status.OK, f"all {len(requirements)} are there and recent enough")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def data_dir_checks(settings: ClientSettings) -> Iterator[Check]:
    """The data dir of this machine, and the clients registered in it."""
    path = settings.data
    if not path.exists():
        remedy = (
            "Nothing to do if the gateway runs elsewhere. Else `weftline up` or `weftline keys create NAME` makes it, "
            "or name the right one with --data-dir."
        )
        yield Check("data dir", Status.WARN, f"{path} does not exist", remedy)
        return
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        remedy = "Make the folder writable for this user, or name another with --data-dir."
        yield Check("data dir", Status.FAIL, f"cannot write to {path}: {error.strerror}", remedy)
        return
    yield Check("data dir", Status.OK, f"{path} can be written")
    if not (path / FILE_NAME).exists():
        remedy = "If the gateway runs on this data dir, `weftline keys create NAME` makes its first client."
        yield Check("clients", Status.WARN, f"no client is registered in {path}", remedy)
        return
    try:
        with closing(Store.open(path)) as store:
            clients = store.list()
    except StoreError as error:
        yield _failed("clients", error)
        return
    active = sum(not client.revoked for client in clients)
    finding = f"{active} can connect, {len(clients) - active} revoked"
    remedy = "" if active else "Make one with `weftline keys create NAME`."
    yield Check("clients", Status.OK if active else Status.WARN, finding, remedy)


# Broker and hosts -----------------------------------------------------------------------------------------------------


def fleet_checks(fleet: Snapshot, broker: str) -> Iterator[Check]:
    """What the broker tells of its hosts."""
    yield Check("broker", Status.OK, f"{broker} answers: {fleet.running} running, {fleet.queued} waiting")
    if fleet.queued and not fleet.running:
        remedy = "See which model they want with `weftline ps`, and whether a host has it with `weftline hosts`."
        yield Check("queue", Status.WARN, f"{fleet.queued} requests wait and none runs", remedy)
    if not fleet.hosts:
        remedy = (
            "On each GPU host run `weftline worker --broker ADDRESS`, with the address of the broker's worker port."
        )
        yield Check("hosts", Status.FAIL, "no host is connected to the broker", remedy)
    for host in fleet.hosts:
        if host.beat_age_ms > 1500 * HEARTBEAT_INTERVAL_S:
            remedy = "See whether the host is overloaded or its network drops packets."
            yield Check("host", Status.WARN, f"{host.name} was last heard {age(host.beat_age_ms)} ago", remedy)
        elif host.draining:
            yield Check("host", Status.WARN, f"{host.name} is draining: it takes no new requests")
        else:
            yield Check("host", Status.OK, f"{host.name} is connected, last heard {age(host.beat_age_ms)} ago")
        for engine in host.engines:
            yield _engine_state(host.name, engine)
    yield from _digest_checks(fleet)


def _engine_state(host: str, engine: Engine) -> Check:
    where = f"{engine.kind} {engine.version}".strip() + f" at {engine.url} on {host}"
    if not engine.up:
        finding = f"on {host} {engine.error or f'the engine {engine.url} is down'}"
        return Check("engines", Status.FAIL, finding, f"Start it on {host}: `ollama serve`, or `weftline engine`.")
    if not engine.models:
        return Check("engines", Status.WARN, f"{where} has no models", f"On {host} run `ollama pull llama3.2`.")
    loaded = sum(model.resident for model in engine.models)
    return Check("engines", Status.OK, f"{where} is up; models: {len(engine.models)}, in memory: {loaded}")


def _digest_checks(fleet: Snapshot) -> Iterator[Check]:
    digests: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for host in fleet.hosts:
        for engine in host.engines:
            for model in engine.models if engine.up else ():
                digests[model.name][model.digest].append(host.name)
    for name, versions in sorted(digests.items()):
        if len(versions) > 1:
            listed = "; ".join(f"{digest[:12]} on {', '.join(names)}" for digest, names in sorted(versions.items()))
            remedy = f"Answers depend on the host. Run `ollama pull {name}` on all of them."
            yield Check("models", Status.WARN, f"{name} is not the same everywhere: {listed}", remedy)
    if digests and all(len(versions) == 1 for versions in digests.values()):
        yield Check("models", Status.OK, f"{len(digests)} can be asked; each is the same wherever it is")


# Gateway --------------------------------------------------------------------------------------------------------------


async def gateway_checks(settings: ClientSettings) -> AsyncIterator[Check]:
    """The gateway from outside, then as a client."""
    no_key = None
    arguments: dict[str, Any] = {}
    try:
        arguments = client_arguments(settings)
    except ProcessError as error:
        no_key = error
    url = settings.url or arguments.get("server_url", DEFAULT_URL)
    answers, check = await _ready(url)
    yield check
    if no_key is not None:
        yield _failed("login", no_key)
    elif answers:
        for check in await _as_client(settings, arguments):
            yield check


async def _ready(url: str) -> tuple[bool, Check]:
    """Whether a gateway answers, and how it is."""
    parts = urlsplit(url)
    base = f"{ {'ws': 'http', 'wss': 'https'}.get(parts.scheme, parts.scheme) }://{parts.netloc}"
    start_it = "Start it with `weftline up` or `weftline gateway`, or name another with --url."
    try:
        async with httpx.AsyncClient(base_url=base, timeout=ANSWER_S) as client:
            alive = await client.get("/livez")
            state = (await client.get("/readyz")).json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return False, Check(
            "gateway", Status.FAIL, f"nothing answers at {url}: {error or type(error).__name__}", start_it
        )
    except ValueError:
        state = None
    if not isinstance(state, dict) or "ready" not in state:
        finding = f"what answers at {url} is not a gateway (status {alive.status_code} for /livez)"
        return False, Check("gateway", Status.FAIL, finding, start_it)
    if not state["ready"]:
        remedy = "See what is said of the broker and the hosts above, and the gateway's --broker and its log."
        return True, Check("gateway", Status.FAIL, f"{url} answers but is not ready: {state.get('reason')}", remedy)
    finding = f"{url} is ready; hosts: {state['workers']}, models: {len(state['models'])}"
    return True, Check("gateway", Status.OK, finding)


async def _as_client(settings: ClientSettings, arguments: dict[str, Any]) -> list[Check]:
    checks = []
    part = "login"
    try:
        with key_told(settings.key_file):
            client = AsyncClient(**arguments, reconnect=None, connect_timeout_s=ANSWER_S)
        async with client:
            checks.append(Check(part, Status.OK, f"the gateway knows {client.client_id!r} and its key"))
            part = "generation"
            async with asyncio.timeout(GENERATION_S):
                checks.append(await _generation(client, settings.model))
    except WeftlineError as error:
        checks.append(_failed(part, told(error)))
    except ProcessError as error:
        checks.append(_failed(part, error))
    except TimeoutError:
        remedy = "See whether its model still loads (`weftline hosts`), and the logs of the worker and its engine."
        checks.append(Check(part, Status.FAIL, f"no answer in {GENERATION_S:.0f} s", remedy))
    return checks


async def _generation(client: AsyncClient, model: str) -> Check:
    model = model or default_model(await client.models())
    start = time.perf_counter()
    first = ""
    stream = client.generate("Say hello.", model, stream=True, options={"num_predict": 8})
    try:
        async for _ in stream:
            first = first or _ms(start)
    except InvalidRequestError:  # it does not generate
        start = time.perf_counter()
        await client.embed("hello", model)
        return Check("generation", Status.OK, f"{model} embedded a word in {_ms(start)} through the whole fabric")
    result = stream.result
    if not first:
        remedy = "See the engine's own log; try the model there."
        return Check("generation", Status.WARN, f"{model} on {result.host} ended without a token", remedy)
    load_ms = result.timings.load_ms or 0
    loading = f", of which loading took {load_ms / 1000:.1f} s" if load_ms >= 1000 else ""
    finding = f"{model} on {result.host}, through the whole fabric: first token after {first}{loading}"
    return Check("generation", Status.OK, finding)


def _ms(start: float) -> str:
    return f"{(time.perf_counter() - start) * 1000:.0f} ms"


# Engines, probed directly ---------------------------------------------------------------------------------------------


async def engine_checks(settings: ClientSettings, fleet: Snapshot | None) -> AsyncIterator[Check]:
    """What the engines that this machine reaches really do in parallel."""
    elsewhere = []
    for address, told_slots in _to_probe(settings, fleet):
        try:
            yield await probe(address.url, told_slots)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            if not settings.ollama and fleet is not None and _reported(fleet, address.url):
                elsewhere.append(address.url)
                continue
            if not settings.ollama and not os.environ.get("OLLAMA_HOST") and shutil.which("ollama") is None:
                yield Check("engine", Status.OK, f"none on this machine: nothing answers at {address.url}")
                continue
            remedy = "Start it: `ollama serve`, or `weftline engine`. Name another with --ollama URL."
            finding = f"no engine answers at {address.url}: {error or type(error).__name__}"
            yield Check("engine", Status.FAIL, finding, remedy)
    if elsewhere:
        remedy = "They listen to their own machine only: run `weftline doctor --ollama URL` there to probe them."
        finding = f"{len(elsewhere)} could not be reached from here: {', '.join(elsewhere)}"
        yield Check("parallel", Status.WARN, finding, remedy)


def _to_probe(settings: ClientSettings, fleet: Snapshot | None) -> list[tuple[EngineAddress, dict[str, int]]]:
    """The engines to probe, and the slots per model that their worker was told, as far as the broker knows."""
    if settings.ollama:
        addresses = list(engine_addresses(settings.ollama))
    else:
        urls = [
            engine.url
            for host in (fleet.hosts if fleet else ())
            for engine in host.engines
            if engine.up and is_loopback(urlsplit(engine.url).netloc)
        ]
        if os.environ.get("OLLAMA_HOST") or not urls:
            urls += [address.url for address in engine_addresses(())]
        addresses = [EngineAddress(url) for url in dict.fromkeys(urls)]
    return [(address, _told_slots(fleet, address.url)) for address in addresses]


def _reported(fleet: Snapshot, url: str) -> list[Engine]:
    """The engines of that URL; one on loopback is rather the one whose host is named like this machine."""
    found = [(host.name, engine) for host in fleet.hosts for engine in host.engines if engine.url == url]
    here = [engine for name, engine in found if name.startswith(socket.gethostname())]
    return here or [engine for _, engine in found]


def _told_slots(fleet: Snapshot | None, url: str) -> dict[str, int]:
    engines = _reported(fleet, url) if fleet is not None else []
    return {model.name: model.slots for engine in engines for model in engine.models}


async def probe(url: str, told_slots: dict[str, int]) -> Check:
    """Measure how many requests an engine serves at a time, and compare it with what its worker was told.

    Raises:
        httpx.HTTPError, ValueError, KeyError, TypeError: it does not answer, or not as an engine does.
    """
    timeout = httpx.Timeout(ANSWER_S, read=GENERATION_S)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, trust_env=False) as client:
        version = (await _get(client, "/api/version"))["version"]
        loaded = [model["name"] for model in (await _get(client, "/api/ps")).get("models") or ()]
        listed = sorted((await _get(client, "/api/tags")).get("models") or (), key=lambda model: model.get("size", 0))
        for model in dict.fromkeys((*loaded, *(model["name"] for model in listed))):
            load = await client.post("/api/generate", json={"model": model, "prompt": "", "stream": False})
            if load.status_code != 400:  # 400: it does not generate
                break
        else:
            return Check("engine", Status.WARN, f"{url} (version {version}) has no model to generate with")
        if load.is_error:
            finding = f"{url} cannot load {model}: {load.text.strip()[:200]}"
            return Check("engine", Status.FAIL, finding, "See the engine's log; is there memory enough?")
        streams = await asyncio.gather(*(_stream(client, model, number) for number in range(1, STREAMS + 1)))
    return verdict(f"{url} (version {version})", model, at_once(streams), told_slots.get(full_name(model)))


async def _get(client: httpx.AsyncClient, path: str) -> Any:
    response = await client.get(path, timeout=ANSWER_S)
    response.raise_for_status()
    return response.json()


async def _stream(client: httpx.AsyncClient, model: str, number: int) -> list[float]:
    """When the tokens of one generation came."""
    request = {
        "model": model,
        "prompt": ", ".join(str(n) for n in range(number, number + 12))
        + ",",  # raw: even a tiny model goes on counting
        "raw": True,
        "options": {"num_predict": TOKENS, "temperature": 0},
    }
    times = []
    async with client.stream("POST", "/api/generate", json=request) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            event = json.loads(line)
            if event.get("response") or event.get("thinking"):
                times.append(time.perf_counter())
    return times


def at_once(streams: Sequence[Sequence[float]]) -> int | None:
    """How many streams ran beside each other at most, by when their tokens came; None: they were too short to tell."""
    if any(len(times) < TOKENS_MIN or times[-1] - times[0] < STREAM_S_MIN for times in streams):
        return None
    # The first half only: two lines that are read together must not look like an overlap.
    spans = [(times[0], times[len(times) // 2]) for times in streams]
    return max(sum(first <= start < half for first, half in spans) for start, _ in spans)


def verdict(engine: str, model: str, measured: int | None, slots: int | None) -> Check:
    """What to make of it; `slots` is what the engine's worker was told, None if that isn't known."""
    if measured is None:
        return Check("engine", Status.WARN, f"{engine} answers, but too briefly to see what {model} does in parallel")
    least = "at least " if measured == STREAMS else ""
    finding = f"{engine} serves {least}{measured} at a time with {model}"
    if slots is None:
        advice = f"slots={measured} is right for it" if measured < STREAMS else f"slots={measured} is safe"
        return Check("engine", Status.OK, f"{finding}; {advice}")
    finding = f"{finding}; slots={slots} is set"
    if measured < slots and measured < STREAMS:
        remedy = (
            f"Requests wait inside the engine, where they can't be ordered. Run its worker with slots={measured}, or "
            f"the engine with OLLAMA_NUM_PARALLEL={slots}. If it was busy, probe again when it is idle."
        )
        return Check("engine", Status.WARN, finding, remedy)
    if measured > slots:
        remedy = f"It could serve more: run its worker with --ollama URL,slots={measured}."
        return Check("engine", Status.WARN, finding, remedy)
    return Check("engine", Status.OK, finding)


# Telling --------------------------------------------------------------------------------------------------------------


def _failed(part: str, error: ProcessError) -> Check:
    """An error's first sentence says what is wrong, the others what to do."""
    finding, _, remedy = str(error).partition(". ")
    return Check(part, Status.FAIL, finding.removesuffix("."), remedy)


_WORDS: Final = {Status.OK: ("ok  ", 32), Status.WARN: ("warn", 33), Status.FAIL: ("FAIL", 31)}


def _print(check: Check) -> None:
    terminal = sys.stdout.isatty()
    word, colour = _WORDS[check.status]
    if terminal and "NO_COLOR" not in os.environ:
        word = f"\x1b[{colour}m{word}\x1b[0m"
    indent = " " * 18
    room = max(40, shutil.get_terminal_size().columns - len(indent)) if terminal else sys.maxsize
    lines = [
        line
        for text in (check.finding, check.remedy)
        for line in textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    ]
    print(f"{word}  {check.part:<12}" + f"\n{indent}".join(lines), flush=True)
