"""What this service keeps of a tenant, for its end: everything can be read out, and everything but the audit log can be removed."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.kernel.ids import TenantId
from services.tenant.actor import Actor


@dataclass(frozen=True, slots=True)
class RemovedRecords:
    """How many records of a kind were removed; the kind reads like `postgres:tenant.api_keys`."""

    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class ExportedRecord:
    """One record as a JSON object, without secrets and their hashes."""

    kind: str
    record_json: str


class RemainsStore(Protocol):
    """Where the records are."""

    async def revoke_all_keys(self, tenant_id: TenantId, actor: Actor) -> None:
        """Revokes every live key and issuer, durably."""
        ...

    async def remove(self, tenant_id: TenantId, actor: Actor) -> Sequence[RemovedRecords]:
        """Removes everything but the audit log in one transaction; a repeated call finds nothing."""
        ...

    def export(self, tenant_id: TenantId) -> AsyncIterator[ExportedRecord]:
        """Reads everything, page by page."""
        ...


class DataKeys(Protocol):
    """The tenant's data keys."""

    async def destroy(self, tenant_id: TenantId) -> int:
        """Removes every version for good; returns how many there were."""
        ...


class KeyRecords(Protocol):
    """What is on record of the tenant's keys."""

    async def note(self, tenant_id: TenantId, action: str, target: str, actor: Actor) -> None:
        """Puts a change of keys on record, once, and announces it."""
        ...


class TenantRemains:
    """The end of a tenant in this service."""

    def __init__(self, store: RemainsStore, data_keys: DataKeys, key_records: KeyRecords) -> None:
        self._store = store
        self._data_keys = data_keys
        self._key_records = key_records

    async def erase(self, tenant_id: TenantId, actor: Actor) -> Sequence[RemovedRecords]:
        """Revokes the keys, removes the records, destroys the data keys, and says how many of each kind there were."""
        # Two transactions on purpose: whatever becomes of the removal, nobody gets in with an old key while it is under way.
        await self._store.revoke_all_keys(tenant_id, actor)
        removed = await self._store.remove(tenant_id, actor)
        # Last: what was sealed with them, in whichever backup, is gone from here on, and no key is made for this id again.
        destroyed = await self._data_keys.destroy(tenant_id)
        await self._key_records.note(tenant_id, "DATA_KEY_DESTROYED", "data_key:all", actor)
        return [*removed, RemovedRecords("key_store:tenant_keys.data_keys", destroyed)]

    def export(self, tenant_id: TenantId) -> AsyncIterator[ExportedRecord]:
        """Streams every record of the tenant."""
        return self._store.export(tenant_id)
