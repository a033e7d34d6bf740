"""Public keys of issuers, and what they prove. Refuses a key for any algorithm but its own kind's, and every secret that could be shared.

The algorithm is chosen by the registration and the key's type, never by the token alone: a public key is no HMAC secret.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.exceptions import PyJWTError

from services.tenant.json_web_token import JsonWebToken

MAX_KEYS = 100
_MIN_RSA_BITS = 2048
_MAX_RSA_BITS = 8192
_MAX_KEY_ID_LENGTH = 256
_SIGNATURES = jwt.PyJWS()


class Algorithm(StrEnum):
    """How a token may be signed."""

    RS256 = "RS256"
    PS256 = "PS256"
    ES256 = "ES256"
    EDDSA = "EdDSA"


_OF_TYPE = {
    ("RSA", None): (Algorithm.RS256, Algorithm.PS256),
    ("EC", "P-256"): (Algorithm.ES256,),
    ("OKP", "Ed25519"): (Algorithm.EDDSA,),
}


class JwksMalformed(Exception):
    """What was fetched is no set of keys."""


@dataclass(frozen=True, slots=True)
class JsonWebKey:
    """A public key, by the algorithms it can be used with."""

    by_algorithm: Mapping[Algorithm, jwt.PyJWK]

    def verify(self, token: JsonWebToken, algorithm: Algorithm) -> bool:
        """Tells whether this key signed the token with this algorithm."""
        key = self.by_algorithm.get(algorithm)
        if key is None:
            return False
        try:
            _SIGNATURES.decode_complete(token.text, key, algorithms=[algorithm.value])
        except PyJWTError:
            return False
        return True


def read_jwks(raw: bytes) -> Mapping[str, JsonWebKey]:
    """Returns the usable keys of a JSON Web Key Set by `kid`, others passed over. Raises: JwksMalformed."""
    try:
        read = json.loads(raw)
    except (ValueError, RecursionError):
        read = None
    items = read.get("keys") if isinstance(read, dict) else None
    if not isinstance(items, list) or len(items) > MAX_KEYS:
        raise JwksMalformed
    keys: dict[str, JsonWebKey] = {}
    for item in items:
        key_id = item.get("kid") if isinstance(item, dict) else None
        if not isinstance(key_id, str) or not 1 <= len(key_id) <= _MAX_KEY_ID_LENGTH:
            continue
        key = _read_key(item)
        if key_id in keys:
            # Two keys of one name: which of them counts would be chance.
            raise JwksMalformed
        if key is not None:
            keys[key_id] = key
    return keys


def _read_key(item: dict[str, object]) -> JsonWebKey | None:
    curve = item.get("crv") if item.get("kty") != "RSA" else None
    kind = (item.get("kty"), curve)
    if not all(part is None or isinstance(part, str) for part in kind):
        return None
    fitting = _OF_TYPE.get(kind, ())  # type: ignore[arg-type] # narrowed by all()
    # A set that shows a private key was published by mistake; whoever reads it could sign.
    if "d" in item or item.get("use", "sig") != "sig" or not _may_verify(item.get("key_ops")):
        return None
    named = item.get("alg")
    algorithms = [algorithm for algorithm in fitting if named in (None, algorithm.value)]
    try:
        made = {algorithm: jwt.PyJWK(dict(item), algorithm=algorithm.value) for algorithm in algorithms}
    except (PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        # The library lets errors of the kind it happens upon through, for fields that are no text.
        return None
    return JsonWebKey(made) if made and all(_is_strong(key.key) for key in made.values()) else None


def _may_verify(operations: object) -> bool:
    return operations is None or (isinstance(operations, list) and "verify" in operations)


def _is_strong(key: object) -> bool:
    match key:
        case RSAPublicKey():
            # Bounded above too: an enormous key makes every check of a token a burden.
            return _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS
        case EllipticCurvePublicKey():
            return isinstance(key.curve, SECP256R1)
        case _:
            return isinstance(key, Ed25519PublicKey)
