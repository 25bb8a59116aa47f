"""Which rights a request has by its API token.

Rules. A token that was good before costs a hash and a look into a dictionary: the registry is not asked again until
others push it out, or `revoke` says that something changed. Its expiry is watched here, by the wall clock, as that is
what it was written by. Any other token is looked up in a thread, at most `workers` at once, so a flood of wrong ones
holds up neither the event loop nor the tokens that are known. When `LOOK_UPS_MAX` wait, the next is told to come again.

A failure tells nothing: malformed, unknown, expired and revoked have the same text and are answered at the same moment,
`ANSWER_S` after receipt, as a WebSocket's log-in (`gateway.auth`). Failures are not remembered.

A look-up under way when something is revoked may have read what was before. It is made again, so that nothing has to be
remembered of what was revoked, and a change that leaves the token alive (its end moved) is seen too.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Final

from common.errors import Code, FabricError
from common.protocol import full_name, short_name
from gateway.auth import ANSWER_S
from gateway.store import Client, Scope, Token, token_digest

GRANTS_MAX: Final = 10_000
LOOK_UPS_MAX: Final = 1_000
"""They wait for about half a millisecond each, two at a time."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a request may do: the id of its client and of its token, scopes, and patterns of models (see `Token`)."""

    client: str
    token: str
    scopes: frozenset[str]
    models: tuple[str, ...]

    def allows(self, scope: str) -> bool:
        """Whether it may do what needs `scope`; `admin` may everything."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def allows_model(self, name: str) -> bool:
        """Whether it may use the model, however it is written: `llama2` and `llama2:latest` are one."""
        return matches(name, self.models)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns means the model, with its tag or, where that is `latest`, without."""
    full = full_name(name)
    short = short_name(full)
    return any(fnmatchcase(short, pattern) or fnmatchcase(full, pattern) for pattern in patterns)


class Keyring:
    """Turns tokens into grants, on the event loop. `find` is `Store.find_token`; it is called in threads."""

    def __init__(
        self,
        find: Callable[[str], tuple[Token, Client] | None],
        *,
        workers: int = 2,
        grants_max: int = GRANTS_MAX,
        look_ups_max: int = LOOK_UPS_MAX,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._find = find
        self._turn = asyncio.Semaphore(workers)
        self._grants_max = grants_max
        self._look_ups_max = look_ups_max
        self._look_ups = 0
        self._clock = clock
        self._wall_clock = wall_clock
        self._sleep = sleep
        # By digest, the one used longest ago first.
        self._known: OrderedDict[str, tuple[Grant, Token]] = OrderedDict()
        self._changes = 0

    async def grant(self, token: str) -> Grant:
        """The rights of who sends the text `token`. Call it on receipt of the request.

        Who it returns to hears of it in the same turn of the loop, so a revocation is either seen here or finds the
        request with its client's and its token's id.

        Raises:
            FabricError: AUTH_FAILED, `ANSWER_S` after the call; under a flood, at a later multiple of it. RATE_LIMITED,
                at once, if `look_ups_max` others wait.
            StoreError: the registry can't be read. Tokens that aren't known are refused.
        """
        received = self._clock()
        digest = token_digest(token)
        grant = None if digest is None else self._kept(digest) or await self._look_up(digest)
        if grant is not None:
            return grant
        # On a grid, so that a slow answer says no more than a fast one.
        elapsed = self._clock() - received
        await self._sleep(ANSWER_S * max(1, math.ceil(elapsed / ANSWER_S)) - elapsed)
        raise FabricError(Code.AUTH_FAILED, "authentication failed")

    def revoke(self, clients: Iterable[str], tokens: Iterable[str]) -> None:
        """Ask the registry again before these tokens, and those of these clients, are good for anything.

        Call it after what changed can be read there: with clients that were revoked, and tokens that were revoked or
        whose expiry was set.
        """
        gone, dead = frozenset(clients), frozenset(tokens)
        if not gone and not dead:
            return
        self._changes += 1
        for digest, (grant, _) in list(self._known.items()):
            if grant.client in gone or grant.token in dead:
                del self._known[digest]

    def _kept(self, digest: str) -> Grant | None:
        found = self._known.get(digest)
        if found is None:
            return None
        grant, token = found
        if not token.live(self._wall_clock()):
            del self._known[digest]
            return None
        self._known.move_to_end(digest)
        return grant

    async def _look_up(self, digest: str) -> Grant | None:
        if self._look_ups >= self._look_ups_max:
            raise FabricError(Code.RATE_LIMITED, "too many requests authenticate at once; try again in a second")
        self._look_ups += 1
        try:
            while True:
                await self._turn.acquire()
                # Perhaps found meanwhile, for another request with the same token.
                if (grant := self._kept(digest)) is not None:
                    self._turn.release()
                    return grant
                before = self._changes
                thread = asyncio.get_running_loop().run_in_executor(None, self._find, digest)
                shielded = asyncio.shield(thread)
                # When the thread has ended, not when the request leaves: the next one would be one too many. And after
                # `shielded` is done, so that who has the next turn finds what is kept here.
                thread.add_done_callback(lambda _: self._turn.release())
                found = await shielded
                if before == self._changes:
                    return None if found is None else self._keep(digest, *found)
        finally:
            self._look_ups -= 1

    def _keep(self, digest: str, token: Token, client: Client) -> Grant | None:
        if client.revoked or not token.live(self._wall_clock()):
            return None
        grant = Grant(client.id, token.id, frozenset(token.scopes), token.models)
        self._known[digest] = grant, token
        if len(self._known) > self._grants_max:
            self._known.popitem(last=False)
        return grant
