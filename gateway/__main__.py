"""`python -m gateway`, and the command `weftline gateway`."""

import sys
from typing import Annotated

import typer

from common import logs, process
from common.command import (
    ConfigOption,
    DataDirOption,
    InsecureOption,
    LogFormatOption,
    LogLevelOption,
    raise_file_limit,
    run_command,
)
from gateway import app
from gateway.settings import GatewaySettings


def gateway(
    broker: Annotated[str | None, typer.Option(help="The broker's port for gateways. [tcp://127.0.0.1:5570]")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT for clients. [127.0.0.1:3000]")] = None,
    data_dir: DataDirOption = None,
    public_url: Annotated[str | None, typer.Option(help="The URL clients dial, if a proxy stands before it.")] = None,
    anonymous: Annotated[
        bool | None, typer.Option("--anonymous", help="HTTP requests from this very machine need no key.")
    ] = None,
    insecure: InsecureOption = None,
    config: ConfigOption = None,
    log_level: LogLevelOption = None,
    log_format: LogFormatOption = None,
) -> int:
    """Run a gateway: clients connect to it."""
    settings = GatewaySettings.load(
        {
            "broker": broker,
            "listen": listen,
            "data_dir": data_dir,
            "public_url": public_url,
            "anonymous": anonymous,
            "insecure": insecure,
            "log_level": log_level,
            "log_format": log_format,
        },
        config=config,
    )
    logs.setup(level=settings.log_level, fmt=settings.log_format)
    raise_file_limit()
    return process.run(lambda stop: app.run(settings, stop))


def main(argv: list[str] | None = None) -> int:
    return run_command(gateway, argv, name="python -m gateway")


if __name__ == "__main__":
    sys.exit(main())
