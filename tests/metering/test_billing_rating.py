"""Rating by plans: exact integers, whatever order usage, plan changes and closings come in, against fractions rounded by the one rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.kernel.ids import new_uuid7
from services.metering.billing.charges import LineKind, difference, rate_span
from services.metering.billing.credits import Credit, apply_credits
from services.metering.billing.exact import AmountTooLarge, priced, round_half_even, share
from services.metering.billing.invoice import RatedPeriod, build_content
from services.metering.billing.periods import BillingPeriod, period_of
from services.metering.billing.proration import Plans, Span, Subscription, UnknownBillingPlan, spans_of
from services.metering.billing.terms import BillingTerms, Discount, Fee, PlanVersion, UsageCharge, read_terms, terms_form
from services.metering.billing.tiers import Graduated, Package, PerUnit, Pricing, Tier, Volume, price_parts

START = datetime(2026, 1, 1, tzinfo=UTC)
PERIODS = [period_of(START + timedelta(days=days), 1) for days in (0, 40, 60)]
USD = 1_000_000_000
PRICES = st.integers(0, 10**13)
QUANTITIES = st.integers(0, 10**7)


def tier_lists(volume: bool) -> st.SearchStrategy[Pricing]:
    """Graduated or volume tiers with rising bounds."""
    bounds = st.lists(st.integers(1, 10**7), max_size=3, unique=True).map(sorted)
    made = bounds.flatmap(lambda found: st.tuples(st.just(found), st.lists(PRICES, min_size=len(found) + 1, max_size=len(found) + 1)))

    def build(pair: tuple[list[int], list[int]]) -> Pricing:
        tiers = tuple(Tier(bound, price) for bound, price in zip([*pair[0], None], pair[1], strict=True))
        return Volume(tiers) if volume else Graduated(tiers)

    return made.map(build)


PRICINGS = st.one_of(
    PRICES.map(PerUnit), tier_lists(False), tier_lists(True), st.builds(Package, st.integers(1, 5_000), st.integers(0, 100 * USD))
)
TERMS = st.builds(
    BillingTerms,
    fees=st.lists(st.integers(0, 10**12), max_size=2).map(lambda found: tuple(Fee(f"fee_{n}", fee) for n, fee in enumerate(found))),
    charges=st.lists(st.tuples(st.integers(0, 10**6), PRICINGS), min_size=1, max_size=2).map(
        lambda found: tuple(UsageCharge(f"meter_{n}", included, pricing) for n, (included, pricing) in enumerate(found))
    ),
    discounts=st.lists(st.tuples(st.booleans(), st.integers(1, 10_000)), max_size=2).map(
        lambda found: tuple(Discount(f"off_{n}", size if share else 0, 0 if share else size * USD) for n, (share, size) in enumerate(found))
    ),
    minimum_nano_usd=st.sampled_from([0, 0, 10**9, 10**15]),
)


@dataclass(frozen=True, slots=True)
class Use:
    """A use: in which period and how far into it, of which meter, how much, and before which closing it was recorded."""

    period: int
    second: int
    meter: int
    quantity: int
    round: int


USES = st.lists(
    st.builds(Use, st.integers(0, 2), st.integers(0, 27 * 86_400), st.integers(0, 1), QUANTITIES, st.integers(0, 3)), max_size=8
)


def moment(use: Use) -> datetime:
    """When a use was."""
    return PERIODS[use.period].start_time + timedelta(seconds=use.second)


def quantities(spans: Sequence[Span], uses: Sequence[Use]) -> dict[datetime, dict[str, int]]:
    """Sums by span and meter."""
    found: dict[datetime, dict[str, int]] = {}
    for span in spans:
        for use in uses:
            if span.start_time <= moment(use) < span.end_time:
                by_meter = found.setdefault(span.start_time, {})
                by_meter[f"meter_{use.meter}"] = by_meter.get(f"meter_{use.meter}", 0) + use.quantity
    return found


def billed(uses: Sequence[Use], subscriptions: Sequence[Subscription], plans: Plans, lags: Sequence[int]) -> int:
    """Returns the sum of three invoices; lags[p] tells how many rounds after the earliest moment period p is closed."""
    rounds: list[int] = []
    for period, lag in enumerate(lags):
        rounds.append(max([period + lag, *rounds]))
    total = 0
    for number, period in enumerate(PERIODS):
        spans = spans_of(period, subscriptions, "", plans)
        seen = [use for use in uses if use.round <= rounds[number]]
        own = RatedPeriod(period, spans, quantities(spans, seen), None)
        late = []
        for earlier in PERIODS[:number]:
            cut = spans_of(earlier, subscriptions, "", plans)
            before = [use for use in uses if use.round <= rounds[number - 1]]
            late.append(RatedPeriod(earlier, cut, quantities(cut, seen), quantities(cut, before)))
        total += build_content(own, late, 0, [], {}).charges_nano_usd
    return total


def exactly(uses: Sequence[Use], changes: Sequence[tuple[datetime, BillingTerms]]) -> int:
    """The same sum by fractions, from what the words of the plan say, without any of the code above."""
    total = 0
    for period in PERIODS:
        cuts = sorted({period.start_time, *(time for time, _ in changes if period.start_time < time < period.end_time)})
        for start, end in zip(cuts, [*cuts[1:], period.end_time], strict=True):
            terms = [terms for time, terms in changes if time <= start][-1]
            a, b = Fraction((start - period.start_time).total_seconds()), Fraction((end - period.start_time).total_seconds())
            whole = Fraction((period.end_time - period.start_time).total_seconds())

            def part(amount: int, a: Fraction = a, b: Fraction = b, whole: Fraction = whole) -> int:
                return round(amount * b / whole) - round(amount * a / whole)

            subtotal = sum(part(fee.nano_usd) for fee in terms.fees)
            for charge in terms.charges:
                used = sum(use.quantity for use in uses if f"meter_{use.meter}" == charge.meter and start <= moment(use) < end)
                subtotal += over(max(0, used - part(charge.included)), charge.pricing)
            rest = subtotal
            for discount in terms.discounts:
                rest -= min(rest, round(Fraction(subtotal * discount.basis_points, 10_000)) + part(discount.nano_usd))
            total += max(rest, part(terms.minimum_nano_usd))
    return total


def over(quantity: int, pricing: Pricing) -> int:
    """What a quantity beyond the included one costs, by fractions."""
    match pricing:
        case PerUnit(price):
            return round(Fraction(quantity * price, 10**6))
        case Package(size, price):
            return -(-quantity // size) * price
        case Volume(tiers):
            price = next(tier for tier in tiers if tier.up_to is None or quantity <= tier.up_to).nano_usd_per_million
            return round(Fraction(quantity * price, 10**6))
        case Graduated(tiers):
            bounds = [0, *(tier.up_to for tier in tiers if tier.up_to is not None), 10**30]
            return sum(
                round(Fraction(max(0, min(quantity, high) - low) * tier.nano_usd_per_million, 10**6))
                for low, high, tier in zip(bounds, bounds[1:], tiers, strict=False)
            )


@settings(max_examples=60, deadline=None)
@given(USES, st.lists(TERMS, min_size=1, max_size=3), st.lists(st.integers(0, 80 * 86_400), max_size=2), st.data())
def test_any_order_of_usage_plan_changes_and_closings_gives_the_exact_total(
    uses: list[Use], terms: list[BillingTerms], seconds: list[int], data: st.DataObject
) -> None:
    """Late or timely, shuffled, under changing plans, closed early or late: all invoices together are the fractions' total."""
    plans = {f"p{n}": [PlanVersion(f"p{n}", "1", START, each)] for n, each in enumerate(terms)}
    times = [START, *sorted({START + timedelta(seconds=second) for second in seconds} - {START})]
    subscriptions = [Subscription(n + 1, f"p{n % len(terms)}", time, 1) for n, time in enumerate(times)]
    # Subscribing again to the plan one is on changes nothing; a new version begins a new part, whatever it says.
    changes = [(time, terms[n % len(terms)]) for n, time in enumerate(times)]
    expected = exactly(uses, changes[:1] if len(terms) == 1 else changes)
    # Whatever was not recorded in time for the last closing would be on a fourth invoice: all is, within three rounds.
    shuffled = data.draw(st.permutations(uses))
    lags = [*data.draw(st.lists(st.integers(0, 2), min_size=2, max_size=2)), 1]
    assert billed(shuffled, data.draw(st.permutations(subscriptions)), plans, lags) == expected
    # Changed in place, for one plan: its next version takes over where a subscription would.
    versions = {"p": [PlanVersion("p", str(n), time, terms[n % len(terms)]) for n, time in enumerate(times)]}
    assert billed(uses, [Subscription(1, "p", START, 1)], versions, [0, 0, 1]) == exactly(uses, changes)


@given(st.integers(-(10**18), 10**18), st.integers(1, 10**9))
def test_division_rounds_half_to_even(numerator: int, denominator: int) -> None:
    """The integer arithmetic is Python's round() of the exact fraction, below zero as well."""
    assert round_half_even(numerator, denominator) == round(Fraction(numerator, denominator))


@given(st.integers(0, 10**15), st.lists(st.integers(0, 2_678_400), max_size=6))
def test_parts_of_a_whole_add_up_to_it(whole: int, cuts: list[int]) -> None:
    """However a period is cut, the parts of a fee sum to the fee, and none is negative."""
    bounds = [0, *sorted(cuts), 2_678_400]
    parts = [share(whole, start, end, 2_678_400) for start, end in pairwise(bounds)]
    assert sum(parts) == whole
    assert min(parts) >= 0


@given(QUANTITIES, PRICINGS)
def test_parts_of_a_quantity_are_the_quantity(quantity: int, pricing: Pricing) -> None:
    """Tiers divide a quantity without loss; packages round it up; each part is its quantity at its price, rounded once."""
    parts = price_parts(quantity, pricing)
    if isinstance(pricing, Package):
        assert sum(part.quantity for part in parts) * pricing.size >= quantity
    else:
        assert sum(part.quantity for part in parts) == quantity
    assert all(part.amount_nano_usd == round(Fraction(part.quantity * part.nano_usd_per_million, 10**6)) for part in parts)


@given(TERMS)
def test_terms_survive_being_stored(terms: BillingTerms) -> None:
    """What is written as JSON is read as the same terms."""
    assert read_terms(terms_form(terms)) == terms


def test_an_amount_that_the_ledger_cannot_keep_is_refused() -> None:
    """A price times a quantity over nine billion dollars raises, and is never cut or wrapped."""
    with pytest.raises(AmountTooLarge):
        priced(10**13, 10**15)


@pytest.mark.parametrize(
    ("day", "moment", "start", "end"),
    [
        (1, "2026-02-28T23:59:59", "2026-02-01", "2026-03-01"),
        (31, "2026-02-28T00:00:00", "2026-02-28", "2026-03-31"),
        (31, "2026-02-27T23:59:59", "2026-01-31", "2026-02-28"),
        (15, "2026-01-01T00:00:00", "2025-12-15", "2026-01-15"),
        (29, "2028-02-29T12:00:00", "2028-02-29", "2028-03-29"),
    ],
)
def test_periods_begin_on_the_anchor_day(day: int, moment: str, start: str, end: str) -> None:
    """A month of UTC from the anchor day on, or from the last day of a month that is shorter."""
    found = period_of(datetime.fromisoformat(moment + "+00:00"), day)
    assert (found.start_time.date().isoformat(), found.end_time.date().isoformat()) == (start, end)


@given(st.integers(1, 31), st.integers(0, 200_000_000))
def test_periods_follow_each_other_without_a_gap(day: int, second: int) -> None:
    """Every moment is in exactly one period, the next begins where it ends, and none is shorter than 28 days."""
    moment = START + timedelta(seconds=second)
    found = period_of(moment, day)
    assert found.start_time <= moment < found.end_time
    assert period_of(found.end_time, day).start_time == found.end_time
    assert found.seconds >= 28 * 86_400


def span_of(terms: BillingTerms, period: BillingPeriod = PERIODS[0]) -> Span:
    """A whole period under one plan."""
    return Span(period, period.start_time, period.end_time, PlanVersion("p", "1", START, terms))


def test_what_is_included_is_shown_and_free() -> None:
    """Usage within the allowance has a line of its own that costs nothing; what goes beyond is priced."""
    terms = BillingTerms((Fee("base", 29 * USD),), (UsageCharge("m", 100, PerUnit(2 * USD * 10**6)),))
    lines = [(line.key.kind, line.key.tier, line.quantity, line.amount_nano_usd) for line in rate_span(span_of(terms), {"m": 130})]
    assert lines == [(LineKind.FEE, 0, 1, 29 * USD), (LineKind.USAGE, 0, 100, 0), (LineKind.USAGE, 1, 30, 60 * USD)]


def test_discounts_come_before_the_minimum_and_never_pass_the_sum() -> None:
    """Ten percent and two dollars off; the rest is filled up to the minimum; a discount larger than the sum takes the sum."""
    off = (Discount("tenth", 1_000, 0), Discount("two", 0, 2 * USD))
    charge = (UsageCharge("m", 0, PerUnit(USD * 10**6)),)
    for used, minimum, expected in ((100, 0, 88), (100, 95, 95), (2, 0, 0), (1, 0, 0)):
        lines = rate_span(span_of(BillingTerms((), charge, off, minimum * USD)), {"m": used})
        assert sum(line.amount_nano_usd for line in lines) == expected * USD


def test_a_correction_below_zero_counts_as_nothing() -> None:
    """A meter whose corrections exceed its use costs nothing, and gives nothing back by itself."""
    terms = BillingTerms((), (UsageCharge("m", 0, PerUnit(10**6)),))
    assert rate_span(span_of(terms), {"m": -5}) == []


def test_late_usage_that_reaches_a_cheaper_volume_is_a_negative_line() -> None:
    """The difference of two ratings keeps both exact: the cheaper tier applies to what was billed before as well."""
    terms = BillingTerms((), (UsageCharge("m", 0, Volume((Tier(10, 2 * 10**6), Tier(None, 10**6)))),))
    (line,) = difference(rate_span(span_of(terms), {"m": 11}), rate_span(span_of(terms), {"m": 10}))
    assert (line.quantity, line.amount_nano_usd) == (1, -9)


def test_late_usage_that_fills_up_the_minimum_gives_back_what_the_minimum_had_asked_for() -> None:
    """A line that is gone from the second rating is taken back whole: the period costs what it would have cost in time."""
    terms = BillingTerms((), (UsageCharge("m", 0, PerUnit(10**6)),), minimum_nano_usd=10)
    lines = difference(rate_span(span_of(terms), {"m": 12}), rate_span(span_of(terms), {"m": 4}))
    assert [(line.key.kind, line.quantity, line.amount_nano_usd) for line in lines] == [(LineKind.USAGE, 8, 8), (LineKind.MINIMUM, -1, -6)]


def test_a_period_without_an_invoice_is_charged_its_usage_alone() -> None:
    """No fee, no minimum, no discount of an amount for a time before the first invoice; a share off still is."""
    terms = BillingTerms(
        (Fee("base", USD),), (UsageCharge("m", 0, PerUnit(10**6)),), (Discount("half", 5_000, 0), Discount("one", 0, 1)), 10 * USD
    )
    lines = rate_span(span_of(terms).usage_alone(), {"m": 10})
    assert [(line.key.kind, line.amount_nano_usd) for line in lines] == [(LineKind.USAGE, 10), (LineKind.DISCOUNT, -5)]


def test_the_first_subscription_holds_before_its_time_and_a_later_one_takes_over() -> None:
    """Spans follow subscriptions by time, of one time by number; versions that change nothing cut nothing."""
    plans = {name: [PlanVersion(name, "1", START, BillingTerms())] for name in ("a", "b", "c")}
    day = PERIODS[0].start_time + timedelta(days=9)
    spans = spans_of(PERIODS[0], [Subscription(1, "a", day, 1), Subscription(2, "b", day, 1)], "c", plans)
    assert [(span.version.plan, span.end_time) for span in spans] == [("a", day), ("b", PERIODS[0].end_time)]
    assert [span.version.plan for span in spans_of(PERIODS[0], [], "c", plans)] == ["c"]
    with pytest.raises(UnknownBillingPlan):
        spans_of(PERIODS[0], [], "d", plans)


def credit(amount: int, priority: int = 0, expiry_days: int | None = None, effective_days: int = -10) -> Credit:
    """A credit, its times told in days from the period's start."""
    start = PERIODS[0].start_time
    expiry = None if expiry_days is None else start + timedelta(days=expiry_days)
    return Credit(new_uuid7(), amount, priority, start + timedelta(days=effective_days), expiry, "", start)


def test_credits_are_taken_by_priority_then_by_what_expires_sooner() -> None:
    """The lowest priority first; within it what would be lost sooner; what does not expire last; no more than is due."""
    never, later, sooner, first = credit(5), credit(5, expiry_days=60), credit(5, expiry_days=20), credit(1, priority=0, expiry_days=1)
    other = credit(100, priority=1, expiry_days=1)
    found = apply_credits(18, [other, never, later, sooner, first], {later.credit_id: 2}, PERIODS[0])
    order = [(first, 1), (sooner, 5), (later, 3), (never, 5), (other, 4)]
    assert [(use.credit_id, use.amount_nano_usd) for use in found] == [(item.credit_id, amount) for item, amount in order]


def test_a_credit_pays_only_periods_of_its_time() -> None:
    """Expired before the period began, or in force only after it ended: it pays nothing."""
    dead, unborn = credit(5, expiry_days=0), credit(5, effective_days=31)
    assert apply_credits(10, [dead, unborn], {}, PERIODS[0]) == []
    assert apply_credits(0, [credit(5)], {}, PERIODS[0]) == []


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 2)), max_size=6), st.integers(0, 500), st.randoms())
def test_credits_pay_the_same_in_any_order(granted: list[tuple[int, int]], due: int, random: object) -> None:
    """What is paid is the lesser of what is due and what there is, and which credit pays does not depend on the order of rows."""
    credits = [credit(amount, priority) for amount, priority in granted]
    mixed = list(credits)
    random.shuffle(mixed)  # type: ignore[attr-defined] # hypothesis' own random
    found = apply_credits(due, credits, {}, PERIODS[0])
    assert apply_credits(due, mixed, {}, PERIODS[0]) == found
    assert sum(use.amount_nano_usd for use in found) == min(due, sum(amount for amount, _ in granted))


def test_what_is_owed_to_the_tenant_is_carried_on() -> None:
    """A balance below zero asks for nothing and begins the next invoice; credits pay nothing of it."""
    empty = RatedPeriod(PERIODS[1], [span_of(BillingTerms(), PERIODS[1])], {}, None)
    content = build_content(empty, [], -7, [credit(5)], {})
    assert (content.charges_nano_usd, content.due_nano_usd, content.carried_out_nano_usd, content.credit_uses) == (0, 0, -7, [])
    fee = RatedPeriod(PERIODS[1], [span_of(BillingTerms((Fee("base", 20),)), PERIODS[1])], {}, None)
    paid = build_content(fee, [], -7, [credit(5)], {UUID(int=1): 1})
    assert (paid.due_nano_usd, paid.credits_nano_usd, paid.carried_out_nano_usd) == (8, 5, 0)
