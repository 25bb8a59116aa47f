"""Hosts and named requests around the broker's core, for the scheduler's tests.

Rates are taught as an engine would teach them: by the statistics at the end of a request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from broker.policy import Policy
from broker.runners import Demand, Runner, Server
from broker.state import Phase
from common.prefix import chain
from common.protocol import (
    End,
    Engine,
    Model,
    Stats,
)
from tests.unit.broker.harness import Harness, rid_of

GB = 10**9
MS = 10**6
"""In ns."""


def host(
    *resident: str,
    cold: Sequence[str] = (),
    sizes: Mapping[str, float] | None = None,
    slots: int = 1,
    url: str = "http://e1",
    **more: Any,
) -> Engine:
    """An engine on which some models are loaded and others are not, of 4 GB each unless said otherwise."""
    models = tuple(
        Model(
            name=f"{name}:latest",
            digest=f"sha:{name}",
            slots=slots,
            size_bytes=int((sizes or {}).get(name, 4) * GB),
            resident=name in resident,
        )
        for name in (*resident, *cold)
    )
    return Engine(url=url, models=models, **more)


class Fleet(Harness):
    """A harness whose requests are named: models and clients by a letter, requests by client and number."""

    def __init__(self, *, rules: Sequence[str] = (), labels: Sequence[str] = (), **hosts: Engine) -> None:
        super().__init__(rules=tuple(rules))
        self.gateway("g1")
        self.hosts = hosts
        for name, engine in hosts.items():
            self.worker(name, engine)

    @property
    def policy(self) -> Policy:
        assert isinstance(self.core.scheduler, Policy)
        return self.core.scheduler

    def ask(self, name: str, model: str = "m", *, text: str = "", **more: Any) -> str:
        """Client and number, as in `a1`; `text` has a block of its prompt for each letter. Where it is then."""
        if text:
            prefix, size = chain([letter.encode() * 512 for letter in text])
            more = {"prompt_bytes": size, "prefix": prefix, **more}
        self.submit(name, model=f"{model}:latest", client=name[0], **more)
        return self.where(name)

    def where(self, *names: str) -> str:
        """The hosts of these requests, - for one that waits, x for one that is over."""
        places = []
        for name in names:
            request = self.core.state.requests.get(rid_of(name))
            over = request is None or request.phase is Phase.ENDED
            places.append("x" if over or request is None else request.worker.name if request.worker else "-")
        return " ".join(places)

    def begin(self, name: str) -> None:
        """Its engine answers, so what had to be loaded is loaded; and its first event comes."""
        request = self.request(rid_of(name))
        assert request.worker is not None
        self.started(request.rid, request.attempt, peer=request.worker.peer)
        self.chunk(request.rid, request.attempt, peer=request.worker.peer)

    def finish(self, *names: str, **stats: Any) -> None:
        for name in names:
            request = self.request(rid_of(name))
            assert request.worker is not None
            peer = request.worker.peer
            self.from_worker(
                End(rid=request.rid, attempt=request.attempt, seq=request.events, stats=Stats(**stats)), peer=peer
            )
            self.ack(request.rid)

    def teach(
        self, worker: str, model: str = "m", *, token_ms: float = 0, read_ms: float = 0, load_s: float = 0
    ) -> None:
        """A request that is for this host alone tells how fast it is."""
        runner = self.runner(worker, model)
        if token_ms:
            runner.rates.saw_tokens(100, int(100 * token_ms * MS), 0)
        if read_ms:
            runner.rates.saw_prefill(1000, int(1000 * read_ms * MS))
        if load_s:
            runner.rates.saw_load(int(load_s * 1000 * MS))
        runner.server.refresh()

    def server(self, worker: str, url: str = "http://e1") -> Server:
        return self.policy.runners.servers[worker][url]

    def runner(self, worker: str, model: str = "m") -> Runner:
        return self.server(worker).runners[f"sha:{model}"]

    def demand(self, model: str = "m") -> Demand:
        return self.policy.runners.demands[f"{model}:latest"]

    def loaded(self, worker: str) -> str:
        return " ".join(sorted(digest.removeprefix("sha:") for digest in self.server(worker).loaded))

    def pass_time(self, seconds: float) -> None:
        self.wait(seconds, beating=(b"g1", *(name.encode() for name in self.core.state.workers)))


def warm_on_w2(**more: Any) -> Fleet:
    """Both hosts are free, and w2 has read the beginning `abcd…`, of 100 blocks."""
    f = Fleet(w1=host("m", **more), w2=host("m", **more))
    for worker in ("w1", "w2"):
        f.teach(worker, token_ms=10, read_ms=2)
    for number in range(more.get("slots", 1)):
        assert f.ask(f"x{number}") == "w1" or more
    assert f.ask("a1", text=TEXT) == "w2"
    f.finish("x0", "a1")
    return f


TEXT = "".join(chr(0x4E00 + number) for number in range(34))
