"""Closes periods and writes invoices in Postgres, as the jobs role: no tenant's own transaction can make one."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_billing_reader import SUM_SECONDS, PostgresBillingReader, hold_months
from services.metering.adapters.stored_invoices import closing_of, line_rows, use_rows
from services.metering.billing.books import BillingReader, CloseAnswer, CloseOutcome, DueTenant
from services.metering.billing.invoice import Invoice, digest
from services.metering.billing.periods import DEFAULT_ANCHOR_DAY, BillingPeriod

_ALLOW_LONG = f"SET LOCAL statement_timeout = '{int(SUM_SECONDS)}s'"
_BEFORE_ALL = UUID(int=0)
CLOSE = "SELECT * FROM metering.close_period($1, $2, $3, $4, $5, $6)"
INSERT_INVOICE = """
INSERT INTO metering.invoices (tenant_id, number, charges_nano_usd, carried_in_nano_usd, credits_nano_usd, due_nano_usd,
    carried_out_nano_usd, digest)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING RETURNING number
"""
INSERT_LINE = """
INSERT INTO metering.invoice_lines (tenant_id, number, line_number, kind, is_late, period_start, period_end, span_start, span_end, plan,
    plan_version, position, name, tier, quantity, nano_usd_per_million, amount_nano_usd)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
"""
INSERT_USE = "INSERT INTO metering.credit_uses (tenant_id, number, credit_id, position, amount_nano_usd) VALUES ($1, $2, $3, $4, $5)"
# No period is shorter than 28 days: whose last one ended less than that before the moment has none that ended since.
SELECT_DUE = """
SELECT t.tenant_id, c.period_end, s.anchor_day, e.erase_time,
       CASE WHEN c.period_end IS NULL THEN least(
           (SELECT min(f.effective_time) FROM metering.subscriptions f WHERE f.tenant_id = t.tenant_id),
           (SELECT min(n.reserve_time) FROM metering.entries n WHERE n.tenant_id = t.tenant_id),
           (SELECT min(u.reserve_time) FROM metering.unit_entries u WHERE u.tenant_id = t.tenant_id),
           metering.first_event_time(t.tenant_id)) END AS first_time
FROM metering.tenant_epochs t
LEFT JOIN LATERAL (SELECT period_end FROM metering.invoice_closings WHERE tenant_id = t.tenant_id ORDER BY number DESC LIMIT 1) c ON true
LEFT JOIN LATERAL (SELECT anchor_day FROM metering.subscriptions WHERE tenant_id = t.tenant_id ORDER BY number DESC LIMIT 1) s ON true
LEFT JOIN metering.erased_tenants e ON e.tenant_id = t.tenant_id
WHERE t.tenant_id > $1 AND (c.period_end IS NULL OR c.period_end <= $2::timestamptz - interval '28 days')
ORDER BY t.tenant_id LIMIT $3
"""
SELECT_UNFINISHED_TENANTS = """
SELECT DISTINCT c.tenant_id FROM metering.invoice_closings c
LEFT JOIN metering.invoices i ON i.tenant_id = c.tenant_id AND i.number = c.number
WHERE i.number IS NULL AND c.close_time > clock_timestamp() - interval '60 days' LIMIT $1
"""


class PostgresClosings:
    """The only writer of closings, invoices, their lines, and of what credits paid."""

    def __init__(self, jobs: JobsDatabase) -> None:
        self._jobs = jobs

    @asynccontextmanager
    async def reading(self, tenant_id: TenantId) -> AsyncIterator[BillingReader]:
        """Begins a transaction: what it reads for an invoice was recorded before the closing, and stands still."""
        async with self._jobs.transaction() as connection:
            await connection.execute(_ALLOW_LONG)
            await hold_months(connection)
            yield PostgresBillingReader(connection, tenant_id)

    async def close(
        self, tenant_id: TenantId, invoice_id: UUID, period: BillingPeriod, tier_plan: str, subscription_number: int
    ) -> CloseAnswer:
        """Closes a period, once, under the tenant's lock."""
        async with self._jobs.transaction() as connection:
            row = await connection.fetchrow(
                CLOSE, tenant_id, invoice_id, period.start_time, period.end_time, tier_plan, subscription_number
            )
        outcome = CloseOutcome(row["outcome"])
        closed = outcome is CloseOutcome.CLOSED
        return CloseAnswer(outcome, closing_of(row) if closed else None, None if closed else row["period_end"])

    async def store(self, tenant_id: TenantId, invoice: Invoice) -> None:
        """Writes an invoice with its lines, all or nothing; who comes second waits for the first and finds it written."""
        content, number = invoice.content, invoice.closing.number
        amounts = (
            content.charges_nano_usd,
            content.carried_in_nano_usd,
            content.credits_nano_usd,
            content.due_nano_usd,
            content.carried_out_nano_usd,
        )
        async with self._jobs.transaction() as connection:
            if await connection.fetchval(INSERT_INVOICE, tenant_id, number, *amounts, digest(invoice)) is None:
                return
            await connection.executemany(INSERT_LINE, line_rows(tenant_id, invoice))
            await connection.executemany(INSERT_USE, use_rows(tenant_id, invoice))

    async def due(self, after: TenantId | None, end_before: datetime, size: int) -> Sequence[DueTenant]:
        """Returns up to `size` tenants after one whose next period may end at or before the moment."""
        rows = await self._jobs.call(SELECT_DUE, after or _BEFORE_ALL, end_before, size)
        return [_due(row) for row in rows]

    async def unfinished(self, size: int) -> Sequence[TenantId]:
        """Returns up to `size` tenants with a closed period that has no invoice yet."""
        return [TenantId(row["tenant_id"]) for row in await self._jobs.call(SELECT_UNFINISHED_TENANTS, size)]


def _due(row: asyncpg.Record) -> DueTenant:
    is_subscribed = row["anchor_day"] is not None
    anchor = row["anchor_day"] if is_subscribed else DEFAULT_ANCHOR_DAY
    return DueTenant(TenantId(row["tenant_id"]), row["period_end"], row["first_time"], anchor, is_subscribed, row["erase_time"])
