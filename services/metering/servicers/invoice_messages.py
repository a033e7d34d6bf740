"""Invoices, lines and credits as messages."""

from mesh.common.v1.money_pb2 import NanoUsd
from mesh.metering.v1 import invoice_service_pb2 as pb
from services.kernel.errors import InvalidRequest
from services.kernel.timestamps import to_timestamp
from services.metering.billing.books import StoredInvoice
from services.metering.billing.credits import Credit
from services.metering.billing.invoice import CURRENCY, InvoiceContent, InvoiceLine
from services.metering.billing.periods import BillingPeriod
from services.metering.billing.rendering import description


def refuse_other_currency(currency: str) -> None:
    """Refuses what is not in US dollars. Raises: InvalidRequest."""
    if currency not in ("", CURRENCY):
        raise InvalidRequest("currency", f"everything is billed in {CURRENCY}, and no amount is converted", metadata={"expected": CURRENCY})


def positive(amount: NanoUsd) -> int:
    """Reads an amount. Raises: InvalidRequest for 0 and less."""
    if amount.nano_usd <= 0:
        raise InvalidRequest("amount", "must be over 0")
    return amount.nano_usd


def invoice_message(stored: StoredInvoice) -> pb.Invoice:
    """Builds a closed invoice."""
    closing = stored.invoice.closing
    return pb.Invoice(
        invoice_id=str(closing.invoice_id),
        number=closing.number,
        content=content_message(closing.period, stored.invoice.content),
        close_time=to_timestamp(closing.close_time),
        digest=stored.digest.hex(),
        credit_notes=[
            pb.CreditNote(
                credit_note_id=str(note.credit_note_id),
                amount=NanoUsd(nano_usd=note.amount_nano_usd),
                reason=note.reason,
                issue_time=to_timestamp(note.issue_time),
            )
            for note in stored.notes
        ],
    )


def content_message(period: BillingPeriod, content: InvoiceContent) -> pb.InvoiceContent:
    """Builds what an invoice or a draft says."""
    return pb.InvoiceContent(
        period_start=to_timestamp(period.start_time),
        period_end=to_timestamp(period.end_time),
        currency=CURRENCY,
        lines=[_line(number, line) for number, line in enumerate(content.lines, start=1)],
        charges=NanoUsd(nano_usd=content.charges_nano_usd),
        carried_in=NanoUsd(nano_usd=content.carried_in_nano_usd),
        credit_uses=[
            pb.CreditUse(credit_id=str(use.credit_id), amount=NanoUsd(nano_usd=use.amount_nano_usd)) for use in content.credit_uses
        ],
        due=NanoUsd(nano_usd=content.due_nano_usd),
        carried_out=NanoUsd(nano_usd=content.carried_out_nano_usd),
    )


def credit_message(credit: Credit, used: int) -> pb.Credit:
    """Builds a credit; `used` is what closed invoices took of it."""
    return pb.Credit(
        credit_id=str(credit.credit_id),
        amount=NanoUsd(nano_usd=credit.amount_nano_usd),
        remaining=NanoUsd(nano_usd=credit.amount_nano_usd - used),
        priority=credit.priority,
        effective_time=to_timestamp(credit.effective_time),
        expire_time=to_timestamp(credit.expire_time),
        reason=credit.reason,
    )


def _line(number: int, line: InvoiceLine) -> pb.InvoiceLine:
    rated, key = line.line, line.line.key
    return pb.InvoiceLine(
        line_number=number,
        kind=pb.InvoiceLineKind.ValueType(int(key.kind)),
        name=key.name,
        description=description(line),
        plan=rated.plan,
        plan_version=rated.plan_version,
        span_start=to_timestamp(key.start_time),
        span_end=to_timestamp(key.end_time),
        is_late=line.is_late,
        period_start=to_timestamp(line.period.start_time),
        period_end=to_timestamp(line.period.end_time),
        tier=key.tier,
        quantity=rated.quantity,
        nano_usd_per_million=rated.nano_usd_per_million,
        amount=NanoUsd(nano_usd=rated.amount_nano_usd),
    )
