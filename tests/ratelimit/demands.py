"""What a state machine draws: any rules that the contract allows, calls, uses, and their times; small enough that limits are met."""

from dataclasses import replace
from datetime import UTC
from typing import NamedTuple
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from services.ratelimit.calendar_periods import Calendar
from services.ratelimit.limit_rule import MINUTE_US, SECOND_US, LimitRule, Scope, Unit, Window
from services.ratelimit.limits import Amounts, Subject

# A unit whose uses the ledger has, and one that only the store knows of.
DURABLE, VOLATILE = "interviews", "searches"
WINDOWS_US = (10 * SECOND_US, MINUTE_US, 600 * SECOND_US)
UNITS = {
    Unit.REQUESTS: (Window.SLIDING, Window.SLIDING, Window.DAY, Window.MONTH),
    Unit.TOKENS: (Window.SLIDING, Window.SLIDING, Window.DAY, Window.MONTH, Window.CYCLE, Window.REQUEST),
    Unit.COST: (Window.DAY, Window.MONTH, Window.REQUEST),
    Unit.RUNNING: (Window.RUNNING,),
    Unit.RETRIES: (Window.SLIDING, Window.DAY),
    Unit.PRODUCT: (Window.SLIDING, Window.DAY),
}
FEW = (Unit.REQUESTS, Unit.RUNNING, Unit.RETRIES)
small = st.integers(0, 60)
subjects = st.builds(Subject, st.sampled_from(("", "ada", "bob")), st.sampled_from(("", "chat")))
calendars = st.sampled_from((("UTC|31", Calendar(UTC, 31)), ("Asia/Kathmandu|5", Calendar(ZoneInfo("Asia/Kathmandu"), 5))))
shortenings = st.one_of(st.none(), st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 3_000_000)))
seldom = st.sampled_from((False, False, False, True))
skews_us = st.sampled_from((0, 0, -40 * SECOND_US, 40 * SECOND_US))
waits_us = st.sampled_from((0, 1, 1, 700_000))
amounts = st.builds(Amounts, small, small)


class Times(NamedTuple):
    """How long a call waits before it is made, and by how much its caller's clock is wrong."""

    wait_us: int
    skew_us: int


times = st.builds(Times, waits_us, skews_us)


@st.composite
def a_rule(draw: st.DrawFn) -> LimitRule:
    """Any rule that the contract allows, small enough to be met."""
    unit = draw(st.sampled_from(list(UNITS)))
    window = draw(st.sampled_from(UNITS[unit]))
    scope = draw(st.sampled_from((Scope.TENANT, *Scope)))
    product_unit = draw(st.sampled_from((DURABLE, VOLATILE) if window is Window.SLIDING else (DURABLE,))) if unit is Unit.PRODUCT else ""
    return LimitRule(
        "rule",
        unit,
        window,
        draw(st.integers(0, 5 if unit in FEW else 120)),
        draw(st.sampled_from(WINDOWS_US)) if window is Window.SLIDING else 0,
        scope,
        product_unit=product_unit,
        user=draw(st.sampled_from(("", "ada"))) if scope in (Scope.USER, Scope.USER_FEATURE) else "",
        shadow=draw(st.booleans()),
        fails_open=draw(st.booleans()),
        shortens=draw(st.booleans()),
        min_output_tokens=draw(st.integers(1, 20)),
    )


rule_sets = st.lists(a_rule(), min_size=3, max_size=8).map(
    lambda rules: [replace(each, name=f"rule_{place}") for place, each in enumerate(rules)]
)
