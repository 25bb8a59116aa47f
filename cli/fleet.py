"""`weftline hosts`, `ps`, `drain` and `resume`: what the broker knows, and what it is told, by itself directly."""

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, Final, TypeVar

import typer

from cli.settings import BrokerOption, ClientSettings
from common import process, protocol
from common.command import ConfigOption, JsonOption
from common.config import host_port
from common.errors import Code, ProcessError, ProtocolError, UnreachableError, UsageError
from common.protocol import Admin, Engine, Error, Host, Job, Model, Query, Snapshot, short_name
from common.transport import Socket

ANSWER_S: Final = 2.0
"""A broker answers in a millisecond; what takes longer is not there."""
WAIT_S: Final = 0.5
GONE_S: Final = 15.0
"""Longer than a host takes to register with a broker that was restarted."""

T = TypeVar("T")


async def ask(brokers: str, message: Query | Admin) -> Snapshot:
    """The answer of the first broker that lives, of a list separated by commas; nothing is registered there.

    Raises:
        UnreachableError: no answer in time, or from something that isn't a broker's port for gateways.
        UsageError: an address is none, or there is no such host.
    """
    *others, last = [address.strip() for address in brokers.split(",")]
    for broker in others:
        with contextlib.suppress(UnreachableError):
            return await _ask(broker, message)
    return await _ask(last, message)


async def _ask(broker: str, question: Query | Admin) -> Snapshot:
    host, port = host_port(broker, "--broker")
    answered: asyncio.Future[Snapshot | Error] = asyncio.get_running_loop().create_future()

    def on_frame(_: bytes, frame: bytes) -> None:
        try:
            message, _payload = protocol.to_gateway.decode(frame)
        except ProtocolError:
            message = Error(code=Code.INVALID_MESSAGE, message="it speaks another language")
        if isinstance(message, Snapshot | Error) and not answered.done():
            answered.set_result(message)

    socket = Socket("dealer", on_frame)
    try:
        socket.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")
        socket.send(protocol.encode(question))
        async with asyncio.timeout(ANSWER_S):
            answer = await answered
    except TimeoutError:
        raise UnreachableError(
            f"no broker answers at {broker}. Start one with `weftline broker` (or all with `weftline up`), "
            "or name another with --broker."
        ) from None
    finally:
        socket.close()
    if isinstance(answer, Error):
        if answer.code is Code.NOT_FOUND:
            raise UsageError(answer.message)
        raise UnreachableError(
            f"{broker} is not the port where a broker of this version waits for gateways ({answer.message}). "
            "That is its --gateways address, tcp://127.0.0.1:5570 unless told; name it with --broker."
        )
    return answer


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a short command to its end; Ctrl-C cancels it."""
    with asyncio.Runner(loop_factory=process.loop_factory()) as runner:
        return runner.run(coroutine)


def hosts(
    broker: BrokerOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """List the hosts with their engines, and for each model the slots that are busy and whether it is in memory."""
    settings = ClientSettings.load({"broker": broker}, config=config)
    found = sorted(run(ask(settings.broker, Query(id=1, what="hosts"))).hosts, key=lambda host: host.name)
    if as_json:
        print_json([_host_json(host) for host in found])
        return 0
    if not found:
        print("No host is connected. On each GPU host run `weftline worker --broker ADDRESS`.", file=sys.stderr)
        return 0
    rows = [
        [
            host.name,
            _state(host, engine),
            age(host.beat_age_ms),
            engine.kind,
            engine.url.removeprefix("http://"),
            str(sum(host.busy.get(engine.url, {}).values())),
            "\n".join(_slots(host, engine, model) for model in engine.models) if engine.up else engine.error,
            "\n".join(host.labels),
        ]
        for host in found
        for engine in host.engines or (Engine(url="-", kind="-", up=False, error="no engine"),)
    ]
    headers = ["HOST", "STATE", "SEEN", "ENGINE", "AT", "BUSY", "MODELS (BUSY/SLOTS)", "LABELS"]
    shown = len(headers) - (not any(host.labels for host in found))
    print_table(headers[:shown], [row[:shown] for row in rows])
    return 0


def ps(
    broker: BrokerOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """List the requests that run or wait, oldest first."""
    settings = ClientSettings.load({"broker": broker}, config=config)
    snapshot = run(ask(settings.broker, Query(id=1, what="requests")))
    jobs = sorted(snapshot.jobs, key=lambda job: (job.position, -job.age_ms))
    if as_json:
        print_json([_job_json(job) for job in jobs])
        return 0
    if not jobs:
        print("No request runs or waits.", file=sys.stderr)
        return 0
    rows = [
        [
            job.rid.hex()[:12],
            _standing(job),
            age(job.age_ms),
            job.model,
            job.client,
            job.worker or "-",
            str(job.events),
        ]
        for job in jobs
    ]
    print_table(["REQUEST", "STATE", "AGE", "MODEL", "CLIENT", "HOST", "EVENTS"], rows)
    unlisted = snapshot.queued + snapshot.running - len(jobs)
    if unlisted > 0:
        print(f"… and {unlisted} more.", file=sys.stderr)
    return 0


HostArgument = Annotated[str, typer.Argument(metavar="HOST", help="The host's name, as `weftline hosts` shows it.")]


def drain(
    host: HostArgument,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until nothing runs there, and nothing can be resumed from it.")
    ] = False,
    broker: BrokerOption = None,
    config: ConfigOption = None,
) -> int:
    """Give a host no new requests, across its restarts, until `weftline resume`. What runs there finishes."""
    settings = ClientSettings.load({"broker": broker}, config=config)
    return run(_drain(settings.broker, host, wait=wait))


async def _drain(brokers: str, name: str, *, wait: bool) -> int:
    snapshot = await ask(brokers, Admin(id=1, action="drain", target=name))
    if wait:
        await _until_idle(brokers, name, snapshot)
    print(f"{name} takes no new requests.")
    return 0


async def _until_idle(brokers: str, name: str, snapshot: Snapshot) -> None:
    """Wait until nothing is left on a host.

    Raises:
        ProcessError: the host, or every broker, is gone for longer than a restart takes, so that nobody can tell.
    """
    clock = asyncio.get_running_loop().time
    told, seen_at = -1, clock()
    while True:
        host = next((host for host in snapshot.hosts if host.name == name), None)
        if host is not None:
            seen_at = clock()
            left = sum(sum(slots.values()) for slots in host.busy.values()) + host.kept
            if host.draining and not left:
                return
            if left != told:
                told = left
                print(f"{name}: {left} requests run or can be resumed from it", file=sys.stderr)
        elif clock() - seen_at > GONE_S:
            raise ProcessError(
                f"{name} has been gone for {GONE_S:.0f} s: whether it had finished what it was doing cannot be told."
            )
        await asyncio.sleep(WAIT_S)
        # What was said may have been lost with a line or a broker; the host's own word counts.
        again = host is not None and not host.draining
        snapshot = Snapshot()
        with contextlib.suppress(UnreachableError, UsageError):
            snapshot = await ask(
                brokers, Admin(id=1, action="drain", target=name) if again else Query(id=1, what="hosts")
            )


def resume(
    host: HostArgument,
    broker: BrokerOption = None,
    config: ConfigOption = None,
) -> int:
    """Let a host that was drained take requests again."""
    settings = ClientSettings.load({"broker": broker}, config=config)
    run(ask(settings.broker, Admin(id=1, action="resume", target=host)))
    print(f"{host} takes requests again.")
    return 0


def _standing(job: Job) -> str:
    urgency = "" if job.priority == "normal" else f" ({job.priority})"
    if not job.position:
        return job.state + urgency
    return f"queued #{job.position}{urgency}" + ("" if job.eta_ms is None else f", in {age(job.eta_ms)}")


def _state(host: Host, engine: Engine) -> str:
    return "down" if not engine.up else "draining" if host.draining else "up"


def _slots(host: Host, engine: Engine, model: Model) -> str:
    busy = host.busy.get(engine.url, {}).get(model.digest, 0)
    state = " loaded" if model.resident else " loading" if busy else ""
    return f"{short_name(model.name)} {busy}/{model.slots}{state}"


def _host_json(host: Host) -> dict[str, Any]:
    return {
        "name": host.name,
        "draining": host.draining,
        "kept": host.kept,
        "labels": host.labels,
        "heartbeatAgeMs": host.beat_age_ms,
        "engines": [_engine_json(engine, Counter(host.busy.get(engine.url, {}))) for engine in host.engines],
    }


def _engine_json(engine: Engine, busy: Counter[str]) -> dict[str, Any]:
    return {
        "url": engine.url,
        "kind": engine.kind,
        "version": engine.version,
        "up": engine.up,
        "error": engine.error or None,
        "busy": busy.total(),
        "memoryBytes": engine.memory_bytes or None,
        "modelsMax": engine.models_max or None,
        "models": [
            {
                "name": short_name(model.name),
                "digest": model.digest,
                "sizeBytes": model.size_bytes,
                "embedding": model.embedding,
                "resident": model.resident,
                "slots": model.slots,
                "busy": busy[model.digest],
                "free": model.slots - busy[model.digest],
            }
            for model in engine.models
        ],
    }


def _job_json(job: Job) -> dict[str, Any]:
    return {
        "id": job.rid.hex(),
        "client": job.client,
        "ref": job.ref,
        "model": job.model,
        "state": job.state,
        "position": job.position or None,
        "etaMs": job.eta_ms,
        "priority": job.priority,
        "ageMs": job.age_ms,
        "host": job.worker or None,
        "engine": job.engine or None,
        "attempt": job.attempt,
        "events": job.events,
    }


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns on stdout: folded to the terminal's width on one, a line per row for what else reads them.

    Lines within a cell stay lines on a terminal only.
    """
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    lines = [headers, *([cell.replace("\n", ", ") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def age(ms: int) -> str:
    """A duration as people say it: 0.4 s, 12 s, 3 min, 5 h."""
    if ms < 10_000:
        return f"{ms / 1000:.1f} s"
    s = ms // 1000
    return f"{s} s" if s < 120 else f"{s // 60} min" if s < 7200 else f"{s // 3600} h"
