"""Closes every period that ended a grace ago, tenant by tenant. Any number of replicas may run it: a period is closed once."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta

import structlog

from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.metering.billing.books import ClosingBooks, DueTenant, TierDirectory
from services.metering.billing.desk import InvoiceDesk
from services.metering.billing.periods import BillingPeriod, period_of

log = structlog.get_logger(__name__)

_PAGE = 200
# A tenant that was not billed for long is caught up with over several rounds, so that it does not keep the others waiting.
_MOST_PERIODS = 3


class MonthlyJob:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(
        self,
        books: ClosingBooks,
        desk: InvoiceDesk,
        tiers: TierDirectory,
        *,
        grace: timedelta,
        poll_seconds: float,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._books = books
        self._desk = desk
        self._tiers = tiers
        self._grace = grace
        self._poll_seconds = poll_seconds
        self._clock = clock

    async def run(self) -> None:
        """Looks for ever; a round that fails is tried again after the pause."""
        while True:
            try:
                await self.round()
            except MeshError as error:
                log.warning("invoice_round_failed", reason=error.reason_name)
            await asyncio.sleep(self._poll_seconds)

    async def round(self) -> int:
        """Finishes what a crash left, then closes what is due; returns how many periods. One tenant's failure stops no other."""
        for tenant_id in await self._books.unfinished(_PAGE):
            await self._guarded(tenant_id, self._desk.finish(tenant_id))
        end_before, after, closed = self._clock() - self._grace, None, 0
        while True:
            page = await self._books.due(after, end_before, _PAGE)
            for tenant in page:
                closed += await self._guarded(tenant.tenant_id, self._close(tenant, end_before)) or 0
            if len(page) < _PAGE:
                return closed
            after = page[-1].tenant_id

    async def _close(self, tenant: DueTenant, end_before: datetime) -> int:
        period, closed = next_period(tenant), 0
        while period is not None and period.end_time <= end_before and closed < _MOST_PERIODS:
            if tenant.erase_time is not None and tenant.erase_time <= period.start_time:
                break
            tier = "" if tenant.is_subscribed else await self._tiers.tier(tenant.tenant_id)
            if not tier and not tenant.is_subscribed:
                break
            await self._desk.close(tenant.tenant_id, period.start_time, tier)
            period, closed = period_of(period.end_time, tenant.anchor_day), closed + 1
        return closed

    async def _guarded(self, tenant_id: TenantId, work: Coroutine[None, None, int | None]) -> int | None:
        try:
            return await work
        except MeshError as error:
            log.warning("invoice_not_closed", tenant_id=str(tenant_id), reason=error.reason_name, why=error.message)
            return None
        except Exception:
            # Whatever is wrong with one tenant's books is none of the others' business.
            log.exception("invoice_not_closed_unexpectedly", tenant_id=str(tenant_id))
            return None


def next_period(tenant: DueTenant) -> BillingPeriod | None:
    """Returns the period that is closed next; None for a tenant that neither used anything nor was on a plan."""
    moment = tenant.last_end_time or tenant.first_time
    return None if moment is None else period_of(moment, tenant.anchor_day)
