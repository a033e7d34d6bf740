"""What tenants do with their budgets."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

from mesh.common.v1.limit_rule_pb2 import LimitRule
from services.kernel.errors import NotFound
from services.kernel.ids import TenantId
from services.kernel.tenant_context import TenantContext
from services.metering.budgets.blocking import blocks, refuse_unless_blocked
from services.metering.budgets.budget import (
    WEEK,
    Budget,
    BudgetAction,
    BudgetAlert,
    BudgetWish,
    Span,
    Standing,
    forecast_by_period,
    forecast_by_week,
    refuse_senseless,
    span_of,
    terms_of_names,
)
from services.metering.budgets.ports import AlertPosition, BudgetStore, Spending, Watched
from services.metering.usage_calendar import Calendars


class RulesInForce(Protocol):
    """Knows the limits of the tenant that calls."""

    async def of(self, context: TenantContext, *, newest: bool = False) -> Sequence[LimitRule]:
        """Returns the rules; with `newest` none that was remembered. Raises: MeshError."""
        ...


class BudgetDesk:
    """Puts, reads and removes budgets."""

    def __init__(
        self, store: BudgetStore, spending: Spending, calendars: Calendars, rules: RulesInForce, *, clock: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._spending = spending
        self._calendars = calendars
        self._rules = rules
        self._clock = clock

    async def put(self, context: TenantContext, tenant_id: TenantId, wish: BudgetWish) -> Budget:
        """Keeps a budget. Raises: InvalidRequest, LimitExceeded for one too many, WrongState for a block that no rule enforces."""
        refuse_senseless(wish.terms)
        if wish.action is BudgetAction.BLOCK and not blocks(wish.terms, await self._rules.of(context)):
            # The rule may have been put a moment ago.
            refuse_unless_blocked(wish, await self._rules.of(context, newest=True))
        return await self._store.put(tenant_id, wish)

    async def list_all(self, tenant_id: TenantId) -> Sequence[Budget]:
        """Returns all budgets by name."""
        return await self._store.list_all(tenant_id)

    async def delete(self, tenant_id: TenantId, name: str) -> None:
        """Removes a budget, if it is there."""
        await self._store.delete(tenant_id, name)

    async def alerts(self, tenant_id: TenantId, after: AlertPosition | None, size: int) -> Sequence[BudgetAlert]:
        """Returns up to `size` alerts, newest first."""
        return await self._store.alerts(tenant_id, after, size)

    async def standing(
        self, context: TenantContext, tenant_id: TenantId, name: str, user: str, feature: str
    ) -> tuple[Budget, Standing, bool]:
        """Returns a budget, how it stands now, and whether a rule of the limits blocks what would pass it.

        Names are given where the budget is for each. Raises: NotFound, InvalidRequest.
        """
        budget = next((each for each in await self._store.list_all(tenant_id) if each.wish.name == name), None)
        if budget is None:
            raise NotFound("budget")
        terms, now = terms_of_names(budget.terms, user, feature), self._clock()
        span, week = span_of(terms.period, now, await self._calendars.of(context)), Span(now - WEEK, now)
        used = await self._spending.of(tenant_id, {(terms, span), (terms, week)})
        so_far = used[terms, span]
        fired = await self._store.fired(tenant_id, [Watched(budget.budget_id, span.start, terms.user, terms.feature)])
        standing = Standing(
            span,
            so_far,
            tuple(sorted(threshold for _, threshold in fired)),
            forecast_by_period(span, so_far, now),
            forecast_by_week(span, so_far, used[terms, week], now),
        )
        return budget, standing, blocks(budget.terms, await self._rules.of(context))
