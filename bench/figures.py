"""What runs come to: quantiles, what the fabric adds, tokens/s, CPU per token, memory; and the report. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, NamedTuple

from bench.clients import Answer
from bench.fabric import Usage

DIRECT: Final = ("httpx", "lean")
FABRIC: Final = ("websocket", "weftline")
CLIENTS: Final = {
    "httpx": "direct, httpx",
    "lean": "direct, lean HTTP",
    "websocket": "fabric, lean WebSocket",
    "weftline": "fabric, AsyncClient",
}
SERVERS: Final = ("engine", "worker", "broker", "gateway")
PROCESSES: Final = (*SERVERS, "client")

ADDED_MS_MAX: Final = {"httpx": 1.0, "lean": 1.5}
"""The aim for the first token at p50 with one stream, by the direct client it is measured against."""
TOKENS_PER_S_MIN: Final = 20_000
"""The aim over WebSocket on two cores, engine and load generator included."""
STOP_MS_MAX: Final = 100
"""The aim from a client's `stop` until the engine counts no busy slot, at worst."""


class Quantiles(NamedTuple):
    """Of `n` samples, milliseconds."""

    p50: float
    p99: float
    n: int


class Spread(NamedTuple):
    """A figure over the rounds of a benchmark."""

    median: float
    min: float
    max: float


@dataclass(slots=True, frozen=True)
class Run:
    """What one client saw in one window, and what it cost meanwhile."""

    first_ms: list[float]
    gaps_ms: list[float]
    tokens: int
    window_s: float
    cpu_s: dict[str, float]
    rss_bytes: dict[str, int]
    machine_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.window_s


@dataclass(slots=True, frozen=True)
class Figures:
    """One client at one load, over all rounds."""

    load: str
    streams: int
    client: str
    first_ms: Quantiles
    gap_ms: Quantiles
    tokens_per_s: Spread
    cpu_us_per_token: dict[str, float]
    rss_mib: dict[str, float]
    """At its highest. The client's is left out: it holds every sample."""
    added_first_ms: dict[str, Spread]
    """At p50, by the direct client it is measured against; empty for a direct client."""


@dataclass(slots=True, frozen=True)
class Stops:
    """From telling all of `streams` to stop, `n` times, until the engine counts no busy slot."""

    client: str
    streams: int
    n: int
    ms: Spread


def run_of(
    answers: Iterable[Answer], from_s: float, to_s: float, before: Usage, after: Usage, *, asked_from_s: float
) -> Run:
    """The samples of the window: tokens that came in it with the gaps before them, and streams asked for in it, or
    before it from `asked_from_s` on.
    """
    first_ms: list[float] = []
    gaps_ms: list[float] = []
    tokens = 0
    for answer in answers:
        if asked_from_s <= answer.asked_s < to_s:
            first_ms.append((answer.came_s[0] - answer.asked_s) * 1000)
        previous_s: float | None = None
        for came_s in answer.came_s:
            if from_s <= came_s < to_s:
                tokens += 1
                if previous_s is not None:
                    gaps_ms.append((came_s - previous_s) * 1000)
            previous_s = came_s
    cpu_s = {name: after.cpu_s[name] - used for name, used in before.cpu_s.items()}
    return Run(first_ms, gaps_ms, tokens, to_s - from_s, cpu_s, after.rss_bytes, after.machine_s - before.machine_s)


def quantiles(samples: Iterable[float]) -> Quantiles:
    """By nearest rank; ValueError without samples."""
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("no samples")
    return Quantiles(ordered[(len(ordered) - 1) // 2], ordered[-(-99 * len(ordered) // 100) - 1], len(ordered))


def spread(values: Sequence[float]) -> Spread:
    """Over rounds; ValueError without any."""
    return Spread(median(values), min(values), max(values))


def others_cores(runs: Sequence[Run]) -> float:
    """How many cores processes that are not the benchmark's kept busy meanwhile."""
    others_s = sum(run.machine_s - sum(run.cpu_s.values()) for run in runs)
    return max(0.0, others_s / sum(run.window_s for run in runs))


def figures_of(load: str, streams: int, rounds: Sequence[Mapping[str, Run]]) -> list[Figures]:
    """All clients' figures at one load. `rounds`: of each round, the run of each client.

    What is added is the difference of the medians of two runs in the same round: what disturbs the machine for longer
    than a round disturbs both.
    """
    return [
        Figures(
            load=load,
            streams=streams,
            client=client,
            first_ms=quantiles(ms for runs in rounds for ms in runs[client].first_ms),
            gap_ms=quantiles(ms for runs in rounds for ms in runs[client].gaps_ms),
            tokens_per_s=spread([runs[client].tokens_per_s for runs in rounds]),
            cpu_us_per_token={
                process: 1e6
                * sum(runs[client].cpu_s[process] for runs in rounds)
                / sum(runs[client].tokens for runs in rounds)
                for process in PROCESSES
                if client in FABRIC or process in ("engine", "client")
            },
            rss_mib={name: max(runs[client].rss_bytes[name] for runs in rounds) / 2**20 for name in SERVERS},
            added_first_ms={
                direct: spread(
                    [quantiles(runs[client].first_ms).p50 - quantiles(runs[direct].first_ms).p50 for runs in rounds]
                )
                for direct in DIRECT
                if client in FABRIC
            },
        )
        for client in CLIENTS
    ]


@dataclass(slots=True, frozen=True)
class Aim:
    """What was aimed at, and what came of it."""

    text: str
    figure: Spread
    bound: float
    met: bool


def aims(paced: Sequence[Figures], fast: Sequence[Figures], stops: Sequence[Stops]) -> list[Aim]:
    """How the lean WebSocket client's figures stand to the aims."""
    alone = next(f for f in paced if f.client == "websocket" and f.streams == 1)
    found = [
        Aim(
            f"ms added to the first token at p50, one stream, against {CLIENTS[direct]}: at most {bound:g}",
            alone.added_first_ms[direct],
            bound,
            alone.added_first_ms[direct].median <= bound,
        )
        for direct, bound in ADDED_MS_MAX.items()
    ]
    for f in fast:
        if f.client == "websocket":
            text = f"tokens/s, {f.load}, through one broker and one gateway: at least {TOKENS_PER_S_MIN:,}"
            found.append(Aim(text, f.tokens_per_s, TOKENS_PER_S_MIN, f.tokens_per_s.median >= TOKENS_PER_S_MIN))
    for s in stops:
        if s.client == "websocket":
            text = f"ms from stop until the engine is idle, {s.streams} streams: at most {STOP_MS_MAX}, always"
            found.append(Aim(text, s.ms, STOP_MS_MAX, s.ms.max <= STOP_MS_MAX))
    return found


# The report -----------------------------------------------------------------------------------------------------------


def report(paced: Sequence[Figures], fast: Sequence[Figures], stops: Sequence[Stops]) -> str:
    """All tables and the aims, for people."""
    return "\n\n".join(
        [
            f"First token and gap between tokens, ms; added at p50, median (min … max) of rounds\n{_latencies(paced)}",
            f"Throughput, median (min … max) of rounds\n{_speeds(fast)}",
            f"From stop until the engine counts no busy slot, ms\n{_stops(stops)}",
            f"CPU, µs per token\n{_cpu([*paced, *fast])}",
            f"Resident memory, MiB, at its highest\n{_memory([*paced, *fast])}",
            f"Aims\n{aims_table(aims(paced, fast, stops))}",
        ]
    )


def _latencies(paced: Sequence[Figures]) -> str:
    head = ("load", "client", "first p50", "p99", "gap p50", "p99", "added vs httpx", "added vs lean HTTP")
    rows = [
        (
            f.load,
            CLIENTS[f.client],
            *(f"{ms:.2f}" for q in (f.first_ms, f.gap_ms) for ms in (q.p50, q.p99)),
            *(spread_text(f.added_first_ms[direct], "+.2f") if f.added_first_ms else "" for direct in DIRECT),
        )
        for f in paced
    ]
    return table(head, rows)


def _speeds(fast: Sequence[Figures]) -> str:
    head = ("load", "client", "tokens/s", "of httpx", "of lean HTTP")
    direct = {(f.load, f.client): f.tokens_per_s.median for f in fast}
    rows = [
        (
            f.load,
            CLIENTS[f.client],
            spread_text(f.tokens_per_s, ",.0f"),
            *(f"{f.tokens_per_s.median / direct[f.load, other]:.0%}" for other in DIRECT),
        )
        for f in fast
    ]
    return table(head, rows)


def _stops(stops: Sequence[Stops]) -> str:
    rows = [
        (CLIENTS[s.client], *(str(n) for n in (s.streams, s.n)), *(f"{ms:.1f}" for ms in (s.ms.median, s.ms.max)))
        for s in stops
    ]
    return table(("client", "streams", "stops", "p50", "max"), rows, left=1)


def _cpu(all_figures: Sequence[Figures]) -> str:
    rows = [
        (
            f.load,
            CLIENTS[f.client],
            *(f"{f.cpu_us_per_token[process]:.1f}" if process in f.cpu_us_per_token else "" for process in PROCESSES),
            f"{sum(f.cpu_us_per_token.values()):.1f}",
        )
        for f in all_figures
    ]
    return table(("load", "client", *PROCESSES, "all"), rows)


def _memory(all_figures: Sequence[Figures]) -> str:
    highest = tuple(f"{max(f.rss_mib[process] for f in all_figures):.0f}" for process in SERVERS)
    return table(SERVERS, [highest], left=0)


def aims_table(found: Sequence[Aim]) -> str:
    rows = [
        ("met" if aim.met else "missed", spread_text(aim.figure, ",.0f" if aim.bound > 100 else ".2f"), aim.text)
        for aim in found
    ]
    return table(("aim", "figure", ""), rows, left=3)


def spread_text(values: Spread, form: str) -> str:
    return f"{values.median:{form}} ({values.min:{form}} … {values.max:{form}})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """Columns as wide as they need; the first `left` are texts."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "".join(
            f"  {cell:{'<' if number < left else '>'}{width}}"
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join(map(line, (head, *rows)))
