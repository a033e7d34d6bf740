"""The durable steps of a tenant's creation: one transaction each, every one safe to repeat and to run twice at once."""

from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.api_key import ApiKeyText
from services.tenant.provisioning import Recorded, RecordOutcome, Step, TenantWish

RECORD_TENANT = """
SELECT outcome, tenant_id, content_digest, steps_done FROM tenant.record_tenant($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
"""
REQUEST_IS_KNOWN = "SELECT tenant_id FROM tenant.request_directory WHERE request_id = $1"
# Only ever raised: a slower run of the same request must not take a finished step back.
FINISH_STEP = "UPDATE tenant.provisioning SET steps_done = $2, update_time = now() WHERE tenant_id = $1 AND steps_done < $2"
INSERT_SETTINGS = "INSERT INTO tenant.tenant_settings (tenant_id, assistant_name) VALUES ($1, $2) ON CONFLICT DO NOTHING"
LOCK_PROVISIONING = "SELECT first_key_id FROM tenant.provisioning WHERE tenant_id = $1 FOR UPDATE"
INSERT_OWNER = """
INSERT INTO tenant.users (tenant_id, email, role) SELECT $1, $2, 'OWNER'
WHERE NOT EXISTS (SELECT FROM tenant.users WHERE tenant_id = $1 AND role = 'OWNER')
"""
REVOKE_UNUSED_KEY = """
UPDATE tenant.api_keys SET revoke_time = clock_timestamp()
WHERE tenant_id = $1 AND key_id = $2 AND revoke_time IS NULL AND last_use_time IS NULL
RETURNING key_id
"""
INSERT_DIRECTORY = "INSERT INTO tenant.api_key_directory (tenant_id, key_id) VALUES ($1, $2)"
INSERT_KEY = "INSERT INTO tenant.api_keys (tenant_id, key_id, secret_sha256, display_name, scopes) VALUES ($1, $2, $3, $4, $5)"
SET_FIRST_KEY = "UPDATE tenant.provisioning SET first_key_id = $2, update_time = now() WHERE tenant_id = $1"
ACTIVATE = "UPDATE tenant.tenants SET state = 'ACTIVE' WHERE tenant_id = $1 AND state = 'PROVISIONING'"


class PostgresProvisioning:
    """The provisioning store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def record(self, tenant_id: TenantId, request_id: UUID, wish: TenantWish, region: str, actor: Actor) -> Recorded:
        """Claims request id and slug and writes the tenant, or answers what the request recorded before."""
        row = await self._database.fetch_row(
            tenant_id,
            RECORD_TENANT,
            tenant_id,
            request_id,
            wish.digest(),
            wish.slug,
            wish.display_name,
            wish.plan,
            region,
            actor.subject,
            actor.reason,
            actor.peer_address,
        )
        if row is None:
            msg = "record_tenant answers exactly one row"
            raise RuntimeError(msg)
        return Recorded(RecordOutcome(row["outcome"]), row["tenant_id"], row["content_digest"], row["steps_done"] or 0)

    async def is_known(self, request_id: UUID) -> bool:
        """Tells whether the request was recorded before; the directory is read before any tenant is known."""
        return bool(await self._database.call(None, REQUEST_IS_KNOWN, request_id))

    async def write_defaults(self, tenant_id: TenantId, assistant_name: str, step: Step) -> None:
        """Writes the settings unless they are there."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(INSERT_SETTINGS, tenant_id, assistant_name)
            await connection.execute(FINISH_STEP, tenant_id, step)

    async def write_owner(self, tenant_id: TenantId, email: str, step: Step) -> None:
        """Writes the owner unless there is one; the lock keeps two runs from both finding none."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_PROVISIONING, tenant_id)
            await connection.execute(INSERT_OWNER, tenant_id, email)
            await connection.execute(FINISH_STEP, tenant_id, step)

    async def finish_step(self, tenant_id: TenantId, step: Step) -> None:
        """Notes that the step is done."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(FINISH_STEP, tenant_id, step)

    async def issue_first_key(
        self, tenant_id: TenantId, key: ApiKeyText, display_name: str, scopes: frozenset[str], actor: Actor, step: Step
    ) -> bool:
        """Stores the key as the first one, in place of an earlier first key that was never used; False when that one stays."""
        async with self._database.transaction(tenant_id) as connection:
            earlier = await connection.fetchval(LOCK_PROVISIONING, tenant_id)
            if earlier is not None and not await _revoke_unused(connection, tenant_id, earlier, actor):
                await connection.execute(FINISH_STEP, tenant_id, step)
                return False
            await connection.execute(INSERT_DIRECTORY, tenant_id, key.key_id)
            await connection.execute(INSERT_KEY, tenant_id, key.key_id, key.secret_sha256(), display_name, sorted(scopes))
            await connection.execute(SET_FIRST_KEY, tenant_id, key.key_id)
            await append_audit(connection, tenant_id, "KEY_CREATED", f"key:{key.key_id}", actor)
            await connection.execute(FINISH_STEP, tenant_id, step)
            return True

    async def activate(self, tenant_id: TenantId, step: Step) -> None:
        """Lets the tenant be used; a tenant that was suspended since stays suspended."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(ACTIVATE, tenant_id)
            await connection.execute(FINISH_STEP, tenant_id, step)


async def _revoke_unused(connection: Connection, tenant_id: TenantId, key_id: str, actor: Actor) -> bool:
    if await connection.fetchval(REVOKE_UNUSED_KEY, tenant_id, key_id) is None:
        return False
    await append_audit(connection, tenant_id, "KEY_REVOKED", f"key:{key_id}", actor)
    return True
