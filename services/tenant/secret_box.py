"""Seals secrets for the database: AES-256-GCM under the master key. Refuses what was sealed for another tenant or purpose."""

import base64
import binascii
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.kernel.errors import WrongState

_KEY_LENGTH = 32
_NONCE_LENGTH = 12
# The first byte says how the rest is read, so that another way of sealing can stand beside this one.
_VERSION = b"\x01"


class SecretBox:
    """Seals and opens; `identity` says whose secret it is and what for, and is proven when it is opened."""

    def __init__(self, master_key_base64: str) -> None:
        self._cipher = AESGCM(_read_key(master_key_base64)) if master_key_base64 else None

    def seal(self, secret: bytes, identity: bytes) -> bytes:
        """Returns the sealed form: version, nonce, ciphertext and tag. Raises: WrongState without a master key."""
        nonce = secrets.token_bytes(_NONCE_LENGTH)
        return _VERSION + nonce + self._require().encrypt(nonce, secret, _VERSION + identity)

    def open(self, sealed: bytes, identity: bytes) -> bytes:
        """Returns the secret. Raises: ValueError for another key, another identity or damage; WrongState without a master key."""
        if sealed[:1] != _VERSION:
            msg = "the secret was sealed in a way this version does not know"
            raise ValueError(msg)
        nonce, text = sealed[1 : 1 + _NONCE_LENGTH], sealed[1 + _NONCE_LENGTH :]
        try:
            return self._require().decrypt(nonce, text, _VERSION + identity)
        except InvalidTag:
            msg = "the secret does not open: it was sealed under another master key or for another purpose"
            raise ValueError(msg) from None

    def _require(self) -> AESGCM:
        if self._cipher is None:
            raise WrongState("placement", "NO_MASTER_KEY", "secrets cannot be kept: set TENANTRY_MASTER_KEY at the tenant service")
        return self._cipher


def _read_key(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        raw = b""
    if len(raw) != _KEY_LENGTH:
        # The text stays out of the message: it is the key.
        msg = f"the master key is the base64 of {_KEY_LENGTH} bytes"
        raise ValueError(msg)
    return raw
