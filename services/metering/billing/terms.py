"""What a plan charges: fees, usage, discounts, a minimum. A value with a stable form, kept in versions that never change."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.metering.billing.tiers import Graduated, Package, PerUnit, Pricing, Tier, Volume


@dataclass(frozen=True, slots=True)
class Fee:
    """A fixed amount a billing period, for the plan or for one feature of it."""

    name: str
    nano_usd: int


@dataclass(frozen=True, slots=True)
class UsageCharge:
    """What a meter costs: `included` units a period for nothing, the rest by its pricing."""

    meter: str
    included: int
    pricing: Pricing


@dataclass(frozen=True, slots=True)
class Discount:
    """Taken off the sum of fees and usage: a share in basis points (1–10,000), or an amount a period. One of them is 0."""

    name: str
    basis_points: int
    nano_usd: int


@dataclass(frozen=True, slots=True)
class BillingTerms:
    """All that one version of a plan charges; money in nano-USD. A minimum of 0 is none."""

    fees: tuple[Fee, ...] = ()
    charges: tuple[UsageCharge, ...] = ()
    discounts: tuple[Discount, ...] = ()
    minimum_nano_usd: int = 0

    def usage_alone(self) -> "BillingTerms":
        """Returns what is charged for usage of a period that had no invoice: no fees, no amounts a period, no minimum."""
        return BillingTerms((), self.charges, tuple(discount for discount in self.discounts if discount.basis_points))


@dataclass(frozen=True, slots=True)
class PlanVersion:
    """Terms of a plan from `effective_time` until its next version. The first version of a plan also stands for all time before it."""

    plan: str
    version: str
    effective_time: datetime
    terms: BillingTerms

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content, the same for the same terms however the file is written."""
        content = [self.plan, self.version, self.effective_time.isoformat(), terms_form(self.terms)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def terms_form(terms: BillingTerms) -> dict[str, Any]:
    """Returns the terms as the JSON object that is stored."""
    return {
        "fees": [[fee.name, fee.nano_usd] for fee in terms.fees],
        "charges": [[charge.meter, charge.included, _pricing_form(charge.pricing)] for charge in terms.charges],
        "discounts": [[discount.name, discount.basis_points, discount.nano_usd] for discount in terms.discounts],
        "minimum_nano_usd": terms.minimum_nano_usd,
    }


def read_terms(form: Mapping[str, Any]) -> BillingTerms:
    """Reads what `terms_form` made."""
    return BillingTerms(
        tuple(Fee(name, amount) for name, amount in form["fees"]),
        tuple(UsageCharge(meter, included, _pricing(pricing)) for meter, included, pricing in form["charges"]),
        tuple(Discount(name, points, amount) for name, points, amount in form["discounts"]),
        form["minimum_nano_usd"],
    )


def _pricing_form(pricing: Pricing) -> list[Any]:
    match pricing:
        case PerUnit(price):
            return ["unit", price]
        case Graduated(tiers):
            return ["graduated", [[tier.up_to, tier.nano_usd_per_million] for tier in tiers]]
        case Volume(tiers):
            return ["volume", [[tier.up_to, tier.nano_usd_per_million] for tier in tiers]]
        case Package(size, price):
            return ["package", size, price]


def _pricing(form: Sequence[Any]) -> Pricing:
    kind, *rest = form
    if kind == "unit":
        return PerUnit(rest[0])
    if kind == "package":
        return Package(rest[0], rest[1])
    tiers = tuple(Tier(up_to, price) for up_to, price in rest[0])
    return Graduated(tiers) if kind == "graduated" else Volume(tiers)
