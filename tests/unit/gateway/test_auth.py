"""Keys, challenges and signatures, with real cryptography and an injected clock."""

import asyncio
import base64
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa

from common.errors import Code, FabricError
from gateway import auth
from gateway.auth import (
    ANSWER_S,
    CHALLENGE_S,
    Authenticator,
    InvalidKeyError,
    WeakKeyError,
    algorithm_named,
    issue,
    load_public_key,
    server_hash,
    verify,
)
from gateway.store import Client, StoreError

PrivateKey = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
ED = ed25519.Ed25519PrivateKey.generate()
HASHES: dict[str, hashes.HashAlgorithm] = {
    "SHA256": hashes.SHA256(),
    "SHA384": hashes.SHA384(),
    "SHA512": hashes.SHA512(),
}
LINE = "wl1:hash:connection:15000:random"


def public_pem(key: PrivateKey | ec.EllipticCurvePrivateKey | dsa.DSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def client(key: PrivateKey, algorithm: str | None = None, name: str = "alice") -> Client:
    return Client(name, load_public_key(public_pem(key), algorithm), datetime.now(UTC), None, 1)


def sign(key: PrivateKey, line: str, algorithm: str = "SHA256") -> str:
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(line.encode(), padding.PKCS1v15(), HASHES[algorithm])
    else:
        signature = key.sign(line.encode())
    return base64.b64encode(signature).decode()


# Keys


def test_an_rsa_key_is_taken_in_its_canonical_form() -> None:
    spki = load_public_key(public_pem(RSA))
    pkcs1 = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.PKCS1)
    assert load_public_key(b"a comment before\n" + pkcs1) == spki
    assert spki.algorithm == "SHA256"
    assert spki.pem.startswith("-----BEGIN PUBLIC KEY-----")
    assert len(spki.fingerprint) == 64
    assert load_public_key(spki.pem, "sha512").algorithm == "SHA512"
    assert load_public_key(public_pem(ED)).algorithm == "ed25519"


@pytest.mark.parametrize(
    ("said", "meant"),
    [("SHA256", "SHA256"), ("sha384", "SHA384"), ("RSA-SHA512", "SHA512"), ("Ed25519", "ed25519")],
)
def test_algorithms_by_any_of_their_names(said: str, meant: str) -> None:
    assert algorithm_named(said) == meant


@pytest.mark.parametrize("said", ["", "MD5", "SHA1", "none", "SHA256 "])
def test_other_algorithms_are_refused(said: str) -> None:
    with pytest.raises(InvalidKeyError, match="no signature algorithm"):
        algorithm_named(said)


def cubed() -> bytes:
    numbers = rsa.RSAPublicNumbers(3, RSA.public_key().public_numbers().n)
    return numbers.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


@pytest.mark.parametrize(
    ("pem", "sentence"),
    [
        (lambda: public_pem(rsa.generate_private_key(65537, 1024)), "at least 2048 bits; this one has 1024"),
        (cubed, "exponent"),
    ],
)
def test_weak_keys_are_refused(pem: Callable[[], bytes], sentence: str) -> None:
    with pytest.raises(WeakKeyError, match=sentence) as raised:
        load_public_key(pem())
    assert raised.value.code == "WEAK_KEY"
    assert raised.value.exit_status == 2


def private_pem(format_: serialization.PrivateFormat) -> bytes:
    return RSA.private_bytes(serialization.Encoding.PEM, format_, serialization.NoEncryption())


OPENSSH = ED.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


@pytest.mark.parametrize(
    ("pem", "sentence"),
    [
        (private_pem(serialization.PrivateFormat.PKCS8), "that is a private key"),
        (private_pem(serialization.PrivateFormat.TraditionalOpenSSL), "that is a private key"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "certificate"),
        (OPENSSH, "SSH"),
        (public_pem(ec.generate_private_key(ec.SECP256R1())), "only RSA and Ed25519"),
        (b"", "not a public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key"),
        (b"\xff\xfe\x00", "not a public key"),
    ],
)
def test_what_is_no_usable_key_is_named(pem: bytes, sentence: str) -> None:
    with pytest.raises(InvalidKeyError, match=sentence) as raised:
        load_public_key(pem)
    assert raised.value.code == "INVALID_KEY"
    assert "PRIVATE" not in str(raised.value)


def test_an_algorithm_of_another_kind_of_key_is_refused() -> None:
    with pytest.raises(InvalidKeyError, match="RSA key can't sign with ed25519"):
        load_public_key(public_pem(RSA), "ed25519")
    with pytest.raises(InvalidKeyError, match="Ed25519 key can't sign with SHA256; use ed25519"):
        load_public_key(public_pem(ED), "SHA256")


# Challenges


def test_a_challenge_is_one_opaque_line_without_a_dot() -> None:
    drawn: list[int] = []

    def rng(count: int) -> bytes:
        drawn.append(count)
        return bytes(count)

    challenge = issue(server_hash("wss://example.org"), 100.0, rng)
    tag, service, _connection, expiry, _random = challenge.line.split(":")
    assert (tag, service, int(expiry)) == ("wl1", server_hash("wss://example.org/"), 115_000)
    assert 32 in drawn
    assert challenge.line.isascii()
    assert challenge.line.isprintable()
    assert not set(challenge.line) & set(". \n")
    assert server_hash("wss://example.net") != service


def test_a_challenge_is_taken_once_and_in_time() -> None:
    challenge = issue("s", 100.0, bytes)
    assert challenge.take(100.0 + CHALLENGE_S - 0.001)
    assert not challenge.take(100.0)
    assert not issue("s", 100.0, bytes).take(100.0 + CHALLENGE_S)


# Signatures


@pytest.mark.parametrize("algorithm", ["SHA256", "SHA384", "SHA512"])
@pytest.mark.parametrize("signed_with", ["SHA256", "SHA384", "SHA512"])
@pytest.mark.parametrize("key", [RSA, OTHER_RSA], ids=["right key", "wrong key"])
def test_only_the_pinned_hash_and_the_right_key_verify(algorithm: str, signed_with: str, key: PrivateKey) -> None:
    right = algorithm == signed_with and key is RSA
    assert verify(client(RSA, algorithm), None, sign(key, LINE, signed_with), LINE) is right
    # Saying what was used does not make it allowed.
    assert verify(client(RSA, algorithm), signed_with, sign(key, LINE, signed_with), LINE) is right


def test_ed25519_verifies() -> None:
    assert verify(client(ED), None, sign(ED, LINE), LINE)
    assert verify(client(ED), "Ed25519", sign(ED, LINE), LINE)
    assert not verify(client(ED), "SHA256", sign(ED, LINE), LINE)
    assert not verify(client(ED), None, sign(RSA, LINE), LINE)
    assert not verify(client(RSA), None, sign(ED, LINE), LINE)


def test_a_wrong_statement_of_the_algorithm_fails_a_right_signature() -> None:
    signature = sign(RSA, LINE)
    assert verify(client(RSA), "RSA-SHA256", signature, LINE)
    assert not verify(client(RSA), "SHA512", signature, LINE)
    assert not verify(client(RSA), "MD5", signature, LINE)


def test_another_challenge_a_revoked_and_an_unknown_client_fail() -> None:
    signature = sign(RSA, LINE)
    assert not verify(client(RSA), None, signature, LINE + "x")
    assert not verify(replace(client(RSA), revoked_at=datetime.now(UTC)), None, signature, LINE)
    assert not verify(None, None, signature, LINE)
    assert not verify(replace(client(RSA), key=None), None, signature, LINE)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: text.rstrip("="), id="no padding"),
        pytest.param(lambda text: text + "====", id="too much padding"),
        pytest.param(lambda text: text[:10] + "\n" + text[10:], id="a newline"),
        pytest.param(lambda text: " " + text, id="a space"),
        pytest.param(lambda text: text[:-3] + chr(ord(text[-3]) + 1) + "==", id="bits beyond the end"),
        pytest.param(lambda text: text.replace("+", "-").replace("/", "_") + "_", id="the URL alphabet"),
        pytest.param(lambda text: text + "é", id="not ASCII"),
        pytest.param(lambda text: "A" * 10_000_000, id="ten megabytes"),
    ],
)
def test_only_canonical_base64_counts(spoil: Callable[[str], str]) -> None:
    signature = sign(RSA, LINE)
    assert signature.endswith("==")
    assert not verify(client(RSA), None, spoil(signature), LINE)


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(client(RSA), id="known"),
        pytest.param(None, id="unknown"),
        pytest.param(replace(client(RSA), revoked_at=datetime.now(UTC)), id="revoked"),
        pytest.param(replace(client(RSA), key=None), id="without a key"),
    ],
)
@pytest.mark.parametrize("signature", [sign(RSA, LINE), sign(OTHER_RSA, LINE), "not base64", ""])
def test_every_answer_costs_one_check(who: Client | None, signature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[object] = []
    check = auth._check

    def counted(key: auth.VerifyingKey, algorithm: str, raw: bytes, message: bytes) -> bool:
        checks.append((type(key), algorithm, len(raw)))
        return check(key, algorithm, raw, message)

    monkeypatch.setattr(auth, "_check", counted)
    verify(who, None, signature, LINE)
    assert checks == [(type(RSA.public_key()), "SHA256", 256)]


# The authenticator


class Time:
    """A clock that moves only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def authenticator(time: Time, find: Callable[[str], Client | None], workers: int = 2) -> Authenticator:
    return Authenticator(find, "ws://127.0.0.1:3000", workers=workers, clock=time.clock, sleep=time.sleep)


async def failure(attempt: asyncio.Future[Client] | asyncio.Task[Client]) -> str:
    with pytest.raises(FabricError) as raised:
        await attempt
    assert raised.value.code is Code.AUTH_FAILED
    return raised.value.message


def attempt(authenticator: Authenticator, challenge: auth.Challenge, name: str, signature: str) -> asyncio.Task[Client]:
    return asyncio.create_task(authenticator.authenticate(challenge, name, signature))


async def test_the_right_client_is_let_in_at_once() -> None:
    time, alice = Time(), client(RSA)
    gate = authenticator(time, {"alice": alice}.get)
    challenge = gate.challenge()
    assert await gate.authenticate(challenge, "alice", sign(RSA, challenge.line), "SHA256") == alice
    assert time.slept == []


async def test_failures_look_alike_and_come_at_one_moment() -> None:
    time = Time()
    revoked = replace(client(OTHER_RSA, name="bob"), revoked_at=datetime.now(UTC))
    keyless = replace(client(RSA, name="carol"), key=None)
    gate = authenticator(time, {"alice": client(RSA), "bob": revoked, "carol": keyless}.get)
    attempts = (
        ("alice", OTHER_RSA),
        ("bob", OTHER_RSA),
        ("carol", RSA),
        ("nobody", RSA),
        ("no/body" * 999, RSA),
        ("", RSA),
    )
    texts = set()
    for name, key in attempts:
        challenge, received = gate.challenge(), time.now
        texts.add(await failure(attempt(gate, challenge, name, sign(key, challenge.line))))
        assert time.now == pytest.approx(received + ANSWER_S)
    assert texts == {"authentication failed"}


async def test_a_late_failure_is_answered_on_the_grid() -> None:
    time = Time()

    def slow(name: str) -> None:
        time.now += 0.23

    gate = authenticator(time, slow)
    received = time.now
    await failure(attempt(gate, gate.challenge(), "alice", ""))
    assert time.now == pytest.approx(received + 3 * ANSWER_S)


async def test_a_challenge_serves_once_on_its_connection_and_in_time() -> None:
    time, alice = Time(), client(RSA)
    gate = authenticator(time, {"alice": alice}.get)
    first, second = gate.challenge(), gate.challenge()
    assert first.line != second.line
    signature = sign(RSA, first.line)
    assert await gate.authenticate(first, "alice", signature) == alice
    await failure(attempt(gate, first, "alice", signature))
    await failure(attempt(gate, second, "alice", signature))
    # Spent by the wrong answer, a right one comes too late.
    await failure(attempt(gate, second, "alice", sign(RSA, second.line)))
    third = gate.challenge()
    time.now += CHALLENGE_S
    await failure(attempt(gate, third, "alice", sign(RSA, third.line)))


async def test_waiting_for_a_turn_does_not_age_an_answer() -> None:
    time, alice = Time(), client(RSA)

    def slow(name: str) -> Client:
        time.now += CHALLENGE_S
        return alice

    gate = authenticator(time, slow)
    challenge = gate.challenge()
    assert await gate.authenticate(challenge, "alice", sign(RSA, challenge.line)) == alice


async def test_a_flood_takes_its_turns_and_leaves_the_loop_free() -> None:
    running, most = 0, 0
    lock, go = threading.Lock(), threading.Event()
    full = asyncio.Event()
    loop = asyncio.get_running_loop()

    def find(name: str) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 3:
                loop.call_soon_threadsafe(full.set)
        go.wait()
        with lock:
            running -= 1

    gate = authenticator(Time(), find, workers=3)
    attempts = [attempt(gate, gate.challenge(), "nobody", "") for _ in range(20)]
    try:
        await full.wait()
        assert not any(task.done() for task in attempts)
    finally:
        go.set()
    for task in attempts:
        await failure(task)
    assert most == 3


async def test_an_unreadable_registry_lets_nobody_in() -> None:
    def broken(name: str) -> None:
        raise StoreError("the disk is gone")

    gate = authenticator(Time(), broken)
    with pytest.raises(StoreError, match="the disk is gone"):
        await gate.authenticate(gate.challenge(), "alice", "")
