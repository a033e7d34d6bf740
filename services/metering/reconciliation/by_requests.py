"""Request by request: which of the ledger's calls each billed request is, which calls that closes, and what stays unexplained. Pure.

Never guesses: a request that could be two calls closes neither, and a call is closed to nothing only where every request is known.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from services.metering.call import CallState, TokenUsage
from services.metering.reconciliation.bucket import Bucket
from services.metering.reconciliation.feed import Accounts, BilledRequest, UnreadRow
from services.metering.reconciliation.ledger_call import DISPATCH_GRACE, Closing, LedgerCall

# How far beyond its bucket calls and requests are looked at: a call is sent after it is reserved, and another one may bear its id.
MARGIN = timedelta(minutes=15)


@dataclass(frozen=True, slots=True)
class Requests:
    """What the feed said of a stretch of time. `complete_until` is None where it did not say."""

    requests: Sequence[BilledRequest]
    complete_until: datetime | None
    unread: Sequence[UnreadRow] = ()

    def hold_all_before(self, moment: datetime) -> bool:
        """Tells whether every request that began before the moment is there: a row that cannot be read may be any of them."""
        return not self.unread and self.complete_until is not None and self.complete_until >= moment


@dataclass(slots=True)
class Matching:
    """Requests by the call they are, by its reservation; and those that are nobody's, or could be several calls'."""

    requests: dict[bytes, list[BilledRequest]] = field(default_factory=lambda: defaultdict(list))
    ambiguous: set[bytes] = field(default_factory=set)
    unclear: list[BilledRequest] = field(default_factory=list)
    unknown: list[BilledRequest] = field(default_factory=list)

    def of(self, call: LedgerCall) -> Sequence[BilledRequest]:
        """Returns the requests that a call is known to be."""
        return self.requests.get(_key(call), ())

    def is_ambiguous(self, call: LedgerCall) -> bool:
        """Tells whether it cannot be said which request a call is. A call is sent once: two requests with its id are not both its own."""
        return _key(call) in self.ambiguous or len(self.of(call)) > 1


def match(calls: Sequence[LedgerCall], feed: Requests, accounts: Accounts) -> Matching:
    """Finds the call of each request: by the provider's id of it where the ledger has that, else by the call id it carried."""
    times_named = Counter(call.provider_request_id for call in calls)
    by_request = {
        call.provider_request_id: call for call in calls if call.provider_request_id and times_named[call.provider_request_id] == 1
    }
    by_call_id: dict[UUID, list[LedgerCall]] = defaultdict(list)
    for call in calls:
        # One whose request is known is no other request.
        if call.provider_request_id not in by_request:
            by_call_id[call.call_id].append(call)
    matching = Matching()
    for request in feed.requests:
        named = by_request.get(request.request_id)
        rivals = [named] if named else _rivals(request, by_call_id, accounts)
        if not rivals:
            matching.unknown.append(request)
        elif len(rivals) > 1:
            matching.ambiguous.update(map(_key, rivals))
            matching.unclear.append(request)
        else:
            matching.requests[_key(rivals[0])].append(request)
    # Which call it is may be readable when its bill is not: then nothing else is that call's bill.
    named_unread = {row.call_id for row in feed.unread} | {row.request_id or None for row in feed.unread}
    matching.ambiguous.update(_key(call) for call in calls if {call.call_id, call.provider_request_id} & named_unread)
    return matching


def closings(calls: Sequence[LedgerCall], matching: Matching, feed: Requests, bucket: Bucket, accounts: Accounts) -> list[Closing]:
    """Returns the unresolved calls of the bucket whose bill the feed tells for certain, and what it is."""
    found: list[Closing] = []
    for call in calls:
        compared = accounts.of_call(call.provider_account, bills_tenant_account=call.bills_tenant_account) is not None
        if call.state is not CallState.UNRESOLVED or not bucket.holds(call.reserve_time) or not compared or matching.is_ambiguous(call):
            continue
        requests = matching.of(call)
        if requests and requests[0].is_final:
            found.append(Closing(call, requests[0].usage, requests[0].request_id))
        elif not requests and _was_never_billed(call, matching, feed, bucket):
            found.append(Closing(call, TokenUsage(), ""))
    return found


def _was_never_billed(call: LedgerCall, matching: Matching, feed: Requests, bucket: Bucket) -> bool:
    last_moment = call.dispatch_deadline + DISPATCH_GRACE
    # Beyond the margin neither its requests nor its rivals were looked at.
    if last_moment > bucket.end + MARGIN or not feed.hold_all_before(last_moment):
        return False
    # A request without a call id could be anybody's.
    return not any(request.call_id is None and call.may_have_sent(request.start_time) for request in matching.unknown)


def _rivals(request: BilledRequest, by_call_id: dict[UUID, list[LedgerCall]], accounts: Accounts) -> list[LedgerCall]:
    if request.call_id is None:
        return []
    return [
        call for call in by_call_id.get(request.call_id, ()) if call.may_have_sent(request.start_time) and _shares(request, call, accounts)
    ]


def _shares(request: BilledRequest, call: LedgerCall, accounts: Accounts) -> bool:
    # Where the feed is one, it may hold tenants' own keys as well: their calls are rivals like any other.
    return accounts.is_one or accounts.of_call(call.provider_account, bills_tenant_account=call.bills_tenant_account) == request.account


def _key(call: LedgerCall) -> bytes:
    return call.tenant_id + call.reservation_id
