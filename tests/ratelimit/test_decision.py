"""Refusals in words and figures: pure functions of what the store counted."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.ids import new_uuid7
from services.ratelimit.decision import refusal
from services.ratelimit.limits import Amounts, Limits, Rule
from services.ratelimit.window import Usage, day_end_us, microseconds, moment, month_end_us, statuses

NOW = microseconds(datetime(2026, 12, 31, 23, 59, 58, 500_000, tzinfo=UTC))
MINUTE = 60_000_000


def usage(**figures: int) -> Usage:
    """Figures of an untouched tenant, but for those named."""
    untouched = dict.fromkeys(
        ("requests", "tokens_minute", "tokens_day", "cost_month", "running", "oldest_us", "requests_free_us", "tokens_free_us"), 0
    )
    return Usage(now_us=NOW, epoch=1, reserve_us=0, expired_holds=0, **{**untouched, **figures})


def test_a_refusal_names_rule_figures_reset_and_wait() -> None:
    """Everything a caller needs is in the metadata and the sentence."""
    seen = usage(requests=10, oldest_us=NOW - MINUTE + 1_250_000, requests_free_us=NOW + 1_250_000)
    why = refusal(Limits(requests_per_minute=10), seen, Amounts(1, 1), MINUTE)
    assert why is not None
    tenant_id = new_uuid7()
    error = why.error(tenant_id)
    assert error.reason_name == "PLAN_LIMIT"
    assert error.retry_after_seconds == 1.25
    assert error.metadata == {
        "rule": "requests_per_minute",
        "limit": "10",
        "used": "10",
        "remaining": "0",
        "reset_time": "2026-12-31T23:59:59.750000Z",
    }
    assert error.quota_violations[0].subject == f"tenant:{tenant_id}"
    assert "try again in 1.250 s" in error.message


@pytest.mark.parametrize(
    ("limits", "figures", "reason", "wait"),
    [
        (Limits(cost_nano_usd_per_month=10), {"cost_month": 9}, "BUDGET", 1.5),
        (Limits(concurrent_calls=2), {"running": 2}, "CONCURRENCY", 1.0),
        (Limits(tokens_per_day=10), {"tokens_day": 9}, "PLAN_LIMIT", 1.5),
        (Limits(concurrent_calls=2, tokens_per_day=10), {"running": 2, "tokens_day": 9}, "PLAN_LIMIT", 1.5),
    ],
)
def test_each_kind_of_limit_has_its_reason_and_its_wait(limits: Limits, figures: dict[str, int], reason: str, wait: float) -> None:
    """Money is BUDGET, slots are CONCURRENCY, the rest PLAN_LIMIT; calendars free at their end."""
    why = refusal(limits, usage(**figures), Amounts(2, 2), MINUTE)
    assert why is not None
    assert (why.error(new_uuid7()).reason_name, why.retry_after_seconds) == (reason, wait)


def test_a_call_larger_than_a_limit_is_told_not_to_wait() -> None:
    """Waiting cannot make it fit, so there is no retry, and it binds before any rule that frees."""
    why = refusal(Limits(tokens_per_minute=10, concurrent_calls=1), usage(running=1), Amounts(11, 0), MINUTE)
    assert why is not None
    assert why.status.rule is Rule.TOKENS_PER_MINUTE
    assert why.retry_after_seconds is None
    assert "make the call smaller or move to a larger plan" in why.message


def test_unlimited_rules_are_neither_listed_nor_refuse() -> None:
    """A limit of 0 means there is none."""
    seen = usage(requests=10**6, tokens_day=10**12, cost_month=10**15, running=10**5)
    assert refusal(Limits(), seen, Amounts(10**7, 10**15), MINUTE) is None
    assert statuses(Limits(tokens_per_day=5), seen, MINUTE)[0].rule is Rule.TOKENS_PER_DAY
    assert statuses(Limits(), seen, MINUTE) == []


def test_remaining_never_falls_below_nothing() -> None:
    """Use above the limit leaves 0, not less."""
    assert statuses(Limits(tokens_per_day=5), usage(tokens_day=9), MINUTE)[0].remaining == 0


@given(st.datetimes(min_value=datetime(1971, 1, 1), max_value=datetime(2200, 1, 1)))  # noqa: DTZ001
def test_calendar_windows_end_at_the_next_day_and_month(time: datetime) -> None:
    """The end is later than now, and its eve is in the same day and month."""
    now = microseconds(time.replace(tzinfo=UTC))
    day, month = day_end_us(now), month_end_us(now)
    assert now < day <= month
    assert moment(day - 1).date() == moment(now).date()
    assert moment(day).time() == datetime.min.time()
    assert (moment(month - 1).year, moment(month - 1).month) == (moment(now).year, moment(now).month)
    assert (moment(month).day, moment(month).time()) == (1, datetime.min.time())
