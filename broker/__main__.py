"""`python -m broker`, and the command `weftline broker`."""

import sys
from typing import Annotated

import typer

from broker import server
from broker.settings import BrokerSettings
from common import logs, process
from common.command import ConfigOption, InsecureOption, LogFormatOption, LogLevelOption, raise_file_limit, run_command


def broker(
    gateways: Annotated[str | None, typer.Option(help="Where gateways dial in. [tcp://127.0.0.1:5570]")] = None,
    workers: Annotated[str | None, typer.Option(help="Where workers dial in. [tcp://127.0.0.1:5571]")] = None,
    insecure: InsecureOption = None,
    config: ConfigOption = None,
    log_level: LogLevelOption = None,
    log_format: LogFormatOption = None,
) -> int:
    """Run the broker: it queues requests and balances them over the workers."""
    settings = BrokerSettings.load(
        {
            "gateways": gateways,
            "workers": workers,
            "insecure": insecure,
            "log_level": log_level,
            "log_format": log_format,
        },
        config=config,
    )
    logs.setup(level=settings.log_level, fmt=settings.log_format)
    raise_file_limit()
    return process.run(lambda stop: server.run(settings, stop))


def main(argv: list[str] | None = None) -> int:
    return run_command(broker, argv, name="python -m broker")


if __name__ == "__main__":
    sys.exit(main())
