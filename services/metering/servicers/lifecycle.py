"""mesh.common.v1.TenantLifecycleService of the ledger."""

from collections.abc import AsyncIterator

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.request_context import current_tenant_id
from services.kernel.tenant_scan import scan_response
from services.metering.tenant_records import EPOCHS, TenantRecords


class LifecycleServicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """A tenant's beginning and end."""

    def __init__(self, records: TenantRecords) -> None:
        self._records = records

    async def ProvisionTenant(self, request: pb.ProvisionTenantRequest, context: object) -> pb.ProvisionTenantResponse:
        """Makes the tenant's first epoch."""
        tenant_id = current_tenant_id()
        await self._records.provision(tenant_id)
        return pb.ProvisionTenantResponse(resources=[f"{EPOCHS} {tenant_id}"])

    async def EraseTenant(self, request: pb.EraseTenantRequest, context: object) -> pb.EraseTenantResponse:
        """Pseudonymises the tenant's calls and events, and removes its budgets and receivers; amounts stay."""
        counts = await self._records.pseudonymise(current_tenant_id())
        return pb.EraseTenantResponse(erased=[pb.ErasedRecords(kind=kind, count=count) for kind, count in counts.items()])

    async def ExportTenant(self, request: pb.ExportTenantRequest, context: object) -> AsyncIterator[pb.ExportTenantResponse]:
        """Streams the tenant's books and events, and what it keeps here: subscription, credits, invoices, budgets, alerts, receivers."""
        async for kind, record in self._records.export(current_tenant_id()):
            yield pb.ExportTenantResponse(kind=kind, record_json=record.encode())

    async def ReencryptTenant(self, request: pb.ReencryptTenantRequest, context: object) -> pb.ReencryptTenantResponse:
        """Nothing here is sealed: amounts, models and times are the operator's books and hold no content."""
        return pb.ReencryptTenantResponse(done=True)

    async def MoveTenant(self, request: pb.MoveTenantRequest, context: object) -> pb.MoveTenantResponse:
        """Moves nothing: the ledger stays in the shared store wherever the content lives."""
        return pb.MoveTenantResponse()

    async def ScanTenant(self, request: pb.ScanTenantRequest, context: object) -> pb.ScanTenantResponse:
        """Looks through the books."""
        return scan_response(await self._records.scan(current_tenant_id(), list(request.canaries)))

    async def PurgeTenant(self, request: pb.PurgeTenantRequest, context: object) -> pb.PurgeTenantResponse:
        """Purges nothing: amounts are kept for ever."""
        return pb.PurgeTenantResponse()
