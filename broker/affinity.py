"""Which runner has read which beginnings of prompts, as far as a broker can know. Pure.

An engine says nothing of its prefix cache; what it was given last it most likely has. Each runner's beginnings are kept
in the order of their use, up to as many bytes of prompt as the cache seems to hold: where a prompt that should have
been there took as long to read as a new one, less; where the oldest are still there, more.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Final, Generic, TypeVar

from common.prefix import BOUNDARIES

CAPACITY_BYTES: Final = 4 * 2**20
"""What a cache holds, in bytes of prompts, until something else was seen: some 1M tokens."""
CAPACITY_BYTES_MIN: Final = 16 * 2**10
CAPACITY_BYTES_MAX: Final = 64 * 2**20
HASHES_MAX: Final = 1_000_000
"""Kept of all runners, some 250 MB. If there are more, none keeps more than its share."""
SHRINK: Final = 0.7
GROW: Final = 1.1

R = TypeVar("R", bound=Hashable)


class Prefixes(Generic[R]):
    """Of all runners."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[R, None]] = {}
        self._held: dict[R, OrderedDict[bytes, int]] = {}
        self._bytes: dict[R, int] = {}
        self._capacity: dict[R, float] = {}
        self._count = 0

    def overlaps(self, prefix: Sequence[bytes]) -> dict[R, int]:
        """How many bytes of such a prompt each runner has read before; who has none is left out."""
        found: dict[R, int] = {}
        holders = self._holders
        low, high = 0, len(prefix)
        while low < high:  # whoever has a beginning has the shorter ones too
            middle = (low + high) // 2
            if prefix[middle] in holders:
                low = middle + 1
            else:
                high = middle
        for index in range(low - 1, -1, -1):
            having = holders.get(prefix[index], {})  # none where a chain is not one, as only a broken gateway sends it
            if len(having) > len(found):
                for runner in having:
                    found.setdefault(runner, BOUNDARIES[index])
        return found

    def overlap(self, runner: R, prefix: Sequence[bytes]) -> int:
        """The same of one runner."""
        held = self._held.get(runner) or OrderedDict[bytes, int]()
        low, high = 0, len(prefix)
        while low < high:
            middle = (low + high) // 2
            if prefix[middle] in held:
                low = middle + 1
            else:
                high = middle
        return BOUNDARIES[low - 1] if low else 0

    def remember(self, runner: R, prefix: Sequence[bytes]) -> None:
        """It reads that now."""
        if not prefix:
            return
        held = self._held.setdefault(runner, OrderedDict())
        size = self._bytes.get(runner, 0)
        for index in range(len(prefix) - 1, -1, -1):  # the longest goes first when room is needed
            key = prefix[index]
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = length = BOUNDARIES[index] - (BOUNDARIES[index - 1] if index else 0)
                size += length
                self._count += 1
                self._holders.setdefault(key, {})[runner] = None
        self._bytes[runner] = size
        self._trim(runner)
        if self._count > HASHES_MAX:
            share = HASHES_MAX // len(self._held)
            for other in self._held:
                self._trim(other, share)

    def missed(self, runner: R) -> None:
        """What it should have had it had not."""
        if runner in self._held:  # it may have been unloaded meanwhile
            self._capacity[runner] = max(CAPACITY_BYTES_MIN, self._bytes[runner] * SHRINK)
            self._trim(runner)

    def hit(self, runner: R) -> None:
        """It had what it should have."""
        capacity = self._capacity.get(runner, CAPACITY_BYTES)
        if self._bytes.get(runner, 0) > capacity / 2:
            self._capacity[runner] = min(capacity * GROW, CAPACITY_BYTES_MAX)

    def forget(self, runner: R) -> None:
        """Its model is no longer in memory."""
        for key in self._held.pop(runner, ()):
            self._drop(key, runner)
        self._bytes.pop(runner, None)
        self._capacity.pop(runner, None)

    def _trim(self, runner: R, share: int = HASHES_MAX) -> None:
        """It has room for so many bytes, and so many hashes are kept of it."""
        held, capacity = self._held[runner], self._capacity.get(runner, CAPACITY_BYTES)
        while self._bytes[runner] > capacity or len(held) > share:
            key, length = held.popitem(last=False)
            self._bytes[runner] -= length
            self._drop(key, runner)

    def _drop(self, key: bytes, runner: R) -> None:
        self._count -= 1
        holders = self._holders[key]
        del holders[runner]
        if not holders:
            del self._holders[key]
