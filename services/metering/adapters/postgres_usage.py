"""Reads a tenant's calls in Postgres: sums of a period, pages, single calls."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.metering.call import CallState, TokenUsage
from services.metering.call_record import CallRecord, PagePosition, PeriodSums
from services.metering.usage_report import UsageGroup, refuse_bad_period

# The database's clock decides what "now" is: it stamped the calls, and a call just settled must be in the report.
SELECT_PERIOD = """
SELECT coalesce($1::timestamptz, date_trunc('month', clock_timestamp(), 'UTC')) AS start_time,
       coalesce($2::timestamptz, clock_timestamp()) AS end_time
"""
SELECT_SUMS = """
SELECT state, model, feature, price_version, count(*) AS call_count,
       coalesce(sum(input_tokens), 0)::bigint AS input_tokens, coalesce(sum(output_tokens), 0)::bigint AS output_tokens,
       coalesce(sum(cache_read_tokens), 0)::bigint AS cache_read_tokens,
       coalesce(sum(cache_write_5m_tokens), 0)::bigint AS cache_write_5m_tokens,
       coalesce(sum(cache_write_1h_tokens), 0)::bigint AS cache_write_1h_tokens,
       coalesce(sum(cost_nano_usd), 0)::bigint AS cost_nano_usd, sum(bound_nano_usd)::bigint AS bound_nano_usd
FROM metering.calls
WHERE tenant_id = $1 AND open_time >= $2 AND open_time < $3
GROUP BY state, model, feature, price_version
"""
_RECORD = """
SELECT call_id, reservation_id, attempt, state, open_time, end_time, provider, model, feature, user_name, prompt_version, price_version,
       input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, bound_nano_usd,
       entry_id, end_cause, first_token_ms, total_ms
FROM metering.calls
"""
SELECT_FIRST_PAGE = (
    _RECORD
    + """
WHERE tenant_id = $1 AND open_time IS NOT NULL AND (cardinality($2::smallint[]) = 0 OR state = ANY ($2::smallint[]))
ORDER BY open_time DESC, reservation_id DESC LIMIT $3
"""
)
SELECT_NEXT_PAGE = (
    _RECORD
    + """
WHERE tenant_id = $1 AND open_time IS NOT NULL AND (cardinality($2::smallint[]) = 0 OR state = ANY ($2::smallint[]))
  AND (open_time, reservation_id) < ($4, $5)
ORDER BY open_time DESC, reservation_id DESC LIMIT $3
"""
)
SELECT_ATTEMPTS = _RECORD + "WHERE tenant_id = $1 AND call_id = $2 ORDER BY attempt, open_time, reservation_id"


class PostgresUsage:
    """Reads as the service role, each read in a transaction of its tenant."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def period(self, tenant_id: TenantId, start: datetime | None, end: datetime | None) -> PeriodSums:
        """Sums the calls opened in a period."""
        async with self._database.transaction(tenant_id) as connection:
            bounds = await connection.fetchrow(SELECT_PERIOD, start, end)
            first, last = bounds["start_time"], bounds["end_time"]
            refuse_bad_period(first, last)
            rows = await connection.fetch(SELECT_SUMS, tenant_id, first, last)
        return PeriodSums(first, last, [_group(row) for row in rows])

    async def page(self, tenant_id: TenantId, states: Sequence[CallState], after: PagePosition | None, size: int) -> Sequence[CallRecord]:
        """Returns up to `size` calls, newest first, opened before the position."""
        wanted = [int(state) for state in states]
        async with self._database.transaction(tenant_id) as connection:
            if after is None:
                rows = await connection.fetch(SELECT_FIRST_PAGE, tenant_id, wanted, size)
            else:
                rows = await connection.fetch(SELECT_NEXT_PAGE, tenant_id, wanted, size, after.open_time, after.reservation_id)
        return [_record(row) for row in rows]

    async def attempts(self, tenant_id: TenantId, call_id: UUID) -> Sequence[CallRecord]:
        """Returns the attempts of a call, first first."""
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(SELECT_ATTEMPTS, tenant_id, call_id)
        return [_record(row) for row in rows]


def _usage(row: asyncpg.Record) -> TokenUsage:
    return TokenUsage(
        row["input_tokens"],
        row["output_tokens"],
        row["cache_read_tokens"],
        row["cache_write_5m_tokens"],
        row["cache_write_1h_tokens"],
    )


def _group(row: asyncpg.Record) -> UsageGroup:
    return UsageGroup(
        state=CallState(row["state"]),
        model=row["model"],
        feature=row["feature"],
        price_version=row["price_version"],
        call_count=row["call_count"],
        usage=_usage(row),
        cost_nano_usd=row["cost_nano_usd"],
        bound_nano_usd=row["bound_nano_usd"],
    )


def _record(row: asyncpg.Record) -> CallRecord:
    return CallRecord(
        call_id=row["call_id"],
        reservation_id=row["reservation_id"],
        attempt=row["attempt"],
        state=CallState(row["state"]),
        open_time=row["open_time"],
        end_time=row["end_time"],
        provider=row["provider"],
        model=row["model"],
        feature=row["feature"],
        user=row["user_name"],
        prompt_version=row["prompt_version"],
        price_version=row["price_version"],
        usage=None if row["input_tokens"] is None else _usage(row),
        cost_nano_usd=row["cost_nano_usd"],
        bound_nano_usd=row["bound_nano_usd"],
        entry_id=row["entry_id"],
        end_cause=row["end_cause"],
        first_token_ms=row["first_token_ms"],
        total_ms=row["total_ms"],
    )
