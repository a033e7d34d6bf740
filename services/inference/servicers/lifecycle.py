"""A tenant's beginning and end in this service, over gRPC."""

from collections.abc import AsyncIterator
from contextlib import aclosing

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.inference.conversation import Store, first_prompt
from services.kernel.request_context import current_tenant, current_tenant_id
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_scan import scan_response
from services.kernel.timestamps import parse_timestamp


class LifecycleServicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """Provisions, erases and exports."""

    def __init__(self, store: Store, configs: TenantConfigCache) -> None:
        self._store = store
        self._configs = configs

    async def ProvisionTenant(
        self,
        request: pb.ProvisionTenantRequest,
        context: object,
    ) -> pb.ProvisionTenantResponse:
        """Writes the first prompt, unless there is one."""
        config = await self._configs.get(current_tenant())
        words = first_prompt(config.display_name, config.ai.assistant_name)
        prompt = await self._store.put_prompt(current_tenant_id(), words, only_first=True)
        return pb.ProvisionTenantResponse(resources=[f"prompt default@{prompt.version}"])

    async def EraseTenant(self, request: pb.EraseTenantRequest, context: object) -> pb.EraseTenantResponse:
        """Removes everything of the tenant."""
        erased = await self._store.erase(current_tenant_id())
        return pb.EraseTenantResponse(erased=[pb.ErasedRecords(kind=kind, count=count) for kind, count in erased.items()])

    async def ExportTenant(self, request: pb.ExportTenantRequest, context: object) -> AsyncIterator[pb.ExportTenantResponse]:
        """Streams everything of the tenant."""
        async with aclosing(self._store.export(current_tenant_id())) as records:
            async for kind, record_json in records:
                yield pb.ExportTenantResponse(kind=kind, record_json=record_json)

    async def ScanTenant(self, request: pb.ScanTenantRequest, context: object) -> pb.ScanTenantResponse:
        """Looks through this service's tables."""
        return scan_response(await self._store.scan(current_tenant_id(), list(request.canaries)))

    async def PurgeTenant(self, request: pb.PurgeTenantRequest, context: object) -> pb.PurgeTenantResponse:
        """Removes a batch of old conversations."""
        purged, more = await self._store.purge(current_tenant_id(), parse_timestamp(request.older_than, "older_than"))
        return pb.PurgeTenantResponse(purged=[pb.ErasedRecords(kind=kind, count=count) for kind, count in purged.items()], more=more)
