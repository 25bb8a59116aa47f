"""`weftline worker`, also `python -m workers`."""

import sys
from typing import Annotated

import typer

from common import logs, process
from common.command import ConfigOption, LogFormatOption, LogLevelOption, run_command
from workers.agent import run
from workers.settings import WorkerSettings


def worker(
    broker: Annotated[
        str | None, typer.Option(help="The broker's port for workers. [tcp://127.0.0.1:5571]", metavar="ADDRESS")
    ] = None,
    ollama: Annotated[
        list[str] | None,
        typer.Option(
            help="An engine, as OLLAMA_HOST would name it; slots: its OLLAMA_NUM_PARALLEL. Repeatable.",
            metavar="URL[,slots=N][,models=N][,memory=24GiB]",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="This host's name in the fleet. [its hostname]")] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", help="What is to be known of this host. Repeatable.", metavar="KEY=VALUE"),
    ] = None,
    start_ollama: Annotated[
        bool | None, typer.Option("--start-ollama", help="Run `ollama serve` if the first engine does not answer.")
    ] = None,
    config: ConfigOption = None,
    log_level: LogLevelOption = None,
    log_format: LogFormatOption = None,
) -> int:
    """Serve the engines of this host: dial out to the broker, run what it assigns, stream back what they say."""
    settings = WorkerSettings.load(
        {
            "broker": broker,
            "ollama": ollama,
            "name": name,
            "labels": labels,
            "start_ollama": start_ollama,
            "log_level": log_level,
            "log_format": log_format,
        },
        config=config,
    )
    logs.setup(level=settings.log_level, fmt=settings.log_format)
    return process.run(lambda stop: run(settings, stop))


def main(argv: list[str] | None = None) -> int:
    """Run a worker to its end and return the exit status."""
    return run_command(worker, argv, name="python -m workers")


if __name__ == "__main__":
    sys.exit(main())
