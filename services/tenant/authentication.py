"""Who is calling: the one place where a credential becomes a tenant. Refuses without telling strangers what was wrong.

A malformed, unknown or revoked key, and one with a wrong secret, get the same answer; only who holds the right secret learns more.
"""

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol

from mesh.common.v1 import error_reason_pb2
from services.kernel.cell import Cell
from services.kernel.errors import Forbidden, MeshError, NotFound, Unauthenticated
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.tenant.api_key import ApiKeyText, OperatorKeyText, parse
from services.tenant.context_minting import ContextMinter, Grant
from services.tenant.scopes import OPERATOR_SCOPES, OPERATOR_TENANT_SCOPES
from services.tenant.tenant_record import TenantFacts, TenantState
from services.tenant.text import printable

MAX_REASON_LENGTH = 500
_NO_HASH = bytes(32)


class AuditAction(StrEnum):
    """What authentication writes into a tenant's audit log."""

    CREDENTIAL_REFUSED = "CREDENTIAL_REFUSED"
    TENANT_MISMATCH = "TENANT_MISMATCH"


@dataclass(frozen=True, slots=True, repr=False)
class CredentialAttempt:
    """A credential as it came in, and what came with it. It has no repr: it holds a secret."""

    credential: str
    claimed_tenant_id: TenantId | None
    operator_reason: str
    peer_address: str


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


class CredentialStore(Protocol):
    """Where keys are kept. Each method is one round trip."""

    async def find_key(self, key_id: str) -> StoredKey | None:
        """Returns the key of any tenant."""
        ...

    async def record_first_use(self, tenant_id: TenantId, key_id: str) -> bool:
        """Writes the first use durably; False when the key was revoked meanwhile."""
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


class Authenticator:
    """Resolves credentials. Keeps no answer: callers do, for at most a second."""

    def __init__(
        self,
        store: CredentialStore,
        trail: UsageTrail,
        minter: ContextMinter,
        *,
        operator_key_hashes: Sequence[bytes],
        clock: Callable[[], datetime],
        cell: Cell,
    ) -> None:
        self._cell = cell
        self._store = store
        self._trail = trail
        self._minter = minter
        self._operator_key_hashes = tuple(operator_key_hashes)
        self._clock = clock

    async def authenticate(self, attempt: CredentialAttempt) -> TenantContext:
        """Returns who the credential proves.

        Raises: Unauthenticated(CREDENTIAL_INVALID | CREDENTIAL_EXPIRED), Forbidden(TENANT_MISMATCH | TENANT_SUSPENDED |
        OPERATOR_REASON_MISSING), NotFound for a tenant an operator named that is not there, WrongCell for a tenant of another region.
        """
        key = parse(attempt.credential)
        match key:
            case ApiKeyText():
                return await self._authenticate_tenant(key, attempt)
            case OperatorKeyText():
                return await self._authenticate_operator(key, attempt)
            case None:
                raise _invalid()

    async def _authenticate_tenant(self, key: ApiKeyText, attempt: CredentialAttempt) -> TenantContext:
        stored = await self._store.find_key(key.key_id)
        # Compared against something in every case, so that an unknown id takes as long as a wrong secret.
        proven = hmac.compare_digest(key.secret_sha256(), _NO_HASH if stored is None else stored.secret_sha256)
        if stored is None:
            raise _invalid()
        subject = f"key:{key.key_id}"
        if not proven or stored.revoke_time is not None:
            self._trail.audit(stored.tenant_id, AuditAction.CREDENTIAL_REFUSED, subject, "", attempt.peer_address)
            raise _invalid()
        now = self._clock()
        self._refuse_unusable(stored, now)
        if attempt.claimed_tenant_id not in (None, stored.tenant_id):
            target = f"tenant:{attempt.claimed_tenant_id}"
            self._trail.audit(stored.tenant_id, AuditAction.TENANT_MISMATCH, subject, target, attempt.peer_address)
            raise _mismatch()
        await self._note_use(stored, key.key_id, now)
        return self._minter.mint(Grant(stored.tenant_id, stored.facts, subject, stored.scopes, end_time=stored.expire_time))

    def _refuse_unusable(self, stored: StoredKey, now: datetime) -> None:
        if stored.expire_time is not None and stored.expire_time <= now:
            raise _expired(stored.expire_time)
        if stored.facts.state is TenantState.SUSPENDED:
            raise _suspended()
        if stored.facts.state is not TenantState.ACTIVE:
            raise _invalid()
        self._cell.refuse_elsewhere(stored.facts.region)

    async def _note_use(self, stored: StoredKey, key_id: str, now: datetime) -> None:
        if stored.used:
            self._trail.key_used(stored.tenant_id, key_id, now)
        # The first use is durable before the caller hears of it: a first key may be replaced only while it was never used.
        elif not await self._store.record_first_use(stored.tenant_id, key_id):
            raise _invalid()

    async def _authenticate_operator(self, key: OperatorKeyText, attempt: CredentialAttempt) -> TenantContext:
        digest = key.text_sha256()
        # Every hash is compared, so that the time does not tell which one fits.
        if not any([hmac.compare_digest(digest, known) for known in self._operator_key_hashes]):
            raise _invalid()
        reason = printable(attempt.operator_reason, "operator_reason").strip()
        if not 1 <= len(reason) <= MAX_REASON_LENGTH:
            raise _reason_missing()
        subject = f"operator:{key.key_id}"
        claimed = attempt.claimed_tenant_id
        facts = await self._store.record_operator_access(claimed, subject, reason, attempt.peer_address)
        if claimed is None:
            return self._minter.mint(Grant(None, None, subject, OPERATOR_SCOPES, operator=True))
        if facts is None:
            raise NotFound("tenant")
        self._cell.refuse_elsewhere(facts.region)
        return self._minter.mint(Grant(claimed, facts, subject, OPERATOR_TENANT_SCOPES, operator=True))


def _invalid() -> MeshError:
    return Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "the credential is not valid; check the key")


def _expired(expire_time: datetime) -> MeshError:
    stamp = expire_time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return Unauthenticated(
        error_reason_pb2.ERROR_REASON_CREDENTIAL_EXPIRED, f"the key ended at {stamp}; use a newer one", expire_time=stamp
    )


def _suspended() -> MeshError:
    return Forbidden(error_reason_pb2.ERROR_REASON_TENANT_SUSPENDED, "the tenant is suspended; ask the operator of the system")


def _mismatch() -> MeshError:
    return Forbidden(
        error_reason_pb2.ERROR_REASON_TENANT_MISMATCH,
        "x-tenant-id names another tenant than your credential proves; leave it out or correct it",
    )


def _reason_missing() -> MeshError:
    return Forbidden(
        error_reason_pb2.ERROR_REASON_OPERATOR_REASON_MISSING,
        f"say why you act, in 1 to {MAX_REASON_LENGTH} characters, as x-operator-reason",
    )
