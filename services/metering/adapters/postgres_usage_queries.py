"""Answers questions about use in Postgres: sums, the log that is not folded yet, and calls where no sum fits, added up in one statement."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from services.kernel.errors import SumOutOfRange
from services.kernel.ids import TenantId
from services.kernel.placement import HOME
from services.kernel.tenant_database import Connection, JobsDatabase, TenantDatabase
from services.metering.adapters.usage_statements import (
    COLUMNS,
    PLAN_ONCE,
    SELECT_OUTSTANDING,
    UsageStatement,
)
from services.metering.call import TokenUsage
from services.metering.usage_query import (
    Balance,
    Dimension,
    Failures,
    GroupKey,
    GroupUse,
    Latency,
    RowPosition,
    UnitUsed,
    UsageQuery,
)

_NO_TENANT = UUID(int=0)
_NAMED = [dimension for dimension in Dimension if dimension is not Dimension.TENANT]
# What the contract's int64 holds.
MAX_QUANTITY = 2**63 - 1
# A tenant has at most 200 rules, and so hardly more units.
_MOST_UNITS = 1_000


class PostgresUsageQueries:
    """Implements UsageQueries: of a tenant as the service role, of tenants as the jobs role, each on the pool it was given for it.

    Balances are read on the primary; the others may be read on a replica. `patience_seconds`: how long a tenant's answer may take; None: as
    long as any statement.
    """

    def __init__(
        self, primary: TenantDatabase, reading: TenantDatabase, reading_all: JobsDatabase, *, patience_seconds: int | None = None
    ) -> None:
        self._primary = primary
        self._reading = reading
        self._reading_all = reading_all
        self._patience_seconds = patience_seconds
        self._settings = PLAN_ONCE if patience_seconds is None else f"{PLAN_ONCE}; SET LOCAL statement_timeout = '{patience_seconds}s'"

    async def of_tenant(
        self, tenant_id: TenantId, query: UsageQuery, after: RowPosition | None, size: int, *, may_cut: bool = False
    ) -> Sequence[GroupUse]:
        """Returns up to `size` groups of the tenant after the position; the largest number for a larger one, or raises SumOutOfRange."""
        async with self._reading.transaction(tenant_id, settings=self._settings) as connection:
            return await _groups(connection, [tenant_id], query, after, size, may_cut=may_cut, limit_seconds=self._patience_seconds)

    async def of_tenants(self, tenant_ids: Sequence[UUID], query: UsageQuery, after: RowPosition | None, size: int) -> Sequence[GroupUse]:
        """As `of_tenant`, over these tenants; all where the list is empty."""
        async with self._reading_all.transaction(settings=PLAN_ONCE) as connection:
            return await _groups(connection, tenant_ids, query, after, size, may_cut=True)

    async def balance(self, tenant_id: TenantId, start: datetime, end: datetime) -> Balance:
        """Returns what the tenant used of a cycle, at one moment."""
        query = UsageQuery(start, end, group_by=frozenset((Dimension.PRODUCT_UNIT,)))
        async with self._primary.transaction_at(HOME, tenant_id, snapshot=True, settings=PLAN_ONCE) as connection:
            outstanding = await connection.fetchrow(SELECT_OUTSTANDING, tenant_id)
            found = await _groups(connection, [tenant_id], query, None, _MOST_UNITS)
        calls = [group for group in found if not _unit(group)]
        usage = calls[0].usage if calls else TokenUsage()
        return Balance(
            read_time=outstanding["read_time"],
            cost_nano_usd=sum(group.cost_nano_usd for group in calls),
            settled_count=sum(group.settled + group.reconciled for group in calls),
            usage=usage,
            units=[UnitUsed(_unit(group), group.quantity) for group in found if _unit(group)],
            outstanding_count=outstanding["call_count"],
            outstanding_nano_usd=outstanding["bound_nano_usd"],
        )


def _unit(group: GroupUse) -> str:
    return group.key.names[Dimension.PRODUCT_UNIT - Dimension.USER]


async def _groups(
    connection: Connection,
    tenant_ids: Sequence[UUID],
    query: UsageQuery,
    after: RowPosition | None,
    size: int,
    *,
    may_cut: bool = False,
    limit_seconds: float | None = None,
) -> list[GroupUse]:
    """With `may_cut` a quantity that no answer can hold is told as the largest, and marked: one tenant's keeps nobody from the others'."""
    statement = UsageStatement(tenant_ids, query, after, size)
    rows = await connection.fetch(statement.text, *statement.arguments, timeout=limit_seconds)
    if not may_cut and any(abs(row["quantity"]) > MAX_QUANTITY for row in rows):
        raise SumOutOfRange("quantity", "group by PRODUCT_UNIT, filter fewer units or ask for a shorter period")
    # What was not asked for has no column.
    columns = [COLUMNS[dimension] if dimension in query.group_by else None for dimension in _NAMED]
    of_tenants, timed = Dimension.TENANT in query.group_by, query.tells_latencies
    return [_group(row, columns, of_tenants=of_tenants, timed=timed) for row in rows]


def _group(row: asyncpg.Record, columns: Sequence[str | None], *, of_tenants: bool, timed: bool) -> GroupUse:
    tenant_id = UUID(int=row["tenant_id"].int) if of_tenants else _NO_TENANT
    return GroupUse(
        key=GroupKey(row["bucket"], tenant_id, tuple([row[column] if column else "" for column in columns])),
        rank=row["rank"],
        settled=row["settled"],
        void=row["void"],
        unresolved=row["unresolved"],
        reconciled=row["reconciled"],
        retries=row["retries"],
        failures=Failures(*(row[name] for name in ("refused", "overloaded", "failed", "cancelled", "deadline", "lost", "other"))),
        usage=TokenUsage(row["input"], row["output"], row["cache_read"], row["cache_write_5m"], row["cache_write_1h"]),
        cost_nano_usd=row["cost"],
        quantity=max(-MAX_QUANTITY, min(MAX_QUANTITY, int(row["quantity"]))),
        is_quantity_cut=abs(row["quantity"]) > MAX_QUANTITY,
        refusals=row["refusals"],
        first_token=_latency(row, "first_token") if timed else None,
        total=_latency(row, "total") if timed else None,
    )


def _latency(row: asyncpg.Record, kind: str) -> Latency | None:
    count = row[f"{kind}_count"]
    return Latency(count, *(row[f"{kind}_p{share}"] for share in (50, 95, 99))) if count else None
