"""Which re-ratings there are, in Postgres as the jobs role, which sees those of all tenants."""

from collections.abc import Sequence
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase
from services.metering.rerate_job import RerateRun, RunPosition
from services.metering.rerating import RerateOrder, Rerating

_BEFORE_ALL = RunPosition(TenantId(UUID(int=0)), 0)
_RUN = """
SELECT r.tenant_id, r.number, r.rerating_id, r.start_time, r.end_time, r.price_versions, r.right_version, r.cutoff_time, r.begin_time,
       e.finish_time
FROM metering.reratings r
LEFT JOIN metering.rerating_ends e ON e.tenant_id = r.tenant_id AND e.rerating_id = r.rerating_id
"""
SELECT_OF_TENANT = _RUN + "WHERE r.tenant_id = $1 AND r.number > $2 AND (e.rerating_id IS NULL OR NOT $4) ORDER BY r.number LIMIT $3"
SELECT_OF_ALL = (
    _RUN
    + """
WHERE (r.tenant_id, r.number) > ($1, $2) AND (e.rerating_id IS NULL OR NOT $4) ORDER BY r.tenant_id, r.number LIMIT $3
"""
)
# The last call that was rated anew has the last entry: they are gone through in this order.
_LEFT = """
WHERE (r.tenant_id, r.number) > ($1, $2) AND e.rerating_id IS NULL
  AND coalesce((SELECT n.record_time FROM metering.entries n WHERE n.tenant_id = r.tenant_id AND n.rerating_id = r.rerating_id
                ORDER BY n.reserve_time DESC, n.reservation_id DESC LIMIT 1), r.begin_time)
      <= clock_timestamp() - $4::float8 * interval '1 second'
ORDER BY r.tenant_id, r.number LIMIT $3
"""
SELECT_LEFT = _RUN + _LEFT


class PostgresRerateRuns:
    """Implements RerateRuns."""

    def __init__(self, jobs: JobsDatabase) -> None:
        self._jobs = jobs

    async def page(self, only: TenantId | None, after: RunPosition | None, size: int, *, undone_only: bool) -> Sequence[RerateRun]:
        """Returns up to `size` re-ratings after a position, by tenant and number."""
        at = after or _BEFORE_ALL
        if only is not None:
            rows = await self._jobs.call(SELECT_OF_TENANT, only, at.number, size, undone_only)
        else:
            rows = await self._jobs.call(SELECT_OF_ALL, at.tenant_id, at.number, size, undone_only)
        return [_run(row) for row in rows]

    async def left(self, after: RunPosition | None, size: int, idle_seconds: float) -> Sequence[RerateRun]:
        """Returns up to `size` that are not done and that nobody went on with for so long."""
        at = after or _BEFORE_ALL
        return [_run(row) for row in await self._jobs.call(SELECT_LEFT, at.tenant_id, at.number, size, idle_seconds)]


def _run(row: asyncpg.Record) -> RerateRun:
    order = RerateOrder(row["start_time"], row["end_time"], row["price_versions"], row["right_version"])
    rerating = Rerating(row["rerating_id"], order, row["cutoff_time"])
    return RerateRun(TenantId(row["tenant_id"]), row["number"], rerating, row["begin_time"], row["finish_time"])
