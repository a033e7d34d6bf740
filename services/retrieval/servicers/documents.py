"""DocumentService: documents in, documents out."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from mesh.retrieval.v1 import document_service_pb2 as pb
from mesh.retrieval.v1 import document_service_pb2_grpc
from services.kernel.ids import DocumentId, TenantId, parse_uuid
from services.kernel.request_context import current_tenant
from services.retrieval import page_token
from services.retrieval.document import DocumentDraft, StoredDocument
from services.retrieval.library import Library

DEFAULT_PAGE_SIZE = 100


class DocumentServicer(document_service_pb2_grpc.DocumentServiceServicer):
    """Documents of the call's tenant."""

    def __init__(self, library: Library) -> None:
        self._library = library

    async def UpsertDocuments(self, request: pb.UpsertDocumentsRequest, context: object) -> pb.UpsertDocumentsResponse:
        """Stores and indexes documents."""
        drafts = [DocumentDraft(given.document_key, given.title or given.document_key, given.text) for given in request.documents]
        stored, changed = await self._library.put(tenant(), drafts)
        return pb.UpsertDocumentsResponse(documents=[_to_proto(document) for document in stored], changed_count=changed)

    async def GetDocument(self, request: pb.GetDocumentRequest, context: object) -> pb.GetDocumentResponse:
        """Returns one document."""
        return pb.GetDocumentResponse(document=_to_proto(await self._library.get(tenant(), _document_id(request.document_id))))

    async def ListDocuments(self, request: pb.ListDocumentsRequest, context: object) -> pb.ListDocumentsResponse:
        """Lists documents by key."""
        size = request.page_size or DEFAULT_PAGE_SIZE
        found = await self._library.list_page(tenant(), page_token.decode(request.page_token), size + 1)
        following = page_token.encode(found[size - 1].key) if len(found) > size else ""
        return pb.ListDocumentsResponse(documents=[_to_proto(document) for document in found[:size]], next_page_token=following)

    async def DeleteDocument(self, request: pb.DeleteDocumentRequest, context: object) -> pb.DeleteDocumentResponse:
        """Removes one document."""
        await self._library.delete(tenant(), _document_id(request.document_id))
        return pb.DeleteDocumentResponse()


def tenant() -> TenantId:
    """Returns the call's tenant; the policy has made sure there is one."""
    tenant_id = current_tenant().tenant_id
    if tenant_id is None:
        msg = "the method's policy admitted a call without a tenant"
        raise RuntimeError(msg)
    return tenant_id


def _document_id(text: str) -> DocumentId:
    return DocumentId(parse_uuid(text, "document_id"))


def _timestamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def _to_proto(document: StoredDocument) -> pb.Document:
    return pb.Document(
        document_id=str(document.document_id),
        document_key=document.key,
        title=document.title,
        text=document.text or "",
        chunk_count=document.chunk_count,
        content_sha256=document.content_sha256.hex(),
        create_time=_timestamp(document.create_time),
        update_time=_timestamp(document.update_time),
    )
