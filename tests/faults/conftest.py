"""What the tests of faults share: a cluster for each test, and what every one of them asserts in the end."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cluster import Cluster, until

TERMINAL_S = 10.0
"""I1."""
GROWTH_MAX = 0.10
"""I4."""
NOISE_BYTES = 8 * 2**20
NOISE_DESCRIPTORS = 4


@contextlib.asynccontextmanager
async def sound(folder: Path, **options: Any) -> AsyncIterator[Cluster]:
    """A cluster that is healed after the block and then must be as the invariants want it.

    I1: each request had exactly one terminal. I2: events contiguous, none twice, none foreign. I4: memory and
    descriptors of the parts that lived through it are back, and engines idle. (I3, a usage row for each terminal, waits
    for usage records.)
    """
    cluster = Cluster(folder, **options)
    async with cluster.running():
        before = cluster.usage()
        starts = {name: part.starts for name, part in cluster.parts.items()}
        yield cluster
        await cluster.heal()
        await cluster.idle(TERMINAL_S)
        report = cluster.check()
        assert report.ok, report.findings
        survivors = [name for name, part in cluster.parts.items() if part.starts == starts[name]]

        def back() -> bool:
            after = cluster.usage()
            return all(
                after[name][0] <= max(before[name][0] * (1 + GROWTH_MAX), before[name][0] + NOISE_BYTES)
                and after[name][1] <= max(before[name][1] * (1 + GROWTH_MAX), before[name][1] + NOISE_DESCRIPTORS)
                for name in survivors
            )

        await until(back, f"memory and descriptors are back: before {before}", TERMINAL_S)


Clusters = Callable[..., AbstractAsyncContextManager[Cluster]]


@pytest.fixture
def clusters(tmp_path: Path) -> Clusters:
    """`async with clusters(workers=2) as cluster`."""
    return lambda **options: sound(tmp_path / "cluster", **options)
