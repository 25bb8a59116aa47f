"""The command: `python -m workers.embedded` as a process among processes."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "models" / "wordnet-tiny-1m.Q8_0.gguf"


@contextlib.contextmanager
def engine(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "workers.embedded", "--listen", "127.0.0.1:0", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            found = next(
                filter(None, (re.search(r"engine listening on (http://\S+)", line) for line in process.stderr))
            )
            yield process, found[1]
        finally:
            process.kill()


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.embedded", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cuts_running_streams_and_ends_the_children(number: signal.Signals) -> None:
    with engine("--model", f"tiny={TINY}") as (process, url), httpx.Client(base_url=url, trust_env=False) as client:
        schema = {"type": "array", "items": {"type": "integer"}, "minItems": 1500}
        body = {"model": "tiny", "prompt": "x", "format": schema}
        with client.stream("POST", "/api/generate", json=body) as response:
            lines = response.iter_lines()
            assert not json.loads(next(lines))["done"]
            children = psutil.Process(process.pid).children()
            assert len(children) == 1
            process.send_signal(number)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        assert process.wait(20) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.engine
def test_children_die_with_an_engine_that_is_killed() -> None:
    with engine("--model", f"tiny={TINY}", "--model", f"other={TINY.with_name('tiny-bert.gguf')}") as (process, url):
        with httpx.Client(base_url=url, trust_env=False) as client:
            client.post("/api/generate", json={"model": "tiny"})
            client.post("/api/embed", json={"model": "other"})
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        process.kill()
        assert psutil.wait_procs(children, timeout=10)[1] == []


def test_the_simulated_engine() -> None:
    flags = ("--simulated", "--sim-model", "one=2GB", "--tokens-per-s", "1000", "--slots", "3", "--memory", "3GB")
    with engine(*flags) as (process, url), httpx.Client(base_url=url, trust_env=False) as client:
        answer = client.post("/api/generate", json={"model": "one", "prompt": "x", "stream": False}).json()
        assert answer["eval_count"] == 128
        assert client.get("/debug/slots").json()["models"]["one:latest"]["slots"] == 3
        assert client.get("/api/ps").json()["models"][0]["size"] == 2_000_000_000
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_port_in_use_is_said_plainly() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = run("--simulated", "--listen", address)
    assert ended.returncode == 1
    assert f"cannot listen on {address}: Address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (("--model", "no-file"), 2, "NAME=FILE.gguf"),
        (("--model", "a b=x.gguf"), 2, "invalid model name"),
        (("--model", "x=nowhere.gguf"), 1, "nowhere.gguf"),
        (
            (
                "--model",
                f"x={Path(__file__).name}",
            ),
            1,
            Path(__file__).name,
        ),
        (("--simulated", "--sim-model", "a b"), 2, "invalid model name"),
        (("--simulated", "--sim-model", "a=big"), 2, "--sim-model a must be an amount of memory"),
        (("--simulated", "--memory", "0"), 2, "--memory must be an amount of memory"),
        (("--simulated", "--listen", "nowhere"), 2, "HOST:PORT"),
        (("--log-level", "loud"), 2, "log-level"),
    ],
)
def test_wrong_flags_are_said_plainly(flags: tuple[str, ...], status: int, words: str) -> None:
    ended = run("--listen", "127.0.0.1:0", *flags)
    assert ended.returncode == status, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
