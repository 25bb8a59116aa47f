"""Passes over histories and says what became of every event: `python -m tests.faults.checker FOLDER`.

What is known beforehand: the simulated engine's answer is a function of (prompt, seed, seq), so a `request` line says
every token that must come. What came stands in the clients' histories, what was made and passed on in those of workers
and gateways (`common.history`), and what was broken meanwhile in the harness's own.

Events of a request fall into
    delivered    came once, at their place, with their text
    recovered    delivered, but only after the client resumed, or from an attempt after the first
    lost         missing before another that came, or before an `end`
    duplicated   came again, or after the terminal
    disordered   came after a later one
    foreign      not this request's: another text than computed, beyond its end, of no request known, or sent on by a
                 gateway though no worker made it

and requests into those with one terminal, none, or several. A request that was left by its own client needs none.

Lines it reads, beside `t`, `process` and `event`:
    client    request(ref, prompt, seed, tokens) resume(ref) stop(ref) left(ref) token(ref, seq, text)
              terminal(ref, kind; migrated)
    harness   fault(kind, part)
    worker    chunk(rid, attempt, seq, hashes): lines as the engine gave them
    broker    leased(rid, attempt, worker)
    gateway   submitted(rid, ref) delivered(rid, attempt, seq, hashes)

Memory is what an hour of faults needs: a few words for each request, 4 bytes for each event a worker made.
"""

import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from workers.embedded.simulated import transcript

TOGETHER_S: Final = 10.0
"""A worker and a gateway that died within this time of each other died together: nobody was there to take over."""
REFUSALS: Final = frozenset({"NO_WORKERS", "SHUTTING_DOWN", "QUEUE_FULL", "RATE_LIMITED"})
FINDINGS_MAX: Final = 100
DEATHS: Final = frozenset({"kill", "abort"})


@dataclass(slots=True)
class Report:
    """What was found. `ok` is I1 and I2; `findings` tells the first of what is wrong, with the request's ref."""

    requests: int = 0
    delivered: int = 0
    recovered: int = 0
    lost: int = 0
    duplicated: int = 0
    disordered: int = 0
    foreign: int = 0
    terminals: Counter[str] = field(default_factory=Counter)
    terminals_missing: int = 0
    terminals_double: int = 0
    left: int = 0
    migrated: int = 0
    resumed: int = 0
    died_together: int = 0
    """Of the WORKER_LOST: worker and gateway died within TOGETHER_S."""
    unaccepted: int = 0
    """Refused (REFUSALS) before any event, so that asking again costs nothing."""
    broken_off: int = 0
    """Ended by another error, or after events were delivered."""
    made: int = 0
    """Events that workers made; those made more than once are `made_again`."""
    made_again: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    @property
    def events(self) -> int:
        """Events that reached clients and were checked."""
        return self.delivered + self.duplicated + self.disordered + self.foreign

    @property
    def ok(self) -> bool:
        return not (
            self.lost
            or self.duplicated
            or self.disordered
            or self.foreign
            or self.terminals_missing
            or self.terminals_double
        )

    def figures(self) -> dict[str, Any]:
        figures = {name: getattr(self, name) for name in self.__slots__}
        return {"ok": self.ok, "events": self.events, **figures}

    def found(self, what: str) -> None:
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(what)


@dataclass(slots=True)
class _Request:
    prompt: str
    seed: int
    tokens: int
    words: list[str]
    got: bytearray
    sent_at: float
    top: int = 0
    resumes: int = 0
    stopped: bool = False
    left: bool = False
    terminal: str = ""
    ended_at: float = 0.0
    recovered: int = 0


@dataclass(slots=True)
class _Made:
    """Events that workers made in one attempt, from seq `base`."""

    base: int
    hashes: "array[int]"

    def has(self, seq: int, hash_: int) -> bool:
        at = seq - self.base
        return 0 <= at < len(self.hashes) and self.hashes[at] == hash_


class Checker:
    """`check` a folder once."""

    def __init__(self) -> None:
        self.report = Report()
        self._requests: dict[str, _Request] = {}
        self._made: defaultdict[str, dict[int, _Made]] = defaultdict(dict)
        self._workers: defaultdict[str, set[str]] = defaultdict(set)
        self._gateways: defaultdict[str, set[str]] = defaultdict(set)
        self._rids: defaultdict[str, set[str]] = defaultdict(set)
        self._deaths: list[tuple[float, str]] = []
        self._stalls: list[tuple[float, str, float]] = []
        self._late: set[tuple[str, int]] = set()

    def check(self, folder: Path) -> Report:
        """Read every history in `folder`. Raises OSError, or msgspec.DecodeError for what is none."""
        files = sorted(folder.glob("*.jsonl"))
        # What the workers made must be known before it is seen delivered, and what was delivered late before clients.
        for kind in ("worker", "gateway", ""):
            for file in [file for file in files if file.name.startswith(kind)]:
                files.remove(file)
                for line in _lines(file):
                    self._take(line)
        self._conclude()
        return self.report

    def _take(self, line: dict[str, Any]) -> None:
        match line["event"]:
            case "token":
                self._on_token(line)
            case "chunk":
                self._on_chunk(line)
            case "delivered":
                self._on_delivered(line)
            case "request":
                prompt, seed, tokens = line["prompt"], line["seed"], line["tokens"]
                words = [f" {word}" for word in transcript(prompt, seed, tokens).split(" ")[1:]]
                self._requests[line["ref"]] = _Request(prompt, seed, tokens, words, bytearray(tokens), line["t"])
            case "terminal" if "ref" in line:
                self._on_terminal(line)
            case "resume":
                self._requests[line["ref"]].resumes += 1
            case "stop":
                self._requests[line["ref"]].stopped = True
            case "left":
                self._requests[line["ref"]].left = True
            case "leased":
                self._workers[line["rid"]].add(line["worker"])
            case "submitted":
                self._rids[line["ref"]].add(line["rid"])
                self._gateways[line["rid"]].add(line["process"])
            case "fault":
                self.report.faults[f"{line['kind']} {_kind(line['part'])}"] += 1
                if line["kind"] in DEATHS:
                    self._deaths.append((line["t"], line["part"]))
                elif line["kind"] == "stall":
                    self._stalls.append((line["t"], line["part"], line["s"]))

    def _on_token(self, line: dict[str, Any]) -> None:
        report, ref, seq = self.report, line["ref"], line["seq"]
        request = self._requests.get(ref)
        if request is None:
            report.foreign += 1
            report.found(f"foreign: {ref} is no request, yet has an event {seq}")
        elif not 0 <= seq < request.tokens or request.words[seq] != line["text"]:
            report.foreign += 1
            due = request.words[seq] if 0 <= seq < request.tokens else None
            report.found(f"foreign: {ref} event {seq} is {line['text']!r}, not {due!r}")
        elif request.got[seq]:
            report.duplicated += 1
            report.found(f"duplicated: {ref} event {seq}")
        elif request.terminal:
            report.duplicated += 1
            report.found(f"duplicated: {ref} event {seq} came after the terminal {request.terminal}")
        else:
            request.got[seq] = 1
            if seq < request.top:
                report.disordered += 1
                report.found(f"disordered: {ref} event {seq} came after {request.top - 1}")
            else:
                request.top = seq + 1
                report.delivered += 1
            if request.resumes or (ref, seq) in self._late:
                request.recovered += 1

    def _on_terminal(self, line: dict[str, Any]) -> None:
        report, ref, kind = self.report, line["ref"], line["kind"]
        request = self._requests.get(ref)
        if request is None:
            report.foreign += 1
            report.found(f"foreign: {ref} is no request, yet has a terminal {kind}")
            return
        if request.terminal:
            # A `stop` that crossed the end is answered NOT_FOUND, which ends nothing.
            if not (request.stopped and kind == "NOT_FOUND"):
                report.terminals_double += 1
                report.found(f"double terminal: {ref} {request.terminal}, then {kind}")
            return
        request.terminal, request.ended_at = kind, line["t"]
        report.migrated += bool(line.get("migrated"))

    def _on_chunk(self, line: dict[str, Any]) -> None:
        rid, hashes = line["rid"], line["hashes"]
        self._workers[rid].add(line["process"])
        self.report.made += len(hashes)
        made = self._made[rid].setdefault(line["attempt"], _Made(line["seq"], array("I")))
        at = line["seq"] - made.base
        if at != len(made.hashes):
            self.report.foreign += 1
            self.report.found(f"foreign: {rid} was worked on twice as attempt {line['attempt']}")
        made.hashes[at : at + len(hashes)] = array("I", hashes)

    def _on_delivered(self, line: dict[str, Any]) -> None:
        rid, attempt, seq, hashes = line["rid"], line["attempt"], line["seq"], line["hashes"]
        self._gateways[rid].add(line["process"])
        if attempt >> 32 > 1 and line.get("ref"):
            self._late.update((line["ref"], seq + n) for n in range(len(hashes)))
        # What an attempt begins with, if it goes on with another's text, that one made.
        made = [made for ordinal, made in self._made[rid].items() if ordinal <= attempt]
        for at, hash_ in enumerate(hashes, seq):
            if not any(one.has(at, hash_) for one in made):
                self.report.foreign += 1
                self.report.found(f"foreign: {rid} event {at} of attempt {attempt} was made by no worker")

    def _conclude(self) -> None:
        report = self.report
        for ref, request in self._requests.items():
            report.requests += 1
            report.recovered += request.recovered
            report.resumed += bool(request.resumes)
            due = request.tokens if request.terminal == "end" else request.top
            if missing := request.got[:due].count(0):
                report.lost += missing
                first = request.got.index(0)
                report.found(
                    f"lost: {ref} {missing} of {due} events, the first is {first}, ended by {request.terminal}"
                )
            if not request.terminal:
                report.left += request.left
                if not request.left:
                    report.terminals_missing += 1
                    report.found(f"missing terminal: {ref} after {request.top} events")
                continue
            report.terminals[request.terminal] += 1
            if request.terminal not in ("end", "stopped"):
                refused = not request.top and request.terminal in REFUSALS
                report.unaccepted += refused
                report.broken_off += not refused
            if request.terminal == "WORKER_LOST":
                together = self._died_together(ref, request)
                report.died_together += together
                if not together:
                    report.found(f"worker lost: {ref} after {request.top} events, its gateway lived")
        for attempts in self._made.values():
            distinct = {seq for made in attempts.values() for seq in range(made.base, made.base + len(made.hashes))}
            report.made_again += sum(len(made.hashes) for made in attempts.values()) - len(distinct)

    def _died_together(self, ref: str, request: _Request) -> bool:
        """Whether a worker and a gateway of the request died within TOGETHER_S, not counting the time in between in
        which the worker's line was stalled: nobody could fetch what only it had."""

        def deaths(parts: set[str]) -> list[float]:
            begin = request.sent_at - TOGETHER_S
            return [t for t, part in self._deaths if part in parts and begin <= t <= request.ended_at]

        def apart(one: float, other: float, worker: str) -> float:
            first, last = min(one, other), max(one, other)
            line = f"worker-line-{worker.rpartition('-')[2]}"
            stalls = [(t, t + span) for t, part, span in self._stalls if part == line]
            return last - first - sum(max(0.0, min(last, end) - max(first, start)) for start, end in stalls)

        rids = self._rids[ref]
        gateways = deaths({gateway for rid in rids for gateway in self._gateways[rid]})
        return any(
            apart(died, gateway, worker) <= TOGETHER_S
            for worker in {worker for rid in rids for worker in self._workers[rid]}
            for died in deaths({worker})
            for gateway in gateways
        )


def _kind(part: str) -> str:
    """The kind of part that a name tells: worker of worker-2."""
    return part.rstrip("0123456789").rstrip("-")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a history. A last one that a kill left unfinished never happened."""
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    with file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield decode(line)


def check(folder: Path) -> Report:
    """Check the histories of a folder."""
    return Checker().check(folder)


def main(argv: list[str] | None = None) -> int:
    """Print the figures; 0 if nothing is wrong."""
    arguments = sys.argv[1:] if argv is None else argv
    report = check(Path(arguments[0]))
    print(msgspec.json.format(msgspec.json.encode(report.figures())).decode())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
