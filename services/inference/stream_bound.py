"""How much a running stream may still bring before its bill could pass what is held. Pure.

A provider that keeps to the `max_tokens` it was sent never passes the line, which lies above them. One that passes it does not keep to
them, and has until the bound, `in_flight_tokens` further on, to notice that it is cut off. So more must be held than `max_tokens`: at the
bound itself the two could not be told apart in time.
"""

from services.inference.call import Attempt, Received
from services.inference.token_density import TokenDensities
from services.inference.worst_case import TOKENS_PER_PRICE, Hold, Price, ceil_cost

# What the provider's own count of a text has beside the text: the wrapping of one message.
COUNT_OVERHEAD_TOKENS = 32
# Text of any kind has had at most one token in two bytes, but for a few scripts and for noise; those the provider counts itself.
LEAST_PERCENT = 50
SMALLEST_EXTENSION_TOKENS = 256


def spare_tokens(in_flight_tokens: int) -> int:
    """Returns the output to hold beside `max_tokens`."""
    return in_flight_tokens + COUNT_OVERHEAD_TOKENS


def output_allowed(hold: Hold, price: Price, received: Received) -> int:
    """Returns the most output tokens that are covered, beside the input that was billed, or that is held until the bill is known."""
    input_tokens = received.usage.total_input or hold.input_tokens
    by_tokens = hold.tokens - input_tokens
    if not price.output:
        return by_tokens
    return min(by_tokens, (hold.cost_nano_usd - ceil_cost(input_tokens, price.input)) * TOKENS_PER_PRICE // price.output)


def output_at_most(received: Received, model: str, densities: TokenDensities) -> int:
    """Returns the most output tokens the stream can have brought: what the provider has counted, and a bound of what came after."""
    return received.counted_tokens + densities.bound(model, received.output_bytes - received.counted_bytes, LEAST_PERCENT)


def past_the_line(attempt: Attempt, densities: TokenDensities, in_flight_tokens: int) -> int:
    """Returns by how many tokens the stream may be past what is safe; 0 or less while it is safe."""
    question, received = attempt.question, attempt.received
    line = output_allowed(attempt.hold, question.price, received) - in_flight_tokens
    return output_at_most(received, question.model.name, densities) - line


def extension(hold: Hold, past_tokens: int) -> int:
    """Returns how many tokens more to hold: in steps that grow with the answer, so that a long one asks seldom."""
    return past_tokens + max(SMALLEST_EXTENSION_TOKENS, (hold.max_output_tokens + hold.spare_tokens) // 2)
