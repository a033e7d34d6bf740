"""What entries of calls cost by the price book: each by the version it names, of all the tokens its call had by then. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from uuid import UUID

from services.metering.call import TokenUsage
from services.metering.price_book import PriceVersion
from services.metering.rating import cost_nano_usd
from services.metering.verification import Check, Difference

# A cost that an operator or the provider's bill told: no price made it.
RECONCILIATION = 2
_FIGURE = "cost_nano_usd"


@dataclass(frozen=True, slots=True)
class PricedEntry:
    """An entry as it is stored; kinds are the database's."""

    reservation_id: UUID
    entry_id: UUID
    kind: int
    price_version: str
    provider: str
    model: str
    usage: TokenUsage
    cost_nano_usd: int


def price_differences(entries: Iterable[PricedEntry], versions: Mapping[str, PriceVersion]) -> list[Difference]:
    """Compares entries, each call's in the order they were recorded.

    What an adjustment adds is what its price makes of all the call's tokens, less what the call cost before.
    """
    return [
        difference for _, of_call in groupby(entries, key=lambda entry: entry.reservation_id) for difference in _of_call(of_call, versions)
    ]


def _of_call(entries: Iterable[PricedEntry], versions: Mapping[str, PriceVersion]) -> Iterable[Difference]:
    usage, before = TokenUsage(), 0
    for entry in entries:
        usage = _added(usage, entry.usage)
        cost = before + entry.cost_nano_usd if entry.kind == RECONCILIATION else _cost(entry, usage, versions)
        if cost is None or cost - before != entry.cost_nano_usd:
            subject = f"{entry.entry_id} {entry.price_version}"
            yield Difference(Check.PRICE, subject, _FIGURE, str(entry.cost_nano_usd), "" if cost is None else str(cost - before))
        # Of a wrong entry what it should have been: the next one is told only where it is wrong itself.
        before = before + entry.cost_nano_usd if cost is None else cost


def _cost(entry: PricedEntry, usage: TokenUsage, versions: Mapping[str, PriceVersion]) -> int | None:
    version = versions.get(entry.price_version)
    prices = None if version is None else version.prices.get((entry.provider, entry.model))
    return None if prices is None else cost_nano_usd(usage, prices)


def _added(one: TokenUsage, other: TokenUsage) -> TokenUsage:
    return TokenUsage(
        one.input + other.input,
        one.output + other.output,
        one.cache_read + other.cache_read,
        one.cache_write_5m + other.cache_write_5m,
        one.cache_write_1h + other.cache_write_1h,
    )
