"""Who a client is: its private key, the signature that proves it, and the NAME_config.json that enrolment writes."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "SHA256": hashes.SHA256(),
    "SHA384": hashes.SHA384(),
    "SHA512": hashes.SHA512(),
}


class Signer:
    """Signs challenges: RSA PKCS#1 v1.5 over `algorithm`, or Ed25519 if the key is one (`algorithm` is then unused).

    Raises ValueError for a key that cannot be loaded or an unknown algorithm, OSError for a file that cannot be read.
    """

    def __init__(
        self,
        private_key: str | bytes | None,
        private_key_path: str | Path | None,
        algorithm: str,
    ) -> None:
        if private_key is None:
            if private_key_path is None:
                raise ValueError("Either private_key or private_key_path must be provided")
            private_key = Path(private_key_path).read_bytes()
        pem = private_key.encode() if isinstance(private_key, str) else private_key
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ValueError(f"Failed to load private key: {error}") from error
        if not isinstance(key, RSAPrivateKey | Ed25519PrivateKey):
            raise ValueError("Failed to load private key: it is neither RSA nor Ed25519")
        if isinstance(key, RSAPrivateKey) and algorithm not in _HASHES:
            raise ValueError(f"signature_algorithm must be one of {', '.join(_HASHES)}, not {algorithm!r}")
        self._key = key
        self.algorithm = algorithm if isinstance(key, RSAPrivateKey) else "Ed25519"

    def sign(self, challenge: str) -> str:
        """The base64 signature over the challenge's bytes."""
        data = challenge.encode()
        if isinstance(self._key, RSAPrivateKey):
            return b64encode(self._key.sign(data, PKCS1v15(), _HASHES[self.algorithm])).decode()
        return b64encode(self._key.sign(data)).decode()


def load_config(path: str | Path) -> dict[str, Any]:
    """Constructor arguments from a NAME_config.json: serverUrl, clientId, privateKeyPath, signatureAlgorithm.

    A relative privateKeyPath means a file beside the config or, if there is none, one below the working directory.
    Raises OSError if it cannot be read, ValueError if it is not such a file.
    """
    path = Path(path)
    try:
        config = json.loads(path.read_bytes())
        key_path = Path(config["privateKeyPath"])
        arguments = {"client_id": config["clientId"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a client's config: {error!r}") from error
    beside = path.parent / key_path
    arguments["private_key_path"] = beside if beside.exists() else key_path
    for name, key in (("server_url", "serverUrl"), ("signature_algorithm", "signatureAlgorithm")):
        if config.get(key):
            arguments[name] = config[key]
    return arguments
