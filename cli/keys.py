"""`weftline keys`: make key pairs for clients, and say whose are accepted.

A private key is written once, to its owner's file, and read by nobody here; the registry gets the public key only.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from cli.settings import websocket_url
from common.config import default_data_dir, writable_dir
from common.errors import ProcessError, UsageError
from gateway.auth import ED25519, RSA_BITS_MIN, algorithm_named, load_public_key
from gateway.store import FILE_NAME, Client, PublicKey, Store, StoreError, check_client_id

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
            if client is None and not files.any_exists():
                return create_client(store, candidate, folder, server_url=server_url).config
            if client is None and key is not None:
                with contextlib.suppress(StoreError):
                    client = store.add(candidate, key)
            if client is not None and key == client.key and not client.revoked:
                _point_at(files, candidate, websocket_url(server_url), client.key.algorithm)
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
    name="keys", help="Create, import, list and revoke the keys of clients.", no_args_is_help=True, add_completion=False
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
        client = store.add(name, load_public_key(pem, algorithm))
    print(f"Registered the client {name!r} ({client.key.algorithm}, key {client.key.fingerprint[:16]}).")
    print("It can connect now, to every gateway on this data dir.")


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
    data_dir: DataDir = None,
) -> None:
    """List all clients, revoked ones too."""
    clients: Sequence[Client] = ()
    if data_dir is not None or (default_data_dir() / FILE_NAME).exists():
        with _registry(data_dir) as store:
            clients = store.list()
    if as_json:
        rows = [
            {
                "id": client.id,
                "algorithm": client.key.algorithm,
                "fingerprint": client.key.fingerprint,
                "createdAt": client.created_at.isoformat(),
                "revokedAt": client.revoked_at.isoformat() if client.revoked_at else None,
            }
            for client in clients
        ]
        print(json.dumps(rows, indent=2))
        return
    if not clients:
        print("There are no clients yet. Next: weftline keys create NAME")
        return
    width = max(len(client.id) for client in clients)
    for client in clients:
        state = f"revoked {client.revoked_at:%Y-%m-%d %H:%M}Z" if client.revoked_at else "active"
        created = f"{client.created_at:%Y-%m-%d}"
        print(f"{client.id:<{width}}  {client.key.algorithm:<7}  {client.key.fingerprint[:16]}  {created}  {state}")


@app.command()
def revoke(name: Name, data_dir: DataDir = None) -> None:
    """Refuse a client from now on. Its name and key can't be used again."""
    with _registry(data_dir) as store:
        client = store.revoke(name)
    print(
        f"Revoked the client {name!r} at {client.revoked_at:%Y-%m-%d %H:%M:%S}Z. Next: weftline keys create OTHER_NAME"
    )
