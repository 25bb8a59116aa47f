"""`weftline worker`, also `python -m workers`."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from common import logs, process
from workers.agent import run
from workers.settings import WorkerSettings


def worker(
    broker: Annotated[str | None, typer.Option(help="Where the broker waits for workers.", metavar="ADDRESS")] = None,
    ollama: Annotated[
        list[str] | None,
        typer.Option(
            help="An engine, as OLLAMA_HOST would name it; slots: its OLLAMA_NUM_PARALLEL.", metavar="URL[,slots=N]"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="This host's name in the fleet; its hostname unless told.")] = None,
    start_ollama: Annotated[
        bool | None, typer.Option("--start-ollama", help="Run `ollama serve` if the first engine does not answer.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; its section `worker` is read.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
) -> None:
    """Serve the engines of this host: dial out to the broker, run what it assigns, stream back what they say."""
    flags = {
        "broker": broker,
        "ollama": ollama,
        "name": name,
        "start_ollama": start_ollama,
        "log_level": log_level,
        "log_format": log_format,
    }

    async def start(stop: asyncio.Event) -> int:
        settings = WorkerSettings.load(flags, config=config)
        logs.setup(level=settings.log_level, fmt=settings.log_format)
        return await run(settings, stop)

    raise typer.Exit(process.run(start))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker to its end and return the exit status."""
    app = typer.Typer(add_completion=False)
    app.command()(worker)
    try:
        app(argv)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
