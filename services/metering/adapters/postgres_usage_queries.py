"""Answers questions about use in Postgres: sums, the log that is not folded yet, and calls where no sum fits, added up in one statement."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.placement import HOME
from services.kernel.tenant_database import Connection, JobsDatabase, TenantDatabase
from services.metering.adapters.usage_statements import (
    PLAN_AS_ASKED,
    QUERY,
    QUERY_WITH_LATENCIES,
    SELECT_OUTSTANDING,
    SELECT_TENANTS,
)
from services.metering.call import TokenUsage
from services.metering.usage_plan import Segment
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

_BEFORE_ALL = UUID(int=0)
# A tenant has at most 200 rules, and so hardly more units.
_MOST_UNITS = 1_000


class PostgresUsageQueries:
    """Implements UsageQueries: of a tenant as the service role, of tenants as the jobs role, each on the pool it was given for it.

    Balances are read on the primary; the others may be read on a replica.
    """

    def __init__(self, primary: TenantDatabase, reading: TenantDatabase, reading_all: JobsDatabase) -> None:
        self._primary = primary
        self._reading = reading
        self._reading_all = reading_all

    async def of_tenant(self, tenant_id: TenantId, query: UsageQuery, after: RowPosition | None, size: int) -> Sequence[GroupUse]:
        """Returns up to `size` groups of the tenant after the position."""
        async with self._reading.transaction(tenant_id) as connection:
            return await _groups(connection, [tenant_id], query, after, size)

    async def of_tenants(self, tenant_ids: Sequence[UUID], query: UsageQuery, after: RowPosition | None, size: int) -> Sequence[GroupUse]:
        """As `of_tenant`, over these tenants; all where the list is empty."""
        async with self._reading_all.transaction() as connection:
            wanted = tenant_ids or [row["tenant_id"] for row in await connection.fetch(SELECT_TENANTS)]
            return await _groups(connection, wanted, query, after, size)

    async def balance(self, tenant_id: TenantId, start: datetime, end: datetime) -> Balance:
        """Returns what the tenant used of a cycle, at one moment."""
        query = UsageQuery(start, end, group_by=frozenset((Dimension.PRODUCT_UNIT,)))
        async with self._primary.transaction_at(HOME, tenant_id, snapshot=True) as connection:
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
    connection: Connection, tenant_ids: Sequence[UUID], query: UsageQuery, after: RowPosition | None, size: int
) -> list[GroupUse]:
    position = after or RowPosition(0, GroupKey(0, _BEFORE_ALL, ("",) * 7))
    arguments = [
        list(tenant_ids),
        *_columns(query.segments()),
        [int(dimension) for dimension in query.group_by],
        *_filters(query),
        int(query.order_by),
        query.ascending,
        size,
        after is not None,
        position.rank,
        position.key.bucket,
        position.key.tenant_id,
        *position.key.names,
    ]
    await connection.execute(PLAN_AS_ASKED)
    if query.tells_latencies:
        rows = await connection.fetch(QUERY_WITH_LATENCIES, *arguments, *_columns(query.latency_segments()))
    else:
        rows = await connection.fetch(QUERY, *arguments)
    return [_group(row) for row in rows]


def _columns(parts: Sequence[Segment]) -> tuple[list[datetime], list[datetime], list[int], list[int]]:
    return (
        [part.start for part in parts],
        [part.end for part in parts],
        [part.bucket for part in parts],
        [int(part.grain) for part in parts],
    )


def _filters(query: UsageQuery) -> list[list[str] | None]:
    wanted = query.filter
    lists = (
        wanted.users,
        wanted.features,
        wanted.models,
        wanted.prompt_versions,
        wanted.providers,
        wanted.tiers,
        wanted.product_units,
    )
    return [list(names) or None for names in lists]


def _group(row: asyncpg.Record) -> GroupUse:
    names = ("user_name", "feature", "model", "prompt_version", "provider", "tier", "product_unit")
    return GroupUse(
        key=GroupKey(row["bucket"], UUID(int=row["tenant_id"].int), tuple(row[name] for name in names)),
        rank=row["rank"],
        settled=row["settled"],
        void=row["void"],
        unresolved=row["unresolved"],
        reconciled=row["reconciled"],
        retries=row["retries"],
        failures=Failures(*(row[name] for name in ("refused", "overloaded", "failed", "cancelled", "deadline", "lost", "other"))),
        usage=TokenUsage(row["input"], row["output"], row["cache_read"], row["cache_write_5m"], row["cache_write_1h"]),
        cost_nano_usd=row["cost"],
        quantity=row["quantity"],
        first_token=_latency(row, "first_token"),
        total=_latency(row, "total"),
    )


def _latency(row: asyncpg.Record, kind: str) -> Latency | None:
    count = row[f"{kind}_count"]
    return Latency(count, *(row[f"{kind}_p{share}"] for share in (50, 95, 99))) if count else None
