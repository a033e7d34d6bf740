"""SearchService: a query in, chunks out."""

from mesh.retrieval.v1 import search_service_pb2 as pb
from mesh.retrieval.v1 import search_service_pb2_grpc
from services.kernel.request_context import current_tenant_id
from services.retrieval.library import FoundChunk, Library
from services.retrieval.read_audit import ReadAudit

DEFAULT_TOP_K = 5


class SearchServicer(search_service_pb2_grpc.SearchServiceServicer):
    """Searches of the call's tenant."""

    def __init__(self, library: Library, reads: ReadAudit) -> None:
        self._library = library
        self._reads = reads

    async def Search(self, request: pb.SearchRequest, context: object) -> pb.SearchResponse:
        """Returns the chunks nearest to the query."""
        found = await self._library.search(current_tenant_id(), request.query, request.top_k or DEFAULT_TOP_K)
        await self._reads.documents_read("Search", [hit.chunk.document_id for hit in found])
        return pb.SearchResponse(chunks=[_to_proto(chunk) for chunk in found])


def _to_proto(found: FoundChunk) -> pb.FoundChunk:
    indexed = found.chunk
    return pb.FoundChunk(
        chunk_id=str(indexed.chunk_id),
        document_id=str(indexed.document_id),
        document_key=indexed.document_key,
        title=indexed.title,
        text=indexed.chunk.text,
        score=found.score,
        start_offset=indexed.chunk.start,
        end_offset=indexed.chunk.end,
    )
