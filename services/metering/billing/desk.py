"""Drafts and closes invoices, and tells what is behind them. Refuses periods that have not ended or are not the next one."""

from collections.abc import Sequence
from datetime import UTC, datetime

import structlog

from services.kernel.errors import InvalidRequest, MeshError, NotFound, WrongState
from services.kernel.ids import TenantId, new_uuid7
from services.metering.billing.books import BillingBooks, BillingReader, CloseOutcome, ClosingBooks, StoredInvoice
from services.metering.billing.exact import AmountTooLarge
from services.metering.billing.invoice import Closing, InvoiceContent
from services.metering.billing.making import Target, anchor_day, make_content, make_invoice
from services.metering.billing.periods import LATE_USE, BillingPeriod, period_of
from services.metering.billing.proration import Subscription, UnknownBillingPlan

log = structlog.get_logger(__name__)

_CLOSE_ATTEMPTS = 5
_END_OF_TIME = datetime(9998, 1, 1, tzinfo=UTC)


class InvoiceDesk:
    """The one way to an invoice: for operators, for the monthly job, and for who wants to see what the next one will say."""

    def __init__(self, books: BillingBooks, closing: ClosingBooks) -> None:
        self._books = books
        self._closing = closing

    async def draft(self, tenant_id: TenantId, moment: datetime | None, tier: str) -> tuple[BillingPeriod, InvoiceContent]:
        """Returns what the invoice of the period that contains the moment (None: now) would say. Raises: WrongState, NotFound."""
        async with self._books.reading(tenant_id) as reader:
            subscriptions, closings = await reader.subscriptions(), await reader.closings()
            period = period_of(moment or datetime.now(UTC), anchor_day(subscriptions))
            if closings and period.start_time < closings[-1].period.end_time:
                raise WrongState("billing_period", "CLOSED", "the period is closed: ListInvoices has its invoice")
            is_next = bool(closings) and period.start_time == closings[-1].period.end_time
            target = Target(period, None, "" if subscriptions else tier, closings, takes_late=is_next)
            return period, await _content(reader, target)

    async def close(self, tenant_id: TenantId, start: datetime, tier: str) -> StoredInvoice:
        """Closes the period that begins at `start` and returns its invoice; of a period closed before, the same one.

        Raises: InvalidRequest for a time no period begins at; WrongState for one that has not ended or is not the next; NotFound.
        """
        for _ in range(_CLOSE_ATTEMPTS):
            closing = await self._closed(tenant_id, start, tier)
            if closing is not None:
                await self.finish(tenant_id)
                return await self._stored(tenant_id, closing)
        raise WrongState("subscription", "CHANGING", "the tenant's subscription keeps changing: repeat the call")

    async def finish(self, tenant_id: TenantId) -> None:
        """Writes the invoice of every closed period that has none, first first: each builds on what the one before carries on."""
        async with self._closing.reading(tenant_id) as reader:
            unfinished = await reader.unfinished()
        for closing in unfinished:
            async with self._closing.reading(tenant_id) as reader:
                try:
                    invoice = await make_invoice(reader, closing)
                except (AmountTooLarge, UnknownBillingPlan) as error:
                    raise _unbillable(error) from None
            await self._closing.store(tenant_id, invoice)
            content = invoice.content
            log.info("invoice_closed", number=closing.number, due_nano_usd=content.due_nano_usd, lines=len(content.lines))

    async def _stored(self, tenant_id: TenantId, closing: Closing) -> StoredInvoice:
        async with self._closing.reading(tenant_id) as reader:
            stored = await reader.invoice(closing.invoice_id)
        if stored is None:
            msg = f"the invoice {closing.invoice_id} was written and is not there"
            raise RuntimeError(msg)
        return stored

    async def _closed(self, tenant_id: TenantId, start: datetime, tier: str) -> Closing | None:
        async with self._closing.reading(tenant_id) as reader:
            subscriptions, closings = await reader.subscriptions(), await reader.closings()
            known = next((item for item in closings if item.period.start_time == start), None)
            if known is not None:
                return known
            period = period_of(start, anchor_day(subscriptions))
            if period.start_time != start:
                raise InvalidRequest(
                    "period_start", f"no period begins then; the one that contains it begins at {period.start_time.isoformat()}"
                )
            tier_plan = "" if subscriptions else tier
            # Whether it can be billed at all, before anything is written.
            await _content(reader, Target(period, None, tier_plan, closings, takes_late=True))
            if not closings:
                await _refuse_before_all(reader, period, subscriptions)
        number = subscriptions[-1].number if subscriptions else 0
        answer = await self._closing.close(tenant_id, new_uuid7(), period, tier_plan, number)
        match answer.outcome:
            case CloseOutcome.NOT_ENDED:
                raise WrongState("billing_period", "OPEN", f"the period ends at {period.end_time.isoformat()}: close it afterwards")
            case CloseOutcome.NOT_NEXT:
                following = answer.next_start_time.isoformat() if answer.next_start_time else ""
                raise WrongState(
                    "billing_period", "NOT_NEXT", f"periods are closed one after the other: the next one begins at {following}"
                )
            case CloseOutcome.CLOSED | CloseOutcome.SUBSCRIPTION_CHANGED:
                return answer.closing


async def _refuse_before_all(reader: BillingReader, period: BillingPeriod, subscriptions: Sequence[Subscription]) -> None:
    # The first closing cannot be taken back, and every period after it is closed: a mistyped year would be years of fees.
    end = period.end_time
    if any(item.effective_time < end for item in subscriptions) or await reader.late_days(end, None, None):
        return
    why = f"the tenant neither used anything nor was on a plan before {end.isoformat()}: begin with the period of its first use or plan"
    if not subscriptions and not await reader.late_days(_END_OF_TIME, None, None):
        # Nothing here says when the tenant began: the operator's word is taken of the last months alone.
        if end > datetime.now(UTC) - LATE_USE:
            return
        why = f"the tenant used nothing and has no plan: begin with a period that ended in the last {LATE_USE.days} days"
    raise WrongState("billing_period", "NOT_NEXT", why)


async def _content(reader: BillingReader, target: Target) -> InvoiceContent:
    try:
        return await make_content(reader, target)
    except (AmountTooLarge, UnknownBillingPlan) as error:
        raise _unbillable(error) from None


def _unbillable(error: AmountTooLarge | UnknownBillingPlan) -> MeshError:
    if isinstance(error, AmountTooLarge):
        return WrongState("invoice", "AMOUNT_TOO_LARGE", "a line is over 9,000,000,000 USD: look at the plan's prices and at the usage")
    return NotFound(
        "billing_plan", f"no terms are loaded for the plan {str(error) or 'of the tenant'}: load them with `migrate`, or set a subscription"
    )
