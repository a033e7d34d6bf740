"""Documents and chunks sealed again under a newer key, page by page, beside readers and writers."""

from collections.abc import Sequence

from services.kernel.ids import TenantId
from services.kernel.sealed_writes import write_sealed
from services.kernel.sealing import TenantKeys
from services.kernel.tenant_cipher import TenantCipher
from services.kernel.tenant_database import Connection, TenantDatabase
from services.retrieval.adapters.sealed_values import chunk_identity, content_identity, header_identity, keyed_digest

BEGIN = "SELECT retrieval.begin_key_version($1, $2)"
REQUIRE_VERSION = "SELECT retrieval.require_key_version($1, $2)"
# Rows in a writer's hands are passed over: waiting for them could close a circle, and they are asked for again.
SELECT_DOCUMENTS = """
SELECT document_id, document_key, sealed_header, sealed_content FROM retrieval.documents
WHERE tenant_id = $1 AND key_version < $2 ORDER BY document_id LIMIT $3 FOR UPDATE SKIP LOCKED
"""
UPDATE_DOCUMENTS = """
UPDATE retrieval.documents d
SET sealed_header = n.sealed_header, sealed_content = n.sealed_content, content_sha256 = n.content_sha256, key_version = $2
FROM unnest($3::uuid[], $4::bytea[], $5::bytea[], $6::bytea[]) AS n (document_id, sealed_header, sealed_content, content_sha256)
WHERE d.tenant_id = $1 AND d.document_id = n.document_id
"""
SELECT_CHUNKS = """
SELECT chunk_id, sealed_content FROM retrieval.chunks
WHERE tenant_id = $1 AND key_version < $2 ORDER BY chunk_id LIMIT $3 FOR UPDATE SKIP LOCKED
"""
UPDATE_CHUNKS = """
UPDATE retrieval.chunks c SET sealed_content = n.sealed_content, key_version = $2
FROM unnest($3::uuid[], $4::bytea[]) AS n (chunk_id, sealed_content)
WHERE c.tenant_id = $1 AND c.chunk_id = n.chunk_id
"""
IS_LEFT = """
SELECT EXISTS (SELECT FROM retrieval.documents WHERE tenant_id = $1 AND key_version < $2)
    OR EXISTS (SELECT FROM retrieval.chunks WHERE tenant_id = $1 AND key_version < $2)
"""
# Documents may be large; chunks are not.
_DOCUMENTS, _CHUNKS = 10, 100
_SHA256_BYTES = 32


class PostgresSealedRows:
    """The sealed rows of retrieval."""

    def __init__(self, database: TenantDatabase, cipher: TenantCipher) -> None:
        self._database = database
        self._cipher = cipher

    async def begin(self, tenant_id: TenantId, version: int) -> int:
        """Refuses older keys from now on."""
        await self._cipher.keys(tenant_id, with_version=version)
        least: int = await self._database.fetch_value(tenant_id, BEGIN, tenant_id, version)
        return least

    async def reseal_page(self, tenant_id: TenantId, least_version: int) -> int:
        """Seals some documents and chunks again."""
        return await write_sealed(self._cipher, tenant_id, lambda keys: self._reseal(tenant_id, least_version, keys))

    async def is_done(self, tenant_id: TenantId, least_version: int) -> bool:
        """Tells whether none of an older version is left."""
        async with self._database.transaction(tenant_id) as connection:
            return not await connection.fetchval(IS_LEFT, tenant_id, least_version)

    async def _reseal(self, tenant_id: TenantId, least_version: int, keys: TenantKeys) -> int:
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(REQUIRE_VERSION, tenant_id, keys.active_version)
            documents = await self._reseal_documents(connection, tenant_id, least_version, keys)
            return documents + await self._reseal_chunks(connection, tenant_id, least_version, keys)

    async def _reseal_documents(self, connection: Connection, tenant_id: TenantId, least_version: int, keys: TenantKeys) -> int:
        rows = await connection.fetch(SELECT_DOCUMENTS, tenant_id, least_version, _DOCUMENTS)
        ids = [row["document_id"] for row in rows]
        headers = [(row["sealed_header"], header_identity(row["document_id"])) for row in rows]
        contents = [(row["sealed_content"], content_identity(row["document_id"])) for row in rows]
        opened = await self._cipher.open_all(tenant_id, headers)
        digests = [keyed_digest(keys, row["document_key"], header[:_SHA256_BYTES]) for row, header in zip(rows, opened, strict=True)]
        resealed = [await self._again(tenant_id, items, keys) for items in (headers, contents)]
        await connection.execute(UPDATE_DOCUMENTS, tenant_id, keys.active_version, ids, *resealed, digests)
        return len(rows)

    async def _reseal_chunks(self, connection: Connection, tenant_id: TenantId, least_version: int, keys: TenantKeys) -> int:
        rows = await connection.fetch(SELECT_CHUNKS, tenant_id, least_version, _CHUNKS)
        items = [(row["sealed_content"], chunk_identity(row["chunk_id"])) for row in rows]
        ids = [row["chunk_id"] for row in rows]
        await connection.execute(UPDATE_CHUNKS, tenant_id, keys.active_version, ids, await self._again(tenant_id, items, keys))
        return len(rows)

    async def _again(self, tenant_id: TenantId, items: Sequence[tuple[bytes, bytes]], keys: TenantKeys) -> list[bytes]:
        opened = await self._cipher.open_all(tenant_id, items)
        return [keys.seal(plaintext, identity) for plaintext, (_, identity) in zip(opened, items, strict=True)]
