"""The client registry on a real SQLite file."""

import contextlib
import hashlib
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from common.errors import UsageError
from gateway import store as module
from gateway.store import (
    FILE_NAME,
    TOKENS_MAX,
    Alias,
    AliasError,
    Client,
    ClientIdError,
    DuplicateClientError,
    LimitError,
    PublicKey,
    RevokedError,
    Scope,
    Store,
    StoreError,
    Token,
    TokenLimitError,
    TokenRightsError,
    UnknownClientError,
    UnknownTokenError,
    check_client_id,
    token_digest,
)

START = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def key(number: int) -> PublicKey:
    return PublicKey("SHA256", f"pem {number}", f"{number:064x}")


class Clock:
    """A second passes whenever it is read."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with contextlib.closing(Store.open(tmp_path, clock=clock)) as opened:
        yield opened


def numbers(store: Store, since: int = 0) -> list[tuple[str, int]]:
    """What changed, and as which number."""
    return [(record.id, record.change) for record in store.changed_since(since)]


def test_a_client_is_found_as_it_was_added(store: Store) -> None:
    added = store.add("alice", key(1))
    assert added == Client("alice", key(1), START + timedelta(seconds=1), None, 1)
    assert store.get("alice") == added
    assert not added.revoked
    assert store.get("bob") is None


def test_all_are_listed_by_name(store: Store) -> None:
    for number, name in enumerate(("carol", "alice", "bob")):
        store.add(name, key(number))
    assert [client.id for client in store.list()] == ["alice", "bob", "carol"]


def test_a_revoked_client_stays_with_its_date(store: Store) -> None:
    store.add("alice", key(1))
    revoked = store.revoke("alice")
    assert revoked.revoked
    assert revoked.revoked_at == START + timedelta(seconds=2)
    assert store.get("alice") == revoked
    assert store.revoke("alice") == revoked
    with pytest.raises(UnknownClientError, match="'bob'"):
        store.revoke("bob")


def test_changes_are_numbered_in_order(store: Store) -> None:
    store.add("alice", key(1))
    store.add("bob", key(2))
    store.revoke("alice")
    store.revoke("alice")
    assert numbers(store) == [("bob", 2), ("alice", 3)]
    assert numbers(store, 2) == [("alice", 3)]
    assert store.changed_since(3) == []


def test_what_a_client_may_have_is_a_change_to_be_seen(store: Store) -> None:
    added = store.add("alice", key(1))
    store.add("bob", key(2))
    assert (added.weight, added.running_max) == (1.0, 0)
    seen = store.changed_since(0)[-1].change
    limited = store.limit("alice", weight=2.5)
    assert (limited.weight, limited.running_max, limited.key) == (2.5, 0, added.key)
    assert store.limit("alice", running_max=3) == store.get("alice")
    (told,) = store.changed_since(seen)
    assert isinstance(told, Client)
    assert (told.id, told.weight, told.running_max) == ("alice", 2.5, 3)
    with pytest.raises(UnknownClientError, match="no client 'carol'"):
        store.limit("carol", weight=2)
    for weight in (0.0, float("nan"), 1e9):
        with pytest.raises(LimitError):
            store.limit("alice", weight=weight)
    for number in (-1, 10**9):
        with pytest.raises(LimitError):
            store.limit("alice", running_max=number)
    assert store.get("alice") == told


def test_a_name_is_given_once(store: Store) -> None:
    store.add("alice", key(1))
    with pytest.raises(DuplicateClientError, match="exists already"):
        store.add("alice", key(2))
    store.revoke("alice")
    with pytest.raises(DuplicateClientError, match="revoked"):
        store.add("alice", key(2))


def test_a_key_belongs_to_one_client_even_when_revoked(store: Store) -> None:
    store.add("alice", key(1))
    store.revoke("alice")
    with pytest.raises(DuplicateClientError, match="as 'alice'"):
        store.add("bob", key(1))
    assert store.get("bob") is None


# Tokens


def test_a_token_is_found_by_its_digest_only(store: Store, tmp_path: Path) -> None:
    alice = store.add("alice", key(1))
    made, text = store.add_token("alice")
    assert made == Token(
        made.id, "alice", ("inference", "models:read"), ("*",), START + timedelta(seconds=2), None, None, 2
    )
    assert re.fullmatch(rf"wl_{made.id}_[A-Za-z0-9_-]{{43}}", text)
    assert token_digest(text) == hashlib.sha256(text.encode()).hexdigest()
    assert store.find_token(hashlib.sha256(text.encode()).hexdigest()) == (made, alice)
    assert store.find_token(hashlib.sha256(b"another").hexdigest()) is None
    secret = text.rpartition(made.id)[2].encode()
    assert all(secret not in path.read_bytes() for path in tmp_path.iterdir()), "the secret is not kept"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "wl_",
        "wl_0000000_" + "a" * 43,
        "wl_00000000_" + "a" * 42,
        "wl_00000000_" + "a" * 44,
        "wl_00000000-" + "a" * 43,
        "wl_0000000O_" + "a" * 43,
        "WL_00000000_" + "a" * 43,
        "wl_00000000_" + "a" * 42 + "=",
        "wl_00000000_" + "a" * 43 + "\n",
        " wl_00000000_" + "a" * 43,
        "wl_00000000_" + "é" * 43,
        "wl_00000000_" + "\ud800" * 43,
        "a" * 1_000_000,
    ],
)
def test_what_can_not_be_a_token_has_no_digest(text: str) -> None:
    assert token_digest("wl_00000000_" + "-" * 43)
    assert token_digest(text) is None


def test_tokens_differ(store: Store) -> None:
    made = [store.add_token("alice") for _ in range(20)]
    assert len({token.id for token, _ in made}) == 20
    assert len({text.rpartition(token.id)[2] for token, text in made}) == 20


def test_an_id_is_not_given_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter("0" * 16 + "1" * 8)
    monkeypatch.setattr("gateway.store.secrets.choice", lambda _: next(drawn))
    assert [store.add_token("alice")[0].id for _ in range(2)] == ["0" * 8, "1" * 8]


def test_a_token_keeps_its_rights(store: Store) -> None:
    end = START + timedelta(days=1)
    models = ("llama3*", "*:3b")
    made, text = store.add_token("alice", scopes=["admin", "inference", "admin"], models=models, expires_at=end)
    assert (made.scopes, made.models, made.expires_at) == (("inference", "admin"), models, end)
    found = store.find_token(token_digest(text) or "")
    assert found is not None
    assert found[0] == made
    assert made.live(end - timedelta(microseconds=1))
    assert not made.live(end)


def test_a_client_comes_with_its_first_token_and_may_get_a_key_later(store: Store) -> None:
    made, text = store.add_token("alice")
    alice = store.get("alice")
    assert alice == Client("alice", None, START + timedelta(seconds=1), None, 1)
    assert store.list() == [alice]
    enrolled = store.add("alice", key(1))
    assert enrolled == Client("alice", key(1), START + timedelta(seconds=1), None, 2)
    assert store.find_token(token_digest(text) or "") == (made, enrolled)
    with pytest.raises(DuplicateClientError, match="exists already"):
        store.add("alice", key(2))


def test_a_key_of_another_is_not_given_to_a_client_without(store: Store) -> None:
    store.add("alice", key(1))
    store.add_token("bob")
    with pytest.raises(DuplicateClientError, match="as 'alice'"):
        store.add("bob", key(1))
    store.revoke("bob")
    with pytest.raises(DuplicateClientError, match="revoked"):
        store.add("bob", key(2))
    bob = store.get("bob")
    assert bob is not None
    assert bob.key is None


def test_tokens_are_listed_by_client_oldest_first(store: Store) -> None:
    made = [store.add_token(name)[0] for name in ("bob", "alice", "bob")]
    assert store.tokens() == [made[1], made[0], made[2]]
    assert store.tokens("bob") == [made[0], made[2]]
    assert store.tokens("nobody") == []


@pytest.mark.parametrize(
    ("rights", "sentence"),
    [
        ({"scopes": ["inference", "models:rite"]}, "'models:rite'; use one or more of inference, models:read, .*admin"),
        ({"scopes": []}, "needs a scope; use one or more of inference"),
        ({"models": []}, "1 to 100 patterns"),
        ({"models": [str(number) for number in range(101)]}, "1 to 100 patterns"),
        ({"models": ["llama", ""]}, "'' can't be a pattern"),
        ({"models": ["two words"]}, "'two words' can't be"),
        ({"models": ["a\tb"]}, "can't be a pattern"),
        ({"models": ["x" * 257]}, "can't be a pattern"),
        ({"expires_at": START}, "expired already"),
    ],
)
def test_rights_that_can_not_be_are_a_usage_error_and_leave_nothing(
    rights: dict[str, Any], sentence: str, store: Store
) -> None:
    with pytest.raises(TokenRightsError, match=sentence) as raised:
        store.add_token("alice", **rights)
    assert raised.value.exit_status == 2
    assert store.get("alice") is None
    with pytest.raises(ClientIdError):
        store.add_token("../alice")


def test_a_revoked_token_stays_with_its_date(store: Store) -> None:
    made, text = store.add_token("alice")
    revoked = store.revoke_token(made.id)
    assert revoked == replace(made, revoked_at=START + timedelta(seconds=2), change=2)
    assert not revoked.live(START)
    assert store.revoke_token(made.id) == revoked
    found = store.find_token(token_digest(text) or "")
    assert found is not None
    assert found[0] == revoked
    with pytest.raises(UnknownTokenError, match="'nothere0'"):
        store.revoke_token("nothere0")


def test_a_revoked_clients_tokens_are_revoked_with_it(store: Store) -> None:
    earlier, later, others = (store.add_token(name)[0] for name in ("alice", "alice", "bob"))
    store.revoke_token(earlier.id)
    revoked = store.revoke("alice")
    tokens = {token.id: token for token in store.tokens()}
    assert tokens[later.id].revoked_at == revoked.revoked_at
    assert tokens[earlier.id].revoked_at == START + timedelta(seconds=4), "it was before"
    assert not tokens[others.id].revoked
    with pytest.raises(RevokedError, match="the client 'alice' was revoked"):
        store.add_token("alice")
    with pytest.raises(RevokedError, match="was revoked"):
        store.rotate_token(later.id)


def test_a_rotated_token_is_replaced_at_once(store: Store) -> None:
    old, old_text = store.add_token("alice", scopes=[Scope.ADMIN], models=["llama3*"])
    new, text = store.rotate_token(old.id)
    assert new == replace(old, id=new.id, created_at=START + timedelta(seconds=2), change=2)
    assert new.id != old.id
    assert text != old_text
    assert store.tokens() == [replace(old, revoked_at=START + timedelta(seconds=2), change=2), new]


def test_a_rotated_token_is_good_for_the_overlap(store: Store) -> None:
    old, _ = store.add_token("alice")
    new, _ = store.rotate_token(old.id, overlap=timedelta(hours=1))
    rotated_at = START + timedelta(seconds=2)
    ended = store.tokens()[0]
    assert ended == replace(old, expires_at=rotated_at + timedelta(hours=1), change=2)
    assert new.expires_at is None
    assert new.live(rotated_at)
    assert ended.live(rotated_at + timedelta(minutes=59))
    assert not ended.live(rotated_at + timedelta(hours=1))


def test_rotation_renews_a_life_and_prolongs_none(store: Store) -> None:
    born = START + timedelta(seconds=1)
    old, _ = store.add_token("alice", expires_at=born + timedelta(minutes=30))
    new, _ = store.rotate_token(old.id, overlap=timedelta(hours=1))
    assert new.expires_at == new.created_at + timedelta(minutes=30)
    assert store.tokens()[0] == old


def test_dead_tokens_are_not_rotated(store: Store, clock: Clock) -> None:
    expired, _ = store.add_token("alice", expires_at=START + timedelta(minutes=1))
    revoked, _ = store.add_token("alice")
    store.revoke_token(revoked.id)
    clock.now += timedelta(minutes=1)
    with pytest.raises(RevokedError, match="has expired; make another: weftline keys token alice"):
        store.rotate_token(expired.id)
    with pytest.raises(RevokedError, match="was revoked"):
        store.rotate_token(revoked.id)
    with pytest.raises(UnknownTokenError):
        store.rotate_token("nothere0")
    assert len(store.tokens()) == 2


def test_a_client_has_so_many_live_tokens_and_no_more(store: Store, clock: Clock) -> None:
    first, *_ = [store.add_token("alice", expires_at=START + timedelta(days=1))[0] for _ in range(TOKENS_MAX)]
    with pytest.raises(TokenLimitError, match="has 100 tokens"):
        store.add_token("alice")
    with pytest.raises(TokenLimitError):
        store.rotate_token(first.id, overlap=timedelta(hours=1))
    assert store.tokens()[0] == first, "and the old one goes on"
    store.add_token("bob")
    second, _ = store.rotate_token(first.id)
    store.revoke_token(second.id)
    store.add_token("alice")
    clock.now += timedelta(days=1)
    store.add_token("alice")


def test_clients_and_tokens_share_one_sequence(store: Store) -> None:
    store.add("alice", key(1))
    of_alice, _ = store.add_token("alice")
    of_bob, _ = store.add_token("bob")
    assert numbers(store) == [("alice", 1), (of_alice.id, 2), ("bob", 3), (of_bob.id, 3)]
    store.revoke_token(of_alice.id)
    assert numbers(store, 3) == [(of_alice.id, 4)]
    new, _ = store.rotate_token(of_bob.id, overlap=timedelta(hours=1))
    assert sorted(numbers(store, 4)) == sorted([(of_bob.id, 5), (new.id, 5)])
    store.revoke("bob")
    told = store.changed_since(5)
    assert {record.id for record in told} == {"bob", of_bob.id, new.id}
    assert all(record.revoked for record in told)
    assert store.changed_since(told[-1].change) == []


# Names, files, processes


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 64])
def test_names_that_can_be(name: str) -> None:
    assert check_client_id(name) == name


@pytest.mark.parametrize("name", ["", "x" * 65, ".a", "-a", "_a", "a/b", "a b", "ä", "a\n", "../a"])
def test_names_that_can_not_be(name: str, store: Store) -> None:
    with pytest.raises(ClientIdError, match="can't be a client's name"):
        store.add(name, key(1))


def test_a_store_opens_again_with_what_it_held(tmp_path: Path) -> None:
    with contextlib.closing(Store.open(tmp_path)) as first:
        added = first.add("alice", key(1))
        # A second gateway on the same machine, at the same time, told by URL.
        with contextlib.closing(Store.open(f"sqlite:///{tmp_path / FILE_NAME}")) as second:
            assert second.get("alice") == added
            second.revoke("alice")
        found = first.get("alice")
        assert found is not None
        assert found.revoked


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    with contextlib.closing(Store.open(data_dir)) as opened:
        opened.add("alice", key(1))
        assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in data_dir.iterdir()}
    assert modes[FILE_NAME] == 0o600
    assert set(modes.values()) == {0o600}
    assert f"{FILE_NAME}-wal" in modes


def test_a_lock_at_the_change_to_wal_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
        other.execute("CREATE TABLE other (x)")
        other.execute("BEGIN")
        other.execute("SELECT * FROM other")
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                other.execute("COMMIT")

        monkeypatch.setattr("gateway.store.BUSY_S", 0.05)
        monkeypatch.setattr("gateway.store.time.monotonic", lambda: 0.0)
        monkeypatch.setattr("gateway.store.time.sleep", sleep)
        with contextlib.closing(Store.open(tmp_path)) as opened:
            assert opened.list() == []
        assert len(waits) == 3


OPEN_AND_ADD = """
import contextlib, sys
from pathlib import Path
from gateway.store import PublicKey, Store
with contextlib.closing(Store.open(Path(sys.argv[1]))) as store:
    store.add(sys.argv[2], PublicKey("SHA256", "pem", sys.argv[2]))
"""


def test_processes_create_one_store_together(tmp_path: Path) -> None:
    names = [f"client-{number}" for number in range(4)]
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", OPEN_AND_ADD, tmp_path / "data", name]) for name in names
    ]
    assert [process.wait(60) for process in processes] == [0] * len(names)
    with contextlib.closing(Store.open(tmp_path / "data")) as opened:
        assert [client.id for client in opened.list()] == names
        assert [client.change for client in opened.changed_since(0)] == [1, 2, 3, 4]


ADD_TOKENS = """
import contextlib, sys
from pathlib import Path
from gateway.store import Store
with contextlib.closing(Store.open(Path(sys.argv[1]))) as store:
    for _ in range(5):
        token, text = store.add_token("shared")
        print(text)
    store.revoke_token(token.id)
"""


def test_processes_make_tokens_that_all_find(tmp_path: Path) -> None:
    """And the client that none of them finds at first comes into being once."""
    with contextlib.closing(Store.open(tmp_path)) as store:
        processes = [
            subprocess.Popen([sys.executable, "-W", "error", "-c", ADD_TOKENS, tmp_path], stdout=subprocess.PIPE)
            for _ in range(3)
        ]
        texts = [process.communicate(timeout=60)[0].decode().split() for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes)
        found = [store.find_token(token_digest(text) or "") for made in texts for text in made]
        assert [pair is not None and pair[0].revoked for pair in found] == [False, False, False, False, True] * 3
        assert [client.id for client in store.list()] == ["shared"]
        changes = [token.change for token in store.tokens()]
        assert len(set(changes)) == 15, "each has a number of its own"
        assert max(changes) == store.changed_since(0)[-1].change == 18


def test_one_gateway_hears_what_another_process_revoked(tmp_path: Path) -> None:
    with contextlib.closing(Store.open(tmp_path)) as gateway, contextlib.closing(Store.open(tmp_path)) as operator:
        token, _ = operator.add_token("alice")
        seen = gateway.changed_since(0)[-1].change
        assert gateway.changed_since(seen) == []
        operator.revoke_token(token.id)
        (told,) = gateway.changed_since(seen)
        assert (told.id, told.revoked) == (token.id, True)


def an_older_store(folder: Path, *rows: tuple[str, int, str | None]) -> None:
    """A registry as the first version made it, with clients: name, number of key and change, date of revocation."""
    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    engine = sa.create_engine(f"sqlite:///{folder / FILE_NAME}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for name, number, revoked_at in rows:
            values = (name, "SHA256", f"pem {number}", f"{number:064x}", "2026-01-01 00:00:00.000000", revoked_at)
            connection.exec_driver_sql("INSERT INTO clients VALUES (?, ?, ?, ?, ?, ?, ?)", (*values, number))
    engine.dispose()


def test_an_older_store_is_brought_up_to_date_with_what_it_held(tmp_path: Path) -> None:
    an_older_store(tmp_path, ("alice", 1, None), ("bob", 7, "2026-01-02 00:00:00.000000"))
    created_at, revoked_at = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    alice = Client("alice", key(1), created_at, None, 1)
    bob = Client("bob", key(7), created_at, revoked_at, 7)
    for _ in range(2):  # once, and not again
        with contextlib.closing(Store.open(tmp_path)) as store:
            assert store.list() == [alice, bob]
            assert store.changed_since(0) == [alice, bob]
    with contextlib.closing(Store.open(tmp_path)) as store:
        assert store.add_token("alice")[0].change == 8, "the numbers go on: gateways have seen up to 7"
        with pytest.raises(DuplicateClientError, match="as 'bob'"):
            store.add("carol", key(7))
        assert store.add_token("dave")[0].change == 9
        assert store.add_token("erin")[0].change == 10
        assert [client.key for client in store.list()] == [key(1), key(7), None, None]


def test_processes_bring_one_older_store_up_to_date_together(tmp_path: Path) -> None:
    an_older_store(tmp_path, ("alice", 1, None))
    names = [f"client-{number}" for number in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", OPEN_AND_ADD, tmp_path, name]) for name in names
    ]
    assert [process.wait(60) for process in processes] == [0] * len(names)
    with contextlib.closing(Store.open(tmp_path)) as store:
        assert [client.id for client in store.list()] == ["alice", *names]
        assert sorted(client.change for client in store.list()) == [1, 2, 3, 4]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    an_older_store(tmp_path, ("alice", 1, None))
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("CREATE TABLE changes (in_the_way)")
        before = list(connection.iterdump())
        with pytest.raises(StoreError, match="cannot open the client registry"):
            Store.open(tmp_path)
        assert list(connection.iterdump()) == before
        connection.execute("DROP TABLE changes")
    with contextlib.closing(Store.open(tmp_path)) as store:
        assert [client.id for client in store.list()] == ["alice"]


def test_threads_open_and_write_together(tmp_path: Path) -> None:
    failures: list[Exception] = []
    together = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            together.wait()
            with contextlib.closing(Store.open(tmp_path)) as opened:
                for round_ in range(5):
                    opened.add(f"client-{number}-{round_}", key(10 * number + round_))
                    opened.revoke(f"client-{number}-{round_}")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with contextlib.closing(Store.open(tmp_path)) as opened:
        changes = [client.change for client in opened.changed_since(0)]
    assert len(changes) == 20
    assert changes[-1] == 40
    assert changes == sorted(set(changes))


def test_a_store_of_a_newer_weftline_is_left_alone(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    with pytest.raises(StoreError, match=r"newer weftline \(schema 9999\).*--data-dir"):
        Store.open(tmp_path)


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, but someone's text. " * 100)
    with pytest.raises(StoreError, match="Move the file away"):
        Store.open(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes().startswith(b"not a database")


def in_the_way(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "data"


def file_is_a_folder(tmp_path: Path) -> Path:
    (tmp_path / FILE_NAME).mkdir()
    return tmp_path


@pytest.mark.parametrize("unusable", [in_the_way, file_is_a_folder])
def test_an_unusable_data_dir_is_named(unusable: Callable[[Path], Path], tmp_path: Path) -> None:
    data_dir = unusable(tmp_path)
    with pytest.raises(StoreError, match="--data-dir") as raised:
        Store.open(data_dir)
    assert str(data_dir / FILE_NAME) in str(raised.value)
    assert raised.value.exit_status == 1


@pytest.mark.parametrize(
    "damage",
    ["public_key = CAST(x'ff' AS TEXT)", "id = CAST(x'c328' AS TEXT)", "created_at = 'yesterday'", "created_at = 5"],
)
def test_a_damaged_row_is_a_sentence_too(damage: str, store: Store, tmp_path: Path) -> None:
    store.add("alice", key(1))
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute(f"UPDATE clients SET {damage}")
        connection.commit()
    reads: tuple[Callable[[], object], ...] = (store.list, lambda: store.changed_since(0))
    for read in reads:
        with pytest.raises(StoreError, match=f"cannot read the client registry {tmp_path / FILE_NAME}"):
            read()


def test_a_failure_while_open_is_a_sentence_too(store: Store, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("DROP TABLE clients")
    with pytest.raises(StoreError, match=f"cannot read the client registry {tmp_path}.*no such table"):
        store.get("alice")
    with pytest.raises(StoreError, match="cannot write to"):
        store.add("alice", key(1))


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_names_no_database_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        Store.open(url)


@pytest.mark.parametrize("url", ["nosuchdb://user:secret@host/name", "mssql+pyodbc://user:secret@host/name"])
def test_a_database_without_a_driver_is_refused_and_keeps_its_secret(url: str) -> None:
    with pytest.raises(StoreError, match="cannot use the database") as raised:
        Store.open(url)
    assert "secret" not in str(raised.value)


# Names that stand for models ------------------------------------------------------------------------------------------


def test_aliases_do_not_chain(store: Store) -> None:
    store.set_alias("prod", "llama3:8b")
    with pytest.raises(AliasError, match="is an alias itself"):
        store.set_alias("live", "prod:latest")
    with pytest.raises(AliasError, match="what another alias stands for"):
        store.set_alias("llama3:8b", "llama2")
    assert store.aliases() == [Alias("prod:latest", "llama3:8b", None)]


def test_an_alias_goes_back_and_forth(store: Store) -> None:
    store.set_alias("prod", "one")
    assert store.set_alias("prod", "one").previous is None, "it stood for that already"
    assert store.set_alias("prod", "two") == Alias("prod:latest", "two:latest", "one:latest")
    assert store.roll_back_alias("prod") == Alias("prod:latest", "one:latest", "two:latest")
    assert store.roll_back_alias("prod") == store.aliases()[0] == Alias("prod:latest", "two:latest", "one:latest")


def test_aliases_have_a_bound(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ALIASES_MAX", 2)
    store.set_alias("a", "m")
    store.set_alias("b", "m")
    with pytest.raises(AliasError, match="2 aliases"):
        store.set_alias("c", "m")
    store.set_alias("a", "n")


def test_the_audit_keeps_the_newest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AUDIT_MAX", 2)
    for number in range(4):
        store.write_audit(
            client_id="ops", token_id="t", action="pull", model=f"m{number}", hosts=["a", "b"], outcome="x" * 9_999
        )
    newest, other = store.audit()
    assert (newest.model, other.model) == ("m3", "m2")
    assert (newest.hosts, len(newest.outcome)) == (("a", "b"), module.OUTCOME_CHARS_MAX)
    assert [entry.model for entry in store.audit(1)] == ["m3"]
