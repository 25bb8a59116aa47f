"""Which models are loaded, who holds a slot and who waits.

Rules, after Ollama's scheduler (`server/sched.go`):
1. A request holds one slot of its model's runner from grant to release. Requests beyond the slots wait in order of
   arrival; the 513th waiting one is refused with 503.
2. A request for another context length than the loaded one reloads the model, once the running requests have ended.
3. Models load one at a time. At `loaded_max`, or where the new one does not fit into memory beside them, one leaves: an
   idle one before a busy one, then that with the shortest keep_alive. A busy one gets no further requests and leaves
   when its running ones have ended.
4. After its last request a model stays for its keep_alive (the last one given, else 5 minutes), then it is unloaded.
5. When nobody waits for a load any more, the load is aborted.
6. A runner that has died is forgotten; the next request loads anew.

A place (`_Place`) is the one record of a model: requests move waiting → running → gone, and `_pump` alone grants slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from workers.embedded.wire import ApiError, expiry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.embedded.engine import Backend, Model, Runner

log = logging.getLogger(__name__)

KEEP_ALIVE_S: Final = 300.0
WAITING_MAX: Final = 512
BUSY: Final = "server busy, please try again.  maximum pending requests exceeded"
_TIMER_MAX_S: Final = 10 * 365 * 86_400.0
"""Beyond this a keep_alive needs no timer (and would overflow the loop's)."""


@dataclass(slots=True)
class _Place:
    model: Model
    slots: int
    runner: Runner | None = None
    busy: int = 0
    served: int = 0
    loads: int = 0
    evicted: int = 0
    evicted_busy: int = 0
    waiting: deque[tuple[asyncio.Future[Runner], int]] = field(default_factory=deque)
    loading: asyncio.Task[None] | None = None
    keep_alive_s: float = KEEP_ALIVE_S
    idle_since_s: float = 0.0
    timer: asyncio.TimerHandle | None = None
    leaving: asyncio.Event | None = None
    """Present while another model's load waits for this one to leave; set when its last request has ended."""

    @property
    def idle(self) -> bool:
        return self.runner is not None and not self.busy and not self.waiting

    def stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None


class Residency:
    """Grants slots of loaded models. All of its tasks live inside `open()`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._places: dict[str, _Place] = {}
        self._one_load = asyncio.Lock()
        self._tasks = asyncio.TaskGroup()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Own loads and unloads; on exit every model is unloaded."""
        async with self._tasks:
            try:
                yield
            finally:
                for place in self._places.values():
                    if place.loading:
                        place.loading.cancel()
                    self._unload(place)

    @contextlib.asynccontextmanager
    async def lease(self, model: Model, num_ctx: int, keep_alive_s: float | None) -> AsyncIterator[Runner]:
        """Hold one slot of `model`, loaded if need be. ApiError 503 when too many wait, 500 when it cannot load."""
        place = self._places.get(model.digest)
        if place is None:
            place = self._places[model.digest] = _Place(model, self._backend.slots(model))
        runner = await self._acquire(place, model, self._backend.context_length(model, num_ctx))
        if keep_alive_s is not None:
            place.keep_alive_s = keep_alive_s
        try:
            yield runner
        finally:
            place.served += 1
            self._release(place)

    def expire(self, model: Model) -> None:
        """Unload as soon as the requests that hold or await the model are done."""
        if place := self._places.get(model.digest):
            place.keep_alive_s = 0.0
            self._rest(place)

    def ps(self) -> list[dict[str, Any]]:
        """The loaded models as `/api/ps` tells them, the longest to stay first."""
        now_s, now_ns = asyncio.get_running_loop().time(), time.time_ns()
        resident = []
        for place in self._places.values():
            if (runner := place.runner) and runner.alive:
                left_s = place.keep_alive_s - (now_s - place.idle_since_s if place.idle else 0.0)
                resident.append((left_s, place.model, runner))
        resident.sort(key=lambda item: -item[0])
        return [
            {
                "name": model.name,
                "model": model.name,
                "size": runner.size_bytes,
                "digest": model.digest,
                "details": model.details(),
                "expires_at": expiry(now_ns, left_s),
                "size_vram": 0,
                "context_length": runner.context_length,
            }
            for left_s, model, runner in resident
        ]

    def slots(self) -> dict[str, dict[str, Any]]:
        """Of every model used so far: its slots, how many are busy, how many requests wait, how many were served.

        And how often it was loaded, how often it left for another, and how often that had to wait for its requests.
        """
        return {
            place.model.name: {
                "loaded": place.runner is not None and place.runner.alive,
                "slots": place.slots,
                "busy": place.busy,
                "waiting": len(place.waiting),
                "served": place.served,
                "loads": place.loads,
                "evicted": place.evicted,
                "evicted_busy": place.evicted_busy,
            }
            for place in self._places.values()
        }

    async def _acquire(self, place: _Place, model: Model, context_length: int) -> Runner:
        if len(place.waiting) >= WAITING_MAX:
            raise ApiError(503, BUSY)
        granted: asyncio.Future[Runner] = asyncio.get_running_loop().create_future()
        entry = (granted, context_length)
        place.waiting.append(entry)
        if place.runner is None and place.loading is None:
            place.model = model  # of several names for one digest, that which loads it is shown
        self._pump(place)
        try:
            return await granted
        except asyncio.CancelledError:
            if entry in place.waiting:
                place.waiting.remove(entry)
                if not place.waiting and place.loading:
                    place.loading.cancel()
                self._rest(place)
                self._pump(place)
            elif granted.done() and not granted.cancelled() and granted.exception() is None:
                self._release(place)  # granted in the same turn of the loop as the cancellation
            raise

    def _release(self, place: _Place) -> None:
        place.busy -= 1
        if place.leaving and not place.busy:
            place.leaving.set()
        self._rest(place)
        self._pump(place)

    def _pump(self, place: _Place) -> None:
        """Grant what can be granted; start the load that the first in line needs."""
        if place.leaving:
            return
        if place.runner is not None and not place.runner.alive:
            self._unload(place)
        while place.waiting and place.loading is None:
            granted, context_length = place.waiting[0]
            if granted.done():  # cancelled, and its task has not run yet
                place.waiting.popleft()
            elif place.runner is None or place.runner.context_length != context_length:
                if not place.busy:
                    loading = self._load(place, context_length)
                    place.loading = self._tasks.create_task(loading, name=f"load {place.model.name}")
                return
            elif place.busy < place.slots:
                place.waiting.popleft()
                place.busy += 1
                place.stop_timer()
                granted.set_result(place.runner)
            else:
                return

    async def _load(self, place: _Place, context_length: int) -> None:
        try:
            async with self._one_load:
                self._unload(place)
                await self._make_room(place.model.size_bytes)
                place.keep_alive_s = KEEP_ALIVE_S
                place.runner = await self._backend.load(place.model, context_length)
                place.loads += 1
        except ApiError as error:
            log.warning("model %s did not load: %s", place.model.name, error.message)
            while place.waiting:
                granted, _ = place.waiting.popleft()
                if not granted.done():
                    granted.set_exception(ApiError(error.status, error.message))
        finally:
            place.loading = None
            self._rest(place)
            self._pump(place)

    async def _make_room(self, size_bytes: int) -> None:
        while resident := [place for place in self._places.values() if place.runner]:
            needed = size_bytes + sum(place.model.size_bytes for place in resident)
            fits = not self._backend.memory_bytes or needed <= self._backend.memory_bytes
            if len(resident) < self._backend.loaded_max and fits:
                return
            victim = min(resident, key=lambda place: (place.busy > 0, place.keep_alive_s, place.idle_since_s))
            victim.leaving = asyncio.Event()
            try:
                if victim.busy:
                    victim.evicted_busy += 1
                    await victim.leaving.wait()
                self._unload(victim)
                victim.evicted += 1
            finally:
                victim.leaving = None
                self._pump(victim)

    def _rest(self, place: _Place) -> None:
        """With nobody left on the model, start its keep_alive."""
        if not place.idle:
            return
        loop = asyncio.get_running_loop()
        place.idle_since_s = loop.time()
        place.stop_timer()
        if place.keep_alive_s <= 0:
            self._unload(place)
        elif place.keep_alive_s < _TIMER_MAX_S:
            place.timer = loop.call_later(place.keep_alive_s, self._expired, place)

    def _expired(self, place: _Place) -> None:
        place.timer = None
        if place.idle:
            self._unload(place)

    def _unload(self, place: _Place) -> None:
        place.stop_timer()
        if place.runner is not None:
            runner, place.runner = place.runner, None
            self._tasks.create_task(runner.close(), name=f"unload {place.model.name}")
