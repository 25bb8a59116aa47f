"""The parts of the fabric as processes of their own, started as an operator starts them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_S = 30.0
STOP_S = 15.0


class Process:
    """`python -m MODULE ARGUMENTS` with its log lines collected; ended, by its pid, at the end of the block."""

    def __init__(self, module: str, *arguments: str, cwd: Path = ROOT) -> None:
        self.lines: list[str] = []
        self._grown = threading.Condition()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def find(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Wait for a log line that matches."""

        def found() -> re.Match[str] | None:
            return next((match for line in self.lines if (match := re.search(pattern, line))), None)

        with self._grown:
            self._grown.wait_for(lambda: found() or self._popen.poll() is not None, timeout_s)
            match = found()
        if match is None:
            raise AssertionError(f"no line like {pattern!r} in:\n" + "\n".join(self.lines))
        return match

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        return self._popen.wait(timeout_s)

    def close(self) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGINT)  # at once: SIGTERM lets finish what runs or could be resumed
            try:
                self._popen.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._reader.join(STOP_S)
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            with self._grown:
                self.lines.append(line.rstrip())
                self._grown.notify_all()


@contextlib.contextmanager
def started(module: str, *arguments: str) -> Iterator[Process]:
    """A process for the length of a block."""
    process = Process(module, *arguments)
    try:
        yield process
    finally:
        process.close()
