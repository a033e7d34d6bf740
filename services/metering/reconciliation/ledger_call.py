"""The ledger's side of a comparison: its calls one by one, or their sums, and what to close them with; the ports of both and of reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from services.metering.call import CallState, PriceKey, TokenUsage
from services.metering.outbox import CallEnd
from services.metering.reconciliation.bucket import Bucket
from services.metering.reconciliation.report import Report

# After its deadline a call is not dispatched; this is added for clocks that differ. The database asks for the same minute.
DISPATCH_GRACE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class LedgerCall:
    """An attempt that was opened and is not void. `usage` and `cost_nano_usd` are what it was billed: nothing while open or unresolved."""

    tenant_id: bytes
    reservation_id: bytes
    call_id: UUID
    state: CallState
    provider_account: str
    bills_tenant_account: bool
    price: PriceKey
    reserve_time: datetime
    dispatch_deadline: datetime
    provider_request_id: str
    usage: TokenUsage
    cost_nano_usd: int
    bound_nano_usd: int

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return self.price.model

    @property
    def is_billed(self) -> bool:
        """True when the ledger knows its bill."""
        return self.state in (CallState.SETTLED, CallState.RECONCILED)

    def may_have_sent(self, moment: datetime) -> bool:
        """Tells whether a request that the provider saw at the moment may be this call's."""
        return self.reserve_time - DISPATCH_GRACE <= moment <= self.dispatch_deadline + DISPATCH_GRACE


@dataclass(frozen=True, slots=True)
class LedgerSum:
    """Calls of one model on one account, reserved in a bucket; the bound is that of open and unresolved ones."""

    provider_account: str
    model: str
    settled: TokenUsage
    settled_nano_usd: int
    reconciled_count: int
    unresolved_count: int
    unresolved_nano_usd: int


@dataclass(frozen=True, slots=True)
class Closing:
    """An unresolved call and what the feed says it was billed: with nothing, and no request, when it certainly was not."""

    call: LedgerCall
    usage: TokenUsage
    provider_request_id: str


@dataclass(frozen=True, slots=True)
class RatedClosing:
    """A closing with its cost and the id its entry will have."""

    closing: Closing
    entry_id: bytes
    cost_nano_usd: int

    @property
    def tenant_id(self) -> bytes:
        """Whose."""
        return self.closing.call.tenant_id

    @property
    def reservation_id(self) -> bytes:
        """Which attempt."""
        return self.closing.call.reservation_id


@dataclass(frozen=True, slots=True)
class ReportPosition:
    """The last report of the page before."""

    bucket: Bucket
    provider: str
    account: str


class ReconciliationLedger(Protocol):
    """The ledger of all tenants."""

    async def calls(self, provider: str, reserved: Bucket) -> Sequence[LedgerCall]:
        """Returns the provider's calls reserved within a stretch of time. Raises: InvalidRequest when they are too many."""
        ...

    async def sums(self, provider: str, bucket: Bucket) -> Sequence[LedgerSum]:
        """Returns the sums of the provider's calls reserved in a bucket, without those on tenants' own accounts."""
        ...

    async def close(self, closings: Sequence[RatedClosing]) -> Sequence[CallEnd]:
        """Closes calls that are still unresolved and cannot be dispatched any more; returns the ends that were written now."""
        ...


class ReportStore(Protocol):
    """The reports."""

    async def put(self, report: Report) -> bool:
        """Stores a report in the place of the one before, unless that is of a later run; returns whether its alarm is news."""
        ...

    async def page(self, after: ReportPosition | None, size: int, *, drifting_only: bool) -> Sequence[Report]:
        """Returns up to `size` reports after a position, last bucket first."""
        ...

    async def complete(self, provider: str, accounts: Sequence[str], start: datetime, end: datetime) -> Sequence[Bucket]:
        """Returns the buckets within the stretch that every one of the accounts has a complete report of."""
        ...
