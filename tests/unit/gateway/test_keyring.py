"""Tokens and what they allow: injected clocks, look-ups that the test holds back, and a real registry."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.errors import Code, FabricError
from gateway.auth import ANSWER_S
from gateway.keyring import Grant, Keyring
from gateway.store import Client, Store, StoreError, Token, token_digest

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
WAIT_S = 10.0
UNKNOWN = "wl_00000000_" + "A" * 43
MALFORMED = ("", "wl_", UNKNOWN + "x", "Bearer " + UNKNOWN, "sk-" + "é" * 1000)


class Time:
    """Both clocks; they move only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall = START

    def clock(self) -> float:
        return self.now

    def wall_clock(self) -> datetime:
        return self.wall

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class Registry:
    """Tokens by text in place of a database, and how often each was asked for."""

    def __init__(self) -> None:
        self.rows: dict[str | None, tuple[Token, Client]] = {}
        self.asked: list[str] = []

    def add(self, number: int = 1, client: str = "alice", **fields: Any) -> str:
        text = f"wl_{number:08d}_{'B' * 43}"
        token = Token(f"{number:08d}", client, ("inference",), ("*",), START, None, None, number)
        self.rows[token_digest(text)] = replace(token, **fields), Client(client, None, START, None, number)
        return text

    def change(self, text: str, **fields: Any) -> None:
        token, client = self.rows[token_digest(text)]
        self.rows[token_digest(text)] = replace(token, **fields), client

    def find(self, digest: str) -> tuple[Token, Client] | None:
        self.asked.append(digest)
        return self.rows.get(digest)


class Held(Registry):
    """Each look-up reads, and then waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.reading: asyncio.Queue[str] = asyncio.Queue()
        self.go = threading.Semaphore(0)
        self.running = self.most = 0
        self._lock = threading.Lock()

    def find(self, digest: str) -> tuple[Token, Client] | None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        found = super().find(digest)
        self.loop.call_soon_threadsafe(self.reading.put_nowait, digest)
        assert self.go.acquire(timeout=WAIT_S)
        with self._lock:
            self.running -= 1
        return found


def keyring(registry: Registry, time: Time | None = None, **options: Any) -> Keyring:
    time = time or Time()
    return Keyring(registry.find, clock=time.clock, wall_clock=time.wall_clock, sleep=time.sleep, **options)


async def failure(grant: Awaitable[Grant]) -> tuple[Code, str]:
    with pytest.raises(FabricError) as raised:
        await asyncio.wait_for(grant, WAIT_S)
    return raised.value.code, raised.value.message


REFUSED = (Code.AUTH_FAILED, "authentication failed")


# Grants


@pytest.mark.parametrize(
    ("scopes", "scope", "allowed"),
    [
        ({"inference"}, "inference", True),
        ({"inference", "models:read"}, "models:write", False),
        ({"models:write"}, "models:read", False),
        ({"inference"}, "admin", False),
        ({"admin"}, "inference", True),
        ({"admin"}, "models:write", True),
        ({"admin"}, "admin", True),
        (set(), "inference", False),
    ],
)
def test_scopes(scopes: set[str], scope: str, allowed: bool) -> None:
    assert Grant("alice", "1", frozenset(scopes), ("*",)).allows(scope) is allowed


@pytest.mark.parametrize(
    ("patterns", "name", "allowed"),
    [
        ("*", "llama2", True),
        ("*", "hf.co/someone/model:q4", True),
        ("llama2", "llama2", True),
        ("llama2", "llama2:latest", True),
        ("llama2:latest", "llama2", True),
        ("llama2:latest", "llama2:latest", True),
        ("llama2", "llama2:7b", False),
        ("llama2:7b", "llama2", False),
        ("llama2", "llama20", False),
        ("llama2", "someone/llama2", False),
        ("llama3*", "llama3.2:3b", True),
        ("llama3*", "LLAMA3.2:3b", False),
        ("llama3*", "codellama3", False),
        ("*:3b", "llama3.2:3b", True),
        ("*:3b", "llama3.2", False),
        ("*:latest", "llama2", True),
        ("*2", "llama2:latest", True),
        ("llama[23]", "llama3", True),
        ("llama[23]", "llama4", False),
        ("hf.co/*", "hf.co:8080/x", False),
        ("llama2", "llama2\n", False),
        ("a b*", "b:1", True),
        ("a b*", "c:1", False),
    ],
)
def test_models(patterns: str, name: str, allowed: bool) -> None:
    assert Grant("alice", "1", frozenset(), tuple(patterns.split())).allows_model(name) is allowed


# Tokens that are good


async def test_a_good_token_is_looked_up_once() -> None:
    registry, time = Registry(), Time()
    text = registry.add(scopes=("inference", "admin"), models=("llama3*", "*:3b"))
    ring = keyring(registry, time)
    expected = Grant("alice", "00000001", frozenset({"inference", "admin"}), ("llama3*", "*:3b"))
    assert [await ring.grant(text) for _ in range(3)] == [expected] * 3
    assert registry.asked == [token_digest(text)]
    assert time.now == 1000.0, "nobody waited"


async def test_requests_with_one_new_token_share_its_look_up() -> None:
    registry = Registry()
    text = registry.add()
    ring = keyring(registry, workers=1)
    grants = await asyncio.gather(*(ring.grant(text) for _ in range(10)))
    assert {grant.token for grant in grants} == {"00000001"}
    assert len(registry.asked) == 1


async def test_the_token_used_longest_ago_is_pushed_out() -> None:
    registry = Registry()
    first, second, third = (registry.add(number) for number in (1, 2, 3))
    ring = keyring(registry, grants_max=2)
    for text in (first, second, first, third):
        await ring.grant(text)
    registry.asked.clear()
    for text in (first, third):
        await ring.grant(text)
    assert registry.asked == []
    await ring.grant(second)
    assert registry.asked == [token_digest(second)]


async def test_a_token_expires_while_it_is_known() -> None:
    registry, time = Registry(), Time()
    text = registry.add(expires_at=START + timedelta(minutes=1))
    ring = keyring(registry, time)
    await ring.grant(text)
    time.wall += timedelta(seconds=59)
    await ring.grant(text)
    time.wall += timedelta(seconds=1)
    assert await failure(ring.grant(text)) == REFUSED


# Failures


async def test_failures_look_alike_and_come_at_one_moment() -> None:
    registry, time = Registry(), Time()
    expired = registry.add(1, expires_at=START)
    revoked = registry.add(2, revoked_at=START)
    of_revoked = registry.add(3, client="bob")
    token, bob = registry.rows[token_digest(of_revoked)]
    registry.rows[token_digest(of_revoked)] = token, replace(bob, revoked_at=START)
    ring = keyring(registry, time)
    for text in (expired, revoked, of_revoked, UNKNOWN, *MALFORMED):
        received = time.now
        assert await failure(ring.grant(text)) == REFUSED
        assert time.now == pytest.approx(received + ANSWER_S)
    assert len(registry.asked) == 4, "what can't be a token is not looked up"


async def test_a_late_failure_is_answered_on_the_grid() -> None:
    time = Time()

    def slow(digest: str) -> None:
        time.now += 0.23

    ring = Keyring(slow, clock=time.clock, wall_clock=time.wall_clock, sleep=time.sleep)
    received = time.now
    assert await failure(ring.grant(UNKNOWN)) == REFUSED
    assert time.now == pytest.approx(received + 3 * ANSWER_S)


async def test_failures_are_not_remembered() -> None:
    registry = Registry()
    ring = keyring(registry)
    text = f"wl_00000001_{'B' * 43}"
    assert await failure(ring.grant(text)) == REFUSED
    assert registry.add() == text
    assert (await ring.grant(text)).client == "alice"


async def test_a_flood_takes_its_turns_and_holds_up_no_token_that_is_known() -> None:
    registry = Held()
    good = registry.add()
    ring = keyring(registry, workers=3)
    registry.go.release()
    await ring.grant(good)
    flood = [asyncio.create_task(failure(ring.grant(UNKNOWN))) for _ in range(20)]
    try:
        for _ in range(1 + 3):
            await asyncio.wait_for(registry.reading.get(), WAIT_S)
        assert (await ring.grant(good)).client == "alice"
        assert not any(task.done() for task in flood)
    finally:
        registry.go.release(20)
    assert await asyncio.gather(*flood) == [REFUSED] * 20
    assert registry.most == 3


async def test_a_request_that_leaves_does_not_let_another_thread_begin() -> None:
    registry = Held()
    ring = keyring(registry, workers=1)
    leaves = asyncio.create_task(ring.grant(UNKNOWN))
    await asyncio.wait_for(registry.reading.get(), WAIT_S)
    waits = asyncio.create_task(ring.grant(UNKNOWN))
    leaves.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaves
    stays = asyncio.create_task(failure(ring.grant(UNKNOWN)))
    waits.cancel()  # in the queue for its turn
    with pytest.raises(asyncio.CancelledError):
        await waits
    registry.go.release(2)
    assert await stays == REFUSED
    assert (registry.most, len(registry.asked)) == (1, 2)


async def test_one_too_many_is_told_to_come_again() -> None:
    registry = Held()
    good = registry.add()
    ring = keyring(registry, look_ups_max=2)
    registry.go.release()
    await ring.grant(good)
    flood = [asyncio.create_task(failure(ring.grant(UNKNOWN))) for _ in range(2)]
    for _ in range(1 + 2):
        await asyncio.wait_for(registry.reading.get(), WAIT_S)
    code, _ = await failure(ring.grant(registry.add(2)))
    assert code is Code.RATE_LIMITED
    assert (await ring.grant(good)).client == "alice"
    registry.go.release(3)
    assert await asyncio.gather(*flood) == [REFUSED] * 2
    assert (await ring.grant(registry.add(2))).token == "00000002"


async def test_an_unreadable_registry_lets_nobody_in_who_is_not_known() -> None:
    registry = Registry()
    good = registry.add()
    readable = True

    def find(digest: str) -> tuple[Token, Client] | None:
        if not readable:
            raise StoreError("the disk is gone")
        return registry.find(digest)

    ring = Keyring(find)
    await ring.grant(good)
    readable = False
    for _ in range(3):  # more than there are workers: each gave its turn back
        with pytest.raises(StoreError, match="the disk is gone"):
            await ring.grant(UNKNOWN)
    assert (await ring.grant(good)).client == "alice"


# Revocations


async def test_a_revoked_token_is_dropped_and_others_stay() -> None:
    registry = Registry()
    first, second, bobs = registry.add(1), registry.add(2), registry.add(3, client="bob")
    ring = keyring(registry)
    for text in (first, second, bobs):
        await ring.grant(text)
    registry.change(first, revoked_at=START)
    registry.asked.clear()
    ring.revoke((), ["00000001"])
    assert await failure(ring.grant(first)) == REFUSED
    for text in (second, bobs):
        await ring.grant(text)
    assert registry.asked == [token_digest(first)]


async def test_a_revoked_clients_tokens_are_dropped() -> None:
    registry = Registry()
    first, second, bobs = registry.add(1), registry.add(2), registry.add(3, client="bob")
    ring = keyring(registry)
    for text in (first, second, bobs):
        await ring.grant(text)
    for text in (first, second):
        registry.change(text, revoked_at=START)
    registry.asked.clear()
    ring.revoke(["alice"], ())
    assert await failure(ring.grant(first)) == REFUSED
    assert await failure(ring.grant(second)) == REFUSED
    await ring.grant(bobs)
    assert registry.asked == [token_digest(first), token_digest(second)]


@pytest.mark.parametrize(("clients", "tokens"), [(["alice"], []), ([], ["00000001"])])
async def test_a_look_up_under_way_brings_nothing_back(clients: list[str], tokens: list[str]) -> None:
    registry = Held()
    text = registry.add()
    ring = keyring(registry)
    attempt = asyncio.create_task(failure(ring.grant(text)))
    await asyncio.wait_for(registry.reading.get(), WAIT_S)  # it has read the token as good
    registry.change(text, revoked_at=START)
    ring.revoke(clients, tokens)
    registry.go.release(3)
    assert await attempt == REFUSED
    assert await failure(ring.grant(text)) == REFUSED


async def test_nothing_is_asked_again_when_nothing_was_revoked() -> None:
    registry = Held()
    text = registry.add()
    ring = keyring(registry)
    attempt = asyncio.create_task(ring.grant(text))
    await asyncio.wait_for(registry.reading.get(), WAIT_S)
    ring.revoke((), ())
    registry.go.release()
    assert (await attempt).client == "alice"
    assert len(registry.asked) == 1


async def test_an_end_that_was_set_meanwhile_counts() -> None:
    """As by a rotation with an overlap: the token is alive, and must not stay so for ever."""
    registry, time = Held(), Time()
    text = registry.add()
    ring = keyring(registry, time)
    attempt = asyncio.create_task(ring.grant(text))
    await asyncio.wait_for(registry.reading.get(), WAIT_S)
    registry.change(text, expires_at=START + timedelta(hours=1))
    ring.revoke((), ["00000001"])
    registry.go.release(4)
    assert (await attempt).client == "alice"
    await ring.grant(text)
    time.wall += timedelta(hours=1)
    assert await failure(ring.grant(text)) == REFUSED


# With the registry itself


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store.open(tmp_path)) as store:
        yield store


def watched(store: Store, ring: Keyring, change: int) -> int:
    """What a gateway does every second."""
    changed = store.changed_since(change)
    clients = {record.id for record in changed if isinstance(record, Client) and record.revoked}
    ring.revoke(clients, {record.id for record in changed if isinstance(record, Token)})
    return changed[-1].change


async def test_a_token_from_its_making_to_its_rotation_and_revocation(store: Store) -> None:
    ring = Keyring(store.find_token)
    old, old_text = store.add_token("alice", scopes=["models:write"], models=["llama3*"])
    change = watched(store, ring, 0)
    expected = Grant("alice", old.id, frozenset({"models:write"}), ("llama3*",))
    assert await ring.grant(old_text) == expected
    new, text = store.rotate_token(old.id, overlap=timedelta(hours=1))
    change = watched(store, ring, change)
    assert await ring.grant(old_text) == expected
    assert await ring.grant(text) == replace(expected, token=new.id)
    store.revoke_token(old.id)
    change = watched(store, ring, change)
    assert await failure(ring.grant(old_text)) == REFUSED
    newest, newest_text = store.rotate_token(new.id)
    change = watched(store, ring, change)
    assert await failure(ring.grant(text)) == REFUSED
    assert await ring.grant(newest_text) == replace(expected, token=newest.id)
    store.revoke("alice")
    watched(store, ring, change)
    assert await failure(ring.grant(newest_text)) == REFUSED
