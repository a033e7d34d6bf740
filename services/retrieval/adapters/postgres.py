"""Documents and chunks in Postgres, under row-level security, and the jobs role's view of what is owed to the collections."""

import uuid
from collections.abc import AsyncIterator, Sequence

import asyncpg

from services.kernel.ids import DocumentId, TenantId, new_uuid7
from services.kernel.tenant_database import Connection, JobsDatabase, TenantDatabase
from services.kernel.tenant_scan import ScannedStore, scan_schema
from services.retrieval.chunking import Chunk
from services.retrieval.document import DocumentDraft, IndexedChunk, StoredDocument, chunk_id

SELECT_BY_KEY_FOR_UPDATE = """
SELECT document_id, document_key, title, NULL AS content, content_sha256, chunk_count, indexed, create_time, update_time
FROM retrieval.documents WHERE tenant_id = $1 AND document_key = $2 FOR UPDATE
"""
UPSERT_DOCUMENT = """
INSERT INTO retrieval.documents (tenant_id, document_id, document_key, title, content, content_sha256, chunk_count)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (tenant_id, document_key) DO UPDATE
SET title = excluded.title, content = excluded.content, content_sha256 = excluded.content_sha256, chunk_count = excluded.chunk_count,
    indexed = false, update_time = now()
RETURNING document_id, document_key, title, NULL AS content, content_sha256, chunk_count, indexed, create_time, update_time
"""
DELETE_CHUNKS = "DELETE FROM retrieval.chunks WHERE tenant_id = $1 AND document_id = $2"
INSERT_CHUNKS = """
INSERT INTO retrieval.chunks (tenant_id, chunk_id, document_id, position, start_offset, end_offset, content)
SELECT $1, chunk_id, $2, position, start_offset, end_offset, content
FROM unnest($3::uuid[], $4::integer[], $5::integer[], $6::integer[], $7::text[])
    AS c (chunk_id, position, start_offset, end_offset, content)
"""
MARK_INDEXED = """
UPDATE retrieval.documents SET indexed = true WHERE tenant_id = $1 AND document_id = $2 AND content_sha256 = $3
"""
SELECT_DOCUMENT = """
SELECT document_id, document_key, title, content, content_sha256, chunk_count, indexed, create_time, update_time
FROM retrieval.documents WHERE tenant_id = $1 AND document_id = $2
"""
SELECT_PAGE = """
SELECT document_id, document_key, title, NULL AS content, content_sha256, chunk_count, indexed, create_time, update_time
FROM retrieval.documents WHERE tenant_id = $1 AND document_key > $2 ORDER BY document_key LIMIT $3
"""
DELETE_DOCUMENT = "DELETE FROM retrieval.documents WHERE tenant_id = $1 AND document_id = $2 RETURNING document_id"
INSERT_REMOVED = "INSERT INTO retrieval.removed_documents (tenant_id, document_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
DELETE_REMOVED = "DELETE FROM retrieval.removed_documents WHERE tenant_id = $1 AND document_id = $2"
SELECT_CHUNKS = """
SELECT c.chunk_id, c.document_id, d.document_key, d.title, c.position, c.start_offset, c.end_offset, c.content
FROM retrieval.chunks c JOIN retrieval.documents d ON d.tenant_id = c.tenant_id AND d.document_id = c.document_id
WHERE c.tenant_id = $1 AND c.document_id = $2 ORDER BY c.position
"""
FIND_CHUNKS = """
SELECT chunk_id, document_id, document_key, title, "position", start_offset, end_offset, content FROM retrieval.find_chunks($1, $2)
"""
# Alone in its transaction with the removal: writers that passed are waited for, later ones find the tombstone.
LOCK_ERASURE = "SELECT pg_advisory_xact_lock(retrieval.erasure_lock($1))"
INSERT_TOMBSTONE = "INSERT INTO retrieval.erased_tenants (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
GET_TOMBSTONE = "SELECT true FROM retrieval.erased_tenants WHERE tenant_id = $1"
COUNT_AND_DELETE = (
    ("chunks", "WITH gone AS (DELETE FROM retrieval.chunks WHERE tenant_id = $1 RETURNING 1) SELECT count(*) FROM gone"),
    ("documents", "WITH gone AS (DELETE FROM retrieval.documents WHERE tenant_id = $1 RETURNING 1) SELECT count(*) FROM gone"),
    (
        "removed_documents",
        "WITH gone AS (DELETE FROM retrieval.removed_documents WHERE tenant_id = $1 RETURNING 1) SELECT count(*) FROM gone",
    ),
)
EXPORT_DOCUMENTS = """
SELECT document_id, document_key, title, content, create_time, update_time
FROM retrieval.documents WHERE tenant_id = $1 AND document_key > $2 ORDER BY document_key LIMIT 100
"""
SELECT_UNINDEXED = """
SELECT tenant_id, document_id, content_sha256 FROM retrieval.documents
WHERE NOT indexed AND update_time < now() - interval '10 seconds' ORDER BY update_time LIMIT $1
"""
SELECT_UNDELETED = """
SELECT tenant_id, document_id FROM retrieval.removed_documents
WHERE remove_time < now() - interval '10 seconds' ORDER BY remove_time LIMIT $1
"""


class PostgresDocumentStore:
    """The documents of every tenant, one tenant a transaction."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase) -> None:
        self._database = database
        self._jobs = jobs

    async def put(self, tenant_id: TenantId, draft: DocumentDraft, chunks: Sequence[Chunk]) -> StoredDocument:
        """Stores a document under its key; an unchanged one is left alone."""
        async with self._database.transaction(tenant_id) as connection:
            known = await connection.fetchrow(SELECT_BY_KEY_FOR_UPDATE, tenant_id, draft.key)
            if known is not None and known["content_sha256"] == draft.content_sha256:
                return _document(known)
            row = await connection.fetchrow(
                UPSERT_DOCUMENT, tenant_id, new_uuid7(), draft.key, draft.title, draft.text, draft.content_sha256, len(chunks)
            )
            document = _document(row)
            await self._replace_chunks(connection, tenant_id, document, chunks)
            return document

    async def _replace_chunks(self, connection: Connection, tenant_id: TenantId, document: StoredDocument, chunks: Sequence[Chunk]) -> None:
        await connection.execute(DELETE_CHUNKS, tenant_id, document.document_id)
        await connection.execute(
            INSERT_CHUNKS,
            tenant_id,
            document.document_id,
            [chunk_id(document.document_id, document.content_sha256, chunk.index) for chunk in chunks],
            [chunk.index for chunk in chunks],
            [chunk.start for chunk in chunks],
            [chunk.end for chunk in chunks],
            [chunk.text for chunk in chunks],
        )

    async def mark_indexed(self, tenant_id: TenantId, document_id: DocumentId, content_sha256: bytes) -> bool:
        """Records that the points of this content are in the collection."""
        async with self._database.transaction(tenant_id) as connection:
            done: str = await connection.execute(MARK_INDEXED, tenant_id, document_id, content_sha256)
            return done == "UPDATE 1"

    async def get(self, tenant_id: TenantId, document_id: DocumentId) -> StoredDocument | None:
        """Returns a document with its text."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(SELECT_DOCUMENT, tenant_id, document_id)
        return None if row is None else _document(row)

    async def list_page(self, tenant_id: TenantId, after_key: str, limit: int) -> list[StoredDocument]:
        """Returns documents in order of their keys."""
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(SELECT_PAGE, tenant_id, after_key, limit)
        return [_document(row) for row in rows]

    async def delete(self, tenant_id: TenantId, document_id: DocumentId) -> None:
        """Removes a document with its chunks and notes the points that are left."""
        async with self._database.transaction(tenant_id) as connection:
            if await connection.fetchval(DELETE_DOCUMENT, tenant_id, document_id) is not None:
                await connection.execute(INSERT_REMOVED, tenant_id, document_id)

    async def forget_deleted(self, tenant_id: TenantId, document_id: DocumentId) -> None:
        """Forgets the note on a removed document's points."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(DELETE_REMOVED, tenant_id, document_id)

    async def chunks_of(self, tenant_id: TenantId, document_id: DocumentId) -> list[IndexedChunk]:
        """Returns a document's chunks in order."""
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(SELECT_CHUNKS, tenant_id, document_id)
        return [_chunk(row) for row in rows]

    async def chunks_by_id(self, tenant_id: TenantId, chunk_ids: Sequence[uuid.UUID]) -> list[IndexedChunk]:
        """Returns this tenant's current chunks among the ids, in one round trip."""
        rows = await self._database.call(tenant_id, FIND_CHUNKS, tenant_id, list(chunk_ids))
        return [_chunk(row) for row in rows]

    async def erase(self, tenant_id: TenantId) -> dict[str, int]:
        """Removes everything of the tenant, for ever."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_ERASURE, tenant_id)
            await connection.execute(INSERT_TOMBSTONE, tenant_id)
            return {table: await connection.fetchval(statement, tenant_id) for table, statement in COUNT_AND_DELETE}

    async def is_erased(self, tenant_id: TenantId) -> bool:
        """Tells whether the tenant was erased."""
        async with self._database.transaction(tenant_id) as connection:
            return bool(await connection.fetchval(GET_TOMBSTONE, tenant_id))

    async def scan(self, tenant_id: TenantId, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Counts what holds the tenant's id or one of the strings; the jobs role sees every tenant's ids and digests, no texts."""
        return await scan_schema(self._database, self._jobs, "retrieval", tenant_id, canaries, kept=frozenset({"erased_tenants"}))

    async def export(self, tenant_id: TenantId) -> AsyncIterator[tuple[str, dict[str, object]]]:
        """Yields the documents with their texts; chunks can be cut again."""
        after = ""
        while True:
            async with self._database.transaction(tenant_id) as connection:
                rows = await connection.fetch(EXPORT_DOCUMENTS, tenant_id, after)
            for row in rows:
                yield "documents", dict(row)
            if not rows:
                return
            after = rows[-1]["document_key"]


class PostgresOwedWork:
    """What is owed to the collections, seen through the jobs role."""

    def __init__(self, database: JobsDatabase) -> None:
        self._database = database

    async def unindexed(self, limit: int) -> list[tuple[TenantId, DocumentId, bytes]]:
        """Returns documents that wait for their points."""
        rows = await self._database.call(SELECT_UNINDEXED, limit)
        return [(TenantId(row["tenant_id"]), DocumentId(row["document_id"]), row["content_sha256"]) for row in rows]

    async def undeleted(self, limit: int) -> list[tuple[TenantId, DocumentId]]:
        """Returns removed documents whose points may be left."""
        rows = await self._database.call(SELECT_UNDELETED, limit)
        return [(TenantId(row["tenant_id"]), DocumentId(row["document_id"])) for row in rows]


def _document(row: asyncpg.Record) -> StoredDocument:
    return StoredDocument(
        document_id=DocumentId(row["document_id"]),
        key=row["document_key"],
        title=row["title"],
        text=row["content"],
        content_sha256=row["content_sha256"],
        chunk_count=row["chunk_count"],
        indexed=row["indexed"],
        create_time=row["create_time"],
        update_time=row["update_time"],
    )


def _chunk(row: asyncpg.Record) -> IndexedChunk:
    chunk = Chunk(row["position"], row["start_offset"], row["end_offset"], row["content"])
    return IndexedChunk(row["chunk_id"], DocumentId(row["document_id"]), row["document_key"], row["title"], chunk)
