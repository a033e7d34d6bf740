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
        """Revokes every live key, durably."""
        ...

    async def remove(self, tenant_id: TenantId, actor: Actor) -> Sequence[RemovedRecords]:
        """Removes everything but the audit log in one transaction; a repeated call finds nothing."""
        ...

    def export(self, tenant_id: TenantId) -> AsyncIterator[ExportedRecord]:
        """Reads everything, page by page."""
        ...


class PlaceTaker(Protocol):
    """Who takes back the place of a tenant's content."""

    async def drop(self, tenant_id: TenantId) -> Sequence[str]:
        """Drops the tenant's own schema or database, if it has one. Idempotent."""
        ...


class TenantRemains:
    """The end of a tenant in this service, which is also the end of its place: the other services were asked before."""

    def __init__(self, store: RemainsStore, places: PlaceTaker) -> None:
        self._store = store
        self._places = places

    async def erase(self, tenant_id: TenantId, actor: Actor) -> Sequence[RemovedRecords]:
        """Revokes the keys, then removes the records, and says how many of each kind there were."""
        # Two transactions on purpose: whatever becomes of the removal, nobody gets in with an old key while it is under way.
        await self._store.revoke_all_keys(tenant_id, actor)
        dropped = await self._places.drop(tenant_id)
        return [*(RemovedRecords(kind, 1) for kind in dropped), *await self._store.remove(tenant_id, actor)]

    def export(self, tenant_id: TenantId) -> AsyncIterator[ExportedRecord]:
        """Streams every record of the tenant."""
        return self._store.export(tenant_id)
