"""The one rule of rounding, and shares of a whole that add up to it. Integers only; no amount is ever a float."""

NANO_PER_USD = 1_000_000_000
PER_MILLION = 1_000_000
# What Postgres keeps in a bigint: over nine billion dollars. More is a wrong price or a wrong count, and no bill.
MAX_AMOUNT = 9_223_372_036_854_775_807


class AmountTooLarge(Exception):
    """A line or a sum is over what the ledger can keep."""


def round_half_even(numerator: int, denominator: int) -> int:
    """Returns numerator ÷ denominator, rounded half to even. The denominator is 1 or more; the numerator may be negative."""
    whole, rest = divmod(numerator, denominator)
    doubled = 2 * rest
    if doubled > denominator or (doubled == denominator and whole % 2 == 1):
        return whole + 1
    return whole


def priced(quantity: int, nano_usd_per_million: int) -> int:
    """Returns quantity × price ÷ 10⁶ in nano-USD, rounded once, half to even. Raises: AmountTooLarge."""
    return bounded(round_half_even(quantity * nano_usd_per_million, PER_MILLION))


def bounded(amount: int) -> int:
    """Returns the amount. Raises: AmountTooLarge when it is over what the ledger can keep."""
    if abs(amount) > MAX_AMOUNT:
        raise AmountTooLarge(str(amount))
    return amount


def share(whole: int, start: int, end: int, length: int) -> int:
    """Returns the part of a whole that falls on the seconds from `start` to before `end` of a period of `length` seconds.

    Parts that cover the period without a gap add up to the whole exactly: each is the difference of two rounded bounds.
    """
    return round_half_even(whole * end, length) - round_half_even(whole * start, length)
