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
- A request of a higher priority comes before all of a lower one, of whichever client. Waiting raises it: if a client
  has had no turn in its class for AGES_S, its first batch request there is treated as normal, its first normal one as
  interactive. So nobody is passed by for ever. It is the client that has to wait so long, not the request: else the
  backlog of one that floods would grow older than the others' requests, and come before them all.
- Among the requests of a client that have one priority the one due first comes first: due is its deadline, and at the
  latest PATIENCE_S after it was accepted.

Adding, removing and finding the next cost O(log clients).
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from broker.state import Request

PRIORITIES: Final = {"interactive": 0, "normal": 1, "batch": 2}
CLASSES: Final = range(3)
AGES_S: Final = (0.0, 30.0, 60.0)
"""How long a client waits for a turn in a class until its first request is raised to the next."""
PATIENCE_S: Final = 60.0
OUTPUT_WEIGHT: Final = 2.0
LAG_DEAREST: Final = 4.0
"""How many of the dearest requests a client may lag behind. Of those that can run none lags more than 2 (so VTC)."""
SAMPLE_MAX: Final = 64
"""Clients that are looked at to tell a position; of more, a sample stands for all."""
SLACK: Final = 256
"""Clients that are remembered for their debts, and entries of a heap that may be stale, beside as many as count."""


@dataclass(slots=True, eq=False)
class Entry:
    """A waiting request. `cost` in tokens as estimated."""

    request: Request
    client: "Client"
    rank: int
    due: float
    cost: float
    share: float = 1.0
    """What it counts among those that wait: the more of its client wait already, the less."""
    patient_until: float = 0.0
    """Until then it may wait for a host that is warm for it, once that was decided."""
    kind: Hashable = None
    """Where there is no room for one there is none for others of its kind."""

    @property
    def key(self) -> tuple[float, float, bytes]:
        return self.due, self.request.accepted, self.request.rid


Place = tuple[float, float, bytes, Entry]
Turn = tuple[float, float, float, bytes, int, Entry]
"""The counter of a client, and its first request: as it was."""


@dataclass(slots=True, eq=False)
class Client:
    """A client in this line. `served`: its counter; `at`: where it is among those that wait in each class.

    `since`: when it came into each class, or had its last turn there.
    """

    name: str
    weight: float = 1.0
    served: float = 0.0
    running: int = 0
    queues: tuple[list[Place], list[Place], list[Place]] = field(default_factory=lambda: ([], [], []))
    at: list[int] = field(default_factory=lambda: [0, 0, 0])
    since: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    rises: list[bool] = field(default_factory=lambda: [False, False, False])
    """Whether it is among those that may be raised."""

    @property
    def waits(self) -> bool:
        return any(self.queues)


class Line:
    """Requests for one model."""

    def __init__(self) -> None:
        self._number = count()
        self._clients: dict[str, Client] = {}
        self._clients_max = SLACK
        self._waiting: tuple[list[Client], ...] = ([], [], [])
        self._turns: tuple[list[Turn], ...] = ([], [], [])
        self._rising: tuple[list[tuple[float, int, Client]], ...] = ([], [], [])
        self._entries: dict[bytes, Entry] = {}
        self._counts = [0, 0, 0]
        self._served = 0.0  # where a client begins
        self._running = 0
        self._dearest = 0.0  # the most that a request was charged, by weight
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

    def add(self, request: Request, cost: float) -> Entry:
        """A request waits. `cost` in tokens."""
        submit = request.submit
        client = self._clients.get(submit.client)
        if client is None:
            self._sweep()
            client = self._clients[submit.client] = Client(submit.client)
        client.weight = submit.weight
        rank = PRIORITIES.get(submit.priority, PRIORITIES["normal"])
        due = request.accepted + PATIENCE_S
        if request.deadline is not None:
            due = min(due, request.deadline)
        entry = Entry(request, client, rank, due, cost)
        entry.share = 1 / (1 + sum(map(len, client.queues)))
        self.pressure += entry.share
        self._entries[request.rid] = entry
        self.cost += (cost - self.cost) / min(len(self._entries), 100)
        self._insert(entry, request.accepted)
        return entry

    def discard(self, request: Request, now: float) -> Entry:
        """It waits no longer."""
        entry = self._entries.pop(request.rid)
        self._withdraw(entry, now)
        if not self._entries:
            for rank in CLASSES:
                self._turns[rank].clear()
                for _, _, client in self._rising[rank]:
                    client.rises[rank] = False
                self._rising[rank].clear()
        self.pressure = self.pressure - entry.share if self._entries else 0.0
        return entry

    def get(self, request: Request) -> Entry:
        return self._entries[request.rid]

    def is_first(self, entry: Entry) -> bool:
        """Whether it is its client's first, whose turn may be next."""
        return entry.client.queues[entry.rank][0][3] is entry

    def begin(self, name: str, cost: float, weight: float) -> None:
        """A request of the client runs, and will cost so many tokens."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(name, weight, self._served)
        client.running += 1
        self._running += 1
        self._dearest = max(self._dearest, cost / client.weight)
        self._serve(client, max(client.served, self._served - LAG_DEAREST * self._dearest))
        self._served = max(self._served, client.served)
        self._serve(client, client.served + cost / client.weight)

    def end(self, name: str, charged: float, spent: float) -> None:
        """It has ended, and has cost so much instead of what it was charged."""
        client = self._clients[name]
        client.running -= 1
        self._serve(client, client.served + (spent - charged) / client.weight)
        self._served += spent / client.weight / (self._running + sum(map(len, self._waiting)))
        self._running -= 1

    def candidates(self, now: float, admits: Callable[[str], bool]) -> Generator[Entry]:
        """The first waiting request of each client that `admits` lets through, whose turn it is first."""
        self._raise(now)
        for rank in CLASSES:
            turns = self._turns[rank]
            passed: list[Turn] = []
            seen: set[Client] = set()
            try:
                while turns:
                    turn = heapq.heappop(turns)
                    served, entry = turn[0], turn[-1]
                    client, queue = entry.client, entry.client.queues[rank]
                    if not queue or queue[0][3] is not entry or served != client.served or client in seen:
                        continue  # from before its counter or its first request changed
                    seen.add(client)
                    passed.append(turn)
                    if admits(client.name):
                        yield entry
            finally:
                for turn in passed:
                    heapq.heappush(turns, turn)

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
        client, rank = entry.client, entry.rank
        queue, waiting = client.queues[rank], self._waiting[rank]
        if not queue:
            self._serve(client, max(client.served, self._served))
            client.at[rank] = len(waiting)
            waiting.append(client)
            client.since[rank] = since
            if rank and not client.rises[rank]:
                client.rises[rank] = True
                heapq.heappush(self._rising[rank], (since + AGES_S[rank], next(self._number), client))
        insort(queue, (*entry.key, entry))
        if queue[0][3] is entry:
            self._turn(client, rank)
        self._counts[rank] += 1

    def _withdraw(self, entry: Entry, now: float) -> None:
        client, rank = entry.client, entry.rank
        queue, waiting = client.queues[rank], self._waiting[rank]
        index = bisect_left(queue, entry.key)
        del queue[index]
        self._counts[rank] -= 1
        if not index:
            client.since[rank] = now
        if not queue:
            last = waiting.pop()
            if last is not client:
                waiting[client.at[rank]], last.at[rank] = last, client.at[rank]
        elif not index:
            self._turn(client, rank)

    def _raise(self, now: float) -> None:
        """The first requests of those that have waited long enough come into the next class."""
        for rank in (2, 1):
            rising = self._rising[rank]
            while rising and rising[0][0] <= now:
                _, number, client = rising[0]
                queue, rises_at = client.queues[rank], client.since[rank] + AGES_S[rank]
                if queue and rises_at <= now:
                    entry = queue[0][3]
                    self._withdraw(entry, now)
                    entry.rank -= 1
                    self._insert(entry, rises_at)
                    rises_at = now + AGES_S[rank]
                if queue:
                    heapq.heapreplace(rising, (rises_at, number, client))
                else:
                    heapq.heappop(rising)
                    client.rises[rank] = False

    def _turn(self, client: Client, rank: int) -> None:
        """Its counter or its first request in that class has changed."""
        turns, waiting = self._turns[rank], self._waiting[rank]
        heapq.heappush(turns, self._turn_of(client, rank))
        if len(turns) > 2 * len(waiting) + SLACK:
            turns[:] = [self._turn_of(one, rank) for one in waiting]
            heapq.heapify(turns)

    def _turn_of(self, client: Client, rank: int) -> Turn:
        due, accepted, rid, entry = client.queues[rank][0]
        return client.served, due, accepted, rid, next(self._number), entry

    def _serve(self, client: Client, served: float) -> None:
        """Its counter stands there now."""
        if served != client.served:
            client.served = served
            for rank in CLASSES:
                if client.queues[rank]:
                    self._turn(client, rank)

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
