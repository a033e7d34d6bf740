"""TenantLifecycleService of retrieval: the collection, the documents, and the end of both."""

from collections.abc import AsyncIterator

import orjson

from mesh.common.v1 import lifecycle_service_pb2 as pb
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.request_context import current_tenant_id
from services.kernel.sealed_writes import SealedRows, reseal_for_a_while
from services.retrieval.document import DocumentStore, VectorIndex


class LifecycleServicer(lifecycle_service_pb2_grpc.TenantLifecycleServiceServicer):
    """Beginning, end and export of the call's tenant in this service."""

    def __init__(self, store: DocumentStore, index: VectorIndex, sealed_rows: SealedRows) -> None:
        self._store = store
        self._index = index
        self._sealed_rows = sealed_rows

    async def ProvisionTenant(self, request: pb.ProvisionTenantRequest, context: object) -> pb.ProvisionTenantResponse:
        """Makes the tenant's collection."""
        return pb.ProvisionTenantResponse(resources=[f"qdrant collection {await self._index.provision(current_tenant_id())}"])

    async def EraseTenant(self, request: pb.EraseTenantRequest, context: object) -> pb.EraseTenantResponse:
        """Drops the collection, then removes the rows: a repeated call after a crash finds whichever is left."""
        points = await self._index.erase(current_tenant_id())
        erased = [pb.ErasedRecords(kind="qdrant:points", count=points)]
        erased += [
            pb.ErasedRecords(kind=f"postgres:retrieval.{table}", count=count)
            for table, count in (await self._store.erase(current_tenant_id())).items()
        ]
        return pb.EraseTenantResponse(erased=erased)

    async def ExportTenant(self, request: pb.ExportTenantRequest, context: object) -> AsyncIterator[pb.ExportTenantResponse]:
        """Streams the tenant's documents."""
        async for table, row in self._store.export(current_tenant_id()):
            yield pb.ExportTenantResponse(kind=f"postgres:retrieval.{table}", record_json=orjson.dumps(row, default=str))

    async def ReencryptTenant(self, request: pb.ReencryptTenantRequest, context: object) -> pb.ReencryptTenantResponse:
        """Seals documents and chunks again; points stay as they are."""
        count, done = await reseal_for_a_while(self._sealed_rows, current_tenant_id(), request.active_version)
        return pb.ReencryptTenantResponse(resealed_count=count, done=done)
