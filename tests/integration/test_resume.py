"""Nothing is lost: clients that come back, streams that change hosts, processes that drain; over real sockets."""

import asyncio
import contextlib
import copy
import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from cli.keys import create_client
from gateway.store import Store
from tests.fabric import Fabric
from tests.integration.test_abuse import hostile
from tests.integration.test_worker import Call, document, stream
from tests.wsclient import Wire, authenticated, connect
from workers.embedded.simulated import Settings, transcript

TOKENS = 60
TOKENS_PER_S = 150.0
ENDLESS = 100_000
ESTABLISHED = {"settle_s": 0.0, "recover_s": 0.0}
"""Settings of a broker that waits for nobody who has a past."""
LINE = b'{"response":"a","done":false}\n'
FINAL = b'{"response":"","done":true,"eval_count":1}\n'


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """Two gateways and two hosts that take their time."""
    slow = Settings(tokens_per_s=TOKENS_PER_S, first_token_s=0.1, slots=8)
    with Fabric(
        tmp_path_factory.mktemp("pair"), engines=[slow, slow], gateways=2, broker_settings=ESTABLISHED
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def idle_before_and_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, the engines of the shared fabric do nothing for it any more."""
    yield
    if "pair" in request.fixturenames:
        fabric: Fabric = request.getfixturevalue("pair")
        fabric.until(lambda: fabric.busy() == 0, "the engines are idle after the test")


def generate(ref: str, tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    options = {"max_tokens": tokens}
    return {"type": "generate", "id": ref, "model": "llama2", "prompt": "hello", "options": options, **more}


class Reader:
    """One request, read over any number of connections: what was heard of it, checked to be without gap or repeat."""

    def __init__(self) -> None:
        self.ref = uuid.uuid4().hex
        self.text = ""
        self.last_seq = -1
        self.kinds: list[str] = []

    async def read(self, wire: Wire, *, until: int | None = None) -> dict[str, Any]:
        """Read on to its end, or until token `until` has come; the last message."""
        async with asyncio.timeout(20):
            while True:
                message = await wire.hear()
                if message.get("id") != self.ref:
                    continue
                self.kinds.append(message["type"])
                if message["type"] == "stream_token":
                    assert message["seq"] == self.last_seq + 1
                    self.last_seq += 1
                    self.text += message["token"]
                    if self.last_seq == until:
                        return message
                elif message["type"] in ("stream_end", "embed_result", "error"):
                    return message

    async def resume(self, wire: Wire, **more: Any) -> None:
        await wire.send({"type": "resume", "id": self.ref, "lastSeq": self.last_seq, **more})

    def check(self, end: dict[str, Any], tokens: int = TOKENS) -> None:
        assert (end["type"], end.get("doneReason")) == ("stream_end", "length")
        assert end["totalTokens"] == tokens
        assert self.text == transcript("hello", 0, tokens)
        assert next(kind for kind in self.kinds if kind != "queued") == "stream_start"


def cut(wire: Wire) -> None:
    """The line breaks."""
    wire.connection.transport.abort()


async def start_and_cut(fabric: Fabric, reader: Reader, tokens: int = TOKENS, *, at: int = 5, **more: Any) -> None:
    async with authenticated(fabric, resume=True) as wire:
        await wire.send(generate(reader.ref, tokens, **more))
        await reader.read(wire, until=at)
        cut(wire)


def idle(fabric: Fabric, why: str) -> None:
    fabric.until(lambda: fabric.busy() == 0, f"the engines are idle: {why}")


def inject(fabric: Fabric, engine: int, **fault: Any) -> None:
    httpx.post(f"{fabric.engine_urls[engine]}/debug/faults", json=fault, trust_env=False).raise_for_status()


# A client that comes back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gateway", [0, 1], ids=["here", "elsewhere"])
async def test_a_stream_goes_on_where_it_was_cut(pair: Fabric, gateway: int) -> None:
    reader = Reader()
    await start_and_cut(pair, reader)
    async with authenticated(pair, gateway=gateway, resume=True) as wire:
        await reader.resume(wire)
        end = await reader.read(wire)
    reader.check(end)
    assert (end["attempts"], end.get("migrated", False)) == (1, False)


async def test_a_stream_that_is_cut_again_and_again(pair: Fabric) -> None:
    reader = Reader()
    await start_and_cut(pair, reader, at=3)
    for at, gateway in zip((10, 11, 25, 40), itertools.cycle((1, 0)), strict=False):
        async with authenticated(pair, gateway=gateway, resume=True) as wire:
            await reader.resume(wire)
            await reader.read(wire, until=at)
            cut(wire)
    async with authenticated(pair, gateway=1, resume=True) as wire:
        await reader.resume(wire)
        reader.check(await reader.read(wire))


@pytest.mark.parametrize("gateway", [0, 1], ids=["here", "elsewhere"])
async def test_a_client_that_was_cut_before_the_first_token_misses_nothing(pair: Fabric, gateway: int) -> None:
    reader = Reader()
    async with authenticated(pair, resume=True) as wire:
        await wire.send(generate(reader.ref))
        pair.until(lambda: pair.busy() > 0, "the request reached an engine")
        cut(wire)
    async with authenticated(pair, gateway=gateway, resume=True) as wire:
        await reader.resume(wire)
        reader.check(await reader.read(wire))


@pytest.mark.parametrize("gateway", [0, 1], ids=["here", "elsewhere"])
async def test_what_ended_while_its_client_was_away_is_still_there(pair: Fabric, gateway: int) -> None:
    reader = Reader()
    await start_and_cut(pair, reader)
    idle(pair, "the stream has ended for nobody")
    async with authenticated(pair, gateway=gateway, resume=True) as wire:
        await reader.resume(wire)
        reader.check(await reader.read(wire))


async def test_what_was_heard_to_its_end_can_be_heard_again(pair: Fabric) -> None:
    reader = Reader()
    async with authenticated(pair, resume=True) as wire:
        await wire.send(generate(reader.ref, 10))
        reader.check(await reader.read(wire), 10)
    for gateway in (0, 1):
        async with authenticated(pair, gateway=gateway, resume=True) as wire:
            await reader.resume(wire, lastSeq=3)
            reader.last_seq, reader.kinds = 3, ["stream_start"]
            reader.text = transcript("hello", 0, 4)
            reader.check(await reader.read(wire), 10)


async def test_beyond_the_end_there_is_the_end(pair: Fabric) -> None:
    reader = Reader()
    async with authenticated(pair, resume=True) as wire:
        await wire.send(generate(reader.ref, 5))
        await reader.read(wire)
        for last_seq in (1000, 2**53 - 1):
            reader.kinds.clear()
            await reader.resume(wire, lastSeq=last_seq)
            assert (await reader.read(wire))["type"] == "stream_end"
            assert "stream_token" not in reader.kinds


async def test_an_embedding_is_told_again(pair: Fabric) -> None:
    reader = Reader()
    async with authenticated(pair, resume=True) as wire:
        await wire.send({"type": "embed", "id": reader.ref, "model": "simulated-embed", "input": ["one", "two"]})
        result = await reader.read(wire)
        cut(wire)
    async with authenticated(pair, gateway=1, resume=True) as wire:
        await reader.resume(wire)
        again = await reader.read(wire)
    assert again["embeddings"] == result["embeddings"]


async def test_what_waits_in_the_queue_keeps_its_place(pair: Fabric) -> None:
    blockers, reader = [Reader() for _ in range(16)], Reader()
    async with authenticated(pair) as blocking:
        for blocker in blockers:
            await blocking.send(generate(blocker.ref, ENDLESS))
        # Not at once: where streams are longer than those before, the second host is loaded only when that shows.
        await asyncio.to_thread(pair.until, lambda: pair.busy() == 16, "all slots are taken", 20.0)
        async with authenticated(pair, resume=True) as wire:
            await wire.send(generate(reader.ref))
            assert (await wire.hear_until("queued", ref=reader.ref))["position"] == 1
            cut(wire)
        async with authenticated(pair, gateway=1, resume=True) as wire:
            await reader.resume(wire)
            assert (await wire.hear_until("queued", ref=reader.ref))["position"] == 1
            await blocking.send({"type": "stop", "id": blockers[0].ref})
            reader.check(await reader.read(wire))
        cut(blocking)


# Who may resume what --------------------------------------------------------------------------------------------------


def another(fabric: Fabric, name: str) -> Fabric:
    """The same fabric, as another client sees it."""
    with contextlib.closing(Store.open(fabric.folder)) as store:
        files = create_client(store, name, fabric.folder / "keys")
    seen = copy.copy(fabric)
    seen.private_key_path, seen.client_id = files.private, name
    return seen


async def test_nobody_resumes_anothers_request(pair: Fabric) -> None:
    reader = Reader()
    await start_and_cut(pair, reader)
    async with authenticated(another(pair, "stranger"), resume=True) as wire:
        await reader.resume(wire)
        error = await wire.hear_until("error", ref=reader.ref)
        assert error["code"] == "NOT_FOUND"
    async with authenticated(pair, resume=True) as wire:
        await reader.resume(wire)
        reader.check(await reader.read(wire))


async def test_what_there_never_was_is_not_found(pair: Fabric) -> None:
    async with authenticated(pair, resume=True) as wire:
        await Reader().resume(wire)
        assert (await wire.hear_until("error"))["code"] == "NOT_FOUND"


async def test_only_a_client_that_said_so_resumes(pair: Fabric) -> None:
    reader = Reader()
    await start_and_cut(pair, reader)
    async with authenticated(pair) as wire:
        await reader.resume(wire)
        error = await wire.hear_until("error", ref=reader.ref)
        assert error["code"] == "NOT_FOUND"
        assert "authenticated with `resume`" in error["error"]
    async with authenticated(pair, resume=True) as wire:
        await reader.resume(wire)
        reader.check(await reader.read(wire))


async def test_what_runs_on_this_connection_is_not_resumed(pair: Fabric) -> None:
    reader = Reader()
    async with authenticated(pair, resume=True) as wire:
        await wire.send(generate(reader.ref))
        await reader.read(wire, until=2)
        await reader.resume(wire)
        assert (await wire.hear_until("error", ref=reader.ref))["code"] == "DUPLICATE_ID"


async def test_the_same_id_from_another_connection_is_refused_while_it_runs(pair: Fabric) -> None:
    """A client whose first sending arrived after all sends it again: it learns that it must resume."""
    reader = Reader()
    async with authenticated(pair, resume=True) as wire, authenticated(pair, gateway=1, resume=True) as other:
        await wire.send(generate(reader.ref))
        await reader.read(wire, until=2)
        await other.send(generate(reader.ref))
        assert (await other.hear_until("error", ref=reader.ref))["code"] == "DUPLICATE_ID"
        reader.check(await reader.read(wire))


@pytest.mark.parametrize("gateway", [0, 1], ids=["here", "elsewhere"])
async def test_the_old_line_need_not_be_dead(pair: Fabric, gateway: int) -> None:
    """A half-open connection still counts as alive at its gateway when the client is back already."""
    reader, old = Reader(), Reader()
    old.ref = reader.ref
    async with authenticated(pair, resume=True) as wire, authenticated(pair, gateway=gateway, resume=True) as new:
        await wire.send(generate(reader.ref))
        await reader.read(wire, until=5)
        await reader.resume(new)
        end = await reader.read(new)
        reader.check(end)
        old.last_seq = 5
        moved = await old.read(wire)
        assert (moved["type"], moved["code"]) == ("error", "CANCELLED")
        assert "another connection" in moved["error"]


# Nothing runs for nobody ----------------------------------------------------------------------------------------------


async def test_a_client_that_cannot_resume_is_not_waited_for(pair: Fabric) -> None:
    async with authenticated(pair) as wire:
        await wire.send(generate("1", ENDLESS))
        await wire.hear_until("stream_token")
        cut(wire)
    idle(pair, "its client is gone")


async def test_a_client_that_closes_on_purpose_is_not_waited_for(pair: Fabric) -> None:
    reader = Reader()
    async with authenticated(pair, resume=True) as wire:
        await wire.send(generate(reader.ref, ENDLESS))
        await reader.read(wire, until=2)
        await wire.connection.close(1000)
    idle(pair, "its client is gone for good")
    async with authenticated(pair, resume=True) as wire:
        await reader.resume(wire)
        assert (await wire.hear_until("error"))["code"] == "NOT_FOUND"


async def test_a_stop_counts_while_the_stream_is_being_resumed(pair: Fabric) -> None:
    reader = Reader()
    await start_and_cut(pair, reader, ENDLESS)
    async with authenticated(pair, gateway=1, resume=True) as wire:
        await reader.resume(wire)
        await wire.send({"type": "stop", "id": reader.ref})
        end = await wire.hear_until("stream_end", "error", ref=reader.ref)
        assert (end["type"], end["doneReason"]) == ("stream_end", "cancelled")
        idle(pair, "it was stopped")


async def test_a_client_that_stops_and_is_gone_again_before_the_answer(pair: Fabric) -> None:
    reader = Reader()
    await start_and_cut(pair, reader, ENDLESS)
    async with authenticated(pair, gateway=1, resume=True) as wire:
        await reader.resume(wire)
        await wire.send({"type": "stop", "id": reader.ref})
        await wire.connection.close(1000)
    idle(pair, "it was stopped")


async def test_revocation_stops_what_waits_for_its_client(pair: Fabric) -> None:
    leaving = another(pair, "leaving")
    reader = Reader()
    await start_and_cut(leaving, reader, ENDLESS)
    assert pair.busy() == 1
    with contextlib.closing(Store.open(pair.folder)) as store:
        store.revoke("leaving")
    idle(pair, "its client may not come back")


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    """One gateway, one host, and little patience with clients that are away."""
    slow = Settings(tokens_per_s=TOKENS_PER_S, slots=2)
    folder, settings = tmp_path_factory.mktemp("brief"), {"resume_s": 0.3}
    with Fabric(folder, engines=[slow], gateway_settings=settings, broker_settings=ESTABLISHED) as running:
        yield running


async def test_when_the_window_has_passed_the_engine_is_idle_and_the_request_forgotten(brief: Fabric) -> None:
    reader = Reader()
    await start_and_cut(brief, reader, ENDLESS)
    idle(brief, "its client did not come back in time")
    async with authenticated(brief, resume=True) as wire:
        await reader.resume(wire)
        assert (await wire.hear_until("error", ref=reader.ref))["code"] == "NOT_FOUND"


async def test_what_has_ended_is_forgotten_when_the_window_has_passed(brief: Fabric) -> None:
    reader = Reader()
    async with authenticated(brief, resume=True) as wire:
        await wire.send(generate(reader.ref, 3))
        await reader.read(wire)
        for wait_s in (0.2, 0.4, 0.8, 1.6, 3.2):  # each question renews the window
            await asyncio.sleep(wait_s)
            reader.last_seq = -1
            await reader.resume(wire)
            if (answer := await reader.read(wire))["type"] == "error":
                break
        assert answer["code"] == "NOT_FOUND"


# Hosts that fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["die_mid", "truncate", "error_line"])
async def test_a_stream_goes_on_on_another_host(pair: Fabric, kind: str) -> None:
    for engine in (0, 1):
        inject(pair, engine, kind=kind, after=20)
    reader = Reader()
    async with authenticated(pair) as wire:
        await wire.send(generate(reader.ref))
        end = await reader.read(wire)
    for backend in pair.backends:
        backend.faults.pending.clear()
    reader.check(end)
    assert (end["migrated"], end["attempts"]) == (True, 3)


async def test_a_stream_that_changed_hosts_while_its_client_was_away(pair: Fabric) -> None:
    reader = Reader()
    inject(pair, 0, kind="die_mid", after=30)
    inject(pair, 1, kind="die_mid", after=30)
    await start_and_cut(pair, reader, at=5)
    idle(pair, "it has ended")
    for backend in pair.backends:
        backend.faults.pending.clear()
    async with authenticated(pair, gateway=1, resume=True) as wire:
        await reader.resume(wire)
        end = await reader.read(wire)
    reader.check(end)
    assert end["migrated"]


async def test_a_resumed_stream_can_be_continued_by_its_new_gateway(pair: Fabric) -> None:
    reader = Reader()
    inject(pair, 0, kind="die_mid", after=40)
    inject(pair, 1, kind="die_mid", after=40)
    await start_and_cut(pair, reader, at=5)
    async with authenticated(pair, gateway=1, resume=True) as wire:
        await reader.resume(wire)
        end = await reader.read(wire)
    for backend in pair.backends:
        backend.faults.pending.clear()
    reader.check(end)
    assert end["migrated"]


@pytest.mark.parametrize("more", [{"migrate": False}, {"format": "json"}], ids=["not wanted", "cannot"])
async def test_what_is_not_continued_keeps_what_has_arrived(pair: Fabric, more: dict[str, Any]) -> None:
    reader = Reader()
    inject(pair, 0, kind="die_mid", after=20)
    inject(pair, 1, kind="die_mid", after=20)
    async with authenticated(pair) as wire:
        await wire.send(generate(reader.ref, **more))
        error = await reader.read(wire)
    for backend in pair.backends:
        backend.faults.pending.clear()
    assert (error["type"], error["code"]) == ("error", "BACKEND_ERROR")
    assert reader.text == transcript("hello", 0, 20)


async def broken(call: Call) -> None:
    """A stream that breaks after its first line."""
    await call.head()
    await call.piece(LINE)


@pytest.mark.parametrize(
    "answer",
    [document(400, b'{"error":"no such option"}'), stream(LINE, FINAL), document(200, b'{"response":"","done":true}')],
    ids=["4xx", "it generates instead", "it knows no rendering"],
)
async def test_an_engine_that_cannot_continue_is_not_why_it_broke(
    fabric: Fabric, answer: Callable[[Call], Awaitable[None]]
) -> None:
    async with hostile(fabric) as engine, authenticated(fabric) as wire:

        async def script(call: Call) -> None:
            await (answer(call) if b"_debug_render_only" in call.body else broken(call))

        engine.script = script
        await wire.send({"type": "generate", "id": "h", "model": "m", "prompt": "x"})
        token = await wire.hear_until("stream_token", ref="h")
        assert (token["token"], token["seq"]) == ("a", 0)
        error = await wire.hear_until("stream_token", "stream_end", "error", ref="h")
        assert (error["type"], error["code"]) == ("error", "BACKEND_ERROR")
        assert "cannot be continued" not in error["error"]
        assert len(engine.calls) == 2


# Processes that leave -------------------------------------------------------------------------------------------------


async def test_a_gateway_drains(tmp_path: Path) -> None:
    """Who can resume goes elsewhere, who cannot finishes here, and who comes is refused."""
    slow = Settings(tokens_per_s=TOKENS_PER_S)
    settings = {"drain_stagger_s": 0.01}
    with Fabric(tmp_path, engines=[slow], gateways=2, gateway_settings=settings) as fabric:
        resuming, plain = Reader(), Reader()
        async with (
            authenticated(fabric, resume=True) as quiet,
            authenticated(fabric, resume=True) as wire,
            authenticated(fabric) as other,
            authenticated(fabric) as third,
        ):
            await third.send(generate("old", 100))
            await wire.send(generate(resuming.ref))
            await other.send(generate(plain.ref, 200))
            await resuming.read(wire, until=5)
            await plain.read(other, until=5)
            fabric.stop("gateway-0")
            assert (await quiet.hear())["type"] == "draining"
            assert await quiet.closed() == (1001, "the gateway is shutting down")
            with contextlib.suppress(websockets.ConnectionClosed):
                await resuming.read(wire)
            assert await wire.closed() == (1001, "the gateway is shutting down")
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with connect(fabric):
                    pass
            assert refused.value.response.status_code == 503
            ready = await asyncio.to_thread(httpx.get, f"{fabric.http_url}/readyz", trust_env=False)
            assert (ready.status_code, ready.json()["reason"]) == (503, "this gateway is shutting down")
            await third.send(generate("new"))
            assert (await third.hear_until("error", ref="new"))["code"] == "SHUTTING_DOWN"
            await third.hear_until("stream_end", ref="old")
            plain_end = asyncio.create_task(plain.read(other))
            async with authenticated(fabric, gateway=1, resume=True) as next_wire:
                await resuming.resume(next_wire)
                resuming.check(await resuming.read(next_wire))
            plain.check(await plain_end, 200)
            assert (await other.closed())[0] == 1001
        fabric.until(lambda: fabric.ended("gateway-0"), "the gateway ended by itself")


async def test_a_worker_drains(tmp_path: Path) -> None:
    """What runs finishes, also for a client that was away, and what comes goes to the other host."""
    slow = Settings(tokens_per_s=TOKENS_PER_S, slots=1)
    settings = {"resume_s": 1.0}
    with Fabric(tmp_path, engines=[slow, slow], gateway_settings=settings) as fabric:
        first, later, last = Reader(), Reader(), Reader()
        async with authenticated(fabric, resume=True) as wire:
            await wire.send(generate(first.ref))
            await first.read(wire, until=5)
            host = host_at_work(fabric)
            fabric.stop(host)
            cut(wire)
        async with authenticated(fabric, resume=True) as wire, authenticated(fabric) as other:
            for reader in (later, last):  # one after the other: the host that drains has no slot for them
                await other.send(generate(reader.ref, 10))
                end = await reader.read(other)
                reader.check(end, 10)
                assert end["host"] != host
            await first.resume(wire)
            end = await first.read(wire)
            first.check(end)
            assert (end["host"], end["attempts"]) == (host, 1)
        fabric.until(lambda: fabric.ended(host), "the worker ended when its buffers had been released", 20.0)


def host_at_work(fabric: Fabric) -> str:
    """The one whose engine is busy."""
    (number,) = [number for number, url in enumerate(fabric.engine_urls, 1) if fabric.busy(url)]
    return f"worker-{number}"
