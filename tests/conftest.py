"""Fixtures that several kinds of tests share."""

from collections.abc import Iterator

import pytest

from tests.fabric import Fabric
from workers.embedded.simulated import Settings


@pytest.fixture(scope="session")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """A fabric of two workers with simulated engines; it answers to `llama2`. Shared: leave it as it was."""
    with Fabric(tmp_path_factory.mktemp("fabric"), engines=[Settings(slots=4), Settings(slots=4)]) as running:
        yield running
