"""Budgets as values: thresholds, periods, forecasts and the rule that a block needs, by hand and by hypothesis."""

import json
import re
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.common.v1 import limit_rule_pb2 as rules_pb
from services.kernel.errors import WrongState
from services.metering.budgets.blocking import blocks, refuse_unless_blocked
from services.metering.budgets.budget import (
    MOST_USED,
    WEEK,
    BudgetAction,
    BudgetMeasure,
    BudgetPeriod,
    BudgetTerms,
    BudgetWish,
    Span,
    forecast_by_period,
    forecast_by_week,
    reached,
    span_of,
    wished_thresholds,
)
from services.metering.usage_calendar import TenantCalendar

MOMENTS = st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2090, 1, 1)).map(lambda naive: naive.replace(tzinfo=UTC))  # noqa: DTZ001 - made aware here
ZONES = ("UTC", "Europe/Berlin", "America/Sao_Paulo", "Asia/Kathmandu", "Australia/Lord_Howe", "Pacific/Kiritimati")
START = datetime(2026, 11, 1, tzinfo=UTC)
NOVEMBER = Span(START, START + timedelta(days=30))


def terms(amount: int = 100, **parts: object) -> BudgetTerms:
    """A budget of tokens of the whole tenant over a month, unless told otherwise."""
    values = {"measure": BudgetMeasure.TOKENS, "product_unit": "", "user": "", "feature": "", "period": BudgetPeriod.MONTH} | parts
    return BudgetTerms(amount=amount, **values)  # type: ignore[arg-type] # as the test says


@given(moment=MOMENTS, zone=st.sampled_from(ZONES), anchor=st.integers(1, 31), period=st.sampled_from(BudgetPeriod))
def test_every_moment_is_in_its_period_and_periods_follow_each_other(
    moment: datetime, zone: str, anchor: int, period: BudgetPeriod
) -> None:
    """A period holds the moment it was asked for, is one for all of its moments, and ends where the next begins, on a quarter hour."""
    calendar = TenantCalendar(zone, ZoneInfo(zone), anchor)
    span = span_of(period, moment, calendar)
    assert span.start <= moment < span.end
    assert span_of(period, span.start, calendar) == span
    assert span_of(period, span.end - timedelta(microseconds=1), calendar) == span
    assert span_of(period, span.end, calendar).start == span.end
    assert span.start.minute % 15 == span.start.second == span.start.microsecond == 0


@given(amount=st.integers(1, 9 * 10**15), used=st.integers(-(10**15), 10**17))
def test_a_threshold_is_reached_at_its_share_and_not_a_unit_before(amount: int, used: int) -> None:
    """Exactly those whose percent of the amount is at most what was used, in integers."""
    wish = BudgetWish("b", terms(amount), BudgetAction.NOTIFY, (1, 33, 50, 80, 99, 100, 101, 333, 1_000))
    assert reached(wish, used) == tuple(percent for percent in wish.thresholds if Fraction(used) >= Fraction(amount * percent, 100))


def test_thresholds_rise_and_something_that_happens_has_its_own() -> None:
    """50, 80 and 100 by default; 100 always where use beyond the amount is overage or blocked."""
    assert wished_thresholds([], BudgetAction.NOTIFY) == (50, 80, 100)
    assert wished_thresholds([200, 10], BudgetAction.NOTIFY) == (10, 200)
    assert wished_thresholds([200, 10], BudgetAction.OVERAGE) == (10, 100, 200)
    assert wished_thresholds([], BudgetAction.BLOCK) == (50, 80, 100)


def test_forecasts_are_the_formulas_that_are_written_down() -> None:
    """A third of the period over: three times what was used; the rest at the week's pace; nothing by the period in its first minute."""
    now = START + timedelta(days=10)
    assert forecast_by_period(NOVEMBER, 1_000, now) == 3_000
    assert forecast_by_week(NOVEMBER, 1_000, 700, now) == 1_000 + 700 * 20 // 7
    assert forecast_by_period(NOVEMBER, 1_000, START + timedelta(seconds=59)) is None
    assert forecast_by_period(NOVEMBER, 1_000, NOVEMBER.end + timedelta(days=1)) == 1_000
    assert forecast_by_week(NOVEMBER, 1_000, 700, NOVEMBER.end + timedelta(days=1)) == 1_000
    # 25 × 30 ÷ 12 = 62.5 and 35 × 30 ÷ 12 = 87.5: half to even.
    assert [forecast_by_period(NOVEMBER, used, START + timedelta(days=12)) for used in (25, 35)] == [62, 88]


@given(used=st.integers(0, 10**16), week=st.integers(0, 10**16), seconds=st.integers(60, 30 * 86_400))
def test_a_forecast_is_within_half_a_unit_of_the_true_one(used: int, week: int, seconds: int) -> None:
    """Whatever the amounts: integers are rounded once. What no integer of the contract holds is told as the largest."""
    now = START + timedelta(seconds=seconds)
    told = forecast_by_period(NOVEMBER, used, now)
    assert told is not None
    assert abs(told - min(MOST_USED, Fraction(used * 30 * 86_400, seconds))) <= Fraction(1, 2)
    rest = Fraction(int((NOVEMBER.end - now).total_seconds()), int(WEEK.total_seconds()))
    assert abs(forecast_by_week(NOVEMBER, used, week, now) - (used + week * rest)) <= Fraction(1, 2)


def rule(**parts: object) -> rules_pb.LimitRule:
    """The rule that blocks `terms()`, unless told otherwise."""
    values: dict[str, object] = {
        "name": f"r{uuid4().hex}",
        "unit": rules_pb.LIMIT_UNIT_TOKENS,
        "window": rules_pb.LIMIT_WINDOW_MONTH,
        "scope": rules_pb.LIMIT_SCOPE_TENANT,
        "limit": 100,
    }
    return rules_pb.LimitRule(**(values | parts))  # type: ignore[arg-type] # as the test says


@pytest.mark.parametrize(
    ("given_terms", "parts"),
    [
        (terms(), {}),
        (terms(), {"limit": 7, "mode": rules_pb.LIMIT_MODE_ENFORCE}),
        (terms(user="ada"), {"scope": rules_pb.LIMIT_SCOPE_USER, "user": "ada"}),
        (terms(user="ada"), {"scope": rules_pb.LIMIT_SCOPE_USER}),
        (terms(feature="chat"), {"scope": rules_pb.LIMIT_SCOPE_FEATURE, "feature": "chat"}),
        (terms(user="ada", feature="chat"), {"scope": rules_pb.LIMIT_SCOPE_USER_FEATURE, "user": "ada"}),
        (
            terms(measure=BudgetMeasure.PRODUCT_UNIT, product_unit="pages", period=BudgetPeriod.BILLING_CYCLE),
            {"unit": rules_pb.LIMIT_UNIT_PRODUCT, "product_unit": "pages", "window": rules_pb.LIMIT_WINDOW_BILLING_CYCLE},
        ),
        (
            terms(measure=BudgetMeasure.COST, period=BudgetPeriod.DAY),
            {"unit": rules_pb.LIMIT_UNIT_COST_NANO_USD, "window": rules_pb.LIMIT_WINDOW_DAY},
        ),
    ],
)
def test_what_a_rule_refuses_is_what_the_budget_counts(given_terms: BudgetTerms, parts: dict[str, object]) -> None:
    """The rule blocks; each part of it changed, it does not."""
    assert blocks(given_terms, [rule(limit=1_000), rule(**parts)])
    for spoiled in (
        {"limit": 101},
        {"mode": rules_pb.LIMIT_MODE_SHADOW},
        {"unit": rules_pb.LIMIT_UNIT_REQUESTS},
        {"window": rules_pb.LIMIT_WINDOW_SLIDING},
        {"scope": rules_pb.LIMIT_SCOPE_UNSPECIFIED},
        {"user": "ben"},
        {"feature": "hiring"},
        {"product_unit": "words"},
    ):
        assert not blocks(given_terms, [rule(**(parts | spoiled))]), spoiled


def offered_name(budget: str) -> str:
    """The name of the rule that a blocking budget is refused with."""
    with pytest.raises(WrongState) as refused:
        refuse_unless_blocked(BudgetWish(budget, terms(), BudgetAction.BLOCK, (100,)), [])
    name: str = json.loads(refused.value.message.partition("again: ")[2])["name"]
    return name


def test_no_two_budgets_are_offered_one_rule() -> None:
    """A rule's name is no longer than a budget's: what does not fit is told apart by a digest, and no other budget's looks like it."""
    names = ["ada", "a" * 55, "a" * 56, "a" * 57, "a" * 63, "a" * 62 + "b", "a" * 56 + "b"]
    offered = [offered_name(name) for name in names]
    assert offered[:2] == ["budget_ada", "budget_" + "a" * 55] and len(set(offered)) == len(names)
    assert all(re.fullmatch("[a-z][a-z0-9_]{0,62}", name) for name in offered)
    looks_alike = offered_name("a" * 63).removeprefix("budget_")
    assert offered_name(looks_alike) not in offered
