"""Seals the secrets of receivers under keys of the service, each for its tenant and its row: a value moved elsewhere does not open.

Not under the tenant's data key: that is handed out in the name of a tenant's call alone, and what is sent is sent when nobody calls.
"""

import base64
import binascii
from collections.abc import Mapping
from uuid import UUID

from services.kernel.errors import WrongState
from services.kernel.ids import TenantId
from services.kernel.sealing import KEY_BYTES, SealBroken, TenantKeys, VersionUnknown, row_identity
from services.kernel.webhook_signing import DeliveryFailed, read_webhook_secret


def parse_seal_keys(text: str) -> dict[int, bytes]:
    """Reads `version:base64,…` of 32 bytes each, the first one active. Raises: ValueError with a sentence that repeats no key."""
    keys: dict[int, bytes] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        version, _, encoded = item.partition(":")
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            key = b""
        if not version.isascii() or not version.isdigit() or not 1 <= int(version) < 2**31 or len(key) != KEY_BYTES or int(version) in keys:
            msg = f"must list version:base64 of {KEY_BYTES} bytes each, comma separated, each version once, the active one first"
            raise ValueError(msg)
        keys[int(version)] = key
    return keys


class EndpointSecrets:
    """Seals and opens; stores nothing."""

    def __init__(self, keys: Mapping[int, bytes]) -> None:
        """`keys` by version, the active one first; without any nothing is sealed."""
        self._keys = keys

    def seal(self, tenant_id: TenantId, endpoint_id: UUID, secret: str) -> bytes:
        """Returns the sealed secret. Raises: WrongState where no key is configured."""
        if not self._keys:
            raise WrongState("webhook_seal_key", "MISSING", "receivers cannot be kept: the operator has to set TENANTRY_WEBHOOK_SEAL_KEYS")
        return self._of(tenant_id).seal(secret.encode(), _identity(endpoint_id))

    def signing_key(self, tenant_id: TenantId, endpoint_id: UUID, sealed: bytes) -> bytes:
        """Returns the key that a sealed secret holds. Raises: DeliveryFailed for what does not open."""
        if not self._keys:
            raise DeliveryFailed("no key is configured that opens the receiver's secret")
        try:
            return read_webhook_secret(self._of(tenant_id).open(sealed, _identity(endpoint_id)).decode())
        except (SealBroken, VersionUnknown):
            raise DeliveryFailed("the receiver's secret does not open under the keys configured") from None

    def _of(self, tenant_id: TenantId) -> TenantKeys:
        return TenantKeys.of(tenant_id, self._keys, next(iter(self._keys)))


def _identity(endpoint_id: UUID) -> bytes:
    return row_identity("metering.webhook_endpoints", "secret", endpoint_id.bytes)
