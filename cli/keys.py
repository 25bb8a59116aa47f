"""`weftline keys`: make key pairs and API tokens for clients, and say whose are accepted.

A private key is written once, to its owner's file, and read by nobody here; the registry gets the public key only. A
token is printed once; the registry gets its digest only.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from cli.fleet import print_json, print_table
from cli.settings import websocket_url
from common.command import JsonOption
from common.config import default_data_dir, writable_dir
from common.errors import ProcessError, UsageError
from gateway.auth import ED25519, RSA_BITS_MIN, algorithm_named, load_public_key
from gateway.store import (
    FILE_NAME,
    MODELS,
    SCOPES,
    Client,
    PublicKey,
    Scope,
    Store,
    StoreError,
    Token,
    UnknownClientError,
    check_client_id,
)

DEFAULT_URL = "ws://127.0.0.1:3000"
# More namesakes than this are a mistake of ours, not somebody who deleted key files.
NAMESAKES_MAX = 100


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """The three files of a client, in one folder; the config's `privateKeyPath` is absolute."""

    private: Path
    public: Path
    config: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> "KeyFiles":
        return cls(folder / f"{name}_key.pem", folder / f"{name}_public.pem", folder / f"{name}_config.json")

    def any_exists(self) -> bool:
        return self.private.exists() or self.public.exists() or self.config.exists()

    def remove(self) -> None:
        for path in (self.private, self.public, self.config):
            path.unlink(missing_ok=True)


def create_key_files(
    name: str, folder: Path, *, server_url: str = DEFAULT_URL, algorithm: str = "SHA256"
) -> tuple[KeyFiles, PublicKey]:
    """Make a key pair (RSA-2048; Ed25519 for `ed25519`) and write NAME_key.pem, NAME_public.pem, NAME_config.json.

    All three are written or none; the private key is readable by its owner only.

    Raises:
        UsageError: the name, the URL or the algorithm is wrong.
        ProcessError: a file exists, or can't be written.
    """
    check_client_id(name)
    server_url = websocket_url(server_url)
    algorithm = algorithm_named(algorithm)
    private: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
    if algorithm == ED25519:
        private = ed25519.Ed25519PrivateKey.generate()
    else:
        private = rsa.generate_private_key(65537, RSA_BITS_MIN)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    spki = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    files = KeyFiles.of(name, folder.absolute())
    with contextlib.ExitStack() as undo:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write_new(files.private, pem, 0o600, undo)
            _write_new(files.public, spki, 0o644, undo)
            _write_new(files.config, _config(name, files, server_url, algorithm), 0o644, undo)
        except FileExistsError as error:
            raise ProcessError(f"{error.filename} exists already; choose another name or --out folder.") from None
        except OSError as error:
            raise ProcessError(f"cannot write {error.filename}: {error.strerror}.") from None
        undo.pop_all()
    return files, load_public_key(spki, algorithm)


def _config(name: str, files: KeyFiles, server_url: str, algorithm: str) -> bytes:
    config = {
        "serverUrl": server_url,
        "clientId": name,
        "privateKeyPath": str(files.private),
        "signatureAlgorithm": algorithm,
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def _write_new(path: Path, data: bytes, mode: int, undo: contextlib.ExitStack) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    undo.callback(path.unlink, missing_ok=True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def create_client(
    store: Store, name: str, folder: Path, *, server_url: str = DEFAULT_URL, algorithm: str = "SHA256"
) -> KeyFiles:
    """`create_key_files`, and the public key registered; files of a client that can't be registered are removed.

    Raises:
        StoreError: the name is taken, or the registry failed.
        UsageError, ProcessError: as `create_key_files`.
    """
    files, key = create_key_files(name, folder, server_url=server_url, algorithm=algorithm)
    try:
        store.add(name, key)
    except BaseException:
        files.remove()
        raise
    return files


def ensure_client(data_dir: Path, name: str, *, server_url: str = DEFAULT_URL) -> Path:
    """The config of a registered client with its key in `data_dir`/keys, made on first use.

    It follows `server_url` when that changes. If the key files or the registry were lost, what is left is used where
    it can be, else a client NAME-2, NAME-3, … takes over, for a name is never given twice.

    Raises:
        ProcessError: the files or the registry can't be read or written.
    """
    folder = data_dir / "keys"
    with contextlib.closing(Store.open(data_dir)) as store:
        for number in range(1, NAMESAKES_MAX):
            candidate = name if number == 1 else f"{name}-{number}"
            files = KeyFiles.of(candidate, folder.absolute())
            client = store.get(candidate)
            key = _existing(files)
            free = client is None or (client.key is None and not client.revoked)
            if free and not files.any_exists():
                return create_client(store, candidate, folder, server_url=server_url).config
            if free and key is not None:
                with contextlib.suppress(StoreError):
                    client = store.add(candidate, key)
            if client is not None and key is not None and key == client.key and not client.revoked:
                _point_at(files, candidate, websocket_url(server_url), key.algorithm)
                return files.config
    raise ProcessError(
        f"there are {NAMESAKES_MAX} clients named after {name!r} without keys in {folder}; remove the folder."
    )


def _existing(files: KeyFiles) -> PublicKey | None:
    """The public key of files that a client can use, or None."""
    try:
        algorithm = json.loads(files.config.read_bytes())["signatureAlgorithm"]
        return load_public_key(files.public.read_bytes(), algorithm) if files.private.exists() else None
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        return None


def _point_at(files: KeyFiles, name: str, server_url: str, algorithm: str) -> None:
    data = _config(name, files, server_url, algorithm)
    if files.config.read_bytes() != data:
        replacement = files.config.with_suffix(".new")
        replacement.write_bytes(data)
        replacement.replace(files.config)


# The commands

app = typer.Typer(
    name="keys",
    help="Manage the clients: their key pairs (for the WebSocket) and their API tokens (for HTTP).",
    no_args_is_help=True,
    add_completion=False,
)
Name = Annotated[str, typer.Argument(help="1 to 64 letters, digits, dots, underscores and hyphens.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where the registry is.  [default: WEFTLINE_DATA_DIR, or the user's]")
]


@contextlib.contextmanager
def _registry(data_dir: Path | None, *, make: bool = False) -> Iterator[Store]:
    """The open registry; a `ProcessError` within ends the command with its sentence and status.

    Only with `make` does one come into being: else a mistyped folder would seem to be one without clients.
    """
    try:
        folder = data_dir or default_data_dir()
        if make:
            writable_dir(folder)
        elif not (folder / FILE_NAME).exists():
            raise UsageError(
                f"there is no client registry in {folder}. `weftline keys create NAME` makes one with its first "
                "client; --data-dir names another folder."
            )
        with contextlib.closing(Store.open(folder)) as store:
            yield store
    except ProcessError as error:
        print(f"weftline: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from None


@app.command()
def create(
    name: Name,
    out: Annotated[Path, typer.Option(help="The folder for the files.")] = Path("keys"),
    server_url: Annotated[str, typer.Option(help="The gateway, written to the client's config.")] = DEFAULT_URL,
    algorithm: Annotated[str, typer.Option(help="SHA256, SHA384 or SHA512 (RSA), or ed25519.")] = "SHA256",
    data_dir: DataDir = None,
) -> None:
    """Make a key pair for a client and register its public key."""
    with _registry(data_dir, make=True) as store:
        files = create_client(store, name, out, server_url=server_url, algorithm=algorithm)
    print(f"Created the client {name!r}, and registered its public key:")
    print(f"  {files.private}  (secret: give it to the client, to nobody else)")
    print(f"  {files.public}")
    print(f"  {files.config}")
    print(f"Next: start the client with {files.config.name}. Gateways on this data dir know it already; elsewhere run")
    print(f"  weftline keys import {name} {files.public}")


@app.command("import")
def import_(
    name: Name,
    public: Annotated[Path, typer.Argument(metavar="PUBLIC.pem", help="The client's public key.")],
    algorithm: Annotated[
        str | None, typer.Option(help="What it signs with.  [default: SHA256 for RSA keys, else ed25519]")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Register the public key of a client that made its own."""
    with _registry(data_dir, make=True) as store:
        try:
            pem = public.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {public}: {error.strerror}.") from None
        key = load_public_key(pem, algorithm)
        store.add(name, key)
    print(f"Registered the client {name!r} ({key.algorithm}, key {key.fingerprint[:16]}).")
    print("It can connect now, to every gateway on this data dir.")


@app.command("list")
def list_(as_json: JsonOption = False, data_dir: DataDir = None) -> None:
    """List all clients, revoked ones too."""
    clients: Sequence[Client] = ()
    if _may_look(data_dir):
        with _registry(data_dir) as store:
            clients = store.list()
    if as_json:
        print_json([_client_json(client) for client in clients])
        return
    if not clients:
        print("There are no clients yet. Next: weftline keys create NAME")
        return
    width = max(len(client.id) for client in clients)
    for client in clients:
        state = f"revoked {client.revoked_at:%Y-%m-%d %H:%M}Z" if client.revoked_at else "active"
        algorithm, fingerprint = (client.key.algorithm, client.key.fingerprint[:16]) if client.key else ("-", "-")
        limits = f"weight {client.weight:g}  running {client.running_max or 'any'}"
        print(
            f"{client.id:<{width}}  {algorithm:<7}  {fingerprint:<16}  {client.created_at:%Y-%m-%d}  {limits}  {state}"
        )


def _may_look(data_dir: Path | None) -> bool:
    """Whether there is a registry, or should be: without the user's own, there are no clients yet."""
    return data_dir is not None or (default_data_dir() / FILE_NAME).exists()


def _client_json(client: Client) -> dict[str, Any]:
    return {
        "id": client.id,
        "algorithm": client.key.algorithm if client.key else None,
        "fingerprint": client.key.fingerprint if client.key else None,
        "createdAt": client.created_at.isoformat(),
        "revokedAt": client.revoked_at.isoformat() if client.revoked_at else None,
        "weight": client.weight,
        "runningMax": client.running_max,
    }


@app.command()
def limit(
    name: Name,
    weight: Annotated[
        float | None, typer.Option(metavar="W", help="Its share among clients that wait: 2 gets twice as much as 1.")
    ] = None,
    running: Annotated[
        int | None, typer.Option(metavar="N", help="How many of its requests run at once; 0: any number.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Set what a client may have of the fleet. What is not named stays as it was."""
    with _registry(data_dir) as store:
        if weight is None and running is None:
            raise UsageError("say what to set: --weight, --running, or both.")
        client = store.limit(name, weight=weight, running_max=running)
    bound = f"at most {client.running_max} of its requests run" if client.running_max else "any number of requests runs"
    print(f"{name}: weight {client.weight:g}; {bound} at once. Gateways know it within 2 s, for requests to come.")


@app.command()
def revoke(name: Name, data_dir: DataDir = None) -> None:
    """Refuse a client, and all its tokens, from now on. Its name and key can't be used again."""
    with _registry(data_dir) as store:
        client = store.revoke(name)
    print(
        f"Revoked the client {name!r} at {client.revoked_at:%Y-%m-%d %H:%M:%S}Z. Next: weftline keys create OTHER_NAME"
    )


# Tokens

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _duration(text: str) -> timedelta:
    """A whole number with its unit: 90s, 30m, 12h, 30d; up to 99,999 of them."""
    match = re.fullmatch(r"(\d{1,5})([smhd])", text, re.ASCII)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a duration; write it like 30m, 12h or 30d.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _lifetime(text: str) -> timedelta | None:
    return None if text == "never" else _duration(text)


TokenId = Annotated[str, typer.Argument(metavar="ID", help="As `weftline keys tokens` shows it.")]


@app.command()
def token(
    name: Name,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(
            metavar="SCOPE", help=f"One of {', '.join(Scope)}; may be repeated.  [default: {' and '.join(SCOPES)}]"
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Models it may use, as 'llama3*' or '*:3b'; may be repeated.  [default: *]"
        ),
    ] = None,
    expires: Annotated[
        timedelta | None,
        typer.Option(parser=_lifetime, metavar="TIME", help="30d, 12h, 30m or never.  [default: never]"),
    ] = None,
    as_json: JsonOption = False,
    data_dir: DataDir = None,
) -> None:
    """Make an API token for a client, and print it, this once. A client that isn't there is made, without a key."""
    with _registry(data_dir, make=True) as store:
        expires_at = None if expires is None else datetime.now(UTC) + expires
        made, text = store.add_token(name, scopes=scope or SCOPES, models=model or MODELS, expires_at=expires_at)
    _print_token(made, text, as_json=as_json)


@app.command()
def tokens(
    name: Annotated[str | None, typer.Argument(help="Of this client only.")] = None,
    as_json: JsonOption = False,
    data_dir: DataDir = None,
) -> None:
    """List API tokens, dead ones too; never their secrets."""
    found: Sequence[Token] = ()
    if _may_look(data_dir):
        with _registry(data_dir) as store:
            if name is not None and store.get(name) is None:
                raise UnknownClientError(f"there is no client {name!r}; `weftline keys list` names them all.")
            found = store.tokens(name)
    now = datetime.now(UTC)
    if as_json:
        print_json([_token_json(token, now) for token in found])
        return
    if not found:
        print(f"There are no tokens yet. Next: weftline keys token {name or 'NAME'}")
        return
    rows = [
        [
            token.id,
            token.client,
            "\n".join(token.scopes),
            "\n".join(token.models),
            f"{token.created_at:%Y-%m-%d}",
            f"{token.expires_at:%Y-%m-%d %H:%M}Z" if token.expires_at else "never",
            f"revoked {token.revoked_at:%Y-%m-%d %H:%M}Z" if token.revoked_at else _state(token, now),
        ]
        for token in found
    ]
    print_table(["ID", "CLIENT", "SCOPES", "MODELS", "CREATED", "EXPIRES", "STATE"], rows)


@app.command("revoke-token")
def revoke_token(token_id: TokenId, data_dir: DataDir = None) -> None:
    """Refuse an API token from now on."""
    with _registry(data_dir) as store:
        token = store.revoke_token(token_id)
    print(f"Revoked the token {token.id} of {token.client!r} at {token.revoked_at:%Y-%m-%d %H:%M:%S}Z.")


@app.command()
def rotate(
    token_id: TokenId,
    overlap: Annotated[
        timedelta | None,
        typer.Option(
            parser=_duration,
            metavar="TIME",
            help="How long the old one stays good, as 1h or 30m.  [default: not at all]",
        ),
    ] = None,
    as_json: JsonOption = False,
    data_dir: DataDir = None,
) -> None:
    """Replace an API token by a new one with the same rights and as long a life, and print that, this once."""
    with _registry(data_dir) as store:
        made, text = store.rotate_token(token_id, overlap=overlap or timedelta())
    _print_token(made, text, as_json=as_json)


def _print_token(token: Token, text: str, *, as_json: bool) -> None:
    """The secret goes to stdout alone: what catches stderr may be a log."""
    if as_json:
        print_json({"token": text, **_token_json(token, token.created_at)})
    else:
        print(text)
    end = f"until {token.expires_at:%Y-%m-%d %H:%M}Z" if token.expires_at else "until it is revoked"
    print(
        f"This is the token {token.id} of {token.client!r}, good {end}. It is shown this once. To use it as TOKEN:\n"
        "  Ollama's clients:  OLLAMA_HOST=http://HOST:3000/k/TOKEN\n"
        "  OpenAI's clients:  OPENAI_BASE_URL=http://HOST:3000/v1 OPENAI_API_KEY=TOKEN\n"
        "  others:            Authorization: Bearer TOKEN",
        file=sys.stderr,
    )


def _state(token: Token, now: datetime) -> str:
    return "revoked" if token.revoked else "active" if token.live(now) else "expired"


def _token_json(token: Token, now: datetime) -> dict[str, Any]:
    return {
        "id": token.id,
        "client": token.client,
        "scopes": token.scopes,
        "models": token.models,
        "createdAt": token.created_at.isoformat(),
        "expiresAt": token.expires_at.isoformat() if token.expires_at else None,
        "revokedAt": token.revoked_at.isoformat() if token.revoked_at else None,
        "state": _state(token, now),
    }
