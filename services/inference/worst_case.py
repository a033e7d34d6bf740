"""The most a call may use, known before it runs: tokens by a strict bound on bytes, money by the price in force, rounded up. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

# A byte-level tokenizer never makes more tokens than bytes; the rest covers what the provider wraps around messages and the request.
MESSAGE_OVERHEAD_TOKENS = 16
REQUEST_OVERHEAD_TOKENS = 64

HISTORY_BUDGET_BYTES = 8_000
CHUNK_BUDGET_BYTES = 2_500
TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """What one model costs under one price version, in nano-USD per 1,000,000 tokens."""

    version: str
    input: int
    output: int


@dataclass(frozen=True, slots=True)
class Hold:
    """The worst case that is reserved: `input_tokens` binds the assembled prompt, `max_output_tokens` is sent to the provider.

    `spare_tokens` of output are held beside them, for a provider that writes past what it was told until it notices that it is cut off.
    """

    input_tokens: int
    max_output_tokens: int
    spare_tokens: int
    cost_nano_usd: int
    price_version: str

    @property
    def tokens(self) -> int:
        """All that is held."""
        return self.input_tokens + self.max_output_tokens + self.spare_tokens

    def within(self, tokens: int, cost_nano_usd: int) -> bool:
        """Tells whether these amounts cover it."""
        return self.tokens <= tokens and self.cost_nano_usd <= cost_nano_usd


def text_bytes(text: str) -> int:
    """Returns the length in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def text_bound(text: str) -> int:
    """Returns the most tokens one message or the system prompt can have."""
    return text_bytes(text) + MESSAGE_OVERHEAD_TOKENS


def input_bound(texts: Iterable[str]) -> int:
    """Returns the most input tokens a request of these texts can have; the system prompt counts as one of them."""
    return REQUEST_OVERHEAD_TOKENS + sum(text_bound(text) for text in texts)


def hold_input_tokens(known_bound: int, *, prompt_budget: int, history_budget: int, documents_budget: int, cap: int) -> int:
    """Returns the input tokens to hold: what is known plus budgets for what is not, never above the plan's `cap`.

    `known_bound` is `input_bound` of the caller's messages and the fixed instructions.
    """
    prompt = prompt_budget + MESSAGE_OVERHEAD_TOKENS
    return min(cap, known_bound + prompt + history_budget + documents_budget)


def make_hold(input_tokens: int, max_output_tokens: int, price: Price, *, spare_tokens: int = 0) -> Hold:
    """Returns the hold: each line rounded up, so no rounding of the bill can pass it.

    Input is held at the plain price: no request asks the provider to write its cache, and reads are cheaper.
    """
    cost = ceil_cost(input_tokens, price.input) + ceil_cost(max_output_tokens, price.output) + ceil_cost(spare_tokens, price.output)
    return Hold(input_tokens, max_output_tokens, spare_tokens, cost, price.version)


def granted_hold(asked: Hold, output_tokens: int, price: Price) -> Hold:
    """Returns what was asked for with so many output tokens instead."""
    return make_hold(asked.input_tokens, output_tokens, price, spare_tokens=asked.spare_tokens)


def ceil_cost(tokens: int, nano_usd_per_million: int) -> int:
    """Returns what the tokens cost, in nano-USD, rounded up."""
    return -(-tokens * nano_usd_per_million // TOKENS_PER_PRICE)
