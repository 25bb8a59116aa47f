"""The command `weftline`: which commands there are. Only the one that is run is imported; all would take a second."""

import importlib
import sys
from importlib import metadata
from typing import Annotated, Final

import typer

from common.command import exits, run_app

COMMANDS: Final = {
    "up": ("deploy.local:up", "Run the whole fabric on this machine."),
    "chat": ("cli.chat:chat", "Ask a model, or hold a conversation with it."),
    "models": ("cli.models:app", "List the models; pull, remove, pin and find them."),
    "hosts": ("cli.fleet:hosts", "List the hosts: engines, models, how busy they are."),
    "ps": ("cli.fleet:ps", "List the requests that run or wait."),
    "drain": ("cli.fleet:drain", "Give a host no new requests, and wait for what runs there."),
    "resume": ("cli.fleet:resume", "Let a drained host take requests again."),
    "doctor": ("cli.doctor:doctor", "Check every part, and say what is wrong and what to do."),
    "keys": ("cli.keys:app", "Manage the clients: their keys and their API tokens."),
    "broker": ("broker.__main__:broker", "Run the broker: it queues requests and balances them."),
    "gateway": ("gateway.__main__:gateway", "Run a gateway: clients connect to it."),
    "worker": ("workers.__main__:worker", "Run a host's worker, in front of its Ollama."),
    "engine": ("workers.embedded.__main__:engine", "Run the embedded engine, or the simulated one, alone."),
}
"""Where a command is, and what `weftline --help` says of it."""


def command_line(chosen: str) -> typer.Typer:
    """All commands by name and summary; `chosen`, if it is one of them, so that it can be run."""
    # No markup: it would take the [default] in a help text for a style, and drop it.
    app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_weftline)
    for name, (where, summary) in COMMANDS.items():
        if name != chosen:
            app.command(name, help=summary)(_elsewhere)
            continue
        module, _, attribute = where.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(exits(found))
    return app


def _elsewhere() -> None:
    raise AssertionError("only the chosen command is run")


def _version(asked: bool) -> None:
    if asked:
        print(f"weftline {metadata.version('weftline')}")
        raise typer.Exit


def _weftline(
    _: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = None,
) -> None:
    """One URL in front of many Ollama hosts."""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in words if not word.startswith("-")), "")
    return run_app(command_line(chosen), argv, "weftline")


if __name__ == "__main__":
    sys.exit(main())
