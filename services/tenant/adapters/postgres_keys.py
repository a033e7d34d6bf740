"""A tenant's API keys in Postgres, each change with its audit record."""

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_changes import announce
from services.tenant.api_key import ApiKeyText
from services.tenant.change_hub import ChangeKind
from services.tenant.key_ring import ApiKeyRecord, NewKeyTerms

# The tenant's row serialises the tenant's key making, so that a hundred-and-first key cannot slip in beside the hundredth.
LOCK_TENANT = "SELECT tenant_id FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
COUNT_LIVE = """
SELECT count(*) FROM tenant.api_keys WHERE tenant_id = $1 AND revoke_time IS NULL AND (expire_time IS NULL OR expire_time > now())
"""
INSERT_DIRECTORY = "INSERT INTO tenant.api_key_directory (tenant_id, key_id) VALUES ($1, $2)"
INSERT_KEY = """
INSERT INTO tenant.api_keys (tenant_id, key_id, secret_sha256, display_name, scopes, expire_time) VALUES ($1, $2, $3, $4, $5, $6)
RETURNING key_id, display_name, scopes, create_time, expire_time, revoke_time
"""
LIST_NEWEST = """
SELECT key_id, display_name, scopes, create_time, expire_time, revoke_time FROM tenant.api_keys
WHERE tenant_id = $1 ORDER BY create_time DESC, key_id DESC LIMIT $2
"""
LIST_OLDER = """
SELECT key_id, display_name, scopes, create_time, expire_time, revoke_time FROM tenant.api_keys
WHERE tenant_id = $1 AND (create_time, key_id) < ($3, $4) ORDER BY create_time DESC, key_id DESC LIMIT $2
"""
REVOKE_LIVE = """
UPDATE tenant.api_keys SET revoke_time = clock_timestamp() WHERE tenant_id = $1 AND key_id = $2 AND revoke_time IS NULL
RETURNING key_id, display_name, scopes, create_time, expire_time, revoke_time
"""
GET_KEY = """
SELECT key_id, display_name, scopes, create_time, expire_time, revoke_time FROM tenant.api_keys WHERE tenant_id = $1 AND key_id = $2
"""


class PostgresKeys:
    """The key store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def add_key(self, tenant_id: TenantId, key: ApiKeyText, terms: NewKeyTerms, max_live: int, actor: Actor) -> ApiKeyRecord | None:
        """Stores the key; None when the tenant has `max_live` live keys already."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_TENANT, tenant_id)
            if await connection.fetchval(COUNT_LIVE, tenant_id) >= max_live:
                return None
            await connection.execute(INSERT_DIRECTORY, tenant_id, key.key_id)
            row = await connection.fetchrow(
                INSERT_KEY, tenant_id, key.key_id, key.secret_sha256(), terms.display_name, list(terms.scopes), terms.expire_time
            )
            await append_audit(connection, tenant_id, "KEY_CREATED", f"key:{key.key_id}", actor)
            return _record(row)

    async def list_keys(self, tenant_id: TenantId, after: tuple[datetime, str] | None, limit: int) -> Sequence[ApiKeyRecord]:
        """Returns keys older than the position, newest first."""
        async with self._database.transaction(tenant_id) as connection:
            if after is None:
                rows = await connection.fetch(LIST_NEWEST, tenant_id, limit)
            else:
                rows = await connection.fetch(LIST_OLDER, tenant_id, limit, *after)
            return [_record(row) for row in rows]

    async def revoke_key(self, tenant_id: TenantId, key_id: str, actor: Actor) -> ApiKeyRecord | None:
        """Revokes the key unless it is revoked; None when the tenant has no such key."""
        async with self._database.transaction(tenant_id) as connection:
            row = await connection.fetchrow(REVOKE_LIVE, tenant_id, key_id)
            if row is not None:
                await append_audit(connection, tenant_id, "KEY_REVOKED", f"key:{key_id}", actor)
                await announce(connection, tenant_id, ChangeKind.KEY)
                return _record(row)
            row = await connection.fetchrow(GET_KEY, tenant_id, key_id)
            return None if row is None else _record(row)


def _record(row: asyncpg.Record) -> ApiKeyRecord:
    return ApiKeyRecord(
        row["key_id"], row["display_name"], tuple(row["scopes"]), row["create_time"], row["expire_time"], row["revoke_time"]
    )
