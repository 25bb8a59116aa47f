"""Settings: flag > environment > file > default, with every mistake named.

Each process declares its settings as one `Settings` struct with a section name:

    class BrokerSettings(Settings, frozen=True):
        section: ClassVar[str] = "broker"

A setting `workers` is then the flag `--workers`, the environment's `WEFTLINE_BROKER_WORKERS` and, in the TOML file that
`--config` or `WEFTLINE_CONFIG` names, the key `workers` of `[broker]`.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import msgspec
from platformdirs import user_data_path

from common import logs
from common.errors import UsageError
from common.transport import is_loopback

PREFIX = "WEFTLINE_"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of a process's settings; immutable once loaded."""

    section: ClassVar[str] = ""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
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
        prefix = f"{PREFIX}{cls.section.upper()}_"
        for field in msgspec.structs.fields(cls):
            text = environment.get(prefix + field.name.upper())
            if text is not None:
                values[field.name] = _convert(text, field.type, prefix + field.name.upper())
        values |= {name: value for name, value in (flags or {}).items() if value is not None and value != []}
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise UsageError(f"a setting of [{cls.section}] is wrong: {error}") from None

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
        for name in document:
            if name not in sections:
                raise UsageError(f"{path}: there is no section [{name}]{_nearest(name, sections)}")
        table = document.get(cls.section, {})
        if not isinstance(table, dict):
            raise UsageError(f"{path}: [{cls.section}] must be a table")
        fields = {field.name: field.type for field in msgspec.structs.fields(cls)}
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
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"{name} is wrong: {error}") from None


def _sections() -> set[str]:
    # A file serves every process of a host; sections of processes not imported here are known by name.
    return {"broker", "worker", "gateway", "engine", "up", "client"} | {
        cls.section for cls in Settings.__subclasses__() if cls.section
    }


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


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


def host_port(text: str, what: str) -> tuple[str, int]:
    """Split HOST:PORT.

    Raises:
        UsageError: it isn't one.
    """
    host, _, port = text.removeprefix("tcp://").removeprefix("http://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{what} must read HOST:PORT, not {text!r}")
    return host.strip("[]"), int(port)


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
