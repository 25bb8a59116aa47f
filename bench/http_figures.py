"""What runs over HTTP come to: what each way adds to the direct one, lines/s, CPU and memory; and the report. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.clients import Way
from bench.figures import Aim, Quantiles, Run, Spread, aims_table, quantiles, spread, spread_text, table

LINES_PER_S_MIN: Final = 30_000
"""The aim over HTTP on two cores, engine and load generator included."""
ADDED_STREAMS: Final = 50
ADDED_P50_MS_MAX: Final = 1.0
ADDED_P99_MS_MAX: Final = 5.0
"""The aims for the first token with ADDED_STREAMS paced streams."""


@dataclass(slots=True, frozen=True)
class HttpFigures:
    """One way at one load, over all rounds. What a way adds, and costs, is None for a direct one."""

    load: str
    streams: int
    way: str
    first_ms: Quantiles
    gap_ms: Quantiles
    lines_per_s: Spread
    added_p50_ms: Spread | None
    added_p99_ms: Spread | None
    of_direct: float | None
    """Lines/s as a part of the direct way's."""
    cpu_us_per_line: float | None
    rss_mib: float | None
    """At its highest, of all that is between client and engine."""


def http_figures(
    load: str, streams: int, ways: Sequence[Way], rounds: Sequence[Mapping[str, Run]]
) -> list[HttpFigures]:
    """Figures of the ways that came through all rounds; direct ones always do.

    What is added is the difference of two quantiles of the same round.
    """
    return [_figures(load, streams, way, rounds) for way in ways if all(way.name in runs for runs in rounds)]


def _figures(load: str, streams: int, way: Way, rounds: Sequence[Mapping[str, Run]]) -> HttpFigures:
    runs = [each[way.name] for each in rounds]
    lines_per_s = spread([run.tokens_per_s for run in runs])
    p50_ms = p99_ms = of_direct = cpu_us = rss_mib = None
    if way.direct:
        directs = [each[way.direct] for each in rounds]
        pairs = [
            (quantiles(run.first_ms), quantiles(direct.first_ms)) for run, direct in zip(runs, directs, strict=True)
        ]
        p50_ms = spread([run.p50 - direct.p50 for run, direct in pairs])
        p99_ms = spread([run.p99 - direct.p99 for run, direct in pairs])
        of_direct = lines_per_s.median / spread([run.tokens_per_s for run in directs]).median
        cpu_us = 1e6 * sum(run.cpu_s[name] for run in runs for name in way.processes) / sum(run.tokens for run in runs)
        rss_mib = max(sum(run.rss_bytes[name] for name in way.processes) for run in runs) / 2**20
    return HttpFigures(
        load=load,
        streams=streams,
        way=way.name,
        first_ms=quantiles(ms for run in runs for ms in run.first_ms),
        gap_ms=quantiles(ms for run in runs for ms in run.gaps_ms),
        lines_per_s=lines_per_s,
        added_p50_ms=p50_ms,
        added_p99_ms=p99_ms,
        of_direct=of_direct,
        cpu_us_per_line=cpu_us,
        rss_mib=rss_mib,
    )


def http_aims(paced: Sequence[HttpFigures], fast: Sequence[HttpFigures], fabric: str) -> list[Aim]:
    """How the figures of the way `fabric` stand to the aims; those of a load that was not run are left out."""
    found: list[Aim] = []
    for f in paced:
        if f.way == fabric and f.streams == ADDED_STREAMS:
            for quantile, bound, added in (
                ("p50", ADDED_P50_MS_MAX, f.added_p50_ms),
                ("p99", ADDED_P99_MS_MAX, f.added_p99_ms),
            ):
                assert added is not None
                text = f"ms added to the first token at {quantile}, {f.load}: at most {bound:g}"
                found.append(Aim(text, added, bound, added.median <= bound))
    for f in fast:
        if f.way == fabric:
            text = f"lines/s, {f.load}, through one broker and one gateway: at least {LINES_PER_S_MIN:,}"
            found.append(Aim(text, f.lines_per_s, LINES_PER_S_MIN, f.lines_per_s.median >= LINES_PER_S_MIN))
    return found


# The report -----------------------------------------------------------------------------------------------------------


def http_report(
    paced: Sequence[HttpFigures],
    fast: Sequence[HttpFigures],
    found: Sequence[Aim],
    versions: Mapping[str, str],
    missing: Mapping[str, str],
) -> str:
    """All tables, who is in them, and the aims."""
    parts = [
        f"HTTP: first token and gap between lines, ms; added to direct, median (min … max) of rounds\n"
        f"{_latencies(paced)}",
        f"HTTP: throughput, median (min … max) of rounds\n{_speeds(fast)}",
        f"HTTP: what is between client and engine: CPU, µs per line, and resident memory at its highest, MiB\n"
        f"{_costs([*paced, *fast])}",
        f"Aims\n{aims_table(found)}",
    ]
    if versions:
        parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    parts += [f"{name} is left out: {why}" for name, why in missing.items()]
    return "\n\n".join(parts)


def _latencies(figures: Sequence[HttpFigures]) -> str:
    head = ("load", "way", "first p50", "p99", "gap p50", "p99", "added at p50", "at p99")
    rows = [
        (
            f.load,
            f.way,
            *(f"{ms:.2f}" for q in (f.first_ms, f.gap_ms) for ms in (q.p50, q.p99)),
            *(spread_text(added, "+.2f") if added else "" for added in (f.added_p50_ms, f.added_p99_ms)),
        )
        for f in figures
    ]
    return table(head, rows)


def _speeds(figures: Sequence[HttpFigures]) -> str:
    rows = [
        (
            f.load,
            f.way,
            spread_text(f.lines_per_s, ",.0f"),
            "" if f.of_direct is None else f"{f.of_direct:.0%}",
            *(f"{ms:.2f}" for ms in (f.first_ms.p50, f.first_ms.p99)),
        )
        for f in figures
    ]
    return table(("load", "way", "lines/s", "of direct", "first p50", "p99"), rows)


def _costs(figures: Sequence[HttpFigures]) -> str:
    """A row per way, a column per load."""
    loads = list(dict.fromkeys(f.load for f in figures))
    by_way: dict[str, dict[str, HttpFigures]] = {}
    for f in figures:
        by_way.setdefault(f.way, {})[f.load] = f
    rows = []
    for way, found in by_way.items():
        rss_mib = [f.rss_mib for f in found.values() if f.rss_mib is not None]
        if rss_mib:
            cpu_us = {load: f.cpu_us_per_line for load, f in found.items()}
            cells = ("" if (us := cpu_us.get(load)) is None else f"{us:.1f}" for load in loads)
            rows.append((way, *cells, f"{max(rss_mib):.0f}"))
    return table(("way", *loads, "memory"), rows, left=1)
