"""Whose turn it is: the line of one model, fair between clients. Pure.

Rules
-----
- Between clients the one comes first that was served least: each has a counter of the tokens it got in this line,
  divided by its weight, where a token written counts OUTPUT_WEIGHT times one read (the virtual token counter of VTC,
  arXiv 2401.00588). It is charged with an estimate when a request is placed, and put right when it has ended.
- Who comes back after a while begins at the least counter of those that wait: being away earns nothing. A debt stays.
- A request of a higher priority comes before all of a lower one, of whichever client. Waiting raises it: after AGES_S a
  batch request is treated as normal, a normal one as interactive. So nobody is passed by for ever.
- Among the requests of a client that have one priority the one due first comes first: due is its deadline, and at the
  latest PATIENCE_S after it was accepted.

Adding, removing and finding the next cost O(log clients).
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Final

from broker.state import Request

PRIORITIES: Final = {"interactive": 0, "normal": 1, "batch": 2}
CLASSES: Final = range(3)
AGES_S: Final = (0.0, 30.0, 60.0)
"""How long a request waits in its class until it is raised to the next."""
PATIENCE_S: Final = 60.0
OUTPUT_WEIGHT: Final = 2.0
SAMPLE_MAX: Final = 64
"""Clients that are looked at to tell a position; of more, a sample stands for all."""
CLIENTS_SLACK: Final = 256


@dataclass(slots=True, eq=False)
class Entry:
    """A waiting request. `cost` in tokens as estimated; `rises_at` is when it comes into the next class."""

    request: Request
    client: "Client"
    rank: int
    due: float
    cost: float
    rises_at: float
    patient_until: float = 0.0
    """Until then it may wait for a host that is warm for it, once that was decided."""

    @property
    def key(self) -> tuple[float, float, bytes]:
        return self.due, self.request.accepted, self.request.rid


Place = tuple[float, float, bytes, Entry]


@dataclass(slots=True, eq=False)
class Client:
    """A client in this line. `served`: its counter."""

    name: str
    weight: float = 1.0
    served: float = 0.0
    running: int = 0
    queues: tuple[list[Place], list[Place], list[Place]] = field(default_factory=lambda: ([], [], []))

    @property
    def waits(self) -> bool:
        return any(self.queues)


class Line:
    """Requests for one model."""

    def __init__(self) -> None:
        self._number = count()
        self._clients: dict[str, Client] = {}
        self._turns: tuple[list[tuple[float, str]], ...] = ([], [], [])
        self._rising: tuple[list[tuple[float, int, Entry]], ...] = ([], [], [])
        self._entries: dict[bytes, Entry] = {}
        self._counts = [0, 0, 0]
        self._served = 0.0  # the counter of the client that had the last turn
        self.cost = 1.0
        """What a waiting request costs on average, in tokens."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        return (entry.request for entry in self._entries.values())

    @property
    def idle(self) -> bool:
        """Nobody waits or runs."""
        return not self._entries and not any(client.running for client in self._clients.values())

    def add(self, request: Request, cost: float, now: float) -> Entry:
        """A request waits. `cost` in tokens."""
        submit = request.submit
        client = self._clients.get(submit.client)
        if client is None:
            self._sweep()
            client = self._clients[submit.client] = Client(submit.client)
        if not client.running and not client.waits:
            client.served = max(client.served, self._least())
        client.weight = submit.weight
        rank = PRIORITIES.get(submit.priority, PRIORITIES["normal"])
        due = request.accepted + PATIENCE_S
        if request.deadline is not None:
            due = min(due, request.deadline)
        entry = Entry(request, client, rank, due, cost, request.accepted + AGES_S[rank])
        self._entries[request.rid] = entry
        self.cost += (cost - self.cost) / min(len(self._entries), 100)
        self._insert(entry)
        return entry

    def discard(self, request: Request) -> Entry:
        """It waits no longer."""
        entry = self._entries.pop(request.rid)
        self._withdraw(entry)
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
            client = self._clients[name] = Client(name, weight, self._least())
        client.running += 1
        self._served = max(self._served, client.served)
        self._charge(client, cost)

    def end(self, name: str, correction: float) -> None:
        """It has ended, and cost so much more (or less) than was charged."""
        client = self._clients[name]
        client.running -= 1
        self._charge(client, correction)

    def candidates(self, now: float, admits: Callable[[str], bool]) -> Generator[Entry]:
        """The first waiting request of each client that `admits` lets through, whose turn it is first."""
        self._raise(now)
        for rank in CLASSES:
            turns = self._turns[rank]
            passed: list[tuple[float, str]] = []
            seen: set[str] = set()
            try:
                while turns:
                    served, name = turns[0]
                    client = self._clients.get(name)
                    queue = client.queues[rank] if client is not None else None
                    if not queue or client is None or served != client.served or name in seen:
                        heapq.heappop(turns)  # from before its counter changed, or it waits no longer
                        continue
                    seen.add(name)
                    passed.append(heapq.heappop(turns))
                    if admits(name):
                        yield queue[0][3]
            finally:
                for turn in passed:
                    heapq.heappush(turns, turn)

    def position(self, entry: Entry) -> int:
        """How many come before it, and one, as counters stand and costs are estimated."""
        rank, client = entry.rank, entry.client
        own = bisect_left(client.queues[rank], entry.key)
        start = client.served + own * self.cost / client.weight
        looked_at, ahead = 0, 0.0
        for other in islice(self._clients.values(), SAMPLE_MAX):
            looked_at += 1
            waiting = len(other.queues[rank])
            if other is not client and waiting:
                lead = (start - other.served) * other.weight / self.cost
                ahead += min(waiting, lead + 1.0) if lead > 0 else float(lead == 0 and other.name < client.name)
        others = self._counts[rank] - len(client.queues[rank])
        ahead = min(ahead * len(self._clients) / looked_at, others)
        return sum(self._counts[:rank]) + own + int(ahead) + 1

    def counters(self) -> dict[str, float]:
        """What each client got here, in tokens by weight."""
        return {name: client.served for name, client in self._clients.items()}

    def _insert(self, entry: Entry) -> None:
        queue = entry.client.queues[entry.rank]
        insort(queue, (*entry.key, entry))
        self._counts[entry.rank] += 1
        if len(queue) == 1:
            self._turn(entry.client, entry.rank)
        if entry.rank:
            rising = self._rising[entry.rank]
            heapq.heappush(rising, (entry.rises_at, next(self._number), entry))
            if len(rising) > 2 * self._counts[entry.rank] + CLIENTS_SLACK:
                rising[:] = [one for one in rising if self._stands(one[2], entry.rank)]
                heapq.heapify(rising)

    def _withdraw(self, entry: Entry) -> None:
        queue = entry.client.queues[entry.rank]
        del queue[bisect_left(queue, entry.key)]
        self._counts[entry.rank] -= 1

    def _stands(self, entry: Entry, rank: int) -> bool:
        return entry.rank == rank and self._entries.get(entry.request.rid) is entry

    def _raise(self, now: float) -> None:
        """Those that have waited long enough come into the next class."""
        for rank in (2, 1):
            rising = self._rising[rank]
            while rising and (rising[0][0] <= now or not self._stands(rising[0][2], rank)):
                _, _, entry = heapq.heappop(rising)
                if self._stands(entry, rank):
                    self._withdraw(entry)
                    entry.rank -= 1
                    entry.rises_at += AGES_S[entry.rank]
                    self._insert(entry)

    def _turn(self, client: Client, rank: int) -> None:
        turns = self._turns[rank]
        heapq.heappush(turns, (client.served, client.name))
        if len(turns) > 2 * len(self._clients) + CLIENTS_SLACK:
            turns[:] = [(one.served, one.name) for one in self._clients.values() if one.queues[rank]]
            heapq.heapify(turns)

    def _charge(self, client: Client, tokens: float) -> None:
        if tokens:
            client.served += tokens / client.weight
            for rank in CLASSES:
                if client.queues[rank]:
                    self._turn(client, rank)

    def _least(self) -> float:
        """The least counter of those that wait; of nobody, that of the last turn."""
        least: float | None = None
        for rank in CLASSES:
            turns = self._turns[rank]
            while turns:
                served, name = turns[0]
                client = self._clients.get(name)
                if client is not None and client.queues[rank] and served == client.served:
                    least = served if least is None else min(least, served)
                    break
                heapq.heappop(turns)
        return self._served if least is None else least

    def _sweep(self) -> None:
        """Forget clients that neither wait nor run, once they are many; debts of those away longest go with them."""
        if len(self._clients) >= CLIENTS_SLACK and len(self._clients) >= 2 * len(self._entries):
            self._clients = {name: one for name, one in self._clients.items() if one.running or one.waits}
