"""The client protocol: the same streams straight at the engine and through the fabric, in one run.

Clients take turns in short runs (A B C D, A B C D, …), so that what else happens on the machine hits all of them. A run
is a warm-up, a window that counts, and the end of the streams then under way. Every token is checked against what the
simulated engine is known to say.
"""

import asyncio
import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from bench import clients, fabric, figures
from bench.clients import PROMPT, Answer, Generate, Slots, stopping
from bench.fabric import BenchError, Fabric
from bench.figures import Figures, Run, Stops, aims, figures_of, others_cores, run_of, spread
from workers.embedded.simulated import transcript

OPEN: Final[dict[str, Callable[[Fabric, int], AbstractAsyncContextManager[Generate]]]] = {
    "httpx": clients.over_httpx,
    "lean": clients.over_lean_http,
    "websocket": clients.over_websocket,
    "weftline": clients.over_weftline_client,
}
RUN_S_MAX: Final = 30.0
RUNS_MAX: Final = 3
STOPPED: Final = ("lean", "websocket")
STOP_STREAMS: Final = 8
STOP_TIMES: Final = 20
STOP_TOKENS: Final = 100_000
"""More than a stream brings before it is stopped."""
STOP_AFTER_S: Final = 0.2
STOP_POLL_S: Final = 0.001


@dataclass(slots=True, frozen=True, kw_only=True)
class Load:
    """So many streams at once of so many tokens each, another after `pause_s` in the place of one that ended."""

    name: str
    streams: int
    tokens: int
    tokens_per_s: float
    window_s: float
    pause_s: float = 0.0
    warm_up_s: float = 0.2
    firsts_of_warm_up: bool = False
    """Whether first tokens count from the beginning: a stream may take longer than a window."""

    @property
    def answer_s(self) -> float:
        """How long a paced stream takes at least; its first token comes at once."""
        return (self.tokens - 1) / self.tokens_per_s if self.tokens_per_s else 0.0


def loads(*, quick: bool) -> tuple[list[Load], list[Load], list[Load]]:
    """What is run, by fabric: paced loads, which measure latency; one that offers more than the aim, token by token;
    and one at full speed, where the engine writes as many lines at once as are ready.
    """
    window_s = 0.4 if quick else 1.5

    def load(name: str, streams: int, tokens: int, tokens_per_s: float, pause_s: float = 0.0) -> Load:
        return Load(
            name=name, streams=streams, tokens=tokens, tokens_per_s=tokens_per_s, window_s=window_s, pause_s=pause_s
        )

    # Alone, a stream is short: many first tokens are needed. No connection asks more than 50 times a second.
    several = {64: 12} if quick else {16: 30, 64: 30}
    paced = [load(f"{streams} at 50/s", streams, n, 50, 0.005) for streams, n in ({1: 2} | several).items()]
    return paced, [load("64 at 400/s", 64, 100 if quick else 200, 400)], [load("16 at full speed", 16, 1000, 0)]


async def run(load: Load, generate: Generate, target: Fabric) -> Run:
    """One run of one client; another if a machine that stood still left nothing to judge by.

    Raises:
        BenchError: a stream failed, or brought other tokens than the engine's, or RUNS_MAX runs brought nothing.
    """
    for _ in range(RUNS_MAX):
        result = await _run(load, generate, target)
        if result.first_ms and result.gaps_ms:
            return result
    raise BenchError(f"no stream began, or none went on, in {RUNS_MAX} windows of {load.window_s:g} s")


async def _run(load: Load, generate: Generate, target: Fabric) -> Run:
    answers: list[Answer] = []
    running = True

    async def stream(number: int) -> None:
        # They begin one after another over the length of one, so that their tokens are spread evenly.
        await asyncio.sleep(load.answer_s * number / load.streams)
        while running:
            answers.append(await generate(load.tokens))
            await asyncio.sleep(load.pause_s)

    gc.collect()
    try:
        async with asyncio.timeout(RUN_S_MAX), asyncio.TaskGroup() as group:
            for number in range(load.streams):
                group.create_task(stream(number))
            began_s = perf_counter()
            await asyncio.sleep(load.answer_s + load.warm_up_s)
            before, from_s = target.usage(), perf_counter()
            await asyncio.sleep(load.window_s)
            after, to_s = target.usage(), perf_counter()
            running = False
    except TimeoutError:
        raise BenchError(f"streams were still running after {RUN_S_MAX:g} s") from None
    expected = transcript(PROMPT, 0, load.tokens)
    for answer in answers:
        if "".join(answer.tokens) != expected:
            raise BenchError(f"a stream brought other tokens than the engine's: {''.join(answer.tokens)[:200]!r}")
    asked_from_s = began_s if load.firsts_of_warm_up else from_s
    return run_of(answers, from_s, to_s, before, after, asked_from_s=asked_from_s)


async def measure(loads: Sequence[Load], rounds: int, folder: Path) -> tuple[list[Figures], float]:
    """Run all clients at loads of one speed on one fabric: their figures, and how many cores others kept busy.

    Raises:
        BenchError: the fabric did not start, or a stream was not what it should be.
    """
    found: list[Figures] = []
    runs: list[Run] = []
    slots = max(load.streams for load in loads)
    async with fabric.running(folder, tokens_per_s=loads[0].tokens_per_s, slots=slots) as target:
        for load in loads:
            results: list[dict[str, Run]] = []
            for number in range(1, rounds + 1):
                print(f"{load.name}, round {number} of {rounds}", file=sys.stderr, flush=True)
                results.append({})
                for client, opened in OPEN.items():
                    async with opened(target, load.streams) as generate:
                        results[-1][client] = await run(load, generate, target)
                        runs.append(results[-1][client])
            found += figures_of(load.name, load.streams, results)
    return found, others_cores(runs)


async def measure_stops(folder: Path, times: int = STOP_TIMES) -> list[Stops]:
    """How long a stop takes to reach the engine: STOP_STREAMS streams of 50 tokens/s, all stopped at once.

    Measured by the engine's own count of busy slots, asked for every STOP_POLL_S: a figure is late by one poll at most.

    Raises:
        BenchError: the fabric did not start, or its streams did not, or did not stop.
    """
    samples: dict[str, list[float]] = {client: [] for client in STOPPED}
    async with (
        fabric.running(folder, tokens_per_s=50, slots=STOP_STREAMS) as target,
        Slots(target.engine_url) as slots,
    ):

        async def until(count: int, why: str) -> None:
            try:
                async with asyncio.timeout(RUN_S_MAX):
                    while await slots.busy() != count:  # noqa: ASYNC110 - the engine tells nobody
                        await asyncio.sleep(STOP_POLL_S)
            except TimeoutError:
                raise BenchError(f"the engine's slots were not {why} within {RUN_S_MAX:g} s") from None

        for number in range(1, times + 1):
            print(f"stop, {number} of {times}", file=sys.stderr, flush=True)
            for client in STOPPED:
                async with stopping(client, target, STOP_STREAMS) as (generate, stop), asyncio.TaskGroup() as group:
                    for _ in range(STOP_STREAMS):
                        group.create_task(generate(STOP_TOKENS))
                    await until(STOP_STREAMS, "all busy")
                    # Somewhere between two tokens, another place each time.
                    await asyncio.sleep(STOP_AFTER_S + number / times / 50)
                    stopped_s = perf_counter()
                    stop()
                    await until(0, "free")
                    samples[client].append((perf_counter() - stopped_s) * 1000)
    return [Stops(client, STOP_STREAMS, times, spread(ms)) for client, ms in samples.items()]


async def bench(*, quick: bool) -> dict[str, Any]:
    """Run everything. The result is for `report`, and for a file. Raises BenchError.

    `others_cores` is how many cores processes that are not ours kept busy, at its highest of the loads.
    """
    rounds = 2 if quick else 3
    groups = loads(quick=quick)
    with tempfile.TemporaryDirectory(prefix="weftline-bench-") as folder:
        results = [await measure(group, rounds, Path(folder)) for group in groups]
        stops = await measure_stops(Path(folder), STOP_TIMES // 4 if quick else STOP_TIMES)
    (paced, _), (fast, _), (full, _) = results
    return {
        "others_cores": max(others for _, others in results),
        "rounds": rounds,
        "loads": [load for group in groups for load in group],
        "paced": paced,
        "fast": [*fast, *full],
        "stops": stops,
        "aims": aims(paced, [*fast, *full], stops),
    }


def report(result: dict[str, Any]) -> str:
    """What `bench` found, for people."""
    return figures.report(result["paced"], result["fast"], result["stops"])
