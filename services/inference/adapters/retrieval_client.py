"""The documents port over the retrieval service."""

from mesh.retrieval.v1 import search_service_pb2 as pb
from mesh.retrieval.v1.search_service_pb2_grpc import SearchServiceStub
from services.inference.call import Found
from services.inference.prompt_assembly import Chunk
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext

SEARCH_SECONDS = 3.0
MAX_QUERY_LENGTH = 10_000


class RetrievalDocuments:
    """Searches the tenant's collection."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = SearchServiceStub(channel.channel)

    async def search(self, tenant: TenantContext, query: str, top_k: int) -> Found:
        """Returns the chunks nearest to the query, best first, blank ones left out."""
        # The end of a long message holds the question.
        request = pb.SearchRequest(query=query[-MAX_QUERY_LENGTH:], top_k=top_k)
        response = await self._channel.unary(self._stub.Search, request, timeout_seconds=SEARCH_SECONDS, tenant=tenant, idempotent=True)
        return Found(
            tuple(
                Chunk(chunk.chunk_id, chunk.document_id, chunk.document_key, chunk.title, chunk.text)
                for chunk in response.chunks
                if chunk.text.strip()
            )
        )
