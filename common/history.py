"""What a process did, line by line, for a checker to pass over afterwards; off unless WEFTLINE_HISTORY=FOLDER/NAME.

The file is FOLDER/NAME-<pid>.jsonl. A line is a JSON object: `t` the monotonic clock in seconds (one clock for all
processes of a machine), `process` the NAME, `event`, and the event's own facts; bytes are written as hex. Every line is
one `write` to a file opened for appending, so what was done before a kill -9 is there, and nothing is buffered.
Recording costs nothing when it is off:

    if history.record is not None:
        history.record("chunk", rid=lease.rid, seq=seq, hash=crc32(line))
"""

import os
import time
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

VARIABLE: Final = "WEFTLINE_HISTORY"

_encoder: Final = msgspec.json.Encoder(enc_hook=str)


class Recorder(Protocol):
    """Appends one line."""

    def __call__(self, event: str, /, **facts: Any) -> None: ...


class History:
    """A file that is appended to; also the `Recorder` of it."""

    def __init__(self, place: Path) -> None:
        """`place` is FOLDER/NAME; the folder is made. Raises OSError."""
        place.parent.mkdir(parents=True, exist_ok=True)
        self._process = place.name
        self.path = place.with_name(f"{place.name}-{os.getpid()}.jsonl")
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def __call__(self, event: str, /, **facts: Any) -> None:
        line = {"t": time.monotonic(), "process": self._process, "event": event}
        for name, value in facts.items():
            line[name] = value.hex() if isinstance(value, bytes) else value
        os.write(self._file, _encoder.encode(line) + b"\n")

    def close(self) -> None:
        os.close(self._file)


record: Recorder | None = None
"""Set by `start`; None means that nobody wants to know."""


def start() -> None:
    """Record from now on, if WEFTLINE_HISTORY says where. Raises OSError."""
    global record
    if place := os.environ.get(VARIABLE):
        record = History(Path(place))
