"""What budgets need of the world."""

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.kernel.ids import TenantId
from services.metering.budgets.budget import Budget, BudgetAlert, BudgetTerms, BudgetWish, Span
from services.metering.usage_calendar import TenantCalendar

# Taken at a time.
MOST_MARKS = 500


@dataclass(frozen=True, slots=True)
class AlertPosition:
    """The last alert of the page before."""

    fire_time: datetime
    alert_id: UUID


@dataclass(frozen=True, slots=True, order=True)
class Watched:
    """Whose use of which period is held against a budget: the names it is for, those of the budget or each one's."""

    budget_id: UUID
    start: datetime
    user: str
    feature: str


@dataclass(frozen=True, slots=True)
class Crossing:
    """A threshold that use reached: to be fired, unless it was."""

    watched: Watched
    end: datetime
    threshold: int
    used: int


@dataclass(frozen=True, slots=True)
class Change:
    """That use of a quarter of an hour changed: of a unit, empty for calls, and of whom; None: of everybody, for all that is known."""

    use_quarter: datetime
    product_unit: str
    user: str | None
    feature: str | None


class BudgetStore(Protocol):
    """A tenant's budgets and alerts."""

    async def put(self, tenant_id: TenantId, wish: BudgetWish) -> Budget:
        """Keeps the budget under its name, and marks it to be looked at. Raises: LimitExceeded for one too many, NotFound once erased."""
        ...

    async def list_all(self, tenant_id: TenantId) -> Sequence[Budget]:
        """Returns all budgets by name."""
        ...

    async def delete(self, tenant_id: TenantId, name: str) -> UUID | None:
        """Removes a budget and returns its id; None when there is none."""
        ...

    async def alerts(self, tenant_id: TenantId, after: AlertPosition | None, size: int) -> Sequence[BudgetAlert]:
        """Returns up to `size` alerts, newest first, after the position."""
        ...

    async def fired(self, tenant_id: TenantId, wanted: Collection[Watched]) -> set[tuple[Watched, int]]:
        """Returns which thresholds fired of these, in percent."""
        ...

    async def fire(self, tenant_id: TenantId, crossings: Sequence[Crossing]) -> int:
        """Fires what has not fired, with its deliveries, in one transaction; returns how many did."""
        ...


class Spending(Protocol):
    """What a tenant used."""

    async def of(self, tenant_id: TenantId, wanted: Collection[tuple[BudgetTerms, Span]]) -> dict[tuple[BudgetTerms, Span], int]:
        """Returns what each pair's terms count in its span, with all that is committed. No terms are for each."""
        ...

    def of_each(self, tenant_id: TenantId, terms: BudgetTerms, span: Span, least: int) -> AsyncIterator[Sequence[tuple[BudgetTerms, int]]]:
        """Yields, in parts, whoever used at least so much of what the terms count for each: their own terms, and how much."""
        ...


class CalendarsOfTenants(Protocol):
    """Knows any tenant's calendar, without a call of its."""

    async def of_tenant(self, tenant_id: TenantId) -> TenantCalendar:
        """Returns the calendar. Raises: NotFound when the tenant is gone; Unavailable."""
        ...


@dataclass(slots=True)
class Marked:
    """What changed of one tenant."""

    tenant_id: TenantId
    changes: set[Change] = field(default_factory=set)


class BudgetMarks(Protocol):
    """Which budgets are to be looked at."""

    def take(self, most: int, passed_over: Collection[TenantId]) -> AbstractAsyncContextManager["TakenMarks"]:
        """Gives up to so many marks, of other tenants than these, none while another process looks.

        At the end of the block those that are done with are gone.
        """
        ...

    def take_of(self, tenant_id: TenantId, most: int) -> AbstractAsyncContextManager["TakenMarks"]:
        """Gives up to so many marks of one tenant, whoever else looks, and holds nothing meanwhile; at the end as `take`."""
        ...


@dataclass(slots=True)
class TakenMarks:
    """Marks in hand."""

    count: int
    tenants: Sequence[Marked]
    done: set[TenantId] = field(default_factory=set)
