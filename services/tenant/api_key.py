"""The text of API keys and operator keys: made, checked and taken apart offline. Refuses any text with one character changed.

A tenant's key reads `ten_<tier>_<key id>_<secret><checksum>`, an operator's `op_<key id>_<secret><checksum>`. The secret is 256 random
bits, the checksum the CRC-32 of everything before it: it catches typing errors, lets scanners tell a key from noise, and protects nothing.
"""

import base64
import hashlib
import re
import secrets
import zlib
from dataclasses import dataclass

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SECRET_BYTES = 32
_SECRET_LENGTH = 43
_CHECKSUM_LENGTH = 6
_KEY_ID_BYTES = 10
_TENANT_KEY = re.compile(r"ten_([a-z][a-z0-9-]{0,62})_([a-z0-9]{16})_([0-9A-Za-z]{43})([0-9A-Za-z]{6})")
_OPERATOR_KEY = re.compile(r"op_([a-z0-9]{16})_([0-9A-Za-z]{43})([0-9A-Za-z]{6})")


@dataclass(frozen=True, slots=True, repr=False)
class ApiKeyText:
    """A tenant's key taken apart. It has no repr, so that it cannot slip into a log line."""

    tier: str
    key_id: str
    secret: str

    def __str__(self) -> str:
        """Returns the whole text."""
        return _with_checksum(f"ten_{self.tier}_{self.key_id}_{self.secret}")

    def secret_sha256(self) -> bytes:
        """Returns what is stored in place of the secret."""
        return hashlib.sha256(self.secret.encode()).digest()


@dataclass(frozen=True, slots=True, repr=False)
class OperatorKeyText:
    """An operator's key taken apart."""

    key_id: str
    secret: str

    def __str__(self) -> str:
        """Returns the whole text."""
        return _with_checksum(f"op_{self.key_id}_{self.secret}")

    def text_sha256(self) -> bytes:
        """Returns the SHA-256 of the whole text, as the setting `operator_key_sha256` lists it."""
        return hashlib.sha256(str(self).encode()).digest()


def new_api_key(tier: str) -> ApiKeyText:
    """Makes a key of 256 random bits for a tenant of this tier."""
    return ApiKeyText(tier, _new_key_id(), _base62(secrets.randbits(SECRET_BYTES * 8), _SECRET_LENGTH))


def new_operator_key() -> OperatorKeyText:
    """Makes an operator's key of 256 random bits."""
    return OperatorKeyText(_new_key_id(), _base62(secrets.randbits(SECRET_BYTES * 8), _SECRET_LENGTH))


def parse(text: str) -> ApiKeyText | OperatorKeyText | None:
    """Takes a key apart; None when it is malformed or its checksum is wrong."""
    if not text.isascii():
        return None
    tenant_key = _TENANT_KEY.fullmatch(text)
    if tenant_key is not None:
        tier, key_id, secret, _ = tenant_key.groups()
        return ApiKeyText(tier, key_id, secret) if _checksum_fits(text) else None
    operator_key = _OPERATOR_KEY.fullmatch(text)
    if operator_key is not None:
        key_id, secret, _ = operator_key.groups()
        return OperatorKeyText(key_id, secret) if _checksum_fits(text) else None
    return None


def _new_key_id() -> str:
    return base64.b32encode(secrets.token_bytes(_KEY_ID_BYTES)).decode().lower()


def _with_checksum(body: str) -> str:
    return body + _base62(zlib.crc32(body.encode()), _CHECKSUM_LENGTH)


def _checksum_fits(text: str) -> bool:
    return _with_checksum(text[:-_CHECKSUM_LENGTH]) == text


def _base62(number: int, length: int) -> str:
    digits: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
