"""Budgets as values: what they count, over which time, which thresholds they have, and what they are heading for. Pure; integers alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import IntEnum
from uuid import UUID

from services.kernel.errors import InvalidRequest
from services.metering.billing.exact import round_half_even
from services.metering.usage_calendar import TenantCalendar, cycle, day_of, month_of

MAX_BUDGETS = 100
# What the contract's and the store's integers hold; larger sums and forecasts are told as this.
MOST_USED = 2**63 - 1
DEFAULT_THRESHOLDS = (50, 80, 100)
WEEK = timedelta(days=7)
# Before, a second of use would be taken for a habit.
_SHORTEST_PART = timedelta(minutes=1)
_MICROSECOND = timedelta(microseconds=1)


class BudgetMeasure(IntEnum):
    """What a budget adds up; the numbers are the contract's and the database's."""

    COST = 1
    TOKENS = 2
    PRODUCT_UNIT = 3


class BudgetPeriod(IntEnum):
    """Over which time; the numbers are the contract's and the database's."""

    DAY = 1
    MONTH = 2
    BILLING_CYCLE = 3


class BudgetAction(IntEnum):
    """What happens above the amount; the numbers are the contract's and the database's."""

    NOTIFY = 1
    OVERAGE = 2
    BLOCK = 3


@dataclass(frozen=True, slots=True)
class BudgetTerms:
    """What a budget counts, and how much is meant to be used: with any other it is another budget. Names are empty where all count.

    `each_user` and `each_feature`: each name's use by itself, and none that names nobody.
    """

    measure: BudgetMeasure
    product_unit: str
    user: str
    feature: str
    amount: int
    period: BudgetPeriod
    each_user: bool = False
    each_feature: bool = False

    @property
    def is_for_each(self) -> bool:
        """True when it is not of one name alone."""
        return self.each_user or self.each_feature

    def of(self, user: str, feature: str) -> "BudgetTerms":
        """Returns the same of these names, where it is for each."""
        return replace(
            self,
            user=user if self.each_user else self.user,
            feature=feature if self.each_feature else self.feature,
            each_user=False,
            each_feature=False,
        )


@dataclass(frozen=True, slots=True)
class BudgetWish:
    """A budget as it is asked for; thresholds are percents, rising."""

    name: str
    terms: BudgetTerms
    action: BudgetAction
    thresholds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget as it is kept."""

    budget_id: UUID
    wish: BudgetWish
    update_time: datetime

    @property
    def terms(self) -> BudgetTerms:
        """What it counts."""
        return self.wish.terms


@dataclass(frozen=True, slots=True)
class Span:
    """From `start` to before `end`, UTC."""

    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class BudgetAlert:
    """That a threshold was reached. `name`, `user` and `feature` are empty once the tenant was erased."""

    alert_id: UUID
    budget_id: UUID
    name: str
    threshold: int
    measure: BudgetMeasure
    product_unit: str
    user: str
    feature: str
    amount: int
    action: BudgetAction
    span: Span
    used: int
    fire_time: datetime


@dataclass(frozen=True, slots=True)
class Standing:
    """How a budget stands in a period; `by_period` is None while too little of it is over."""

    span: Span
    used: int
    fired: tuple[int, ...]
    by_period: int | None
    by_week: int


def wished_thresholds(given: Sequence[int], action: BudgetAction) -> tuple[int, ...]:
    """Returns the thresholds, rising: 50, 80 and 100 where none is given; 100 always, where something happens there."""
    always = set() if action is BudgetAction.NOTIFY else {100}
    return tuple(sorted({*(given or DEFAULT_THRESHOLDS), *always}))


def refuse_senseless(terms: BudgetTerms) -> None:
    """Refuses a unit where none is counted, and none where one is. Raises: InvalidRequest."""
    if terms.measure is BudgetMeasure.PRODUCT_UNIT and not terms.product_unit:
        raise InvalidRequest("budget.product_unit", "must name the unit that the budget counts")
    if terms.measure is not BudgetMeasure.PRODUCT_UNIT and terms.product_unit:
        raise InvalidRequest("budget.product_unit", "is of BUDGET_MEASURE_PRODUCT_UNIT alone")
    if terms.each_user and terms.user:
        raise InvalidRequest("budget.each_user", "is of all users: leave user out")
    if terms.each_feature and terms.feature:
        raise InvalidRequest("budget.each_feature", "is of all features: leave feature out")


def terms_of_names(terms: BudgetTerms, user: str, feature: str) -> BudgetTerms:
    """Returns what a budget counts for these names, which are given where it is for each and there alone. Raises: InvalidRequest."""
    for field, is_for_each, name in (("user", terms.each_user, user), ("feature", terms.each_feature, feature)):
        if is_for_each and not name:
            raise InvalidRequest(field, f"must name one: the budget is for each {field}")
        if name and not is_for_each:
            raise InvalidRequest(field, f"must be empty: the budget is not for each {field}")
    return terms.of(user, feature)


def span_of(period: BudgetPeriod, moment: datetime, calendar: TenantCalendar) -> Span:
    """Returns the period that contains a moment, in the tenant's time zone."""
    match period:
        case BudgetPeriod.DAY:
            return Span(*day_of(moment, calendar.zone))
        case BudgetPeriod.MONTH:
            return Span(*month_of(moment, calendar.zone))
        case BudgetPeriod.BILLING_CYCLE:
            return Span(*cycle(moment, calendar.zone, calendar.anchor_day))


def reached(wish: BudgetWish, used: int) -> tuple[int, ...]:
    """Returns the thresholds that so much use reaches, rising."""
    return tuple(percent for percent in wish.thresholds if used * 100 >= wish.terms.amount * percent)


def forecast_by_period(span: Span, used: int, now: datetime) -> int | None:
    """Returns what the whole period uses if it goes on like its part so far; None in its first minute."""
    elapsed = min(now, span.end) - span.start
    if elapsed < _SHORTEST_PART:
        return None
    return min(MOST_USED, round_half_even(used * _micros(span.end - span.start), _micros(elapsed)))


def forecast_by_week(span: Span, used: int, used_in_week: int, now: datetime) -> int:
    """Returns what the whole period uses if the rest of it is like the last 7 days."""
    rest = max(span.end - now, timedelta())
    return min(MOST_USED, used + round_half_even(used_in_week * _micros(rest), _micros(WEEK)))


def _micros(length: timedelta) -> int:
    return length // _MICROSECOND
