"""The key management port over keys from the environment: AES-256-GCM, the first key wraps, every key unwraps."""

import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.tenant.key_management import MasterKeyMissing, UnwrapFailed, WrappedKey

_NONCE_BYTES = 12


class EnvironmentMasterKeys:
    """Master keys held in this process's memory."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._ciphers = {name: AESGCM(key) for name, key in keys.items()}
        self._active = next(iter(keys), "")

    @property
    def active_master_key_id(self) -> str:
        """Names the first key."""
        return self._active

    async def wrap(self, data_key: bytes, associated: bytes) -> WrappedKey:
        """Wraps with the first key."""
        nonce = os.urandom(_NONCE_BYTES)
        return WrappedKey(self._active, nonce + self._cipher(self._active).encrypt(nonce, data_key, associated))

    async def unwrap(self, wrapped: WrappedKey, associated: bytes) -> bytes:
        """Unwraps with the key it names."""
        nonce, rest = wrapped.wrapped[:_NONCE_BYTES], wrapped.wrapped[_NONCE_BYTES:]
        try:
            return self._cipher(wrapped.master_key_id).decrypt(nonce, rest, associated)
        except (InvalidTag, ValueError):
            raise UnwrapFailed(wrapped.master_key_id) from None

    def _cipher(self, name: str) -> AESGCM:
        cipher = self._ciphers.get(name)
        if cipher is None:
            raise MasterKeyMissing(name)
        return cipher
