"""Looks at budgets whose usage changed, and fires the thresholds that are reached.

Nothing is remembered between looks: what was used is added up anew, and a key in the store decides what fires. So it does
no harm that a replica is killed meanwhile or that two look at once.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import structlog

from services.kernel.errors import MeshError, NotFound
from services.kernel.ids import TenantId
from services.metering.budgets.budget import Budget, BudgetTerms, Span, reached, span_of
from services.metering.budgets.ports import BudgetMarks, BudgetStore, CalendarsOfTenants, Crossing, Marked, Spending, Watched
from services.metering.usage_calendar import TenantCalendar

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
        named, of_everybody = _touched(budgets, marked, calendar)
        fired = 0
        for start in range(0, len(named), MOST_MARKS):
            fired += await self._fire_named(tenant_id, named[start : start + MOST_MARKS])
        for budget, span in of_everybody:
            # Ceiling: what is less reaches no threshold.
            least = -(-budget.terms.amount * min(budget.wish.thresholds) // 100)
            async for part in self._spending.of_each(tenant_id, budget.terms, span, least):
                fired += await self._fire_used(tenant_id, [(_Watch(budget, span, terms), used) for terms, used in part])
        if fired:
            log.info("budget_thresholds_fired", tenant_id=str(tenant_id), count=fired)
        return fired

    async def _fire_named(self, tenant_id: TenantId, touched: Sequence["_Watch"]) -> int:
        known = await self._store.fired(tenant_id, [watch.watched for watch in touched])
        # What has nothing left to fire is not added up.
        waiting = [watch for watch in touched if any((watch.watched, percent) not in known for percent in watch.budget.wish.thresholds)]
        used = await self._spending.of(tenant_id, {(watch.terms, watch.span) for watch in waiting})
        return await self._fire_used(tenant_id, [(watch, used[watch.terms, watch.span]) for watch in waiting])

    async def _fire_used(self, tenant_id: TenantId, found: Sequence[tuple["_Watch", int]]) -> int:
        # What fired already is passed over by its key.
        crossings = [
            Crossing(watch.watched, watch.span.end, threshold, used)
            for watch, used in found
            for threshold in reached(watch.budget.wish, used)
        ]
        return await self._store.fire(tenant_id, crossings) if crossings else 0


@dataclass(frozen=True, slots=True)
class _Watch:
    """A budget in a period; `terms` are those of the one whose use is watched."""

    budget: Budget
    span: Span
    terms: BudgetTerms

    @property
    def watched(self) -> Watched:
        return Watched(self.budget.budget_id, self.span.start, self.terms.user, self.terms.feature)


def _touched(budgets: Sequence[Budget], marked: Marked, calendar: TenantCalendar) -> tuple[list[_Watch], list[tuple[Budget, Span]]]:
    """Returns whose use changed, by name, and which budgets for each are to be held against everybody."""
    named: dict[Watched, _Watch] = {}
    of_everybody: dict[tuple[UUID, datetime], tuple[Budget, Span]] = {}
    for budget in budgets:
        terms = budget.terms
        for change in marked.changes:
            if change.product_unit != terms.product_unit:
                continue
            span = span_of(terms.period, change.use_quarter, calendar)
            if terms.is_for_each and (change.user is None or change.feature is None):
                of_everybody[budget.budget_id, span.start] = (budget, span)
            elif (change.user or not terms.each_user) and (change.feature or not terms.each_feature):
                watch = _Watch(budget, span, terms.of(change.user or "", change.feature or ""))
                named[watch.watched] = watch
    return list(named.values()), list(of_everybody.values())
