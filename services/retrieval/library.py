"""A tenant's library: puts documents in, takes them out, and finds chunks again.

Postgres says what a document is; the collection only points at it. A point without a current row is never answered, so a crash between
the two can hide a document for a moment (until it is indexed again), but can never show a stale or foreign one.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from services.kernel.errors import InvalidRequest, NotFound
from services.kernel.ids import DocumentId, TenantId
from services.retrieval.chunking import cut
from services.retrieval.document import DocumentDraft, DocumentStore, Hit, IndexedChunk, StoredDocument, VectorIndex
from services.retrieval.embedding import Embedder

log = structlog.get_logger(__name__)

# Chunks embedded and written in one go: bounds a request to Qdrant and how long the event loop is held.
BATCH_CHUNKS = 64
# Asked for beyond top_k, because points of replaced documents fall out when they are looked up.
SPARE_HITS = 5


@dataclass(frozen=True, slots=True)
class FoundChunk:
    """A chunk that answers a query; `score` is higher for nearer ones and comparable within one answer only."""

    chunk: IndexedChunk
    score: float


class Library:
    """The documents of every tenant, one tenant a call."""

    def __init__(self, store: DocumentStore, index: VectorIndex, embedder: Embedder) -> None:
        self._store = store
        self._index = index
        self._embedder = embedder

    async def put(self, tenant_id: TenantId, drafts: Sequence[DocumentDraft]) -> tuple[list[StoredDocument], int]:
        """Stores and indexes documents; returns them in order, and how many were new or changed.

        Idempotent. When it returns, a search finds them. Raises: InvalidRequest for a blank text, before anything is written; Unavailable.
        """
        cuts = [cut(draft.text) for draft in drafts]
        for position, chunks in enumerate(cuts):
            if not chunks:
                raise InvalidRequest(f"documents[{position}].text", "must contain more than white space")
        stored, changed = [], 0
        for draft, chunks in zip(drafts, cuts, strict=True):
            document = await self._store.put(tenant_id, draft, chunks)
            if not document.indexed:
                await self.index(tenant_id, document.document_id, document.row_digest)
                changed += 1
            stored.append(document)
        return stored, changed

    async def index(self, tenant_id: TenantId, document_id: DocumentId, row_digest: bytes) -> None:
        """Writes a document's points and removes those of its earlier content. Idempotent."""
        chunks = await self._store.chunks_of(tenant_id, document_id)
        for start in range(0, len(chunks), BATCH_CHUNKS):
            batch = chunks[start : start + BATCH_CHUNKS]
            texts = [f"{chunk.title}\n{chunk.chunk.text}" for chunk in batch]
            vectors = await self._embedder.embed(texts)
            points = [(chunk.chunk_id, text, vector) for chunk, text, vector in zip(batch, texts, vectors, strict=True)]
            await self._index.upsert(tenant_id, document_id, points)
            await asyncio.sleep(0)
        await self._index.remove_document(tenant_id, document_id, keep=[chunk.chunk_id for chunk in chunks])
        await self._store.mark_indexed(tenant_id, document_id, row_digest)

    async def get(self, tenant_id: TenantId, document_id: DocumentId) -> StoredDocument:
        """Returns a document. Raises: NotFound."""
        document = await self._store.get(tenant_id, document_id)
        if document is None:
            raise NotFound("document")
        return document

    async def list_page(self, tenant_id: TenantId, after_key: str, limit: int) -> list[StoredDocument]:
        """Returns up to `limit` documents after a key, in order of their keys."""
        return await self._store.list_page(tenant_id, after_key, limit)

    async def delete(self, tenant_id: TenantId, document_id: DocumentId) -> None:
        """Removes a document: gone from searches at once. Idempotent."""
        await self._store.delete(tenant_id, document_id)
        await self.remove_points(tenant_id, document_id)

    async def remove_points(self, tenant_id: TenantId, document_id: DocumentId) -> None:
        """Removes what a deleted document left in the collection."""
        await self._index.remove_document(tenant_id, document_id, keep=[])
        await self._store.forget_deleted(tenant_id, document_id)

    async def search(self, tenant_id: TenantId, query: str, top_k: int) -> list[FoundChunk]:
        """Returns the chunks nearest to a query, best first, at most `top_k`."""
        await self._store.warm(tenant_id)
        [vector] = await self._embedder.embed([query])
        hits = self._own(tenant_id, await self._index.search(tenant_id, query, vector, top_k + SPARE_HITS))
        if not hits:
            return []
        chunks = await self._store.chunks_by_id(tenant_id, [hit.chunk_id for hit in hits], top_k)
        current = {chunk.chunk_id: chunk for chunk in chunks}
        return [FoundChunk(current[hit.chunk_id], hit.score) for hit in hits if hit.chunk_id in current]

    def _own(self, tenant_id: TenantId, hits: Sequence[Hit]) -> list[Hit]:
        own = [hit for hit in hits if hit.tenant_id == tenant_id]
        for hit in hits:
            if hit.tenant_id != tenant_id:
                log.error("foreign_point_dropped", security_event=True, chunk_id=str(hit.chunk_id), point_tenant_id=str(hit.tenant_id))
        return own
