"""Whose turn it is, and where everybody else stands."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from contextlib import closing
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import order
from broker.order import AGES_S, LAG_DEAREST, PATIENCE_S, RISES_LOOK_S, SAMPLE_MAX, SLACK, Entry, Line
from broker.state import Request
from common.protocol import Submit
from tests.unit.broker.harness import rid_of

NOW = 1000.0


def ask(name: str, *, client: str = "", accepted: float = NOW, due_s: float | None = None, **more: object) -> Request:
    """A request; its client is its name without digits unless given."""
    client = client or name.rstrip("0123456789")
    submit = Submit(rid=rid_of(name), client=client, ref=name, model="m:latest", path="/api/generate", **more)  # type: ignore[arg-type]
    deadline = None if due_s is None else NOW + due_s
    return Request(rid=submit.rid, submit=submit, body=b"", gateway=None, accepted=accepted, deadline=deadline)


class Lane:
    """A line, and the requests of it by name."""

    def __init__(self, *names: str, cost: float = 100.0) -> None:
        self.line = Line()
        self.requests: dict[str, Request] = {}
        for name in names:
            self.add(name, cost)

    def add(
        self, name: str, cost: float = 100.0, now: float = NOW, kind: str = "", parked: bool = False, **more: object
    ) -> Entry:
        self.requests[name] = request = ask(name, **{"accepted": now, **more})  # type: ignore[arg-type]
        return self.line.add(request, cost, kind=kind, parked=parked)

    def discard(self, name: str) -> None:
        self.line.discard(self.requests[name])

    def firsts(self, now: float = NOW, barred: str = "") -> list[str]:
        """Each client's first request, in turn; but of that one."""
        self.line.park(barred, True)
        firsts: dict[str, str] = {}
        for entry in self.line.candidates(now):
            firsts.setdefault(entry.client.name, entry.request.submit.ref)
        self.line.park(barred, False)
        return list(firsts.values())

    def run(self, name: str, cost: float = 100.0, now: float = NOW) -> None:
        request = self.requests[name]
        self.line.discard(request, turn_at=now)
        request.ordinal += 1
        self.line.begin(request.submit.client, cost, request.submit.weight)

    def overtake(self, at: float) -> None:
        """Something interactive comes before all that is not."""
        self.add("overtakes", priority="interactive", now=at)
        self.run("overtakes", 0.0, now=at)

    def next(self, now: float = NOW, cost: float = 100.0) -> str:
        """Run the request whose turn it is."""
        with closing(self.line.candidates(now)) as candidates:
            name = next(candidates).request.submit.ref
        self.run(name, cost, now)
        return name

    def drain(self, now: float = NOW) -> list[str]:
        return [self.next(now) for _ in range(len(self.line))]

    def positions(self) -> dict[str, int]:
        return {r.submit.ref: self.line.position(self.line.get(r)) for r in self.line}


# Between clients ------------------------------------------------------------------------------------------------------


def test_clients_take_turns_however_many_requests_each_has() -> None:
    lane = Lane("a1", "a2", "a3", "a4", "b1", "b2")
    assert lane.drain() == ["a1", "b1", "a2", "b2", "a3", "a4"]


def test_a_client_of_double_weight_gets_twice_as_much() -> None:
    lane = Lane()
    for number in range(8):
        lane.add(f"a{number}")
        lane.add(f"b{number}", weight=2.0)
    assert Counter(name[0] for name in lane.drain()[:9]) == {"a": 3, "b": 6}


def test_what_costs_more_counts_more() -> None:
    lane = Lane("a1", "a2", "b1", "b2", "b3", "b4")
    lane.run("a1", 300.0)
    assert lane.drain() == ["b1", "b2", "b3", "a2", "b4"]


def test_of_two_that_were_served_alike_the_one_comes_first_whose_request_is_due_first() -> None:
    lane = Lane()
    lane.add("zoe1", accepted=NOW - 2)
    lane.add("bob1", accepted=NOW - 1)
    lane.add("eve1", due_s=5.0)
    assert lane.firsts() == ["eve1", "zoe1", "bob1"]
    lane.add("bob2", accepted=NOW - 3)
    assert lane.firsts() == ["eve1", "bob2", "zoe1"]
    lane.discard("bob2")
    assert lane.firsts() == ["eve1", "zoe1", "bob1"]


def test_an_estimate_is_put_right_by_what_it_was() -> None:
    lane = Lane("a1", "a2", "b1", "b2")
    lane.run("a1", 500.0)
    lane.run("b1", 100.0)
    assert lane.firsts() == ["b2", "a2"]
    lane.line.end("a", 500.0, 50.0)
    assert lane.line.counters() == {"a": 50.0, "b": 100.0}
    assert lane.firsts() == ["a2", "b2"]
    lane.line.end("b", 100.0, 100.0)
    lane.line.begin("b", 10.0, 1.0)
    lane.line.end("b", 100.0, 10.0)
    assert lane.firsts() == ["b2", "a2"]


def test_being_away_earns_nothing() -> None:
    lane = Lane("a0", *(f"b{number}" for number in range(20)))
    lane.run("a0")
    for _ in range(10):
        lane.next()
    for number in range(1, 9):
        lane.add(f"a{number}")
    turns = "".join(name[0] for name in lane.drain())
    assert "aaa" not in turns
    assert "bbb" not in turns[:16]


def test_a_debt_stays() -> None:
    lane = Lane("a1", "b1", "b2", "b3", "b4")
    lane.run("a1", 350.0)
    lane.run("b1")
    lane.line.end("a", 100.0, 100.0)
    lane.add("a2")
    assert lane.drain() == ["b2", "b3", "b4", "a2"]


def test_who_comes_to_an_empty_line_begins_where_the_last_one_had_its_turn() -> None:
    lane = Lane("a1", "a2", "a3")
    assert lane.drain() == ["a1", "a2", "a3"]
    lane.add("a4")
    lane.add("b1")
    lane.add("b2")
    lane.add("b3")
    assert lane.drain() == ["b1", "a4", "b2", "b3"]


def test_a_lease_that_was_claimed_makes_its_client_known_where_the_others_are() -> None:
    lane = Lane("a1", "a2")
    lane.drain()
    lane.line.begin("c", 50.0, 1.0)
    assert lane.line.counters() == {"a": 200.0, "c": 150.0}
    lane.line.end("c", 50.0, 50.0)
    assert not lane.line.idle
    lane.line.end("a", 100.0, 100.0)
    lane.line.end("a", 100.0, 100.0)
    assert lane.line.idle


def test_who_could_not_run_is_not_owed_all_of_it() -> None:
    """A client whose limit let it run nothing for long does not block those that come, once it may."""
    lane = Lane("capped0", *(f"capped{number}" for number in range(1, 40)))
    for number in range(200):
        lane.add(f"a{number}")
        assert lane.firsts(barred="capped") == [f"a{number}"]
        lane.run(f"a{number}")
        lane.line.end("a", 100.0, 100.0)
    for number in range(20):
        lane.add(f"fresh{number}")
    turns = [lane.next() for _ in range(int(LAG_DEAREST) + 3)]
    assert 1 <= sum(name.startswith("fresh") for name in turns) <= 3


def test_nobody_is_passed_by_for_ever_by_clients_that_are_new() -> None:
    lane = Lane("debtor0", "debtor1", "new0")
    lane.run("debtor0", 1000.0)
    for number in range(1, 2000):
        lane.add(f"new{number}", client=f"new{number}", now=NOW)
        name = lane.next()
        if name == "debtor1":
            break
        lane.line.end(lane.requests[name].submit.client, 100.0, 100.0)
    assert 8 <= number < 1000


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=6),
    slots=st.integers(1, 4),
    dearest=st.sampled_from([2, 100, 5000]),
)
def test_the_service_of_clients_that_always_wait_differs_by_no_more_than_what_runs(
    seed: int, weights: list[float], slots: int, dearest: int
) -> None:
    """The property of VTC (arXiv 2401.00588, theorem 4.4), with estimates that are wrong and put right."""
    rng = Random(seed)
    lane = Lane()
    names = [f"client{chr(97 + number)}" for number in range(len(weights))]
    weight_of = dict(zip(names, weights, strict=True))
    served: dict[str, float] = dict.fromkeys(names, 0.0)
    running: list[tuple[str, float, float]] = []
    number = 0

    def come(name: str) -> None:
        nonlocal number
        number += 1
        lane.add(f"r{number}", estimate(), client=name, weight=weight_of[name], now=NOW + number / 1000)

    def estimate() -> float:
        return float(rng.randint(1, dearest))

    for name in names:
        come(name)
        come(name)
    bound = (slots + 1) * dearest / min(weights)
    for _ in range(300):
        if len(running) == slots:
            name, charged, cost = running.pop(rng.randrange(slots))
            lane.line.end(name, charged, cost)
            served[name] += cost / weight_of[name]
            assert max(served.values()) - min(served.values()) <= bound
        entry = next(iter(lane.line.candidates(NOW)))
        client = entry.client.name
        charged, cost = entry.cost, estimate()
        lane.line.discard(entry.request, NOW)
        lane.line.begin(client, charged, weight_of[client])
        running.append((client, charged, cost))
        come(client)
    assert min(served.values()) > 0


# Classes and due times ------------------------------------------------------------------------------------------------


def test_a_higher_priority_comes_before_all_of_a_lower_one() -> None:
    lane = Lane()
    for name, priority in (("a1", "batch"), ("b1", "normal"), ("b2", "interactive"), ("c1", "whatever")):
        lane.add(name, priority=priority)
    lane.run("b1", 10_000.0)
    lane.add("b3", priority="interactive")
    assert lane.firsts() == ["b2", "c1", "a1"]


def test_waiting_raises_class_by_class() -> None:
    lane = Lane()
    lane.add("a1", priority="batch")
    ages = AGES_S[2], AGES_S[2] + AGES_S[1]
    lane.overtake(NOW + 1)
    lane.add("b1", priority="normal", now=NOW + ages[0] + 1)
    lane.add("c1", priority="interactive", now=NOW + ages[1] + 1)
    assert lane.firsts(NOW + ages[0] - 1) == ["c1", "b1", "a1"]
    assert lane.firsts(NOW + ages[0]) == ["c1", "a1", "b1"]
    lane.overtake(NOW + ages[0] + 1)
    assert lane.firsts(NOW + ages[1]) == ["a1", "c1", "b1"]


def test_who_waited_before_comes_back_where_it_would_be() -> None:
    lane = Lane()
    lane.add("a1", priority="interactive")
    lane.add("b1", priority="batch", accepted=NOW - sum(AGES_S))
    lane.overtake(NOW)
    assert lane.firsts() == ["b1", "a1"]


def test_a_flood_does_not_grow_older_than_what_others_ask() -> None:
    """A client that has its turns is not raised, however long its last request waits."""
    lane = Lane()
    for number in range(200):
        lane.add(f"flood{number}")
    now = NOW
    while now < NOW + 3 * AGES_S[1]:
        now += 1.0
        assert lane.next(now).startswith("flood")
    lane.add("a1", now=now)
    assert lane.next(now) == "a1"


def test_one_request_of_a_client_is_raised_at_a_time() -> None:
    lane = Lane("a1", "a2", "a3")
    lane.overtake(NOW + 1)
    lane.add("b1", priority="interactive", now=NOW + AGES_S[1])
    lane.run("b1", 1e6)
    for number in range(2, 6):
        lane.add(f"b{number}", priority="interactive")
    late = NOW + AGES_S[1] + 1
    assert [lane.next(late) for _ in range(3)] == ["a1", "b2", "b3"]
    assert lane.next(late + AGES_S[1]) == "a2"


def test_who_comes_back_into_its_class_waits_from_then() -> None:
    lane = Lane("a1", "b1")
    lane.run("a1")
    lane.add("a2", now=NOW + 20)
    lane.overtake(NOW + 21)
    late = NOW + AGES_S[1] + 1
    lane.add("c1", priority="interactive", now=late)
    assert lane.firsts(late) == ["b1", "c1", "a2"]
    assert lane.firsts(NOW + 20 + AGES_S[1]) == ["b1", "c1", "a2"]


def test_only_a_turn_makes_a_client_younger() -> None:
    """Not that its first request was given up, nor that a later one was."""
    lane = Lane("a1", "a2", "a3")
    lane.overtake(NOW + 1)
    lane.discard("a3")
    lane.discard("a1")
    late = NOW + AGES_S[1]
    lane.firsts(late)
    assert lane.line.get(lane.requests["a2"]).rank == 0


def test_a_turn_that_came_to_nothing_was_none() -> None:
    lane = Lane("a1", "a2")
    lane.overtake(NOW + 1)
    for second in range(1, int(AGES_S[1])):
        lane.run("a1", now=NOW + second)
        lane.line.end("a", 100.0, 0.0)
        lane.line.add(lane.requests["a1"], 100.0)
    lane.firsts(NOW + AGES_S[1])
    assert lane.line.get(lane.requests["a1"]).rank == 0


def test_what_comes_back_is_raised_when_it_would_have_been() -> None:
    """Though its client was to be looked at later by then."""
    lane = Lane("a1")
    lane.add("x1", now=NOW + 28)
    lane.overtake(NOW + 29)
    lane.run("a1", now=NOW + 29)
    lane.add("a2", now=NOW + 29.5)
    lane.firsts(NOW + AGES_S[1])
    lane.discard("a2")
    lane.line.end("a", 100.0, 0.0)
    lane.line.add(lane.requests["a1"], 100.0)
    lane.firsts(NOW + AGES_S[1] + 1)
    assert lane.line.get(lane.requests["a1"]).rank == 0


def test_a_line_that_was_empty_ages_again() -> None:
    lane = Lane("a1")
    lane.discard("a1")
    lane.add("a2", now=NOW + 1)
    lane.overtake(NOW + 2)
    lane.firsts(NOW + 1 + AGES_S[1])
    assert lane.line.get(lane.requests["a2"]).rank == 0


def test_where_nothing_comes_before_it_nothing_is_raised() -> None:
    """Or all would be, once turns are far apart, and each had one in that time whatever its weight and its cost."""
    lane = Lane("a1")
    for second in range(3 * int(AGES_S[1])):
        lane.firsts(NOW + second)
    entry = lane.line.get(lane.requests["a1"])
    assert entry.rank == 1
    lane.overtake(NOW + 95)
    lane.firsts(NOW + 95 + RISES_LOOK_S)
    assert entry.rank == 0


def test_weights_hold_however_far_apart_turns_are() -> None:
    lane, now, turns = Lane(), NOW, Counter[str]()
    for client in "abcdefg":
        lane.add(f"{client}0", weight=4.0 if client == "a" else 1.0)
        lane.add(f"{client}1", weight=4.0 if client == "a" else 1.0)
    for number in range(2, 400):
        now += 10.0
        name = lane.next(now)
        turns[name[0]] += 1
        lane.line.end(name[0], 100.0, 100.0)
        lane.add(f"{name[0]}{number}", weight=4.0 if name[0] == "a" else 1.0, now=now)
    assert turns["a"] / turns.total() == pytest.approx(0.4, abs=0.02)


def test_time_at_a_limit_is_not_made_up_for() -> None:
    lane = Lane(*(f"a{number}" for number in range(40)))
    lane.line.park("a", True)
    now = NOW
    for number in range(300):
        lane.add(f"b{number}", now=now, priority="interactive" if number % 2 else "normal")
        lane.next(now)
        lane.line.end("b", 100.0, 100.0)
        now += 1.0
    lane.line.park("a", False)
    for number in range(20):
        lane.add(f"c{number}", now=now)
    turns = Counter(lane.next(now)[0] for _ in range(20))
    assert turns["c"] >= 20 / 2 - LAG_DEAREST


def test_one_dear_request_does_not_let_everybody_lag_for_ever() -> None:
    lane = Lane("a1")
    lane.run("a1", 1e6)
    lane.line.end("a", 1e6, 1e6)
    for number in range(2000):
        lane.add(f"b{number}")
        lane.next(cost=100.0)
        lane.line.end("b", 100.0, 100.0)
    assert lane.line._dearest == 100.0


def test_those_that_were_raised_share_with_those_that_are_there() -> None:
    """Who has waited long does not come before everybody else for as long."""
    lane = Lane()
    for number in range(20):
        lane.add(f"{'pqrst'[number % 5]}{number}", priority="batch")
        lane.add(f"a{number}", priority="interactive")
        assert lane.next(NOW) == f"a{number}"
    lane.overtake(NOW + AGES_S[2] + 1)
    late = NOW + sum(AGES_S)
    for number in range(20, 40):
        lane.add(f"a{number}", priority="interactive", now=late)
    turns = [lane.next(late)[0] for _ in range(20)]
    assert turns.count("a") == 15
    assert set(turns) == set("apqrst")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), priority=st.sampled_from(["interactive", "normal", "batch"]))
def test_nobody_waits_for_ever(seed: int, priority: str) -> None:
    """However many of a higher class keep coming, as long as each client has its share."""
    rng = Random(seed)
    lane = Lane()
    lane.add("patient1", priority=priority)
    number, now = 0, NOW
    while "patient1" in (waiting := {request.submit.ref for request in lane.line}):
        assert now < NOW + sum(AGES_S) + 2 * RISES_LOOK_S + 20
        for _ in range(rng.randint(1, 3)):
            number += 1
            client = rng.choice("abcde")
            lane.add(f"r{number}", client=client, priority=rng.choice(["interactive", "normal"]), now=now)
        name = lane.next(now)
        lane.line.end(lane.requests[name].submit.client, 100.0, rng.uniform(50.0, 150.0))
        now += 1.0
    assert waiting


def test_inside_a_client_what_is_due_first_comes_first() -> None:
    lane = Lane()
    lane.add("a1", accepted=NOW - 5)
    lane.add("a2", due_s=20.0)
    lane.add("a3", due_s=10.0)
    lane.add("a4", due_s=10 * PATIENCE_S)
    lane.add("a5", accepted=NOW - 10)
    assert lane.drain() == ["a3", "a2", "a5", "a1", "a4"]


def test_a_deadline_far_away_waits_no_longer_than_none() -> None:
    lane = Lane()
    lane.add("a1", due_s=3600.0)
    lane.add("a2", accepted=NOW + 1)
    assert lane.drain() == ["a1", "a2"]


# Looking at them ------------------------------------------------------------------------------------------------------


def looked_at(lane: Lane, full: Collection[str] = (), fills: Mapping[str, str] | None = None) -> list[str]:
    """All candidates, of none of `full` kinds; after each of `fills` its kind is full."""
    kinds, names = set(full), []
    for entry in lane.line.candidates(NOW, kinds):
        names.append(entry.request.submit.ref)
        if names[-1] in (fills or {}):
            kinds.add((fills or {})[names[-1]])
    return names


def test_candidates_come_by_turns_and_each_clients_in_order() -> None:
    lane = Lane("a1", "a2", "b1", "c1")
    lane.add("b2", priority="interactive")
    lane.line.begin("a", 500.0, 1.0)
    assert looked_at(lane) == ["b2", "b1", "c1", "a1", "a2"]


def test_a_client_that_is_parked_has_no_turn() -> None:
    lane = Lane("a1", "b1", "c1")
    assert lane.line.park("b", True)
    assert not lane.line.park("b", True)
    lane.add("b2", parked=True)
    lane.line.begin("b", 1.0, 1.0)
    assert looked_at(lane) == ["a1", "c1"]
    assert lane.line.waits("b")
    assert lane.line.park("b", False)
    assert looked_at(lane) == ["a1", "c1", "b1", "b2"]
    assert not lane.line.park("nobody", True)


def test_one_kind_that_is_full_holds_up_no_other() -> None:
    """Not even of the same client."""
    lane = Lane()
    for name, kind in (("a1", "x"), ("a2", "y"), ("b1", "x"), ("c1", "y"), ("a3", "x")):
        lane.add(name, kind=kind)
    assert dict(lane.line.kinds) == {"x": 3, "y": 2}
    assert looked_at(lane) == ["a1", "a2", "a3", "b1", "c1"]
    assert looked_at(lane, fills={"a1": "x"}) == ["a1", "a2", "c1"]
    assert looked_at(lane, fills={"a3": "x"}) == ["a1", "a2", "a3", "c1"]
    assert looked_at(lane, full="x") == ["a2", "c1"]
    assert looked_at(lane, full="xy") == []
    lane.discard("a2")
    lane.discard("c1")
    assert dict(lane.line.kinds) == {"x": 3}
    assert looked_at(lane, full="x") == []
    assert looked_at(lane) == ["a1", "a3", "b1"]


def test_whoever_stops_looking_leaves_all_turns_as_they_were() -> None:
    lane = Lane("a1", "b1", "c1")
    for looks in (1, 2, 3):
        with closing(lane.line.candidates(NOW)) as candidates:
            for _ in range(looks):
                next(candidates)
    assert lane.firsts() == ["a1", "b1", "c1"]


def test_turns_from_before_a_change_count_once() -> None:
    lane = Lane("a1", "a2", "b1")
    lane.run("a1", 100.0)
    lane.line.end("a", 100.0, 0.0)
    lane.line.begin("a", 100.0, 1.0)
    lane.line.end("a", 100.0, 0.0)
    assert sorted(lane.firsts()) == ["a2", "b1"]


def test_what_is_put_back_is_there_once() -> None:
    """A request that is queued again at the counter it had makes a turn like the one it had."""
    lane = Lane("a1", "b1")
    lane.run("a1")
    lane.line.end("a", 100.0, 0.0)
    lane.line.add(lane.requests["a1"], 100.0)
    lane.discard("a1")
    lane.line.add(lane.requests["a1"], 100.0)
    assert sorted(lane.firsts()) == ["a1", "b1"]


def test_is_first_tells_whether_it_may_be_its_clients_turn() -> None:
    lane = Lane("a1")
    a2, a0 = lane.add("a2", now=NOW + 1), lane.add("a0", accepted=NOW - 1)
    a3 = lane.add("a3", priority="interactive")
    assert [lane.line.is_first(entry) for entry in (a2, a0, a3)] == [False, True, True]


def test_pressure_counts_what_all_clients_want() -> None:
    lane = Lane("a1", "a2", "a3", "b1")
    assert lane.line.pressure == pytest.approx(1 + 1 / 2 + 1 / 3 + 1)
    left = []
    for name in ("a1", "b1", "a3", "a2"):
        lane.discard(name)
        left.append(lane.line.pressure)
    assert left == pytest.approx([1 + 1 / 2 + 1, 1 + 1 / 2, 1, 0])


# Positions ------------------------------------------------------------------------------------------------------------


def test_positions_are_the_turns() -> None:
    lane = Lane("b1", "a1", "a2", "c1", "a3", "b2", "a4")
    lane.add("d1", priority="interactive")
    lane.add("e1", priority="batch")
    positions = lane.positions()
    assert [positions[name] for name in lane.drain()] == list(range(1, 10))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0), (1.0, 4.0)])
def test_positions_go_by_counters_and_weights(weights: tuple[float, float]) -> None:
    lane = Lane()
    lane.add("a0", weight=weights[0])
    lane.add("b0", weight=weights[1])
    lane.run("a0", 250.0)
    for number in range(1, 7):
        for client, weight in zip("ab", weights, strict=True):
            lane.add(f"{client}{number}", weight=weight, now=NOW + number)
    positions = lane.positions()
    assert [positions[name] for name in lane.drain()] == list(range(1, 14))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 100), st.sampled_from(["interactive", "normal", "batch"]), st.integers(1, 500)),
        min_size=1,
        max_size=200,
    )
)
def test_a_position_is_one_of_the_line(requests: list[tuple[int, str, int]]) -> None:
    lane = Lane()
    for number, (client, priority, cost) in enumerate(requests):
        lane.add(f"r{number}", float(cost), client=f"c{client}", priority=priority)
    positions = lane.positions()
    assert all(1 <= position <= len(requests) for position in positions.values())
    assert positions[lane.firsts()[0]] == 1


def test_of_many_clients_a_sample_tells_the_position() -> None:
    lane = Lane()
    clients = 10 * SAMPLE_MAX
    for number in range(clients):
        lane.add(f"r{number}", client=f"c{number}", now=NOW + number / 1000)
    for number in (0, clients // 2, clients - 1):
        position = lane.line.position(lane.line.get(lane.requests[f"r{number}"]))
        assert abs(position - (number + 1)) <= clients / SAMPLE_MAX


def test_clients_that_are_not_there_do_not_count_for_a_position() -> None:
    lane = Lane(*(f"gone{chr(97 + number % 26)}x{number // 26}" for number in range(2 * SAMPLE_MAX)))
    lane.drain()
    lane.add("a1", now=NOW)
    lane.add("b1", now=NOW + 1)
    lane.add("c1", now=NOW + 2)
    assert lane.positions() == {"a1": 1, "b1": 2, "c1": 3}


# Bounds ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_line_is_what_was_added_and_not_discarded(seed: int) -> None:
    """Against the simplest of models: the first is one whose client was served least in the highest class."""
    rng = Random(seed)
    lane = Lane()
    waiting: dict[str, Request] = {}
    running: dict[str, int] = defaultdict(int)
    now = NOW
    for number in range(300):
        action = rng.random()
        if action < 0.5 or not waiting:
            name = f"{rng.choice('abcdef')}{number}"
            priority = rng.choice(["interactive", "normal", "batch"])
            lane.add(name, float(rng.randint(1, 9)), now=now, priority=priority, weight=rng.choice([1.0, 2.0]))
            waiting[name] = lane.requests[name]
        elif action < 0.65:
            name = rng.choice(list(waiting))
            del waiting[name]
            lane.discard(name)
        elif action < 0.9:
            entry = next(iter(lane.line.candidates(now)))
            entries = [lane.line.get(request) for request in waiting.values()]
            rank = min(one.rank for one in entries)
            best = min((one.client.served, one.key) for one in entries if one.rank == rank)
            assert (entry.client.served, entry.key) == best
            name = entry.request.submit.ref
            del waiting[name]
            lane.run(name, float(rng.randint(1, 9)))
            running[entry.client.name] += 1
        else:
            for client in [client for client, count in running.items() if count]:
                running[client] -= 1
                lane.line.end(client, 5.0, float(rng.randint(0, 10)))
        now += rng.choice([0.0, 1.0, 10.0])
        assert {request.submit.ref for request in lane.line} == set(waiting)
        assert len(lane.line) == len(waiting)
        assert len(lane.firsts(now)) <= len(waiting)
    assert lane.line.idle == (not waiting and not any(running.values()))


def _heaps(line: Line) -> int:
    return sum(len(turns) for kinds in line._turns for turns in kinds.values()) + sum(map(len, line._rising))


def test_stale_entries_are_bounded() -> None:
    lane = Lane("keeps1")
    for number in range(3 * SLACK):
        lane.add(f"a{number}", now=NOW + number / 1000)
        lane.discard(f"a{number}")
        lane.line.begin("keeps", 1.0, 1.0)
        lane.line.end("keeps", 1.0, 1.0)
    assert _heaps(lane.line) <= 2 * (SLACK + 4) + 2
    assert lane.firsts() == ["keeps1"]
    late = NOW + 2 * sum(AGES_S)
    lane.overtake(NOW + 1)
    assert lane.firsts(late) == ["keeps1"]
    assert not any(lane.line._rising)


def test_clients_that_have_left_are_not_kept_to_be_raised() -> None:
    lane = Lane("keeps1")
    for number in range(10 * SLACK):
        lane.add(f"r{number}", client=f"c{number}", priority="batch")
        lane.add(f"s{number}", client=f"c{number}")
        lane.discard(f"r{number}")
        lane.discard(f"s{number}")
    assert _heaps(lane.line) <= 5 * SLACK
    late = NOW + AGES_S[1]
    lane.overtake(NOW + 1)
    lane.firsts(late)
    assert lane.line.get(lane.requests["keeps1"]).rank == 0


def test_an_empty_line_keeps_no_request() -> None:
    lane = Lane(*(f"a{number}" for number in range(2 * SLACK)))
    for number in range(2 * SLACK):
        lane.discard(f"a{number}")
    assert _heaps(lane.line) == 0
    assert lane.line.pressure == 0.0


def test_of_clients_that_are_away_those_with_the_largest_debts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SLACK", 8)
    lane = Lane()
    lane.line._clients_max = 8
    for number in range(50):
        lane.add(f"stays{number}", client=f"stays{number}")
    for number in range(600):
        name = f"c{number}"
        lane.add(name, client=name)
        cost = 1000.0 if 490 <= number < 495 else 1.0
        lane.run(name, cost)
        lane.line.end(name, cost, cost)
    counters = lane.line.counters()
    assert len(counters) < 200
    assert {f"c{number}" for number in range(490, 495)} | {f"stays{number}" for number in range(50)} <= set(counters)


def test_a_client_that_runs_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SLACK", 0)
    lane = Lane()
    for number in range(100):
        name = f"c{number}"
        lane.add(name, client=name)
        lane.run(name)
    for number in range(100):
        lane.line.end(f"c{number}", 100.0, 100.0)
    assert lane.line.idle
