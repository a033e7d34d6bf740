"""The report of a comparison request by request: each difference counts by itself, so that two never make up for each other. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from services.metering.call import CallState
from services.metering.rating import cost_nano_usd
from services.metering.reconciliation.bucket import Bucket
from services.metering.reconciliation.by_requests import MARGIN, Matching, Requests
from services.metering.reconciliation.feed import Accounts, BilledRequest
from services.metering.reconciliation.ledger_call import LedgerCall
from services.metering.reconciliation.report import Counts, ModelTokens, Rates, Report, ReportKind, Thresholds, add


@dataclass(frozen=True, slots=True)
class Compared:
    """What is compared: the calls and requests of a bucket and its margins, and which of them belong together."""

    provider: str
    bucket: Bucket
    calls: Sequence[LedgerCall]
    matching: Matching
    feed: Requests

    @property
    def is_complete(self) -> bool:
        """True when every request that a call of the bucket can be is there."""
        return self.feed.hold_all_before(self.bucket.end + MARGIN)


@dataclass(slots=True)
class _Sums:
    tokens: ModelTokens = field(default_factory=ModelTokens)
    settled: int = 0
    unresolved: int = 0
    feed: int = 0
    drift: int = 0
    has_unpriced: bool = False
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Counts.__slots__, 0))


def report(compared: Compared, account: str, accounts: Accounts, rates: Rates, thresholds: Thresholds, run_time: datetime) -> Report:
    """Returns the report of an account."""
    sums, bucket = _Sums(), compared.bucket
    for call in compared.calls:
        whose = accounts.of_call(call.provider_account, bills_tenant_account=call.bills_tenant_account)
        if bucket.holds(call.reserve_time) and whose == account:
            _count_call(sums, call, compared, rates)
    _count_unexplained(sums, compared.matching, account, bucket, rates)
    is_drifting = thresholds.exceeded_by(sums.drift, max(sums.settled, sums.feed)) or sums.has_unpriced
    return Report(
        provider=compared.provider,
        account=account,
        bucket=bucket,
        kind=ReportKind.REQUESTS,
        is_complete=compared.is_complete,
        run_time=run_time,
        settled_nano_usd=sums.settled,
        unresolved_nano_usd=sums.unresolved,
        feed_nano_usd=sums.feed,
        drift_nano_usd=sums.drift,
        is_drifting=compared.is_complete and is_drifting,
        counts=Counts(**sums.counts),
        lines=sums.tokens.lines(),
        set_aside_count=len(compared.feed.unread),
    )


def _count_call(sums: _Sums, call: LedgerCall, compared: Compared, rates: Rates) -> None:
    requests = compared.matching.of(call)
    billed = sum(cost_nano_usd(request.usage, rates.of_calls[call.price]) for request in requests)
    sums.feed += billed
    _add_tokens(sums, requests)
    sums.counts["ambiguous"] += compared.matching.is_ambiguous(call)
    if not call.is_billed:
        sums.unresolved += call.bound_nano_usd
        sums.counts["unresolved"] += 1
        sums.counts["unfinished"] += any(not request.is_final for request in requests)
        # Its bill is not known yet, only that it is within the bound.
        sums.drift += max(0, billed - call.bound_nano_usd)
        return
    sums.settled += call.cost_nano_usd
    add(sums.tokens.settled, call.model, call.usage)
    sums.counts["reconciled"] += call.state is CallState.RECONCILED
    if requests:
        sums.counts["differing"] += len(requests) > 1 or requests[0].usage != call.usage
        sums.drift += abs(billed - call.cost_nano_usd)
    elif call.usage.total and compared.is_complete and not compared.matching.is_ambiguous(call):
        sums.counts["missing"] += 1
        sums.drift += call.cost_nano_usd


def _count_unexplained(sums: _Sums, matching: Matching, account: str, bucket: Bucket, rates: Rates) -> None:
    unknown = [request for request in matching.unknown if request.account == account and bucket.holds(request.start_time)]
    unclear = [request for request in matching.unclear if request.account == account and bucket.holds(request.start_time)]
    sums.counts["unknown"] += len(unknown)
    sums.drift += _cost_now(sums, unknown, rates)
    sums.feed += _cost_now(sums, (*unknown, *unclear), rates)
    _add_tokens(sums, (*unknown, *unclear))


def _cost_now(sums: _Sums, requests: Iterable[BilledRequest], rates: Rates) -> int:
    total = 0
    for request in requests:
        prices = rates.now(request.model)
        if prices is None:
            # What no price is known for cannot be weighed: someone has to look.
            sums.has_unpriced = True
        else:
            total += cost_nano_usd(request.usage, prices)
    return total


def _add_tokens(sums: _Sums, requests: Iterable[BilledRequest]) -> None:
    for request in requests:
        add(sums.tokens.feed, request.model, request.usage)
