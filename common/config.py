"""Settings: flag > environment > file > default, with every mistake named.

Each process declares its settings as one `Settings` struct with a section name:

    class BrokerSettings(Settings, frozen=True):
        section: ClassVar[str] = "broker"

A setting `workers` is then the flag `--workers`, the environment's `WEFTLINE_BROKER_WORKERS` and, in the TOML file that
`--config` or `WEFTLINE_CONFIG` names, the key `workers` of `[broker]`. Bounds are part of a setting's type.
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from platformdirs import user_data_path

from common import logs
from common.errors import UsageError

PREFIX = "WEFTLINE_"
LogLevel = Literal["debug", "info", "warning", "error"]

SECONDS_MAX = 365 * 24 * 3600
Seconds = Annotated[float, msgspec.Meta(ge=0, le=SECONDS_MAX)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0, le=SECONDS_MAX)]
Amount = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=1024)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""0 takes a free one."""

_INJECTED = re.compile(r"(SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+)=.*|PORT=\w+://.*")
"""What Kubernetes puts into every container for a service named like one of our processes, weftline-gateway say."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of a process's settings; immutable once loaded."""

    section: ClassVar[str] = ""

    log_level: LogLevel = "info"
    log_format: logs.Format = "text"

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Any] | None = None,
        *,
        config: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> Self:
        """Merge the sources; a flag that is None or an empty list was not given.

        Raises:
            UsageError: an unknown or ill-typed setting, or a file that can't be read; the sentence names it.
        """
        values = cls._from_file(config or environment.get(f"{PREFIX}CONFIG"))
        fields = {field.name: field.type for field in msgspec.structs.fields(cls)}
        prefix = f"{PREFIX}{cls.section.upper()}_"
        for variable, text in environment.items():
            name = variable.removeprefix(prefix)
            if name == variable:
                continue
            if name.lower() in fields and name.isupper():
                values[name.lower()] = _convert(text, fields[name.lower()], variable)
            elif not _INJECTED.fullmatch(f"{name}={text}"):
                known = (field.upper() for field in fields)
                raise UsageError(f"there is no setting {variable}{_nearest(name, known, prefix)}")
        for name, value in (flags or {}).items():
            if value is not None and value != []:
                values[name] = _convert(value, fields[name], f"--{name.replace('_', '-')}")
        return msgspec.convert(values, cls)

    @classmethod
    def _from_file(cls, path: Path | str | None) -> dict[str, Any]:
        if not path:
            return {}
        try:
            document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the configuration file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not valid TOML: {error}") from None
        sections = _sections()
        fields = {field.name: field.type for field in msgspec.structs.fields(cls)}
        for name, value in document.items():
            if name in sections and not isinstance(value, dict):
                raise UsageError(f"{path}: [{name}] must be a table")
            if name not in sections and isinstance(value, dict):
                raise UsageError(f"{path}: there is no section [{name}]{_nearest(name, sections)}")
            if name not in sections:
                below = f"[{cls.section}]" if name in fields else f"its section: [{'], ['.join(sorted(sections))}]"
                raise UsageError(f"{path}: {name!r} stands outside of all sections; write it below {below}")
        table: dict[str, Any] = document.get(cls.section, {})
        for key, value in table.items():
            if key not in fields:
                raise UsageError(f"{path}: [{cls.section}] has no setting {key!r}{_nearest(key, fields)}")
            table[key] = _convert(value, fields[key], f"{path}: {key!r} of [{cls.section}]")
        return table


def _convert(value: Any, kind: Any, name: str) -> Any:
    many = any(getattr(k, "__origin__", k) is tuple for k in (kind, *getattr(kind, "__args__", ())))
    if many and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        return msgspec.convert(value, kind, strict=False, dec_hook=_from_text)
    except msgspec.ValidationError as error:
        raise UsageError(f"{name} is wrong: {error}") from None


def _from_text(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    raise msgspec.ValidationError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")


def _sections() -> set[str]:
    # A file serves every process of a host; sections of processes not imported here are known by name.
    return {"broker", "worker", "gateway", "engine", "up", "client"} | {
        cls.section for cls in Settings.__subclasses__() if cls.section
    }


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; there are: {prefix}{f', {prefix}'.join(known)}"


def default_data_dir() -> Path:
    """Where keys and the client registry live unless told: WEFTLINE_DATA_DIR, or the user's data folder."""
    return Path(os.environ.get(f"{PREFIX}DATA_DIR") or user_data_path("weftline", appauthor=False))


def writable_dir(path: Path) -> Path:
    """Create a private folder, or see that it can be written.

    Raises:
        UsageError: it can't.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UsageError(
            f"cannot write to the data dir {path}: {error.strerror}. Choose another with --data-dir."
        ) from None
    return path


def byte_count(text: str, what: str) -> int:
    """How many bytes `24GiB`, `1.5 GB`, `500M` or a bare number are: 1024 based with an i, else 1000 based.

    Raises:
        UsageError: it isn't a number of bytes from 1 KiB to 1 EiB.
    """
    match = re.fullmatch(r"(\d{1,19}(?:\.\d{1,9})?) ?(?:([kMGTP])(i?))?B?", text.strip(), re.ASCII)
    if match is not None:
        base = 1024 if match[3] else 1000
        count = int(float(match[1]) * base ** (" kMGTP".index(match[2] or " ")))
        if 2**10 <= count <= 2**60:
            return count
    raise UsageError(f"{what} must be an amount of memory like 24GiB, not {text!r}")


def host_port(text: str, what: str) -> tuple[str, int]:
    """Split HOST:PORT, with or without tcp:// or http:// before it.

    Raises:
        UsageError: it isn't one.
    """
    host, _, port = text.removeprefix("tcp://").removeprefix("http://").rpartition(":")
    if not _is_host(host) or not _is_port(port):
        raise UsageError(f"{what} must read HOST:PORT, not {text!r}")
    return host.strip("[]"), int(port)


def tcp_addresses(text: str, what: str) -> list[str]:
    """Brokers to dial, as `tcp://host:port`: one or, separated by commas, several. Each may leave out the tcp://.

    Raises:
        UsageError: one isn't an address.
    """
    pairs = [host_port(address.strip(), what) for address in text.split(",")]
    return [f"tcp://{f'[{host}]' if ':' in host else host}:{port}" for host, port in pairs]


def refuse_unbindable(address: str, what: str) -> None:
    """libzmq takes ports modulo 65536, and says little of what is no address at all.

    Raises:
        UsageError: `address` is not tcp://HOST:PORT, where 0 and * are free ports.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not _is_host(host) or not (port == "*" or _is_port(port)):
        raise UsageError(f"{what} must read tcp://HOST:PORT, not {address!r}")


def _is_host(text: str) -> bool:
    return bool(re.fullmatch(r"\[[\w:.%]+\]|[\w.*-]+", text))


def _is_port(text: str) -> bool:
    return len(text) <= 5 and text.isascii() and text.isdecimal() and int(text) <= 65535


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `tcp://host:port` or `host:port`."""
    host = address.split("://", 1)[-1].rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_exposed(addresses: Iterable[str], *, insecure: bool) -> None:
    """Links are not encrypted: beyond loopback they need an explicit yes.

    Raises:
        UsageError: an address that other machines can reach, without `insecure`.
    """
    for address in addresses:
        if not insecure and not is_loopback(address):
            raise UsageError(
                f"{address} can be reached from other machines, and the link is not encrypted. "
                "Bind to 127.0.0.1 and tunnel, or pass --insecure on a network you trust."
            )
