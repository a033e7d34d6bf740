"""How a quantity is priced: by the unit, through graduated or volume tiers, or in packages. Pure; every line is rounded once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from services.metering.billing.exact import PER_MILLION, priced


@dataclass(frozen=True, slots=True)
class PricedPart:
    """A part of a quantity at one price. `tier` counts from 1; tier 0 is what the plan includes."""

    tier: int
    quantity: int
    nano_usd_per_million: int
    amount_nano_usd: int


@dataclass(frozen=True, slots=True)
class PerUnit:
    """One price for every unit, in nano-USD per 1,000,000 units."""

    nano_usd_per_million: int


@dataclass(frozen=True, slots=True)
class Tier:
    """A price up to a quantity, inclusive; the last tier of a list has no bound."""

    up_to: int | None
    nano_usd_per_million: int


@dataclass(frozen=True, slots=True)
class Graduated:
    """Each unit at the price of the tier it falls into. At least one tier, bounds rising, the last unbounded."""

    tiers: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class Volume:
    """Every unit at the price of the tier that the whole quantity falls into."""

    tiers: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class Package:
    """Whole packages of `size` units; one that is begun is paid."""

    size: int
    nano_usd: int


Pricing: TypeAlias = PerUnit | Graduated | Volume | Package


def price_parts(quantity: int, pricing: Pricing) -> Sequence[PricedPart]:
    """Prices a quantity of 0 or more; no part for 0. Raises: AmountTooLarge."""
    if quantity <= 0:
        return []
    match pricing:
        case PerUnit(price):
            return [_part(1, quantity, price)]
        case Graduated(tiers):
            return _graduated(quantity, tiers)
        case Volume(tiers):
            reached = next(tier for tier in tiers if tier.up_to is None or quantity <= tier.up_to)
            return [_part(1, quantity, reached.nano_usd_per_million)]
        case Package(size, price):
            return [_part(1, -(-quantity // size), price * PER_MILLION)]


def _graduated(quantity: int, tiers: tuple[Tier, ...]) -> list[PricedPart]:
    parts, before = [], 0
    for number, tier in enumerate(tiers, start=1):
        end = quantity if tier.up_to is None else min(quantity, tier.up_to)
        if end > before:
            parts.append(_part(number, end - before, tier.nano_usd_per_million))
            before = end
    return parts


def _part(tier: int, quantity: int, price: int) -> PricedPart:
    return PricedPart(tier, quantity, price, priced(quantity, price))
