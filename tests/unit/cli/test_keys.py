"""`weftline keys`: what it writes, registers, prints and returns."""

import base64
import contextlib
import json
import re
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from typer.testing import CliRunner, Result

from cli.keys import KeyFiles, app, create_key_files, ensure_client
from cli.settings import websocket_url
from common.config import default_data_dir
from common.errors import ProcessError, UsageError
from gateway.auth import verify
from gateway.store import Client, Store, StoreError, Token, token_digest

LINE = "wl1:challenge"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEFTLINE_DATA_DIR", str(tmp_path / "data"))


def keys(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def registered(name: str) -> Client | None:
    with contextlib.closing(Store.open(Path("data").absolute())) as store:
        return store.get(name)


def found(text: str) -> Token:
    """The token of that text."""
    with contextlib.closing(Store.open(Path("data").absolute())) as store:
        pair = store.find_token(token_digest(text) or "")
        assert pair is not None
        return pair[0]


def signature(private: Path) -> str:
    key = serialization.load_pem_private_key(private.read_bytes(), password=None)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return base64.b64encode(key.sign(LINE.encode())).decode()
    assert isinstance(key, rsa.RSAPrivateKey)
    return base64.b64encode(key.sign(LINE.encode(), padding.PKCS1v15(), hashes.SHA256())).decode()


@pytest.mark.parametrize(("options", "algorithm"), [((), "SHA256"), (("--algorithm", "Ed25519"), "ed25519")])
def test_a_created_client_can_authenticate(options: tuple[str, ...], algorithm: str, tmp_path: Path) -> None:
    result = keys("create", "alice", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    files = KeyFiles.of("alice", tmp_path / "keys")
    for path in (files.private, files.public, files.config):
        assert str(path) in result.stdout
    assert json.loads(files.config.read_text()) == {
        "serverUrl": "ws://127.0.0.1:3000",
        "clientId": "alice",
        "privateKeyPath": str(files.private),
        "signatureAlgorithm": algorithm,
    }
    assert files.private.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert stat.S_IMODE(files.private.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.private.parent.stat().st_mode) == 0o700
    assert verify(registered("alice"), algorithm, signature(files.private), LINE)
    client = registered("alice")
    assert client is not None
    assert client.key is not None
    assert client.key.pem == files.public.read_text()


@pytest.mark.parametrize("given", ["ws://h:1/ws", "wss://h", "ws://[::1]:3000"])
def test_a_gateways_url(given: str) -> None:
    assert websocket_url(given) == given


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://h:3000", "ws://h:3000"),
        ("https://h", "wss://h"),
        ("WSS://h", "wss://h"),
        ("h:3000", "ws://h:3000"),
        ("[::1]:3000", "ws://[::1]:3000"),
    ],
)
def test_for_another_url_the_right_one_is_named(given: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"must read like {re.escape(meant)}$"):
        websocket_url(given)


@pytest.mark.parametrize("given", ["", "ws://", "ftp://h", "ws://h:99999", "ws://[::1", "http:///x"])
def test_other_urls_are_refused(given: str) -> None:
    with pytest.raises(UsageError, match=r"not the URL of a gateway; it must read like ws://HOST:PORT$"):
        websocket_url(given)


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "../alice"),
        ("create", "alice", "--algorithm", "MD5"),
        ("create", "alice", "--server-url", "ftp://h"),
        ("import", "alice", "missing.pem"),
    ],
)
def test_a_mistake_is_status_2_and_leaves_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = keys(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("weftline: ")
    assert not (tmp_path / "keys").exists()
    assert registered("alice") is None


@pytest.mark.parametrize("suffix", ["key.pem", "public.pem", "config.json"])
def test_files_are_never_overwritten(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    existing = tmp_path / "keys" / f"alice_{suffix}"
    existing.write_text("precious")
    result = keys("create", "alice")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{existing} exists already" in result.stderr
    assert existing.read_text() == "precious"
    assert list((tmp_path / "keys").iterdir()) == [existing]
    assert registered("alice") is None


def test_files_of_a_client_that_is_not_registered_are_removed(tmp_path: Path) -> None:
    assert keys("create", "alice").exit_code == 0
    result = keys("create", "alice", "--out", "other")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "exists already" in result.stderr
    assert list((tmp_path / "other").iterdir()) == []


def test_a_folder_that_can_not_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProcessError, match=f"cannot write {tmp_path / 'file'}"):
        create_key_files("alice", tmp_path / "file" / "keys")


def test_a_public_key_is_imported() -> None:
    files, key = create_key_files("alice", Path("hers"), algorithm="SHA512")
    result = keys("import", "alice", files.public, "--algorithm", "SHA512")
    assert (result.exit_code, result.stderr) == (0, "")
    client = registered("alice")
    assert client is not None
    assert client.key == key


def test_a_private_key_is_not_imported() -> None:
    files, _ = create_key_files("alice", Path("hers"))
    result = keys("import", "alice", files.private)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "that is a private key" in result.stderr
    assert registered("alice") is None


def test_a_weak_key_is_not_imported(tmp_path: Path) -> None:
    weak = rsa.generate_private_key(65537, 1024).public_key()
    pem = weak.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "weak.pem").write_bytes(pem)
    result = keys("import", "alice", "weak.pem")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "at least 2048 bits" in result.stderr


def test_clients_are_listed_and_revoked() -> None:
    assert "keys create NAME" in keys("list").stdout
    assert json.loads(keys("list", "--json").stdout) == []
    assert not default_data_dir().exists(), "looking makes nothing"
    for name in ("bob", "alice"):
        assert keys("create", name, "--algorithm", "ed25519").exit_code == 0
    result = keys("revoke", "bob")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "Revoked the client 'bob'" in result.stdout
    assert keys("revoke", "bob").exit_code == 0

    lines = keys("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["alice", "bob"]
    assert "active" in lines[0]
    assert "revoked" in lines[1]
    rows = json.loads(keys("list", "--json").stdout)
    assert [(row["id"], row["algorithm"], bool(row["revokedAt"])) for row in rows] == [
        ("alice", "ed25519", False),
        ("bob", "ed25519", True),
    ]


def test_what_a_client_may_have_is_set_and_listed() -> None:
    for name in ("ann", "bob"):
        assert keys("create", name, "--algorithm", "ed25519").exit_code == 0
    assert "weight 1  running any" in keys("list").stdout
    result = keys("limit", "ann", "--weight", "2.5")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "ann: weight 2.5; any number of requests runs at once" in result.stdout
    assert "ann: weight 2.5; at most 3 of its requests run at once" in keys("limit", "ann", "--running", "3").stdout
    lines = keys("list").stdout.splitlines()
    assert ["weight 2.5  running 3" in line for line in lines] == [True, False]
    rows = json.loads(keys("list", "--json").stdout)
    assert [(row["id"], row["weight"], row["runningMax"]) for row in rows] == [("ann", 2.5, 3), ("bob", 1.0, 0)]
    assert "any number" in keys("limit", "ann", "--running", "0").stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("ann",), 2, "say what to set"),
        (("nobody", "--weight", "2"), 1, "there is no client 'nobody'"),
        (("ann", "--weight", "0"), 2, "from 0.001 to 1000"),
        (("ann", "--weight", "nan"), 2, "from 0.001 to 1000"),
        (("ann", "--running", "-1"), 2, "any number: 0"),
    ],
)
def test_what_no_client_may_have(arguments: tuple[str, ...], status: int, words: str) -> None:
    assert keys("create", "ann", "--algorithm", "ed25519").exit_code == 0
    result = keys("limit", *arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in result.stderr
    (row,) = json.loads(keys("list", "--json").stdout)
    assert (row["weight"], row["runningMax"]) == (1.0, 0)


def test_revoking_nobody_fails() -> None:
    assert keys("create", "somebody", "--algorithm", "ed25519").exit_code == 0
    result = keys("revoke", "nobody")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no client 'nobody'" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("list", "--json"),
        ("revoke", "ann"),
        ("tokens",),
        ("tokens", "ann", "--json"),
        ("revoke-token", "00000000"),
        ("rotate", "00000000"),
    ],
)
def test_a_mistyped_data_dir_is_told_and_not_made(arguments: Sequence[str], tmp_path: Path) -> None:
    typo = tmp_path / "dtaa"
    result = keys(*arguments, "--data-dir", typo)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"there is no client registry in {typo}" in result.stderr
    assert not typo.exists()


def test_a_data_dir_that_can_not_be_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        result = keys("create", "ann", "--out", tmp_path / "keys", "--data-dir", tmp_path / folder)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"cannot write to the data dir {tmp_path / folder}" in result.stderr
    assert not (tmp_path / "keys").exists()


def test_an_ensured_client_is_made_once_and_follows_the_url(tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = ensure_client(data, "local", server_url="ws://127.0.0.1:3000")
    private = (data / "keys" / "local_key.pem").read_bytes()
    assert config == data / "keys" / "local_config.json"
    assert ensure_client(data, "local", server_url="ws://127.0.0.1:4000") == config
    assert json.loads(config.read_text())["serverUrl"] == "ws://127.0.0.1:4000"
    assert (data / "keys" / "local_key.pem").read_bytes() == private
    assert verify(registered("local"), None, signature(data / "keys" / "local_key.pem"), LINE)


def test_an_ensured_client_survives_a_lost_registry(tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = ensure_client(data, "local")
    for path in data.glob("weftline.db*"):
        path.unlink()
    assert ensure_client(data, "local") == config
    assert verify(registered("local"), None, signature(data / "keys" / "local_key.pem"), LINE)


@pytest.mark.parametrize("lost", ["local_key.pem", "local_public.pem", "local_config.json"])
def test_an_ensured_client_without_its_files_is_followed_by_another(lost: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    ensure_client(data, "local")
    (data / "keys" / lost).unlink()
    config = ensure_client(data, "local")
    assert config.name == "local-2_config.json"
    assert ensure_client(data, "local") == config
    assert verify(registered("local-2"), None, signature(data / "keys" / "local-2_key.pem"), LINE)


def test_a_revoked_client_is_not_ensured(tmp_path: Path) -> None:
    ensure_client(tmp_path / "data", "local")
    assert keys("revoke", "local").exit_code == 0
    assert ensure_client(tmp_path / "data", "local").name == "local-2_config.json"


def test_an_ensured_client_may_have_had_tokens_only(tmp_path: Path) -> None:
    assert keys("token", "local").exit_code == 0
    data = tmp_path / "data"
    assert ensure_client(data, "local").name == "local_config.json"
    assert verify(registered("local"), None, signature(data / "keys" / "local_key.pem"), LINE)


def test_nothing_is_left_of_a_client_when_the_registry_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "add", broken)
    result = keys("create", "alice")
    assert (result.exit_code, result.stderr) == (1, "weftline: the disk is full\n")
    assert list((tmp_path / "keys").iterdir()) == []


# Tokens


def test_a_token_is_printed_alone_and_told_of_on_the_side() -> None:
    result = keys("token", "alice")
    assert result.exit_code == 0
    text = result.stdout.removesuffix("\n")
    token = found(text)
    assert (token.client, token.scopes, token.models) == ("alice", ("inference", "models:read"), ("*",))
    assert token.expires_at is None
    for hint in ("shown this once", token.id, "OLLAMA_HOST=http://HOST:3000/k/TOKEN", "OPENAI_API_KEY=TOKEN"):
        assert hint in result.stderr
    assert text[12:] not in result.stderr, "stderr may be a log"


def test_a_token_gets_the_rights_that_are_named() -> None:
    result = keys(
        *("token", "alice", "--scope", "models:write", "--scope", "inference", "--model", "llama3*", "--model", "*:3b"),
        *("--expires", "30d", "--json"),
    )
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    token = found(shown.pop("token"))
    assert token.scopes == ("inference", "models:write")
    assert token.models == ("llama3*", "*:3b")
    assert token.expires_at is not None
    assert abs(token.expires_at - token.created_at - timedelta(days=30)) < timedelta(minutes=1)
    assert shown == {
        "id": token.id,
        "client": "alice",
        "scopes": ["inference", "models:write"],
        "models": ["llama3*", "*:3b"],
        "createdAt": token.created_at.isoformat(),
        "expiresAt": token.expires_at.isoformat(),
        "revokedAt": None,
        "state": "active",
    }


def test_a_client_with_a_key_gets_a_token_too() -> None:
    keys("create", "alice", "--algorithm", "ed25519")
    assert keys("token", "alice", "--expires", "never").exit_code == 0
    (row,) = json.loads(keys("list", "--json").stdout)
    assert (row["id"], row["algorithm"]) == ("alice", "ed25519")


def test_a_client_without_a_key_is_listed_and_may_get_one() -> None:
    keys("token", "alice")
    assert keys("list").stdout.split()[:3] == ["alice", "-", "-"]
    (row,) = json.loads(keys("list", "--json").stdout)
    assert (row["algorithm"], row["fingerprint"]) == (None, None)
    assert keys("create", "alice", "--algorithm", "ed25519").exit_code == 0
    assert keys("list").stdout.split()[1] == "ed25519"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("alice", "--scope", "everything"),
            "'everything' is not one of 'inference', 'models:read', 'models:write', 'ad",
        ),
        (("alice", "--expires", "30"), "'30' is not a duration"),
        (("alice", "--expires", "-1d"), "'-1d' is not a duration"),
        (("alice", "--expires", "999999d"), "'999999d' is not a duration"),
        (("alice", "--expires", "1d12h"), "'1d12h' is not a duration"),
        (("alice", "--expires", "0s"), "expired already"),
        (("alice", "--model", "two words"), "can't be a pattern"),
        (("../alice",), "can't be a client's name"),
    ],
)
def test_a_mistaken_token_is_status_2_and_none_is_made(arguments: Sequence[str], sentence: str) -> None:
    result = keys("token", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in " ".join(result.stderr.replace("│", " ").split())
    assert registered("alice") is None


def test_tokens_are_listed_with_their_state_and_without_their_secret() -> None:
    assert "keys token NAME" in keys("tokens").stdout
    assert json.loads(keys("tokens", "--json").stdout) == []
    assert not default_data_dir().exists(), "looking makes nothing"
    with contextlib.closing(
        Store.open(Path("data").absolute(), clock=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    ) as store:
        store.add_token("bob", expires_at=datetime(2026, 1, 2, tzinfo=UTC))
    texts = [keys("token", name).stdout.strip() for name in ("alice", "alice")]
    ids = [found(text).id for text in texts]
    result = keys("revoke-token", ids[0])
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"Revoked the token {ids[0]} of 'alice'" in result.stdout
    assert keys("revoke-token", ids[0]).exit_code == 0

    shown = keys("tokens").stdout
    heads, *lines = shown.splitlines()
    assert heads.split() == ["ID", "CLIENT", "SCOPES", "MODELS", "CREATED", "EXPIRES", "STATE"]
    assert [line.split()[1] for line in lines] == ["alice", "alice", "bob"]
    assert ("revoked" in lines[0], lines[1].split()[-1], lines[2].split()[-1]) == (True, "active", "expired")
    assert "inference, models:read" in lines[2]
    rows = json.loads(keys("tokens", "--json").stdout)
    assert [(row["client"], row["state"]) for row in rows] == [
        ("alice", "revoked"),
        ("alice", "active"),
        ("bob", "expired"),
    ]
    assert all(text[12:] not in shown + json.dumps(rows) for text in texts)
    assert [row["client"] for row in json.loads(keys("tokens", "bob", "--json").stdout)] == ["bob"]
    nobody = keys("tokens", "nobody")
    assert (nobody.exit_code, nobody.stdout) == (1, "")
    assert "there is no client 'nobody'" in nobody.stderr


def test_a_revoked_client_loses_its_tokens() -> None:
    text = keys("token", "alice").stdout.strip()
    assert keys("revoke", "alice").exit_code == 0
    assert found(text).revoked
    result = keys("token", "alice")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the client 'alice' was revoked" in result.stderr


@pytest.mark.parametrize("options", [(), ("--overlap", "0s")])
def test_a_rotated_token_is_over_at_once(options: Sequence[str]) -> None:
    old = keys("token", "alice", "--scope", "admin").stdout.strip()
    result = keys("rotate", found(old).id, *options)
    assert result.exit_code == 0
    new = result.stdout.strip()
    assert found(old).revoked
    assert found(new).scopes == ("admin",)
    assert found(new).id in result.stderr


def test_a_rotated_token_may_overlap_with_the_new_one() -> None:
    old = keys("token", "alice").stdout.strip()
    shown = json.loads(keys("rotate", found(old).id, "--overlap", "90m", "--json").stdout)
    now = datetime.now(UTC)
    assert found(shown["token"]).id == shown["id"]
    assert found(old).live(now)
    assert not found(old).live(now + timedelta(minutes=91))


@pytest.mark.parametrize("command", ["rotate", "revoke-token"])
def test_an_unknown_token_fails(command: str) -> None:
    keys("token", "alice")
    result = keys(command, "nothere0")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "there is no token 'nothere0'" in result.stderr


def test_a_failed_write_prints_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "add_token", broken)
    result = keys("token", "alice")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "weftline: the disk is full\n")
