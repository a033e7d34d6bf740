"""By sums of a bucket: what settled calls leave of the feed, and whether calls that are open or unresolved can explain it. Pure."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import datetime

from services.metering.call import TokenUsage
from services.metering.rating import ClassPrices, cost_nano_usd
from services.metering.reconciliation.bucket import Bucket
from services.metering.reconciliation.feed import Accounts, FeedSum
from services.metering.reconciliation.ledger_call import LedgerSum
from services.metering.reconciliation.report import Counts, ModelTokens, Rates, Report, ReportKind, Thresholds, add


@dataclass(frozen=True, slots=True)
class ComparedSums:
    """What is compared: the sums of a bucket on both sides; `is_complete` once the feed's do not grow any more."""

    provider: str
    bucket: Bucket
    ledger: Sequence[LedgerSum]
    feed: Sequence[FeedSum]
    is_complete: bool


def report(compared: ComparedSums, account: str, accounts: Accounts, rates: Rates, thresholds: Thresholds, run_time: datetime) -> Report:
    """Returns the report of an account."""
    ledger = [row for row in compared.ledger if accounts.of_call(row.provider_account, bills_tenant_account=False) == account]
    feed = [row for row in compared.feed if row.account == account]
    tokens = ModelTokens()
    for row in ledger:
        add(tokens.settled, row.model, row.settled)
    for seen in feed:
        add(tokens.feed, seen.model, seen.usage)
    settled = sum(row.settled_nano_usd for row in ledger)
    bound = sum(row.unresolved_nano_usd for row in ledger)
    lines = tokens.lines()
    priced = [(line, rates.now(line.model)) for line in lines]
    more = sum(_more(line.feed, line.settled, prices) for line, prices in priced if prices)
    less = sum(_more(line.settled, line.feed, prices) for line, prices in priced if prices)
    told = [seen.cost_nano_usd for seen in feed if seen.cost_nano_usd is not None]
    billed = sum(told) if told and len(told) == len(feed) else max(0, settled + more - less)
    # By tokens, class by class, and by money where the feed tells it: a wrong price shows in the second alone.
    drift = max(less + max(0, more - bound), settled - billed, billed - settled - bound)
    has_unpriced = any(prices is None and line.feed != line.settled for line, prices in priced)
    return Report(
        provider=compared.provider,
        account=account,
        bucket=compared.bucket,
        kind=ReportKind.SUMS,
        is_complete=compared.is_complete,
        run_time=run_time,
        settled_nano_usd=settled,
        unresolved_nano_usd=bound,
        feed_nano_usd=billed,
        drift_nano_usd=drift,
        is_drifting=compared.is_complete and (has_unpriced or thresholds.exceeded_by(drift, max(settled, billed))),
        counts=Counts(
            reconciled=sum(row.reconciled_count for row in ledger),
            unresolved=sum(row.unresolved_count for row in ledger),
        ),
        lines=lines,
    )


def _more(tokens: TokenUsage, than: TokenUsage, prices: ClassPrices) -> int:
    """Returns what the tokens cost that the one has more of than the other, class by class."""
    more = TokenUsage(*(max(0, count - other) for count, other in zip(astuple(tokens), astuple(than), strict=True)))
    return cost_nano_usd(more, prices)
