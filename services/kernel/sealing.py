"""Sealing under a tenant's data keys: AES-256-GCM, with the row's identity as associated data. Pure: no key is fetched here.

A sealed value is format (1 byte), key version (4 bytes, big-endian), nonce (12 bytes, random), ciphertext with its tag. Header, tenant and
identity are authenticated: a value moved to another row, column or tenant, or altered in one bit, does not open.
"""

import hashlib
import hmac
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.kernel.ids import TenantId

FORMAT = 1
KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
OVERHEAD_BYTES = 5 + NONCE_BYTES + TAG_BYTES
_HEADER = struct.Struct(">BI")
_MAX_VERSION = 2**31 - 1


class SealBroken(Exception):
    """A sealed value does not open: altered, moved, or not one. Says nothing of its content."""


class VersionUnknown(Exception):
    """A sealed value names a key version that is not at hand."""

    def __init__(self, version: int) -> None:
        super().__init__(f"no data key of version {version}")
        self.version = version


@dataclass(frozen=True, slots=True)
class _Key:
    cipher: AESGCM
    digest_key: bytes


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """A tenant's live data keys, ready for use. It has no key in its repr, and nothing in it can be written down."""

    tenant_id: TenantId
    active_version: int
    _by_version: Mapping[int, _Key] = field(repr=False)

    @classmethod
    def of(cls, tenant_id: TenantId, keys: Mapping[int, bytes], active_version: int) -> "TenantKeys":
        """Builds them from raw keys of 32 bytes. Raises: ValueError for other lengths, or without the active one."""
        if active_version not in keys or any(len(key) != KEY_BYTES for key in keys.values()):
            msg = "data keys are 32 bytes each and the active one is among them"
            raise ValueError(msg)
        return cls(tenant_id, active_version, {version: _Key(AESGCM(key), _derive(key)) for version, key in keys.items()})

    def has(self, version: int) -> bool:
        """Tells whether a version is at hand."""
        return version in self._by_version

    def seal(self, plaintext: bytes, identity: bytes) -> bytes:
        """Returns the sealed value under the active key."""
        header = _HEADER.pack(FORMAT, self.active_version)
        nonce = os.urandom(NONCE_BYTES)
        cipher = self._by_version[self.active_version].cipher
        return header + nonce + cipher.encrypt(nonce, plaintext, self._associated(header, identity))

    def open(self, sealed: bytes, identity: bytes) -> bytes:
        """Returns the plaintext. Raises: SealBroken, VersionUnknown."""
        version = sealed_version(sealed)
        key = self._by_version.get(version)
        if key is None:
            raise VersionUnknown(version)
        header, nonce, rest = sealed[:5], sealed[5 : 5 + NONCE_BYTES], sealed[5 + NONCE_BYTES :]
        try:
            return key.cipher.decrypt(nonce, rest, self._associated(header, identity))
        except InvalidTag:
            raise SealBroken("the value does not open under this tenant, row and column") from None

    def digest(self, content: bytes, purpose: bytes, version: int | None = None) -> bytes:
        """Returns a keyed digest of 32 bytes: equal for equal content under one key version, and no oracle for who has no key.

        Raises: VersionUnknown.
        """
        wanted = self.active_version if version is None else version
        key = self._by_version.get(wanted)
        if key is None:
            raise VersionUnknown(wanted)
        return hmac.digest(key.digest_key, row_identity(purpose, self.tenant_id.bytes, content), "sha256")

    def _associated(self, header: bytes, identity: bytes) -> bytes:
        return header + self.tenant_id.bytes + identity


def sealed_version(sealed: bytes) -> int:
    """Returns the key version a sealed value names. Raises: SealBroken for what is no sealed value."""
    if len(sealed) < OVERHEAD_BYTES or sealed[0] != FORMAT:
        raise SealBroken("the value is not a sealed one")
    version: int = _HEADER.unpack_from(sealed)[1]
    if not 1 <= version <= _MAX_VERSION:
        raise SealBroken("the value is not a sealed one")
    return version


def row_identity(*parts: bytes | str) -> bytes:
    """Returns table, column and row keys as one text that reads in one way only: each part carries its length."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join(struct.pack(">I", len(part)) + part for part in encoded)


def _derive(key: bytes) -> bytes:
    # A key of its own for digests: one key never serves two algorithms.
    return hmac.digest(key, b"tenantry keyed digest 1", hashlib.sha256)
