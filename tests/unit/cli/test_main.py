"""The command line as a whole."""

import subprocess
import sys

import pytest

from cli.main import COMMANDS, main


def test_help_names_every_command_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name} " in shown
        assert summary in shown


def test_help_and_version_import_no_server_and_no_client() -> None:
    code = (
        "import sys, cli.main; s = [cli.main.main([flag]) for flag in ('--help', '--version')]; "
        "heavy = {'zmq', 'starlette', 'uvicorn', 'sqlalchemy', 'httpx', 'websockets', 'rich', 'cryptography'}; "
        "sys.exit(sorted(heavy & set(sys.modules)) or sum(s))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "weftline 0." in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"Usage: weftline {name}" in capsys.readouterr().out


def test_defaults_in_brackets_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["broker", "--help"]) == 0
    assert "[tcp://127.0.0.1:5570]" in capsys.readouterr().out


def test_a_mistyped_command_is_a_usage_error_that_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hots"]) == 2
    assert "Did you mean 'hosts'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chat", "hosts", "doctor", "broker", "gateway", "worker", "engine"])
def test_an_unknown_flag_is_a_usage_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--no-such-flag"]) == 2
    assert "No such option: --no-such-flag" in capsys.readouterr().err


def test_without_a_command_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "Commands:" in shown.out + shown.err
