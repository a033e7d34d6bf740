"""TenantLifecycleService of the limits: nothing to make, everything to erase, all of it readable."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from mesh.common.v1 import lifecycle_service_pb2 as messages
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.ids import TenantId
from services.kernel.request_context import current_tenant_id
from services.kernel.tenant_scan import ScannedStore, scan_response


class TenantRecords(Protocol):
    """What is kept of tenants."""

    async def ping(self) -> None:
        """Returns when the store answers. Raises: Unavailable."""
        ...

    async def erase(self, tenant_id: TenantId) -> dict[str, int]:
        """Removes all of a tenant; returns what was found, by kind."""
        ...

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts what carries the tenant's id or holds one of the strings."""
        ...

    def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, dict[str, str]]]:
        """Yields all of a tenant: kind and fields."""
        ...


class LifecycleServicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """Serves mesh.common.v1.TenantLifecycleService."""

    def __init__(self, records: TenantRecords) -> None:
        self._records = records

    async def ProvisionTenant(
        self,
        request: messages.ProvisionTenantRequest,
        context: object,
    ) -> messages.ProvisionTenantResponse:
        """Makes sure the store answers: a tenant's counters are made by its first call, from the ledger."""
        await self._records.ping()
        return messages.ProvisionTenantResponse()

    async def EraseTenant(
        self,
        request: messages.EraseTenantRequest,
        context: object,
    ) -> messages.EraseTenantResponse:
        """Removes every key of the tenant."""
        erased = await self._records.erase(current_tenant_id())
        return messages.EraseTenantResponse(
            erased=[messages.ErasedRecords(kind=f"redis:{kind}", count=count) for kind, count in sorted(erased.items())]
        )

    async def ExportTenant(
        self,
        request: messages.ExportTenantRequest,
        context: object,
    ) -> AsyncIterator[messages.ExportTenantResponse]:
        """Streams every record of the tenant."""
        async for kind, fields in self._records.export(current_tenant_id()):
            yield messages.ExportTenantResponse(kind=kind, record_json=json.dumps(fields, sort_keys=True).encode())

    async def ReencryptTenant(self, request: messages.ReencryptTenantRequest, context: object) -> messages.ReencryptTenantResponse:
        """Nothing here is sealed: counters and holds are the operator's books and hold no content."""
        return messages.ReencryptTenantResponse(done=True)

    async def MoveTenant(self, request: messages.MoveTenantRequest, context: object) -> messages.MoveTenantResponse:
        """Moves nothing: counters stay in the shared store wherever the content lives."""
        return messages.MoveTenantResponse()

    async def ScanTenant(
        self,
        request: messages.ScanTenantRequest,
        context: object,
    ) -> messages.ScanTenantResponse:
        """Looks through the keys of the whole store."""
        return scan_response(await self._records.scan(current_tenant_id(), list(request.canaries)))

    async def PurgeTenant(
        self,
        request: messages.PurgeTenantRequest,
        context: object,
    ) -> messages.PurgeTenantResponse:
        """Purges nothing: counters forget by themselves."""
        return messages.PurgeTenantResponse()
