"""Re-rating as a rule of values: after it every sum is what it would be had the right price been there from the start."""

from datetime import UTC, date, datetime
from fractions import Fraction
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.errors import PriceMissing
from services.metering.call import TokenUsage
from services.metering.price_book import PriceVersion
from services.metering.rating import ClassPrices, cost_nano_usd
from services.metering.rerating import RatedCall, Rates

MODELS = ("a", "b")
PRICES = st.integers(0, 10**15)
CLASS_PRICES = st.builds(ClassPrices, PRICES, PRICES, PRICES, PRICES, PRICES)
TOKENS = st.integers(0, 100_000_000)
USAGES = st.builds(TokenUsage, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS)
BOOKS = st.fixed_dictionaries({("p", model): CLASS_PRICES for model in MODELS})


def version(name: str, prices: dict[tuple[str, str], ClassPrices]) -> PriceVersion:
    """A version of these prices."""
    return PriceVersion(name, datetime(2026, 1, 1, tzinfo=UTC), "a test", date(2026, 1, 1), prices)


def exact(usage: TokenUsage, prices: ClassPrices) -> int:
    """What a call costs, class by class, worked out with fractions."""
    pairs = zip(
        (usage.input, usage.output, usage.cache_read, usage.cache_write_5m, usage.cache_write_1h),
        (prices.input, prices.output, prices.cache_read, prices.cache_write_5m, prices.cache_write_1h),
        strict=True,
    )
    return sum(round(Fraction(tokens * price, 1_000_000)) for tokens, price in pairs)


@given(BOOKS, BOOKS, BOOKS, st.lists(st.tuples(st.sampled_from(MODELS), USAGES), max_size=8))
def test_totals_are_as_if_the_right_price_had_been_in_force_from_the_start(
    wrong: dict[tuple[str, str], ClassPrices],
    between: dict[tuple[str, str], ClassPrices],
    right: dict[tuple[str, str], ClassPrices],
    uses: list[tuple[str, TokenUsage]],
) -> None:
    """From a wrong price to the right one, at once or over another wrong one: to the nano-dollar, and a second time nothing changes."""
    versions = [version(name, prices) for name, prices in (("wrong", wrong), ("between", between), ("right", right))]
    at_once, in_steps = 0, 0
    for model, usage in uses:
        cost = cost_nano_usd(usage, wrong["p", model])
        call = RatedCall(UUID(int=1), "p", model, "wrong", usage, cost)
        standing = {item.version: item for item in versions}
        direct = Rates(versions[2], standing).difference(call)
        assert direct is not None
        at_once += cost + direct
        for target in versions[1:]:
            difference = Rates(target, standing).difference(call)
            assert difference is not None
            call = RatedCall(UUID(int=1), "p", model, target.version, usage, call.cost_nano_usd + difference)
        in_steps += call.cost_nano_usd
        assert Rates(versions[2], standing).difference(call) == 0
    assert at_once == in_steps == sum(exact(usage, right["p", model]) for model, usage in uses)


@given(BOOKS, BOOKS, USAGES, st.integers(1, 10**9))
def test_cost_that_a_bill_told_is_kept(
    wrong: dict[tuple[str, str], ClassPrices], right: dict[tuple[str, str], ClassPrices], usage: TokenUsage, more: int
) -> None:
    """A cost that no price of the version makes is the provider's own word."""
    told = RatedCall(UUID(int=1), "p", "a", "wrong", usage, cost_nano_usd(usage, wrong["p", "a"]) + more)
    assert Rates(version("right", right), {"wrong": version("wrong", wrong)}).difference(told) is None


@given(BOOKS, USAGES)
def test_missing_price_is_told_by_name_and_looked_for_only_where_it_can_be(
    wrong: dict[tuple[str, str], ClassPrices], usage: TokenUsage
) -> None:
    """Which version lacks which model; a version with every model of the others misses none."""
    standing = {"wrong": version("wrong", wrong)}
    poor = Rates(version("right", {("p", "b"): wrong["p", "b"]}), standing)
    with pytest.raises(PriceMissing) as refused:
        poor.difference(RatedCall(UUID(int=1), "p", "a", "wrong", usage, cost_nano_usd(usage, wrong["p", "a"])))
    assert refused.value.metadata == {"version": "right", "provider": "p", "model": "a"}
    assert poor.may_miss
    assert not Rates(version("right", wrong), standing).may_miss
