"""The comparison after a storm is satisfied with books that agree, and names each thing that does not."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.metering.billing.periods import period_of
from tests.chaos.agreement import Books, Report, differences
from tests.chaos.bookkeeper import Bills
from tests.chaos.books import OPEN, SETTLED, UNRESOLVED, VOID, Billed, Call, Entry, Hold, Ledger, Limits, Tokens, Use, cost_nano_usd
from tests.chaos.callers import UNIT, Diary, Told

NOW = datetime(2026, 3, 5, 12, tzinfo=UTC)
PRICES = Tokens(1_000_000, 5_000_000, 100_000, 1_250_000, 2_000_000)
VERSION = ("v1", "m")
MONTHS = tuple(period_of(NOW - timedelta(days=days), 1) for days in (45, 15, 0))
USD = 10**9


def call(name: str, state: int) -> Call:
    """A call of the tenant."""
    return Call("t", f"r-{name}", f"c-{name}", state, 500, 2_000, "m", "v1", NOW - timedelta(seconds=9))


def books() -> Books:
    """A settled, an unresolved and a void call, and a use of units."""
    entry = Entry("t", "r-a", "m", "v1", Tokens(10, 20), 30, 110, NOW - timedelta(seconds=9))
    calls = [call("a", SETTLED), call("b", UNRESOLVED), call("c", VOID)]
    diary = Diary(
        {"c-a", "c-b", "c-c"},
        answered={"c-a": Told(10, 20, 110)},
        units_asked={"u": 3},
        units_used={"u"},
        events_asked={"e": 150, "f": 8},
        events_recorded={"e", "f"},
        reversals_asked={"f"},
        events_reversed={"f"},
    )
    events = [Use("t", "e", 150, MONTHS[1].start_time), Use("t", "f", 8, NOW), Use("t", "f", -8, NOW)]
    used = {"tokens_per_day": 530, "cost_nano_usd_per_month": 2_110, "concurrent_calls": 0, UNIT: 3}
    return Books(
        provider=[Billed("c-a", "m", Tokens(10, 20)), Billed("c-b", "m", Tokens(10, 7))],
        ledger=Ledger(NOW, calls, [entry], [Use("t", "u", 3, NOW)], events, {VERSION: PRICES}, 0),
        limits={"t": Limits([Hold("r-b", True, 500, 2_000)], 0, used)},
        reports={"t": Report(110, 1, 1, 0, 1, 2_000)},
        diaries={"t": diary},
        budgets={"t": 155},
        # Fifty interviews beyond what February includes, recorded when it was closed in part.
        bills={"t": Bills([249 * USD, 249 * USD + 15 * USD], 249 * USD + 60 * USD, [])},
        months=MONTHS,
    )


def with_ledger(found: Books, **changes: object) -> Books:
    """The books with another ledger."""
    return replace(found, ledger=replace(found.ledger, **changes))


def with_limits(found: Books, **changes: object) -> Books:
    """The books with other limits."""
    return replace(found, limits={"t": replace(found.limits["t"], **changes)})


def with_entry(found: Books, **changes: object) -> Books:
    """The books with another entry."""
    return with_ledger(found, entries=[replace(found.ledger.entries[0], **changes)])


def with_bills(found: Books, **changes: object) -> Books:
    """The books with other bills."""
    return replace(found, bills={"t": replace(found.bills["t"], **changes)})


SPOILED: dict[str, Callable[[Books], Books]] = {
    "still open": lambda b: with_ledger(b, calls=[*b.ledger.calls, call("b2", OPEN)]),
    "wait in the ledger": lambda b: with_ledger(b, waiting=1),
    "neither settled nor unresolved": lambda b: replace(b, provider=[*b.provider, Billed("c-c", "m", Tokens(1, 1))]),
    "the provider billed": lambda b: replace(b, provider=[*b.provider, b.provider[0]]),
    "the ledger settled": lambda b: replace(b, provider=b.provider[1:]),
    "is held at 500 tokens": lambda b: replace(b, provider=[b.provider[0], Billed("c-b", "m", Tokens(1, 500))]),
    "billed 2 times": lambda b: replace(b, provider=[*b.provider, b.provider[1]]),
    "of a budget of": lambda b: replace(b, budgets={"t": 154}),
    "entries and settled calls differ": lambda b: with_ledger(b, entries=[*b.ledger.entries, *b.ledger.entries]),
    "its tokens cost": lambda b: with_entry(b, cost_nano_usd=111),
    "on the ledger 2 times": lambda b: with_ledger(b, calls=[*b.ledger.calls, replace(call("b", UNRESOLVED), reservation_id="r-b2")]),
    "was told": lambda b: with_entry(b, tokens=Tokens(9, 21)),
    "nobody made the call": lambda b: with_ledger(b, calls=[*b.ledger.calls, call("d", VOID)]),
    "use u was answered and is not on record": lambda b: with_ledger(b, units=[]),
    "use u is on record with 4": lambda b: with_ledger(b, units=[Use("t", "u", 4, NOW)]),
    "event e was answered and is not on record": lambda b: with_ledger(b, events=b.ledger.events[1:]),
    "reversal of event f was answered and is not on record": lambda b: with_ledger(b, events=b.ledger.events[:2]),
    "event f is on record 2 times": lambda b: with_ledger(b, events=[*b.ledger.events, b.ledger.events[1]]),
    "nobody asked for event g": lambda b: with_ledger(b, events=[*b.ledger.events, Use("t", "g", 1, NOW)]),
    "event e is on record with 149": lambda b: with_ledger(b, events=[replace(b.ledger.events[0], quantity=149), *b.ledger.events[1:]]),
    "and owes": lambda b: with_bills(b, draft=309 * USD - 1),
    "by month": lambda b: with_ledger(
        b, events=[replace(b.ledger.events[0], time=MONTHS[0].start_time - timedelta(1)), *b.ledger.events[1:]]
    ),
    "are closed, and not 2": lambda b: with_bills(b, charges=[513 * USD]),
    "would be made": lambda b: with_bills(b, remade=["invoice 1 would be made otherwise"]),
    "leases are left": lambda b: with_limits(b, lease_count=1),
    "the limits hold": lambda b: with_limits(b, holds=[*b.limits["t"].holds, Hold("r-z", True, 1, 1)]),
    "the ledger alone": lambda b: with_limits(b, holds=[]),
    "the ledger's bound is": lambda b: with_limits(b, holds=[Hold("r-b", True, 499, 2_000)]),
    "without its being unresolved": lambda b: with_limits(b, holds=[Hold("r-b", False, 500, 2_000)]),
    "tokens_per_day": lambda b: with_limits(b, used=b.limits["t"].used | {"tokens_per_day": 531}),
    "concurrent_calls": lambda b: with_limits(b, used=b.limits["t"].used | {"concurrent_calls": 1}),
    "recomputed it is": lambda b: replace(b, reports={"t": replace(b.reports["t"], cost_nano_usd=111)}),
}


def test_books_that_agree_have_no_difference() -> None:
    """Settled as billed, unresolved within its bound and held at it, void and unbilled, units as used: nothing differs."""
    assert differences(books()) == []


@pytest.mark.parametrize("what", SPOILED)
def test_each_difference_is_named(what: str) -> None:
    """A single wrong figure, row or hold in any of the books is found."""
    assert any(what in difference for difference in differences(SPOILED[what](books())))


def test_more_may_be_held_of_a_call_past_its_max_tokens_alone() -> None:
    """A runaway call may be held above its bound, never below; any other call exactly at it."""
    more = with_limits(books(), holds=[Hold("r-b", True, 501, 2_001)], used={})
    assert differences(replace(more, runaways=frozenset({"c-b"}))) == []
    assert differences(more) != []


def test_costs_are_rounded_once_a_class_half_to_even() -> None:
    """Half a nano-dollar goes to the even neighbour, in each class for itself."""
    assert cost_nano_usd(Tokens(1, 3, 1), Tokens(500_000, 500_000, 1_500_000, 0, 0)) == 0 + 2 + 2
