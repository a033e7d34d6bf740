"""What a provider says it billed: by sums of a bucket, or request by request. Two ports; adapters read them from providers."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from services.kernel.errors import Unavailable
from services.metering.call import TokenUsage
from services.metering.reconciliation.bucket import Bucket


@dataclass(frozen=True, slots=True)
class FeedSum:
    """What an account's calls of one model used in a bucket. `cost_nano_usd` is None where the feed tells tokens alone."""

    account: str
    model: str
    usage: TokenUsage
    cost_nano_usd: int | None


@dataclass(frozen=True, slots=True)
class BilledRequest:
    """One request as the provider billed it. `call_id` is None where it carried none; not `is_final` while its bill may still grow."""

    request_id: str
    call_id: UUID | None
    account: str
    model: str
    usage: TokenUsage
    is_final: bool
    start_time: datetime


@dataclass(frozen=True, slots=True)
class UnreadRow:
    """A row of the feed that cannot be read, and why. What could be read of it says which call it may be."""

    why: str
    request_id: str | None
    call_id: UUID | None


class RowUnreadable(Unavailable):
    """A row of the feed cannot be read, and with it the sum that it belongs to; other buckets can."""


@dataclass(frozen=True, slots=True)
class RequestPage:
    """Some requests of a stretch of time. Every request that began before `complete_until` is in it or another page; None: who knows."""

    requests: Sequence[BilledRequest]
    complete_until: datetime | None
    unread: Sequence[UnreadRow] = ()


class SumsFeed(Protocol):
    """A feed that knows sums."""

    async def sums(self, bucket: Bucket) -> Sequence[FeedSum]:
        """Returns what was used in the bucket, by account and model. Raises: Unavailable; RowUnreadable where it is this bucket's alone."""
        ...


class RequestsFeed(Protocol):
    """A feed that knows single requests."""

    def requests(self, start: datetime, end: datetime) -> AsyncIterator[RequestPage]:
        """Yields what began from `start` to before `end`, in pages. Raises: Unavailable."""
        ...


class Accounts:
    """The operator's accounts at the provider, by the ids the feed knows them under; without any, all of the feed is one of no name."""

    def __init__(self, ids_by_name: Mapping[str, Sequence[str]]) -> None:
        self._name_by_id = {feed_id: name for name, ids in ids_by_name.items() for feed_id in ids}
        self.names = tuple(ids_by_name) or ("",)

    @property
    def is_one(self) -> bool:
        """True when the feed is not told apart."""
        return not self._name_by_id

    @property
    def ids(self) -> tuple[str, ...]:
        """Every id."""
        return tuple(self._name_by_id)

    def of_feed(self, *feed_ids: str) -> str | None:
        """Returns whose account the first known of these ids is; None when it is nobody's we know: other products' use."""
        if self.is_one:
            return ""
        return next((self._name_by_id[feed_id] for feed_id in feed_ids if feed_id in self._name_by_id), None)

    def of_call(self, provider_account: str, *, bills_tenant_account: bool) -> str | None:
        """Returns the account a call of the ledger is compared in; None for a call that this feed does not hold."""
        if bills_tenant_account:
            return None
        if self.is_one:
            return ""
        return provider_account if provider_account in self.names else None
