"""Rows of closings, invoices, lines and credits as values, and values as rows."""

from collections.abc import Sequence

import asyncpg

from services.kernel.ids import TenantId
from services.metering.billing.books import CreditNote, StoredInvoice
from services.metering.billing.charges import LineKey, LineKind, RatedLine
from services.metering.billing.credits import CreditUse
from services.metering.billing.invoice import Closing, Invoice, InvoiceContent, InvoiceLine
from services.metering.billing.periods import BillingPeriod

Row = tuple[object, ...]


def closing_of(row: asyncpg.Record) -> Closing:
    """Reads a closing."""
    period = BillingPeriod(row["period_start"], row["period_end"])
    return Closing(row["number"], row["invoice_id"], period, row["close_time"], row["tier_plan"])


def credit_note_of(row: asyncpg.Record) -> CreditNote:
    """Reads a credit note."""
    return CreditNote(row["credit_note_id"], row["number"], row["amount_nano_usd"], row["reason"], row["issue_time"])


def invoice_of(
    row: asyncpg.Record, lines: Sequence[asyncpg.Record], uses: Sequence[asyncpg.Record], notes: Sequence[CreditNote]
) -> StoredInvoice:
    """Reads an invoice; `lines` and `uses` may hold other invoices' as well."""
    number = row["number"]
    content = InvoiceContent(
        [_line(line) for line in lines if line["number"] == number],
        row["charges_nano_usd"],
        row["carried_in_nano_usd"],
        [CreditUse(use["credit_id"], use["amount_nano_usd"]) for use in uses if use["number"] == number],
        row["due_nano_usd"],
        row["carried_out_nano_usd"],
    )
    return StoredInvoice(Invoice(closing_of(row), content), row["digest"], notes)


def line_rows(tenant_id: TenantId, invoice: Invoice) -> list[Row]:
    """Returns the rows of an invoice's lines, in the order of the table's columns."""
    return [_line_row(tenant_id, invoice.closing.number, number, line) for number, line in enumerate(invoice.content.lines, start=1)]


def use_rows(tenant_id: TenantId, invoice: Invoice) -> list[Row]:
    """Returns the rows of what credits pay."""
    uses = enumerate(invoice.content.credit_uses)
    return [(tenant_id, invoice.closing.number, use.credit_id, position, use.amount_nano_usd) for position, use in uses]


def _line(row: asyncpg.Record) -> InvoiceLine:
    key = LineKey(row["span_start"], row["span_end"], LineKind(row["kind"]), row["position"], row["name"], row["tier"])
    line = RatedLine(key, row["plan"], row["plan_version"], row["quantity"], row["nano_usd_per_million"], row["amount_nano_usd"])
    return InvoiceLine(line, BillingPeriod(row["period_start"], row["period_end"]), row["is_late"])


def _line_row(tenant_id: TenantId, number: int, line_number: int, line: InvoiceLine) -> Row:
    rated, key = line.line, line.line.key
    return (
        tenant_id,
        number,
        line_number,
        int(key.kind),
        line.is_late,
        line.period.start_time,
        line.period.end_time,
        key.start_time,
        key.end_time,
        rated.plan,
        rated.plan_version,
        key.position,
        key.name,
        key.tier,
        rated.quantity,
        rated.nano_usd_per_million,
        rated.amount_nano_usd,
    )
