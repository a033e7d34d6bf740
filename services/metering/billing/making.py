"""Works out what an invoice says, from the books alone: the same whenever and wherever it is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from services.metering.billing.books import BillingReader
from services.metering.billing.invoice import Closing, Invoice, InvoiceContent, RatedPeriod, build_content, digest
from services.metering.billing.periods import DEFAULT_ANCHOR_DAY, BillingPeriod, period_of
from services.metering.billing.proration import Plans, Span, Subscription, spans_of

_PAGE = 100


@dataclass(frozen=True, slots=True)
class Target:
    """The invoice to make: after `earlier` closings, of what was recorded before `close_time` (None: until now)."""

    period: BillingPeriod
    close_time: datetime | None
    tier_plan: str
    earlier: Sequence[Closing]
    takes_late: bool


@dataclass(frozen=True, slots=True)
class Mismatch:
    """An invoice that is not what the books say; `recomputed` is what they say."""

    closing: Closing
    stored_digest: bytes
    recomputed: InvoiceContent


def anchor_day(subscriptions: Sequence[Subscription]) -> int:
    """Returns the day a tenant's periods begin on: the last subscription's, since it cannot change after the first closing."""
    return subscriptions[-1].anchor_day if subscriptions else DEFAULT_ANCHOR_DAY


async def make_content(reader: BillingReader, target: Target) -> InvoiceContent:
    """Makes an invoice's content. Raises: UnknownBillingPlan, AmountTooLarge."""
    subscriptions, plans = await reader.subscriptions(), await reader.plans()
    spans = _spans(target.period, target.tier_plan, subscriptions, plans)
    own = RatedPeriod(target.period, spans, await reader.sums(spans, target.close_time), None)
    late = await _late(reader, target, subscriptions, plans) if target.takes_late else []
    number = len(target.earlier) + 1
    carried = await reader.carried_out(number - 1) if target.takes_late else 0
    return build_content(own, late, carried, await reader.credits(target.close_time), await reader.credits_used(number))


async def make_invoice(reader: BillingReader, closing: Closing) -> Invoice:
    """Makes the invoice of a closing. Raises: as make_content."""
    earlier = [item for item in await reader.closings() if item.number < closing.number]
    content = await make_content(reader, Target(closing.period, closing.close_time, closing.tier_plan, earlier, takes_late=True))
    return Invoice(closing, content)


async def verify(reader: BillingReader) -> list[Mismatch]:
    """Makes every stored invoice of the tenant again and returns those that say something else, in what they say or in their digest."""
    found, after = [], 0
    while True:
        page = await reader.invoices(after, _PAGE)
        for stored in page:
            made = await make_invoice(reader, stored.invoice.closing)
            if made != stored.invoice or digest(made) != stored.digest:
                found.append(Mismatch(stored.invoice.closing, stored.digest, made.content))
        if len(page) < _PAGE:
            return found
        after = page[-1].invoice.closing.number


async def _late(reader: BillingReader, target: Target, subscriptions: Sequence[Subscription], plans: Plans) -> list[RatedPeriod]:
    last = target.earlier[-1] if target.earlier else None
    closed = {item.period: item for item in target.earlier}
    days = await reader.late_days(target.period.start_time, last.close_time if last else None, target.close_time)
    anchor, rated = anchor_day(subscriptions), []
    for period in sorted({period_of(day, anchor) for day in days}):
        billed = closed.get(period)
        # Before the first invoice nothing was billed: whatever comes of that time is rated as it would have been then.
        tier_plan = (billed or (target.earlier[0] if target.earlier else target)).tier_plan
        spans = _spans(period, tier_plan, subscriptions, plans)
        if billed is None:
            spans = [span.usage_alone() for span in spans]
        before = await reader.sums(spans, last.close_time) if last else {}
        rated.append(RatedPeriod(period, spans, await reader.sums(spans, target.close_time), before))
    return rated


def _spans(period: BillingPeriod, tier_plan: str, subscriptions: Sequence[Subscription], plans: Plans) -> list[Span]:
    return spans_of(period, () if tier_plan else subscriptions, tier_plan, plans)
