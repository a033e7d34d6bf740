"""What is sealed of documents and chunks, as values: what each is bound to, how it is sealed, and how rows become documents again."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from services.kernel.ids import DocumentId, TenantId
from services.kernel.sealing import TenantKeys, row_identity
from services.kernel.tenant_cipher import TenantCipher
from services.retrieval.chunking import Chunk
from services.retrieval.document import DocumentDraft, IndexedChunk, StoredDocument

_SHA256_BYTES = 32
_DIGEST_PURPOSE = b"retrieval.documents.content_sha256"


@dataclass(frozen=True, slots=True)
class DocumentColumns:
    """What is written of a draft: plain, or sealed with the plain columns empty."""

    title: str
    content: str
    row_digest: bytes
    sealed_header: bytes | None = None
    sealed_content: bytes | None = None
    key_version: int | None = None


def document_columns(document_id: DocumentId, draft: DocumentDraft, keys: TenantKeys | None) -> DocumentColumns:
    """Returns the columns; sealed when there are keys."""
    if keys is None:
        return DocumentColumns(draft.title, draft.text, draft.content_sha256)
    header = keys.seal(draft.content_sha256 + draft.title.encode(), header_identity(document_id))
    content = keys.seal(draft.text.encode(), content_identity(document_id))
    return DocumentColumns("", "", keyed_digest(keys, draft.key, draft.content_sha256), header, content, keys.active_version)


def keyed_digest(keys: TenantKeys, document_key: str, content_sha256: bytes, version: int | None = None) -> bytes:
    """Returns what stands for a content's digest in a sealed row: equal content under two keys does not show."""
    return keys.digest(row_identity(document_key, content_sha256), _DIGEST_PURPOSE, version)


def is_unchanged(known: asyncpg.Record, draft: DocumentDraft, keys: TenantKeys | None) -> bool:
    """Tells whether a row holds the draft already, sealed or plain as it would be written now."""
    version = known["key_version"]
    if keys is None or version is None:
        return keys is None and version is None and known["content_sha256"] == draft.content_sha256
    return keys.has(version) and known["content_sha256"] == keyed_digest(keys, draft.key, draft.content_sha256, version)


def header_identity(document_id: uuid.UUID) -> bytes:
    """Returns what a document's digest and title are bound to."""
    return row_identity("retrieval.documents", "header", document_id.bytes)


def content_identity(document_id: uuid.UUID) -> bytes:
    """Returns what a document's text is bound to."""
    return row_identity("retrieval.documents", "content", document_id.bytes)


def chunk_identity(chunk_id: uuid.UUID) -> bytes:
    """Returns what a chunk's text is bound to."""
    return row_identity("retrieval.chunks", "content", chunk_id.bytes)


class RowReader:
    """Rows into documents and chunks, with what is sealed opened; without any, no key is asked for."""

    def __init__(self, cipher: TenantCipher) -> None:
        self._cipher = cipher

    async def documents(self, tenant_id: TenantId, rows: Sequence[asyncpg.Record]) -> list[StoredDocument]:
        """Returns the documents of rows, in order; without their texts where the rows have none."""
        headers = await self._headers(tenant_id, rows)
        sealed = [row for row in rows if row["sealed_content"] is not None]
        items = [(row["sealed_content"], content_identity(row["document_id"])) for row in sealed]
        opened = await self._cipher.open_all(tenant_id, items)
        texts = {row["document_id"]: text.decode() for row, text in zip(sealed, opened, strict=True)}
        return [_document(row, headers.get(row["document_id"]), texts.get(row["document_id"], row["content"])) for row in rows]

    async def chunks(self, tenant_id: TenantId, rows: Sequence[asyncpg.Record]) -> list[IndexedChunk]:
        """Returns the chunks of rows, in order."""
        headers = await self._headers(tenant_id, rows)
        sealed = [row for row in rows if row["sealed_content"] is not None]
        items = [(row["sealed_content"], chunk_identity(row["chunk_id"])) for row in sealed]
        opened = await self._cipher.open_all(tenant_id, items)
        texts = {row["chunk_id"]: text.decode() for row, text in zip(sealed, opened, strict=True)}
        return [_chunk(row, headers.get(row["document_id"]), texts.get(row["chunk_id"], row["content"])) for row in rows]

    async def _headers(self, tenant_id: TenantId, rows: Sequence[asyncpg.Record]) -> dict[uuid.UUID, bytes]:
        # One header a document, however many of its chunks are read.
        sealed = {row["document_id"]: row["sealed_header"] for row in rows if row["sealed_header"] is not None}
        items = [(value, header_identity(document_id)) for document_id, value in sealed.items()]
        return dict(zip(sealed, await self._cipher.open_all(tenant_id, items), strict=True))


def _document(row: asyncpg.Record, header: bytes | None, text: str | None) -> StoredDocument:
    return StoredDocument(
        document_id=DocumentId(row["document_id"]),
        key=row["document_key"],
        title=row["title"] if header is None else header[_SHA256_BYTES:].decode(),
        text=text,
        content_sha256=row["content_sha256"] if header is None else header[:_SHA256_BYTES],
        row_digest=row["content_sha256"],
        chunk_count=row["chunk_count"],
        indexed=row["indexed"],
        create_time=row["create_time"],
        update_time=row["update_time"],
    )


def _chunk(row: asyncpg.Record, header: bytes | None, text: str) -> IndexedChunk:
    chunk = Chunk(row["position"], row["start_offset"], row["end_offset"], text)
    title = row["title"] if header is None else header[_SHA256_BYTES:].decode()
    return IndexedChunk(row["chunk_id"], DocumentId(row["document_id"]), row["document_key"], title, chunk)
