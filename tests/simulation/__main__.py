"""`python -m tests.simulation [--requests N] [--seed S] [--storm|--single]`: play worlds until N requests were made.

A failing world prints its seed, and `--requests 0 --seed S` with the kind it names plays that one again: the clock, the
lines and the dice are its own, and this process runs with PYTHONHASHSEED=0, so that nothing else can differ.
"""

import argparse
import os
import sys
import time
from collections import Counter

from broker.state import InvariantError
from tests.simulation.world import Violation, World

WORLD_REQUESTS = 400


def main() -> int:
    """Play; exit status 1 if a promise was broken."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            os.environ | {"PYTHONHASHSEED": "0"},
        )
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--storm", action="store_true", help="only worlds of many faults at once")
    kind.add_argument("--single", action="store_true", help="only worlds of one fault after the other")
    options = parser.parse_args()
    figures: Counter[str] = Counter()
    started, seed = time.monotonic(), options.seed
    while True:
        storm = options.storm or (not options.single and seed % 2 == 1)
        world = World(seed, WORLD_REQUESTS, storm)
        try:
            figures += world.run()
        except (Violation, InvariantError, AssertionError, RuntimeError, KeyError) as error:
            print(f"seed {seed} ({'storm' if storm else 'single'}): {type(error).__name__}: {error}")
            print(f"again: python -m tests.simulation --requests 0 --seed {seed} --{'storm' if storm else 'single'}")
            return 1
        seed += 1
        if figures["requests"] >= options.requests:
            break
    for name, number in sorted(figures.items()):
        print(f"{number:>10,}  {name}")
    worlds, took_s = seed - options.seed, time.monotonic() - started
    print(f"{worlds} worlds, {figures['requests']:,} requests, {took_s:.0f} s: no promise broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
