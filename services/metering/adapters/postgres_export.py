"""Rows of the books in Postgres, page by page, as the service role: each page is one statement, and so one snapshot."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import TenantDatabase
from services.metering.adapters.postgres_billing import LOCK_EXCLUSIVE
from services.metering.call import TokenUsage
from services.metering.event import LedgerEvent
from services.metering.usage_export import ExportedEntry, ExportSpan, RowKey

SELECT_MOMENT = "SELECT clock_timestamp()"
# $2 and $6 are the position: both branches read their index from there on, and no more than a page.
SELECT_ENTRIES = """
SELECT r.source, r.entry_id, r.reservation_id, k.call_id, r.number, r.use_time, r.record_time, r.provider, r.model, r.price_version,
       coalesce(k.feature, '') AS feature, coalesce(k.user_name, '') AS user_name, coalesce(k.prompt_version, '') AS prompt_version,
       coalesce(k.tier, '') AS tier, r.input_tokens, r.output_tokens, r.cache_read_tokens, r.cache_write_5m_tokens, r.cache_write_1h_tokens,
       r.cost_nano_usd, r.product_unit, r.quantity
FROM (
    (SELECT 1::smallint AS source, n.entry_id, n.reservation_id, n.number, n.reserve_time AS use_time, n.record_time, n.provider, n.model,
            n.price_version, n.input_tokens, n.output_tokens, n.cache_read_tokens, n.cache_write_5m_tokens, n.cache_write_1h_tokens,
            n.cost_nano_usd, '' AS product_unit, 0::bigint AS quantity
     FROM metering.entries n
     WHERE n.tenant_id = $1 AND n.reserve_time >= $2 AND n.reserve_time < $3 AND n.record_time < $4
       AND (n.reserve_time, n.entry_id) > ($2, $6)
     ORDER BY n.reserve_time, n.entry_id LIMIT $5)
    UNION ALL
    (SELECT 2::smallint, u.entry_id, u.reservation_id, 1::smallint, u.reserve_time, u.record_time, '', '', '', 0, 0, 0, 0, 0, 0,
            u.product_unit, u.quantity
     FROM metering.unit_entries u
     WHERE u.tenant_id = $1 AND u.reserve_time >= $2 AND u.reserve_time < $3 AND u.record_time < $4
       AND (u.reserve_time, u.entry_id) > ($2, $6)
     ORDER BY u.reserve_time, u.entry_id LIMIT $5)
    ORDER BY use_time, entry_id LIMIT $5
) r LEFT JOIN metering.calls k ON k.tenant_id = $1 AND k.reservation_id = r.reservation_id
ORDER BY r.use_time, r.entry_id
"""
_EVENT = """
SELECT e.event_id, e.record_time, e.product, e.source, e.id, e.event_type, e.quantity, e.occurred_at, e.user_name, e.feature, e.reverses,
       e.metadata::text AS metadata
FROM metering.events e
WHERE e.tenant_id = $1 AND e.occurred_at >= $2 AND e.occurred_at < $3 AND e.record_time < $4 AND (e.record_time, e.event_id) > ($6, $7)
"""
# What was recorded within a day of its use is found by the key, and what was not has an index of its own: see the months of events.
SELECT_EVENTS = f"""
SELECT * FROM (
    ({_EVENT} AND e.record_time >= $2::timestamptz - interval '1 day' AND e.record_time < $3::timestamptz + interval '1 day'
       AND e.record_time - e.occurred_at <= interval '1 day' AND e.record_time - e.occurred_at >= interval '-1 day'
     ORDER BY e.record_time, e.event_id LIMIT $5)
    UNION ALL
    ({_EVENT} AND (e.record_time - e.occurred_at > interval '1 day' OR e.record_time - e.occurred_at < interval '-1 day')
     ORDER BY e.record_time, e.event_id LIMIT $5)
) r ORDER BY r.record_time, r.event_id LIMIT $5
"""  # noqa: S608 - made of the fragment above alone


class PostgresExport:
    """Reads in transactions of the tenant."""

    def __init__(self, database: TenantDatabase) -> None:
        self._database = database

    async def moment(self, tenant_id: TenantId) -> datetime:
        """Returns the time under the tenant's lock: who recorded anything before it has committed, as when a period is closed."""
        async with self._database.transaction(tenant_id) as connection:
            await connection.execute(LOCK_EXCLUSIVE, tenant_id)
            moment: datetime = await connection.fetchval(SELECT_MOMENT)
            return moment

    async def entries(self, tenant_id: TenantId, span: ExportSpan, after: RowKey, size: int) -> Sequence[ExportedEntry]:
        """Returns up to `size` entries after a position, by time of use."""
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(SELECT_ENTRIES, tenant_id, after.time, span.end, span.as_of, size, after.row_id)
        return [_entry(row) for row in rows]

    async def events(self, tenant_id: TenantId, span: ExportSpan, after: RowKey, size: int) -> Sequence[LedgerEvent]:
        """Returns up to `size` events after a position, by time of record."""
        within = (tenant_id, span.start, span.end, span.as_of, size)
        async with self._database.transaction(tenant_id) as connection:
            rows = await connection.fetch(SELECT_EVENTS, *within, after.time, after.row_id)
        return [LedgerEvent(*row) for row in rows]


def _entry(row: asyncpg.Record) -> ExportedEntry:
    call_id: UUID | None = row["call_id"]
    return ExportedEntry(
        source=row["source"],
        entry_id=row["entry_id"],
        reservation_id=row["reservation_id"],
        call_id=call_id,
        number=row["number"],
        use_time=row["use_time"],
        record_time=row["record_time"],
        provider=row["provider"],
        model=row["model"],
        price_version=row["price_version"],
        feature=row["feature"],
        user=row["user_name"],
        prompt_version=row["prompt_version"],
        tier=row["tier"],
        usage=TokenUsage(
            row["input_tokens"],
            row["output_tokens"],
            row["cache_read_tokens"],
            row["cache_write_5m_tokens"],
            row["cache_write_1h_tokens"],
        ),
        cost_nano_usd=row["cost_nano_usd"],
        product_unit=row["product_unit"],
        quantity=row["quantity"],
    )
