"""What every process does alike: choose the event loop, turn signals into one event, end with a status."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Final

from common import history
from common.errors import ProcessError

PARENT = "WEFTLINE_PARENT_PID"
"""Set for a process that must not outlive the one that started it, even one killed with -9."""
PARENT_INTERVAL_S = 1.0
CLEAN_UP_S = 5.0
GC_THRESHOLDS: Final = (10_000, 10, 10)


class Stop(asyncio.Event):
    """Set when the process is to end: at once if `hurry` (SIGINT), else when what runs is done (SIGTERM)."""

    hurry = False


def gently(stop: asyncio.Event) -> bool:
    """Whether there is time to let finish what runs."""
    return isinstance(stop, Stop) and not stop.hurry


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, int | None]]) -> int:
    """Run `main(stop)` to its end and return the exit status. SIGINT and SIGTERM set `stop`.

    uvloop where there is one; on Windows the selector loop, the only one there that can watch a ZeroMQ descriptor.
    """

    async def supervised() -> int:
        stop = Stop()
        with signals(stop):
            watcher = asyncio.create_task(_stop_with_parent(stop))
            try:
                return await main(stop) or 0
            finally:
                watcher.cancel()

    history.start()
    collect_rarely()
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(supervised())
    except (ProcessError, BaseExceptionGroup) as caught:
        error = process_error(caught)
        if error is None:
            raise
        print(f"weftline: {error}", file=sys.stderr)
        return error.exit_status


def collect_rarely() -> None:
    """Let the collector of cycles pass over what is here for good, and look less often than every 700 objects.

    Requests are in no cycles. A full collection takes a tenth of a second where 10,000 of them wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The fastest event loop that works with the sockets of this platform."""
    if sys.platform == "win32":
        return asyncio.SelectorEventLoop
    import uvloop

    return uvloop.new_event_loop


def process_error(error: BaseException) -> ProcessError | None:
    """The `ProcessError` in a group whose every exception is one, else None: a bug must show itself."""
    if isinstance(error, BaseExceptionGroup):
        matching, others = error.split(ProcessError)
        return process_error(matching.exceptions[0]) if matching is not None and others is None else None
    return error if isinstance(error, ProcessError) else None


@contextlib.contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """Set `stop` on SIGTERM, or on SIGINT in a hurry; a second one ends the process the hard way."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def caught(number: int) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.hurry = number == signal.SIGINT
        stop.set()

    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            try:
                loop.add_signal_handler(number, caught, number)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda n, _frame: loop.call_soon_threadsafe(caught, n))
        yield
    finally:
        for number in numbers:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            signal.signal(number, before[number])


async def _stop_with_parent(stop: Stop) -> None:
    parent = os.environ.get(PARENT)
    while parent is not None and str(os.getppid()) == parent:  # noqa: ASYNC110 - the system tells nobody
        await asyncio.sleep(PARENT_INTERVAL_S)
    if parent is not None:
        stop.hurry = True
        stop.set()


async def until(stop: asyncio.Event, *others: Awaitable[object]) -> None:
    """Wait for `stop`, or for the first of `others` to end; its exception, if any, is raised.

    What has not ended then is cancelled, and waited for at most CLEAN_UP_S.
    """
    tasks = [asyncio.ensure_future(stop.wait()), *(asyncio.ensure_future(other) for other in others)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=CLEAN_UP_S)
