"""Keys as authentication sees them: found by id over all tenants, their use and refusals written down. One round trip each."""

from collections.abc import Sequence

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.tenant.adapters.postgres_tenants import tenant_facts
from services.tenant.authentication import StoredKey
from services.tenant.tenant_record import TenantFacts
from services.tenant.usage_trail import AuditEvent, KeyUse

FIND_API_KEY = """
SELECT tenant_id, secret_sha256, scopes, expire_time, revoke_time, used, allowed_cidrs, (facts).* FROM tenant.find_api_key($1)
"""
RECORD_FIRST_USE = "SELECT tenant.record_first_use($1, $2, $3)"
RECORD_LAST_USES = "SELECT tenant.record_last_uses($1::uuid[], $2::text[], $3::timestamptz[])"
APPEND_AUDIT = "SELECT tenant.append_audit($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::integer[])"
RECORD_OPERATOR_ACCESS = """
SELECT state, plan, region, config_version, placement, encrypt_content FROM tenant.record_operator_access($1, $2, $3, $4)
"""


class PostgresCredentials:
    """The credential store and the trail store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def find_key(self, key_id: str) -> StoredKey | None:
        """Returns the key of any tenant. The function enters the tenant the directory names before it reads the key."""
        row = await self._database.fetch_row(None, FIND_API_KEY, key_id)
        if row is None:
            return None
        return StoredKey(
            tenant_id=TenantId(row["tenant_id"]),
            secret_sha256=row["secret_sha256"],
            scopes=frozenset(row["scopes"]),
            expire_time=row["expire_time"],
            revoke_time=row["revoke_time"],
            used=row["used"],
            facts=tenant_facts(row),
            allowed_cidrs=tuple(row["allowed_cidrs"]),
        )

    async def record_first_use(self, tenant_id: TenantId, key_id: str, secret_sha256: bytes) -> bool:
        """Writes the first use durably; False when the key was revoked or got another secret meanwhile."""
        return bool(await self._database.fetch_value(tenant_id, RECORD_FIRST_USE, tenant_id, key_id, secret_sha256))

    async def record_operator_access(self, tenant_id: TenantId | None, subject: str, reason: str, peer_address: str) -> TenantFacts | None:
        """Writes the audit record durably and returns the named tenant's facts; None for no such tenant."""
        row = await self._database.fetch_row(tenant_id, RECORD_OPERATOR_ACCESS, tenant_id, subject, reason, peer_address)
        return None if row is None else tenant_facts(row)

    async def record_last_uses(self, uses: Sequence[KeyUse]) -> None:
        """Writes the last use of each key; the batch names its tenants item by item."""
        await self._database.call(
            None, RECORD_LAST_USES, [use.tenant_id for use in uses], [use.key_id for use in uses], [use.use_time for use in uses]
        )

    async def append_audit(self, events: Sequence[tuple[AuditEvent, int]]) -> None:
        """Appends each event with how often it happened; the batch names its tenants item by item."""
        await self._database.call(
            None,
            APPEND_AUDIT,
            [event.tenant_id for event, _ in events],
            [event.action for event, _ in events],
            [event.subject for event, _ in events],
            [event.target for event, _ in events],
            [event.peer_address for event, _ in events],
            [count for _, count in events],
        )
