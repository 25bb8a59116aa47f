"""Whose turn it is: the line of one model, fair between clients. Pure.

Rules
-----
- Between clients the one comes first that was served least: each has a counter of the tokens it got in this line,
  divided by its weight, where a token written counts OUTPUT_WEIGHT times one read (the virtual token counter of VTC,
  arXiv 2401.00588). It is charged with an estimate when a request is placed, and put right when it has ended.
  Of two that were served alike the one comes first whose request is due first.
- Who comes into a class in which nothing of it waits begins at least at the counter of the last turn: being away earns
  nothing. A debt stays. That counter also rises by what a client gets on average, lest those with a debt wait for ever
  while others come that have none.
- Nor does it earn anything not to be able to run, for want of a host that may be used or because of a limit: who lags
  further than fairness allows is owed no more than that.
- Requests of one kind have the same hosts to choose from. A client has a turn for the first request of each kind, so
  that one which has to wait for its host holds up nothing else. A client at its limit is parked and has none.
- A request of a higher priority comes before all of a lower one, of whichever client. Waiting raises it: if a client
  has had no turn in its class for AGES_S, its first batch request there is treated as normal, its first normal one as
  interactive, if something of a higher priority came before it meanwhile. So nobody is passed by for ever. It is the
  client that has to wait so long, not the request: else the backlog of one that floods would grow older than the
  others' requests, and come before them all. And where nothing of a higher priority comes, counters alone decide.
- Among the requests of a client that have one priority the one due first comes first: due is its deadline, and at the
  latest PATIENCE_S after it was accepted.

Adding, removing and finding the next cost O(kinds + log clients).
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Container, Generator, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from math import inf
from typing import TYPE_CHECKING, Final

from broker.state import Request

if TYPE_CHECKING:
    from broker.runners import Runner

PRIORITIES: Final = {"interactive": 0, "normal": 1, "batch": 2}
CLASSES: Final = range(3)
AGES_S: Final = (0.0, 30.0, 60.0)
"""How long a client waits for a turn in a class until its first request is raised to the next."""
RISES_LOOK_S: Final = 5.0
"""How often it is looked whether one that has waited so long has been overtaken meanwhile."""
PATIENCE_S: Final = 60.0
OUTPUT_WEIGHT: Final = 2.0
DEAREST_KEPT: Final = 0.99
"""What is kept with each turn of what the dearest request was charged."""
LAG_DEAREST: Final = 4.0
"""How many of the dearest requests a client may lag behind. Of those that can run none lags more than 2 (so VTC)."""
SAMPLE_MAX: Final = 64
"""Clients that are looked at to tell a position; of more, a sample stands for all."""
SLACK: Final = 256
"""Clients that are remembered for their debts, and entries of a heap that may be stale, beside as many as count."""


@dataclass(slots=True, eq=False)
class Entry:
    """A waiting request. `cost` in tokens as estimated. Requests of one `kind` have the same hosts to choose from.

    `share`: what it counts among those that came, the less the more of its client waited already.
    `patient_until`: how long it may wait for a host that is warm for it, once that was decided; `waits_for` tells
    which, and need not be decided again before `look_at`.
    """

    request: Request
    client: "Client"
    rank: int
    due: float
    cost: float
    kind: Hashable
    share: float = 1.0
    patient_until: float = 0.0
    waits_for: "Runner | None" = None
    look_at: float = -inf

    @property
    def key(self) -> tuple[float, float, bytes]:
        return self.due, self.request.accepted, self.request.rid


Place = tuple[float, float, bytes, Entry]
Turn = tuple[float, float, float, bytes, int, Entry]
"""The counter of a client, and its first request of a kind: as it was."""


@dataclass(slots=True, eq=False)
class Client:
    """A client in this line. `served`: its counter; the lists are by class.

    `queues`: what waits, and `firsts` its first of each kind. `at`: where it is among those that wait. `since`: when it
    came, or had its last turn, and `before` what that was before the turn. `rises_at`: when it is looked whether its
    first is to be raised.
    """

    name: str
    weight: float = 1.0
    served: float = 0.0
    running: int = 0
    parked: bool = False
    queues: tuple[list[Place], list[Place], list[Place]] = field(default_factory=lambda: ([], [], []))
    firsts: tuple[dict[Hashable, Entry], ...] = field(default_factory=lambda: ({}, {}, {}))
    at: list[int] = field(default_factory=lambda: [0, 0, 0])
    since: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    before: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    rises_at: list[float] = field(default_factory=lambda: [inf, inf, inf])

    @property
    def waits(self) -> bool:
        return any(self.queues)

    def waiting(self) -> int:
        """How many requests."""
        return sum(map(len, self.queues))

    def after(self, entry: Entry) -> Entry | None:
        """The next of its kind."""
        queue = self.queues[entry.rank]
        start = bisect_left(queue, entry.key) + 1
        return next((place[3] for place in islice(queue, start, None) if place[3].kind == entry.kind), None)


class Line:
    """Requests for one model."""

    def __init__(self) -> None:
        self._number = count()
        self._clients: dict[str, Client] = {}
        self._clients_max = SLACK
        self._waiting: tuple[list[Client], ...] = ([], [], [])
        self._turns: tuple[dict[Hashable, list[Turn]], ...] = ({}, {}, {})
        self._rising: tuple[list[tuple[float, int, Client]], ...] = ([], [], [])
        self._entries: dict[bytes, Entry] = {}
        self._counts = [0, 0, 0]
        self._overtaken_at = [-inf, -inf, -inf]
        """When something of a higher priority last had a turn."""
        self.kinds: Counter[Hashable] = Counter()
        self._served = 0.0  # where a client begins
        self._running = 0
        self._dearest = 0.0  # the most that a request was charged lately
        self.cost = 1.0
        """What a waiting request costs on average, in tokens."""
        self.pressure = 0.0
        """How many wait, where the second of a client counts half, the third a third …: what all clients want of it."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return (entry.request for entry in self._entries.values())

    @property
    def idle(self) -> bool:
        """Nobody waits or runs."""
        return not self._entries and not self._running

    def add(self, request: Request, cost: float, *, kind: Hashable = None, parked: bool = False) -> Entry:
        """A request waits. `cost` in tokens; `parked`: its client is at its limit."""
        submit = request.submit
        client = self._clients.get(submit.client)
        if client is None:
            self._sweep()
            client = self._clients[submit.client] = Client(submit.client, submit.weight)
        if not request.ordinal:  # what comes back knows the weight of before
            client.weight = submit.weight
        rank = _rank_of(request)
        due = request.accepted + PATIENCE_S
        if request.deadline is not None:
            due = min(due, request.deadline)
        entry = Entry(request, client, rank, due, cost, kind, 1 / (1 + client.waiting()))
        self.pressure += entry.share
        self._entries[request.rid] = entry
        self.cost += (cost - self.cost) / min(len(self._entries), 100)
        self.park(submit.client, parked)
        if request.ordinal:  # it comes back, so that turn was none
            client.since[rank] = min(client.since[rank], client.before[rank])
        self._insert(entry, request.accepted)
        return entry

    def discard(self, request: Request, turn_at: float | None = None) -> Entry:
        """It waits no longer: its turn has come, at that time, or it is not wanted any more."""
        entry = self._entries.pop(request.rid)
        client, rank = entry.client, entry.rank
        self._withdraw(entry)
        if turn_at is not None:
            client.before[rank], client.since[rank] = client.since[rank], turn_at
            for lower in CLASSES[_rank_of(request) + 1 :]:
                self._overtaken_at[lower] = turn_at
        self.pressure = self.pressure - 1 / (1 + client.waiting()) if self._entries else 0.0
        return entry

    def get(self, request: Request) -> Entry:
        return self._entries[request.rid]

    def park(self, name: str, parked: bool) -> bool:
        """The client may have no turn for the time being, or may again; whether that is new and something waits."""
        client = self._clients.get(name)
        if client is None or client.parked == parked:
            return False
        client.parked = parked
        self._turns_of(client)
        return client.waits

    def waits(self, name: str) -> bool:
        """Whether something of that client does."""
        client = self._clients.get(name)
        return client is not None and client.waits

    def is_first(self, entry: Entry) -> bool:
        """Whether its client has a turn for it."""
        return not entry.client.parked and entry.client.firsts[entry.rank].get(entry.kind) is entry

    def begin(self, name: str, cost: float, weight: float) -> None:
        """A request of the client runs, and will cost so many tokens."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(name, weight, self._served)
        client.running += 1
        self._running += 1
        self._dearest = max(self._dearest * DEAREST_KEPT, cost)
        self._serve(client, max(client.served, self._served - LAG_DEAREST * self._dearest / client.weight))
        self._served = max(self._served, client.served)
        self._serve(client, client.served + cost / client.weight)

    def end(self, name: str, charged: float, spent: float) -> None:
        """It has ended, and has cost so much instead of what it was charged."""
        client = self._clients[name]
        client.running -= 1
        self._serve(client, client.served + (spent - charged) / client.weight)
        self._served += spent / max(client.weight, 1.0) / (self._running + sum(map(len, self._waiting)))
        self._running -= 1

    def candidates(self, now: float, full: Container[Hashable] = ()) -> Generator[Entry]:
        """Waiting requests whose kind is not (or, between two of them, no longer) `full`, whose turn it is first.

        Of each client the first, and after one that was not taken the client's next of that kind.
        """
        self._raise(now)
        for rank in CLASSES:
            passed: dict[Entry, Turn] = {}
            heads: list[Turn] = []
            try:
                for kind in self._turns[rank]:
                    if kind not in full:
                        self._pop_turn(rank, kind, passed, heads)
                while heads:
                    turn = heapq.heappop(heads)
                    entry = turn[-1]
                    if entry.kind in full:
                        continue
                    yield entry
                    if entry.kind in full:
                        continue
                    if entry in passed:
                        self._pop_turn(rank, entry.kind, passed, heads)
                    following = entry.client.after(entry)
                    if following is not None:
                        heapq.heappush(heads, (turn[0], *following.key, next(self._number), following))
            finally:
                for entry, turn in passed.items():
                    heapq.heappush(self._turns[rank][entry.kind], turn)

    def _pop_turn(self, rank: int, kind: Hashable, passed: dict[Entry, Turn], heads: list[Turn]) -> None:
        """Take the next turn of that kind out of its heap, past those from before a counter, first or class changed."""
        turns = self._turns[rank][kind]
        while turns:
            turn = heapq.heappop(turns)
            served, entry = turn[0], turn[-1]
            if entry.rank == rank and served == entry.client.served and entry not in passed and self.is_first(entry):
                passed[entry] = turn
                heapq.heappush(heads, turn)
                return

    def position(self, entry: Entry) -> int:
        """How many come before it, and one, as counters stand and costs are estimated."""
        rank, client = entry.rank, entry.client
        own = bisect_left(client.queues[rank], entry.key)
        waiting, key, cost = self._waiting[rank], entry.key, self.cost
        start, served = own / client.weight, client.served
        looked_at = ahead = 0
        for other in waiting[:: -(-len(waiting) // SAMPLE_MAX)]:
            if other is not client:
                looked_at += 1
                lead = (start + (served - other.served) / cost) * other.weight  # so many of its turns before this one
                if lead >= 0:
                    queue, turns = other.queues[rank], int(lead)
                    ahead += turns + (lead > turns or queue[turns] < key) if turns < len(queue) else len(queue)
        if looked_at:
            ahead = ahead * (len(waiting) - 1) // looked_at
        others = self._counts[rank] - len(client.queues[rank])
        return sum(self._counts[:rank]) + own + min(ahead, others) + 1

    def counters(self) -> dict[str, float]:
        """What each client got here, in tokens by weight."""
        return {name: client.served for name, client in self._clients.items()}

    def _insert(self, entry: Entry, since: float) -> None:
        client, rank, kind = entry.client, entry.rank, entry.kind
        queue, waiting = client.queues[rank], self._waiting[rank]
        if not queue:
            self._serve(client, max(client.served, self._served))
            client.at[rank] = len(waiting)
            waiting.append(client)
            client.since[rank] = since
        self._rise(client, rank)
        insort(queue, (*entry.key, entry))
        first = client.firsts[rank].get(kind)
        if first is None or entry.key < first.key:
            client.firsts[rank][kind] = entry
            self._turn(client, rank, kind)
        self._counts[rank] += 1
        self.kinds[kind] += 1

    def _withdraw(self, entry: Entry) -> None:
        client, rank, kind = entry.client, entry.rank, entry.kind
        queue, waiting = client.queues[rank], self._waiting[rank]
        if client.firsts[rank][kind] is entry:
            following = client.after(entry)
            if following is None:
                del client.firsts[rank][kind]
            else:
                client.firsts[rank][kind] = following
                self._turn(client, rank, kind)
        del queue[bisect_left(queue, entry.key)]
        self._counts[rank] -= 1
        self.kinds[kind] -= 1
        if not self.kinds[kind]:
            del self.kinds[kind]
            for turns in self._turns:
                turns.pop(kind, None)
        if not queue:
            last = waiting.pop()
            if last is not client:
                waiting[client.at[rank]], last.at[rank] = last, client.at[rank]
        if not self._counts[rank]:
            self._turns[rank].clear()
            for _, _, one in self._rising[rank]:
                one.rises_at[rank] = inf
            self._rising[rank].clear()

    def _rise(self, client: Client, rank: int) -> None:
        """Have it looked whether its first is to be raised, when it has waited long enough."""
        at, rising, waiting = client.since[rank] + AGES_S[rank], self._rising[rank], self._waiting[rank]
        if rank and at < client.rises_at[rank]:
            client.rises_at[rank] = at
            heapq.heappush(rising, (at, next(self._number), client))
            if len(rising) > 2 * len(waiting) + SLACK:
                for _, _, one in rising:
                    one.rises_at[rank] = inf
                rising.clear()
                for one in waiting:
                    one.rises_at[rank] = one.since[rank] + AGES_S[rank]
                    rising.append((one.rises_at[rank], next(self._number), one))
                heapq.heapify(rising)

    def _raise(self, now: float) -> None:
        """The first requests of those that have waited long enough come into the next class."""
        for rank in (2, 1):
            rising = self._rising[rank]
            while rising and rising[0][0] <= now:
                at, _, client = heapq.heappop(rising)
                if at != client.rises_at[rank]:
                    continue  # an earlier time was set since
                client.rises_at[rank] = inf
                queue = client.queues[rank]
                if client.parked:
                    client.since[rank] = now  # a limit is not made up for
                risen_at = client.since[rank] + AGES_S[rank]
                if queue and risen_at <= now and self._overtaken_at[rank] < client.since[rank]:
                    client.rises_at[rank] = now + RISES_LOOK_S
                    heapq.heappush(rising, (client.rises_at[rank], next(self._number), client))
                    continue
                if queue and risen_at <= now:
                    entry = queue[0][3]
                    self._withdraw(entry)
                    client.since[rank] = now
                    entry.rank -= 1
                    self._insert(entry, risen_at)
                if queue:
                    self._rise(client, rank)

    def _turn(self, client: Client, rank: int, kind: Hashable) -> None:
        """Its counter, or its first request of that kind, has changed."""
        if client.parked:
            return
        turns, waiting = self._turns[rank].setdefault(kind, []), self._waiting[rank]
        heapq.heappush(turns, self._turn_of(client.firsts[rank][kind]))
        if len(turns) > 2 * len(waiting) + SLACK:
            having = [one for one in waiting if kind in one.firsts[rank] and not one.parked]
            turns[:] = [self._turn_of(one.firsts[rank][kind]) for one in having]
            heapq.heapify(turns)

    def _turn_of(self, entry: Entry) -> Turn:
        return (entry.client.served, *entry.key, next(self._number), entry)

    def _turns_of(self, client: Client) -> None:
        for rank in CLASSES:
            for kind in client.firsts[rank]:
                self._turn(client, rank, kind)

    def _serve(self, client: Client, served: float) -> None:
        """Its counter stands there now."""
        if served != client.served:
            client.served = served
            self._turns_of(client)

    def _sweep(self) -> None:
        """Forget clients that neither wait nor run, once they are many, but for the SLACK that have the largest debts.

        Without a debt a client begins as one that is new.
        """
        if len(self._clients) >= self._clients_max:
            away = [one for one in self._clients.values() if not one.running and not one.waits]
            debtors = heapq.nlargest(
                SLACK, (one for one in away if one.served > self._served), key=lambda one: one.served
            )
            for one in set(away).difference(debtors):
                del self._clients[one.name]
            self._clients_max = 2 * len(self._clients) + SLACK


def _rank_of(request: Request) -> int:
    """The class that was asked for."""
    return PRIORITIES.get(request.submit.priority, PRIORITIES["normal"])
