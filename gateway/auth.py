"""Who is this: a challenge for the client to sign, and the check of its signature.

Rules. A challenge belongs to one connection and is answered once, within `CHALLENGE_S` by the monotonic clock. The
signature is RSA PKCS #1 v1.5 with SHA-256, SHA-384 or SHA-512 (RFC 8017 §8.2.2) or Ed25519 (RFC 8032) over the
challenge's ASCII bytes. The algorithm is pinned to the key at enrolment; a client may repeat it, never choose it.

A failure tells nothing: unknown, revoked and wrong signature have the same text, cost the same work (an unknown
client's signature is checked with a key nobody has) and are answered at the same moment, `ANSWER_S` after receipt.

A challenge reads `wl1:<hash of the public URL>:<connection>:<expiry>:<256 random bits>`. Clients treat it as opaque.
The hash binds a signature to one service, should its key be enrolled at two; there is no dot in it, so that a signature
can never be taken for one of a JSON Web Token.
"""

import asyncio
import base64
import binascii
import functools
import hashlib
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from common.errors import Code, FabricError, UsageError
from gateway.store import Client, ClientIdError, PublicKey, check_client_id

CHALLENGE_S: Final = 15.0
ANSWER_S: Final = 0.1

RSA_BITS_MIN: Final = 2048
# One check takes 30 µs at 2048 bits and 0.4 ms at 8192; beyond, a key is a way to keep the gateway busy.
RSA_BITS_MAX: Final = 8192
SIGNATURE_CHARS_MAX: Final = 4 * math.ceil(RSA_BITS_MAX / 8 / 3)

ED25519: Final = "ed25519"
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "SHA256": hashes.SHA256(),
    "SHA384": hashes.SHA384(),
    "SHA512": hashes.SHA512(),
}
ALGORITHMS: Final = (*_HASHES, ED25519)

VerifyingKey = rsa.RSAPublicKey | ed25519.Ed25519PublicKey


class InvalidKeyError(UsageError):
    """What was given is no public key weftline can use."""

    code = "INVALID_KEY"


class WeakKeyError(InvalidKeyError):
    """The key is a public key, but too easy to break."""

    code = "WEAK_KEY"


def algorithm_named(name: str) -> str:
    """The canonical name of a signature algorithm; Node's spelling (`RSA-SHA256`) and any case are understood.

    Raises:
        InvalidKeyError: there is none of that name.
    """
    wanted = name.upper().removeprefix("RSA-")
    for algorithm in ALGORITHMS:
        if algorithm.upper() == wanted:
            return algorithm
    raise InvalidKeyError(f"there is no signature algorithm {name[:32]!r}; use one of {', '.join(ALGORITHMS)}.")


def load_public_key(pem: str | bytes, algorithm: str | None = None) -> PublicKey:
    """Check a public key before it is enrolled; without `algorithm`, RSA keys sign with SHA256.

    Raises:
        WeakKeyError: an RSA key below 2048 bits, or with a public exponent below 65537.
        InvalidKeyError: not a public key, a kind of key that isn't supported, or not one for `algorithm`.
    """
    data = pem.encode(errors="replace") if isinstance(pem, str) else pem
    key = _parse(data)
    wanted = None if algorithm is None else algorithm_named(algorithm)
    if isinstance(key, rsa.RSAPublicKey):
        _check_rsa(key)
        kind, allowed = "RSA", tuple(_HASHES)
    else:
        kind, allowed = "Ed25519", (ED25519,)
    if wanted is not None and wanted not in allowed:
        raise InvalidKeyError(f"an {kind} key can't sign with {wanted}; use {' or '.join(allowed)}.")
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    canonical = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(wanted or allowed[0], canonical.decode("ascii"), hashlib.sha256(der).hexdigest())


def _parse(data: bytes) -> VerifyingKey:
    if b"PRIVATE KEY-----" in data:
        raise InvalidKeyError(
            "that is a private key. It must never leave its owner: make a new key pair, and hand over the public key "
            "only (the file that begins with -----BEGIN PUBLIC KEY-----)."
        )
    if b"-----BEGIN CERTIFICATE-----" in data:
        raise InvalidKeyError("that is a certificate; take the key out of it: openssl x509 -pubkey -noout -in FILE")
    if data.lstrip().startswith((b"ssh-", b"ecdsa-", b"---- BEGIN SSH2")):
        raise InvalidKeyError("that is a key for SSH; convert it: ssh-keygen -e -m PKCS8 -f FILE (RSA keys only)")
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidKeyError(
            "that is not a public key in PEM format (a text that begins with -----BEGIN PUBLIC KEY-----)."
        ) from None
    if not isinstance(key, rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        raise InvalidKeyError("only RSA and Ed25519 keys can be used; make one with `weftline keys create NAME`.")
    return key


def _check_rsa(key: rsa.RSAPublicKey) -> None:
    if key.key_size < RSA_BITS_MIN:
        raise WeakKeyError(f"an RSA key needs at least {RSA_BITS_MIN} bits; this one has {key.key_size}.")
    if key.key_size > RSA_BITS_MAX:
        raise InvalidKeyError(f"an RSA key may have at most {RSA_BITS_MAX} bits; this one has {key.key_size}.")
    exponent = key.public_numbers().e
    if exponent < 65537 or exponent % 2 == 0:
        raise WeakKeyError("the public exponent of an RSA key must be 65537 or a greater odd number.")


@dataclass(slots=True)
class Challenge:
    """One line for one connection. `spent` once an answer to it came, right or wrong."""

    line: str
    expires_at: float
    spent: bool = False

    def take(self, now: float) -> bool:
        """Use the challenge up; False if it was already, or is too old."""
        fresh = not self.spent and now < self.expires_at
        self.spent = True
        return fresh


def server_hash(url: str) -> str:
    """What names the service in its challenges: 96 bits of the SHA-256 of its public URL."""
    return _text(hashlib.sha256(url.rstrip("/").encode()).digest()[:12])


def issue(server: str, now: float, rng: Callable[[int], bytes]) -> Challenge:
    """A challenge of the service `server` (its `server_hash`); `rng(n)` gives n secret random bytes."""
    expires_at = now + CHALLENGE_S
    line = f"wl1:{server}:{_text(rng(9))}:{int(expires_at * 1000)}:{_text(rng(32))}"
    return Challenge(line, expires_at)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def verify(client: Client | None, algorithm: str | None, signature: str, challenge: str) -> bool:
    """Whether `signature` (base64) is the client's over `challenge`; `algorithm` is what it said it used, if it did.

    Always does one check of a signature, for a client that is unknown, revoked or has no key as for any other.
    """
    raw = _strict_base64(signature)
    if client is None or client.key is None:
        client, key, pinned = None, _dummy_key(), "SHA256"
    else:
        key, pinned = _loaded(client.key.pem), client.key.algorithm
    right = _check(key, pinned, raw or bytes(256), challenge.encode())
    return right and raw is not None and client is not None and not client.revoked and _agrees(algorithm, pinned)


def _check(key: VerifyingKey, algorithm: str, signature: bytes, message: bytes) -> bool:
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, padding.PKCS1v15(), _HASHES[algorithm])
        else:
            key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _agrees(said: str | None, pinned: str) -> bool:
    try:
        return said is None or algorithm_named(said) == pinned
    except InvalidKeyError:
        return False


def _strict_base64(text: str) -> bytes | None:
    """The bytes, if `text` is their one canonical encoding (RFC 4648 §3.3, §3.5)."""
    if len(text) > SIGNATURE_CHARS_MAX:
        return None
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None
    return data if binascii.b2a_base64(data, newline=False) == text.encode() else None


@functools.lru_cache(maxsize=4096)
def _loaded(pem: str) -> VerifyingKey:
    return _parse(pem.encode())


@functools.cache
def _dummy_key() -> VerifyingKey:
    return rsa.generate_private_key(65537, RSA_BITS_MIN).public_key()


class Authenticator:
    """Checks answers to challenges without holding up the event loop.

    Looking a client up and checking its signature happen in threads, at most `workers` at once: Python's threads share
    one interpreter lock with the loop, so a flood of log-ins waits here, in the tasks of its own connections, which
    the gateway bounds.
    """

    def __init__(
        self,
        find: Callable[[str], Client | None],
        server_url: str,
        *,
        workers: int = 2,
        clock: Callable[[], float] = time.monotonic,
        rng: Callable[[int], bytes] = secrets.token_bytes,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._find = find
        self._server = server_hash(server_url)
        self._turn = asyncio.Semaphore(workers)
        self._clock = clock
        self._rng = rng
        self._sleep = sleep
        self._revoked: set[str] = set()
        _dummy_key()  # made now: the first unknown client must not take longer than the next

    def challenge(self) -> Challenge:
        """A challenge for a connection just accepted."""
        return issue(self._server, self._clock(), self._rng)

    def revoke(self, client_ids: Iterable[str]) -> None:
        """Let these clients in no more, whatever a look-up under way found; a revoked name never comes back."""
        self._revoked.update(client_ids)

    async def authenticate(
        self, challenge: Challenge, client_id: str, signature: str, algorithm: str | None = None
    ) -> Client:
        """The client, if it is who it says. Call it on receipt of `authenticate`, with its connection's own challenge.

        Who it returns to hears of it in the same turn of the loop, so a revocation is either seen here or finds the
        connection with its client's name.

        Raises:
            FabricError: AUTH_FAILED, `ANSWER_S` after the call; under a flood, at a later multiple of it.
            StoreError: the registry can't be read. Log-ins fail closed.
        """
        received = self._clock()
        fresh = challenge.take(received)
        async with self._turn:
            client = await asyncio.to_thread(self._decide, challenge.line, client_id, signature, algorithm)
        if fresh and client is not None and client.id not in self._revoked:
            return client
        # On a grid, so that a slow answer says no more than a fast one.
        elapsed = self._clock() - received
        await self._sleep(ANSWER_S * max(1, math.ceil(elapsed / ANSWER_S)) - elapsed)
        raise FabricError(Code.AUTH_FAILED, "authentication failed")

    def _decide(self, line: str, client_id: str, signature: str, algorithm: str | None) -> Client | None:
        try:
            client = self._find(check_client_id(client_id))
        except ClientIdError:
            client = None
        return client if verify(client, algorithm, signature, line) else None
