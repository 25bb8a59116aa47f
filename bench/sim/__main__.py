"""`python -m bench.sim`: how schedulers do on a trace, in a simulated fleet."""

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from bench.sim.figures import figures, flood_figures
from bench.sim.formats import Format, read
from bench.sim.hosts import DEFAULT_HOSTS, HostSpec, largest_gb, read_hosts
from bench.sim.policies import POLICIES
from bench.sim.workload import Ask, flooded, scaled, synthesise
from bench.sim.world import Outcome, World
from common.command import run_command
from common.errors import UsageError

SHOWN = (
    "goodput",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "cold_loads",
    "prefix_hit_ratio",
    "jain",
    "decision_us_p99",
)


def run(policy: str, asks: list[Ask], hosts: tuple[HostSpec, ...], seed: int) -> Outcome:
    """Play these requests with one policy."""
    return World(asks, hosts, POLICIES[policy](asks, hosts, seed)).run()


def simulate(
    trace: Annotated[Path, typer.Option(help="The requests to replay.")],
    form: Annotated[Format, typer.Option("--format", help="What the trace looks like.")],
    policy: Annotated[str, typer.Option(help=f"One or more, with commas between: {', '.join(POLICIES)}.")],
    hosts: Annotated[Path | None, typer.Option(help="TOML or JSON file of hosts. [eight of six kinds]")] = None,
    models: Annotated[int, typer.Option(min=1, max=1000, help="How many models there are.")] = 10,
    clients: Annotated[int, typer.Option(min=1, max=10_000, help="How many clients there are.")] = 40,
    rate_scale: Annotated[float, typer.Option(min=1e-6, help="Requests come so many times as often.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn: models, clients, random policies.")] = 0,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Only requests of the first minutes. [all]")] = None,
    flood: Annotated[
        float,
        typer.Option(
            min=0.0, max=100.0, help="One client asks so many times as much as all others in the middle third."
        ),
    ] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: an object, or a list of them for several.")] = False,
) -> int:
    """Judge schedulers: replay a trace against simulated hosts, through the real broker core under a virtual clock."""
    names = [name.strip() for name in policy.split(",")]
    if unknown := [name for name in names if name not in POLICIES]:
        raise UsageError(f"there is no policy {unknown[0]!r}; there are: {', '.join(POLICIES)}")
    fleet = read_hosts(hosts) if hosts else DEFAULT_HOSTS
    rows = read(trace, form)
    asks = scaled(
        synthesise(rows, models=models, clients=clients, seed=seed, size_gb_max=largest_gb(fleet)), rate_scale, minutes
    )
    results: list[dict[str, Any]] = []
    for name in names:
        outcome = run(name, asks, fleet, seed)
        result = {"policy": name, "seed": seed, "rate_scale": rate_scale, **figures(outcome)}
        if flood:
            more, client = flooded(asks, flood, seed)
            result |= flood_figures(run(name, more, fleet, seed), outcome, client, asks)
        results.append(result)
    if json:
        print(msgspec.json.format(msgspec.json.encode(results[0] if len(results) == 1 else results)).decode())
    else:
        print(table(results, [*SHOWN, "flood_ratio"] if flood else SHOWN))
    return 0


def table(results: list[dict[str, Any]], keys: Any) -> str:
    """One line each."""
    lines = [f"{'policy':18}" + "".join(f"{key:>17}" for key in keys)]
    for result in results:
        cells = ["-" if result[key] is None else f"{result[key]:.4g}" for key in keys]
        lines.append(f"{result['policy']:18}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return run_command(simulate, argv, name="python -m bench.sim")


if __name__ == "__main__":
    sys.exit(main())
