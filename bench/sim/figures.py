"""The figures of a run. Each is defined where it is computed; docs/scheduling.md explains them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Final

from bench.sim.hosts import Job
from bench.sim.workload import Ask, flood_period, one_cache
from bench.sim.world import Outcome, Sample

TTFT_GOOD_S: Final = 5.0
TPOT_GOOD_S: Final = 0.1


def figures(outcome: Outcome) -> dict[str, Any]:
    """All of them; None where there is nothing to measure."""
    jobs = outcome.jobs
    ttft = sorted(seconds for job in jobs if (seconds := ttft_s(job)) is not None)
    tpot = sorted(seconds for job in jobs if (seconds := tpot_s(job)) is not None)
    # Told at submission, against the wait until the lease.
    eta = sorted(
        abs(job.told_eta_s - (job.leased_at - job.ask.at_s))
        for job in jobs
        if job.told_eta_s is not None and job.leased_at is not None
    )
    ran = [job for job in jobs if job.first_at is not None]
    prompt_tokens = sum(job.ask.prompt_tokens for job in ran)
    offered_cost: Counter[str] = Counter()
    for job in jobs:
        offered_cost[job.ask.client] += job.ask.cost
    return {
        "completed": sum(job.end_at is not None for job in jobs),
        "shed": sum(job.shed for job in jobs),
        "goodput": sum(map(good, jobs)) / len(jobs) if jobs else None,
        "ttft_p50_s": percentile(ttft, 50),
        "ttft_p95_s": percentile(ttft, 95),
        "ttft_p99_s": percentile(ttft, 99),
        "tpot_p50_s": percentile(tpot, 50),
        "tpot_p99_s": percentile(tpot, 99),
        "cold_loads": sum(host.loads for host in outcome.hosts),
        "prefix_hit_ratio": sum(job.hit for job in ran) / prompt_tokens if prompt_tokens else None,
        "jain": jain(outcome.delivered, offered_cost),
        "max_service_gap_tokens": service_gap(outcome.samples),
        # The share of the loaded time in which a host computes for somebody.
        "utilisation": outcome.computing_s / (len(outcome.hosts) * outcome.end_s) if outcome.end_s else None,
        "eta_error_p50": percentile(eta, 50),
        "eta_error_p90": percentile(eta, 90),
        "decision_us_p99": percentile(sorted(outcome.decisions_us), 99),
        # Beside those that were asked for:
        "offered": len(jobs),
        "requests_per_s": len(jobs) / jobs[-1].ask.at_s if jobs and jobs[-1].ask.at_s else None,
        "prefix_hit_bound": one_cache(job.ask for job in jobs),
        "prefix_hit_bound_lru": one_cache((job.ask for job in jobs), outcome.cache_blocks),
        "cold_loads_bound": len({job.ask.model.name for job in jobs}),
        "eta_told": len(eta),
        "decision_us_p50": percentile(sorted(outcome.decisions_us), 50),
    }


def ttft_s(job: Job) -> float | None:
    """From the submission to the first token."""
    return None if job.first_at is None else job.first_at - job.ask.at_s


def tpot_s(job: Job) -> float | None:
    """Per token after the first; None for fewer than two."""
    if job.first_at is None or job.end_at is None or job.ask.output_tokens < 2:
        return None
    return (job.end_at - job.first_at) / (job.ask.output_tokens - 1)


def good(job: Job) -> bool:
    """Whether it ended, began within 5 s and then took at most 100 ms a token."""
    first_s = ttft_s(job)
    return (
        job.end_at is not None and first_s is not None and first_s <= TTFT_GOOD_S and (tpot_s(job) or 0) <= TPOT_GOOD_S
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Of sorted values, the smallest that so many percent do not exceed."""
    if not values:
        return None
    return values[max(0, -int(-len(values) * percent // 100) - 1)]


def fair_shares(total: float, demands: Mapping[str, float]) -> dict[str, float]:
    """Max-min fair: what is there goes around equally, but nobody gets more than it demands."""
    shares: dict[str, float] = {}
    for index, (name, demand) in enumerate(sorted(demands.items(), key=lambda item: (item[1], item[0]))):
        shares[name] = min(demand, total / (len(demands) - index))
        total -= shares[name]
    return shares


def jain(served: Mapping[str, float], demands: Mapping[str, float]) -> float | None:
    """Jain's index of what each client was served by what its max-min fair share of all that was served is."""
    shares = fair_shares(sum(served.values()), demands)
    ratios = [served.get(name, 0.0) / share for name, share in shares.items() if share > 0]
    squares = sum(ratio**2 for ratio in ratios)
    return sum(ratios) ** 2 / (len(ratios) * squares) if squares else None


def service_gap(samples: Iterable[Sample]) -> int:
    """The largest difference of what two clients got in a time in which both had requests waiting (VTC, 2401.00588)."""
    gap = 0.0
    runs: dict[tuple[str, str], tuple[float, float]] = {}
    for sample in samples:
        before, runs = runs, {}
        for pair in combinations(sorted(sample.backlogged), 2):
            ahead = sample.served[pair[0]] - sample.served[pair[1]]
            low, high = before.get(pair, (ahead, ahead))
            low, high = runs[pair] = min(low, ahead), max(high, ahead)
            gap = max(gap, high - low)
    return round(gap)


def flood_figures(flooded: Outcome, calm: Outcome, client: str, asks: Sequence[Ask]) -> dict[str, Any]:
    """What one client's flood did to the first tokens of the others who came meanwhile."""
    start, end = flood_period(asks)

    def p99(outcome: Outcome) -> float | None:
        others = [job for job in outcome.jobs if job.ask.client != client and start <= job.ask.at_s < end]
        return percentile(sorted(seconds for job in others if (seconds := ttft_s(job)) is not None), 99)

    with_s, without_s = p99(flooded), p99(calm)
    return {
        "flood_others_ttft_p99_s": with_s,
        "calm_others_ttft_p99_s": without_s,
        "flood_ratio": with_s / without_s if with_s is not None and without_s else None,
    }
