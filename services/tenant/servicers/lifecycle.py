"""TenantLifecycleService on the wire, for what the tenant service itself keeps."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from mesh.common.v1 import lifecycle_service_pb2 as messages
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.ids import TenantId
from services.kernel.request_context import current_tenant_id
from services.kernel.tenant_scan import ScannedStore, scan_response
from services.tenant.key_rotation import KeyRotation
from services.tenant.servicers.caller import acting_subject
from services.tenant.tenant_remains import TenantRemains


class LifecycleServicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """The beginning and end of a tenant here."""

    def __init__(
        self,
        remains: TenantRemains,
        rotation: KeyRotation,
        scan: Callable[[TenantId, Sequence[str]], Awaitable[Sequence[ScannedStore]]],
    ) -> None:
        self._remains = remains
        self._rotation = rotation
        self._scan = scan

    async def ProvisionTenant(self, request: messages.ProvisionTenantRequest, context: object) -> messages.ProvisionTenantResponse:
        """Makes nothing: creating the tenant made all that this service keeps of it."""
        return messages.ProvisionTenantResponse()

    async def EraseTenant(self, request: messages.EraseTenantRequest, context: object) -> messages.EraseTenantResponse:
        """Removes everything but the audit log."""
        removed = await self._remains.erase(current_tenant_id(), acting_subject())
        return messages.EraseTenantResponse(erased=[messages.ErasedRecords(kind=records.kind, count=records.count) for records in removed])

    async def ExportTenant(self, request: messages.ExportTenantRequest, context: object) -> AsyncIterator[messages.ExportTenantResponse]:
        """Streams every record."""
        async for record in self._remains.export(current_tenant_id()):
            yield messages.ExportTenantResponse(kind=record.kind, record_json=record.record_json.encode())

    async def ReencryptTenant(self, request: messages.ReencryptTenantRequest, context: object) -> messages.ReencryptTenantResponse:
        """Seals the tenant's secrets again."""
        return messages.ReencryptTenantResponse(resealed_count=await self._rotation.reseal_secrets(current_tenant_id()), done=True)

    async def MoveTenant(self, request: messages.MoveTenantRequest, context: object) -> messages.MoveTenantResponse:
        """Moves nothing: what this service keeps stays in the shared store wherever the content lives."""
        return messages.MoveTenantResponse()

    async def ScanTenant(self, request: messages.ScanTenantRequest, context: object) -> messages.ScanTenantResponse:
        """Looks through this service's tables."""
        return scan_response(await self._scan(current_tenant_id(), list(request.canaries)))

    async def PurgeTenant(self, request: messages.PurgeTenantRequest, context: object) -> messages.PurgeTenantResponse:
        """Purges nothing: nothing here is kept by time."""
        return messages.PurgeTenantResponse()
