"""State changes, the way from a request to its tenant, and the calendar of purges, in Postgres."""

from collections.abc import Sequence
from uuid import UUID

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase, TenantDatabase
from services.tenant.actor import Actor
from services.tenant.adapters.postgres_audit import append_audit
from services.tenant.adapters.postgres_events import append_events
from services.tenant.tenant_record import TenantState

LOCK_TENANT = "SELECT state FROM tenant.tenants WHERE tenant_id = $1 FOR UPDATE"
CHANGE_STATE = "UPDATE tenant.tenants SET state = $2 WHERE tenant_id = $1"
ANNOUNCE_STATE = "SELECT tenant.announce($1, 'STATE')"
FIND_REQUEST = "SELECT tenant.find_request($1)"
RETENTION_DAYS = "SELECT tenant.retention_days($1)"
LIST_DUE = """
SELECT t.tenant_id FROM tenant.tenants t LEFT JOIN tenant.purges p ON p.tenant_id = t.tenant_id
WHERE t.state IN ('ACTIVE', 'SUSPENDED') AND (p.tenant_id IS NULL OR p.next_time <= clock_timestamp()) LIMIT $1
"""
TAKE_PURGE = """
INSERT INTO tenant.purges (tenant_id, next_time) VALUES ($1, clock_timestamp() + interval '1 hour')
ON CONFLICT (tenant_id) DO UPDATE SET next_time = excluded.next_time WHERE purges.next_time <= clock_timestamp()
RETURNING tenant_id
"""
PURGE_DONE = """
UPDATE tenant.purges SET next_time = clock_timestamp() + interval '1 day', last_time = clock_timestamp(),
    removed_count = removed_count + $2
WHERE tenant_id = $1
"""
_TOLD = {
    TenantState.SUSPENDED: ("TENANT_SUSPENDED", "tenant.suspended"),
    TenantState.ACTIVE: ("TENANT_RESUMED", "tenant.resumed"),
}


class PostgresLife:
    """The life store on the service's own role."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def change_state(self, tenant_id: TenantId, before: TenantState, after: TenantState, actor: Actor) -> TenantState | None:
        """Changes the state if it is `before`; returns the state found."""
        async with self._database.transaction(tenant_id) as connection:
            found = await connection.fetchval(LOCK_TENANT, tenant_id)
            if found == before:
                action, event_type = _TOLD[after]
                await connection.execute(CHANGE_STATE, tenant_id, after)
                await append_audit(connection, tenant_id, action, f"tenant:{tenant_id}", actor)
                await append_events(connection, tenant_id, event_type, {})
                await connection.execute(ANNOUNCE_STATE, tenant_id)
            return None if found is None else TenantState(found)

    async def find_request(self, request_id: UUID) -> TenantId | None:
        """Returns the tenant a creation made."""
        tenant_id = await self._database.fetch_value(None, FIND_REQUEST, request_id)
        return None if tenant_id is None else TenantId(tenant_id)


class PostgresRetention:
    """The calendar and the terms: found by the jobs role, read and written as the tenant."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase) -> None:
        self._database = database
        self._jobs = jobs

    async def days(self, tenant_id: TenantId) -> int:
        """Returns the plan's days; 0 keeps conversations for ever."""
        async with self._database.transaction(tenant_id) as connection:
            return int(await connection.fetchval(RETENTION_DAYS, tenant_id) or 0)

    async def due(self, limit: int) -> Sequence[TenantId]:
        """Returns tenants in use whose day has come."""
        return [TenantId(row["tenant_id"]) for row in await self._jobs.call(LIST_DUE, limit)]

    async def take(self, tenant_id: TenantId) -> bool:
        """Takes the tenant's purge for an hour."""
        async with self._database.transaction(tenant_id) as connection:
            return await connection.fetchval(TAKE_PURGE, tenant_id) is not None

    async def done(self, tenant_id: TenantId, removed_count: int) -> None:
        """Notes the purge; the next is due in a day."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(PURGE_DONE, tenant_id, removed_count)
