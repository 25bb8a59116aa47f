"""The simulation finds nothing in what there is, and something in what is broken on purpose."""

import os
import subprocess
import sys
from typing import Any

import pytest

from gateway.session import Stream
from tests.simulation.world import Violation, World
from workers.session import Session


@pytest.mark.timeout(300)
def test_no_promise_is_broken_in_20_000_requests() -> None:
    """Two processes, one for each kind of world; a failing seed is in the output, with the command that plays it."""
    playing = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.simulation", kind, "--requests", "10000", "--seed", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        for kind in ("--storm", "--single")
    ]
    outputs = [process.communicate()[0] for process in playing]
    assert [process.returncode for process in playing] == [0, 0], "\n".join(outputs)


def test_a_seed_tells_the_whole_story() -> None:
    assert World(7, requests=100).run() == World(7, requests=100).run()


def _forget_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "_ask_replay", lambda *_: [])


def _leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that passes on whatever comes next."""
    original = Stream._on_chunk

    def on_chunk(self: Stream, chunk: Any, payload: bytes, now: float) -> Any:
        self.next_seq = max(self.next_seq, chunk.seq)
        return original(self, chunk, payload, now)

    monkeypatch.setattr(Stream, "_on_chunk", on_chunk)


def _keep_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that does not do what it is told when a request is over."""
    monkeypatch.setattr(Session, "_drop", lambda *_: None)


@pytest.mark.parametrize("sabotage", [_forget_the_gap, _leave_out, _keep_for_ever])
def test_what_is_broken_is_found(monkeypatch: pytest.MonkeyPatch, sabotage: Any) -> None:
    sabotage(monkeypatch)
    with pytest.raises(Violation):
        _play(range(1, 11))


def _play(seeds: range) -> None:
    for seed in seeds:
        World(seed, requests=200).run()
