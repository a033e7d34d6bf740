"""What tokens cost: integers only, each price class rounded once, half to even."""

from dataclasses import dataclass

from services.metering.call import TokenUsage

TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True, slots=True)
class BatchPrices:
    """Nano-USD per 1,000,000 tokens of each class in a provider's batch; None where there is no price."""

    input: int | None = None
    output: int | None = None
    cache_read: int | None = None
    cache_write_5m: int | None = None
    cache_write_1h: int | None = None


@dataclass(frozen=True, slots=True)
class ClassPrices:
    """Nano-USD per 1,000,000 tokens of each class; `batch` is None for a model that has no batch prices."""

    input: int
    output: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    batch: BatchPrices | None = None


def line_nano_usd(tokens: int, nano_usd_per_million: int) -> int:
    """Returns tokens × price ÷ 10⁶, rounded half to even. Both 0 or more."""
    whole, rest = divmod(tokens * nano_usd_per_million, TOKENS_PER_PRICE)
    doubled = 2 * rest
    if doubled > TOKENS_PER_PRICE or (doubled == TOKENS_PER_PRICE and whole % 2 == 1):
        return whole + 1
    return whole


def cost_nano_usd(usage: TokenUsage, prices: ClassPrices) -> int:
    """Returns the exact cost of a call: the sum of its lines, one line a class."""
    return (
        line_nano_usd(usage.input, prices.input)
        + line_nano_usd(usage.output, prices.output)
        + line_nano_usd(usage.cache_read, prices.cache_read)
        + line_nano_usd(usage.cache_write_5m, prices.cache_write_5m)
        + line_nano_usd(usage.cache_write_1h, prices.cache_write_1h)
    )
