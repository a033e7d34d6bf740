"""Refusals that explain themselves: which rule binds, when it frees, what to do."""

from datetime import UTC, datetime

import pytest

from services.kernel.ids import new_uuid7
from services.ratelimit.calendar_periods import Calendar, microseconds
from services.ratelimit.decision import Refusal, refusal
from services.ratelimit.limit_rule import CALENDAR, MINUTE_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import NOBODY, Amounts, Demand, Subject
from services.ratelimit.standing import Answer, Verdict, statuses
from services.ratelimit.terms import Plan, Terms

NOW = microseconds(datetime(2026, 12, 31, 23, 59, 58, 500_000, tzinfo=UTC))
PERIODS = tuple(Calendar().boundaries(window, NOW) for window in CALENDAR)

REQUESTS = LimitRule("requests_per_minute", Unit.REQUESTS, Window.SLIDING, 10, MINUTE_US)
TOKENS = LimitRule("tokens_per_minute", Unit.TOKENS, Window.SLIDING, 10, MINUTE_US)
TOKENS_A_DAY = LimitRule("tokens_per_day", Unit.TOKENS, Window.DAY, 10)
BUDGET = LimitRule("cost_nano_usd_per_month", Unit.COST, Window.MONTH, 10)
RUNNING = LimitRule("concurrent_calls", Unit.RUNNING, Window.RUNNING, 2)


def figures(*of_rules: tuple[int, int, int]) -> Answer:
    """An answer of the store: used, next reset and when there is room, by rule."""
    return Answer(Verdict.REFUSED, now_us=NOW, figures=[figure for rule in of_rules for figure in rule], periods=PERIODS)


def why(rules: list[LimitRule], answer: Answer, amounts: Amounts, subject: Subject = NOBODY) -> Refusal:
    """The refusal there must be."""
    found = refusal(plan_of(rules, subject), answer, Demand(amounts))
    assert found is not None
    return found


def plan_of(rules: list[LimitRule], subject: Subject = NOBODY) -> Plan:
    """The plan of these rules."""
    return Terms(rules).plan(subject)


def test_a_refusal_names_rule_figures_reset_and_wait() -> None:
    """Everything a caller needs is in the metadata and the sentence."""
    frees = NOW + 1_250_000
    found = why([REQUESTS], figures((10, frees, frees)), Amounts(1, 1))
    tenant_id = new_uuid7()
    error = found.error(tenant_id)
    assert error.reason_name == "PLAN_LIMIT"
    assert error.retry_after_seconds == 1.25
    assert error.metadata == {
        "rule": "requests_per_minute",
        "limit": "10",
        "used": "10",
        "remaining": "0",
        "reset_time": "2026-12-31T23:59:59.750000Z",
        "decide_time": "2026-12-31T23:59:58.500000Z",
    }
    assert error.quota_violations[0].subject == f"tenant:{tenant_id}"
    assert "10 of 10 requests per minute are in use" in error.message
    assert "try again in 1.250 s" in error.message


@pytest.mark.parametrize(
    ("rules", "of_rules", "reason", "wait"),
    [
        ([BUDGET], [(9, 0, -1)], "BUDGET", 1.5),
        ([RUNNING], [(2, 0, -1)], "CONCURRENCY", 1.0),
        ([TOKENS_A_DAY], [(9, 0, -1)], "PLAN_LIMIT", 1.5),
        ([RUNNING, TOKENS_A_DAY], [(2, 0, -1), (9, 0, -1)], "PLAN_LIMIT", 1.5),
        (
            [LimitRule("burst", Unit.REQUESTS, Window.SLIDING, 5, 1_000_000, burst=True)],
            [(5, NOW + 1000, NOW + 1000)],
            "BURST_LIMIT",
            0.001,
        ),
        ([LimitRule("retries", Unit.RETRIES, Window.SLIDING, 5, MINUTE_US)], [(5, NOW + 1000, NOW + 1000)], "RETRY_BUDGET", 0.001),
    ],
)
def test_each_kind_of_limit_has_its_reason_and_its_wait(
    rules: list[LimitRule], of_rules: list[tuple[int, int, int]], reason: str, wait: float
) -> None:
    """Money is BUDGET, slots are CONCURRENCY, bursts and retries say so, the rest PLAN_LIMIT; calendars free at their end."""
    found = why(rules, figures(*of_rules), Amounts(2, 2))
    assert (found.error(new_uuid7()).reason_name, found.retry_after_seconds) == (reason, wait)


def test_a_call_larger_than_a_limit_is_told_not_to_wait() -> None:
    """Waiting cannot make it fit, so there is no retry, and it binds before any rule that frees."""
    found = why([TOKENS, RUNNING], figures((0, 0, -1), (2, 0, -1)), Amounts(11, 0))
    assert found.status.rule is TOKENS
    assert found.retry_after_seconds is None
    assert not found.may_wait
    assert "make the call smaller or ask the operator for a higher limit" in found.message


def test_a_request_that_is_too_large_by_itself_is_a_fault_of_the_request() -> None:
    """A rule of each request is INVALID_ARGUMENT: no waiting and no quota is involved."""
    rule = LimitRule("tokens_per_request", Unit.TOKENS, Window.REQUEST, 100, lifting_plan="pro")
    error = why([rule], figures((0, 0, -1)), Amounts(101, 0)).error(new_uuid7())
    assert (error.code.name, error.reason_name, error.retry_after_seconds) == ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE", None)
    assert (error.metadata["rule"], error.metadata["lifting_plan"]) == ("tokens_per_request", "pro")


def test_a_refusal_names_the_plan_that_lifts_it_and_whose_limit_it_is() -> None:
    """The sentence and the metadata say which plan allows more, and of whom the limit is."""
    rule = LimitRule("user_tokens", Unit.TOKENS, Window.DAY, 10, scope=Scope.USER, lifting_plan="pro")
    found = why([rule], figures((9, 0, -1)), Amounts(2, 0), Subject(user="ada"))
    assert 'of this user are in use and this call needs 2 more: try again in 1.500 s, or move to the plan "pro".' in found.message
    assert (found.metadata["lifting_plan"], found.metadata["user"]) == ("pro", "ada")


@pytest.mark.parametrize(
    ("rules", "may_wait", "for_holds"),
    [
        ([TOKENS], True, False),
        ([TOKENS_A_DAY], False, False),
        ([LimitRule("day", Unit.TOKENS, Window.DAY, 10, waits=True)], True, True),
        ([TOKENS, TOKENS_A_DAY], False, False),
    ],
)
def test_a_refusal_tells_whether_its_caller_may_wait(rules: list[LimitRule], may_wait: bool, for_holds: bool) -> None:
    """Rates and slots may always be waited for, a budget only where its rule says so."""
    found = why(rules, figures(*[(9, NOW + 1000, NOW + 1000) if rule is TOKENS else (9, 0, -1) for rule in rules]), Amounts(2, 0))
    assert (found.may_wait, found.for_holds) == (may_wait, for_holds)


def test_rules_of_others_are_neither_listed_nor_refuse() -> None:
    """A rule of another user, or of a user where there is none, is no part of the plan."""
    rules = [LimitRule("ada", Unit.TOKENS, Window.DAY, 0, scope=Scope.USER, user="ada")]
    assert [rule.name for rule in plan_of(rules, Subject(user="ada")).rules] == ["ada"]
    for subject in (NOBODY, Subject(user="bob"), Subject(feature="ada")):
        assert statuses(plan_of(rules, subject), figures()) == []
        assert refusal(plan_of(rules, subject), figures(), Demand(Amounts(10**7, 10**15))) is None


def test_remaining_never_falls_below_nothing() -> None:
    """Use above the limit leaves 0, not less."""
    assert statuses(plan_of([TOKENS_A_DAY]), figures((19, 0, 0)))[0].remaining == 0


def test_calendars_reset_at_the_end_of_the_period_of_the_stores_time() -> None:
    """The store's clock says which period it is, also when it is in the one before or after this process's."""
    day = 86_400_000_000
    for shift in (-day, 0, day):
        (status,) = statuses(plan_of([TOKENS_A_DAY]), Answer(Verdict.HELD, now_us=NOW + shift, figures=(1, 0, 0), periods=PERIODS))
        assert status.reset_us == NOW + shift + 1_500_000
