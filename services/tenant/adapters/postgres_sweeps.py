"""What sweeps find over all tenants as the jobs role, and remove tenant by tenant as the service."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase, TenantDatabase

LIST_PAST = """
SELECT DISTINCT o.tenant_id FROM (
    (SELECT s.tenant_id FROM tenant.sagas s WHERE s.state IN ('DONE', 'FAILED') AND s.end_time < clock_timestamp() - $1::interval LIMIT $2)
    UNION ALL
    (SELECT e.tenant_id FROM tenant.events e WHERE e.state = 'DELIVERED' AND e.end_time < clock_timestamp() - $1::interval LIMIT $2)
) o LIMIT $2
"""
# Their steps go with them.
DELETE_SAGAS = """
DELETE FROM tenant.sagas WHERE tenant_id = $1 AND state IN ('DONE', 'FAILED') AND end_time < clock_timestamp() - $2::interval
"""
DELETE_EVENTS = """
DELETE FROM tenant.events WHERE tenant_id = $1 AND state = 'DELIVERED' AND end_time < clock_timestamp() - $2::interval
"""
LIST_LEFT = """
SELECT tenant_id FROM tenant.unrecorded_keys WHERE create_time < clock_timestamp() - $1 * interval '1 second' ORDER BY create_time LIMIT $2
"""
LOCK_NOTE = "SELECT true FROM tenant.unrecorded_keys WHERE tenant_id = $1 FOR UPDATE"
IS_RECORDED = "SELECT true FROM tenant.tenants WHERE tenant_id = $1"
DELETE_NOTE = "DELETE FROM tenant.unrecorded_keys WHERE tenant_id = $1"


class PostgresHistory:
    """Ended sagas and delivered events."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase) -> None:
        self._database = database
        self._jobs = jobs

    async def past(self, term: timedelta, limit: int) -> Sequence[TenantId]:
        """Returns tenants with something older than the term."""
        return [TenantId(row["tenant_id"]) for row in await self._jobs.call(LIST_PAST, term, limit)]

    async def forget(self, tenant_id: TenantId, term: timedelta) -> int:
        """Removes what is older; returns how many sagas and events."""
        async with self._database.transaction(tenant_id) as connection:
            done = [await connection.execute(sql, tenant_id, term) for sql in (DELETE_SAGAS, DELETE_EVENTS)]
        return sum(int(tag.rpartition(" ")[2]) for tag in done)


class PostgresUnrecordedKeys:
    """Notes of keys without a tenant."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase) -> None:
        self._database = database
        self._jobs = jobs

    async def left(self, older_than_seconds: float, limit: int) -> Sequence[TenantId]:
        """Returns tenants whose note is that old."""
        return [TenantId(row["tenant_id"]) for row in await self._jobs.call(LIST_LEFT, older_than_seconds, limit)]

    async def settle(self, tenant_id: TenantId, destroy: Callable[[TenantId], Awaitable[int]]) -> bool:
        """Destroys the keys behind the note's lock: who records the tenant takes the note along, and would wait for it here."""
        async with self._database.transaction(tenant_id) as connection:
            if not await connection.fetchval(LOCK_NOTE, tenant_id):
                return False
            recorded = await connection.fetchval(IS_RECORDED, tenant_id)
            if not recorded:
                await destroy(tenant_id)
            await connection.execute(DELETE_NOTE, tenant_id)
        return not recorded
