"""The client registry on a real SQLite file."""

import contextlib
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.errors import UsageError
from gateway.store import (
    FILE_NAME,
    Client,
    ClientIdError,
    DuplicateClientError,
    PublicKey,
    Store,
    StoreError,
    UnknownClientError,
    check_client_id,
)

START = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def key(number: int) -> PublicKey:
    return PublicKey("SHA256", f"pem {number}", f"{number:064x}")


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store.open(tmp_path, clock=Clock())) as opened:
        yield opened


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
    assert [(client.id, client.change) for client in store.changed_since(0)] == [("bob", 2), ("alice", 3)]
    assert [client.id for client in store.changed_since(2)] == ["alice"]
    assert store.changed_since(3) == []


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
    for read in (store.list, lambda: store.changed_since(0)):
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
