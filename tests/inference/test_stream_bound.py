"""The bound of a running stream, against every text, density and price."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.call import Received, Usage
from services.inference.stream_bound import extension, output_allowed, output_at_most
from services.inference.token_density import TokenDensities
from services.inference.worst_case import Price, ceil_cost, granted_hold, make_hold

prices = st.builds(Price, st.just("v"), st.integers(0, 10**12), st.integers(0, 10**12))
tokens = st.integers(0, 100_000)
# Pieces as they come: each token has a byte at least.
streams = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 400)).map(lambda piece: (piece[0], piece[0] + piece[1])), max_size=30)


@given(tokens, tokens, tokens, prices, tokens)
def test_what_is_allowed_is_covered_in_tokens_and_money(
    held_input: int, max_output: int, spare: int, price: Price, billed_input: int
) -> None:
    """Whatever input is billed within what was held, the output that is allowed beside it passes neither the tokens nor the money held."""
    hold = make_hold(held_input, max_output, price, spare_tokens=spare)
    received = Received(usage=Usage(input_tokens=min(billed_input, held_input)))
    allowed = output_allowed(hold, price, received)
    given_tokens = received.usage.total_input
    assert allowed + given_tokens <= hold.tokens
    assert ceil_cost(given_tokens, price.input) + ceil_cost(allowed, price.output) <= hold.cost_nano_usd


@given(tokens, st.integers(1, 100_000), tokens, prices, tokens)
def test_an_honest_answer_is_always_allowed_with_all_that_is_spare(
    held_input: int, max_output: int, spare: int, price: Price, billed_input: int
) -> None:
    """Beside any input within the hold there is room for max_tokens and the whole spare, however the prices round."""
    hold = make_hold(held_input, max_output, price, spare_tokens=spare)
    received = Received(usage=Usage(input_tokens=min(billed_input, held_input)))
    assert output_allowed(hold, price, received) >= max_output + spare


@given(streams, st.data())
def test_of_a_model_never_seen_no_stream_has_more_tokens_than_its_bound(stream: list[tuple[int, int]], data: st.DataObject) -> None:
    """Counted by the provider now and then, and by bytes in between, the bound is never below what was written."""
    received, written = Received(), 0
    for token_count, byte_count in stream:
        written += token_count
        received.output_bytes += byte_count
        assert output_at_most(received, "m", TokenDensities()) >= written
        if data.draw(st.booleans()):
            received.counted_tokens, received.counted_bytes = written, received.output_bytes


@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(0, 10_000)), min_size=1, max_size=20))
def test_an_estimate_is_never_below_what_was_seen(texts: list[tuple[int, int]]) -> None:
    """Of no text that was seen, nor of a shorter one as dense, is less expected than it had; and never more than its bytes."""
    densities = TokenDensities()
    for byte_count, token_count in texts:
        densities.seen("m", byte_count, min(byte_count, token_count))
    for byte_count, token_count in texts:
        assert min(byte_count, token_count) <= densities.bound("m", byte_count) <= byte_count


def test_a_model_that_was_not_seen_is_bound_by_bytes() -> None:
    """Nothing seen means one token a byte; what was seen of one model says nothing about another."""
    densities = TokenDensities()
    densities.seen("known", 4_000, 1_000)
    assert densities.bound("other", 400) == 400
    assert 100 <= densities.bound("known", 400) < 200


def test_the_densest_text_is_remembered_and_the_oldest_model_forgotten() -> None:
    """A lighter text lowers no estimate; beyond its capacity the memory drops the model seen longest ago."""
    densities = TokenDensities(capacity=2)
    densities.seen("a", 4_000, 2_000)
    before = densities.bound("a", 1_000)
    densities.seen("a", 4_000, 100)
    assert densities.bound("a", 1_000) == before
    densities.seen("b", 4_000, 1_000)
    densities.seen("c", 4_000, 1_000)
    assert densities.bound("a", 1_000) == 1_000


@pytest.mark.parametrize("byte_count", [0, 1, 7])
def test_a_text_without_tokens_beyond_its_wrapping_teaches_nothing_wrong(byte_count: int) -> None:
    """A word is mostly wrapping: it makes no model look dense, and no estimate negative."""
    densities = TokenDensities()
    densities.seen("m", byte_count, 3)
    assert 0 <= densities.bound("m", 1_000) <= 1_000


@given(tokens, st.integers(1, 100_000), tokens, prices, st.integers(1, 100_000))
def test_an_extension_takes_the_stream_off_its_line(held_input: int, max_output: int, spare: int, price: Price, past: int) -> None:
    """With what is asked for, a stream that was past its line by so much is no longer past it, and every amount is larger than before."""
    hold = make_hold(held_input, max_output, price, spare_tokens=spare)
    larger = make_hold(held_input, max_output, price, spare_tokens=spare + extension(hold, past))
    received = Received(usage=Usage(input_tokens=held_input))
    assert output_allowed(larger, price, received) >= output_allowed(hold, price, received) + past - 1
    assert larger.tokens > hold.tokens
    assert larger.cost_nano_usd >= hold.cost_nano_usd


@given(tokens, st.integers(1, 100_000), st.integers(1, 100_000), tokens, prices)
def test_a_shortened_hold_costs_exactly_the_output_less(held_input: int, asked: int, granted: int, spare: int, price: Price) -> None:
    """A hold with fewer output tokens differs in nothing else, in tokens and in money rounded up line by line."""
    hold = make_hold(held_input, asked, price, spare_tokens=spare)
    shorter = granted_hold(hold, min(asked, granted), price)
    assert hold.tokens - shorter.tokens == asked - min(asked, granted)
    assert hold.cost_nano_usd - shorter.cost_nano_usd == ceil_cost(asked, price.output) - ceil_cost(min(asked, granted), price.output)
