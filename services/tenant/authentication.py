"""Who is calling: the one place where a credential becomes a tenant. Refuses without telling strangers what was wrong.

A malformed, unknown or revoked key, one with a wrong secret and one used from elsewhere get the same answer; only who holds the right
secret, where it may be used, learns more. A token's refusals tell as little.
"""

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from mesh.common.v1 import error_reason_pb2
from services.kernel.cell import Cell
from services.kernel.errors import MeshError, NotFound, Unauthenticated
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.tenant.api_key import ApiKeyText, OperatorKeyText, parse
from services.tenant.cidr import is_within
from services.tenant.context_minting import ContextMinter, Grant
from services.tenant.credential_refusals import MAX_REASON_LENGTH, expired, invalid, mismatch, reason_missing, suspended
from services.tenant.json_web_token import JsonWebToken, parse_token
from services.tenant.jwt_proof import JwtProof
from services.tenant.name_resolution import NameResolution
from services.tenant.scopes import FRONT_SCOPES, OPERATOR_SCOPES, OPERATOR_TENANT_SCOPES
from services.tenant.tenant_record import TenantFacts, TenantState
from services.tenant.text import printable

_NO_HASH = bytes(32)
# Where what concerns no tenant is kept.
_NOBODY = TenantId(UUID(int=0))


class AuditAction(StrEnum):
    """What is written into an audit log although nothing was changed."""

    CREDENTIAL_REFUSED = "CREDENTIAL_REFUSED"
    KEY_USE_REFUSED = "KEY_USE_REFUSED"
    TENANT_MISMATCH = "TENANT_MISMATCH"
    KEY_USE_FAILED = "KEY_USE_FAILED"
    FRONT_KEY_USED = "FRONT_KEY_USED"


@dataclass(frozen=True, slots=True, repr=False)
class CredentialAttempt:
    """A credential as it came in, and what came with it. It has no repr: it holds a secret."""

    credential: str
    claimed_tenant_id: TenantId | None
    operator_reason: str
    peer_address: str
    host: str = ""
    path: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class StoredKey:
    """What is kept of a key, and of its tenant at this moment."""

    tenant_id: TenantId
    secret_sha256: bytes
    scopes: frozenset[str]
    expire_time: datetime | None
    revoke_time: datetime | None
    used: bool
    facts: TenantFacts
    allowed_cidrs: tuple[str, ...] = ()


class CredentialStore(Protocol):
    """Where keys are kept. Each method is one round trip."""

    async def find_key(self, key_id: str) -> StoredKey | None:
        """Returns the key of any tenant."""
        ...

    async def record_first_use(self, tenant_id: TenantId, key_id: str, secret_sha256: bytes) -> bool:
        """Writes the first use durably; False when the key was revoked or got another secret meanwhile."""
        ...

    async def record_operator_access(self, tenant_id: TenantId | None, subject: str, reason: str, peer_address: str) -> TenantFacts | None:
        """Writes the audit record durably and returns the named tenant's facts; None for no such tenant."""
        ...


class UsageTrail(Protocol):
    """What is worth keeping but must not slow an answer down."""

    def key_used(self, tenant_id: TenantId, key_id: str, now: datetime) -> None:
        """Notes a use of a key."""
        ...

    def audit(self, tenant_id: TenantId, action: AuditAction, subject: str, target: str, peer_address: str) -> None:
        """Notes a refusal that concerns a tenant."""
        ...


class FlagEvaluator(Protocol):
    """Which feature flags are on."""

    async def enabled(self, tenant_id: TenantId, tier: str) -> frozenset[str]:
        """Returns the names of the flags that are on for the tenant. Raises: Unavailable when nobody can tell."""
        ...


class Authenticator:
    """Resolves credentials. Keeps no answer: callers do, for at most a second."""

    def __init__(
        self,
        store: CredentialStore,
        trail: UsageTrail,
        minter: ContextMinter,
        tokens: JwtProof,
        names: NameResolution,
        *,
        flags: FlagEvaluator,
        operator_key_hashes: Sequence[bytes],
        front_key_hashes: Sequence[bytes],
        clock: Callable[[], datetime],
        cell: Cell,
    ) -> None:
        self._cell = cell
        self._store = store
        self._flags = flags
        self._trail = trail
        self._minter = minter
        self._tokens = tokens
        self._names = names
        self._operator_key_hashes = tuple(operator_key_hashes)
        self._front_key_hashes = tuple(front_key_hashes)
        self._clock = clock

    async def authenticate(self, attempt: CredentialAttempt) -> TenantContext:
        """Returns who the credential proves.

        Raises: Unauthenticated(CREDENTIAL_INVALID | CREDENTIAL_EXPIRED), Forbidden(TENANT_MISMATCH | TENANT_SUSPENDED |
        OPERATOR_REASON_MISSING), NotFound for a tenant an operator named that is not there, Unavailable("jwks"), WrongCell for a tenant of
        another region.
        """
        credential = parse(attempt.credential) or parse_token(attempt.credential)
        match credential:
            case ApiKeyText():
                grant = await self._prove_key(credential, attempt)
            case JsonWebToken():
                grant = await self._prove_token(credential, attempt)
            case OperatorKeyText():
                grant = await self._prove_operator(credential, attempt)
            case None:
                raise invalid()
        if grant.tenant_id is not None and grant.facts is not None:
            grant = replace(grant, flags=await self._flags.enabled(grant.tenant_id, grant.facts.tier))
        return self._minter.mint(grant)

    async def _prove_key(self, key: ApiKeyText, attempt: CredentialAttempt) -> Grant:
        stored = await self._store.find_key(key.key_id)
        # Compared against something in every case, so that an unknown id takes as long as a wrong secret.
        proven = hmac.compare_digest(key.secret_sha256(), _NO_HASH if stored is None else stored.secret_sha256)
        if stored is None:
            raise invalid()
        subject = f"key:{key.key_id}"
        if not proven or stored.revoke_time is not None:
            self._audit(stored.tenant_id, AuditAction.CREDENTIAL_REFUSED, subject, "", attempt)
            raise invalid()
        if stored.allowed_cidrs and not is_within(attempt.peer_address, stored.allowed_cidrs):
            # In a stranger's hands a stolen key looks like a wrong one; its owner reads where it was tried.
            self._audit(stored.tenant_id, AuditAction.KEY_USE_REFUSED, subject, "", attempt)
            raise invalid()
        now = self._clock()
        self._refuse_unusable(stored.tenant_id, stored.facts, subject, attempt, ended=_ended(stored.expire_time, now))
        grant = Grant(stored.tenant_id, stored.facts, subject, stored.scopes, end_time=stored.expire_time)
        await self._refuse_elsewhere(grant, attempt)
        await self._note_use(stored, key, now)
        return grant

    async def _prove_token(self, token: JsonWebToken, attempt: CredentialAttempt) -> Grant:
        known = await self._tokens.find_issuer(token)
        try:
            proven = await self._tokens.prove(token, known.issuer)
        except Unauthenticated as error:
            # By the issuer alone: nothing the token says of its subject is proven, or is proven any more.
            wrong = error.reason == error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID
            target = "" if wrong else f"refused:{error.reason_name}"
            self._audit(known.tenant_id, AuditAction.CREDENTIAL_REFUSED, f"jwt:{known.issuer.issuer_id}", target, attempt)
            raise
        self._refuse_unusable(known.tenant_id, known.facts, proven.subject, attempt)
        grant = Grant(known.tenant_id, known.facts, proven.subject, proven.scopes, end_time=proven.end_time)
        await self._refuse_elsewhere(grant, attempt)
        return grant

    async def _prove_operator(self, key: OperatorKeyText, attempt: CredentialAttempt) -> Grant:
        digest = key.text_sha256()
        # Every hash is compared, so that the time does not tell which one fits.
        if not any([hmac.compare_digest(digest, known) for known in self._operator_key_hashes]):
            return self._prove_front(key, digest, attempt)
        reason = printable(attempt.operator_reason, "operator_reason").strip()
        if not 1 <= len(reason) <= MAX_REASON_LENGTH:
            raise reason_missing()
        subject = f"operator:{key.key_id}"
        claimed = attempt.claimed_tenant_id
        facts = await self._store.record_operator_access(claimed, subject, reason, attempt.peer_address)
        if claimed is None:
            grant = Grant(None, None, subject, OPERATOR_SCOPES, operator=True)
        elif facts is None:
            raise NotFound("tenant")
        else:
            self._cell.refuse_elsewhere(facts.region)
            grant = Grant(claimed, facts, subject, OPERATOR_TENANT_SCOPES, operator=True)
        await self._refuse_elsewhere(grant, attempt)
        return grant

    def _prove_front(self, key: OperatorKeyText, digest: bytes, attempt: CredentialAttempt) -> Grant:
        if not any([hmac.compare_digest(digest, known) for known in self._front_key_hashes]):
            # Not by its id: a caller can make up ids without end, and each would be a record.
            self._audit(None, AuditAction.CREDENTIAL_REFUSED, "operator:unknown", "", attempt)
            raise invalid()
        subject = f"front:{key.key_id}"
        # It acts for no tenant, whichever one it names.
        if attempt.claimed_tenant_id is not None:
            self._audit(None, AuditAction.TENANT_MISMATCH, subject, f"tenant:{attempt.claimed_tenant_id}", attempt)
            raise mismatch("x-tenant-id")
        self._audit(None, AuditAction.FRONT_KEY_USED, subject, "", attempt)
        return Grant(None, None, subject, FRONT_SCOPES, operator=True)

    def _refuse_unusable(
        self, tenant_id: TenantId, facts: TenantFacts, subject: str, attempt: CredentialAttempt, *, ended: MeshError | None = None
    ) -> None:
        try:
            if ended is not None:
                raise ended
            _refuse_state(facts)
            self._cell.refuse_elsewhere(facts.region)
        except MeshError as refusal:
            # A right secret whose time is over, or whose tenant may not act, is worth more attention than a guess.
            self._audit(tenant_id, AuditAction.CREDENTIAL_REFUSED, subject, f"refused:{refusal.reason_name}", attempt)
            raise

    async def _refuse_elsewhere(self, grant: Grant, attempt: CredentialAttempt) -> None:
        claimed = attempt.claimed_tenant_id
        if claimed not in (None, grant.tenant_id):
            self._audit(grant.tenant_id, AuditAction.TENANT_MISMATCH, grant.subject, f"tenant:{claimed}", attempt)
            raise mismatch("x-tenant-id")
        named = await self._names.claimed_tenants(attempt.host, attempt.path)
        for other in named - {grant.tenant_id}:
            # By whose name it is, not by the name: a caller can make up names without end, and each would be a record.
            target = "tenant:unknown" if other is None else f"tenant:{other}"
            self._audit(grant.tenant_id, AuditAction.TENANT_MISMATCH, grant.subject, target, attempt)
        if named - {grant.tenant_id}:
            raise mismatch("the host or path (x-tenant-host, x-tenant-path)")

    async def _note_use(self, stored: StoredKey, key: ApiKeyText, now: datetime) -> None:
        if stored.used:
            self._trail.key_used(stored.tenant_id, key.key_id, now)
        # The first use is durable before the caller hears of it: a first key may be replaced only while it was never used.
        elif not await self._store.record_first_use(stored.tenant_id, key.key_id, stored.secret_sha256):
            raise invalid()

    def _audit(self, tenant_id: TenantId | None, action: AuditAction, subject: str, target: str, attempt: CredentialAttempt) -> None:
        self._trail.audit(_NOBODY if tenant_id is None else tenant_id, action, subject, target, attempt.peer_address)


def _ended(expire_time: datetime | None, now: datetime) -> MeshError | None:
    return None if expire_time is None or expire_time > now else expired(expire_time)


def _refuse_state(facts: TenantFacts) -> None:
    if facts.state is TenantState.SUSPENDED:
        raise suspended()
    if facts.state is not TenantState.ACTIVE:
        raise invalid()
