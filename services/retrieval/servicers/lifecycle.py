"""TenantLifecycleService of retrieval: the collection, the documents, and the end of both."""

from collections.abc import AsyncIterator

import orjson

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.errors import WrongState
from services.kernel.request_context import current_tenant_id
from services.kernel.tenant_scan import scan_response
from services.retrieval.document import DocumentStore, VectorIndex


class LifecycleServicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """Beginning, end and export of the call's tenant in this service."""

    def __init__(self, store: DocumentStore, index: VectorIndex) -> None:
        self._store = store
        self._index = index

    async def ProvisionTenant(self, request: pb.ProvisionTenantRequest, context: object) -> pb.ProvisionTenantResponse:
        """Makes the tenant's collection; never again for an erased one."""
        if await self._store.is_erased(current_tenant_id()):
            raise WrongState("tenant", "ERASED", "the tenant was erased and gets no collection any more")
        return pb.ProvisionTenantResponse(resources=[f"qdrant collection {await self._index.provision(current_tenant_id())}"])

    async def EraseTenant(self, request: pb.EraseTenantRequest, context: object) -> pb.EraseTenantResponse:
        """Removes the rows, then drops the collection: what is indexed late goes with it, and nothing makes it again."""
        removed = await self._store.erase(current_tenant_id())
        erased = [pb.ErasedRecords(kind=f"postgres:retrieval.{table}", count=count) for table, count in removed.items()]
        points = await self._index.erase(current_tenant_id())
        return pb.EraseTenantResponse(erased=[pb.ErasedRecords(kind="qdrant:points", count=points), *erased])

    async def ExportTenant(self, request: pb.ExportTenantRequest, context: object) -> AsyncIterator[pb.ExportTenantResponse]:
        """Streams the tenant's documents."""
        async for table, row in self._store.export(current_tenant_id()):
            yield pb.ExportTenantResponse(kind=f"postgres:retrieval.{table}", record_json=orjson.dumps(row, default=str))

    async def ScanTenant(self, request: pb.ScanTenantRequest, context: object) -> pb.ScanTenantResponse:
        """Looks through the tables and the vector store."""
        tables = await self._store.scan(current_tenant_id(), list(request.canaries))
        return scan_response([*tables, *await self._index.scan(current_tenant_id())])

    async def PurgeTenant(self, request: pb.PurgeTenantRequest, context: object) -> pb.PurgeTenantResponse:
        """Purges nothing: documents are what the tenant knows, and stay until it removes them."""
        return pb.PurgeTenantResponse()
