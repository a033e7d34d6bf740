"""Rating: exact integers, each class rounded half to even, once."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from services.metering.call import TokenUsage
from services.metering.rating import ClassPrices, cost_nano_usd, line_nano_usd

TOKENS = st.integers(0, 100_000_000)
PRICES = st.integers(0, 10**15)


@given(TOKENS, PRICES)
def test_line_is_the_exact_product_rounded_half_to_even(tokens: int, price: int) -> None:
    """The integer arithmetic equals Python's round() of the exact fraction."""
    assert line_nano_usd(tokens, price) == round(Fraction(tokens * price, 1_000_000))


@given(st.integers(0, 10**6))
def test_exact_halves_go_to_the_even_neighbour(whole: int) -> None:
    """N and a half nano-dollars become the even one of n and n + 1."""
    assert line_nano_usd(1, whole * 1_000_000 + 500_000) == whole + whole % 2


@given(st.tuples(TOKENS, TOKENS, TOKENS, TOKENS, TOKENS), st.tuples(PRICES, PRICES, PRICES, PRICES, PRICES))
def test_cost_is_the_sum_of_its_rounded_lines(tokens: tuple[int, ...], prices: tuple[int, ...]) -> None:
    """Classes are rounded by themselves: no class's fraction spills into another's."""
    expected = sum(round(Fraction(count * price, 1_000_000)) for count, price in zip(tokens, prices, strict=True))
    assert cost_nano_usd(TokenUsage(*tokens), ClassPrices(*prices)) == expected
