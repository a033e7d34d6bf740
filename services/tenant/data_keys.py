"""A tenant's data keys: made on first need, versioned, wrapped by a master key, destroyed with the tenant and never made again.

The vault is the one place where they are unwrapped. What does not unwrap is a security event and on record as KEY_USE_FAILED.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol
from uuid import UUID

import structlog

from services.kernel.errors import WrongState
from services.kernel.ids import TenantId
from services.kernel.sealing import KEY_BYTES, TenantKeys, row_identity
from services.kernel.tenant_cipher import KeyUseFailed
from services.tenant.authentication import AuditAction, UsageTrail
from services.tenant.key_management import KeyManagement, UnwrapFailed, WrappedKey

log = structlog.get_logger(__name__)

REWRAP_PAGE = 100
_SUBJECT = "mesh:tenant"


@dataclass(frozen=True, slots=True, repr=False)
class StoredDataKey:
    """One version as it is stored."""

    version: int
    active: bool
    wrapped: WrappedKey


@dataclass(frozen=True, slots=True)
class StoredKeys:
    """Every version of a tenant, lowest first; `destroyed` when there are none and never will be."""

    keys: tuple[StoredDataKey, ...]
    destroyed: bool


@dataclass(frozen=True, slots=True, repr=False)
class DataKey:
    """One version, unwrapped. No repr: it is a secret."""

    version: int
    key: bytes
    active: bool


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """How a page went; `last` is its last tenant when more may follow."""

    count: int
    unreadable: int
    last: TenantId | None


class KeyStore(Protocol):
    """Where wrapped keys are. Every method is one transaction of that tenant."""

    async def load(self, tenant_id: TenantId) -> StoredKeys:
        """Returns every version."""
        ...

    async def add(self, tenant_id: TenantId, version: int, wrapped: WrappedKey) -> StoredKeys:
        """Makes `version` the active one, if the one before it is the newest and nothing was destroyed; returns what is there now."""
        ...

    async def retire(self, tenant_id: TenantId, before_version: int) -> Sequence[int]:
        """Removes the versions before this one for good, never the active one."""
        ...

    async def destroy(self, tenant_id: TenantId) -> int:
        """Removes every version and leaves a tombstone; returns how many there were. Idempotent."""
        ...

    async def tenants(self, after: UUID, limit: int) -> Sequence[TenantId]:
        """Returns tenants with keys by id."""
        ...

    async def rewrap(self, tenant_id: TenantId, version: int, old_master_key_id: str, wrapped: WrappedKey) -> bool:
        """Replaces a version's wrapping, if it is still the one of the old master key."""
        ...


class DataKeyVault:
    """The data keys of every tenant, one tenant a call."""

    def __init__(self, store: KeyStore, management: KeyManagement, trail: UsageTrail) -> None:
        self._store = store
        self._management = management
        self._trail = trail

    async def live(self, tenant_id: TenantId) -> tuple[DataKey, ...]:
        """Returns every version, making the first one when there is none.

        Raises: WrongState(DESTROYED), MasterKeyMissing, KeyUseFailed, Unavailable.
        """
        stored = await self._store.load(tenant_id)
        if not stored.keys and not stored.destroyed:
            stored = await self._store.add(tenant_id, 1, await self._new_key(tenant_id, 1))
        return tuple([await self._unwrapped(tenant_id, item) for item in _standing(stored)])

    async def keys(self, tenant_id: TenantId) -> TenantKeys:
        """Returns the same, ready to seal and open with. Raises: as `live`."""
        live = await self.live(tenant_id)
        active = next(item.version for item in live if item.active)
        return TenantKeys.of(tenant_id, {item.version: item.key for item in live}, active)

    async def begin_rotation(self, tenant_id: TenantId) -> int:
        """Makes a new active version, or finds the rotation that is under way; returns the active version."""
        stored = await self._store.load(tenant_id)
        if len(_standing(stored)) <= 1:
            version = stored.keys[-1].version + 1 if stored.keys else 1
            stored = await self._store.add(tenant_id, version, await self._new_key(tenant_id, version))
        return next(item.version for item in _standing(stored) if item.active)

    async def retire(self, tenant_id: TenantId, before_version: int) -> Sequence[int]:
        """Removes versions that nothing is sealed with any more."""
        return await self._store.retire(tenant_id, before_version)

    async def destroy(self, tenant_id: TenantId) -> int:
        """Removes every version for good: what was sealed with them, in whichever backup, cannot be read again."""
        return await self._store.destroy(tenant_id)

    async def rewrap(self, after: UUID) -> Rewrapped:
        """Wraps a page of tenants' keys under the active master key. Raises: MasterKeyMissing, Unavailable."""
        tenants = await self._store.tenants(after, REWRAP_PAGE)
        count = unreadable = 0
        for tenant_id in tenants:
            try:
                count += await self._rewrap_one(tenant_id)
            except KeyUseFailed:
                # On record already; one altered row must not keep everybody else under the old master key.
                unreadable += 1
        return Rewrapped(count, unreadable, tenants[-1] if len(tenants) == REWRAP_PAGE else None)

    async def _rewrap_one(self, tenant_id: TenantId) -> int:
        count = 0
        for item in (await self._store.load(tenant_id)).keys:
            if item.wrapped.master_key_id == self._management.active_master_key_id:
                continue
            data_key = (await self._unwrapped(tenant_id, item)).key
            wrapped = await self._management.wrap(data_key, _belongs_to(tenant_id, item.version))
            count += await self._store.rewrap(tenant_id, item.version, item.wrapped.master_key_id, wrapped)
        return count

    async def _new_key(self, tenant_id: TenantId, version: int) -> WrappedKey:
        return await self._management.wrap(secrets.token_bytes(KEY_BYTES), _belongs_to(tenant_id, version))

    async def _unwrapped(self, tenant_id: TenantId, item: StoredDataKey) -> DataKey:
        try:
            key = await self._management.unwrap(item.wrapped, _belongs_to(tenant_id, item.version))
        except UnwrapFailed:
            report_key_failure(self._trail, tenant_id, f"data_key:{item.version}")
        return DataKey(item.version, key, item.active)


def report_key_failure(trail: UsageTrail, tenant_id: TenantId, target: str) -> NoReturn:
    """Logs and records that something did not open. Raises: KeyUseFailed, always."""
    log.error("key_use_failed", security_event=True, tenant_id=str(tenant_id), target=target)
    trail.audit(tenant_id, AuditAction.KEY_USE_FAILED, _SUBJECT, target, "")
    raise KeyUseFailed from None


def _belongs_to(tenant_id: TenantId, version: int) -> bytes:
    return row_identity("data_key", tenant_id.bytes, str(version))


def _standing(stored: StoredKeys) -> tuple[StoredDataKey, ...]:
    if stored.destroyed:
        raise WrongState("data_key", "DESTROYED", "the tenant's data keys were destroyed; nothing of it can be sealed or opened any more")
    return stored.keys
