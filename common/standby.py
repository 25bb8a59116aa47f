"""Which broker serves: of an ordered list the first that lives. Pure.

Workers and gateways have the same list and apply the same rule, so that they meet at the same broker. A broker that is
not served is sent a `probe` at every heartbeat, and its answer says that it lives. To one that comes before the
present one the line goes back only after it has lived for STEADY_S: a switch is a recovery like any restart, and a
flapping broker should not cause one after the other.
"""

from typing import Final

from common.protocol import HEARTBEAT_INTERVAL_S, SILENCE_S

STEADY_S: Final = SILENCE_S
STALL_S: Final = 2 * HEARTBEAT_INTERVAL_S
"""A look this late means that this process was stopped: what it has not heard says nothing about the brokers."""


class Brokers:
    """The brokers of a list by their index; `active` is the one to speak to."""

    def __init__(self, count: int, now: float) -> None:
        self.active = 0
        self._heard = [now] + [float("-inf")] * (count - 1)
        self._since = [now] * count
        self._looked = now

    def hear(self, broker: int, now: float) -> None:
        """A sign of life."""
        if now - self._heard[broker] > SILENCE_S:
            self._since[broker] = now
        self._heard[broker] = now

    def heard_at(self, broker: int) -> float:
        """When it was last heard of; -inf if never."""
        return self._heard[broker]

    def lives(self, broker: int, now: float) -> bool:
        """Whether it was heard of in the last three heartbeats."""
        return now - self._heard[broker] <= SILENCE_S

    def choose(self, now: float) -> bool:
        """Look who lives, at least at every heartbeat; True if `active` is another one now."""
        late = now - self._looked
        if late > STALL_S:
            self._heard = [min(now, heard + late) for heard in self._heard]
            self._since = [min(now, since + late) for since in self._since]
        self._looked = now
        before = self.active
        living = [i for i in range(len(self._heard)) if self.lives(i, now)]
        steady = [i for i in living if i < self.active and self._heard[i] - self._since[i] >= STEADY_S]
        if steady:
            self.active = steady[0]
        elif living and not self.lives(self.active, now):
            self.active = living[0]
        return self.active != before
