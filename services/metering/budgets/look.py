"""One look at a tenant's budgets: fires the thresholds that are reached.

Nothing is remembered between looks: what was used is added up anew, and a key in the store decides what fires.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import structlog

from services.kernel.ids import TenantId
from services.metering.budgets.budget import Budget, BudgetTerms, Span, reached, span_of
from services.metering.budgets.ports import BudgetStore, CalendarsOfTenants, Crossing, Marked, Spending, Watched
from services.metering.usage_calendar import TenantCalendar

log = structlog.get_logger(__name__)

_MOST_NAMED = 500
# In one transaction, whose deliveries others wait for.
_MOST_FIRED = 1_000


class BudgetLook:
    """Holds use against budgets. It does no harm that two look at once, or that one is killed meanwhile."""

    def __init__(self, store: BudgetStore, spending: Spending, calendars: CalendarsOfTenants) -> None:
        self._store = store
        self._spending = spending
        self._calendars = calendars

    async def fire(self, marked: Marked) -> int:
        """Fires what is reached of what changed; returns how many thresholds did. Raises: NotFound when the tenant is gone; MeshError."""
        tenant_id = marked.tenant_id
        budgets = await self._store.list_all(tenant_id)
        if not budgets:
            return 0
        calendar = await self._calendars.of_tenant(tenant_id)
        named, of_everybody = _touched(budgets, marked, calendar)
        fired = 0
        for start in range(0, len(named), _MOST_NAMED):
            fired += await self._fire_named(tenant_id, named[start : start + _MOST_NAMED])
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
        fired = 0
        for start in range(0, len(crossings), _MOST_FIRED):
            fired += await self._store.fire(tenant_id, crossings[start : start + _MOST_FIRED])
        return fired


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
