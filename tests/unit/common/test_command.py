"""A command is a function: its errors become a sentence on stderr and an exit status."""

import resource
import subprocess
import sys

import pytest

from common.command import run_command
from common.errors import AuthError


def bake(degrees: int = 180) -> int:
    """Bake."""
    if degrees > 300:
        raise AuthError("the oven refuses")
    print(degrees)
    return 0 if degrees else 7


def run(*argv: str) -> int:
    return run_command(bake, list(argv), name="python -m oven")


def test_the_status_of_the_function_is_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run(), run("--degrees", "0")] == [0, 7]
    assert capsys.readouterr().out == "180\n0\n"


def test_an_error_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--degrees", "301") == 77
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "weftline: the oven refuses\n")


@pytest.mark.parametrize("argv", [("--degree", "1"), ("--degrees", "hot"), ("surplus",)])
def test_usage_is_status_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert "python -m oven" in capsys.readouterr().err


def test_help_is_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    assert "Bake." in capsys.readouterr().out


@pytest.mark.parametrize("hard", [300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]])
def test_as_many_files_as_the_hard_limit_allows(hard: int) -> None:
    program = (
        f"import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (200, {hard}))\n"
        f"from common.command import raise_file_limit\n"
        f"raise_file_limit()\n"
        f"print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(hard)] * 2
