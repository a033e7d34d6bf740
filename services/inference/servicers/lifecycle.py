"""A tenant's beginning and end in this service, over gRPC."""

from collections.abc import AsyncIterator
from contextlib import aclosing

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.inference.conversation import Store, first_prompt
from services.kernel.place_making import PlaceMaker
from services.kernel.request_context import current_tenant, current_tenant_id
from services.kernel.sealed_writes import SealedRows, reseal_for_a_while
from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_database import PlaceMissing
from services.kernel.tenant_moving import TenantMover
from services.kernel.tenant_scan import scan_response
from services.kernel.timestamps import parse_timestamp


class LifecycleServicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """Provisions, erases and exports."""

    def __init__(self, store: Store, configs: TenantConfigCache, places: PlaceMaker, mover: TenantMover, sealed_rows: SealedRows) -> None:
        self._store = store
        self._configs = configs
        self._places = places
        self._mover = mover
        self._sealed_rows = sealed_rows

    async def ProvisionTenant(
        self,
        request: pb.ProvisionTenantRequest,
        context: object,
    ) -> pb.ProvisionTenantResponse:
        """Makes the tables of a tenant that has its own, and writes the first prompt unless there is one."""
        made = await self._places.make(current_tenant())
        config = await self._configs.get(current_tenant())
        words = first_prompt(config.display_name, config.ai.assistant_name)
        prompt = await self._store.put_prompt(current_tenant_id(), words, only_first=True)
        return pb.ProvisionTenantResponse(resources=[*made, f"prompt default@{prompt.version}"])

    async def EraseTenant(self, request: pb.EraseTenantRequest, context: object) -> pb.EraseTenantResponse:
        """Removes everything of the tenant."""
        try:
            erased = await self._store.erase(current_tenant_id())
        except PlaceMissing:
            # A repeated call after the tenant's own place was dropped: nothing is left to count.
            erased = {}
        await self._mover.erase_copies(current_tenant())
        await self._places.forget(current_tenant_id())
        return pb.EraseTenantResponse(erased=[pb.ErasedRecords(kind=kind, count=count) for kind, count in erased.items()])

    async def ExportTenant(self, request: pb.ExportTenantRequest, context: object) -> AsyncIterator[pb.ExportTenantResponse]:
        """Streams everything of the tenant."""
        async with aclosing(self._store.export(current_tenant_id())) as records:
            async for kind, record_json in records:
                yield pb.ExportTenantResponse(kind=kind, record_json=record_json)

    async def ReencryptTenant(self, request: pb.ReencryptTenantRequest, context: object) -> pb.ReencryptTenantResponse:
        """Seals turns and names again."""
        count, done = await reseal_for_a_while(self._sealed_rows, current_tenant_id(), request.active_version)
        return pb.ReencryptTenantResponse(resealed_count=count, done=done)

    async def MoveTenant(self, request: pb.MoveTenantRequest, context: object) -> pb.MoveTenantResponse:
        """Moves the tenant's content, or removes what a finished move left behind."""
        half = self._mover.move if request.phase == pb.MOVE_PHASE_COPY else self._mover.drop_left
        moved = await half(current_tenant())
        return pb.MoveTenantResponse(moved=[pb.MovedRecords(kind=kind, count=count) for kind, count in sorted(moved.items())])

    async def ScanTenant(self, request: pb.ScanTenantRequest, context: object) -> pb.ScanTenantResponse:
        """Looks through this service's tables."""
        return scan_response(await self._store.scan(current_tenant_id(), list(request.canaries)))

    async def PurgeTenant(self, request: pb.PurgeTenantRequest, context: object) -> pb.PurgeTenantResponse:
        """Removes a batch of old conversations."""
        purged, more = await self._store.purge(current_tenant_id(), parse_timestamp(request.older_than, "older_than"))
        return pb.PurgeTenantResponse(purged=[pb.ErasedRecords(kind=kind, count=count) for kind, count in purged.items()], more=more)
