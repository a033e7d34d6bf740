"""Signed heads of audit chains: what a tenant keeps elsewhere to notice later that records were removed from the end.

Signed with the key of the context tokens under a name of its own. Neither can be taken for the other: a token's bytes are a message of
protobuf, which cannot begin with the letters of this name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.kernel.context_token import SigningKey
from services.kernel.ids import TenantId
from services.tenant.audit_chain import Link

_NAME = b"tenantry audit head v1\n"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class AuditHead:
    """A place of a tenant's chain at a moment, and who vouches for it."""

    tenant_id: TenantId
    link: Link
    sign_time: datetime
    key_id: str
    signature: bytes


class HeadSigner:
    """Signs heads, and tells those it (or a key beside it) signed."""

    def __init__(self, key: SigningKey, public_keys: Mapping[str, Ed25519PublicKey], clock: Callable[[], datetime]) -> None:
        self._key = key
        self._public_keys = public_keys
        self._clock = clock

    def sign(self, tenant_id: TenantId, link: Link) -> AuditHead:
        """Vouches for the place as of now."""
        now = self._clock()
        signature = self._key.private_key.sign(_payload(tenant_id, link, now, self._key.key_id))
        return AuditHead(tenant_id, link, now, self._key.key_id, signature)

    def vouches_for(self, head: AuditHead) -> bool:
        """Tells whether a known key signed exactly this head."""
        key = self._public_keys.get(head.key_id)
        if key is None:
            return False
        try:
            key.verify(head.signature, _payload(head.tenant_id, head.link, head.sign_time, head.key_id))
        except InvalidSignature:
            return False
        return True


def _payload(tenant_id: TenantId, link: Link, sign_time: datetime, key_id: str) -> bytes:
    moment = (sign_time - _EPOCH) // timedelta(microseconds=1)
    # The key's name comes last: every field before it has a fixed length.
    fixed = tenant_id.bytes + link.sequence.to_bytes(8, "big") + link.record_hash + moment.to_bytes(8, "big", signed=True)
    return _NAME + fixed + key_id.encode()
