"""Each line is there the moment it was said, and nobody pays who does not want it."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common import history


@pytest.fixture(autouse=True)
def _off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "record", None)
    monkeypatch.delenv(history.VARIABLE, raising=False)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


def test_it_is_off_unless_it_is_told_where() -> None:
    history.start()
    assert history.record is None


def test_a_line_tells_when_who_what_and_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(history.VARIABLE, str(tmp_path / "made" / "worker-1"))
    history.start()
    assert isinstance(history.record, history.History)
    history.record("chunk", rid=b"\x01\xff", seq=3, hashes=[1, 2])
    history.record("over")
    first, second = lines(tmp_path / "made")
    assert {**first, "t": 0} == {
        "t": 0,
        "process": "worker-1",
        "event": "chunk",
        "rid": "01ff",
        "seq": 3,
        "hashes": [1, 2],
    }
    assert second["event"] == "over"
    assert first["t"] <= second["t"]
    history.record.close()


def test_what_was_done_before_a_kill_is_there(tmp_path: Path) -> None:
    program = "from common import history; import os, signal; history.start(); history.record('done', n=1); "
    killed = subprocess.run(
        [sys.executable, "-c", program + "os.kill(os.getpid(), signal.SIGKILL)"],
        env={history.VARIABLE: str(tmp_path / "p"), "PYTHONPATH": str(Path(history.__file__).parents[1])},
        timeout=30,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [line["event"] for line in lines(tmp_path)] == ["done"]
