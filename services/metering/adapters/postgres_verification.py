"""The books in Postgres as whoever verifies them reads them: each part in one read-only snapshot of the tenant's own transaction."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg

from services.kernel.ids import TenantId
from services.kernel.placement import HOME
from services.kernel.tenant_database import Connection, JobsDatabase, TenantDatabase
from services.metering.adapters.postgres_billing_reader import SUM_SECONDS, PostgresBillingReader, hold_months
from services.metering.adapters.verification_statements import (
    COMPARE_BALANCES,
    COMPARE_CALLS,
    COMPARE_LATENCIES,
    COMPARE_LEVELS,
    COMPARE_SUMS,
    COMPARE_WEEKS,
    NEXT_DAY,
    NEXT_TENANT,
    SELECT_CALLS,
    SELECT_ENTRIES,
    SELECT_SUMMED_MONTHS,
)
from services.metering.billing.books import StoredInvoice
from services.metering.billing.exact import AmountTooLarge
from services.metering.billing.making import make_invoice
from services.metering.billing.proration import UnknownBillingPlan
from services.metering.call import TokenUsage
from services.metering.entry_prices import PricedEntry, price_differences
from services.metering.price_book import PriceVersion
from services.metering.rerating import Versions
from services.metering.verification import MOST_TOLD, Check, Difference, Part, invoice_differences, missing_invoice, unbillable

_ALLOW_LONG = f"SET LOCAL statement_timeout = '{int(SUM_SECONDS)}s'"
_CALLS, _INVOICES = 5_000, 20
_AFTER_ALL = UUID(int=(1 << 128) - 1)
_DAY = timedelta(hours=24)
_OF_A_DAY = (
    (Check.USAGE_SUM, COMPARE_SUMS),
    (Check.USAGE_SUM, COMPARE_LEVELS),
    (Check.LATENCY, COMPARE_LATENCIES),
    (Check.BALANCE, COMPARE_BALANCES),
)
# A closing gets its invoice in the next moment, or from the next round of the job that finishes what a crash left.
_UNFINISHED = timedelta(minutes=15)


class PostgresVerification:
    """Compares as the service role, behind the tenant's wall; the jobs role tells which tenants there are."""

    def __init__(self, database: TenantDatabase, jobs: JobsDatabase, versions: Versions) -> None:
        self._database = database
        self._jobs = jobs
        self._versions = versions

    async def next_tenant(self, after: UUID) -> TenantId | None:
        """Returns the first tenant after an id that has anything in the books."""
        found = await self._jobs.fetch_value(NEXT_TENANT, after)
        return None if found is None else TenantId(found)

    async def calls(self, tenant_id: TenantId, after: UUID) -> Part:
        """Compares up to 5,000 calls and uses of units with their entries, and these with the price book."""
        async with self._snapshot(tenant_id) as connection:
            page = await connection.fetchrow(SELECT_CALLS, tenant_id, after, _CALLS, timeout=SUM_SECONDS)
            last = page["last"] if page["calls"] == _CALLS else _AFTER_ALL
            rows = await connection.fetch(COMPARE_CALLS, tenant_id, after, last, MOST_TOLD, timeout=SUM_SECONDS)
            entries = [_entry(row) for row in await connection.fetch(SELECT_ENTRIES, tenant_id, after, last, timeout=SUM_SECONDS)]
        of_prices = price_differences(entries, await self._named(entries))
        differences = [*_differences(Check.CALL, rows), *of_prices][:MOST_TOLD]
        following = None if last == _AFTER_ALL else str(last)
        return Part(page["calls"], differences, rows[0]["found"] + len(of_prices) - len(differences), following)

    async def use(self, tenant_id: TenantId, start: datetime) -> Part:
        """Compares the sums of one day; on the first day of a week that has any use, those of the week too."""
        async with self._snapshot(tenant_id) as connection:
            day = await connection.fetchval(NEXT_DAY, tenant_id, start, timeout=SUM_SECONDS)
            if day is None:
                return Part(0, (), 0, None)
            answers = [
                (check, await connection.fetch(statement, tenant_id, day, day + _DAY, MOST_TOLD, timeout=SUM_SECONDS))
                for check, statement in _OF_A_DAY
            ]
            week = day - day.weekday() * _DAY
            if week >= start or await connection.fetchval(NEXT_DAY, tenant_id, week, timeout=SUM_SECONDS) == day:
                rows = await connection.fetch(COMPARE_WEEKS, tenant_id, week, week + 7 * _DAY, MOST_TOLD, timeout=SUM_SECONDS)
                answers.append((Check.USAGE_SUM, rows))
            months = await _summed_months(connection, tenant_id, min(week, day), week + 7 * _DAY)
        found = [item for check, rows in answers for item in _differences(check, rows)]
        differing = sum(rows[0]["found"] for _, rows in answers)
        compared = sum(rows[0]["compared"] for _, rows in answers)
        return Part(compared, found[:MOST_TOLD], differing - len(found[:MOST_TOLD]), (day + _DAY).isoformat(), months)

    async def invoices(self, tenant_id: TenantId, after_number: int) -> Part:
        """Makes up to 20 invoices again; at their end, also those that are not there."""
        async with self._snapshot(tenant_id) as connection:
            reader = PostgresBillingReader(connection, tenant_id)
            page = await reader.invoices(after_number, _INVOICES)
            found = [item for stored in page for item in await _compared(reader, stored)]
            is_last = len(page) < _INVOICES
            if is_last:
                found += await _missing(reader)
            spans = [line.line.key for stored in page for line in stored.invoice.content.lines]
            months: Sequence[str] = ()
            if spans:
                start, end = min(key.start_time for key in spans), max(key.end_time for key in spans)
                months = await _summed_months(connection, tenant_id, start, end)
        following = None if is_last else str(page[-1].invoice.closing.number)
        return Part(len(page), found[:MOST_TOLD], len(found) - len(found[:MOST_TOLD]), following, months)

    async def _named(self, entries: Sequence[PricedEntry]) -> dict[str, PriceVersion]:
        found = [await self._versions.version(name) for name in sorted({entry.price_version for entry in entries})]
        return {version.version: version for version in found if version is not None}

    @asynccontextmanager
    async def _snapshot(self, tenant_id: TenantId) -> AsyncIterator[Connection]:
        async with self._database.transaction_at(HOME, tenant_id, snapshot=True) as connection:
            await connection.execute(_ALLOW_LONG)
            await hold_months(connection)
            yield connection


async def _compared(reader: PostgresBillingReader, stored: StoredInvoice) -> Sequence[Difference]:
    closing = stored.invoice.closing
    try:
        return invoice_differences(stored, await make_invoice(reader, closing))
    except UnknownBillingPlan as error:
        return [unbillable(closing, str(error), "plan")]
    except AmountTooLarge:
        return [unbillable(closing, str(stored.invoice.content.due_nano_usd), "due_nano_usd")]


async def _missing(reader: PostgresBillingReader) -> list[Difference]:
    settled_before = datetime.now(UTC) - _UNFINISHED
    found = []
    for closing in await reader.unfinished():
        if closing.close_time < settled_before:
            try:
                found.append(missing_invoice(closing, await make_invoice(reader, closing)))
            except (AmountTooLarge, UnknownBillingPlan):
                # Whoever closes it says why; here it is enough that it is not there.
                found.append(unbillable(closing, "", "due_nano_usd"))
    return found


async def _summed_months(connection: Connection, tenant_id: TenantId, start: datetime, end: datetime) -> list[str]:
    return [row["month"] for row in await connection.fetch(SELECT_SUMMED_MONTHS, tenant_id, start, end, timeout=SUM_SECONDS)]


def _entry(row: asyncpg.Record) -> PricedEntry:
    usage = TokenUsage(
        row["input_tokens"], row["output_tokens"], row["cache_read_tokens"], row["cache_write_5m_tokens"], row["cache_write_1h_tokens"]
    )
    names = (row["price_version"], row["provider"], row["model"])
    return PricedEntry(row["reservation_id"], row["entry_id"], row["kind"], *names, usage, row["cost_nano_usd"])


def _differences(check: Check, rows: Sequence[asyncpg.Record]) -> list[Difference]:
    told = [row for row in rows if row["figure"] is not None]
    return [Difference(check, row["subject"], row["figure"], _text(row["stored"]), _text(row["recomputed"])) for row in told]


def _text(figure: int | str | None) -> str:
    return "" if figure is None else str(figure)
