"""What others do in a tenant's beginning and end, as ports, and what stands there where there is nothing to do."""

from collections.abc import Sequence
from typing import Protocol

from services.kernel.ids import TenantId
from services.tenant.tenant_remains import RemovedRecords


class PlacementStep(Protocol):
    """Where a tenant's content is: made before anything is put there, dropped after everything is removed. Safe to repeat."""

    async def provision(self, tenant_id: TenantId) -> None:
        """Makes the place the tenant's record names. Raises: MeshError."""
        ...

    async def drop(self, tenant_id: TenantId) -> Sequence[RemovedRecords]:
        """Drops the place and returns what was there. Raises: MeshError."""
        ...


class DataKeyStore(Protocol):
    """The tenant's own data keys."""

    async def destroy(self, tenant_id: TenantId) -> Sequence[RemovedRecords]:
        """Destroys every data key, so that no backup opens any more, and returns how many. Safe to repeat. Raises: MeshError."""
        ...


class PoolPlacement:
    """The pool: shared stores, which are there already."""

    async def provision(self, tenant_id: TenantId) -> None:
        """Makes nothing."""

    async def drop(self, tenant_id: TenantId) -> Sequence[RemovedRecords]:
        """Drops nothing: the services removed the tenant's rows."""
        return ()


class NoDataKeys:
    """A cell that keeps no data keys."""

    async def destroy(self, tenant_id: TenantId) -> Sequence[RemovedRecords]:
        """Destroys nothing."""
        return ()
