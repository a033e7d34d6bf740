"""DocumentService: documents in, documents out."""

from mesh.retrieval.v1 import document_service_pb2 as pb
from mesh.retrieval.v1 import document_service_pb2_grpc
from services.kernel.ids import DocumentId, parse_uuid
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size
from services.kernel.request_context import current_tenant_id
from services.kernel.timestamps import to_timestamp
from services.retrieval.document import DocumentDraft, StoredDocument
from services.retrieval.library import Library
from services.retrieval.read_audit import ReadAudit

_LISTING = "documents"


class DocumentServicer(document_service_pb2_grpc.DocumentServiceServicer):
    """Documents of the call's tenant."""

    def __init__(self, library: Library, reads: ReadAudit) -> None:
        self._library = library
        self._reads = reads

    async def UpsertDocuments(self, request: pb.UpsertDocumentsRequest, context: object) -> pb.UpsertDocumentsResponse:
        """Stores and indexes documents."""
        drafts = [DocumentDraft(given.document_key, given.title or given.document_key, given.text) for given in request.documents]
        stored, changed = await self._library.put(current_tenant_id(), drafts)
        return pb.UpsertDocumentsResponse(documents=[_to_proto(document) for document in stored], changed_count=changed)

    async def GetDocument(self, request: pb.GetDocumentRequest, context: object) -> pb.GetDocumentResponse:
        """Returns one document."""
        document = await self._library.get(current_tenant_id(), _document_id(request.document_id))
        await self._reads.documents_read("GetDocument", [document.document_id])
        return pb.GetDocumentResponse(document=_to_proto(document))

    async def ListDocuments(self, request: pb.ListDocumentsRequest, context: object) -> pb.ListDocumentsResponse:
        """Lists documents by key."""
        size = page_size(request.page_size)
        [after_key] = decode_page_token(request.page_token, _LISTING, 1) or [""]
        found = await self._library.list_page(current_tenant_id(), after_key, size + 1)
        page, following = cut_page(found, size, lambda last: encode_page_token(_LISTING, [last.key]))
        return pb.ListDocumentsResponse(documents=[_to_proto(document) for document in page], next_page_token=following)

    async def DeleteDocument(self, request: pb.DeleteDocumentRequest, context: object) -> pb.DeleteDocumentResponse:
        """Removes one document."""
        await self._library.delete(current_tenant_id(), _document_id(request.document_id))
        return pb.DeleteDocumentResponse()


def _document_id(text: str) -> DocumentId:
    return DocumentId(parse_uuid(text, "document_id"))


def _to_proto(document: StoredDocument) -> pb.Document:
    return pb.Document(
        document_id=str(document.document_id),
        document_key=document.key,
        title=document.title,
        text=document.text or "",
        chunk_count=document.chunk_count,
        content_sha256=document.content_sha256.hex(),
        create_time=to_timestamp(document.create_time),
        update_time=to_timestamp(document.update_time),
    )
