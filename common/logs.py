"""Structured logs on stderr: an event's name, then its facts.

2026-11-21T10:00:00.123Z INFO  broker worker registered name=gpu-1 models=3
{"ts": "...", "level": "info", "process": "broker", "event": "worker registered", "name": "gpu-1", "models": 3}
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["text", "json"]


class Log:
    """`log("worker registered", name="gpu-1")`: one line per event; bytes are written as hex."""

    def __init__(self, process: str) -> None:
        self._logger = logging.getLogger(f"weftline.{process}")

    def __call__(self, event: str, /, *, level: int = logging.INFO, **facts: Any) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"facts": facts})

    def warn(self, event: str, /, **facts: Any) -> None:
        self(event, level=logging.WARNING, **facts)

    def debug(self, event: str, /, **facts: Any) -> None:
        self(event, level=logging.DEBUG, **facts)


def setup(*, level: str = "info", fmt: Format = "text") -> None:
    """Send all logs to stderr. Called once, by the process that owns the terminal.

    Raises:
        ValueError: no such level.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if fmt == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in (
        "httpx",
        "httpcore",
        "uvicorn.access",
        "uvicorn.error",
        "alembic",
        "websockets",
        "asyncio",
    ):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        process = record.name.removeprefix("weftline.")
        facts = "".join(f" {key}={_word(_plain(value))}" for key, value in getattr(record, "facts", {}).items())
        line = f"{_when(record)} {record.levelname:<7} {process} {record.getMessage()}{facts}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "ts": _when(record),
            "level": record.levelname.lower(),
            "process": record.name.removeprefix("weftline."),
            "event": record.getMessage(),
            **{key: _plain(value) for key, value in getattr(record, "facts", {}).items()},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _when(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _word(value: object) -> str:
    """One word: what a peer said must neither look like another fact nor begin a line of its own."""
    text = str(value)
    plain = text.isprintable()
    return text if plain and text and not set(text) & set(' "') else json.dumps(text, ensure_ascii=not plain)


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value
