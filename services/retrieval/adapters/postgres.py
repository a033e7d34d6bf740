"""Documents and chunks in Postgres, under row-level security, and the jobs role's view of what is owed to the collections."""

import uuid
from collections.abc import AsyncIterator, Sequence

import asyncpg
import structlog

from services.kernel.errors import MeshError, NotFound
from services.kernel.ids import DocumentId, TenantId, new_uuid7
from services.kernel.placement import HOME, Place, PlacementKind
from services.kernel.sealed_writes import write_sealed
from services.kernel.sealing import TenantKeys
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_database import Connection, JobsDatabase, TenantDatabase
from services.kernel.tenant_scan import ScannedStore, scan_schema
from services.retrieval.adapters.postgres_sealing import REQUIRE_VERSION
from services.retrieval.adapters.sealed_values import RowReader, chunk_identity, document_columns, is_unchanged
from services.retrieval.chunking import Chunk
from services.retrieval.document import DocumentDraft, IndexedChunk, StoredDocument, chunk_id

log = structlog.get_logger(__name__)

SELECT_BY_KEY_FOR_UPDATE = """
SELECT document_id, document_key, title, NULL AS content, content_sha256, chunk_count, indexed, create_time, update_time,
       sealed_header, NULL::bytea AS sealed_content, key_version
FROM documents WHERE tenant_id = $1 AND document_key = $2 FOR UPDATE
"""
UPSERT_DOCUMENT = """
INSERT INTO documents (
    tenant_id, document_id, document_key, title, content, content_sha256, chunk_count, sealed_header, sealed_content, key_version
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
ON CONFLICT (tenant_id, document_key) DO UPDATE
SET title = excluded.title, content = excluded.content, content_sha256 = excluded.content_sha256, chunk_count = excluded.chunk_count,
    sealed_header = excluded.sealed_header, sealed_content = excluded.sealed_content, key_version = excluded.key_version,
    indexed = false, update_time = now()
RETURNING document_id, document_key, title, NULL AS content, content_sha256, chunk_count, indexed, create_time, update_time,
       sealed_header, NULL::bytea AS sealed_content, key_version
"""
DELETE_CHUNKS = "DELETE FROM chunks WHERE tenant_id = $1 AND document_id = $2"
INSERT_CHUNKS = """
INSERT INTO chunks (tenant_id, chunk_id, document_id, position, start_offset, end_offset, content, sealed_content, key_version)
SELECT $1, chunk_id, $2, position, start_offset, end_offset, content, sealed_content, $9
FROM unnest($3::uuid[], $4::integer[], $5::integer[], $6::integer[], $7::text[], $8::bytea[])
    AS c (chunk_id, position, start_offset, end_offset, content, sealed_content)
"""
MARK_INDEXED = """
UPDATE documents SET indexed = true WHERE tenant_id = $1 AND document_id = $2 AND content_sha256 = $3
"""
SELECT_DOCUMENT = """
SELECT document_id, document_key, title, content, content_sha256, chunk_count, indexed, create_time, update_time,
       sealed_header, sealed_content
FROM documents WHERE tenant_id = $1 AND document_id = $2
"""
SELECT_PAGE = """
SELECT document_id, document_key, title, NULL AS content, content_sha256, chunk_count, indexed, create_time, update_time,
       sealed_header, NULL::bytea AS sealed_content, key_version
FROM documents WHERE tenant_id = $1 AND document_key > $2 ORDER BY document_key LIMIT $3
"""
DELETE_DOCUMENT = "DELETE FROM documents WHERE tenant_id = $1 AND document_id = $2 RETURNING document_id"
INSERT_REMOVED = "INSERT INTO removed_documents (tenant_id, document_id) VALUES ($1, $2) ON CONFLICT DO NOTHING"
DELETE_REMOVED = "DELETE FROM removed_documents WHERE tenant_id = $1 AND document_id = $2"
SELECT_CHUNKS = """
SELECT c.chunk_id, c.document_id, d.document_key, d.title, c.position, c.start_offset, c.end_offset, c.content,
       d.sealed_header, c.sealed_content
FROM chunks c JOIN documents d ON d.tenant_id = c.tenant_id AND d.document_id = c.document_id
WHERE c.tenant_id = $1 AND c.document_id = $2 ORDER BY c.position
"""
FIND_CHUNKS = """
SELECT chunk_id, document_id, document_key, title, "position", start_offset, end_offset, content, sealed_header, sealed_content
FROM find_chunks($1, $2, $3)
"""
# Alone in its transaction with the removal: writers that passed are waited for, later ones find the tombstone.
LOCK_ERASURE = "SELECT pg_advisory_xact_lock(retrieval.erasure_lock($1))"
INSERT_TOMBSTONE = "INSERT INTO retrieval.erased_tenants (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
GET_TOMBSTONE = "SELECT true FROM retrieval.erased_tenants WHERE tenant_id = $1"
COUNT_AND_DELETE = (
    ("chunks", "WITH gone AS (DELETE FROM chunks WHERE tenant_id = $1 RETURNING 1) SELECT count(*) FROM gone"),
    ("documents", "WITH gone AS (DELETE FROM documents WHERE tenant_id = $1 RETURNING 1) SELECT count(*) FROM gone"),
    (
        "removed_documents",
        "WITH gone AS (DELETE FROM removed_documents WHERE tenant_id = $1 RETURNING 1) SELECT count(*) FROM gone",
    ),
    ("retrieval_sealing", "WITH gone AS (DELETE FROM retrieval_sealing WHERE tenant_id = $1 RETURNING 1) SELECT count(*) FROM gone"),
)
EXPORT_DOCUMENTS = """
SELECT document_id, document_key, title, content, content_sha256, chunk_count, indexed, create_time, update_time,
       sealed_header, sealed_content
FROM documents WHERE tenant_id = $1 AND document_key > $2 ORDER BY document_key LIMIT 100
"""
# Over all tenants of the pool: the jobs role finds no table without its schema.
SELECT_UNINDEXED = """
SELECT tenant_id, document_id, content_sha256 FROM retrieval.documents
WHERE NOT indexed AND update_time < now() - interval '10 seconds' ORDER BY update_time LIMIT $1
"""
# Of one tenant outside the pool, read as that tenant: nobody works there over all tenants.
SELECT_ITS_UNINDEXED = """
SELECT tenant_id, document_id, content_sha256 FROM documents
WHERE tenant_id = $1 AND NOT indexed AND update_time < now() - interval '10 seconds' ORDER BY update_time LIMIT $2
"""
SELECT_ITS_UNDELETED = """
SELECT tenant_id, document_id FROM removed_documents
WHERE tenant_id = $1 AND remove_time < now() - interval '10 seconds' ORDER BY remove_time LIMIT $2
"""
SELECT_PLACED = "SELECT tenant_id, kind FROM retrieval.retrieval_placed_tenants WHERE state = 'AWAY' ORDER BY tenant_id"
SELECT_UNDELETED = """
SELECT tenant_id, document_id FROM retrieval.removed_documents
WHERE remove_time < now() - interval '10 seconds' ORDER BY remove_time LIMIT $1
"""


class PostgresDocumentStore:
    """The documents of every tenant, one tenant a transaction. Sealed when its context says so, opened whenever sealed."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase, cipher: TenantCipher) -> None:
        self._database = database
        self._jobs = jobs
        self._cipher = cipher
        self._reader = RowReader(cipher)

    async def warm(self, tenant_id: TenantId) -> None:
        """Fetches the keys of a tenant whose content is sealed: what a crash left half-done is repaired with them, in nobody's name."""
        if self._cipher.is_sealing(tenant_id):
            await self._cipher.keys(tenant_id)

    async def put(self, tenant_id: TenantId, draft: DocumentDraft, chunks: Sequence[Chunk]) -> StoredDocument:
        """Stores a document under its key; an unchanged one is left alone."""
        if not self._cipher.is_sealing(tenant_id):
            return await self._put(tenant_id, draft, chunks, None)
        return await write_sealed(self._cipher, tenant_id, lambda keys: self._put(tenant_id, draft, chunks, keys))

    async def _put(self, tenant_id: TenantId, draft: DocumentDraft, chunks: Sequence[Chunk], keys: TenantKeys | None) -> StoredDocument:
        async with self._database.transaction(tenant_id) as connection:
            if keys is not None:
                await connection.execute(REQUIRE_VERSION, tenant_id, keys.active_version)
            row = await connection.fetchrow(SELECT_BY_KEY_FOR_UPDATE, tenant_id, draft.key)
            if row is None or not is_unchanged(row, draft, keys):
                planned = DocumentId(new_uuid7() if row is None else row["document_id"])
                row = await self._upsert(connection, tenant_id, planned, draft, len(chunks), keys)
                if row["document_id"] != planned:
                    # Another writer made the document first: what is sealed is bound to its id, which is known only now.
                    row = await self._upsert(connection, tenant_id, row["document_id"], draft, len(chunks), keys)
                await self._replace_chunks(connection, tenant_id, row, chunks, keys)
        [document] = await self._reader.documents(tenant_id, [row])
        return document

    async def _upsert(
        self,
        connection: Connection,
        tenant_id: TenantId,
        document_id: DocumentId,
        draft: DocumentDraft,
        chunk_count: int,
        keys: TenantKeys | None,
    ) -> asyncpg.Record:
        columns = document_columns(document_id, draft, keys)
        return await connection.fetchrow(
            UPSERT_DOCUMENT,
            tenant_id,
            document_id,
            draft.key,
            columns.title,
            columns.content,
            columns.row_digest,
            chunk_count,
            columns.sealed_header,
            columns.sealed_content,
            columns.key_version,
        )

    async def _replace_chunks(
        self, connection: Connection, tenant_id: TenantId, row: asyncpg.Record, chunks: Sequence[Chunk], keys: TenantKeys | None
    ) -> None:
        ids = [chunk_id(row["document_id"], row["content_sha256"], chunk.index) for chunk in chunks]
        texts: list[str] = [chunk.text if keys is None else "" for chunk in chunks]
        named = zip(ids, chunks, strict=True)
        sealed = [None if keys is None else keys.seal(chunk.text.encode(), chunk_identity(name)) for name, chunk in named]
        await connection.execute(DELETE_CHUNKS, tenant_id, row["document_id"])
        await connection.execute(
            INSERT_CHUNKS,
            tenant_id,
            row["document_id"],
            ids,
            [chunk.index for chunk in chunks],
            [chunk.start for chunk in chunks],
            [chunk.end for chunk in chunks],
            texts,
            sealed,
            None if keys is None else keys.active_version,
        )

    async def place_of(self, tenant_id: TenantId) -> Place:
        """Returns where the tenant lives, as far as is known here: what is written there counts once `mark_indexed` agrees."""
        return await self._database.place_of(tenant_id)

    async def mark_indexed(self, tenant_id: TenantId, document_id: DocumentId, row_digest: bytes, written_at: Place) -> bool:
        """Records that the points of this content are in the collection of the place they were written at."""
        async with self._database.transaction(tenant_id) as connection:
            # Inside the transaction the place cannot change; before it the tenant may have moved away from the points.
            if await self._database.place_of(tenant_id) != written_at:
                return False
            done: str = await connection.execute(MARK_INDEXED, tenant_id, document_id, row_digest)
            return done == "UPDATE 1"

    async def get(self, tenant_id: TenantId, document_id: DocumentId) -> StoredDocument | None:
        """Returns a document with its text."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(SELECT_DOCUMENT, tenant_id, document_id)
        return None if row is None else (await self._reader.documents(tenant_id, [row]))[0]

    async def list_page(self, tenant_id: TenantId, after_key: str, limit: int) -> list[StoredDocument]:
        """Returns documents in order of their keys."""
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(SELECT_PAGE, tenant_id, after_key, limit)
        return await self._reader.documents(tenant_id, rows)

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
        return await self._reader.chunks(tenant_id, rows)

    async def chunks_by_id(self, tenant_id: TenantId, chunk_ids: Sequence[uuid.UUID], limit: int) -> list[IndexedChunk]:
        """Returns the first of this tenant's current chunks among the ids, in one round trip; no other is opened."""
        rows = await self._database.call(tenant_id, FIND_CHUNKS, tenant_id, list(chunk_ids), limit)
        return await self._reader.chunks(tenant_id, rows)

    async def erase(self, tenant_id: TenantId) -> dict[str, int]:
        """Removes everything of the tenant, for ever, wherever it lives."""
        # The tombstone stands at home, whose tables are all that outlives the tenant: a place of its own is dropped whole.
        async with self._database.transaction_at(HOME, tenant_id, walled=False) as connection:
            await connection.execute(LOCK_ERASURE, tenant_id)
            await connection.execute(INSERT_TOMBSTONE, tenant_id)
            removed = await _remove(connection, tenant_id)
        try:
            async with self._database.transaction(tenant_id) as connection:
                elsewhere = await _remove(connection, tenant_id)
        except NotFound:
            # Nobody knows a place of its own any more: it was dropped with all that was in it.
            elsewhere = {}
        return {table: count + elsewhere.get(table, 0) for table, count in removed.items()}

    async def is_erased(self, tenant_id: TenantId) -> bool:
        """Tells whether the tenant was erased."""
        async with self._database.transaction_at(HOME, tenant_id, walled=False) as connection:
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
            for document in await self._reader.documents(tenant_id, rows):
                yield (
                    "documents",
                    {
                        "document_id": document.document_id,
                        "document_key": document.key,
                        "title": document.title,
                        "content": document.text,
                        "create_time": document.create_time,
                        "update_time": document.update_time,
                    },
                )
            if not rows:
                return
            after = rows[-1]["document_key"]


class PostgresOwedWork:
    """What is owed to the collections: in the pool seen through the jobs role, elsewhere tenant by tenant."""

    def __init__(self, jobs: JobsDatabase, database: TenantDatabase) -> None:
        self._jobs = jobs
        self._database = database

    async def unindexed(self, limit: int) -> list[tuple[TenantId, DocumentId, bytes]]:
        """Returns documents that wait for their points."""
        rows = [*await self._jobs.call(SELECT_UNINDEXED, limit), *await self._of_placed(SELECT_ITS_UNINDEXED, limit)]
        return [(TenantId(row["tenant_id"]), DocumentId(row["document_id"]), row["content_sha256"]) for row in rows]

    async def undeleted(self, limit: int) -> list[tuple[TenantId, DocumentId]]:
        """Returns removed documents whose points may be left."""
        rows = [*await self._jobs.call(SELECT_UNDELETED, limit), *await self._of_placed(SELECT_ITS_UNDELETED, limit)]
        return [(TenantId(row["tenant_id"]), DocumentId(row["document_id"])) for row in rows]

    async def _of_placed(self, sql: str, limit: int) -> list[asyncpg.Record]:
        found: list[asyncpg.Record] = []
        for row in await self._jobs.call(SELECT_PLACED):
            tenant_id = TenantId(row["tenant_id"])
            try:
                # A silo's address is a secret told to the tenant's own calls alone: until one came by, its repairs wait.
                place = self._database.known_place(tenant_id, PlacementKind(row["kind"]))
                if place is not None:
                    async with self._database.transaction_at(place, tenant_id) as connection:
                        found += await connection.fetch(sql, tenant_id, limit)
            except asyncpg.UndefinedTableError:
                # On the list since before its tables are made: nothing is owed there, and others' repairs do not wait for it.
                continue
            except MeshError as error:
                log.warning("repair_skips_place", tenant_id=str(tenant_id), reason=error.reason_name)
        return found


async def _remove(connection: Connection, tenant_id: TenantId) -> dict[str, int]:
    return {table: await connection.fetchval(statement, tenant_id) for table, statement in COUNT_AND_DELETE}
