"""Prepaid credits: which pay for an invoice, in which order, and how much of each. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from services.metering.billing.periods import BillingPeriod


@dataclass(frozen=True, slots=True)
class Credit:
    """An amount paid or given in advance. It pays for periods that end after its `effective_time` and begin before its `expire_time`."""

    credit_id: UUID
    amount_nano_usd: int
    priority: int
    effective_time: datetime
    expire_time: datetime | None
    reason: str
    record_time: datetime


@dataclass(frozen=True, slots=True)
class CreditUse:
    """What one credit pays of one invoice; over 0."""

    credit_id: UUID
    amount_nano_usd: int


def is_usable(credit: Credit, period: BillingPeriod) -> bool:
    """Tells whether a credit pays for a period."""
    return credit.effective_time < period.end_time and (credit.expire_time is None or credit.expire_time > period.start_time)


def apply_credits(due: int, credits: Sequence[Credit], used: Mapping[UUID, int], period: BillingPeriod) -> list[CreditUse]:
    """Pays what is due: lowest priority first, then what expires sooner, then what was granted sooner."""
    uses: list[CreditUse] = []
    for credit in sorted((credit for credit in credits if is_usable(credit, period)), key=_order):
        amount = min(due, credit.amount_nano_usd - used.get(credit.credit_id, 0))
        if amount > 0:
            uses.append(CreditUse(credit.credit_id, amount))
            due -= amount
    return uses


def _order(credit: Credit) -> tuple[int, bool, datetime, datetime, UUID]:
    return credit.priority, credit.expire_time is None, credit.expire_time or credit.effective_time, credit.record_time, credit.credit_id
