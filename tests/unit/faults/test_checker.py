"""Each violation, put into a good history, is found, and nothing else is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from tests.faults.checker import Report, check, main
from workers.embedded.simulated import token

Line = dict[str, Any]

TOKENS = 6
A, B = "ref-a", "ref-b"
RID_A, RID_B = "aa" * 16, "bb" * 16
FIRST, SECOND = 1 << 32 | 7, 2 << 32 | 7


def words(ref: str) -> list[str]:
    return [token(f"prompt of {ref}", 3, seq) for seq in range(TOKENS)]


def client_lines(ref: str, rid: str) -> list[Line]:
    return [
        {"event": "request", "ref": ref, "prompt": f"prompt of {ref}", "seed": 3, "tokens": TOKENS},
        *({"event": "token", "ref": ref, "seq": seq, "text": text} for seq, text in enumerate(words(ref))),
        {"event": "terminal", "ref": ref, "kind": "end"},
    ]


def hashes(ref: str, start: int = 0, end: int = TOKENS) -> list[int]:
    return [crc32(text.encode()) for text in words(ref)[start:end]]


class Histories:
    """Two requests that went well: one in one attempt, one whose worker died after three events, as `client` etc."""

    def __init__(self) -> None:
        self.client = client_lines(A, RID_A) + client_lines(B, RID_B)
        self.gateway: list[Line] = [
            {"event": "submitted", "rid": RID_A, "ref": A},
            {"event": "delivered", "rid": RID_A, "ref": A, "attempt": FIRST, "seq": 0, "hashes": hashes(A)},
            {"event": "submitted", "rid": RID_B, "ref": B},
            {"event": "delivered", "rid": RID_B, "ref": B, "attempt": FIRST, "seq": 0, "hashes": hashes(B, 0, 3)},
            {"event": "delivered", "rid": RID_B, "ref": B, "attempt": SECOND, "seq": 3, "hashes": hashes(B, 3)},
        ]
        self.workers: dict[str, list[Line]] = {
            "worker-1": [
                {"event": "chunk", "rid": RID_A, "attempt": FIRST, "seq": 0, "hashes": hashes(A)},
                {"event": "chunk", "rid": RID_B, "attempt": FIRST, "seq": 0, "hashes": hashes(B, 0, 2)},
                {"event": "chunk", "rid": RID_B, "attempt": FIRST, "seq": 2, "hashes": hashes(B, 2, 4)},
            ],
            "worker-2": [{"event": "chunk", "rid": RID_B, "attempt": SECOND, "seq": 3, "hashes": hashes(B, 3)}],
        }
        self.faults: list[Line] = [{"event": "fault", "kind": "kill", "part": "worker-1", "t": 50.0}]

    def check(self, folder: Path) -> Report:
        files = {"harness": self.client + self.faults, "gateway-1": self.gateway, **self.workers}
        for process, lines in files.items():
            (folder / f"{process}-1.jsonl").write_text(
                "".join(json.dumps({"t": 100.0, "process": process, **line}) + "\n" for line in lines)
            )
        return check(folder)

    def at(self, event: str, ref: str, seq: int | None = None) -> int:
        """Where in the client's history a line is."""
        return next(
            at
            for at, line in enumerate(self.client)
            if line["event"] == event and line["ref"] == ref and line.get("seq") == seq
        )


COUNTS = ("lost", "duplicated", "disordered", "foreign", "terminals_missing", "terminals_double")


def counts(report: Report) -> dict[str, int]:
    """What is wrong, how often."""
    return {name: getattr(report, name) for name in COUNTS if getattr(report, name)}


def test_a_good_history_is_found_good(tmp_path: Path) -> None:
    report = Histories().check(tmp_path)
    assert report.ok
    assert counts(report) == {}
    assert report.findings == []
    assert (report.requests, report.events, report.delivered) == (2, 12, 12)
    assert report.terminals == {"end": 2}
    assert report.recovered == 3, "the events of the second attempt"
    assert (report.made, report.made_again) == (13, 1), "the dead worker's last event was made again"
    assert report.faults == {"kill worker": 1}


def drop_token(h: Histories) -> None:
    del h.client[h.at("token", A, 2)]


def drop_last_token(h: Histories) -> None:
    del h.client[h.at("token", A, TOKENS - 1)]


def cut_with_a_gap(h: Histories) -> None:
    h.client[h.at("terminal", A)]["kind"] = "BACKEND_ERROR"
    del h.client[h.at("token", A, 5)]
    del h.client[h.at("token", A, 3)]


def repeat_token(h: Histories) -> None:
    at = h.at("token", A, 2)
    h.client.insert(at + 2, dict(h.client[at]))


def token_after_the_end(h: Histories) -> None:
    at = h.at("token", A, TOKENS - 1)
    h.client.insert(at + 2, h.client.pop(at))


def swap_tokens(h: Histories) -> None:
    at = h.at("token", A, 2)
    h.client[at], h.client[at + 1] = h.client[at + 1], h.client[at]


def other_text(h: Histories) -> None:
    h.client[h.at("token", A, 2)]["text"] = " nonsense"


def text_of_the_other(h: Histories) -> None:
    h.client[h.at("token", A, 2)]["text"] = words(B)[2]


def beyond_the_end(h: Histories) -> None:
    h.client.insert(h.at("terminal", A), {"event": "token", "ref": A, "seq": TOKENS, "text": " more"})


def of_nobody(h: Histories) -> None:
    h.client.append({"event": "token", "ref": "nobody", "seq": 0, "text": " x"})


def terminal_of_nobody(h: Histories) -> None:
    h.client.append({"event": "terminal", "ref": "nobody", "kind": "end"})


def no_terminal(h: Histories) -> None:
    del h.client[h.at("terminal", A)]


def two_terminals(h: Histories) -> None:
    h.client.append({"event": "terminal", "ref": A, "kind": "WORKER_LOST"})


def made_by_no_worker(h: Histories) -> None:
    h.gateway[1]["hashes"][4] += 1


def from_a_later_attempt(h: Histories) -> None:
    h.gateway[4]["attempt"] = FIRST


def one_attempt_made_twice(h: Histories) -> None:
    h.workers["worker-2"].append(dict(h.workers["worker-1"][0]))


@pytest.mark.parametrize(
    ("violate", "expected"),
    [
        # A hole in what a client has is lost; its text at another place is another's.
        (drop_token, {"lost": 1}),
        (drop_last_token, {"lost": 1}),
        (cut_with_a_gap, {"lost": 1}),
        (repeat_token, {"duplicated": 1}),
        (token_after_the_end, {"duplicated": 1, "lost": 1}),
        (swap_tokens, {"disordered": 1}),
        (other_text, {"foreign": 1, "lost": 1}),
        (text_of_the_other, {"foreign": 1, "lost": 1}),
        (beyond_the_end, {"foreign": 1}),
        (of_nobody, {"foreign": 1}),
        (terminal_of_nobody, {"foreign": 1}),
        (no_terminal, {"terminals_missing": 1}),
        (two_terminals, {"terminals_double": 1}),
        (made_by_no_worker, {"foreign": 1}),
        (from_a_later_attempt, {"foreign": 2}),
        (one_attempt_made_twice, {"foreign": 1}),
    ],
)
def test_a_violation_is_found_and_nothing_else(
    violate: Callable[[Histories], None], expected: dict[str, int], tmp_path: Path
) -> None:
    histories = Histories()
    violate(histories)
    report = histories.check(tmp_path)
    assert counts(report) == expected
    assert not report.ok
    assert len(report.findings) == sum(expected.values())


def test_the_partial_text_of_a_broken_stream_is_whole(tmp_path: Path) -> None:
    histories = Histories()
    end = histories.at("terminal", A)
    histories.client[end]["kind"] = "BACKEND_ERROR"
    del histories.client[end - 2 : end]
    report = histories.check(tmp_path)
    assert report.ok
    assert (report.broken_off, report.unaccepted) == (1, 0)


def test_a_refused_request_is_told_from_a_broken_one(tmp_path: Path) -> None:
    histories = Histories()
    histories.client += [
        {"event": "request", "ref": "c", "prompt": "c", "seed": 0, "tokens": 5},
        {"event": "terminal", "ref": "c", "kind": "NO_WORKERS"},
    ]
    report = histories.check(tmp_path)
    assert report.ok
    assert (report.broken_off, report.unaccepted) == (0, 1)


def test_an_error_that_is_no_refusal_broke_off(tmp_path: Path) -> None:
    histories = Histories()
    histories.client += [
        {"event": "request", "ref": "c", "prompt": "c", "seed": 0, "tokens": 5},
        {"event": "terminal", "ref": "c", "kind": "BACKEND_ERROR"},
    ]
    report = histories.check(tmp_path)
    assert (report.broken_off, report.unaccepted) == (1, 0)


def test_what_its_client_left_needs_no_terminal(tmp_path: Path) -> None:
    histories = Histories()
    histories.client[histories.at("terminal", A)] = {"event": "left", "ref": A}
    report = histories.check(tmp_path)
    assert report.ok
    assert report.left == 1


def test_a_stop_that_crossed_the_end_is_no_second_terminal(tmp_path: Path) -> None:
    histories = Histories()
    histories.client.insert(1, {"event": "stop", "ref": A})
    histories.client.append({"event": "terminal", "ref": A, "kind": "NOT_FOUND"})
    assert histories.check(tmp_path).ok


def test_what_came_after_a_resume_is_recovered(tmp_path: Path) -> None:
    histories = Histories()
    histories.client.insert(histories.at("token", A, 4), {"event": "resume", "ref": A, "last": 3})
    report = histories.check(tmp_path)
    assert (report.recovered, report.resumed) == (3 + 2, 1)


@pytest.mark.parametrize(
    ("deaths", "together"),
    [
        ([], 0),
        ([("kill", "gateway-1", 55.0)], 1),
        ([("kill", "gateway-1", 70.0)], 0),
        ([("stop", "gateway-1", 55.0)], 0),
        ([("kill", "gateway-2", 55.0)], 0),
        ([("kill", "worker-2", 55.0)], 0),
        ([("kill", "gateway-1", 70.0), ("stall", "worker-line-1", 51.0)], 1),
        ([("kill", "gateway-1", 75.0), ("stall", "worker-line-1", 51.0)], 0),
        ([("kill", "gateway-1", 70.0), ("stall", "worker-line-2", 51.0)], 0),
    ],
)
def test_gateway_and_worker_that_died_together_are_counted_apart(
    deaths: list[tuple[str, str, float]], together: int, tmp_path: Path
) -> None:
    histories = Histories()
    histories.client[histories.at("request", A)]["t"] = 40.0
    histories.client[histories.at("terminal", A)]["kind"] = "WORKER_LOST"
    histories.faults += [{"event": "fault", "kind": kind, "part": part, "t": t, "s": 12.0} for kind, part, t in deaths]
    report = histories.check(tmp_path)
    assert report.ok
    assert (report.broken_off, report.died_together) == (1, together)


def test_a_line_that_a_kill_cut_never_happened(tmp_path: Path) -> None:
    histories = Histories()
    histories.check(tmp_path)
    with (tmp_path / "worker-1-1.jsonl").open("a") as file:
        file.write('{"t":1,"event":"chu')
    assert check(tmp_path).ok


def test_the_command_prints_figures_and_tells_by_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    histories = Histories()
    histories.check(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["events"] == 12
    no_terminal(histories)
    histories.check(tmp_path)
    assert main([str(tmp_path)]) == 1
