"""One tenant's billing books in Postgres, read within a transaction of the service role or of the jobs role."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from services.kernel.errors import Unavailable
from services.kernel.ids import TenantId
from services.kernel.tenant_database import Connection
from services.metering.adapters.stored_invoices import closing_of, credit_note_of, invoice_of
from services.metering.billing.books import CreditPosition, EntryPosition, EntryWindow, LineEntry, StoredInvoice
from services.metering.billing.credits import Credit
from services.metering.billing.invoice import Closing, Quantities
from services.metering.billing.proration import Plans, Span, Subscription
from services.metering.billing.terms import PlanVersion, read_terms

# Sums of a month of a busy tenant: longer than what a caller waits for.
SUM_SECONDS = 60.0
SELECT_PLANS = "SELECT plan, version, effective_time, terms FROM metering.billing_plan_versions ORDER BY plan, effective_time"
SELECT_SUBSCRIPTIONS = """
SELECT number, plan, effective_time, anchor_day FROM metering.subscriptions WHERE tenant_id = $1 ORDER BY number
"""
_CLOSING = "SELECT c.number, c.invoice_id, c.period_start, c.period_end, c.close_time, c.tier_plan"
SELECT_CLOSINGS = _CLOSING + " FROM metering.invoice_closings c WHERE c.tenant_id = $1 ORDER BY c.number"
SELECT_UNFINISHED = (
    _CLOSING
    + """
FROM metering.invoice_closings c LEFT JOIN metering.invoices i ON i.tenant_id = c.tenant_id AND i.number = c.number
WHERE c.tenant_id = $1 AND i.number IS NULL ORDER BY c.number
"""
)
_CREDIT = "SELECT credit_id, amount_nano_usd, priority, effective_time, expire_time, reason, record_time FROM metering.credits"
SELECT_CREDITS = (
    _CREDIT
    + """
WHERE tenant_id = $1 AND record_time < coalesce($2::timestamptz, 'infinity') ORDER BY record_time, credit_id
"""
)
_PAGE_OF_CREDITS = """
SELECT c.credit_id, c.amount_nano_usd, c.priority, c.effective_time, c.expire_time, c.reason, c.record_time,
       coalesce((SELECT sum(u.amount_nano_usd) FROM metering.credit_uses u WHERE u.tenant_id = $1 AND u.credit_id = c.credit_id), 0)::bigint
           AS used_nano_usd
FROM metering.credits c WHERE c.tenant_id = $1
"""
SELECT_FIRST_CREDITS = _PAGE_OF_CREDITS + "ORDER BY c.record_time, c.credit_id LIMIT $2"
SELECT_NEXT_CREDITS = _PAGE_OF_CREDITS + "AND (c.record_time, c.credit_id) > ($3, $4) ORDER BY c.record_time, c.credit_id LIMIT $2"
SELECT_CREDIT_USED = """
SELECT coalesce(sum(amount_nano_usd), 0)::bigint FROM metering.credit_uses WHERE tenant_id = $1 AND credit_id = $2
"""
SELECT_CREDITS_USED = """
SELECT credit_id, sum(amount_nano_usd)::bigint AS amount FROM metering.credit_uses WHERE tenant_id = $1 AND number < $2 GROUP BY credit_id
"""
SELECT_CARRIED = "SELECT carried_out_nano_usd FROM metering.invoices WHERE tenant_id = $1 AND number = $2"
# A call of a function that names the tenant first; from the beginning there is nothing to look for by the time of record.
SELECT_LATE_DAYS = "SELECT day FROM metering.late_days($1, $2, $3, coalesce($4::timestamptz, 'infinity'))"
SELECT_EARLIER_DAYS = """
SELECT DISTINCT date_trunc('day', use_time, 'UTC') AS day FROM metering.billable_usage
WHERE tenant_id = $1 AND use_time < $2 AND record_time < coalesce($3::timestamptz, 'infinity')
  AND (NOT is_near OR record_time < $2::timestamptz + interval '1 day')
"""
SELECT_SUMS = """
SELECT span_start, meter, quantity::text AS quantity FROM metering.usage_sums($1, $2, $3, coalesce($4::timestamptz, 'infinity'), $5)
"""
_INVOICE = (
    _CLOSING
    + """, i.charges_nano_usd, i.carried_in_nano_usd, i.credits_nano_usd, i.due_nano_usd, i.carried_out_nano_usd, i.digest
FROM metering.invoices i JOIN metering.invoice_closings c ON c.tenant_id = i.tenant_id AND c.number = i.number
"""
)
SELECT_INVOICES = _INVOICE + "WHERE i.tenant_id = $1 AND i.number > $2 ORDER BY i.number LIMIT $3"
SELECT_INVOICE = _INVOICE + "WHERE i.tenant_id = $1 AND c.invoice_id = $2"
SELECT_LINES = """
SELECT number, kind, is_late, period_start, period_end, span_start, span_end, plan, plan_version, position, name, tier, quantity,
       nano_usd_per_million, amount_nano_usd
FROM metering.invoice_lines WHERE tenant_id = $1 AND number = ANY ($2::integer[]) ORDER BY number, line_number
"""
SELECT_USES = """
SELECT number, credit_id, amount_nano_usd FROM metering.credit_uses
WHERE tenant_id = $1 AND number = ANY ($2::integer[]) ORDER BY number, position
"""
SELECT_NOTES = """
SELECT credit_note_id, number, amount_nano_usd, reason, issue_time FROM metering.credit_notes
WHERE tenant_id = $1 AND number = ANY ($2::integer[]) ORDER BY number, issue_time, credit_note_id
"""
_ENTRY = """
SELECT source, usage_id, use_time, record_time, event_count,
       CASE WHEN source = 4 AND level IS NOT NULL THEN level * sign(quantity)::bigint ELSE quantity END AS quantity
FROM metering.billable_usage
WHERE tenant_id = $1 AND meter = $2 AND use_time >= $3 AND use_time < $4
  AND record_time >= coalesce($5::timestamptz, '-infinity') AND record_time < $6 AND (quantity <> 0 OR source = 4)
  AND (NOT is_near OR record_time >= $3::timestamptz - interval '1 day' AND record_time < $4::timestamptz + interval '1 day')
"""
SELECT_FIRST_ENTRIES = _ENTRY + "ORDER BY use_time, source, usage_id LIMIT $7"
SELECT_NEXT_ENTRIES = _ENTRY + "AND (use_time, source, usage_id) > ($8, $9::smallint, $10) ORDER BY use_time, source, usage_id LIMIT $7"

# No month of events is dropped until the transaction ends: what was added up a statement ago is added up of the same rows.
HOLD_MONTHS = "CALL metering.hold_event_months()"


async def hold_months(connection: Connection) -> None:
    """Keeps the months of events that a transaction sees for as long as it lasts. Raises: Unavailable at the moment of a drop."""
    try:
        await connection.execute(HOLD_MONTHS)
    except asyncpg.SerializationError:
        raise Unavailable("postgres", "a month of events was dropped at this moment: repeat the call") from None


class PostgresBillingReader:
    """Reads for one tenant on one connection; row-level security or the jobs role's policies stand behind the statements."""

    def __init__(self, connection: Connection, tenant_id: TenantId) -> None:
        self._connection = connection
        self._tenant_id = tenant_id

    async def closings(self) -> Sequence[Closing]:
        """Returns the closed periods, first first."""
        return [closing_of(row) for row in await self._connection.fetch(SELECT_CLOSINGS, self._tenant_id)]

    async def unfinished(self) -> Sequence[Closing]:
        """Returns the closed periods without an invoice, first first."""
        return [closing_of(row) for row in await self._connection.fetch(SELECT_UNFINISHED, self._tenant_id)]

    async def subscriptions(self) -> Sequence[Subscription]:
        """Returns all subscriptions, by number."""
        return [subscription_of(row) for row in await self._connection.fetch(SELECT_SUBSCRIPTIONS, self._tenant_id)]

    async def plans(self) -> Plans:
        """Returns every version of every plan."""
        found: dict[str, list[PlanVersion]] = {}
        for row in await self._connection.fetch(SELECT_PLANS):
            version = PlanVersion(row["plan"], row["version"], row["effective_time"], read_terms(json.loads(row["terms"])))
            found.setdefault(version.plan, []).append(version)
        return found

    async def credits(self, recorded_before: datetime | None) -> Sequence[Credit]:
        """Returns the credits recorded before a moment."""
        return [credit_of(row) for row in await self._connection.fetch(SELECT_CREDITS, self._tenant_id, recorded_before)]

    async def credits_page(self, after: CreditPosition | None, size: int) -> Sequence[tuple[Credit, int]]:
        """Returns up to `size` credits after a position, in the order they were granted, each with what invoices took of it."""
        if after is None:
            rows = await self._connection.fetch(SELECT_FIRST_CREDITS, self._tenant_id, size)
        else:
            rows = await self._connection.fetch(SELECT_NEXT_CREDITS, self._tenant_id, size, after.record_time, after.credit_id)
        return [(credit_of(row), row["used_nano_usd"]) for row in rows]

    async def credit_used(self, credit_id: UUID) -> int:
        """Returns what invoices took of a credit."""
        used: int = await self._connection.fetchval(SELECT_CREDIT_USED, self._tenant_id, credit_id)
        return used

    async def credits_used(self, before_number: int) -> Mapping[UUID, int]:
        """Returns what invoices before this one took of each credit."""
        rows = await self._connection.fetch(SELECT_CREDITS_USED, self._tenant_id, before_number)
        return {row["credit_id"]: row["amount"] for row in rows}

    async def carried_out(self, number: int) -> int:
        """Returns what an invoice carries to the next; 0 for one that is not there."""
        return await self._connection.fetchval(SELECT_CARRIED, self._tenant_id, number) or 0

    async def late_days(self, start: datetime, recorded_from: datetime | None, recorded_before: datetime | None) -> Sequence[datetime]:
        """Returns the days of use before `start` that was recorded in between."""
        if recorded_from is None:
            rows = await self._connection.fetch(SELECT_EARLIER_DAYS, self._tenant_id, start, recorded_before, timeout=SUM_SECONDS)
        else:
            rows = await self._connection.fetch(
                SELECT_LATE_DAYS, self._tenant_id, start, recorded_from, recorded_before, timeout=SUM_SECONDS
            )
        return sorted(row["day"] for row in rows)

    async def sums(self, spans: Sequence[Span], recorded_before: datetime | None) -> Quantities:
        """Returns what was used in each span, by meter that a plan of them charges."""
        starts, ends = [span.start_time for span in spans], [span.end_time for span in spans]
        meters = sorted({charge.meter for span in spans for charge in span.version.terms.charges})
        rows = await self._connection.fetch(SELECT_SUMS, self._tenant_id, starts, ends, recorded_before, meters, timeout=SUM_SECONDS)
        found: dict[datetime, dict[str, int]] = {}
        for row in rows:
            found.setdefault(row["span_start"], {})[row["meter"]] = int(row["quantity"])
        return found

    async def invoices(self, after_number: int, size: int) -> Sequence[StoredInvoice]:
        """Returns up to `size` invoices after a number, in order, with their lines."""
        return await self._whole(await self._connection.fetch(SELECT_INVOICES, self._tenant_id, after_number, size))

    async def invoice(self, invoice_id: UUID) -> StoredInvoice | None:
        """Returns an invoice; None when it is absent or another tenant's."""
        found = await self._whole(await self._connection.fetch(SELECT_INVOICE, self._tenant_id, invoice_id))
        return found[0] if found else None

    async def entries(self, window: EntryWindow, after: EntryPosition | None, size: int) -> Sequence[LineEntry]:
        """Returns up to `size` records after a position, by time of use."""
        within = (window.meter, window.start_time, window.end_time, window.recorded_from, window.recorded_before)
        if after is None:
            rows = await self._connection.fetch(SELECT_FIRST_ENTRIES, self._tenant_id, *within, size)
        else:
            position = (after.use_time, after.source, after.usage_id)
            rows = await self._connection.fetch(SELECT_NEXT_ENTRIES, self._tenant_id, *within, size, *position)
        return [_line_entry(row) for row in rows]

    async def _whole(self, rows: Sequence[asyncpg.Record]) -> list[StoredInvoice]:
        numbers = [row["number"] for row in rows]
        lines = await self._connection.fetch(SELECT_LINES, self._tenant_id, numbers)
        uses = await self._connection.fetch(SELECT_USES, self._tenant_id, numbers)
        notes = [credit_note_of(row) for row in await self._connection.fetch(SELECT_NOTES, self._tenant_id, numbers)]
        return [invoice_of(row, lines, uses, [note for note in notes if note.number == row["number"]]) for row in rows]


def _line_entry(row: asyncpg.Record) -> LineEntry:
    times = (row["use_time"], row["record_time"])
    return LineEntry(row["source"], row["usage_id"], *times, row["quantity"], row["event_count"])


def subscription_of(row: asyncpg.Record) -> Subscription:
    """Reads a subscription."""
    return Subscription(row["number"], row["plan"], row["effective_time"], row["anchor_day"])


def credit_of(row: asyncpg.Record) -> Credit:
    """Reads a credit."""
    return Credit(
        row["credit_id"],
        row["amount_nano_usd"],
        row["priority"],
        row["effective_time"],
        row["expire_time"],
        row["reason"],
        row["record_time"],
    )
