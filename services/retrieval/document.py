"""A tenant's documents as this service knows them: values, identities and the ports they are kept behind."""

import hashlib
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from services.kernel.ids import DocumentId, TenantId
from services.kernel.placement import Place
from services.kernel.tenant_scan import ScannedStore
from services.retrieval.chunking import Chunk


@dataclass(frozen=True, slots=True)
class DocumentDraft:
    """A document as the tenant gives it; `key` is the tenant's own name for it."""

    key: str
    title: str
    text: str

    @property
    def content_sha256(self) -> bytes:
        """Identifies title and text: equal content needs no new vectors."""
        return hashlib.sha256(f"{len(self.title)}:{self.title}{self.text}".encode()).digest()


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as it is kept. `text` is None in lists. `indexed` is false while its points are not in the collection yet.

    `row_digest` stands for the content in the store: the same as content_sha256 unless the row is sealed.
    """

    document_id: DocumentId
    key: str
    title: str
    text: str | None
    content_sha256: bytes
    row_digest: bytes
    chunk_count: int
    indexed: bool
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True)
class IndexedChunk:
    """A chunk with its id and the document it belongs to."""

    chunk_id: uuid.UUID
    document_id: DocumentId
    document_key: str
    title: str
    chunk: Chunk


def chunk_id(document_id: DocumentId, row_digest: bytes, index: int) -> uuid.UUID:
    """Names a chunk by what it is cut from, so that indexing again writes the same points."""
    return uuid.uuid5(document_id, f"{row_digest.hex()}:{index}")


class DocumentStore(Protocol):
    """Where documents and chunks are kept: the truth about what a tenant knows."""

    async def warm(self, tenant_id: TenantId) -> None:
        """Makes sure that what is sealed of the tenant of the call in hand can be opened."""
        ...

    async def put(self, tenant_id: TenantId, draft: DocumentDraft, chunks: Sequence[Chunk]) -> StoredDocument:
        """Stores a document under its key, replacing changed content and chunks. `indexed` tells whether points are still owed."""
        ...

    async def place_of(self, tenant_id: TenantId) -> Place:
        """Returns where the tenant lives, as far as is known here."""
        ...

    async def mark_indexed(self, tenant_id: TenantId, document_id: DocumentId, row_digest: bytes, written_at: Place) -> bool:
        """Records that the points of this content are in the collection; False when the content or the place has changed meanwhile."""
        ...

    async def get(self, tenant_id: TenantId, document_id: DocumentId) -> StoredDocument | None:
        """Returns a document with its text; None when absent or foreign."""
        ...

    async def list_page(self, tenant_id: TenantId, after_key: str, limit: int) -> list[StoredDocument]:
        """Returns up to `limit` documents in order of their keys, from the first key after `after_key`."""
        ...

    async def delete(self, tenant_id: TenantId, document_id: DocumentId) -> None:
        """Removes a document and its chunks and records that its points are still to be removed; nothing when absent."""
        ...

    async def forget_deleted(self, tenant_id: TenantId, document_id: DocumentId) -> None:
        """Records that a removed document's points are gone."""
        ...

    async def chunks_of(self, tenant_id: TenantId, document_id: DocumentId) -> list[IndexedChunk]:
        """Returns a document's current chunks in order."""
        ...

    async def chunks_by_id(self, tenant_id: TenantId, chunk_ids: Sequence[uuid.UUID], limit: int) -> list[IndexedChunk]:
        """Returns the first `limit` of the chunks that are this tenant's and current, in the order of the ids."""
        ...

    async def erase(self, tenant_id: TenantId) -> dict[str, int]:
        """Removes everything of the tenant, for ever: what is written later is refused; returns counts by table."""
        ...

    async def is_erased(self, tenant_id: TenantId) -> bool:
        """Tells whether the tenant was erased."""
        ...

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts in every table what holds the tenant's id or one of the strings."""
        ...

    def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, dict[str, object]]]:
        """Yields (table, row) for everything of the tenant."""
        ...


@dataclass(frozen=True, slots=True)
class Hit:
    """A point of the collection that answers a search, as the collection tells it."""

    chunk_id: uuid.UUID
    tenant_id: uuid.UUID | None
    score: float


class VectorIndex(Protocol):
    """The tenant's collection: points named by chunk id, carrying ids only."""

    async def provision(self, tenant_id: TenantId) -> str:
        """Makes the tenant's collection and alias unless they are there; returns the collection's name."""
        ...

    async def upsert(self, tenant_id: TenantId, document_id: DocumentId, points: Sequence[tuple[uuid.UUID, str, list[float]]]) -> None:
        """Writes points (chunk id, text, dense vector); when it returns, a search finds them."""
        ...

    async def remove_document(self, tenant_id: TenantId, document_id: DocumentId, *, keep: Sequence[uuid.UUID]) -> None:
        """Removes a document's points except those to keep."""
        ...

    async def search(self, tenant_id: TenantId, query: str, vector: list[float], limit: int) -> list[Hit]:
        """Returns the best points, words and meaning fused, best first."""
        ...

    async def erase(self, tenant_id: TenantId) -> int:
        """Removes the collection and its alias; returns how many points it held."""
        ...

    async def scan(self, tenant_id: TenantId) -> Sequence[ScannedStore]:
        """Counts collections and aliases that carry the tenant's id, as the key with every right sees them."""
        ...
