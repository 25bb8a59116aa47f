"""The settings of a worker, and how an engine is named."""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final
from urllib.parse import urlsplit

import msgspec

from common.config import PositiveSeconds, Settings, byte_count, tcp_addresses
from common.errors import UsageError
from common.protocol import LABELS_MAX

OLLAMA_PORT: Final = 11434

SLOTS_MAX: Final = 4096
BufferBytes = Annotated[int, msgspec.Meta(ge=64 * 2**10)]


class EngineAddress(msgspec.Struct, frozen=True):
    """Where an engine listens; how many requests for one model it runs at once (its OLLAMA_NUM_PARALLEL); how many
    models it holds at once (its OLLAMA_MAX_LOADED_MODELS), and the memory it has for them, 0 if that is not known."""

    url: str
    slots: int = 1
    models: int = 0
    memory_bytes: int = 0


def ollama_url(text: str) -> str:
    """The URL that OLLAMA_HOST means, after `envconfig.Host` of Ollama: `host`, `host:port`, `:port`, with or without
    scheme and path. Without a scheme the port is 11434, with one it is the scheme's. An address that only a listener
    can use (0.0.0.0, ::) means this machine.

    Raises:
        UsageError: not an address.
    """
    scheme, found, rest = text.strip().strip("\"'").partition("://")
    if not found:
        scheme, rest = "http", scheme
    if scheme not in ("http", "https"):
        raise UsageError(f"an engine is reached by http or https, not {text!r}")
    default = OLLAMA_PORT if not found else {"http": 80, "https": 443}[scheme]
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        host, port = parts.hostname or "127.0.0.1", parts.port or default
    except ValueError:
        raise UsageError(f"{text!r} is not an engine's address; it should read HOST:PORT or URL") from None
    if parts.username is not None or parts.query or parts.fragment or not re.fullmatch(r"[\w.:%-]+", host):
        raise UsageError(f"{text!r} is not an engine's address; it should read HOST:PORT or URL")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


def engine_addresses(entries: Sequence[str], environment: Mapping[str, str] = os.environ) -> tuple[EngineAddress, ...]:
    """Read `URL[,slots=N][,models=N][,memory=SIZE]` entries; none means OLLAMA_HOST or http://127.0.0.1:11434.

    Slots default to the OLLAMA_NUM_PARALLEL of this environment, else 1, as in Ollama, models to its
    OLLAMA_MAX_LOADED_MODELS. A list that came from one string (the environment, a file) was split at its commas: a bare
    `slots=N`, `models=N` or `memory=SIZE` belongs to the engine before it.

    Raises:
        UsageError: an entry that is no address, a number out of bounds, or an engine named twice.
    """

    def default(name: str, otherwise: int) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() and int(text) > 0 else otherwise

    found_engines: dict[str, dict[str, int]] = {}
    for part in ",".join(entries or (environment.get("OLLAMA_HOST", ""),)).split(","):
        key, found, value = part.strip().partition("=")
        if found and key == "memory" and found_engines:
            found_engines[next(reversed(found_engines))]["memory_bytes"] = byte_count(value, "--ollama: memory")
            continue
        if found and key in ("slots", "models") and found_engines:
            if not re.fullmatch(r"[0-9]{1,5}", value) or not 1 <= int(value) <= SLOTS_MAX:
                raise UsageError(f"--ollama: {key} must be a whole number from 1 to {SLOTS_MAX}, not {value!r}")
            found_engines[next(reversed(found_engines))][key] = int(value)
            continue
        if entries and not part.strip():
            raise UsageError("--ollama: an engine without an address")
        url = ollama_url(part)
        if url in found_engines:
            raise UsageError(f"--ollama: the engine {url} is named twice")
        found_engines[url] = {
            "slots": default("OLLAMA_NUM_PARALLEL", 1),
            "models": default("OLLAMA_MAX_LOADED_MODELS", 0),
        }
    return tuple(EngineAddress(url, **numbers) for url, numbers in found_engines.items())


class WorkerSettings(Settings, frozen=True):
    """What `weftline worker` can be told. Durations in seconds.

    Attributes:
        broker: where the broker waits for workers; several in order, separated by commas: the first that lives serves.
        ollama: engines as `URL[,slots=N][,models=N][,memory=SIZE]`; none means OLLAMA_HOST or http://127.0.0.1:11434.
        name: unique in the fleet; of two live workers of one name the newer wins.
        labels: what is to be known of this host, as `key=value`; operations on models can choose hosts by them.
        start_ollama: run `ollama serve` for the first engine if it does not answer.
        first_byte_s: an engine that says nothing for so long has failed; loading a model may take minutes.
        silence_s: the same between two pieces of an answer.
        poll_interval_s: how often an engine is asked for its models.
        lease_bytes_max: events kept for one request; beyond it the oldest sent ones go, then reading stops.
        worker_bytes_max: the same for all requests; the oldest finished requests go first.
        orphan_s: without a broker for so long, requests are cancelled.
        keep_s: a finished request's events are kept at most so long after its end and after they were last asked for.
        drain_s: after SIGTERM, how long what runs may take to finish.
        data_dir: where it is kept in mind that an operator drained this worker.
    """

    section: ClassVar[str] = "worker"

    broker: str = "tcp://127.0.0.1:5571"
    ollama: tuple[str, ...] = ()
    name: str = msgspec.field(default_factory=socket.gethostname)
    labels: tuple[str, ...] = ()
    start_ollama: bool = False
    first_byte_s: PositiveSeconds = 600.0
    silence_s: PositiveSeconds = 120.0
    poll_interval_s: PositiveSeconds = 2.0
    lease_bytes_max: BufferBytes = 32 * 2**20
    worker_bytes_max: BufferBytes = 256 * 2**20
    orphan_s: PositiveSeconds = 60.0
    keep_s: PositiveSeconds = 90.0
    drain_s: PositiveSeconds = 600.0
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        tcp_addresses(self.broker, "--broker")
        if len(self.labels) > LABELS_MAX:
            raise UsageError(f"a host has at most {LABELS_MAX} labels")
        for label in self.labels:
            if not re.fullmatch(r"[\w.-]+=[\w.-]+", label):
                raise UsageError(
                    f"a label reads KEY=VALUE, of letters, digits, dots, underscores and hyphens: {label!r}"
                )
