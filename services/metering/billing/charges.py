"""Rates a span: fees, usage beyond what is included, discounts, the minimum. Pure: equal quantities give equal lines in any order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import IntEnum

from services.metering.billing.exact import bounded, round_half_even
from services.metering.billing.proration import Span
from services.metering.billing.terms import Discount
from services.metering.billing.tiers import price_parts

_BASIS_POINTS = 10_000


class LineKind(IntEnum):
    """What a line is for; the numbers are the contract's and the database's."""

    FEE = 1
    USAGE = 2
    DISCOUNT = 3
    MINIMUM = 4


@dataclass(frozen=True, slots=True, order=True)
class LineKey:
    """What makes a line the same line in another rating of its span. Usage: `name` is the meter, tier 0 what is included."""

    start_time: datetime
    end_time: datetime
    kind: LineKind
    position: int
    name: str
    tier: int


@dataclass(frozen=True, slots=True)
class RatedLine:
    """A line of a span. Fees, discounts and minimums have the quantity 1 and no price by the unit."""

    key: LineKey
    plan: str
    plan_version: str
    quantity: int
    nano_usd_per_million: int
    amount_nano_usd: int


def rate_span(span: Span, quantities: Mapping[str, int]) -> list[RatedLine]:
    """Rates what was used in a span, by meter. A quantity under 0 counts as 0. Raises: AmountTooLarge."""
    lines = [*_fees(span), *_usage(span, quantities)]
    subtotal = bounded(sum(line.amount_nano_usd for line in lines))
    discounts = _discounts(span, subtotal)
    rest = subtotal + sum(line.amount_nano_usd for line in discounts)
    missing = span.part_of(span.version.terms.minimum_nano_usd) - rest
    minimum = [_fixed(span, LineKind.MINIMUM, 0, "minimum", missing)] if missing > 0 else []
    return [*lines, *discounts, *minimum]


def difference(after: Sequence[RatedLine], before: Sequence[RatedLine]) -> list[RatedLine]:
    """Returns what a second rating of the same span adds to the first, line by line, without lines that did not change."""
    known = {line.key: line for line in before}
    found = []
    for line in after:
        old = known.pop(line.key, None)
        if old is not None:
            line = replace(line, quantity=line.quantity - old.quantity, amount_nano_usd=line.amount_nano_usd - old.amount_nano_usd)
        found.append(line)
    gone = [replace(line, quantity=-line.quantity, amount_nano_usd=-line.amount_nano_usd) for line in known.values()]
    return sorted((line for line in [*found, *gone] if line.quantity or line.amount_nano_usd), key=lambda line: line.key)


def _fees(span: Span) -> Iterator[RatedLine]:
    for position, fee in enumerate(span.version.terms.fees):
        yield _fixed(span, LineKind.FEE, position, fee.name, span.part_of(fee.nano_usd))


def _usage(span: Span, quantities: Mapping[str, int]) -> Iterator[RatedLine]:
    for position, charge in enumerate(span.version.terms.charges):
        used = max(0, quantities.get(charge.meter, 0))
        included = min(used, span.part_of(charge.included))
        if included:
            yield _line(span, LineKey(span.start_time, span.end_time, LineKind.USAGE, position, charge.meter, 0), included, 0, 0)
        for part in price_parts(used - included, charge.pricing):
            key = LineKey(span.start_time, span.end_time, LineKind.USAGE, position, charge.meter, part.tier)
            yield _line(span, key, part.quantity, part.nano_usd_per_million, part.amount_nano_usd)


def _discounts(span: Span, subtotal: int) -> list[RatedLine]:
    found, rest = [], subtotal
    for position, discount in enumerate(span.version.terms.discounts):
        taken = min(rest, _taken(span, discount, subtotal))
        if taken > 0:
            found.append(_fixed(span, LineKind.DISCOUNT, position, discount.name, -taken))
            rest -= taken
    return found


def _taken(span: Span, discount: Discount, subtotal: int) -> int:
    # A share is of fees and usage before any discount: the order of discounts decides only which one meets the end of the sum.
    by_share = round_half_even(subtotal * discount.basis_points, _BASIS_POINTS)
    return by_share + span.part_of(discount.nano_usd)


def _fixed(span: Span, kind: LineKind, position: int, name: str, amount: int) -> RatedLine:
    return _line(span, LineKey(span.start_time, span.end_time, kind, position, name, 0), 1, 0, amount)


def _line(span: Span, key: LineKey, quantity: int, price: int, amount: int) -> RatedLine:
    return RatedLine(key, span.version.plan, span.version.version, quantity, price, bounded(amount))
