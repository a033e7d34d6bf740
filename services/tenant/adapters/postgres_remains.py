"""Reads out and removes a tenant's records. The audit log stays, and so does the claim on the request id that made the tenant."""

from collections.abc import AsyncIterator, Sequence

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_changes import announce
from services.tenant.change_hub import ChangeKind
from services.tenant.tenant_remains import ExportedRecord, RemovedRecords

REVOKE_ALL = "UPDATE tenant.api_keys SET revoke_time = clock_timestamp() WHERE tenant_id = $1 AND revoke_time IS NULL RETURNING key_id"
# A token has an issuer where a key has an id: both are dead before anything is removed.
REVOKE_ISSUERS = """
UPDATE tenant.issuers SET revoke_time = clock_timestamp() WHERE tenant_id = $1 AND revoke_time IS NULL RETURNING issuer_id
"""
LOCK_TENANT = "SELECT tenant_id FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
# In this order: what refers to the tenant goes before the tenant.
DELETES = {
    "postgres:tenant.api_key_directory": "DELETE FROM tenant.api_key_directory WHERE tenant_id = $1",
    "postgres:tenant.api_keys": "DELETE FROM tenant.api_keys WHERE tenant_id = $1",
    "postgres:tenant.issuer_directory": "DELETE FROM tenant.issuer_directory WHERE tenant_id = $1",
    "postgres:tenant.issuers": "DELETE FROM tenant.issuers WHERE tenant_id = $1",
    "postgres:tenant.domain_directory": "DELETE FROM tenant.domain_directory WHERE tenant_id = $1",
    "postgres:tenant.domains": "DELETE FROM tenant.domains WHERE tenant_id = $1",
    "postgres:tenant.provider_keys": "DELETE FROM tenant.provider_keys WHERE tenant_id = $1",
    "postgres:tenant.users": "DELETE FROM tenant.users WHERE tenant_id = $1",
    "postgres:tenant.configuration_changes": "DELETE FROM tenant.configuration_changes WHERE tenant_id = $1",
    "postgres:tenant.tenant_settings": "DELETE FROM tenant.tenant_settings WHERE tenant_id = $1",
    "postgres:tenant.move_directory": "DELETE FROM tenant.move_directory WHERE tenant_id = $1",
    "postgres:tenant.placements": "DELETE FROM tenant.placements WHERE tenant_id = $1",
    "postgres:tenant.purges": "DELETE FROM tenant.purges WHERE tenant_id = $1",
    "postgres:tenant.sagas": "DELETE FROM tenant.sagas WHERE tenant_id = $1 AND kind = 'PROVISION'",
    "postgres:tenant.provisioning": "DELETE FROM tenant.provisioning WHERE tenant_id = $1",
    "postgres:tenant.slug_directory": "DELETE FROM tenant.slug_directory WHERE tenant_id = $1",
    "postgres:tenant.tenants": "DELETE FROM tenant.tenants WHERE tenant_id = $1",
}
# A list in which the tenant's id stands among others'.
FORGET_IN_FLAGS = "SELECT tenant.forget_in_flags($1)"
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
        SELECT key_id AS position, (to_jsonb(k) - 'secret_sha256' - 'rotation_digest')::text AS record FROM tenant.api_keys k
        WHERE tenant_id = $1 AND key_id > $2 ORDER BY key_id LIMIT $3""",
    "postgres:tenant.issuers": """
        SELECT issuer_id::text AS position, to_jsonb(i)::text AS record FROM tenant.issuers i
        WHERE tenant_id = $1 AND ($2 = '' OR issuer_id > nullif($2, '')::uuid) ORDER BY issuer_id LIMIT $3""",
    "postgres:tenant.domains": """
        SELECT domain AS position, to_jsonb(d)::text AS record FROM tenant.domains d
        WHERE tenant_id = $1 AND domain > $2 ORDER BY domain LIMIT $3""",
    "postgres:tenant.configuration_changes": """
        SELECT lpad(version::text, 20, '0') AS position, to_jsonb(c)::text AS record FROM tenant.configuration_changes c
        WHERE tenant_id = $1 AND version > coalesce(nullif($2, ''), '0')::bigint ORDER BY version LIMIT $3""",
    "postgres:tenant.provider_keys": """
        SELECT tenant_id::text AS position, (to_jsonb(p) - 'sealed_key')::text AS record FROM tenant.provider_keys p
        WHERE tenant_id = $1 AND tenant_id::text > $2 ORDER BY tenant_id LIMIT $3""",
    "postgres:tenant.sagas": """
        SELECT kind AS position, (to_jsonb(s) - '{content_digest,lease_holder,lease_until}'::text[])::text AS record FROM tenant.sagas s
        WHERE tenant_id = $1 AND kind > $2 ORDER BY kind LIMIT $3""",
    "postgres:tenant.saga_steps": """
        SELECT kind || to_char(step, 'FM00000') AS position, to_jsonb(s)::text AS record FROM tenant.saga_steps s
        WHERE tenant_id = $1 AND kind || to_char(step, 'FM00000') > $2 ORDER BY 1 LIMIT $3""",
    "postgres:tenant.events": """
        SELECT event_id::text AS position, to_jsonb(e)::text AS record FROM tenant.events e
        WHERE tenant_id = $1 AND ($2 = '' OR event_id > nullif($2, '')::uuid) ORDER BY event_id LIMIT $3""",
    "postgres:tenant.purges": """
        SELECT tenant_id::text AS position, to_jsonb(p)::text AS record FROM tenant.purges p
        WHERE tenant_id = $1 AND tenant_id::text > $2 ORDER BY tenant_id LIMIT $3""",
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
        """Revokes every live key and issuer, durably."""
        async with self._database.transaction(tenant_id) as connection:
            await revoke_keys(connection, tenant_id, actor)

    async def remove(self, tenant_id: TenantId, actor: Actor) -> Sequence[RemovedRecords]:
        """Removes everything but the audit log in one transaction; a repeated call finds nothing."""
        async with self._database.transaction(tenant_id) as connection:
            return await remove_records(connection, tenant_id, actor)

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


async def revoke_keys(connection: Connection, tenant_id: TenantId, actor: Actor) -> None:
    """Revokes every live key and issuer, each with its audit record."""
    revoked, issuers = await connection.fetch(REVOKE_ALL, tenant_id), await connection.fetch(REVOKE_ISSUERS, tenant_id)
    for row in revoked:
        await append_audit(connection, tenant_id, "KEY_REVOKED", f"key:{row['key_id']}", actor)
    for row in issuers:
        await append_audit(connection, tenant_id, "ISSUER_REVOKED", f"issuer:{row['issuer_id']}", actor)
    if revoked:
        await announce(connection, tenant_id, ChangeKind.KEY)
    if issuers:
        await announce(connection, tenant_id, ChangeKind.ISSUER)


async def remove_records(connection: Connection, tenant_id: TenantId, actor: Actor) -> list[RemovedRecords]:
    """Removes everything but the audit log and the books of the erasure itself."""
    # Without the lock a key made at this moment could outlive its tenant's removal, or stop it half-way.
    await connection.execute(LOCK_TENANT, tenant_id)
    removed = [RemovedRecords(kind, _count(await connection.execute(sql, tenant_id))) for kind, sql in DELETES.items()]
    gone = any(records.count for records in removed)
    if gone:
        await append_audit(connection, tenant_id, "TENANT_ERASED", f"tenant:{tenant_id}", actor)
    # After the log, because it announces: in the other order two changes could wait for each other.
    removed.append(RemovedRecords("postgres:tenant.flags", await connection.fetchval(FORGET_IN_FLAGS, tenant_id)))
    if gone:
        await announce(connection, tenant_id, ChangeKind.STATE)
        await announce(connection, tenant_id, ChangeKind.DOMAIN)
    return removed


def _count(command_tag: str) -> int:
    # "DELETE 3"
    return int(command_tag.rpartition(" ")[2])
