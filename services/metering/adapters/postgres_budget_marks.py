"""Marks of budgets to be looked at, over all tenants, as the jobs role."""

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection, JobsDatabase
from services.metering.budgets.ports import Change, Marked, TakenMarks

# Another process that looks at the same time would add up the same.
LOCK_LOOKS = "SELECT pg_try_advisory_xact_lock(7405, 1)"
_MARK = "SELECT tenant_id, mark_id, use_quarter, product_unit, user_name, feature FROM metering.budget_marks\n"
TAKE = _MARK + "WHERE tenant_id <> ALL ($2::uuid[]) ORDER BY tenant_id, mark_id LIMIT $1"
TAKE_OF = _MARK + "WHERE tenant_id = $1 ORDER BY mark_id LIMIT $2"
REMOVE = """
DELETE FROM metering.budget_marks m USING unnest($1::uuid[], $2::bigint[]) AS d (tenant_id, mark_id)
WHERE m.tenant_id = d.tenant_id AND m.mark_id = d.mark_id
"""


class PostgresBudgetMarks:
    """Implements BudgetMarks."""

    def __init__(self, database: JobsDatabase) -> None:
        self._database = database

    @asynccontextmanager
    async def take(self, most: int, passed_over: Collection[TenantId]) -> AsyncIterator[TakenMarks]:
        """Gives up to so many marks, of other tenants than these, none while another process looks.

        At the end of the block those that are done with are gone.
        """
        async with self._database.transaction() as connection:
            rows = await connection.fetch(TAKE, most, list(passed_over)) if await connection.fetchval(LOCK_LOOKS) else []
            taken = _taken(rows)
            yield taken
            await _remove(connection, rows, taken)

    @asynccontextmanager
    async def take_of(self, tenant_id: TenantId, most: int) -> AsyncIterator[TakenMarks]:
        """Gives up to so many marks of one tenant, whoever else looks, and holds nothing meanwhile; at the end as `take`."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(TAKE_OF, tenant_id, most)
        taken = _taken(rows)
        yield taken
        async with self._database.transaction() as connection:
            await _remove(connection, rows, taken)


def _taken(rows: Sequence[asyncpg.Record]) -> TakenMarks:
    tenants: dict[TenantId, Marked] = {}
    for row in rows:
        marked = tenants.setdefault(row["tenant_id"], Marked(row["tenant_id"]))
        marked.changes.add(Change(row["use_quarter"], row["product_unit"], row["user_name"], row["feature"]))
    return TakenMarks(len(rows), list(tenants.values()))


async def _remove(connection: Connection, rows: Sequence[asyncpg.Record], taken: TakenMarks) -> None:
    done = [row for row in rows if row["tenant_id"] in taken.done]
    if done:
        await connection.execute(REMOVE, [row["tenant_id"] for row in done], [row["mark_id"] for row in done])
