"""`weftline up` without its parts: what it tells them, waits for, holds and says, and how it is stopped."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.errors import ProcessError, UsageError
from deploy.local import RESTARTS_MAX, SETTLED_S, Fabric, Part, UpSettings, only_one, usable

ROOT = Path(__file__).parents[3]
WAIT_S = 20


def words(tmp_path: Path, config: str = "", environment: dict[str, str] | None = None) -> list[str]:
    """The command line of the broker, with these settings of `up`."""
    file = tmp_path / "weftline.toml"
    file.write_text(config)
    settings = UpSettings.load({"data_dir": tmp_path}, config=file, environment=environment or {})
    fabric = Fabric(settings, file)
    fabric._add("broker", "broker")
    return fabric._parts[0].arguments


def test_a_part_is_told_nothing_of_logs_that_was_not_set(tmp_path: Path) -> None:
    """A flag would go before WEFTLINE_BROKER_LOG_LEVEL and `log_level` of [broker]."""
    config = str(tmp_path / "weftline.toml")
    assert words(tmp_path) == ["-m", "broker", "--config", config]
    assert words(tmp_path, "[broker]\nlog_level = 'debug'\n") == ["-m", "broker", "--config", config]


def test_what_was_set_for_all_parts_is_passed_on_also_if_it_is_the_default(tmp_path: Path) -> None:
    assert words(tmp_path, "[up]\nlog_level = 'info'\n")[2:4] == ["--log-level", "info"]
    assert words(tmp_path, "", {"WEFTLINE_UP_LOG_FORMAT": "json"})[2:4] == ["--log-format", "json"]


@contextlib.contextmanager
def installing(tmp_path: Path, pip: str) -> Iterator[subprocess.Popen[str]]:
    """A `weftline up`, leader of its own process group, whose pip is this shell script and has said that it runs."""
    script = tmp_path / "pip"
    script.write_text(f"#!/bin/sh\necho pip $$\n{pip}\n")
    script.chmod(0o755)
    program = f"""
        import importlib.util, sys
        from common.command import run_command
        from deploy import local

        importlib.util.find_spec = lambda name: None
        sys.executable = {str(script)!r}
        local.usable = lambda address, setting, **_: address
        sys.exit(run_command(local.up, ["--engine", "embedded", "--data-dir", {str(tmp_path)!r}], name="up"))
    """
    up = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield up
    finally:
        if up.poll() is None:
            up.kill()
        up.communicate()


def pid_of_pip(up: "subprocess.Popen[str]") -> int:
    assert up.stdout is not None
    return next(int(line.split()[1]) for line in up.stdout if line.startswith("pip "))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pip", ["exec sleep 60", "trap '' INT TERM\nfor _ in $(seq 600); do sleep 0.1; done"])
def test_up_stops_while_the_engine_is_installed(tmp_path: Path, number: signal.Signals, pip: str) -> None:
    """Ctrl-C is sent to the whole group, as a terminal does; SIGTERM to `up` alone. A stubborn pip is killed."""
    with installing(tmp_path, pip) as up:
        child = pid_of_pip(up)
        if number == signal.SIGINT:
            os.killpg(up.pid, number)
        else:
            up.send_signal(number)
        said, _ = up.communicate(timeout=WAIT_S)
        assert up.returncode == 0, said
        assert "Stopped" in said
        assert "could not be installed" not in said
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_pip_that_fails_says_what_to_do(tmp_path: Path) -> None:
    with installing(tmp_path, "exit 3") as up:
        said, _ = up.communicate(timeout=WAIT_S)
        assert up.returncode == 1
        assert "could not be installed" in said
        assert "Traceback" not in said


# Settings, ports and the data dir -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        ({"port": 99999}, {}, "--port is wrong: Expected `int` <= 65535"),
        ({"port": -1}, {}, "--port is wrong: Expected `int` >= 0"),
        ({"workers": 0}, {}, "--workers is wrong: Expected `int` >= 1"),
        ({}, {"WEFTLINE_UP_WORKERS": "65"}, "WEFTLINE_UP_WORKERS is wrong: Expected `int` <= 64"),
        ({}, {"WEFTLINE_UP_PROT": "3100"}, "WEFTLINE_UP_PROT; did you mean 'WEFTLINE_UP_PORT'"),
        ({}, {"WEFTLINE_UP_GATEWAYS": "5570"}, r"`gateways` of \[up\] must read tcp://HOST:PORT, not '5570'"),
    ],
)
def test_settings_out_of_bounds_are_named(flags: dict[str, int], environment: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        UpSettings.load(flags, environment=environment)


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"127.0.0.1:{other.getsockname()[1]}"


def test_a_usual_port_that_is_taken_gives_way_to_a_free_one(taken: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = usable(f"tcp://{taken}", "WEFTLINE_UP_GATEWAYS", usual=f"tcp://{taken}")
    assert address.startswith("tcp://127.0.0.1:")
    assert address != f"tcp://{taken}"
    said = capsys.readouterr().out
    assert f"{taken} is taken" in said
    assert address.removeprefix("tcp://") in said
    assert usable(address, "WEFTLINE_UP_GATEWAYS") == address


def test_a_port_that_was_chosen_and_is_taken_is_an_error_with_a_remedy(taken: str) -> None:
    with pytest.raises(ProcessError, match=rf"{taken} cannot be used: .*Choose another with WEFTLINE_UP_GATEWAYS\."):
        usable(f"tcp://{taken}", "WEFTLINE_UP_GATEWAYS", usual="tcp://127.0.0.1:5570")


@pytest.mark.parametrize("port", ["0", "*"])
def test_a_port_that_is_not_named_is_a_free_one(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert int(usable(f"tcp://127.0.0.1:{port}", "").rpartition(":")[2]) > 0
    assert capsys.readouterr().out == ""


def test_a_data_dir_is_for_one_up_at_a_time(tmp_path: Path) -> None:
    for _ in range(2):  # it is let go at the end
        with (
            only_one(tmp_path),
            pytest.raises(ProcessError, match=rf"another `weftline up` \(process {os.getpid()}\) .* --data-dir"),
            only_one(tmp_path),
        ):
            pass


# Parts ----------------------------------------------------------------------------------------------------------------


def test_deaths_far_apart_are_no_reason_to_give_up() -> None:
    part = Part("worker", [], Path("log"))
    assert [part.may_restart(now=1.0) for _ in range(RESTARTS_MAX + 1)] == [True] * RESTARTS_MAX + [False]
    for _ in range(2 * RESTARTS_MAX):
        part.started_at += 1000.0
        assert part.may_restart(part.started_at + SETTLED_S)
    assert [part.may_restart(part.started_at + 1.0) for _ in range(RESTARTS_MAX)] == [True] * 4 + [False]


async def test_parts_are_stopped_at_once_not_gently(tmp_path: Path) -> None:
    """SIGTERM lets a worker finish what runs, for minutes."""
    script = """
        import pathlib, signal, sys

        def caught(number, _):
            print("caught", signal.Signals(number).name, flush=True)
            sys.exit()

        signal.signal(signal.SIGINT, caught)
        signal.signal(signal.SIGTERM, caught)
        pathlib.Path("ready").touch()
        while True:
            signal.pause()
    """
    program = f"import os; os.chdir({str(tmp_path)!r})\n{textwrap.dedent(script)}"
    part = Part("worker", ["-c", program], tmp_path / "worker.log")
    async with Fabric(UpSettings(data_dir=tmp_path), None)._running(part):
        async with asyncio.timeout(WAIT_S):
            while not (tmp_path / "ready").exists():  # noqa: ASYNC110 - a process tells us by a file
                await asyncio.sleep(0.01)
    assert part.log.read_text() == "caught SIGINT\n"


@pytest.mark.parametrize("own_engine", [True, False])
async def test_our_own_engine_is_waited_for_until_a_model_is_there(
    own_engine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Ollama may have none, and pulling one takes an operator."""
    states = [
        (503, {"ready": False, "reason": "no worker is connected", "models": []}),
        (503, {"ready": False, "reason": "no model can be served", "models": []}),
        (200, {"ready": True, "reason": None, "models": ["llama2"]}),
    ]
    answers = iter(states)

    def answer(request: httpx.Request) -> httpx.Response:
        status, state = next(answers)
        return httpx.Response(status, json=state)

    client = httpx.AsyncClient
    monkeypatch.setattr("deploy.local.httpx.AsyncClient", lambda **_: client(transport=httpx.MockTransport(answer)))
    fabric = Fabric(UpSettings(data_dir=tmp_path), None)
    fabric._own_engine = own_engine
    assert await fabric._ready() == (states[2][1] if own_engine else states[1][1])
