"""Reads out and removes a tenant's records. The audit log stays, and so does the claim on the request id that made the tenant."""

from collections.abc import AsyncIterator, Sequence

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.tenant_remains import ExportedRecord, RemovedRecords

REVOKE_ALL = "UPDATE tenant.api_keys SET revoke_time = clock_timestamp() WHERE tenant_id = $1 AND revoke_time IS NULL RETURNING key_id"
LOCK_TENANT = "SELECT tenant_id FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
# In this order: what refers to the tenant goes before the tenant.
DELETES = {
    "postgres:tenant.api_key_directory": "DELETE FROM tenant.api_key_directory WHERE tenant_id = $1",
    "postgres:tenant.api_keys": "DELETE FROM tenant.api_keys WHERE tenant_id = $1",
    "postgres:tenant.users": "DELETE FROM tenant.users WHERE tenant_id = $1",
    "postgres:tenant.tenant_settings": "DELETE FROM tenant.tenant_settings WHERE tenant_id = $1",
    "postgres:tenant.move_directory": "DELETE FROM tenant.move_directory WHERE tenant_id = $1",
    "postgres:tenant.placements": "DELETE FROM tenant.placements WHERE tenant_id = $1",
    "postgres:tenant.provisioning": "DELETE FROM tenant.provisioning WHERE tenant_id = $1",
    "postgres:tenant.slug_directory": "DELETE FROM tenant.slug_directory WHERE tenant_id = $1",
    "postgres:tenant.tenants": "DELETE FROM tenant.tenants WHERE tenant_id = $1",
}
# Each reads a page after a key; a secret's hash is no record of the tenant's and stays out.
EXPORTS = {
    "postgres:tenant.tenants": """
        SELECT tenant_id::text AS position, to_jsonb(t)::text AS record FROM tenant.tenants t
        WHERE tenant_id = $1 AND tenant_id::text > $2 ORDER BY tenant_id LIMIT $3""",
    "postgres:tenant.tenant_settings": """
        SELECT tenant_id::text AS position, to_jsonb(s)::text AS record FROM tenant.tenant_settings s
        WHERE tenant_id = $1 AND tenant_id::text > $2 ORDER BY tenant_id LIMIT $3""",
    "postgres:tenant.placements": """
        SELECT tenant_id::text AS position, (to_jsonb(p) - 'stores' - 'following_stores')::text AS record FROM tenant.placements p
        WHERE tenant_id = $1 AND tenant_id::text > $2 ORDER BY tenant_id LIMIT $3""",
    "postgres:tenant.provisioning": """
        SELECT tenant_id::text AS position, (to_jsonb(p) - 'content_digest')::text AS record FROM tenant.provisioning p
        WHERE tenant_id = $1 AND tenant_id::text > $2 ORDER BY tenant_id LIMIT $3""",
    "postgres:tenant.users": """
        SELECT user_id::text AS position, to_jsonb(u)::text AS record FROM tenant.users u
        WHERE tenant_id = $1 AND ($2 = '' OR user_id > nullif($2, '')::uuid) ORDER BY user_id LIMIT $3""",
    "postgres:tenant.api_keys": """
        SELECT key_id AS position, (to_jsonb(k) - 'secret_sha256')::text AS record FROM tenant.api_keys k
        WHERE tenant_id = $1 AND key_id > $2 ORDER BY key_id LIMIT $3""",
    "postgres:tenant.audit": """
        SELECT audit_id::text AS position, to_jsonb(a)::text AS record FROM tenant.audit a
        WHERE tenant_id = $1 AND ($2 = '' OR audit_id > nullif($2, '')::uuid) ORDER BY audit_id LIMIT $3""",
}
PAGE_SIZE = 500


class PostgresRemains:
    """The remains store on the service's own role."""

    def __init__(self, database: TenantDatabase, *, page_size: int = PAGE_SIZE) -> None:
        self._database = database
        self._page_size = page_size

    async def revoke_all_keys(self, tenant_id: TenantId, actor: Actor) -> None:
        """Revokes every live key, durably."""
        async with self._database.transaction(tenant_id) as connection:
            for row in await connection.fetch(REVOKE_ALL, tenant_id):
                await append_audit(connection, tenant_id, "KEY_REVOKED", f"key:{row['key_id']}", actor)

    async def remove(self, tenant_id: TenantId, actor: Actor) -> Sequence[RemovedRecords]:
        """Removes everything but the audit log in one transaction; a repeated call finds nothing."""
        async with self._database.transaction(tenant_id) as connection:
            # Without the lock a key made at this moment could outlive its tenant's removal, or stop it half-way.
            await connection.execute(LOCK_TENANT, tenant_id)
            removed = [RemovedRecords(kind, _count(await connection.execute(sql, tenant_id))) for kind, sql in DELETES.items()]
            if any(records.count for records in removed):
                await append_audit(connection, tenant_id, "TENANT_ERASED", f"tenant:{tenant_id}", actor)
            return removed

    async def export(self, tenant_id: TenantId) -> AsyncIterator[ExportedRecord]:
        """Reads everything, page by page: no transaction stays open while a slow reader thinks."""
        for kind, sql in EXPORTS.items():
            position = ""
            while True:
                async with self._database.transaction(tenant_id) as connection:
                    rows = await connection.fetch(sql, tenant_id, position, self._page_size)
                for row in rows:
                    yield ExportedRecord(kind, row["record"])
                if len(rows) < self._page_size:
                    break
                position = rows[-1]["position"]


def _count(command_tag: str) -> int:
    # "DELETE 3"
    return int(command_tag.rpartition(" ")[2])
