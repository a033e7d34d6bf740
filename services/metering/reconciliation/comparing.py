"""One bucket: read the feed, read the ledger, close what the feed tells for certain, compare. One class for each kind of feed.

The feed is read before the ledger: a call is in the ledger before it is sent, so a request without a call is one that nobody recorded.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Protocol
from uuid import UUID

import structlog

from services.kernel.errors import InvalidRequest, Unavailable
from services.kernel.ids import new_uuid7
from services.metering.call import PriceKey
from services.metering.ledger import EndSink
from services.metering.price_catalog import PriceCatalog
from services.metering.rating import cost_nano_usd
from services.metering.reconciliation import by_requests_report, by_sums
from services.metering.reconciliation.bucket import Bucket
from services.metering.reconciliation.by_requests import MARGIN, Requests, closings, match
from services.metering.reconciliation.by_requests_report import Compared
from services.metering.reconciliation.feed import Accounts, BilledRequest, RequestsFeed, RowUnreadable, SumsFeed, UnreadRow
from services.metering.reconciliation.ledger_call import Closing, LedgerCall, RatedClosing, ReconciliationLedger
from services.metering.reconciliation.report import Rates, Report, Thresholds, undated

log = structlog.get_logger(__name__)

# What one bucket may hold in memory, with its margins.
MOST_REQUESTS = 100_000
_CLOSINGS_PER_TRANSACTION = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """The reports of a bucket, one an account, how many calls were closed for them, and why rows of the feed were set aside."""

    reports: Sequence[Report]
    closed_count: int
    set_aside: Sequence[str] = ()


class Comparison(Protocol):
    """How buckets are compared with a provider's feed."""

    async def compare(self, bucket: Bucket, now: datetime) -> Outcome:
        """Compares one bucket. Raises: Unavailable, InvalidRequest for one with too many calls."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What both kinds need: whose feed it is, which accounts are in it, what tokens cost and what raises the alarm."""

    provider: str
    accounts: Accounts
    prices: PriceCatalog
    thresholds: Thresholds

    async def rates(self, keys: Iterable[PriceKey] = ()) -> Rates:
        """Returns the prices in force, and those of calls rated by the keys. Raises: Unavailable."""
        in_force = (await self.prices.in_force()).version.prices
        by_model = {undated(model): prices for (provider, model), prices in in_force.items() if provider == self.provider}
        of_calls = {}
        for key in set(keys):
            of_calls[key] = await self.prices.prices_of(key)
        missing = [key for key, prices in of_calls.items() if prices is None]
        if missing:
            # Each call's open found its price in the database: only our view of it is behind.
            raise Unavailable("price book", f"the prices of version {missing[0].version} are being loaded; try again shortly")
        return Rates({key: prices for key, prices in of_calls.items() if prices is not None}, by_model)


class SumsComparison:
    """Compares sums; closes nothing."""

    def __init__(self, feed: SumsFeed, ledger: ReconciliationLedger, terms: Terms, *, lag: timedelta) -> None:
        """`lag`: how long after a bucket's end the feed holds all of it."""
        self._feed = feed
        self._ledger = ledger
        self._terms = terms
        self._lag = lag

    async def compare(self, bucket: Bucket, now: datetime) -> Outcome:
        """Compares one bucket."""
        terms, is_complete = self._terms, now >= bucket.end + self._lag
        try:
            theirs = await self._feed.sums(bucket)
        except RowUnreadable as error:
            # A sum without one of its rows is none: no report is made of it, and the others are.
            return Outcome([], 0, (error.message,))
        ours = await self._ledger.sums(terms.provider, bucket)
        compared = by_sums.ComparedSums(terms.provider, bucket, ours, theirs, is_complete)
        rates = await terms.rates()
        names = terms.accounts.names
        return Outcome([by_sums.report(compared, name, terms.accounts, rates, terms.thresholds, now) for name in names], 0)


class RequestsComparison:
    """Compares single requests, and closes unresolved calls with their figures."""

    def __init__(self, feed: RequestsFeed, ledger: ReconciliationLedger, terms: Terms, ends: EndSink) -> None:
        self._feed = feed
        self._ledger = ledger
        self._terms = terms
        self._ends = ends

    async def compare(self, bucket: Bucket, now: datetime) -> Outcome:
        """Closes what the feed tells for certain, then compares."""
        around = Bucket(bucket.start - MARGIN, bucket.end + MARGIN)
        feed = await self._read(around)
        calls = await self._ledger.calls(self._terms.provider, around)
        matching = await asyncio.to_thread(match, calls, feed, self._terms.accounts)
        found = closings(calls, matching, feed, bucket, self._terms.accounts)
        closed = await self._close(found)
        if found:
            # Also when another replica was quicker: what was read before is not true any more.
            calls = await self._ledger.calls(self._terms.provider, around)
            matching = await asyncio.to_thread(match, calls, feed, self._terms.accounts)
        rates = await self._terms.rates(call.price for call in calls)
        compared = Compared(self._terms.provider, bucket, calls, matching, feed)
        made = partial(by_requests_report.report, compared, accounts=self._terms.accounts, rates=rates, thresholds=self._terms.thresholds)
        reports = [await asyncio.to_thread(made, name, run_time=now) for name in self._terms.accounts.names]
        return Outcome(reports, closed, [row.why for row in feed.unread])

    async def _read(self, around: Bucket) -> Requests:
        found: list[BilledRequest] = []
        unread: list[UnreadRow] = []
        complete: list[datetime | None] = []
        async for page in self._feed.requests(around.start, around.end):
            found += page.requests
            unread += page.unread
            complete.append(page.complete_until)
            if len(found) + len(unread) > MOST_REQUESTS:
                raise too_many(MOST_REQUESTS)
        # The pages were read one after the other: the first one knows least.
        known = [moment for moment in complete if moment is not None]
        return Requests(found, min(known) if known and len(known) == len(complete) else None, unread)

    async def _close(self, found: Sequence[Closing]) -> int:
        closed = 0
        for start in range(0, len(found), _CLOSINGS_PER_TRANSACTION):
            batch = found[start : start + _CLOSINGS_PER_TRANSACTION]
            rates = await self._terms.rates(closing.call.price for closing in batch)
            rated = [_rated(closing, rates) for closing in batch]
            ends = await self._ledger.close(rated)
            self._ends.send(ends)
            closed += len(ends)
            _log_closed(rated, {end.tenant_id + end.reservation_id for end in ends})
        return closed


def too_many(most: int) -> InvalidRequest:
    """Builds the refusal of a bucket that does not fit into memory."""
    return InvalidRequest("start_time", f"a bucket has over {most} calls or requests: set TENANTRY_RECONCILIATION_BUCKET to a shorter one")


def _rated(closing: Closing, rates: Rates) -> RatedClosing:
    return RatedClosing(closing, new_uuid7().bytes, cost_nano_usd(closing.usage, rates.of_calls[closing.call.price]))


def _log_closed(rated: Sequence[RatedClosing], written: set[bytes]) -> None:
    for item in rated:
        call: LedgerCall = item.closing.call
        if item.tenant_id + item.reservation_id not in written:
            continue
        told = log.warning if item.cost_nano_usd > call.bound_nano_usd else log.info
        told(
            "call_reconciled",
            tenant_id=str(UUID(bytes=call.tenant_id)),
            call_id=str(call.call_id),
            reservation_id=str(UUID(bytes=call.reservation_id)),
            provider_request_id=item.closing.provider_request_id,
            tokens=item.closing.usage.total,
            cost_nano_usd=item.cost_nano_usd,
            bound_nano_usd=call.bound_nano_usd,
        )
