"""TenantLifecycleService of retrieval: the collection, the documents, and the end of both."""

from collections.abc import AsyncIterator

import orjson

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.errors import WrongState
from services.kernel.place_making import PlaceMaker
from services.kernel.request_context import current_tenant, current_tenant_id
from services.kernel.sealed_writes import SealedRows, reseal_for_a_while
from services.kernel.tenant_database import PlaceMissing
from services.kernel.tenant_moving import TenantMover
from services.kernel.tenant_scan import scan_response
from services.retrieval.document import DocumentStore, VectorIndex


class LifecycleServicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """Beginning, end and export of the call's tenant in this service."""

    def __init__(self, store: DocumentStore, index: VectorIndex, places: PlaceMaker, mover: TenantMover, sealed_rows: SealedRows) -> None:
        self._store = store
        self._index = index
        self._places = places
        self._mover = mover
        self._sealed_rows = sealed_rows

    async def ProvisionTenant(self, request: pb.ProvisionTenantRequest, context: object) -> pb.ProvisionTenantResponse:
        """Makes the tables of a tenant that has its own, and the collection; never again for an erased one."""
        if await self._store.is_erased(current_tenant_id()):
            raise WrongState("tenant", "ERASED", "the tenant was erased and gets no collection any more")
        made = await self._places.make(current_tenant())
        return pb.ProvisionTenantResponse(resources=[*made, f"qdrant collection {await self._index.provision(current_tenant_id())}"])

    async def EraseTenant(self, request: pb.EraseTenantRequest, context: object) -> pb.EraseTenantResponse:
        """Removes the rows, then drops the collection: what is indexed late goes with it, and nothing makes it again."""
        try:
            rows = await self._store.erase(current_tenant_id())
        except PlaceMissing:
            # A repeated call after the tenant's own place was dropped: nothing is left to count.
            rows = {}
        erased = [pb.ErasedRecords(kind=f"postgres:retrieval.{table}", count=count) for table, count in rows.items()]
        erased.append(pb.ErasedRecords(kind="qdrant:points", count=await self._index.erase(current_tenant_id())))
        await self._mover.erase_copies(current_tenant())
        await self._places.forget(current_tenant_id())
        return pb.EraseTenantResponse(erased=erased)

    async def ExportTenant(self, request: pb.ExportTenantRequest, context: object) -> AsyncIterator[pb.ExportTenantResponse]:
        """Streams the tenant's documents."""
        async for table, row in self._store.export(current_tenant_id()):
            yield pb.ExportTenantResponse(kind=f"postgres:retrieval.{table}", record_json=orjson.dumps(row, default=str))

    async def ReencryptTenant(self, request: pb.ReencryptTenantRequest, context: object) -> pb.ReencryptTenantResponse:
        """Seals documents and chunks again; points stay as they are."""
        count, done = await reseal_for_a_while(self._sealed_rows, current_tenant_id(), request.active_version)
        return pb.ReencryptTenantResponse(resealed_count=count, done=done)

    async def MoveTenant(self, request: pb.MoveTenantRequest, context: object) -> pb.MoveTenantResponse:
        """Moves the tenant's content, or removes what a finished move left behind."""
        half = self._mover.move if request.phase == pb.MOVE_PHASE_COPY else self._mover.drop_left
        moved = await half(current_tenant())
        return pb.MoveTenantResponse(moved=[pb.MovedRecords(kind=kind, count=count) for kind, count in sorted(moved.items())])

    async def ScanTenant(self, request: pb.ScanTenantRequest, context: object) -> pb.ScanTenantResponse:
        """Looks through the tables and the vector store."""
        tables = await self._store.scan(current_tenant_id(), list(request.canaries))
        return scan_response([*tables, *await self._index.scan(current_tenant_id())])

    async def PurgeTenant(self, request: pb.PurgeTenantRequest, context: object) -> pb.PurgeTenantResponse:
        """Purges nothing: documents are what the tenant knows, and stay until it removes them."""
        return pb.PurgeTenantResponse()
