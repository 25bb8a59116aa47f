"""Who may connect: the registry of clients, their public keys and their API tokens, in a database.

Theory of operation. The database is SQLite in the data dir unless a URL names another. Opening it brings its schema
to the newest revision, in the same transaction that reads the current one, so any number of processes may open it at
once. Every method is synchronous, takes its own connection from the pool and may be called from any thread; an event
loop calls it through a thread.

Each transaction that changes clients or tokens takes the next number of one sequence, which what it changes bears. A
gateway that has seen everything up to number n asks for `changed_since(n)`: no clock is compared, so a revocation is
found whatever the clocks of the machines say. The sequence is a row that is counted up at the start of a transaction:
its lock makes the next writer wait, on any database, so that numbers become visible in their order.

A client is an identity; it has a public key, tokens, or both. A token is its own password, sent with each HTTP request:
`wl_`, a public id, `_`, and 256 random bits. Only the SHA-256 of the whole text is kept. A slow, salted hash is for
passwords that people choose; 256 random bits can't be guessed however fast the hash is.

SQLite: WAL lets readers go on while one process writes, and a writer waits up to `BUSY_S` for another. Transactions
that write take the write lock at their start (BEGIN IMMEDIATE); one that upgrades a read lock may fail at once instead.
"""

import contextlib
import hashlib
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, OperationalError, SQLAlchemyError

from common.errors import ProcessError, UsageError
from common.protocol import full_name, short_name

FILE_NAME = "weftline.db"
BUSY_S = 10.0
AUDIT_MAX = 100_000
ALIASES_MAX = 1_000
MODEL_CHARS_MAX = 512
OUTCOME_CHARS_MAX = 2_000

WEIGHT_MIN: Final = 0.001
WEIGHT_MAX: Final = 1_000
RUNNING_MAX: Final = 1_000_000

TOKENS_MAX: Final = 100
"""Live tokens of one client."""
PATTERNS_MAX: Final = 100
PATTERN_CHARS_MAX: Final = 256

_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Crockford's alphabet: no letter that reads like a digit, for ids are typed; and no underscore.
_TOKEN_ID = "0123456789abcdefghjkmnpqrstvwxyz"
_TOKEN = re.compile(rf"wl_[{_TOKEN_ID}]{{8}}_[A-Za-z0-9_-]{{43}}")


class Scope(StrEnum):
    """What a token may be used for."""

    INFERENCE = "inference"
    MODELS_READ = "models:read"
    MODELS_WRITE = "models:write"
    ADMIN = "admin"
    """Everything, the others included."""


SCOPES: Final = (Scope.INFERENCE, Scope.MODELS_READ)
"""Of a token for which none are named."""
MODELS: Final = ("*",)


class StoreError(ProcessError):
    """The database can't be opened, read or written."""


class DuplicateClientError(StoreError):
    """The client's name or its key is registered already, perhaps revoked."""


class UnknownClientError(StoreError):
    """There is no client of that name."""


class RevokedError(StoreError):
    """The client or the token was revoked, or the token has expired: it gets no new token."""


class TokenLimitError(StoreError):
    """The client has `TOKENS_MAX` live tokens."""


class LimitError(UsageError):
    """A client can't have such a weight or limit."""


class UnknownTokenError(StoreError):
    """There is no token of that id."""


class AliasError(UsageError):
    """That can't be done with a name that stands for a model."""


class ClientIdError(UsageError):
    """That can't be the name of a client."""


class TokenRightsError(UsageError):
    """A token can't have these scopes, models or that expiry."""


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


def token_digest(text: str) -> str | None:
    """What the registry keeps of a token: the SHA-256 of its text, in hex. None for a text that can't be a token."""
    return hashlib.sha256(text.encode()).hexdigest() if _TOKEN.fullmatch(text) else None


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A checked public key: signature algorithm, SubjectPublicKeyInfo in PEM, and the SHA-256 of its DER in hex."""

    algorithm: str
    pem: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Client:
    """One identity. Times are UTC; `change` is the number of its latest change. Without a key it has tokens only.

    `weight` is its share of the fleet among those who wait, `running_max` how many of its requests run at once, 0 for
    any number.
    """

    id: str
    key: PublicKey | None
    created_at: datetime
    revoked_at: datetime | None
    change: int
    weight: float = 1.0
    running_max: int = 0

    @property
    def revoked(self) -> bool:
        return self.revoked_at is not None


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token, its secret apart. Times are UTC; `change` is the number of its latest change.

    `scopes` are values of `Scope`, in its order. `models` are shell patterns (`fnmatch`, case matters, `*` crosses
    slashes) over the names of models as clients write them.
    """

    id: str
    client: str
    scopes: tuple[str, ...]
    models: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    change: int

    @property
    def revoked(self) -> bool:
        return self.revoked_at is not None

    def live(self, now: datetime) -> bool:
        """Whether it is good at `now`, which has a zone."""
        return not self.revoked and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that stands for a model, both with their tags. `previous` is what it stood for before, if anything."""

    name: str
    target: str
    previous: str | None


@dataclass(frozen=True, slots=True)
class Audit:
    """An operation on models: who had what done to which model on which hosts, when it ended and how."""

    at: datetime
    client: str
    token: str
    action: str
    model: str
    hosts: tuple[str, ...]
    outcome: str


class _Utc(sa.types.TypeDecorator[datetime]):
    """An aware datetime, kept as naive UTC because SQLite keeps no zone."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class _Words(sa.types.TypeDecorator[tuple[str, ...]]):
    """Words without white space in them, kept with a space between."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: sa.Dialect) -> str:
        return " ".join(value or ())

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> tuple[str, ...]:
        return tuple((value or "").split())


_TABLES = sa.MetaData()
_CLIENTS = sa.Table(
    "clients",
    _TABLES,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("algorithm", sa.String(16)),
    sa.Column("public_key", sa.Text),
    sa.Column("fingerprint", sa.String(64), unique=True),
    sa.Column("created_at", _Utc, nullable=False),
    sa.Column("revoked_at", _Utc),
    sa.Column("change", sa.BigInteger, nullable=False, unique=True),
    sa.Column("weight", sa.Float, nullable=False, server_default="1"),
    sa.Column("running_max", sa.Integer, nullable=False, server_default="0"),
)
_TOKENS = sa.Table(
    "tokens",
    _TABLES,
    sa.Column("id", sa.String(8), primary_key=True),
    sa.Column("client_id", sa.String(64), sa.ForeignKey(_CLIENTS.c.id), nullable=False, index=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("scopes", _Words, nullable=False),
    sa.Column("models", _Words, nullable=False),
    sa.Column("created_at", _Utc, nullable=False),
    sa.Column("expires_at", _Utc),
    sa.Column("revoked_at", _Utc),
    sa.Column("change", sa.BigInteger, nullable=False, index=True),
)
_AUDIT = sa.Table(
    "audit",
    _TABLES,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", _Utc, nullable=False),
    sa.Column("client_id", sa.String(64), nullable=False),
    sa.Column("token_id", sa.String(8), nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("hosts", _Words, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
)
_ALIASES = sa.Table(
    "aliases",
    _TABLES,
    sa.Column("name", sa.String(512), primary_key=True),
    sa.Column("target", sa.String(512), nullable=False),
    sa.Column("previous", sa.String(512)),
)
_CHANGES = sa.Table("changes", _TABLES, sa.Column("number", sa.BigInteger, nullable=False))


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
        """Enrol a client; one that has tokens only gets the key.

        Raises:
            ClientIdError: the name can't be one.
            DuplicateClientError: the name or the key is taken. A revoked client keeps both: its usage stays its own,
                and a revoked key can't come back under another name.
            StoreError: the database failed.
        """
        check_client_id(client_id)
        row = {"algorithm": key.algorithm, "public_key": key.pem, "fingerprint": key.fingerprint}
        c = _CLIENTS.c
        keyless = c.id == client_id, c.fingerprint.is_(None), c.revoked_at.is_(None)
        try:
            with self._change() as (connection, change):
                update = sa.update(_CLIENTS).where(*keyless).values(**row, change=change).returning(_CLIENTS)
                if (updated := connection.execute(update).one_or_none()) is not None:
                    return _client(updated)
                insert = sa.insert(_CLIENTS).values(**row, id=client_id, created_at=self._clock(), change=change)
                return _client(connection.execute(insert.returning(_CLIENTS)).one())
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
        """Refuse the client, and all its tokens, from now on. Revoking again changes nothing.

        Raises:
            UnknownClientError: there is none of that name.
            StoreError: the database failed.
        """
        with self._change() as (connection, change):
            new = {"revoked_at": self._clock(), "change": change}
            for table, name in ((_CLIENTS, _CLIENTS.c.id), (_TOKENS, _TOKENS.c.client_id)):
                where = name == client_id, table.c.revoked_at.is_(None)
                connection.execute(sa.update(table).where(*where).values(new))
            row = connection.execute(sa.select(_CLIENTS).where(_CLIENTS.c.id == client_id)).one_or_none()
        if row is None:
            raise _unknown(client_id)
        return _client(row)

    def limit(self, client_id: str, *, weight: float | None = None, running_max: int | None = None) -> Client:
        """Set a client's share of the fleet, or how many of its requests run at once (0: any number); None: as it was.

        Raises:
            LimitError: one of them is out of bounds.
            UnknownClientError: there is none of that name.
            StoreError: the database failed.
        """
        if weight is not None and not WEIGHT_MIN <= weight <= WEIGHT_MAX:
            raise LimitError(f"a client's weight is a number from {WEIGHT_MIN:g} to {WEIGHT_MAX:g}.")
        if running_max is not None and not 0 <= running_max <= RUNNING_MAX:
            raise LimitError(f"a client may run 1 to {RUNNING_MAX} requests at once, or any number: 0.")
        new = {"weight": weight, "running_max": running_max}
        with self._change() as (connection, change):
            values = {name: value for name, value in new.items() if value is not None} | {"change": change}
            update = sa.update(_CLIENTS).where(_CLIENTS.c.id == client_id).values(values).returning(_CLIENTS)
            row = connection.execute(update).one_or_none()
        if row is None:
            raise _unknown(client_id)
        return _client(row)

    def add_token(
        self,
        client_id: str,
        *,
        scopes: Iterable[str] = SCOPES,
        models: Iterable[str] = MODELS,
        expires_at: datetime | None = None,
    ) -> tuple[Token, str]:
        """A new token, and its text, which nobody can read again. A client that isn't there is made, without a key.

        Raises:
            ClientIdError: the name can't be one.
            TokenRightsError: there is no such scope, a pattern can't be one, or the token would have expired already.
            RevokedError: the client was revoked.
            TokenLimitError: it has `TOKENS_MAX` live tokens.
            StoreError: the database failed.
        """
        check_client_id(client_id)
        scopes, models = _checked_scopes(scopes), _checked_models(models)
        now = self._clock()
        if expires_at is not None and expires_at <= now:
            raise TokenRightsError("the token would have expired already; let it expire later, or never.")
        with self._change() as (connection, change):
            client = connection.execute(sa.select(_CLIENTS).where(_CLIENTS.c.id == client_id)).one_or_none()
            if client is None:
                connection.execute(sa.insert(_CLIENTS).values(id=client_id, created_at=now, change=change))
            elif client.revoked_at is not None:
                raise RevokedError(f"the client {client_id!r} was revoked; choose another name.")
            return _insert_token(connection, change, client_id, scopes, models, now, expires_at)

    def tokens(self, client_id: str | None = None) -> Sequence[Token]:
        """All tokens, dead ones too, or those of one client: by client, oldest first.

        Raises:
            StoreError: the database failed.
        """
        c = _TOKENS.c
        select = sa.select(_TOKENS).order_by(c.client_id, c.created_at, c.id)
        if client_id is not None:
            select = select.where(c.client_id == client_id)
        with self._told("read"), self._engine.connect() as connection:
            return [_token(row) for row in connection.execute(select)]

    def find_token(self, digest: str) -> tuple[Token, Client] | None:
        """The token of that `token_digest` and its client, dead or revoked as they may be.

        Raises:
            StoreError: the database failed.
        """
        with self._told("read"), self._engine.connect() as connection:
            row = connection.execute(sa.select(_TOKENS).where(_TOKENS.c.digest == digest)).one_or_none()
            if row is None:
                return None
            client = connection.execute(sa.select(_CLIENTS).where(_CLIENTS.c.id == row.client_id)).one()
            return _token(row), _client(client)

    def revoke_token(self, token_id: str) -> Token:
        """Refuse the token from now on. Revoking again changes nothing.

        Raises:
            UnknownTokenError: there is none of that id.
            StoreError: the database failed.
        """
        with self._change() as (connection, change):
            token = _token_of(connection, token_id)
            return token if token.revoked else _end_token(connection, change, token_id, revoked_at=self._clock())

    def rotate_token(self, token_id: str, *, overlap: timedelta = timedelta()) -> tuple[Token, str]:
        """A new token with the same rights and as long a life, and its text.

        The old one expires `overlap` from now, or when it would have before; without an overlap it is revoked, for
        that reaches every gateway whatever its clock says.

        Raises:
            UnknownTokenError: there is none of that id.
            RevokedError: it is dead.
            TokenLimitError: with the old one, its client would have more than `TOKENS_MAX` live tokens.
            StoreError: the database failed.
        """
        now = self._clock()
        with self._change() as (connection, change):
            old = _token_of(connection, token_id)
            if not old.live(now):
                state = "was revoked" if old.revoked else "has expired"
                raise RevokedError(f"the token {token_id!r} {state}; make another: weftline keys token {old.client}")
            if overlap <= timedelta():
                _end_token(connection, change, token_id, revoked_at=now)
            elif old.expires_at is None or now + overlap < old.expires_at:
                _end_token(connection, change, token_id, expires_at=now + overlap)
            expires_at = None if old.expires_at is None else now + (old.expires_at - old.created_at)
            return _insert_token(connection, change, old.client, old.scopes, old.models, now, expires_at)

    def changed_since(self, change: int) -> Sequence[Client | Token]:
        """The clients and tokens added or changed after change number `change` (0 for all), oldest change first.

        Those that changed together bear the same number, and are all there. That time passes is no change: a token
        whose `expires_at` comes is not told again.

        Raises:
            StoreError: the database failed.
        """
        found: list[Client | Token] = []
        with self._told("read"), self._engine.connect() as connection:
            # Up to here all is visible; a database may show the second table as of later than the first.
            last = connection.execute(sa.select(_CHANGES.c.number)).scalar_one()
            for table, record in ((_CLIENTS, _client), (_TOKENS, _token)):
                where = table.c.change > change, table.c.change <= last
                found += map(record, connection.execute(sa.select(table).where(*where)))
        return sorted(found, key=lambda record: record.change)

    def write_audit(
        self, *, client_id: str, token_id: str, action: str, model: str, hosts: Iterable[str], outcome: str
    ) -> None:
        """Write down an operation that has ended; of more than AUDIT_MAX the oldest are let go.

        Raises:
            StoreError: the database failed.
        """
        row = {"client_id": client_id, "token_id": token_id, "action": action, "model": model[:OUTCOME_CHARS_MAX]}
        row["outcome"] = outcome[:OUTCOME_CHARS_MAX]
        with self._told("write to"), self._writing.begin() as connection:
            insert = sa.insert(_AUDIT).values(**row, hosts=tuple(hosts), at=self._clock()).returning(_AUDIT.c.id)
            newest = connection.execute(insert).scalar_one()
            connection.execute(sa.delete(_AUDIT).where(_AUDIT.c.id <= newest - AUDIT_MAX))

    def audit(self, count: int = 100) -> Sequence[Audit]:
        """The newest operations on models, newest first.

        Raises:
            StoreError: the database failed.
        """
        with self._told("read"), self._engine.connect() as connection:
            rows = connection.execute(sa.select(_AUDIT).order_by(_AUDIT.c.id.desc()).limit(count))
            return [Audit(*row[1:]) for row in rows]

    def set_alias(self, name: str, target: str) -> Alias:
        """From now on `name` stands for the model `target`; what it stood for before is kept for `roll_back_alias`.

        Raises:
            AliasError: a name is empty or too long, the target is an alias itself, the name is one's target, or there
                are ALIASES_MAX.
            StoreError: the database failed.
        """
        name, target = full_name(name), full_name(target)
        if not all(len(short_name(part)) > 0 and len(part) <= MODEL_CHARS_MAX for part in (name, target)):
            raise AliasError(f"a model's name has 1 to {MODEL_CHARS_MAX} characters.")
        with self._told("write to"), self._writing.begin() as connection:
            known = {row.name: row for row in connection.execute(sa.select(_ALIASES))}
            _check_alias(name, target, known)
            if name not in known and len(known) >= ALIASES_MAX:
                raise AliasError(f"there are {ALIASES_MAX} aliases already.")
            previous = known[name].target if name in known else None
            if previous == target:
                return Alias(name, target, known[name].previous)
            connection.execute(sa.delete(_ALIASES).where(_ALIASES.c.name == name))
            connection.execute(sa.insert(_ALIASES).values(name=name, target=target, previous=previous))
        return Alias(name, target, previous)

    def roll_back_alias(self, name: str) -> Alias:
        """`name` stands for what it stood for before; again, and it is back.

        Raises:
            AliasError: it is none, stood for nothing before, or that is an alias by now.
            StoreError: the database failed.
        """
        name = full_name(name)
        with self._told("write to"), self._writing.begin() as connection:
            known = {row.name: row for row in connection.execute(sa.select(_ALIASES))}
            row = known.get(name)
            if row is None or row.previous is None:
                raise AliasError(f"{short_name(name)!r} has stood for nothing else.")
            _check_alias(name, row.previous, known)
            swap = sa.update(_ALIASES).where(_ALIASES.c.name == name)
            connection.execute(swap.values(target=row.previous, previous=row.target))
        return Alias(name, row.previous, row.target)

    def delete_alias(self, name: str) -> None:
        """`name` stands for itself again.

        Raises:
            AliasError: it is none.
            StoreError: the database failed.
        """
        with self._told("write to"), self._writing.begin() as connection:
            if not connection.execute(sa.delete(_ALIASES).where(_ALIASES.c.name == full_name(name))).rowcount:
                raise AliasError(f"{short_name(name)!r} is no alias.")

    def aliases(self) -> Sequence[Alias]:
        """All aliases, by name.

        Raises:
            StoreError: the database failed.
        """
        with self._told("read"), self._engine.connect() as connection:
            return [Alias(*row) for row in connection.execute(sa.select(_ALIASES).order_by(_ALIASES.c.name))]

    @contextlib.contextmanager
    def _change(self) -> Iterator[tuple[sa.Connection, int]]:
        """A transaction that writes, one at a time, and the number that what it changes bears."""
        count = sa.update(_CHANGES).values(number=_CHANGES.c.number + 1).returning(_CHANGES.c.number)
        with self._told("write to"), self._writing.begin() as connection:
            yield connection, connection.execute(count).scalar_one()

    def _select(self, *where: sa.ColumnElement[bool], order: sa.ColumnElement[Any] = _CLIENTS.c.id) -> Sequence[Client]:
        with self._told("read"), self._engine.connect() as connection:
            rows = connection.execute(sa.select(_CLIENTS).where(*where).order_by(order))
            return [_client(row) for row in rows]

    def _duplicate(self, client_id: str, key: PublicKey) -> DuplicateClientError:
        taken = self.get(client_id)
        if taken is not None and (taken.revoked or taken.key is not None):
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


def _check_alias(name: str, target: str, known: Mapping[str, sa.Row[Any]]) -> None:
    """An alias stands for a model, not for another alias."""
    if target in known or name == target:
        raise AliasError(f"{short_name(target)!r} is an alias itself; name the model it stands for.")
    if any(row.target == name for row in known.values()):
        raise AliasError(f"{short_name(name)!r} is what another alias stands for.")


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


def _unknown(client_id: str) -> UnknownClientError:
    return UnknownClientError(f"there is no client {client_id[:64]!r}; `weftline keys list` names them all.")


def _client(row: sa.Row[Any]) -> Client:
    key = None if row.fingerprint is None else PublicKey(row.algorithm, row.public_key, row.fingerprint)
    return Client(row.id, key, row.created_at, row.revoked_at, row.change, row.weight, row.running_max)


def _token(row: sa.Row[Any]) -> Token:
    return Token(
        id=row.id,
        client=row.client_id,
        scopes=row.scopes,
        models=row.models,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        change=row.change,
    )


def _token_of(connection: sa.Connection, token_id: str) -> Token:
    row = connection.execute(sa.select(_TOKENS).where(_TOKENS.c.id == token_id)).one_or_none()
    if row is None:
        raise UnknownTokenError(f"there is no token {token_id[:64]!r}; `weftline keys tokens` lists their ids.")
    return _token(row)


def _end_token(connection: sa.Connection, change: int, token_id: str, **end: datetime) -> Token:
    """Set `revoked_at` or `expires_at`."""
    update = sa.update(_TOKENS).where(_TOKENS.c.id == token_id).values(**end, change=change).returning(_TOKENS)
    return _token(connection.execute(update).one())


def _insert_token(
    connection: sa.Connection,
    change: int,
    client_id: str,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    now: datetime,
    expires_at: datetime | None,
) -> tuple[Token, str]:
    c = _TOKENS.c
    live = c.client_id == client_id, c.revoked_at.is_(None), sa.or_(c.expires_at.is_(None), c.expires_at > now)
    if connection.execute(sa.select(sa.func.count()).where(*live)).scalar_one() >= TOKENS_MAX:
        raise TokenLimitError(
            f"the client {client_id!r} has {TOKENS_MAX} tokens; revoke one first: weftline keys tokens {client_id}"
        )
    while True:
        token_id = "".join(secrets.choice(_TOKEN_ID) for _ in range(8))
        if connection.execute(sa.select(c.id).where(c.id == token_id)).one_or_none() is None:
            break
    text = f"wl_{token_id}_{secrets.token_urlsafe(32)}"
    insert = sa.insert(_TOKENS).values(
        id=token_id,
        client_id=client_id,
        digest=token_digest(text),
        scopes=scopes,
        models=models,
        created_at=now,
        expires_at=expires_at,
        change=change,
    )
    return _token(connection.execute(insert.returning(_TOKENS)).one()), text


def _checked_scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    wanted = set(scopes)
    if not wanted or wanted - set(Scope):
        unknown = f"there is no scope {min(wanted - set(Scope))[:32]!r}" if wanted else "a token needs a scope"
        raise TokenRightsError(f"{unknown}; use one or more of {', '.join(Scope)}.")
    return tuple(scope.value for scope in Scope if scope in wanted)


def _checked_models(patterns: Iterable[str]) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys(patterns))
    if not 0 < len(wanted) <= PATTERNS_MAX:
        raise TokenRightsError(f"a token needs 1 to {PATTERNS_MAX} patterns of models; '*' means all.")
    for pattern in wanted:
        if not pattern or len(pattern) > PATTERN_CHARS_MAX or not pattern.isprintable() or " " in pattern:
            raise TokenRightsError(
                f"{pattern[:64]!r} can't be a pattern of models: use 1 to {PATTERN_CHARS_MAX} characters, no spaces."
            )
    return wanted
