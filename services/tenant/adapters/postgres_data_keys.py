"""Wrapped data keys in the key store: a database of their own, under the same row-level security, never in the data's backups."""

from collections.abc import Sequence
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.data_keys import StoredDataKey, StoredKeys
from services.tenant.key_management import WrappedKey

SELECT_KEYS = """
SELECT version, active, master_key_id, wrapped_key FROM tenant_keys.data_keys WHERE tenant_id = $1 ORDER BY version
"""
SELECT_DESTROYED = "SELECT EXISTS (SELECT FROM tenant_keys.destroyed_tenants WHERE tenant_id = $1)"
# Two makers of one tenant take turns; before the first version there is no row to lock.
LOCK_TENANT = "SELECT pg_advisory_xact_lock(hashtextextended('tenant_keys:' || $1::uuid::text, 0))"
DEMOTE = "UPDATE tenant_keys.data_keys SET active = false WHERE tenant_id = $1 AND active"
INSERT_KEY = """
INSERT INTO tenant_keys.data_keys (tenant_id, version, active, master_key_id, wrapped_key) VALUES ($1, $2, true, $3, $4)
"""
INSERT_DIRECTORY = "INSERT INTO tenant_keys.tenant_directory (tenant_id) VALUES ($1) ON CONFLICT DO NOTHING"
DELETE_DIRECTORY = "DELETE FROM tenant_keys.tenant_directory WHERE tenant_id = $1"
DELETE_OLDER = "DELETE FROM tenant_keys.data_keys WHERE tenant_id = $1 AND version < $2 AND NOT active RETURNING version"
DELETE_KEYS = "DELETE FROM tenant_keys.data_keys WHERE tenant_id = $1 RETURNING version"
INSERT_DESTROYED = """
INSERT INTO tenant_keys.destroyed_tenants (tenant_id, destroyed_count) VALUES ($1, $2) ON CONFLICT DO NOTHING
"""
SELECT_TENANTS = "SELECT tenant_id FROM tenant_keys.tenant_directory WHERE tenant_id > $1 ORDER BY tenant_id LIMIT $2"
REPLACE_WRAPPING = """
UPDATE tenant_keys.data_keys SET master_key_id = $4, wrapped_key = $5 WHERE tenant_id = $1 AND version = $2 AND master_key_id = $3
RETURNING version
"""


class PostgresDataKeys:
    """The key store on its own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def load(self, tenant_id: TenantId) -> StoredKeys:
        """Returns every version."""
        async with self._database.transaction(tenant_id) as connection:
            return await _load(connection, tenant_id)

    async def add(self, tenant_id: TenantId, version: int, wrapped: WrappedKey) -> StoredKeys:
        """Makes a new active version, unless another maker was first."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            stored = await _load(connection, tenant_id)
            newest = stored.keys[-1].version if stored.keys else 0
            if stored.destroyed or newest != version - 1:
                return stored
            await connection.execute(DEMOTE, tenant_id)
            await connection.execute(INSERT_KEY, tenant_id, version, wrapped.master_key_id, wrapped.wrapped)
            await connection.execute(INSERT_DIRECTORY, tenant_id)
            return await _load(connection, tenant_id)

    async def retire(self, tenant_id: TenantId, before_version: int) -> Sequence[int]:
        """Removes older versions."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            return [row["version"] for row in await connection.fetch(DELETE_OLDER, tenant_id, before_version)]

    async def destroy(self, tenant_id: TenantId) -> int:
        """Removes everything but a tombstone."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            count = len(await connection.fetch(DELETE_KEYS, tenant_id))
            await connection.execute(INSERT_DESTROYED, tenant_id, count)
            await connection.execute(DELETE_DIRECTORY, tenant_id)
            return count

    async def tenants(self, after: UUID, limit: int) -> Sequence[TenantId]:
        """Returns tenants with keys by id."""
        return [TenantId(row["tenant_id"]) for row in await self._database.call(None, SELECT_TENANTS, after, limit)]

    async def rewrap(self, tenant_id: TenantId, version: int, old_master_key_id: str, wrapped: WrappedKey) -> bool:
        """Replaces one wrapping."""
        async with self._database.transaction(tenant_id) as connection:
            arguments = (tenant_id, version, old_master_key_id, wrapped.master_key_id, wrapped.wrapped)
            return await connection.fetchval(REPLACE_WRAPPING, *arguments) is not None


async def _load(connection: Connection, tenant_id: TenantId) -> StoredKeys:
    rows = await connection.fetch(SELECT_KEYS, tenant_id)
    keys = [StoredDataKey(row["version"], row["active"], WrappedKey(row["master_key_id"], row["wrapped_key"])) for row in rows]
    return StoredKeys(tuple(keys), destroyed=not keys and await connection.fetchval(SELECT_DESTROYED, tenant_id))
