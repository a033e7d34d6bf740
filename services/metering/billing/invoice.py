"""An invoice as a function of what the ledger holds: lines of its own period, lines of late usage, credits, what is carried on. Pure."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.metering.billing.charges import RatedLine, difference, rate_span
from services.metering.billing.credits import Credit, CreditUse, apply_credits
from services.metering.billing.exact import bounded
from services.metering.billing.periods import BillingPeriod
from services.metering.billing.proration import Span

CURRENCY = "USD"
# What was used in a span, by its start and by meter.
Quantities = Mapping[datetime, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Closing:
    """A period that takes no more rows: those recorded before `close_time` are in its invoice or an earlier one, all others in later ones.

    `tier_plan` is the plan of the tenant's tier where it had no subscription at its close; empty where it had one.
    """

    number: int
    invoice_id: UUID
    period: BillingPeriod
    close_time: datetime
    tier_plan: str


@dataclass(frozen=True, slots=True)
class RatedPeriod:
    """What an invoice takes from one period: the spans, and what was used in them up to its close and up to the close before.

    `before` is None for the invoice's own period, of which nothing was billed yet.
    """

    period: BillingPeriod
    spans: Sequence[Span]
    after: Quantities
    before: Quantities | None


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """A line with the period its usage belongs to; `is_late` where that period was closed before."""

    line: RatedLine
    period: BillingPeriod
    is_late: bool


@dataclass(frozen=True, slots=True)
class InvoiceContent:
    """What is due for a period. due = charges + carried_in − credits, never under 0: what is under 0 is carried to the next invoice."""

    lines: Sequence[InvoiceLine]
    charges_nano_usd: int
    carried_in_nano_usd: int
    credit_uses: Sequence[CreditUse]
    due_nano_usd: int
    carried_out_nano_usd: int

    @property
    def credits_nano_usd(self) -> int:
        """What prepaid credits pay."""
        return sum(use.amount_nano_usd for use in self.credit_uses)


@dataclass(frozen=True, slots=True)
class Invoice:
    """A closed invoice as it is stored."""

    closing: Closing
    content: InvoiceContent


def rated_lines(rated: RatedPeriod) -> list[InvoiceLine]:
    """Rates a period's spans; of a period that was billed before, what has come since. Raises: AmountTooLarge."""
    lines: list[InvoiceLine] = []
    for span in rated.spans:
        after = rate_span(span, rated.after.get(span.start_time, {}))
        before = [] if rated.before is None else rate_span(span, rated.before.get(span.start_time, {}))
        lines += [InvoiceLine(line, rated.period, rated.before is not None) for line in difference(after, before)]
    return lines


def build_content(
    own: RatedPeriod, late: Sequence[RatedPeriod], carried_in: int, credits: Sequence[Credit], used: Mapping[UUID, int]
) -> InvoiceContent:
    """Puts an invoice together; late periods in the order of time, after the invoice's own lines. Raises: AmountTooLarge."""
    lines = rated_lines(own)
    for rated in sorted(late, key=lambda item: item.period):
        lines += rated_lines(rated)
    charges = bounded(sum(line.line.amount_nano_usd for line in lines))
    balance = bounded(charges + carried_in)
    uses = apply_credits(max(0, balance), credits, used, own.period)
    due = max(0, balance) - sum(use.amount_nano_usd for use in uses)
    return InvoiceContent(lines, charges, carried_in, uses, due, min(0, balance))


def digest(invoice: Invoice) -> bytes:
    """SHA-256 of all that an invoice says."""
    closing, content = invoice.closing, invoice.content
    lines = [
        [
            _period(line.period), line.is_late, line.line.key.start_time.isoformat(), line.line.key.end_time.isoformat(),
            int(line.line.key.kind), line.line.key.position, line.line.key.name, line.line.key.tier, line.line.plan, line.line.plan_version,
            line.line.quantity, line.line.nano_usd_per_million, line.line.amount_nano_usd,
        ]
        for line in content.lines
    ]  # fmt: skip
    said = [
        CURRENCY, closing.number, str(closing.invoice_id), _period(closing.period), closing.close_time.isoformat(), closing.tier_plan,
        lines, content.charges_nano_usd, content.carried_in_nano_usd,
        [[str(use.credit_id), use.amount_nano_usd] for use in content.credit_uses],
        content.due_nano_usd, content.carried_out_nano_usd,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(said).encode()).digest()


def _period(period: BillingPeriod) -> list[str]:
    return [period.start_time.isoformat(), period.end_time.isoformat()]
