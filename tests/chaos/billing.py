"""What a tenant has to be billed after a storm: from the rows of the ledger alone, by fractions, and by the words of its plan."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from fractions import Fraction

from services.metering.billing.periods import BillingPeriod
from tests.chaos.bookkeeper import CLOSED, Bills
from tests.chaos.books import Ledger

_USD = 10**9
# The plan "professional" of billing_plans.yaml, for a month.
_FEES = 199 * _USD + 50 * _USD
_TOKENS_INCLUDED, _NANO_USD_PER_TOKEN = 5_000_000, Fraction(4 * _USD, 100_000)
_INTERVIEWS_INCLUDED, _DEARER_INTERVIEWS = 100, 200
_DEARER_NANO_USD, _CHEAPER_NANO_USD = Fraction("1.50") * _USD, Fraction("1.20") * _USD


def billing_differences(ledger: Ledger, tenant_id: str, bills: Bills, months: Sequence[BillingPeriod]) -> Iterator[str]:
    """Says in a sentence each what is billed wrong: whenever a month was closed, all invoices together are the exact total."""
    yield from (f"of tenant {tenant_id}, {what}" for what in bills.remade)
    if len(bills.charges) != CLOSED:
        yield f"{len(bills.charges)} months of tenant {tenant_id} are closed, and not {CLOSED}"
    billed, due = sum(bills.charges) + bills.draft, sum(_due(ledger, tenant_id, month) for month in months)
    if billed != due:
        yield f"tenant {tenant_id} is billed {billed} nano-USD, {[*bills.charges, bills.draft]} by month, and owes {due}"


def _due(ledger: Ledger, tenant_id: str, month: BillingPeriod) -> int:
    entries = [entry for entry in ledger.entries if entry.tenant_id == tenant_id and _in(month, entry.reserve_time)]
    uses = [use for use in (*ledger.units, *ledger.events) if use.tenant_id == tenant_id and _in(month, use.time)]
    tokens = max(0, sum(entry.total_tokens for entry in entries) - _TOKENS_INCLUDED)
    interviews = max(0, sum(use.quantity for use in uses) - _INTERVIEWS_INCLUDED)
    dearer = min(interviews, _DEARER_INTERVIEWS)
    lines = (tokens * _NANO_USD_PER_TOKEN, dearer * _DEARER_NANO_USD, (interviews - dearer) * _CHEAPER_NANO_USD)
    return _FEES + sum(round(line) for line in lines)


def _in(month: BillingPeriod, time: datetime) -> bool:
    return month.start_time <= time < month.end_time
