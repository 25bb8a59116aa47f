"""Who may connect: the registry of clients and their public keys, in a database.

Theory of operation. The database is SQLite in the data dir unless a URL names another. Opening it brings its schema
to the newest revision, in the same transaction that reads the current one, so any number of processes may open it at
once. Every method is synchronous, takes its own connection from the pool and may be called from any thread; an event
loop calls it through a thread.

Each change of a client takes the next number of one sequence. A gateway that has seen everything up to number n asks
for `changed_since(n)`: no clock is compared, so a revocation is found whatever the clocks of the machines say.

SQLite: WAL lets readers go on while one process writes, and a writer waits up to `BUSY_S` for another. Transactions
that write take the write lock at their start (BEGIN IMMEDIATE); one that upgrades a read lock may fail at once instead.
"""

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError, SQLAlchemyError

from common.errors import ProcessError, UsageError

FILE_NAME = "weftline.db"
BUSY_S = 10.0

_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class StoreError(ProcessError):
    """The database can't be opened, read or written."""


class DuplicateClientError(StoreError):
    """The client's name or its key is registered already, perhaps revoked."""


class UnknownClientError(StoreError):
    """There is no client of that name."""


class ClientIdError(UsageError):
    """That can't be the name of a client."""


def check_client_id(client_id: str) -> str:
    """Return `client_id` if it can be one; it is also used in file names and logs.

    Raises:
        ClientIdError: it can't.
    """
    if not _CLIENT_ID.fullmatch(client_id):
        raise ClientIdError(
            f"{client_id[:64]!r} can't be a client's name: use 1 to 64 letters, digits, dots, underscores "
            "and hyphens, beginning with a letter or a digit."
        )
    return client_id


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A checked public key: signature algorithm, SubjectPublicKeyInfo in PEM, and the SHA-256 of its DER in hex."""

    algorithm: str
    pem: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Client:
    """One row of the registry. Times are UTC; `change` is the number of its latest change."""

    id: str
    key: PublicKey
    created_at: datetime
    revoked_at: datetime | None
    change: int

    @property
    def revoked(self) -> bool:
        return self.revoked_at is not None


class _Utc(sa.types.TypeDecorator[datetime]):
    """An aware datetime, kept as naive UTC because SQLite keeps no zone."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


_CLIENTS = sa.Table(
    "clients",
    sa.MetaData(),
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("algorithm", sa.String(16), nullable=False),
    sa.Column("public_key", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", _Utc, nullable=False),
    sa.Column("revoked_at", _Utc),
    sa.Column("change", sa.BigInteger, nullable=False, unique=True),
)
_NEXT_CHANGE = sa.select(sa.func.coalesce(sa.func.max(_CLIENTS.c.change), 0) + 1).scalar_subquery()


class Store:
    """An open registry. Use `open`, and `close` when done."""

    def __init__(self, engine: sa.Engine, where: str, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._writing = engine.execution_options(weftline_writes=True)
        self._where = where
        self._clock = clock

    @classmethod
    def open(cls, where: Path | str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Self:
        """Open the registry in a data dir (a path) or at a database URL (a string); create and migrate it as needed.

        The data dir is created with mode 0700 and the file with 0600; what exists keeps its mode.

        Raises:
            StoreError: it can't be opened, isn't a registry, or was written by a newer weftline.
            UsageError: the URL is none, or names no file.
        """
        url = _url(where)
        path = Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
        name = str(path) if path else url.render_as_string(hide_password=True)
        if path:
            _create_file(path)
        try:
            engine = _engine(url)
        except (ArgumentError, ImportError) as error:
            raise StoreError(f"cannot use the database {name}: {error}") from error
        store = cls(engine, name, clock)
        try:
            with store._told("open"):
                if path:
                    _use_wal(engine)
                store._migrate()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close the idle connections; none may be in use. Idempotent."""
        self._engine.dispose()

    def add(self, client_id: str, key: PublicKey) -> Client:
        """Enrol a client.

        Raises:
            ClientIdError: the name can't be one.
            DuplicateClientError: the name or the key is taken. A revoked client keeps both: its usage stays its own,
                and a revoked key can't come back under another name.
            StoreError: the database failed.
        """
        check_client_id(client_id)
        row = {
            "id": client_id,
            "algorithm": key.algorithm,
            "public_key": key.pem,
            "fingerprint": key.fingerprint,
            "created_at": self._clock(),
        }
        try:
            with self._told("write to"), self._writing.begin() as connection:
                insert = sa.insert(_CLIENTS).values(**row, change=_NEXT_CHANGE).returning(_CLIENTS)
                return _client(connection.execute(insert).one())
        except IntegrityError:
            raise self._duplicate(client_id, key) from None

    def get(self, client_id: str) -> Client | None:
        """The client of that name, revoked or not.

        Raises:
            StoreError: the database failed.
        """
        found = self._select(_CLIENTS.c.id == client_id)
        return found[0] if found else None

    def list(self) -> Sequence[Client]:
        """All clients, by name.

        Raises:
            StoreError: the database failed.
        """
        return self._select(order=_CLIENTS.c.id)

    def revoke(self, client_id: str) -> Client:
        """Refuse the client from now on. Revoking again changes nothing.

        Raises:
            UnknownClientError: there is none of that name.
            StoreError: the database failed.
        """
        update = (
            sa.update(_CLIENTS)
            .where(_CLIENTS.c.id == client_id, _CLIENTS.c.revoked_at.is_(None))
            .values(revoked_at=self._clock(), change=_NEXT_CHANGE)
        )
        with self._told("write to"), self._writing.begin() as connection:
            connection.execute(update)
            row = connection.execute(sa.select(_CLIENTS).where(_CLIENTS.c.id == client_id)).one_or_none()
        if row is None:
            raise UnknownClientError(f"there is no client {client_id!r}; `weftline keys list` names them all.")
        return _client(row)

    def changed_since(self, change: int) -> Sequence[Client]:
        """The clients added or revoked after change number `change` (0 for all), oldest change first.

        Raises:
            StoreError: the database failed.
        """
        return self._select(_CLIENTS.c.change > change, order=_CLIENTS.c.change)

    def _select(self, *where: sa.ColumnElement[bool], order: sa.ColumnElement[Any] = _CLIENTS.c.id) -> Sequence[Client]:
        with self._told("read"), self._engine.connect() as connection:
            rows = connection.execute(sa.select(_CLIENTS).where(*where).order_by(order))
            return [_client(row) for row in rows]

    def _duplicate(self, client_id: str, key: PublicKey) -> DuplicateClientError:
        if taken := self.get(client_id):
            state = "was revoked, and a name is not given twice" if taken.revoked else "exists already"
            return DuplicateClientError(f"the client {client_id!r} {state}; choose another name.")
        others = self._select(_CLIENTS.c.fingerprint == key.fingerprint)
        name = others[0].id if others else "another client"
        return DuplicateClientError(f"this key is registered already, as {name!r}; create a new key pair.")

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Turn the database's failures into a sentence that names the database."""
        try:
            yield
        except IntegrityError:
            raise
        except (SQLAlchemyError, sqlite3.Error, ValueError, TypeError) as error:
            # The last two: what a damaged file holds may be no text, or no date.
            cause = getattr(error, "orig", None) or error
            raise StoreError(f"cannot {doing} the client registry {self._where}: {cause}.{_advice(error)}") from error

    def _migrate(self) -> None:
        # Here, not above: it costs a quarter of a second, which what only uses the types need not pay.
        from alembic import command
        from alembic.config import Config
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        config = Config()
        folder = str(Path(__file__).parent / "migrations")
        config.set_main_option("script_location", folder.replace("%", "%%"))
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        with self._writing.begin() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in known:
                raise StoreError(
                    f"the client registry {self._where} was written by a newer weftline (schema {current}). "
                    "Upgrade this weftline, or choose another data dir with --data-dir."
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _url(where: Path | str) -> URL:
    if isinstance(where, Path):
        return URL.create("sqlite", database=str(where.absolute() / FILE_NAME))
    try:
        url = make_url(where)
    except ArgumentError:
        raise UsageError("the database URL must read like postgresql://user@host/name or sqlite:////path") from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise UsageError("the database must be a file: its clients are shared with other processes.")
    return url


def _create_file(path: Path) -> None:
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # SQLite gives its WAL the mode of the file; created here, no other user ever sees it open.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600))
    except OSError as error:
        raise StoreError(
            f"cannot use {path}: {error.strerror}. Make the folder {path.parent} writable for this user, "
            "or choose another with --data-dir."
        ) from error


def _engine(url: URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_S})

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:
        # The module's own BEGIN leaves DDL outside of transactions; ours is in `began`.
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def began(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("weftline_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(engine: sa.Engine) -> None:
    """Write-ahead logging, kept in the file from then on. SQLite does not wait when two processes switch at once."""
    give_up = time.monotonic() + BUSY_S
    with engine.connect() as connection:
        while True:
            try:
                connection.connection.execute("PRAGMA journal_mode = WAL").close()
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                    raise
                time.sleep(0.01)


def _advice(error: Exception) -> str:
    if isinstance(error, OperationalError | sqlite3.OperationalError):
        return " See that the disk has space and that this user may write the file and its folder, then try again."
    if isinstance(error, DatabaseError | sqlite3.DatabaseError):
        return " Move the file away if it is not weftline's, or choose another data dir with --data-dir."
    return ""


def _client(row: sa.Row[Any]) -> Client:
    key = PublicKey(row.algorithm, row.public_key, row.fingerprint)
    return Client(row.id, key, row.created_at, row.revoked_at, row.change)
