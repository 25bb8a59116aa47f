"""`make bench`: what the fabric adds to streams, how fast it goes and what it costs, on the simulated engine."""

import asyncio
import os
import platform
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from bench import http, streams
from common import process
from common.command import run_command
from common.errors import UsageError

RESULTS: Final = Path(__file__).parent / "results"


class Part(StrEnum):
    """What can be measured by itself."""

    STREAMS = "streams"
    HTTP = "http"


RUN: Final[dict[Part, Callable[[bool], Awaitable[dict[str, Any]]]]] = {
    Part.STREAMS: lambda quick: streams.bench(quick=quick),
    Part.HTTP: lambda quick: http.bench(quick=quick),
}
REPORT: Final[dict[Part, Callable[[dict[str, Any]], str]]] = {Part.STREAMS: streams.report, Part.HTTP: http.report}


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    return {
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def bench(
    part: Annotated[
        Part | None, typer.Argument(help="The client protocol, or the HTTP APIs beside other proxies. [both]")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Rougher, with fewer loads, and no peer that is not installed yet.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Where the figures go. [bench/results/DATE.json]", metavar="FILE")
    ] = None,
) -> int:
    """Measure what the fabric adds to streams, how fast it goes and what it costs, on the simulated engine."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    file = json or RESULTS / f"{date.replace(':', '')}.json"
    results: dict[str, Any] = {"date": date, "machine": machine()}

    async def measure(part: Part) -> None:
        results[part] = result = await RUN[part](quick)
        file.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
        print(REPORT[part](result))
        print(f"\nOther processes kept {result['others_cores']:.2f} of {os.cpu_count()} cores busy meanwhile.\n")

    async def main(stop: asyncio.Event) -> int:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise UsageError(f"cannot write {file}: {error.strerror}. Choose another with --json FILE.") from None
        try:
            for each in [part] if part else Part:
                await process.until(stop, asyncio.create_task(measure(each)))
                if stop.is_set():
                    print("stopped", file=sys.stderr)
                    return 1
        finally:
            if not file.stat().st_size:
                file.unlink()
        print(f"All figures: {file}")
        return 0

    return process.run(main)


def main(argv: list[str] | None = None) -> int:
    return run_command(bench, argv, name="python -m bench")


if __name__ == "__main__":
    sys.exit(main())
