"""`make sim`: all policies on both traces, over loads around the knee and over seeds, as tables and pictures."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Final

import msgspec
import typer
from msgspec.structs import replace

from bench.sim.figures import figures, flood_figures, percentile, ttft_s
from bench.sim.formats import Format, Row, read
from bench.sim.hosts import DEFAULT_HOSTS, HostSpec, largest_gb
from bench.sim.pictures import Axis, chart
from bench.sim.policies import POLICIES
from bench.sim.workload import flooded, scaled, synthesise
from bench.sim.world import World
from common.command import run_command
from common.errors import UsageError

SAMPLES: Final = Path(__file__).parent / "traces"
DOCS: Final = Path(__file__).parents[2] / "docs"
BOUNDS: Final = ("oracle",)
OWN: Final = ("weftline", "fifo-late")
BASELINES: Final = tuple(name for name in POLICIES if name not in (*OWN, *BOUNDS))
REFERENCES: Final = ("warm-first", "fifo-late")
"""The best of the others, by which the knee is found."""
KNEE: Final = 0.9
"""The knee is the load at which the better of them still has so much of its goodput at the lightest load."""
LIGHTEST_PER_S: Final = 0.05
LOADS: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
LOADS_QUICK: Final = (0.5, 1.0, 1.5)
MODERATE: Final = 0.5
LARGE_CACHE_GIB: Final = 256.0
SHOWN: Final = ("goodput", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "cold_loads", "prefix_hit_ratio", "jain")
# Student's t for 95 %, by degrees of freedom.
T95: Final = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(slots=True, frozen=True)
class Run:
    """One run: `load` in knees, `scale` of the trace's rate."""

    trace: tuple[Path, Format]
    policy: str
    scale: float
    seed: int
    requests: int
    load: float = 1.0
    flood: float = 0.0
    cache_gib: float | None = None


@lru_cache(maxsize=2)
def _rows(trace: tuple[Path, Format]) -> list[Row]:
    return read(*trace)


def play(run: Run) -> dict[str, Any]:
    """Its figures, and the percentiles of its times to the first token."""
    hosts: tuple[HostSpec, ...] = DEFAULT_HOSTS
    if run.cache_gib is not None:
        hosts = tuple(replace(host, cache_ram_gib=run.cache_gib) for host in hosts)
    rows = _rows(run.trace)[: run.requests]
    asks = scaled(
        synthesise(rows, models=10, clients=40, seed=run.seed, size_gb_max=largest_gb(hosts)), run.scale, None
    )
    outcome = World(asks, hosts, POLICIES[run.policy](asks, hosts, run.seed)).run()
    result = figures(outcome)
    ttft = sorted(seconds for job in outcome.jobs if (seconds := ttft_s(job)) is not None)
    result["ttft_s"] = [percentile(ttft, percent) for percent in range(1, 101)]
    if run.flood:
        more, client = flooded(asks, run.flood, run.seed)
        result |= flood_figures(
            World(more, hosts, POLICIES[run.policy](more, hosts, run.seed)).run(), outcome, client, asks
        )
    return result


def knee(trace: tuple[Path, Format], seed: int, requests: int) -> float:
    """The scale of the trace's rate at this seed's knee, to 5 %."""
    rows = _rows(trace)[:requests]
    native_per_s = len(rows) / max(rows[-1].at_s, 1.0)

    def goodput(scale: float) -> float:
        return max(float(play(Run(trace, name, scale, seed, requests))["goodput"]) for name in REFERENCES)

    low = LIGHTEST_PER_S / native_per_s
    wanted = KNEE * goodput(low)
    high = low * 4
    while goodput(high) >= wanted:
        low, high = high, high * 2
    while high > low * 1.05:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if goodput(middle) >= wanted else (low, middle)
    return low


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t)."""
    if len(values) < 2:
        return fmean(values), 0.0
    return fmean(values), T95[min(len(values), len(T95)) - 1] * stdev(values) / math.sqrt(len(values))


Results = dict[tuple[str, float], list[dict[str, Any]]]
"""By policy and load, one for each seed."""


def lines(results: Results, policies: Iterable[str], load: float, keys: Sequence[str]) -> Iterator[str]:
    """A table of means, with half the widths of their confidence intervals."""
    yield f"{'policy':18}" + "".join(f"{key:>25}" for key in keys)
    for policy in policies:
        cells = []
        for key in keys:
            values = [result[key] for result in results[policy, load] if result[key] is not None]
            mean, half = interval(values) if values else (math.nan, math.nan)
            cells.append(f"{mean:.3g} ±{half:.2g}")
        yield f"{policy:18}" + "".join(f"{cell:>25}" for cell in cells)


def best_baseline(results: Results, load: float) -> str:
    """By goodput."""
    return max(BASELINES, key=lambda name: fmean(result["goodput"] for result in results[name, load]))


def compare(
    azure: Annotated[Path, typer.Option(help="A trace of Azure's.")] = SAMPLES / "azure-conversation.csv",
    mooncake: Annotated[Path, typer.Option(help="A trace of Mooncake's.")] = SAMPLES / "mooncake-conversation.jsonl",
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    requests: Annotated[int, typer.Option(min=10, help="Of each trace, the first.")] = 2000,
    processes: Annotated[int, typer.Option(min=1, help="How many runs at once.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer loads, seeds and requests.")] = False,
    pictures: Annotated[Path, typer.Option(help="Folder of the pictures.")] = DOCS,
    json: Annotated[Path | None, typer.Option(help="Write all figures there.", metavar="FILE")] = None,
) -> int:
    """Compare all policies over loads around the knee, with 95 % confidence intervals over seeds."""
    loads = LOADS_QUICK if quick else LOADS
    if quick:
        seeds, requests = min(seeds, 2), min(requests, 500)
    if not pictures.is_dir():
        raise UsageError(f"there is no folder {pictures}")
    written: dict[str, Any] = {}
    with ProcessPoolExecutor(processes) as pool:
        for trace in ((azure, Format.AZURE), (mooncake, Format.MOONCAKE)):
            at = list(pool.map(knee, *zip(*((trace, seed, requests) for seed in range(seeds)), strict=True)))
            runs = [
                Run(trace, policy, scale * load, seed, requests, load)
                for load in loads
                for policy in POLICIES
                for seed, scale in enumerate(at)
            ]
            results: Results = {}
            for run, result in zip(runs, pool.map(play, runs), strict=True):
                results.setdefault((run.policy, run.load), []).append(result)
            report(trace[1], at, results, loads)
            draw(trace[1], results, loads, pictures)
            extra = {"flood": _extra(pool, trace, at, requests, flood=1.0)}
            print(f"\n{trace[1]}, at {MODERATE:g} of the knee, one client floods with as much as all others ask:")
            print("\n".join(lines(extra["flood"], FEW, MODERATE, FLOOD_SHOWN)), flush=True)
            if any(row.blocks for row in _rows(trace)):
                extra["large_cache"] = cached = _extra(pool, trace, at, requests, cache_gib=LARGE_CACHE_GIB)
                print(f"\n{trace[1]}, at {MODERATE:g} of the knee, {LARGE_CACHE_GIB:g} GiB of RAM a model for prompts:")
                print("\n".join(lines(cached, FEW, MODERATE, CACHE_SHOWN)), flush=True)
            written[trace[1]] = {
                "knee_rate_scales": at,
                **{
                    name: [{"policy": policy, "load": load, "seeds": found} for (policy, load), found in part.items()]
                    for name, part in {"loads": results, **extra}.items()
                },
            }
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(written)) + b"\n")
    return 0


FEW: Final = ("weftline", "warm-first", "fifo-late", "cache-aware", "oracle")
FLOOD_SHOWN: Final = ("calm_others_ttft_p99_s", "flood_others_ttft_p99_s", "flood_ratio")
CACHE_SHOWN: Final = ("goodput", "prefix_hit_ratio", "prefix_hit_bound", "prefix_hit_bound_lru")


def _extra(
    pool: ProcessPoolExecutor, trace: tuple[Path, Format], at: Sequence[float], requests: int, **more: Any
) -> Results:
    """A special case, at moderate load and for a few policies."""
    runs = [Run(trace, name, scale * MODERATE, seed, requests, **more) for name in FEW for seed, scale in enumerate(at)]
    results: Results = {}
    for run, result in zip(runs, pool.map(play, runs), strict=True):
        results.setdefault((run.policy, MODERATE), []).append(result)
    return results


def report(form: Format, at: Sequence[float], results: Results, loads: Sequence[float]) -> None:
    """Tables of a trace, and weftline beside the best of the others."""
    print(f"\n== {form}: the knees are at {', '.join(f'{scale:.3g}' for scale in at)} of the trace's rate ==")
    for load in loads:
        per_s = fmean(result["requests_per_s"] for result in results["weftline", load])
        print(f"\n{form}, {load:g} of the knee, {per_s:.3g} requests/s")
        print("\n".join(lines(results, POLICIES, load, SHOWN)))
    for load in loads:
        ours, oracle = results["weftline", load], results["oracle", load]
        # Of the same seed, so that what differs between seeds does not count.
        beside = []
        for other in (best_baseline(results, load), "fifo-late"):
            pairs = zip(ours, results[other, load], strict=True)
            ratio, half = interval([our["goodput"] / (their["goodput"] or math.nan) for our, their in pairs])
            beside.append(f"{ratio:.3f} ±{half:.3f} of {other}'s")
        colds = fmean(o["cold_loads"] / b["cold_loads"] for o, b in zip(ours, oracle, strict=True))
        bound = fmean(o["prefix_hit_bound"] for o in ours)
        hits = f", prefix hits {fmean(o['prefix_hit_ratio'] for o in ours) / bound:.2f} of the bound" if bound else ""
        print(
            f"{form}, {load:g} of the knee: goodput {', '.join(beside)}, "
            f"{colds:.2f} of the oracle's cold loads{hits}, jain {min(o['jain'] for o in ours):.4f} at least, "
            f"decisions {fmean(o['decision_us_p99'] for o in ours):.0f} us p99",
            flush=True,
        )


def draw(form: Format, results: Results, loads: Sequence[float], folder: Path) -> None:
    """Goodput against load, and how long the first token takes at the knee."""
    goodput = {
        policy: [(load, *interval([result["goodput"] for result in results[policy, load]])) for load in loads]
        for policy in POLICIES
    }
    x = Axis("load, in knees", 0, max(loads) * 1.05, loads)
    y = Axis("goodput: first token ≤ 5 s and ≤ 100 ms a token", 0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1])
    picture = chart(f"Goodput, {form} trace, 8 hosts, 10 models (95 % intervals)", x, y, goodput)
    (folder / f"sim-goodput-{form}.svg").write_text(picture, encoding="utf-8")
    load = min(loads, key=lambda load: abs(load - 1))
    ttft = {
        policy: [
            (fmean(result["ttft_s"][percent - 1] for result in results[policy, load]), percent / 100, 0.0)
            for percent in range(1, 101)
        ]
        for policy in POLICIES
    }
    x = Axis("time to the first token, s", 0.03, 3000, [0.1, 1, 5, 10, 100, 1000], log=True)
    y = Axis("share of requests", 0, 1, [0, 0.25, 0.5, 0.75, 0.9, 1])
    picture = chart(f"Time to the first token, {form} trace, at the knee", x, y, ttft)
    (folder / f"sim-ttft-{form}.svg").write_text(picture, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    return run_command(compare, argv, name="python -m bench.sim.compare")


if __name__ == "__main__":
    sys.exit(main())
