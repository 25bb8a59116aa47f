"""Which broker is served: a list, who was heard of, and the time."""

from collections.abc import Iterable

import pytest

from common.protocol import HEARTBEAT_INTERVAL_S, SILENCE_S
from common.standby import STALL_S, STEADY_S, Brokers


class Fleet:
    """A list of brokers that is looked at every heartbeat; those in `alive` say something just before."""

    def __init__(self, count: int) -> None:
        self.now = 100.0
        self.brokers = Brokers(count, self.now)

    def run(self, seconds: float, alive: Iterable[int]) -> list[int]:
        """The switches of that time, by the broker that was switched to."""
        switches: list[int] = []
        alive = set(alive)
        for _ in range(round(seconds / HEARTBEAT_INTERVAL_S)):
            self.now += HEARTBEAT_INTERVAL_S
            for broker in alive:
                self.brokers.hear(broker, self.now)
            if self.brokers.choose(self.now):
                switches.append(self.brokers.active)
        return switches


def test_one_broker_is_served_whether_it_lives_or_not() -> None:
    fleet = Fleet(1)
    assert fleet.brokers.active == 0
    assert fleet.run(20, []) == []
    assert not fleet.brokers.lives(0, fleet.now)
    assert fleet.run(20, [0]) == []
    assert fleet.brokers.lives(0, fleet.now)


def test_the_first_one_is_served_while_it_lives() -> None:
    fleet = Fleet(3)
    assert fleet.run(20, [0, 1, 2]) == []
    assert fleet.run(20, [0]) == []
    assert fleet.brokers.active == 0


def test_from_the_start_it_has_three_heartbeats_to_answer() -> None:
    fleet = Fleet(2)
    assert fleet.run(SILENCE_S, [1]) == []
    assert fleet.run(1, [1]) == [1]


@pytest.mark.parametrize(("alive", "next_one"), [([1, 2], 1), ([2], 2)])
def test_the_first_that_lives_follows_a_silent_one(alive: list[int], next_one: int) -> None:
    fleet = Fleet(3)
    fleet.run(10, [0, 1, 2])
    assert fleet.run(SILENCE_S, alive) == []
    assert fleet.run(10, alive) == [next_one]


def test_without_another_that_lives_there_is_no_switch() -> None:
    fleet = Fleet(2)
    fleet.run(10, [0])
    assert fleet.run(10, []) == []
    assert fleet.run(1, [1]) == [1]


def test_the_line_goes_back_after_the_former_has_lived_for_a_while() -> None:
    fleet = Fleet(2)
    fleet.run(10, [0, 1])
    assert fleet.run(10, [1]) == [1]
    assert fleet.run(STEADY_S, [0, 1]) == []
    assert fleet.run(1, [0, 1]) == [0]


def test_a_flapping_broker_causes_one_switch_only() -> None:
    fleet = Fleet(2)
    fleet.run(10, [0, 1])
    assert fleet.run(10, [1]) == [1]
    for _ in range(5):
        assert fleet.run(STEADY_S - 1, [0, 1]) == []
        assert fleet.run(SILENCE_S + 1, [1]) == []
    assert fleet.brokers.active == 1


def test_when_both_were_silent_the_first_that_comes_back_is_served_at_once() -> None:
    fleet = Fleet(2)
    fleet.run(10, [0, 1])
    assert fleet.run(10, [1]) == [1]
    assert fleet.run(10, []) == []
    assert fleet.run(1, [0]) == [0]


def test_being_stopped_says_nothing_about_the_brokers() -> None:
    fleet = Fleet(2)
    fleet.run(10, [0, 1])
    fleet.now += 60.0
    assert fleet.run(1, [1]) == [], "the first one's messages wait to be read"
    assert fleet.brokers.lives(0, fleet.now)
    assert fleet.run(SILENCE_S - 1, [1]) == []
    assert fleet.run(2, [1]) == [1]


def test_what_was_read_before_the_first_look_after_a_stop_counts_from_then() -> None:
    fleet = Fleet(2)
    fleet.run(10, [0, 1])
    fleet.now += 60.0
    fleet.run(1, [0, 1])
    assert fleet.run(SILENCE_S + 1, [1]) == [1], "not from a minute ahead"


def test_a_look_a_little_late_forgives_nothing() -> None:
    fleet = Fleet(2)
    fleet.run(10, [0, 1])
    fleet.run(2, [1])
    fleet.now += STALL_S - HEARTBEAT_INTERVAL_S
    assert fleet.run(1, [1]) == [1]


def test_brokers_that_never_answered_stay_dead_through_a_stop() -> None:
    fleet = Fleet(2)
    fleet.run(5, [0])
    fleet.now += 60.0
    assert fleet.run(10, []) == []
    assert not fleet.brokers.lives(1, fleet.now)
