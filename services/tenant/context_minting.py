"""Context tokens: what this service alone may vouch for, and the public keys that prove it. Refuses a signing key that is not one."""

import base64
import binascii
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mesh.common.v1.tenant_claims_pb2 import TenantClaims
from services.kernel.context_token import MAX_LIFETIME, SigningKey, mint
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.kernel.timestamps import to_timestamp
from services.tenant.scopes import GENERATE_SCOPE
from services.tenant.tenant_record import TenantFacts

PROVISIONING_SUBJECT = "mesh:tenant"
_KEY_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Grant:
    """What a credential proves. `facts` is None for an operator who named no tenant; `end_time` is the credential's own end."""

    tenant_id: TenantId | None
    facts: TenantFacts | None
    subject: str
    scopes: frozenset[str]
    flags: frozenset[str] = frozenset()
    end_time: datetime | None = None
    operator: bool = False


class ContextMinter:
    """Signs grants with one private key and publishes it beside the keys of other replicas and of the time before a rotation."""

    def __init__(
        self, signing_key: SigningKey, other_keys: Sequence[Ed25519PublicKey], *, region: str, clock: Callable[[], datetime]
    ) -> None:
        self._signing_key = signing_key
        self._region = region
        self._clock = clock
        own = signing_key.private_key.public_key()
        self._public_keys = {public_key_id(key): key for key in (own, *other_keys)}

    async def fetch_keys(self) -> Mapping[str, Ed25519PublicKey]:
        """Returns every key that may have signed a token still alive, by key id; never waits."""
        return self._public_keys

    def mint(self, grant: Grant) -> TenantContext:
        """Returns the signed context: it lives 300 s, or as long as the credential when that is less.

        Raises: ValueError for an operator with the right to spend a tenant's money.
        """
        if grant.operator and GENERATE_SCOPE in grant.scopes:
            msg = f"an operator's context never holds {GENERATE_SCOPE}"
            raise ValueError(msg)
        now = self._clock()
        expire_time = now + MAX_LIFETIME
        if grant.end_time is not None:
            expire_time = min(expire_time, grant.end_time)
        facts = grant.facts
        claims = TenantClaims(
            tenant_id=b"" if grant.tenant_id is None else grant.tenant_id.bytes,
            tier="" if facts is None else facts.tier,
            region=self._region if facts is None else facts.region,
            subject=grant.subject,
            scopes=sorted(grant.scopes),
            config_version=0 if facts is None else facts.config_version,
            issue_time=to_timestamp(now),
            expire_time=to_timestamp(expire_time),
            operator=grant.operator,
            flags=sorted(grant.flags),
            placement="" if facts is None else facts.placement,
            encrypt_content=facts is not None and facts.encrypt_content,
        )
        return TenantContext(
            tenant_id=grant.tenant_id,
            tier=claims.tier,
            region=claims.region,
            subject=grant.subject,
            scopes=grant.scopes,
            config_version=claims.config_version,
            expire_time=expire_time,
            operator=grant.operator,
            token=mint(claims, self._signing_key),
            flags=grant.flags,
            placement=claims.placement or "pool",
            encrypt_content=claims.encrypt_content,
        )


def public_key_id(key: Ed25519PublicKey) -> str:
    """Names a key by the first 16 hex digits of its SHA-256, so that every process gives one key one name."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def read_signing_key(seed_base64: str) -> SigningKey:
    """Reads the private key from the base64 of its 32-byte seed. Raises: ValueError."""
    private_key = Ed25519PrivateKey.from_private_bytes(_read_key(seed_base64))
    return SigningKey(public_key_id(private_key.public_key()), private_key)


def new_signing_seed() -> str:
    """Makes a signing key: the base64 of 32 random bytes."""
    return base64.b64encode(secrets.token_bytes(_KEY_LENGTH)).decode()


def public_key_text(seed_base64: str) -> str:
    """Returns the base64 of the public half of a signing key. Raises: ValueError."""
    return base64.b64encode(read_signing_key(seed_base64).private_key.public_key().public_bytes_raw()).decode()


def read_public_keys(keys_base64: str) -> list[Ed25519PublicKey]:
    """Reads a comma separated list of base64 public keys. Raises: ValueError."""
    return [Ed25519PublicKey.from_public_bytes(_read_key(item.strip())) for item in keys_base64.split(",") if item.strip()]


def _read_key(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error:
        raw = b""
    if len(raw) != _KEY_LENGTH:
        # The text itself stays out of the message: it may be the private key.
        msg = f"a context key is the base64 of {_KEY_LENGTH} bytes"
        raise ValueError(msg)
    return raw
