"""Looks at budgets whose usage changed, and fires the thresholds that are reached.

Nothing is remembered between looks: what was used is added up anew, and a key in the store decides what fires. So it does
no harm that a replica is killed meanwhile or that two look at once.
"""

import asyncio
import random
import time
from collections.abc import Callable
from datetime import datetime
from uuid import UUID

import structlog

from services.kernel.errors import MeshError, NotFound
from services.kernel.ids import TenantId
from services.metering.budgets.budget import Budget, Span, reached, span_of
from services.metering.budgets.ports import BudgetMarks, BudgetStore, CalendarsOfTenants, Crossing, Marked, Spending

log = structlog.get_logger(__name__)

MOST_MARKS = 500
# The store gives up on who holds marks for 15 s: the last tenant that is begun with ends before.
_HOLDING_SECONDS, _TENANT_SECONDS = 3.0, 10.0


class BudgetKeeper:
    """One loop for `BackgroundTasks`: `run`."""

    def __init__(
        self, marks: BudgetMarks, store: BudgetStore, spending: Spending, calendars: CalendarsOfTenants, *, poll_seconds: float
    ) -> None:
        self._marks = marks
        self._store = store
        self._spending = spending
        self._calendars = calendars
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Looks for ever."""
        while True:
            try:
                await self.look()
            except MeshError as error:
                log.warning("budget_look_failed", reason=error.reason_name)
            await asyncio.sleep(self._poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    async def look(self) -> int:
        """Looks at whatever is marked, unless another process does; returns how many thresholds fired."""
        fired, passed_over = 0, set[TenantId]()
        while True:
            until = time.monotonic() + _HOLDING_SECONDS
            async with self._marks.take(MOST_MARKS, passed_over) as taken:
                looked_at = 0
                for marked in taken.tenants:
                    fired += await self._look_at(marked, taken.done.add)
                    looked_at += 1
                    if time.monotonic() > until:
                        break
            # Who cannot be looked at now keeps nobody else from it, and is looked at the next time.
            passed_over |= {marked.tenant_id for marked in taken.tenants[:looked_at]} - taken.done
            if taken.count < MOST_MARKS and looked_at == len(taken.tenants):
                return fired

    async def _look_at(self, marked: Marked, done: Callable[[TenantId], None]) -> int:
        try:
            async with asyncio.timeout(_TENANT_SECONDS):
                fired = await self._fire(marked)
        except NotFound:
            # Nobody's any more: whatever was kept of it goes by its erasure.
            fired = 0
        except MeshError as error:
            log.warning("budgets_not_looked_at", tenant_id=str(marked.tenant_id), reason=error.reason_name)
            return 0
        except TimeoutError:
            log.warning("budgets_not_looked_at", tenant_id=str(marked.tenant_id), reason="DEADLINE_EXCEEDED")
            return 0
        done(marked.tenant_id)
        return fired

    async def _fire(self, marked: Marked) -> int:
        tenant_id = marked.tenant_id
        budgets = await self._store.list_all(tenant_id)
        if not budgets:
            return 0
        calendar = await self._calendars.of_tenant(tenant_id)
        touched = [
            (budget, span)
            for budget in budgets
            for span in {
                span_of(budget.terms.period, moment, calendar) for moment, unit in marked.changes if unit == budget.terms.product_unit
            }
        ]
        known = set(await self._store.fired(tenant_id, {budget.budget_id for budget, _ in touched}))
        # What has nothing left to fire is not added up.
        waiting = [(budget, span) for budget, span in touched if _unfired(budget, span, known)]
        used = await self._spending.of(tenant_id, {(budget.terms, span) for budget, span in waiting})
        crossings = [
            Crossing(budget.budget_id, span, threshold, used[budget.terms, span])
            for budget, span in waiting
            for threshold in reached(budget.wish, used[budget.terms, span])
            if (budget.budget_id, span.start, threshold) not in known
        ]
        fired = await self._store.fire(tenant_id, crossings) if crossings else 0
        if fired:
            log.info("budget_thresholds_fired", tenant_id=str(tenant_id), count=fired)
        return fired


def _unfired(budget: Budget, span: Span, known: set[tuple[UUID, datetime, int]]) -> bool:
    return any((budget.budget_id, span.start, threshold) not in known for threshold in budget.wish.thresholds)
