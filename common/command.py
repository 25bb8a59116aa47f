"""What the commands of all processes share: common options, and how an error becomes a sentence and an exit status."""

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from common.errors import ProcessError

ConfigOption = Annotated[Path | None, typer.Option(help="TOML file with settings. [none]", envvar="WEFTLINE_CONFIG")]
DataDirOption = Annotated[
    Path | None, typer.Option(help="Keys and client registry. [the user's data folder]", envvar="WEFTLINE_DATA_DIR")
]
InsecureOption = Annotated[
    bool | None, typer.Option("--insecure", help="Allow an unencrypted port that other machines can reach.")
]
LogLevelOption = Annotated[str | None, typer.Option(help="debug, info, warning or error. [info]")]
LogFormatOption = Annotated[str | None, typer.Option(help="text or json. [text]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


P = ParamSpec("P")


def exits(function: Callable[P, int | None]) -> Callable[P, None]:
    """Make a Typer command of a function that returns its exit status; a `ProcessError` is said in one sentence."""

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            status = function(*args, **kwargs) or 0
        except ProcessError as error:
            print(f"weftline: {error}", file=sys.stderr)
            status = error.exit_status
        raise typer.Exit(status)

    return command


def run_app(app: typer.Typer, argv: list[str] | None, name: str) -> int:
    """Run a command line and return its exit status."""
    try:
        app(argv, prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def run_command(function: Callable[..., int], argv: list[str] | None, *, name: str) -> int:
    """Run a single command."""
    # No markup: it would take a [default] in a help text for a style, and drop it.
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(exits(function))
    return run_app(app, argv, name)


def raise_file_limit() -> None:
    """Let this process open as many files as it may: each peer takes one, and the usual soft limit is 1024."""
    if sys.platform == "win32":  # has no such limit
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS refuses "unlimited" although it says so.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
