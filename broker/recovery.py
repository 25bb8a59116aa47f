"""What a broker believes of a past that it has not seen: after its restart, or when its peers come from another broker.

A broker keeps nothing on disk. Workers claim the leases they hold, gateways submit again what has no terminal, in any
order and each at its own time; `agrees` and `believes` decide what comes of it, the same whichever comes first.

- **The highest attempt counts**, unless the gateway was told that it is lost; at a tie the one the gateway names.
- **What the client has had decides.** An attempt whose events do not follow from what was passed on is no good, however
  high: it would put two texts together. A claim does not tell where its attempt began; so one that the gateway does
  not name is believed only while nothing was passed on.
- **Between our attempts and another broker's the gateway decides**: their ordinals tell nothing about each other. As
  long as it has named none of the other's, it may have followed it without our knowing. Until it speaks, or the
  window closes, the claim waits (`disputed`), as it may have the only copy of its events.
- **The window** is open for `recover_s` after the broker met its first peer, and after every trace of another broker.
  While it is open a claim without a request is taken up, a cancel or an end leaves a tombstone, so that a late claim is
  cancelled too, and a client that looks for an unknown request waits. Beyond it whatever is unknown is over.
- A request that was leased waits `recover_s` for its worker, from when its gateway submitted it.
- A lease of this broker's own making is no trace: it knew the request, and has ended it.
"""

from typing import Final

from broker.state import Phase, Request, Worker
from common.errors import Code
from common.protocol import Claim, Failed, Submit, attempt_of, ordinal_of

HOLD_S: Final = 1.5
"""Nothing is leased for so long once the first gateway submits again: the oldest request may come last."""
TOMBSTONES_MAX: Final = 100_000
"""Ended requests remembered while the window is open; of one more a late claim runs until its time is over."""
DISPUTED_MAX: Final = 10_000
"""Claims that wait for their gateway's word; one more is cancelled at once."""
ATTACHES_MAX: Final = 10_000
"""Clients that wait for a request which a worker or another gateway may still bring; one more hears NOT_FOUND."""


class Window:
    """The time in which the past may still come in, and what waits for it or must not come back."""

    def __init__(self, recover_s: float, nonce: int, now: float) -> None:
        self.recover_s = recover_s
        self.tombstones: set[bytes] = set()
        self.disputed: dict[bytes, dict[int, tuple[Worker, Claim]]] = {}
        """rid → attempt → who claims it."""
        self.attaches: dict[tuple[str, str], tuple[str, int]] = {}
        """(client, ref) → (gateway's name, the id of its question)."""
        self._nonce = nonce
        self.open(now)

    def open(self, now: float) -> None:
        """The first peers come: all of them may have a past."""
        self.opened = now
        self.until = now + self.recover_s
        self.hold_until = now
        self.traced = False

    def trace(self, now: float) -> None:
        """Another broker was here: more may follow."""
        self.traced, self.until = True, now + self.recover_s

    def hold(self, now: float) -> None:
        """A gateway submits again: wait for the others before anything is leased, once after the opening."""
        if self.hold_until == self.opened and now < self.opened + self.recover_s:
            self.hold_until = now + HOLD_S

    def bury(self, rid: bytes, now: float) -> None:
        """The request is over: a worker may not have heard."""
        if now < self.until and len(self.tombstones) < TOMBSTONES_MAX:
            self.tombstones.add(rid)

    def made_here(self, attempt: int) -> bool:
        """Whether this broker has named the attempt."""
        return attempt_of(ordinal_of(attempt), self._nonce) == attempt

    def dispute(self, request: Request, worker: Worker, claim: Claim, now: float) -> bool:
        """Keep a claim until its gateway has spoken; False: there is nothing to decide, or there are too many."""
        named = request.submit.attempt
        open_ = request.holder and (not named or self.made_here(named)) and not self.made_here(claim.attempt)
        if not open_ or len(self.disputed) >= DISPUTED_MAX:
            return False
        self.trace(now)
        self.disputed.setdefault(claim.rid, {})[claim.attempt] = worker, claim
        return True

    def waits(self, rid: bytes, attempt: int) -> bool:
        """Whether it is not decided yet what this attempt is."""
        return attempt in self.disputed.get(rid, ())

    def admits(self, claim: Claim, now: float) -> bool:
        """Whether a claim of a request that is unknown may be true."""
        return now < self.until and not self.made_here(claim.attempt) and claim.rid not in self.tombstones


def agrees(known: Request, submit: Submit) -> bool:
    """Whether what is held is what this gateway means, or goes on from what it has, or from even more of the same."""
    if known.attempt and submit.attempt == known.attempt:
        return not submit.lost
    named = ordinal_of(submit.attempt)
    if named > known.ordinal or (named == known.ordinal and known.attempt):
        return False
    return submit.next_seq <= known.start


def believes(request: Request, claim: Claim) -> bool:
    """Whether a lease that a worker claims, and that it is not known to have, is the one that counts."""
    if claim.attempt == request.attempt:
        return request.phase is Phase.RECOVERING or (given_up(request) and request.worker is None)
    if ordinal_of(claim.attempt) <= request.ordinal:
        return False
    return not request.holder or (request.phase is not Phase.ENDED and not request.events)


def given_up(request: Request) -> bool:
    """Whether we took the worker for dead, and the request's gateway may have another attempt: it has not asked yet."""
    terminal = request.terminal
    return isinstance(terminal, Failed) and terminal.code is Code.WORKER_LOST and terminal.resubmit
