"""How a process ends: by its work, by a signal, or by an error that becomes a sentence and a status."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from common import process
from common.errors import AuthError, ProcessError, UnreachableError


def raising(error: BaseException) -> int:
    async def main(stop: asyncio.Event) -> int:
        raise error

    return process.run(main)


def test_the_status_of_main_is_the_status() -> None:
    async def main(stop: asyncio.Event) -> int | None:
        return 3

    async def quiet(stop: asyncio.Event) -> int | None:
        return None

    assert process.run(main) == 3
    assert process.run(quiet) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_stop_and_is_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    async def main(stop: asyncio.Event) -> int:
        os.kill(os.getpid(), number)
        await stop.wait()
        return 5

    assert process.run(main) == 5
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_what_does_not_stop() -> None:
    code = """
        import asyncio, os, signal
        from common import process

        async def main(stop):
            os.kill(os.getpid(), signal.SIGTERM)
            await stop.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()

        process.run(main)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("error", [ProcessError("no"), UnreachableError("nobody there"), AuthError("not you")])
def test_an_error_becomes_a_sentence_and_a_status(error: ProcessError, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(error) == error.exit_status
    assert capsys.readouterr().err == f"weftline: {error}\n"


def test_an_error_out_of_a_task_group_too(capsys: pytest.CaptureFixture[str]) -> None:
    nested = BaseExceptionGroup("tasks", [BaseExceptionGroup("more", [UnreachableError("nobody there")])])
    assert raising(nested) == 69
    assert capsys.readouterr().err == "weftline: nobody there\n"


@pytest.mark.parametrize(
    "bug", [KeyError("bug"), BaseExceptionGroup("tasks", [ProcessError("no"), KeyError("bug")])], ids=["bare", "group"]
)
def test_a_bug_shows_itself(bug: BaseException) -> None:
    with pytest.raises(type(bug)):
        raising(bug)
    assert process.process_error(bug) is None


def test_a_child_stops_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process.PARENT, str(os.getppid() + 1))

    async def main(stop: asyncio.Event) -> int:
        await stop.wait()
        return 4

    assert process.run(main) == 4


def test_a_child_runs_while_its_parent_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process.PARENT, str(os.getppid()))
    monkeypatch.setattr(process, "PARENT_INTERVAL_S", 0.0)

    async def main(stop: asyncio.Event) -> int:
        for _ in range(10):
            await asyncio.sleep(0)
        return 1 if stop.is_set() else 0

    assert process.run(main) == 0


async def test_until_ends_with_stop_and_cancels_the_others() -> None:
    stop = asyncio.Event()
    cancelled = asyncio.Event()

    async def other() -> None:
        try:
            stop.set()
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    await process.until(stop, other())
    assert cancelled.is_set(), "what `until` started has ended when it returns"


async def test_until_raises_what_another_raises() -> None:
    async def other() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        await process.until(asyncio.Event(), other(), asyncio.Event().wait())


async def test_until_ends_with_the_first_that_ends() -> None:
    await process.until(asyncio.Event(), asyncio.sleep(0), asyncio.Event().wait())


@pytest.mark.parametrize(("number", "gentle"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_term_lets_finish_what_runs_and_an_interrupt_does_not(number: signal.Signals, gentle: bool) -> None:
    async def main(stop: asyncio.Event) -> int:
        assert process.gently(stop), "nobody is in a hurry before a signal"
        os.kill(os.getpid(), number)
        await stop.wait()
        return int(process.gently(stop))

    assert process.run(main) == gentle


def test_a_child_whose_parent_is_gone_hurries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process.PARENT, str(os.getppid() + 1))

    async def main(stop: asyncio.Event) -> int:
        await stop.wait()
        return int(process.gently(stop))

    assert process.run(main) == 0


def test_a_plain_event_leaves_no_time() -> None:
    assert not process.gently(asyncio.Event())
